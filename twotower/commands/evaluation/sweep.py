r"""Tries many configurations of an experiment and keeps the best by its validation rows.

    twotower sweep --config=quickstart --space=space.json --trials=30 --workdir=runs/sweep \
        [--seeds=3] [--config.split.validation=0.1]

The space names options, each with a range or a list of choices:

    {"training.tables.learning_rate": {"low": 0.005, "high": 0.5, "log": true},
     "training.batch_size": [512, 1024, 2048]}

Prints a table and how many configurations were tried, measures the best on the test rows, once, and
writes WORKDIR/best.py, which train --config= reads, and WORKDIR/sweep.html. A sweep that was
stopped goes on, and one that had ended takes on further trials, when the command is given again.
--experiment_name logs to MLflow as it goes: a run for the sweep, and nested ones for its trainings.
"""

from __future__ import annotations

import importlib.util

from absl import flags

from twotower.commands import launch, mlflow_flags

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS)
_SPACE = flags.DEFINE_string(
    "space",
    None,
    "Options and their values: a JSON file, or a Python file with SPACE.",
    required=True,
    flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the sweep.", required=True, flag_values=FLAGS
)
# With those of the folder, so that the command that was stopped is given again as it was.
_TRIALS = flags.DEFINE_integer(
    "trials",
    20,
    "Number of trials, with those that the folder holds.",
    lower_bound=1,
    flag_values=FLAGS,
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Number of trainings of a configuration.", lower_bound=1, flag_values=FLAGS
)
_PRUNE = flags.DEFINE_bool(
    "prune",
    True,
    "End a trial whose validations are below the median of those before it.",
    flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Number that the drawing of configurations depends on.", flag_values=FLAGS
)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Devices to train on; 0: all.", lower_bound=0, flag_values=FLAGS
)
_REPORT = flags.DEFINE_bool(
    "report",
    None,
    "Write a page to look at; needs the extra plots, and is on by default where that is installed.",
    flag_values=FLAGS,
)
_TRACKING = mlflow_flags.define_tracking(FLAGS)


def main() -> None:
    from twotower import api
    from twotower.config import from_dict

    wants_report = _REPORT.value
    # Found without importing it, which takes a second; whoever asks for the page is told what is
    # missing.
    if wants_report is None:
        wants_report = importlib.util.find_spec("matplotlib") is not None
    api.sweep(
        from_dict(_CONFIG.value),
        _SPACE.value,
        _WORKDIR.value,
        trials=_TRIALS.value,
        seeds=_SEEDS.value,
        prune=_PRUNE.value,
        seed=_SEED.value,
        devices=_DEVICES.value,
        report=wants_report,
        **_TRACKING.names(),
    )
