r"""Layers of the towers: activation, normalisation, dropout, sums of features, mixed precision.

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
    # Half of the wide features is dropped and a tenth of the hidden units; these are normalised
    # behind the activation, and so are the vectors.
    "dropout_by_layer": {
        "model.user.layers": (64, 32),
        "model.user.layer_dropout": (0.5, 0.1),
        "model.user.layer_norm": True,
        "model.user.order": "activation_norm",
        "model.user.output_norm": True,
        "model.item.layers": (64, 32),
        "model.item.layer_dropout": (0.2, 0.1),
        "model.item.layer_norm": True,
        "model.item.order": "activation_norm",
        "model.item.output_norm": True,
    },
    # Every feature is 32 wide, as the items of the history are, so that they can be summed; the sum
    # itself is the vector.
    "summed": {
        "features.user": {
            "city": {"type": "string", "embedding_size": 32},
            "history": {"type": "history", "max_length": 20},
        },
        "features.item": {
            "item_id": {"type": "string", "embedding_size": 32, "oov_rate": 0.1},
            "title": {"type": "text", "embedding_size": 32, "buckets": 4096, "max_length": 24},
        },
        "model.user.combine": "sum",
        "model.user.layers": (),
        "model.item.combine": "sum",
        "model.item.layers": (),
    },
    "bfloat16": {"model.dtype": "bfloat16"},
}


def get_config(recipe="deep"):
    return read("recipes/shop", RECIPES[recipe])
