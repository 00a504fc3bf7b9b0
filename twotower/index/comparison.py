"""Builds compared on the user's own vectors; the one that answers soonest at the target is taken.

Which build wins is a property of the vectors: measured at 200,000 x 64, codes win by up to four
times where items lie apart, and lists of whole vectors where they lie in clusters. Within a build
the effort is chosen by counted work, the same each time. Between builds no count is fair, so that
processor time decides, of one thread and in turns. The kind that a rule names stays unless another
is clearly faster.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.core.arrays import evenly_spaced
from twotower.index.base import TUNING_QUERIES, Build, Index, check_queries
from twotower.index.tuned import TunedIndex
from twotower.index.tuning import Comparison

# Items that builds are compared on, at most. Of a larger corpus it is a sample, and only the build
# that won is made of all of it.
MAX_COMPARED_ITEMS = 200_000
ROUNDS = 5  # turns of two builds; the best of each counts
SINGLE_QUERIES = 100  # single queries in a turn, whose median counts


def build_of(index: Index) -> Build | None:
    """Returns the way in which an index was built; None where it was not tuned."""
    if not isinstance(index, TunedIndex) or not index.tuning.efforts:
        return None
    tuning = index.tuning
    if index.is_graph:
        return Build(tuning.kind)
    leaves_per_root = round(tuning.num_leaves / tuning.num_items**0.5)
    return Build(tuning.kind, max(1, leaves_per_root))


def fastest_index(
    builds: Sequence[Build],
    make: Callable[[Build, np.ndarray], Index],
    vectors: np.ndarray,
    queries: ArrayLike,
    k: int,
    *,
    optimize_for: str,
    min_gain: float,
) -> Index:
    """Builds an index in several ways and returns the one that answers soonest.

    Args:
        builds: Ways to build it. The first is kept unless another gains enough.
        make: (build, float32 [N, D]) -> index that was tuned to the target recall.
        vectors: float32 [N, D].
        queries: float [Q, D], user vectors.
        k: Length of the lists.
        optimize_for: Use that is measured, a value of `config.retrieval.optimize_for`.
        min_gain: Times as fast as the best so far that a build must be to take its place.
    """
    sample = evenly_spaced(vectors, MAX_COMPARED_ITEMS)
    is_whole = len(sample) == len(vectors)
    names = ", ".join(map(str, builds))
    logging.info(
        "%d builds over %d items are compared for %s, some seconds to a minute each: %s.",
        len(builds),
        len(sample),
        optimize_for,
        names,
    )
    # The half that does not tune.
    held_out = evenly_spaced(check_queries(queries, vectors.shape[1]), TUNING_QUERIES)[1::2]
    held_out = np.ascontiguousarray(held_out[held_out.any(axis=1)])
    best = make(builds[0], sample)
    # Nothing to measure with, or a first build that gave way to exhaustive search.
    if not len(held_out) or not isinstance(best, TunedIndex) or not best.tuning.efforts:
        return best if is_whole else make(builds[0], vectors)
    # By place among the results; the first is added with the first that it is compared with.
    results: list[Comparison] = []
    best_position = 0
    for build in builds[1:]:
        # Where the first build gave way to this kind.
        if build == build_of(best):
            continue
        other = make(build, sample)
        # It did not reach the target, and gave way to another kind.
        if not isinstance(other, TunedIndex) or other.kind != build.kind:
            continue
        ours, theirs = seconds_per_query(best, other, held_out, k, optimize_for)
        if not results:
            results.append(_comparison(best, ours, optimize_for))
        results.append(_comparison(other, theirs, optimize_for))
        if ours > min_gain * theirs:
            best = other
            best_position = len(results) - 1
    if results:
        results[best_position] = dataclasses.replace(results[best_position], chosen=True)
    chosen = build_of(best) or builds[0]
    logging.info("%s is taken.", chosen)
    index: Index = best
    if not is_whole:
        index = make(chosen, vectors)
    if isinstance(index, TunedIndex):
        index.set_tuning(dataclasses.replace(index.tuning, compared=tuple(results)))
    return index


def seconds_per_query(
    first: TunedIndex, second: TunedIndex, queries: np.ndarray, k: int, optimize_for: str
) -> tuple[float, float]:
    """Returns the processor time of a query of two indexes, which take turns.

    Args:
        first: One index.
        second: Another over the same vectors.
        queries: float32 [Q, D].
        k: Length of the lists.
        optimize_for: "queries" for those that come one by one, "batches" for all at once.
    """
    measure = _seconds_in_a_batch
    if optimize_for == "queries":
        measure = _seconds_alone
    times = np.zeros((2, ROUNDS))
    # Threads that wait for each other would count as work.
    with first.one_thread(), second.one_thread():
        for turn in range(ROUNDS):
            times[0, turn] = measure(first, queries, k, turn)
            times[1, turn] = measure(second, queries, k, turn)
    # Other work on the machine can only add to a time.
    ours, theirs = times.min(axis=1)
    return float(ours), float(theirs)


def _seconds_alone(index: TunedIndex, queries: np.ndarray, k: int, turn: int) -> float:
    """Returns the median processor time of single queries, others in each turn."""
    chosen = (turn * SINGLE_QUERIES + np.arange(SINGLE_QUERIES)) % len(queries)
    times = []
    for query in queries[chosen]:
        start = time.process_time()
        index.search(query[None], k)
        times.append(time.process_time() - start)
    return float(np.median(times))


def _seconds_in_a_batch(index: TunedIndex, queries: np.ndarray, k: int, turn: int) -> float:
    """Returns the processor time of a query among all, the same ones in each turn."""
    start = time.process_time()
    index.search(queries, k)
    return (time.process_time() - start) / len(queries)


def _comparison(index: TunedIndex, seconds: float, optimize_for: str) -> Comparison:
    """Returns what was measured of a build, and logs it."""
    tuning = index.tuning
    effort = tuning.efforts[0]
    logging.info(
        "%s of %d leaves: recall@%d %.4f, %.4f ms of processor time a query.",
        index.kind,
        tuning.num_leaves,
        effort.k,
        effort.recall,
        1e3 * seconds,
    )
    return Comparison(
        kind=index.kind,
        num_items=index.num_items,
        num_leaves=tuning.num_leaves,
        recall=effort.recall,
        milliseconds=round(1e3 * seconds, 5),
        optimize_for=optimize_for,
        chosen=False,
    )
