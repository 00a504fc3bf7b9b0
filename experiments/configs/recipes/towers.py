r"""Layers of the towers: activation, normalisation, dropout, mixed precision.

    python -m experiments.train --config=experiments/configs/recipes/towers.py:deep \
        --workdir=runs/deep
    python -m experiments.export --workdir=runs/deep
    python -m experiments.evaluate --workdir=runs/deep --k=10

The name after the colon is one of RECIPES.
"""

from twotower.experiment import read

RECIPES = {
    "deep": {
        "model.user.layers": (64, 32),
        "model.user.activation": "gelu",
        "model.user.layer_norm": True,
        "model.item.layers": (64, 32),
        "model.item.activation": "silu",
        "model.item.layer_norm": True,
    },
    "batch_norm": {
        "model.user.layers": (64, 32),
        "model.user.batch_norm": True,
        "model.item.layers": (64, 32),
        "model.item.batch_norm": True,
    },
    "bfloat16": {"model.dtype": "bfloat16"},
}


def get_config(recipe="deep"):
    return read("recipes/shop", RECIPES[recipe])
