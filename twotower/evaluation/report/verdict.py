"""The model beside the best of its baselines: ahead, behind, or not to be told from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from twotower.evaluation.baselines.make import NO_RIVALS

Standing = Literal["ahead", "behind", "even", "alone"]
# What to try where a model is behind, as a part of a sentence.
CURE = "more steps, the history of the user as a feature, or other losses and negatives"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The model against the best of the baselines.

    Attributes:
        metric: Name of the figure that decides, such as "recall@10".
        value: That of the model.
        low: Lower end of its interval.
        high: Upper end.
        rival: Name of the best baseline; "" where none was measured.
        rival_value: Its figure.
    """

    metric: str
    value: float
    low: float
    high: float
    rival: str = ""
    rival_value: float = 0.0

    @property
    def standing(self) -> Standing:
        """Where the model stands."""
        if not self.rival:
            return "alone"
        # By the model's interval, beside a figure without its own: a first look, for which
        # `compare` has paired differences.
        if self.low > self.rival_value:
            return "ahead"
        return "behind" if self.high < self.rival_value else "even"


def find_verdict(
    metric: str,
    model: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
    baselines: Mapping[str, Mapping[str, float]],
) -> Verdict:
    """Compares a figure of the model with that of the best baseline.

    Args:
        metric: Name of the figure, such as "recall@10".
        model: Figures of the model.
        intervals: Lower and upper ends of some of them.
        baselines: Name of a baseline -> its figures.
    """
    value = model[metric]
    low, high = intervals.get(metric, (value, value))
    rivals = {}
    for name, figures in baselines.items():
        # Rankings that know the answers, or that nobody would serve, are shown and never the rival.
        if name not in NO_RIVALS:
            rivals[name] = figures[metric]
    if not rivals:
        return Verdict(metric, value, low, high)
    best = max(rivals, key=rivals.__getitem__)
    return Verdict(metric, value, low, high, best, rivals[best])
