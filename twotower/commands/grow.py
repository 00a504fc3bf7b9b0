r"""Takes a trained run over to data with new users, items and values; training then goes on.

    twotower grow --source=runs/mine --config=my_log --workdir=runs/mine_2 \
        --config.training.steps=4000 [--new_rows=oov|mean|content]

    twotower train --config=my_log --workdir=runs/mine_2 --config.training.steps=4000

Known users and items keep their rows and their optimizer state; before the first further step their
scores are the same to the bit. New rows begin as the out-of-vocabulary row that stood for them
until now (oov), as the mean of the known rows (mean), or as the mean of those that are nearest by
all other features (content).
"""

from __future__ import annotations

from absl import flags

from twotower import dry_run
from twotower.commands import launch

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS)
_SOURCE = flags.DEFINE_string(
    "source", None, "The run to go on from.", required=True, flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the new run.", required=True, flag_values=FLAGS
)
_NEW_ROWS = flags.DEFINE_string(
    "new_rows", "oov", "First value of new rows: oov, mean or content.", flag_values=FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "latest, best or a step.", flag_values=FLAGS
)
_DRY_RUN = dry_run.define(FLAGS)


def main() -> None:
    from twotower.config import from_dict
    from twotower.training.grow import grow
    from twotower.training.run import load_config

    config = from_dict(_CONFIG.value)
    if _DRY_RUN.value:
        load_config(_SOURCE.value)  # says what to do where the folder is no run
        print(f"Would take over {_SOURCE.value}; the training after that:")
        print(dry_run.describe_training(config, _WORKDIR.value))
        return
    grow(
        config,
        _SOURCE.value,
        _WORKDIR.value,
        new_rows=_NEW_ROWS.value,
        checkpoint=_CHECKPOINT.value,
    )
