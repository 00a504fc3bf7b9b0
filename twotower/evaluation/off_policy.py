"""What another policy would have earned, from the log of one that explored.

The self-normalised estimate of inverse propensity scores (SNIPS; Swaminathan and Joachims 2015,
"The Self-Normalized Estimator for Counterfactual Learning"): the mean reward of what was shown,
each position weighted by how much more often the other policy would have shown that item there,

    w = target propensity / logged propensity,   V = sum(w r) / sum(w).

It is only as good as its overlap: what the logging policy never shows, nothing is known of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from tabulate import tabulate

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.retrieval.retriever import Retriever

MIN_OVERLAP = 0.8
MIN_EFFECTIVE = 1_000
Z_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated reward of a policy.

    Attributes:
        value: Mean reward of a position.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        overlap: Mean weight, at most 1: share of the target's choices that the log could have.
        effective: Effective sample size, sum(w)^2 / sum(w^2): positions of equal weight that would
            tell as much.
        count: Number of positions in the log.
    """

    value: float
    low: float
    high: float
    overlap: float
    effective: float
    count: int

    def refusal(self) -> str:
        """Returns the sentences on why the value is not to be trusted; "" where it may be."""
        problems = []
        # "not >=", which NaN does not pass either.
        if not self.overlap >= MIN_OVERLAP:
            problems.append(
                f"overlap {self.overlap:.2f} is below {MIN_OVERLAP}: the log could not have shown "
                f"{1 - self.overlap:.0%} of what this policy shows"
            )
        if not self.effective >= MIN_EFFECTIVE:
            problems.append(
                f"{self.effective:,.0f} effective samples of {self.count:,} are below "
                f"{MIN_EFFECTIVE:,}"
            )
        if not problems:
            return ""
        return f"{' and '.join(problems)}. Log longer, or explore more (explore=.1)."


def snips(
    rewards: np.ndarray,
    logged: np.ndarray,
    target: np.ndarray,
    groups: np.ndarray | None = None,
) -> Estimate:
    """Returns the estimate of a policy's reward, to be trusted where it has no refusal.

    >>> rewards = np.array([1.0, 0.0, 1.0, 0.0])
    >>> snips(rewards, np.full(4, 0.5), np.array([1.0, 0.0, 1.0, 0.0])).value
    1.0

    Args:
        rewards: Reward of each position that was shown, [N].
        logged: Probability with which the log showed its item there, above 0, [N].
        target: Probability with which the other policy would have, [N].
        groups: Number of the list of each position, whose positions are not independent, int [N];
            None where all are.

    Raises:
        ConfigError: A probability is none.
    """
    # Rounding may put a probability a little above 1.
    for name, values, least in (("logged", logged, 1e-12), ("target", target, 0.0)):
        wrong = np.flatnonzero(~((values >= least) & (values <= 1 + 1e-9)))
        if wrong.size:
            raise ConfigError(
                f"{name}[{wrong[0]}]={values[wrong[0]]} must be a probability"
                f"{' above 0' if least else ''}."
            )
    weights = target / logged
    total = weights.sum()
    count = len(weights)
    # The other policy shows nothing that the log has: there is nothing to estimate from.
    if not total:
        return Estimate(np.nan, np.nan, np.nan, 0.0, 0.0, count)
    value = float((weights * rewards).sum() / total)
    # The variance of a ratio (delta method), over lists rather than positions.
    residuals = weights * (rewards - value)
    # Positions of one list share a user and a moment; summed, lists are independent draws.
    if groups is not None:
        residuals = np.bincount(groups, residuals)
    half = Z_95 * float(np.sqrt((residuals**2).sum()) / total)
    return Estimate(
        value,
        value - half,
        value + half,
        # The expected weight is 1 where the log could have shown all that the target shows.
        min(1.0, float(weights.mean())),
        float(total**2 / (weights**2).sum()),
        count,
    )


def estimate_policies(labelled: pa.Table, bundle: str = "") -> dict[str, Estimate]:
    """Returns the estimated share of positions with a success, by policy.

    Each position is judged by itself, after the items that were shown before it.

    Args:
        labelled: Columns recommendation_id, user_id, item_id, position, propensity, best and label,
            as `twotower.serving.impressions.rows.join_events` returns them.
        bundle: Folder of a bundle whose lists, by the ids of users alone, are one of the policies;
            "" for none. Of lists to nobody it has nothing to say: they count against its overlap.
    """
    rewards = labelled["label"].to_numpy().astype(np.float64)
    logged = labelled["propensity"].to_numpy()
    lists = labelled["recommendation_id"].combine_chunks().dictionary_encode()
    groups = lists.indices.to_numpy()
    # All weights 1: its value is the plain mean, against which a reader can check the log.
    policies = {"as logged": logged}
    # The best item with certainty: what the logging policy would show without its exploration.
    policies["without exploration"] = np.asarray(labelled["best"]).astype(np.float64)
    if bundle:
        policies[bundle] = _shown_by(Retriever.load(bundle), labelled)
    estimates = {}
    for name, target in policies.items():
        estimates[name] = snips(rewards, logged, target, groups)
    return estimates


def _shown_by(retriever: Retriever, labelled: pa.Table) -> np.ndarray:
    """Returns 1 where a bundle would have shown the same item at the same position, else 0."""
    # Nobody's lists cannot be asked for by id.
    users = pc.unique(labelled["user_id"].drop_null()).to_pylist()
    longest = pc.max(labelled["position"]).as_py()
    lists = retriever.recommend_many(users, longest)
    shown = set(
        zip(lists["user_id"].to_pylist(), lists["rank"].to_pylist(), lists["item_id"].to_pylist())
    )
    # A null user is in no list, and its positions get 0.
    keys = zip(*(labelled[name].to_pylist() for name in ("user_id", "position", "item_id")))
    return np.array([key in shown for key in keys], np.float64)


def format_estimates(estimates: Mapping[str, Estimate]) -> str:
    """Returns a table of estimates; those that are refused have no value, but the reason."""
    rows = []
    refusals = []
    for name, estimate in estimates.items():
        shown = f"{estimate.value:.5f} ({estimate.low:.5f} to {estimate.high:.5f})"
        refusal = estimate.refusal()
        if refusal:
            shown = "refused"
            refusals.append(f"{name}: {refusal}")
        rows.append([name, shown, f"{estimate.overlap:.2f}", f"{estimate.effective:,.0f}"])
    headers = ["policy", "successes a position (95 %)", "overlap", "effective samples"]
    return "\n".join([tabulate(rows, headers, disable_numparse=True), *refusals])
