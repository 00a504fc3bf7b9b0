r"""A user's past as a vector: bags, a recurrent network and Transformers.

    python -m experiments.train --config=experiments/configs/recipes/histories.py:rotary \
        --workdir=runs/past
    python -m experiments.export --workdir=runs/past
    python -m experiments.evaluate --workdir=runs/past --k=10 --baselines

The name after the colon is one of RECIPES.
"""

from twotower.experiment import read

RECIPES = {
    # A mean whose weights are learned, by item and by how many events follow.
    "attention_bag": {"model.history.kind": "attention", "model.history.recency": True},
    # SASRec's blocks with rotary positions, 16 wide, one head.
    "rotary": {
        "model.history.kind": "causal",
        "model.history.width": 16,
        "model.history.blocks": 1,
        "model.history.heads": 1,
        "model.history.positions": "rotary",
    },
    # GRU4Rec's recurrent network, one layer.
    "gru": {
        "model.history.kind": "gru",
        "model.history.width": 32,
        "model.history.blocks": 1,
        # Validated by users whom training never saw: their last row, by the rows before it.
        "split.validation_by": "user",
    },
    # A Transformer that sees the whole past at once and reads it off a learned token.
    "bidirectional": {
        "model.history.kind": "bidirectional",
        "model.history.blocks": 1,
        "model.history.heads": 4,
        "model.history.pooling": "cls",
        # A user's last two rows, and the two before them to validate with; of rows of one time, in
        # an order that the seed draws.
        "split.kind": "leave_last_out",
        "split.held_out": 2,
        "split.ties": "drawn",
        "split.accept_leakage": ("future_rows", "repeated_pairs"),
    },
}


def get_config(recipe="rotary"):
    return read("recipes/shop", RECIPES[recipe])
