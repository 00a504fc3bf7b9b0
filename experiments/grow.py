r"""Takes a trained run over to data with new users, items and values; training then goes on.

    python -m experiments.grow --source=runs/mine --config=experiments/configs/my_log.py \
        --workdir=runs/mine_2 --config.training.steps=4000 [--new_rows=oov|mean|content]

    python -m experiments.train --config=experiments/configs/my_log.py --workdir=runs/mine_2 \
        --config.training.steps=4000

Known users and items keep their rows and their optimizer state; before the first further step their
scores are the same to the bit. New rows begin as the out-of-vocabulary row that stood for them
until now (oov), as the mean of the known rows (mean), or as the mean of those that are nearest by
all other features (content).
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from experiments import launch

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, on more data and with more steps."
)
flags.mark_flag_as_required("config")
_SOURCE = flags.DEFINE_string("source", None, "The run to go on from.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the new run.", required=True)
_NEW_ROWS = flags.DEFINE_string("new_rows", "oov", "First value of new rows: oov, mean or content.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best or a step.")


def main() -> None:
    from twotower.config import from_dict
    from twotower.training.grow import grow

    grow(
        from_dict(_CONFIG.value),
        _SOURCE.value,
        _WORKDIR.value,
        new_rows=_NEW_ROWS.value,
        checkpoint=_CHECKPOINT.value,
    )


if __name__ == "__main__":
    launch.run(main)
