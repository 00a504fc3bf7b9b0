"""Tuning: the cheapest setting of an index that reaches a recall, measured on real user vectors.

Half of the user vectors tune, the other half measures what was chosen. The choice is by counted
work, not by the clock, so that the same vectors give the same index on a busy machine; the speeds
that were seen are kept beside it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging

from twotower.core.arrays import evenly_spaced
from twotower.index.base import TUNING_QUERIES
from twotower.index.exact import ExactIndex
from twotower.index.recall import recall_by_decile

LONG_LIST_QUERIES = 500  # user vectors for lists longer than K
# Lists of so many times K are tuned too: a search for more items than K must look deeper.
LONG_LIST_FACTORS = (10, 100)
MAX_TUNED_LENGTH = 1_000
# Candidates scored anew with whole vectors, as multiples of the list's length.
REORDER_FACTORS = (32, 16, 8, 4, 2)
# Standard errors by which the recall of the tuning half must pass the target: one case in twenty is
# worse than it looks.
MARGIN_ERRORS = 1.64
# Codes compared in the time of one candidate scored anew. Measured: 13 for single queries, 35 in
# batches, at any width.
CODES_PER_CANDIDATE = 20
TIE_TOLERANCE = 1e-6  # scores this near to the K-th are equal to it

# (queries, k, leaves, reorder) -> (scores, rows)
Search = Callable[[np.ndarray, int, int, int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SearchEffort:
    """The effort of a search for up to `k` items, and the recall measured with it.

    Attributes:
        k: Length of the lists.
        leaves: Leaves searched for each query; of a graph, candidates kept (efSearch).
        reorder: Candidates scored anew with whole vectors; 0 where whole vectors are compared from
            the start.
        recall: Mean share of the exact top `k` found for the held-out user vectors.
        queries: Number of those vectors.
    """

    k: int
    leaves: int
    reorder: int
    recall: float
    queries: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting that was tried on the tuning half.

    Attributes:
        k: Length of the lists.
        leaves: Leaves searched for each query.
        reorder: Candidates scored anew.
        recall: Mean share of the exact top `k` that was found.
        margin: 1.64 standard errors of the recall.
        queries_per_second: Speed in one batch, on this machine as busy as it was.
        reached: Whether the recall less its margin reaches the target.
    """

    k: int
    leaves: int
    reorder: int
    recall: float
    margin: float
    queries_per_second: float
    reached: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One build that was compared with others; see `twotower.index.comparison`.

    Attributes:
        kind: Key of `twotower.index.build.KINDS`.
        num_items: Number of vectors that it was built over.
        num_leaves: Leaves of the tree, or lists of the inverted file.
        recall: Mean share of the exact lists found for the held-out user vectors.
        milliseconds: Processor time of a query, by one thread, on this machine.
        optimize_for: Use that was measured, a value of `config.retrieval.optimize_for`.
        chosen: Whether it was taken.
    """

    kind: str
    num_items: int
    num_leaves: int
    recall: float
    milliseconds: float
    optimize_for: str
    chosen: bool


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The settings of an approximate index, and what they were measured to find.

    Attributes:
        kind: Key of `twotower.index.build.KINDS`.
        num_items: Number of vectors, N.
        dim: Width of the vectors, D.
        normalized: Whether the vectors have length 1, so that a query of length 0 is a mistake.
        num_leaves: Leaves of the tree, 0 without one; for a graph, the largest efSearch.
        target_recall: Share of the exact lists to find.
        efforts: Efforts by rising list length; () where the search is exhaustive.
        recall_by_decile: Recall of the items of each decile of popularity; see `tune`.
        tried: Every setting that was tried, with speeds, which no two builds share.
        compared: Builds that this one was chosen from; () where there was no choice.
    """

    kind: str
    num_items: int
    dim: int
    normalized: bool
    num_leaves: int = 0
    target_recall: float = 1.0
    efforts: tuple[SearchEffort, ...] = ()
    recall_by_decile: tuple[float | None, ...] = ()
    # Not compared: two builds of the same vectors are equal but for their speeds.
    tried: tuple[Trial, ...] = dataclasses.field(default=(), compare=False)
    compared: tuple[Comparison, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def from_dict(cls, info: dict[str, Any]) -> Tuning:
        """Returns the tuning in the content of index.json."""
        # Bundles of earlier versions compared no builds.
        info = {"compared": ()} | info
        values = {field.name: info[field.name] for field in dataclasses.fields(cls)}
        values["efforts"] = tuple(SearchEffort(**effort) for effort in info["efforts"])
        values["tried"] = tuple(Trial(**trial) for trial in info["tried"])
        values["compared"] = tuple(Comparison(**build) for build in info["compared"])
        values["recall_by_decile"] = tuple(info["recall_by_decile"])
        return cls(**values)

    @property
    def hashed(self) -> bool:
        """Whether codes are compared first and candidates are then scored anew."""
        return self.kind == "scann_tree_ah"

    def effort(self, k: int) -> tuple[int, int]:
        """Returns (leaves, candidates scored anew) of a search for `k` items.

        Between two tuned lengths the effort is interpolated, along a line of logarithms; beyond the
        longest it grows with the length.
        """
        above = next((e for e in self.efforts if e.k >= k), self.efforts[-1])
        below = next((e for e in reversed(self.efforts) if e.k <= k), above)
        if above.k > below.k:
            share = math.log(k / below.k) / math.log(above.k / below.k)
            leaves = _interpolate(below.leaves, above.leaves, share)
            reorder = _interpolate(below.reorder, above.reorder, share)
        else:
            # Measured itself, or outside of what was: shorter lists get the effort of the shortest.
            factor = max(1.0, k / above.k)
            leaves = factor * above.leaves
            reorder = factor * above.reorder
        # Less a trifle, or the rounding of logarithms would add one.
        leaves = math.ceil(leaves - 1e-9)
        reorder = math.ceil(reorder - 1e-9)
        return min(self.num_leaves, leaves), min(self.num_items, reorder)


def _interpolate(low: int, high: int, share: float) -> float:
    """Returns the number at `share` of the way from `low` to `high` on a logarithmic scale.

    From 0 it is 0: nothing is scored anew at any length.
    """
    if not low:
        return 0.0
    return low * (high / low) ** share


@dataclasses.dataclass(frozen=True)
class TunableIndex:
    """An index as the tuner sees it: a search with two settings, and what they cost.

    Attributes:
        search: Search with given settings: (queries, k, leaves, reorder) -> (scores, rows).
        num_items: Number of vectors, N.
        num_leaves: Largest number of leaves that can be searched.
        hashed: Whether candidates are scored anew, so that `reorder` is a setting.
        target_recall: Recall to reach.
        is_graph: Whether leaves are the candidates that a graph's search keeps, which must be at
            least as many as the list is long.
    """

    search: Search
    num_items: int
    num_leaves: int
    hashed: bool
    target_recall: float
    is_graph: bool = False

    def cost(self, leaves: int, reorder: int) -> float:
        """Returns the work of one search, in candidates scored anew."""
        compared = leaves * self.num_items / self.num_leaves
        if self.hashed:
            return reorder + compared / CODES_PER_CANDIDATE
        return compared


def tune(
    index: TunableIndex,
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    popularity: np.ndarray | None = None,
) -> tuple[tuple[SearchEffort, ...], tuple[Trial, ...], tuple[float | None, ...]]:
    """Finds the cheapest efforts that reach the target for lists of `k` and longer ones.

    Args:
        index: Index over `vectors`.
        vectors: float32 [N, D].
        queries: float32 [Q, D], user vectors.
        k: Usual length of the lists.
        popularity: Popularity of each item, [N], for the recall of each decile.

    Returns:
        (efforts, trials, recalls by decile). Efforts by rising k; none where no setting reaches the
        target. All trials. The held-out recall of lists of `k` for true items of each decile of
        popularity, the least popular first (None where no true item is in it); () without
        `popularity`.
    """
    efforts: list[SearchEffort] = []
    trials: list[Trial] = []
    deciles: tuple[float | None, ...] = ()
    for length in tuned_lengths(k, index.num_items):
        # Exact lists of long length take long to make, and few queries say enough: each has many
        # items to find.
        max_queries = LONG_LIST_QUERIES
        if length == k:
            max_queries = TUNING_QUERIES
        sample = evenly_spaced(queries, max_queries)
        exact = ExactIndex(vectors).search(sample, length)
        tuning_half = _every_second(sample, exact, first=0)
        held_out = _every_second(sample, exact, first=1)
        # Of a single query there is no second.
        if not len(held_out.queries):
            held_out = tuning_half
        setting = _cheapest_setting(index, tuning_half, length, trials)
        # One length that fails fails the index: another kind is built.
        if setting is None:
            return (), tuple(trials), ()
        leaves, reorder = setting
        leaves, rows, recalls = _raise_to_held_out(index, held_out, length, leaves, reorder)
        recall = round(float(recalls.mean()), 4)
        efforts.append(SearchEffort(length, leaves, reorder, recall, len(held_out.queries)))
        if length == k and popularity is not None:
            deciles = recall_by_decile(rows, held_out.rows, popularity)
    return tuple(efforts), tuple(trials), deciles


def tuned_lengths(k: int, num_items: int) -> list[int]:
    """Returns the list lengths to tune: `k`, and longer ones up to a tenth of the corpus."""
    # Longer lists would hold so much of the corpus that any effort finds them.
    longest = min(MAX_TUNED_LENGTH, num_items // 10)
    lengths = [k * factor for factor in LONG_LIST_FACTORS]
    return [min(k, num_items), *(length for length in lengths if length <= longest)]


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """Queries and their exact lists.

    Attributes:
        queries: float32 [Q, D].
        scores: float32 [Q, K], best first.
        rows: int32 [Q, K].
    """

    queries: np.ndarray
    scores: np.ndarray
    rows: np.ndarray

    def recalls(self, scores: np.ndarray) -> np.ndarray:
        """Returns the share of each exact list that a search found, float [Q].

        Args:
            scores: float32 [Q, K], scores of the lists that it returned.
        """
        # By scores, not by rows: of items with one score any will do. Libraries round sums in
        # other orders, hence the tolerance.
        kth_best = self.scores[:, -1:]
        threshold = kth_best - TIE_TOLERANCE * np.maximum(1.0, np.abs(kth_best))
        matches = (scores >= threshold).sum(1)
        # Ties may make them more than the list is long.
        return np.minimum(matches / self.scores.shape[1], 1.0)


def _every_second(
    queries: np.ndarray, exact: tuple[np.ndarray, np.ndarray], *, first: int
) -> GroundTruth:
    """Returns every second query from the `first` on, with its exact list."""
    scores, rows = exact
    return GroundTruth(queries[first::2], scores[first::2], rows[first::2])


def _cheapest_setting(
    index: TunableIndex, truth: GroundTruth, k: int, trials: list[Trial]
) -> tuple[int, int] | None:
    """Returns (leaves, candidates scored anew), or None where nothing reaches the target.

    The settings that it tries are added to `trials`.
    """
    reorders = [0]
    if index.hashed:
        reorders = [min(index.num_items, k * factor) for factor in REORDER_FACTORS]
    best = None
    lowest_cost = math.inf
    # From many candidates to few: the first reaches the target if any does, and bounds what the
    # others may cost.
    for reorder in reorders:
        for leaves in _fewest_leaves(index, truth, k, reorder, lowest_cost, trials):
            best = (leaves, reorder)
            lowest_cost = index.cost(leaves, reorder)
    return best


def _fewest_leaves(
    index: TunableIndex,
    truth: GroundTruth,
    k: int,
    reorder: int,
    max_cost: float,
    trials: list[Trial],
) -> Iterator[int]:
    """Yields the fewest leaves that reach the target, if some below `max_cost` do.

    Doubles them until they are enough, then bisects, as recall rises with the leaves.
    """

    def reaches_target(leaves: int) -> bool:
        trials.append(_run_trial(index, truth, k, leaves, reorder))
        return trials[-1].reached

    first = 1
    if index.is_graph:
        first = min(k, index.num_leaves)
    high = first
    while not reaches_target(high):
        if high == index.num_leaves or index.cost(high, reorder) >= max_cost:
            return
        high = min(2 * high, index.num_leaves)
    # `low` failed, or is below the least; `high` reaches the target. Their distance halves.
    low = max(high // 2, first - 1)
    while high - low > 1:
        middle = (low + high) // 2
        if reaches_target(middle):
            high = middle
        else:
            low = middle
    if index.cost(high, reorder) < max_cost:
        yield high


def _run_trial(index: TunableIndex, truth: GroundTruth, k: int, leaves: int, reorder: int) -> Trial:
    """Returns the recall and the speed of one setting."""
    start = time.perf_counter()
    scores, _ = index.search(truth.queries, k, leaves, reorder)
    seconds = time.perf_counter() - start
    recalls = truth.recalls(scores)
    recall = float(recalls.mean())
    # Of the best of many settings the measured recall is too high: chance chose it too.
    margin = MARGIN_ERRORS * float(recalls.std()) / math.sqrt(len(recalls))
    return Trial(
        k=k,
        leaves=leaves,
        reorder=reorder,
        recall=round(recall, 5),
        margin=round(margin, 5),
        queries_per_second=round(len(recalls) / max(seconds, 1e-9), 1),
        reached=recall - margin >= index.target_recall,
    )


def _raise_to_held_out(
    index: TunableIndex, held_out: GroundTruth, k: int, leaves: int, reorder: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Raises the leaves until the held-out half reaches the target too, which it seldom needs.

    Returns:
        (leaves, rows found [Q, k], recall of each query [Q]).
    """
    while True:
        scores, rows = index.search(held_out.queries, k, leaves, reorder)
        recalls = held_out.recalls(scores)
        if recalls.mean() >= index.target_recall or leaves == index.num_leaves:
            return leaves, rows, recalls
        # By a sixteenth: close to the fewest that do, in few rounds.
        more = min(index.num_leaves, leaves + max(1, leaves // 16))
        logging.info(
            "Held-out recall@%d %.4f is below %.4f: %d leaves are searched, not %d.",
            k,
            recalls.mean(),
            index.target_recall,
            more,
            leaves,
        )
        leaves = more
