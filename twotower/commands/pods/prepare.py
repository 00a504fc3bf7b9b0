r"""Prepares a log into a folder, from which any number of runs train: `train --data=FOLDER`.

    twotower prepare --config=my_log --data=prepared/shop

    twotower prepare --config=my_log --data=prepared/shop --engine=duckdb --memory=4GB

    twotower prepare --config=my_log --data=prepared/shop --engine=bigquery --tables=shop.made

    twotower prepare --config=my_log --data=prepared/shop --engine=beam \
        --beam_options="--runner=DataflowRunner --region=..." --beam_temp=gs://BUCKET/tmp

The engine "memory" reads the whole log into memory. "duckdb" (extra `duckdb`) prepares a log that
is larger: rows lie on the disk, below FOLDER, while ids and tables of users and items are in
memory. "bigquery" (extras `bigquery` and `duckdb`) filters, codes and divides a log of BigQuery by
a script there, which leaves the tables shop.made_rows, _users and _items; --dry_run prints the
script and runs nothing. "beam" (extra `beam`) has workers of Apache Beam read the log and code its
ids; the rest is as with "duckdb". All leave the same folder, byte for byte. A folder that is whole
is left as it is. One that was stopped half-way is gone on with by "duckdb", behind the last stage
that was whole.

Rows of a text file that have other fields than the header are refused, unless the configuration
says otherwise (`bad_rows`); --max_bad_rows=10 leaves out up to ten, and says how many there were.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from twotower.commands import launch

if TYPE_CHECKING:
    from twotower.config import Config

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS)
_DATA = flags.DEFINE_string(
    "data", None, "Folder to write the prepared data to.", required=True, flag_values=FLAGS
)
_ENGINE = flags.DEFINE_enum(
    "engine",
    "memory",
    ["memory", "duckdb", "bigquery", "beam"],
    "What prepares the rows.",
    flag_values=FLAGS,
)
_MEMORY = flags.DEFINE_string(
    "memory",
    "4GB",
    "Memory that all engines but memory keep to, such as 4GB.",
    flag_values=FLAGS,
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options",
    "",
    "Options of the pipelines of the engine beam, as on its command line: "
    '"--runner=DataflowRunner --region=...". By default this machine runs them.',
    flag_values=FLAGS,
)
_BEAM_TEMP = flags.DEFINE_string(
    "beam_temp",
    "",
    "Folder or address that all workers of the engine beam see, for what they hand to each other; "
    "by default one below FOLDER.",
    flag_values=FLAGS,
)
_MAX_BAD_ROWS = flags.DEFINE_integer(
    "max_bad_rows",
    None,
    "Number of rows with other fields than the header that may be left out; by default as bad_rows "
    "of the configuration says.",
    lower_bound=0,
    flag_values=FLAGS,
)
_TABLES = flags.DEFINE_string(
    "tables",
    "",
    "DATASET.NAME, where the engine bigquery leaves its tables, such as NAME_rows.",
    flag_values=FLAGS,
)
_EXPORT = flags.DEFINE_string(
    "export",
    "",
    "gs://BUCKET/FOLDER, by way of which the engine bigquery hands its rows over as Parquet; by "
    "default they come in pages of its own interface.",
    flag_values=FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print the script of the engine bigquery, and run nothing.",
    flag_values=FLAGS,
)


def main() -> None:
    from twotower import api
    from twotower.config import from_dict
    from twotower.core.errors import ConfigError
    from twotower.core.install import command
    from twotower.data.report import print_report
    from twotower.pipeline import folder
    from twotower.training.run import local_folder

    config = from_dict(_CONFIG.value)
    if _DRY_RUN.value:
        if _ENGINE.value != "bigquery":
            raise ConfigError(f"--dry_run is of --engine=bigquery, not of {_ENGINE.value}.")
        _print_script(config)
        return
    report = api.prepare(
        config,
        _DATA.value,
        engine=_ENGINE.value,
        memory=_MEMORY.value,
        max_bad_rows=_MAX_BAD_ROWS.value,
        tables=_TABLES.value,
        export=_EXPORT.value,
        beam_options=_BEAM_OPTIONS.value,
        beam_temp=_BEAM_TEMP.value,
    )
    if report is not None:
        print_report(report)
    path = local_folder(_DATA.value, "--data")
    # The hash, by which two machines know that they hold the same data.
    print(f"{path} holds the prepared data; content {folder.content_of(path)[:16]}.")
    print(f"Train on it: {command('train', '--config=...', f'--data={path}', '--workdir=...')}")


def _print_script(config: Config) -> None:
    from twotower.pipeline.engines.warehouse.bring import plan_script
    from twotower.plugins import import_plugins

    import_plugins(config.plugins, Path(_DATA.value))
    plan = plan_script(config, _TABLES.value, _EXPORT.value)
    print(plan.script)
    # A comment too, so that all of it can be run.
    print(f"-- Reads {plan.bytes / 1e9:.3f} GB of {plan.origin.name}, and then what it has made.")
