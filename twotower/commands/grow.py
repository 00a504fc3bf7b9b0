r"""Takes a trained run over to data with new users, items and values; training then goes on.

    twotower grow --source=runs/mine --config=my_log --workdir=runs/mine_2 \
        --config.training.steps=4000 [--new_rows=oov|mean|content]

    twotower train --workdir=runs/mine_2

    twotower grow --source=runs/mine --rows=next_day.csv --workdir=runs/mine_2 [--passes=1]

--config names the whole new log; --rows only further rows, in the form of the run's own, which are
put behind those that its folder holds.

Known users and items keep their rows and their optimizer state; before the first further step their
scores are the same to the bit. New rows begin as the out-of-vocabulary row that stood for them
until now (oov), as the mean of the known rows (mean), or as the mean of those that are nearest by
all other features (content).
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from twotower import dry_run
from twotower.commands import launch, mlflow_flags

FLAGS = flags.FlagValues()
# Not required, as --rows stands in its place: `require_one` says so with both names.
_CONFIG = launch.define_config(FLAGS, required=False)
_RUN = mlflow_flags.define_run(FLAGS, "run", "source", "The run to go on from.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the new run.", required=True, flag_values=FLAGS
)
_NEW_ROWS = flags.DEFINE_string(
    "new_rows", "oov", "First value of new rows: oov, mean or content.", flag_values=FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "latest, best or a step.", flag_values=FLAGS
)
_ROWS = flags.DEFINE_string(
    "rows", None, "File of further rows, in the place of --config.", flag_values=FLAGS
)
_PASSES = flags.DEFINE_float(
    "passes",
    0.0,
    "Further passes over all training rows; 0 takes config.training.steps, or one pass with "
    "--rows.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
_DRY_RUN = dry_run.define(FLAGS)


def main() -> None:
    launch.require_one(_CONFIG, _ROWS)
    source = _RUN.folder()
    if _ROWS.value is None:
        grow_to_config(source)
    else:
        grow_by_rows(source)


def grow_to_config(source: Path) -> None:
    """Takes the run in a folder over to the log of --config."""
    from twotower.config import from_dict
    from twotower.training.grow import grow
    from twotower.training.run import load_config

    config = from_dict(_CONFIG.value)
    if _DRY_RUN.value:
        load_config(source)  # says what to do where the folder is no run
        print(f"Would take over {source}; the training after that:")
        print(dry_run.describe_training(config, _WORKDIR.value))
        return
    grow(
        config,
        source,
        _WORKDIR.value,
        new_rows=_NEW_ROWS.value,
        checkpoint=_CHECKPOINT.value,
        passes=_PASSES.value,
    )


def grow_by_rows(source: Path) -> None:
    """Takes the run in a folder over to its own rows and those of --rows."""
    from twotower import api

    run = api.load_run(source, checkpoint=_CHECKPOINT.value)
    if _DRY_RUN.value:
        # The rows are not read for it: reading them is most of the work.
        print(f"Would put {_ROWS.value} behind the rows of {run!r}.")
        return
    # There is no configuration here whose steps 0 could mean.
    passes = _PASSES.value or 1.0
    rows = _ROWS.value or ""
    api.begin_grown(run, rows, workdir=_WORKDIR.value, new_rows=_NEW_ROWS.value, passes=passes)
