"""Diverse lists, chosen from the candidates of a retrieval.

Fetch more items than are shown, then let one of these functions choose among them.

    >>> candidates = tt.load_retriever("runs/mine").recommend("user-1", k=10)
    >>> labels = [item.item_id[-1] for item in candidates]
    >>> len([candidates[i] for i in cap_per_label(labels, 3, max_items=1)])
    3
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int


def maximal_marginal_relevance(
    scores: Float[np.ndarray, " M"], vectors: Float[np.ndarray, "M D"], k: int, *, diversity: float
) -> Int[np.ndarray, " K"]:
    """Chooses `k` items one by one, each by its score less its likeness to those chosen before.

    The next item maximises (1 - diversity) score - diversity max cosine to the chosen (Carbonell
    and Goldstein 1998).

    Args:
        scores: Scores of the candidates, on the scale of cosines (as they are of a model that
            normalises).
        vectors: Vectors of the same items.
        k: Number of items to choose; fewer where there are fewer candidates.
        diversity: From 0, the order of the scores, to 1, which looks at the scores for the first
            item alone.

    Returns:
        Positions of the chosen items among the candidates.

    >>> vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> maximal_marginal_relevance(np.array([0.9, 0.8, 0.5]), vectors, 2, diversity=0.5).tolist()
    [0, 2]
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity={diversity} must be between 0 and 1.")
    # Cosines, so that one scale of `diversity` serves vectors of any length.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, 1e-30)
    is_left = np.ones(len(scores), bool)
    # Of each candidate, to the chosen items so far. Kept up to date: O(k M D) in all.
    max_cosine = np.full(len(scores), -np.inf)
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        worth = scores  # the first item is like nothing chosen
        if chosen:
            worth = (1 - diversity) * scores - diversity * max_cosine
        best = int(np.argmax(np.where(is_left, worth, -np.inf)))
        chosen.append(best)
        is_left[best] = False
        max_cosine = np.maximum(max_cosine, units @ units[best])
    return np.array(chosen, np.int64)


def cap_per_label(
    labels: Sequence[Hashable], k: int, *, max_items: int | Mapping[Hashable, int]
) -> Int[np.ndarray, " K"]:
    """Chooses the first `k` items such that no label comes more often than allowed.

    Args:
        labels: Label of each candidate, best first: its category, brand or seller. An item without
            one (None) may always come.
        k: Number of items to choose.
        max_items: Largest number of items of a label; or a mapping from labels to such numbers, in
            which a missing label has no bound.

    Returns:
        Positions of the chosen items among the candidates.

    >>> cap_per_label(["a", "a", "b", "a", "b"], 3, max_items=1).tolist()
    [0, 2]
    """
    counts: dict[Hashable, int] = {}
    chosen: list[int] = []
    for position, label in enumerate(labels):
        if len(chosen) == k:
            break
        if isinstance(max_items, Mapping):
            bound = max_items.get(label)
        else:
            bound = max_items
        count = counts.get(label, 0)
        if label is not None and bound is not None and count >= bound:
            continue
        counts[label] = count + 1
        chosen.append(position)
    return np.array(chosen, np.int64)
