r"""Prepares a log into a folder, from which any number of runs train: `train --data=FOLDER`.

    twotower prepare --config=my_log --data=prepared/shop

    twotower prepare --config=my_log --data=prepared/shop --engine=duckdb --memory=4GB

The engine "memory" reads the whole log into memory. "duckdb" (extra `duckdb`) prepares a log that
is larger: rows lie on the disk, below FOLDER, while ids and tables of users and items are in
memory. Both leave the same folder, byte for byte. A folder that is whole is left as it is. One that
was stopped half-way is gone on with by "duckdb", behind the last stage that was whole.

Rows of a text file that have other fields than the header are refused, unless the configuration
says otherwise (`bad_rows`); --max_bad_rows=10 leaves out up to ten, and says how many there were.
"""

from __future__ import annotations

from absl import flags

from twotower.commands import launch

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS)
_DATA = flags.DEFINE_string(
    "data", None, "Folder to write the prepared data to.", required=True, flag_values=FLAGS
)
_ENGINE = flags.DEFINE_enum(
    "engine", "memory", ["memory", "duckdb"], "What prepares the rows.", flag_values=FLAGS
)
_MEMORY = flags.DEFINE_string(
    "memory", "4GB", "Memory that the engine duckdb keeps to, such as 4GB.", flag_values=FLAGS
)
_MAX_BAD_ROWS = flags.DEFINE_integer(
    "max_bad_rows",
    None,
    "Number of rows with other fields than the header that may be left out; by default as bad_rows "
    "of the configuration says.",
    lower_bound=0,
    flag_values=FLAGS,
)


def main() -> None:
    from twotower import api
    from twotower.config import from_dict
    from twotower.core.install import command
    from twotower.data.report import print_report
    from twotower.pipeline import folder
    from twotower.training.run import local_folder

    report = api.prepare(
        from_dict(_CONFIG.value),
        _DATA.value,
        engine=_ENGINE.value,
        memory=_MEMORY.value,
        max_bad_rows=_MAX_BAD_ROWS.value,
    )
    if report is not None:
        print_report(report)
    path = local_folder(_DATA.value, "--data")
    # The hash, by which two machines know that they hold the same data.
    print(f"{path} holds the prepared data; content {folder.content_of(path)[:16]}.")
    print(f"Train on it: {command('train', '--config=...', f'--data={path}', '--workdir=...')}")
