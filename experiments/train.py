"""Trains an experiment, or goes on with it.

    python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart [--config.training.steps=500]
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from experiments import launch

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")


def main() -> None:
    from twotower.config import from_dict
    from twotower.evaluation.evaluate import make_validate
    from twotower.training.run import train

    train(from_dict(_CONFIG.value), _WORKDIR.value, make_validate=make_validate)


if __name__ == "__main__":
    launch.run(main, required=["config", "workdir"])
