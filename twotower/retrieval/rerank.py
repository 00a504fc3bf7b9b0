"""Lists made more diverse after retrieval: fetch more items than are shown, then choose among
them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int


def maximal_marginal_relevance(
    scores: Float[np.ndarray, " M"], vectors: Float[np.ndarray, "M D"], k: int, *, diversity: float
) -> Int[np.ndarray, " K"]:
    """Places of the `k` items chosen one after the other, each by its score less its likeness to
    those chosen before.

    The next item maximises (1 - diversity) score - diversity max cosine to the chosen (Carbonell
    and Goldstein 1998).

    Args:
        scores: of the candidates, on the scale of cosines (as they are of a model that normalises).
        vectors: of the same items.
        k: how many to choose; fewer where there are fewer candidates.
        diversity: from 0, the order of the scores, to 1, which looks at the scores for the first
            item alone.

    >>> vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> maximal_marginal_relevance(np.array([0.9, 0.8, 0.5]), vectors, 2, diversity=0.5).tolist()
    [0, 2]
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity={diversity} must be between 0 and 1.")
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    left, likeness = np.ones(len(scores), bool), np.full(len(scores), -np.inf)
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        # The first item is like nothing; it is the best.
        worth = (1 - diversity) * scores - diversity * likeness if chosen else scores
        best = int(np.argmax(np.where(left, worth, -np.inf)))
        chosen.append(best)
        left[best] = False
        likeness = np.maximum(likeness, units @ units[best])
    return np.array(chosen, np.int64)


def capped(labels: Sequence[Hashable], k: int, *, most: int | dict) -> Int[np.ndarray, " K"]:
    """Places of the first `k` items of which no label comes more often than allowed; an item
    without a label (None) always may.

    Args:
        labels: of the candidates, best first: their category, brand or seller.
        most: of each label; or label -> most, where a label that is not named has no bound.

    >>> capped(["a", "a", "b", "a", "b"], 3, most=1).tolist()
    [0, 2]
    """
    shown: dict[Hashable, int] = {}
    chosen: list[int] = []
    for place, label in enumerate(labels):
        if len(chosen) == k:
            break
        bound = most.get(label) if isinstance(most, dict) else most
        if label is not None and bound is not None and shown.get(label, 0) >= bound:
            continue
        shown[label] = shown.get(label, 0) + 1
        chosen.append(place)
    return np.array(chosen, np.int64)
