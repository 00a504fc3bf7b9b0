r"""Optimizers of the dense parameters and of the tables, schedules, and bounds of memory.

    python -m experiments.train --config=experiments/configs/recipes/optimizers.py:adamw \
        --workdir=runs/adamw
    python -m experiments.export --workdir=runs/adamw
    python -m experiments.evaluate --workdir=runs/adamw --k=10

The name after the colon is one of RECIPES.
"""

from twotower.experiment import read

RECIPES = {
    "adamw": {
        "training.optimizer.kind": "adamw",
        "training.optimizer.weight_decay": 0.01,
        "training.optimizer.clip_norm": 1.0,
    },
    # Adagrad whose accumulators start above 0: smaller first steps of each row.
    "adagrad": {
        "training.tables.kind": "adagrad",
        "training.tables.initial_accumulator": 1e-5,
    },
    # The rates fall to a fifth when two validations in a row bring nothing new.
    "plateau": {
        "training.schedule.kind": "plateau",
        "training.schedule.factor": 0.2,
        "training.schedule.patience": 1,
        "training.validate_every": 50,
    },
    # Data that does not fit beside the model stays on the host, and one old checkpoint is kept.
    "host": {"training.resident_megabytes": 0, "training.keep_checkpoints": 1},
    # Data that does not fit into memory is read from shards (extra stream).
    "streamed": {"training.input": "stream"},
}


def get_config(recipe="adamw"):
    return read("recipes/shop", RECIPES[recipe])
