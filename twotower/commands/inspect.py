r"""Looks at a log: delimiter, header, columns, times, repeats, splits; writes a configuration.

    twotower inspect events.csv --out=my_log.py
    twotower inspect events.csv --items=products.csv --time=created
    twotower inspect runs/quickstart

It prints what it found, what is wrong and what it took, with sample rows, and writes an experiment
that trains: by --out, or beside you under the name of the log. --user, --item and --time name the
columns where they cannot be told.

Of the folder of a run, or of --mlflow_experiment=shop, it prints where its training is, its goodput
and what a step waits for.
"""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags

from twotower.commands import mlflow_flags

FLAGS = flags.FlagValues()
POSITIONAL = "log"  # the flag that an argument without a name sets
_LOG = mlflow_flags.define_run(
    FLAGS, "run", "log", "File, folder or pattern of the log; or the folder of a run."
)
_ITEMS = flags.DEFINE_string("items", "", "Table of the items.", flag_values=FLAGS)
_USERS = flags.DEFINE_string("users", "", "Table of the users.", flag_values=FLAGS)
_USER = flags.DEFINE_string("user", "", "Column of the user.", flag_values=FLAGS)
_ITEM = flags.DEFINE_string("item", "", "Column of the item.", flag_values=FLAGS)
_TIME = flags.DEFINE_string("time", None, "Column of the time; empty for none.", flag_values=FLAGS)
_FORMAT = flags.DEFINE_string(
    "timestamp_format", "", "Format of the times, such as %d/%m/%Y %H:%M.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "", "Experiment file to write, NAME.py.", flag_values=FLAGS)


def main() -> None:
    from twotower import inspection
    from twotower.core.install import command
    from twotower.fitting import Columns
    from twotower.training.monitoring.report import describe_run, find_run

    # As it was given: the text of a pattern or of an address is no path.
    path = _LOG.workdir.value or ""
    if not path or _LOG.is_of_mlflow:
        path = str(_LOG.folder())
    workdir = find_run(path)
    if workdir is not None:
        print("\n".join(describe_run(workdir)))
        return
    # A name that Python and a shell take as it is.
    stem = re.sub(r"\W+", "_", Path(path).name.partition(".")[0]).strip("_") or "log"
    # Not named as the log is: "events.py" beside other code could be imported by mistake.
    out = Path(_OUT.value or f"{stem}_experiment.py")
    found = inspection.inspect(
        path,
        items=_ITEMS.value,
        users=_USERS.value,
        columns=Columns(_USER.value, _ITEM.value, _TIME.value),
        timestamp_format=_FORMAT.value,
    )
    print("\n".join(found.lines))
    inspection.write(found.config, out, path)
    line = command("train", f"--config={out}", f"--workdir=runs/{stem}")
    print(f"\nWrote {out}. To train on it:\n  {line}")
