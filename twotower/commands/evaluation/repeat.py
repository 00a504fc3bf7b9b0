r"""Trains and measures an experiment with one seed after another, for the spread of its figures.

    twotower repeat --config=yelp2018 --workdir=runs/yelp2018 [--seeds=3] [--baselines]

Prints the mean and the standard deviation of each metric over training.seed = 0, 1, ... and writes
the figures of each seed to WORKDIR/repeat.json (repeat_validation.json for --split=validation). The
run of a seed is WORKDIR/seed-N: a training that was stopped goes on, and one that had ended is only
measured.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from twotower import dry_run
from twotower.commands import launch

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the runs.", required=True, flag_values=FLAGS
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of trainings.", lower_bound=1, flag_values=FLAGS)
_BASELINES = flags.DEFINE_bool(
    "baselines", False, "Measure popularity and the like beside the model, once.", flag_values=FLAGS
)
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["test", "validation"], "The rows to find.", flag_values=FLAGS
)
_DRY_RUN = dry_run.define(FLAGS)


def main() -> None:
    from twotower import api
    from twotower.config import from_dict
    from twotower.evaluation.report.text import format_seeds

    config = from_dict(_CONFIG.value)
    if _DRY_RUN.value:
        # They differ in nothing but the seed, so that one stands for all.
        first = Path(_WORKDIR.value) / "seed-0"
        print(f"{_SEEDS.value} trainings, of which this is the first.")
        print(dry_run.describe_training(config, first))
        return
    measured = api.repeat(
        config,
        _WORKDIR.value,
        seeds=_SEEDS.value,
        split=_SPLIT.value,
        baselines=_BASELINES.value,
    )
    path = api.repeat_path(_WORKDIR.value, _SPLIT.value)
    print(format_seeds(measured, config.evaluation.ks, _SPLIT.value))
    print(f"\nWritten to {path}.")
