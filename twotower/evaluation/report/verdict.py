"""The model beside the best of its baselines: ahead, behind, or not to be told from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from twotower.evaluation.baselines.make import NO_RIVALS

Standing = Literal["ahead", "behind", "even", "alone"]
# In the place of a verdict, as a part of a sentence.
NOTHING_ASKED = "nothing was asked, as no query has a right answer left, so nothing can be said."
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
        difference: Ends of the interval of the model's figure less the rival's, paired over the
            same users; None in figures of earlier versions.
    """

    metric: str
    value: float
    low: float
    high: float
    rival: str = ""
    rival_value: float = 0.0
    difference: tuple[float, float] | None = None

    @property
    def standing(self) -> Standing:
        """Where the model stands: by the paired interval, which 0 lies in or does not."""
        if not self.rival:
            return "alone"
        low, high = self.difference or (self.low - self.rival_value, self.high - self.rival_value)
        if low > 0:
            return "ahead"
        return "behind" if high < 0 else "even"


def was_asked(figures: Mapping[str, float]) -> bool:
    """Returns whether any query is behind the figures of a ranking: else they are no figures."""
    return figures.get("queries", 1) > 0


def find_verdict(measured: Mapping[str, Any], metric: str, suffix: str = "") -> Verdict:
    """Compares a figure of the model with that of the best baseline.

    Args:
        measured: Figures of `twotower.evaluation.measure.measure_run`.
        metric: Name of the figure, such as "recall@10".
        suffix: "" with seen items masked, "_unmasked" without.
    """
    value = measured[f"model{suffix}"][metric]
    low, high = measured.get(f"model_intervals{suffix}", {}).get(metric, (value, value))
    rivals = {}
    for name, figures in measured.get(f"baselines{suffix}", {}).items():
        # Rankings that know the answers, or that nobody would serve, are shown and never the rival.
        if name not in NO_RIVALS:
            rivals[name] = figures[metric]
    if not rivals:
        return Verdict(metric, value, low, high)
    best = max(rivals, key=rivals.__getitem__)
    ends = measured.get(f"baseline_differences{suffix}", {}).get(best, {}).get(metric)
    difference = tuple(ends) if ends else None
    return Verdict(metric, value, low, high, best, rivals[best], difference)
