r"""Every loss, with the options that are its own.

    python -m experiments.train --config=experiments/configs/recipes/losses.py:bsl \
        --workdir=runs/bsl
    python -m experiments.export --workdir=runs/bsl
    python -m experiments.evaluate --workdir=runs/bsl --k=10 --baselines

The name after the colon is one of RECIPES. The formulas and the papers are in
`twotower/objectives/losses.py`.
"""

from twotower.experiment import read

RECIPES = {
    # The softmax without its correction favours what is seldom sampled: rare items.
    "softmax_uncorrected": {"objective.logq": False},
    "softmax_with_margin": {"objective.margin": 0.1},
    # Other items of the same user count as negatives again, as in most published code.
    "softmax_own_items_as_negatives": {"objective.mask_same_user": False},
    # Finds the user among the batch's users too; blocks of 128 queries bound the memory.
    "softmax_symmetric": {"objective.symmetric": True, "objective.block": 128},
    # On an NVIDIA GPU by kernels that write no logits; elsewhere as the plain softmax.
    "softmax_pallas": {"objective.softmax_kernel": "pallas"},
    "corrected_softmax": {"objective.loss": "corrected_softmax"},
    # Two temperatures, of which the positive's is fixed: the other must not be learned either.
    "bsl": {
        "objective.loss": "bsl",
        "objective.positive_temperature": 0.1,
        "model.learn_temperature": False,
    },
    # For uniform negatives, as in its paper: in-batch ones would leave rare items on top.
    "gbce": {
        "objective.loss": "gbce",
        "objective.calibration": 0.9,
        "objective.negatives.in_batch": False,
        "objective.negatives.uniform": 256,
        "model.normalize": False,
        "model.temperature": 1.0,
        "model.learn_temperature": False,
    },
    "sigmoid": {"objective.loss": "sigmoid"},
    "bpr": {"objective.loss": "bpr", "model.temperature": 0.2},
    "hinge": {"objective.loss": "hinge", "objective.margin": 0.2},
    "triplet": {"objective.loss": "triplet", "objective.margin": 0.2},
    "cosine_contrastive": {
        "objective.loss": "cosine_contrastive",
        "objective.margin": 0.3,
        "objective.negative_weight": 10.0,
    },
    # Learns the probability of a like from rows with and without one; no negatives are sampled.
    "binary_cross_entropy": {
        "objective.loss": "binary_cross_entropy",
        "objective.label": "liked",
        "objective.pos_weight": 2.0,
        "training.accumulate": 2,
    },
}


def get_config(recipe="bsl"):
    return read("recipes/shop", RECIPES[recipe])
