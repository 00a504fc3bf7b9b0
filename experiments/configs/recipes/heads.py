"""Tasks beside retrieval: the probability of a like and of a share, from the same two vectors.

    python -m experiments.train --config=experiments/configs/recipes/heads.py --workdir=runs/heads
    python -m experiments.export --workdir=runs/heads
    python -m experiments.evaluate --workdir=runs/heads --k=10

`evaluate` prints AUC, log loss and calibration of each head below the ranking figures.
"""

from twotower.experiment import read

RECIPES = {
    "retrieval_and_two_heads": {
        "objective.weight": 0.5,
        "objective.heads": {
            "like": {"label": "liked", "weight": 0.5, "pos_weight": 2.0},
            "share": {"label": "shared", "combine": "concatenate", "layers": (16,)},
        },
    },
}


def get_config(recipe="retrieval_and_two_heads"):
    return read("recipes/shop", RECIPES[recipe])
