"""The item-transition graph: the items that users took soon after and before their last ones.

Nothing is trained: it counts which items stand near each other in the users' lists, and asks the
neighbours of a user's last items, and theirs. In logs of sequences few models are ahead of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from twotower.core.arrays import Ragged
from twotower.evaluation.baselines.tuning import (
    NO_CACHE,
    Choice,
    FitCache,
    Fitted,
    best_model,
    sparse_array,
)
from twotower.evaluation.evaluate import Scores
from twotower.evaluation.queries import Queries

TUNING_QUERIES = 1_000  # that choose the walk, at most: walks differ by much or not at all
WINDOW = 5  # greatest distance of two items that are joined
BACKWARD = 0.7  # weight of a transition read backwards, to that of one forwards
POPULARITY = 0.2  # power of an item's popularity that its score is divided by


@dataclasses.dataclass(frozen=True)
class Walk:
    """A way to ask the graph.

    Attributes:
        items: Number of a user's last items to start from.
        decay: Weight of each item to that of the next later one.
        second: Weight of the second step to that of the first.
    """

    items: int
    decay: float
    second: float

    def __str__(self) -> str:
        return f"the last {self.items}, decay {self.decay}, second step {self.second}"


WALKS = (
    Walk(items=1, decay=1.0, second=0.5),
    Walk(items=2, decay=0.5, second=0.5),
    Walk(items=5, decay=0.7, second=0.5),
)


def make_item_graph(
    sequences: Ragged, queries: Queries, tuning: Queries | None, *, cache: FitCache = NO_CACHE
) -> tuple[Scores, Choice]:
    """Makes the scores of "item_graph", with the walk that was chosen.

    Args:
        sequences: Items of each user in training, the latest last.
        queries: Queries to score. One without seen items gets 0 for all.
        tuning: Validation queries, whose NDCG@10 with seen items masked chooses the walk; None
            takes a middle one.
        cache: Graphs that were made of the same data before.
    """
    model, choice = fit_item_graph(sequences, queries.num_items, tuning, cache=cache)
    return model(queries), choice


def fit_item_graph(
    sequences: Ragged, num_items: int, tuning: Queries | None, *, cache: FitCache = NO_CACHE
) -> tuple[GraphModel, Choice]:
    """Makes the graph, and chooses the walk, of `make_item_graph`."""
    settings = (WALKS, WINDOW, BACKWARD, POPULARITY)
    fitted = cache.fit("item_graph", settings, lambda: _fit(sequences, num_items, tuning))
    arrays = fitted.arrays
    steps = sparse_array(arrays["shares"], arrays["items"], arrays["offsets"], num_items)
    walk = WALKS[int(arrays["walk"][0])]
    return GraphModel(steps, arrays["discount"], walk), fitted.choice


def _fit(sequences: Ragged, num_items: int, tuning: Queries | None) -> Fitted:
    """Returns the arrays of a `GraphModel`, with the number of its walk."""
    steps = transition_shares(sequences, num_items)
    popularity = np.bincount(sequences.values, minlength=num_items)
    discount = np.maximum(popularity, 1.0) ** -POPULARITY

    def make(walk: Walk) -> GraphModel:
        return GraphModel(steps, discount, walk)

    if tuning is not None:
        tuning = tuning.sample(TUNING_QUERIES)
    model, choice = best_model("item_graph: walk over", WALKS, make, tuning)
    arrays = {
        "shares": steps.data,
        "items": steps.indices,
        "offsets": steps.indptr,
        "discount": discount,
        "walk": np.array([WALKS.index(model.walk)]),
    }
    return Fitted(arrays, choice)


def transition_shares(sequences: Ragged, num_items: int) -> Any:
    """Returns the share of each item's transitions that lead to each other item.

    Two items d positions apart, of one user, are 1 / d of a transition from the earlier to the
    later one, and `BACKWARD` / d of one back.

    Args:
        sequences: Items of each user, the latest last.
        num_items: Number of items in the corpus, N.

    Returns:
        Sparse array of scipy, float64 [N, N], whose rows sum to 1 or to 0.
    """
    users = sequences.rows
    items = sequences.values
    total = sparse_array(np.zeros(0), np.zeros(0, int), np.zeros(num_items + 1, int), num_items)
    for distance in range(1, WINDOW + 1):
        earlier = items[:-distance]
        later = items[distance:]
        # An item does not lead to itself: that a user comes back is what masking takes out.
        joined = (users[:-distance] == users[distance:]) & (earlier != later)
        lists = Ragged.from_pairs(earlier[joined], later[joined], num_rows=num_items)
        weights = np.full(len(lists.values), 1.0 / distance)
        forward = sparse_array(weights, lists.values, lists.offsets, num_items)
        # Sums of sparse arrays keep each pair once.
        total = total + forward + BACKWARD * forward.T.tocsr()
    lengths = np.maximum(total.sum(1), 1e-9)
    total.data /= np.repeat(lengths, np.diff(total.indptr))
    return total


@dataclasses.dataclass(frozen=True)
class GraphModel:
    """Scores of the items that a walk from the last ones of a user reaches.

    Attributes:
        steps: Share of the transitions of each item (row) to each other, a sparse array [N, N].
        discount: Factor of the score of each item, float64 [N].
        walk: Way to ask the graph.
    """

    steps: Any
    discount: np.ndarray
    walk: Walk

    def reach(self, starts: Any) -> Any:
        """Returns the weights of the items that are reached from some, an array [b, N] as theirs.

        Args:
            starts: Weights of the items that walks start from, sparse or not, [b, N].
        """
        first = starts @ self.steps
        if not self.walk.second:
            return first
        # Of the few items of a block of queries: the square of the graph is much larger.
        return first + self.walk.second * (first @ self.steps)

    def __call__(self, queries: Queries) -> Scores:
        def scores(block: slice) -> np.ndarray:
            starts = _starts(queries.seen_lists(block), self.walk, len(self.discount))
            return (self.reach(starts).toarray() * self.discount).astype(np.float32)

        return scores


def _starts(seen: Ragged, walk: Walk, num_items: int) -> Any:
    """Returns the last items of lists with their weights, a sparse array [b, N]."""
    # The number of later items in the list of each item.
    later = seen.offsets[1:][seen.rows] - np.arange(1, len(seen.values) + 1)
    is_start = later < walk.items
    kept = seen.filter(is_start)
    weights = walk.decay ** later[is_start].astype(float)
    return sparse_array(weights, kept.values, kept.offsets, num_items)
