"""Vectors in, per-example losses out."""

from twotower.kernels.streaming_softmax import streaming_loss
from twotower.objectives.loss import Loss
from twotower.objectives.losses import (
    bsl,
    bsl_gap,
    corrected_softmax,
    corrected_softmax_gap,
    gbce,
    sigmoid,
    softmax,
    softmax_gap,
)
from twotower.objectives.pairwise import bpr, cosine_contrastive, hinge, triplet
from twotower.objectives.pointwise import binary_cross_entropy

__all__ = ["LOSSES", "POINTWISE", "Loss", "streaming_loss"]

# Losses of a positive and its negatives.
LOSSES: dict[str, Loss] = {
    "softmax": Loss(softmax, softmax_gap, corrects=True, corrects_positive=True),
    "corrected_softmax": Loss(corrected_softmax, corrected_softmax_gap, corrects=True),
    "bsl": Loss(bsl, bsl_gap, corrects=True, bilateral=True),
    "gbce": Loss(
        gbce, constants=lambda o, num_items: {"calibration": o.calibration, "num_items": num_items}
    ),
    "sigmoid": Loss(sigmoid, biased=True),
    "bpr": Loss(bpr),
    "hinge": Loss(
        hinge, scaled=False, own_margin=True, constants=lambda o, _: {"margin": o.margin}
    ),
    "triplet": Loss(
        triplet, scaled=False, own_margin=True, constants=lambda o, _: {"margin": o.margin}
    ),
    "cosine_contrastive": Loss(
        cosine_contrastive,
        scaled=False,
        own_margin=True,
        constants=lambda o, _: {"margin": o.margin, "negative_weight": o.negative_weight},
    ),
}
# Losses of a score and its label.
POINTWISE = {"binary_cross_entropy": binary_cross_entropy}
