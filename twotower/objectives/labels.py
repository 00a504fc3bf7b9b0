"""Probabilities of the label that a pointwise loss learns, from scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from twotower.config import ObjectiveConfig
from twotower.objectives.losses import POINTWISE_LOSS
from twotower.towers.two_tower import TwoTower

LABEL = "label"  # name of the label's task beside those of heads, as in "label/auc"


class LabelLogit(NamedTuple):
    """The logit of a pair's label, scale x score + offset."""

    scale: float
    offset: float


def learns_label(objective: ObjectiveConfig) -> bool:
    """Returns whether training fits probabilities of `config.objective.label` to the scores."""
    return objective.loss == POINTWISE_LOSS and bool(objective.weight)


def label_logit(
    objective: ObjectiveConfig, model: TwoTower, params: Mapping[str, Any]
) -> LabelLogit | None:
    """Returns how a score becomes the logit of its label; None of a loss that knows no label.

    The loss fits s / T + b to the log odds of a row with label 1 that counts `pos_weight` times,
    which are log(pos_weight) too high.

    Args:
        objective: Options of the loss.
        model: The towers.
        params: Dense parameters, the bias of the loss among them.
    """
    if not learns_label(objective):
        return None
    offset = float(params["bias"]) - math.log(objective.pos_weight)
    return LabelLogit(1.0 / float(model.temperature(params)), offset)
