"""Audits of a model: whether it learned anything, and what its vectors have come to.

Each says what it looked at, and speaks where figures mean less than they seem to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twotower.evaluation.audits.base import Audit
from twotower.evaluation.queries import Queries

# From where on an audit speaks.
GREATEST_COSINE = 0.9  # mean of two vectors, above which all of them are nearly one
SHARE_OF_DIMENSIONS = 0.05  # effective rank, of the width, below which vectors have collapsed
SHARE_OF_HUBS = 0.5  # of the places of all lists, those that a hundredth of the items take
GREATEST_CORRELATION = 0.9  # of length and popularity


def audit_signal(
    queries: Queries,
    metric: str,
    k: int,
    interval: Sequence[float],
    baselines: Mapping[str, Mapping[str, float]],
) -> Audit:
    """Says whether the model is better than chance and than what is popular.

    Args:
        queries: Queries with their relevant and their seen items, which are masked.
        metric: Name of the recall to compare, such as "recall@10".
        k: Length of its lists.
        interval: Lower and upper end of the model's recall.
        baselines: Figures of the baselines that were measured, by name.
    """
    low, high = interval
    rivals = {"chance": _recall_of_chance(queries, k)}
    if "popularity" in baselines:
        rivals["popularity"] = baselines["popularity"][metric]
    figures = {"metric": metric, "interval": [low, high], **rivals}
    # Chance wins where popular items are those that users have seen already.
    best = max(rivals, key=rivals.__getitem__)
    against = f"{metric} between {low:.4f} and {high:.4f} against {best}'s {rivals[best]:.4f}"
    # The lower end, since a figure within its error of chance is no signal.
    if low > rivals[best]:
        return Audit("no_signal", False, f"The model is ahead of {best}: {against}.", figures)
    sentence = (
        f"The model found no signal that {best} does not have: {against}. Look for ids or labels "
        "that do not belong to their rows, for features that are empty, and for a loss that does "
        "not fall."
    )
    return Audit("no_signal", True, sentence, figures)


def _recall_of_chance(queries: Queries, k: int) -> float:
    """Returns the recall that lists of unseen items drawn at random are expected to have."""
    queries = queries.without_seen()
    is_asked = queries.num_relevant > 0
    if not is_asked.any():
        return 0.0
    unseen = np.maximum(queries.num_items - queries.seen.lengths[queries.seen_row], 1)
    reachable = queries.relevant.lengths / np.maximum(queries.num_relevant, 1)
    recall = reachable * np.minimum(k / unseen, 1.0)
    return float(recall[is_asked].mean())


def audit_collapse(vectors: Mapping[str, np.ndarray]) -> Audit:
    """Says whether vectors are nearly one vector, or lie in few of their dimensions.

    Args:
        vectors: "users" and "items", float [N, D] each, or a sample of them.
    """
    figures: dict[str, Any] = {}
    collapsed = []
    for name, values in vectors.items():
        cosine = mean_cosine(values)
        rank = effective_rank(values)
        figures[name] = {"mean_cosine": cosine, "effective_rank": rank, "dim": values.shape[1]}
        # At least 2: of a narrow vector the share is below 1, which every rank passes.
        few = max(2.0, SHARE_OF_DIMENSIONS * values.shape[1])
        if cosine > GREATEST_COSINE or rank < few:
            collapsed.append(name)
    numbers = "; ".join(
        f"{name}: mean cosine {found['mean_cosine']:.2f}, effective rank "
        f"{found['effective_rank']:.1f} of {found['dim']}"
        for name, found in figures.items()
    )
    if not collapsed:
        return Audit("collapse", False, f"Vectors are spread out ({numbers}).", figures)
    sentence = (
        f"The vectors of {' and '.join(collapsed)} have collapsed ({numbers}): everybody gets "
        "nearly the same list. Lower the learning rates, give the loss more negatives, or train "
        "from another seed."
    )
    return Audit("collapse", True, sentence, figures)


def mean_cosine(vectors: np.ndarray) -> float:
    """Returns the mean cosine of two different vectors among those given, [N, D]; 0 of one."""
    count = len(vectors)
    if count < 2:
        return 0.0
    vectors = vectors.astype(np.float64)
    # float64: the sums below are differences of large numbers.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, 1e-30)
    # The square of the sum is that of all pairs, those of a vector with itself among them.
    total = float(np.square(units.sum(0)).sum()) - float(np.square(units).sum())
    return total / (count * (count - 1))


def effective_rank(vectors: np.ndarray) -> float:
    """Returns the exponential of the entropy of the singular values, from 1 to D.

    Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Args:
        vectors: float [N, D].
    """
    # Of the D x D products: N is the larger side.
    vectors = vectors.astype(np.float64)
    squares = np.linalg.eigvalsh(vectors.T @ vectors)
    values = np.sqrt(np.maximum(squares, 0.0))
    total = values.sum()
    # Vectors that are all zero, of which a share is none.
    if not total:
        return 1.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def audit_hubness(exposures: np.ndarray, k: int) -> Audit:
    """Says whether few items take the places of most lists.

    The skewness of the numbers of lists is that of Radovanovic et al., Hubs in space, JMLR 2010.

    Args:
        exposures: Number of lists that hold each item, int [N].
        k: Length of the lists.
    """
    top = max(1, len(exposures) // 100)
    ordered = np.sort(exposures)[::-1]
    total = int(exposures.sum())
    share = float(ordered[:top].sum() / max(total, 1))
    deviations = exposures - exposures.mean()
    # The skewness of equal numbers is undefined, and nothing is a hub among them.
    spread = float(np.sqrt(np.square(deviations).mean()))
    skewness = 0.0
    if spread:
        skewness = float((deviations**3).mean() / spread**3)
    figures = {"k": k, "skewness": skewness, "top_items": top, "share_of_top_items": share}
    sentence = (
        f"{top:,} of {len(exposures):,} items take {share:.1%} of the places of the lists of {k}"
    )
    if share <= SHARE_OF_HUBS:
        return Audit("hubness", False, f"{sentence}.", figures)
    sentence += (
        ": whoever asks gets them. See norm_popularity, weigh popularity less (--popularity_weights"
        " below 0), or check that the correction for popularity is on (config.objective.logq)."
    )
    return Audit("hubness", True, sentence, figures)


def audit_norms(items: np.ndarray, counts: np.ndarray, *, normalized: bool) -> Audit:
    """Says whether the length of an item's vector is little but its popularity.

    Args:
        items: Vectors of items, float [N, D].
        counts: Number of training rows of each, int [N].
        normalized: Whether vectors have length 1.
    """
    if normalized:
        sentence = "Vectors have length 1: none is listed for its length."
        return Audit("norm_popularity", False, sentence)
    correlation = spearman(np.linalg.norm(items, axis=1), counts)
    figures = {"spearman": correlation}
    sentence = (
        f"Lengths of item vectors and numbers of training rows have Spearman's rank correlation "
        f"{correlation:.2f}"
    )
    # Either sign: a length that popularity decides ranks by it, one way or the other.
    if abs(correlation) < GREATEST_CORRELATION:
        return Audit("norm_popularity", False, f"{sentence}.", figures)
    tells = ": the more popular an item, the longer its vector"
    risk = "lists may hold the same few popular items"
    if correlation < 0:
        tells = ": the more popular an item, the shorter its vector"
        risk = "lists may hold items that hardly anybody had"
    sentence += f"{tells}, and {risk}. Compare with config.model.normalize=True."
    return Audit("norm_popularity", True, sentence, figures)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Spearman's rank correlation; 0 where all numbers of one list are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    # Of ranks with ties at their mean, where the textbook's formula for distinct ranks is off.
    return float(np.corrcoef(_mean_ranks(a), _mean_ranks(b))[0, 1])


# Not SciPy's: its statistics take longer to import than all audits to run.
def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each number from 1 on, equal numbers at the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]
