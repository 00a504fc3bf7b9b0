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
# A matrix of them takes 128 MiB, and two are held while it is made.
MAX_SQUARED_ITEMS = 4_096
# Items for each query, at most, for which squaring the graph is quicker than walking twice.
MAX_SQUARED_ITEMS_PER_QUERY = 4


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
    graph: Graph | None = None

    def fit() -> Fitted:
        nonlocal graph
        graph = _make_graph(sequences, num_items)
        return _choose_walk(graph, tuning)

    settings = (WALKS, WINDOW, BACKWARD, POPULARITY)
    fitted = cache.fit("item_graph", settings, fit)
    arrays = fitted.arrays
    # The one that was just made has been squared already.
    if graph is None:
        steps = sparse_array(arrays["shares"], arrays["items"], arrays["offsets"], num_items)
        graph = Graph(steps, arrays["discount"])
    return GraphModel(graph, WALKS[int(arrays["walk"][0])]), fitted.choice


def _make_graph(sequences: Ragged, num_items: int) -> Graph:
    """Returns the graph of the items that users took in training."""
    popularity = np.bincount(sequences.values, minlength=num_items)
    discount = np.maximum(popularity, 1.0) ** -POPULARITY
    return Graph(transition_shares(sequences, num_items), discount)


def _choose_walk(graph: Graph, tuning: Queries | None) -> Fitted:
    """Returns the arrays of a graph, with the number of its walk."""
    if tuning is not None:
        tuning = tuning.sample(TUNING_QUERIES)
    model, choice = best_model(
        "item_graph: walk over", WALKS, lambda walk: GraphModel(graph, walk), tuning
    )
    arrays = {
        "shares": graph.steps.data,
        "items": graph.steps.indices,
        "offsets": graph.steps.indptr,
        "discount": graph.discount,
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


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """What follows which item, and what is behind that.

    Attributes:
        steps: Share of the transitions of each item (row) to each other, a sparse array [N, N].
        discount: Factor of the score of each item, float64 [N].
        reached: Weight of the second step -> items that one or two steps reach, float64 [N, N];
            filled by `reach_of_items`, as walks from all starts share it.
    """

    steps: Any
    discount: np.ndarray
    reached: dict[float, np.ndarray] = dataclasses.field(default_factory=dict)

    def reach(self, starts: Any, second: float, *, num_queries: int) -> np.ndarray:
        """Returns the weights of the items that are reached from some, float64 [b, N].

        Args:
            starts: Weights of the items that walks start from, a sparse array [b, N].
            second: Weight of the second step to that of the first.
            num_queries: Number of queries in all, those of this block and of others.
        """
        num_items = self.steps.shape[0]
        is_small = num_items <= MAX_SQUARED_ITEMS
        if is_small and num_items <= MAX_SQUARED_ITEMS_PER_QUERY * num_queries:
            return starts @ self.reach_of_items(second)
        first = starts @ self.steps
        # Of the few items of a block of queries: the square of a large graph is much larger.
        return (first + second * (first @ self.steps)).toarray()

    def reach_of_items(self, second: float) -> np.ndarray:
        """Returns the weights of the items that are reached from each, float64 [N, N].

        Args:
            second: Weight of the second step to that of the first.
        """
        if second not in self.reached:
            # Sparse by sparse, though most of the result is filled: where a graph holds one pair in
            # twenty, dense matrices take half as long again.
            self.reached[second] = (self.steps + second * (self.steps @ self.steps)).toarray()
        return self.reached[second]


@dataclasses.dataclass(frozen=True)
class GraphModel:
    """Scores of the items that a walk from the last ones of a user reaches.

    Attributes:
        graph: Transitions between items.
        walk: Way to ask the graph.
    """

    graph: Graph
    walk: Walk

    def __call__(self, queries: Queries) -> Scores:
        graph = self.graph

        def scores(block: slice) -> np.ndarray:
            starts = _starts(queries.seen_lists(block), self.walk, len(graph.discount))
            reached = graph.reach(starts, self.walk.second, num_queries=len(queries))
            return (reached * graph.discount).astype(np.float32)

        return scores


def _starts(seen: Ragged, walk: Walk, num_items: int) -> Any:
    """Returns the last items of lists with their weights, a sparse array [b, N]."""
    # The number of later items in the list of each item.
    later = seen.offsets[1:][seen.rows] - np.arange(1, len(seen.values) + 1)
    is_start = later < walk.items
    kept = seen.filter(is_start)
    weights = walk.decay ** later[is_start].astype(float)
    return sparse_array(weights, kept.values, kept.offsets, num_items)
