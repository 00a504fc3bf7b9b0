"""How hard an index must search: measured on real user vectors, the cheapest setting that reaches
the recall asked for.

Half of the user vectors tune, the other half measures what was chosen. The choice is by counted
work, not by the clock, so that the same vectors give the same index on a busy machine; the speeds
that were seen are told beside.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from twotower.core.arrays import evenly_spaced
from twotower.core.ragged import pair_keys
from twotower.core.tables import format_table
from twotower.index.exact import ExactIndex

TUNING_QUERIES = 2_000  # user vectors, in both halves together
LONG_QUERIES = 500  # of those, for lists longer than K
LONGER = (
    1,
    10,
    100,
)  # times K: lengths of lists that are tuned; a search for more items than K must look deeper
LONGEST = 1_000
CANDIDATES = (32, 16, 8, 4, 2)  # times the length: candidates scored anew with whole vectors
# Standard errors by which the recall of the tuning half must pass the target: one case in twenty is
# worse than it looks.
MARGIN = 1.64
# Codes compared in the time of one candidate scored anew. Measured: 13 for single queries, 35 in
# batches, at any width.
CODES_PER_CANDIDATE = 20
DECILES = 10
TIE = 1e-6  # scores this near to the K-th are equal to it

# (queries, k, leaves, reorder) -> (scores, rows)
Search = Callable[[np.ndarray, int, int, int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """What a search for up to `k` items looks at, and what it was measured to find.

    Attributes:
        leaves: searched for each query.
        reorder: candidates scored anew with whole vectors; 0 where whole vectors are compared from
            the start.
        recall: mean share of the exact top `k` found for the `queries` held-out user vectors.
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
        margin: 1.64 standard errors of the recall.
        queries_per_second: in one batch, on this machine as busy as it was.
        reached: the recall less its margin reaches the target.
    """

    k: int
    leaves: int
    reorder: int
    recall: float
    margin: float
    queries_per_second: float
    reached: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be tuned.

    Attributes:
        search: the index.
        num_items: N.
        num_leaves: of its tree.
        hashed: whether candidates are scored anew.
        target: the recall to reach.
        graph: leaves are the candidates that the search of a graph keeps: at least as many as the
            list is long.
    """

    search: Search
    num_items: int
    num_leaves: int
    hashed: bool
    target: float
    graph: bool = False

    def work(self, leaves: int, reorder: int) -> float:
        """Of one search, in candidates scored anew."""
        compared = leaves * self.num_items / self.num_leaves
        return reorder + compared / CODES_PER_CANDIDATE if self.hashed else compared


def tune(
    problem: Problem,
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    popularity: np.ndarray | None = None,
) -> tuple[tuple[Effort, ...], tuple[Trial, ...], tuple[float | None, ...]]:
    """The cheapest efforts that reach the target for lists of `k` and longer ones.

    Args:
        vectors: float32 [N, D].
        queries: float32 [Q, D], user vectors.
        popularity: [N], for the recall of each decile.

    Returns:
        Efforts by rising k; no effort where nothing reaches the target. All trials. The held-out
        recall of lists of `k` for true items of each decile of popularity, the least popular first
        (None where no true item is in it); () without `popularity`.
    """
    efforts, trials, deciles = [], [], ()
    for length in tuned_lengths(k, problem.num_items):
        asked = evenly_spaced(queries, TUNING_QUERIES if length == k else LONG_QUERIES)
        truth = ExactIndex(vectors).search(asked, length)
        tuning, held_out = _half(asked, truth, 0), _half(asked, truth, 1)
        if not len(held_out.queries):
            held_out = tuning
        setting = _cheapest(problem, tuning, length, trials)
        if setting is None:
            return (), tuple(trials), ()
        leaves, rows = _widened(problem, held_out, length, *setting)
        efforts.append(
            Effort(
                length, leaves, setting[1], round(float(rows[1].mean()), 4), len(held_out.queries)
            )
        )
        if length == k and popularity is not None:
            deciles = recall_by_decile(rows[0], held_out.rows, popularity)
    return tuple(efforts), tuple(trials), deciles


def tuned_lengths(k: int, num_items: int) -> list[int]:
    """`k`, and the longer lists that are tuned beside it."""
    longest = min(LONGEST, num_items // 10)
    return [min(k, num_items), *(k * times for times in LONGER[1:] if k * times <= longest)]


@dataclasses.dataclass(frozen=True)
class _Half:
    """Queries and their exact answers."""

    queries: np.ndarray
    scores: np.ndarray
    rows: np.ndarray

    def recalls(self, scores: np.ndarray) -> np.ndarray:
        """float [Q], the share of each exact list that was found; of items with one score any will
        do."""
        least = self.scores[:, -1:] - TIE * np.maximum(1.0, np.abs(self.scores[:, -1:]))
        return np.minimum((scores >= least).sum(1) / self.scores.shape[1], 1.0)


def _half(queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray], first: int) -> _Half:
    return _Half(queries[first::2], truth[0][first::2], truth[1][first::2])


def _cheapest(
    problem: Problem, tuning: _Half, k: int, trials: list[Trial]
) -> tuple[int, int] | None:
    """(leaves, candidates scored anew), or None where nothing reaches the target."""
    best, least = None, math.inf
    # From many candidates to few: the first reaches the target if any does, and bounds what the
    # others may cost.
    for reorder in (
        [min(problem.num_items, k * times) for times in CANDIDATES] if problem.hashed else [0]
    ):
        for leaves in _fewest_leaves(problem, tuning, k, reorder, least, trials):
            best, least = (leaves, reorder), problem.work(leaves, reorder)
    return best


def _fewest_leaves(
    problem: Problem, tuning: _Half, k: int, reorder: int, limit: float, trials: list[Trial]
) -> Iterator[int]:
    """Yields the fewest leaves that reach the target, if some below the work `limit` do: doubles
    until they are enough, then bisects, as recall rises with the leaves."""

    def reached(leaves: int) -> bool:
        trials.append(_try(problem, tuning, k, leaves, reorder))
        return trials[-1].reached

    first, most = min(k if problem.graph else 1, problem.num_leaves), problem.num_leaves
    high = first
    while not reached(high):
        if high == most or problem.work(high, reorder) >= limit:
            return
        high = min(2 * high, most)
    low = max(high // 2, first - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    if problem.work(high, reorder) < limit:
        yield high


def _try(problem: Problem, tuning: _Half, k: int, leaves: int, reorder: int) -> Trial:
    start = time.perf_counter()
    scores, _ = problem.search(tuning.queries, k, leaves, reorder)
    seconds = time.perf_counter() - start
    recalls = tuning.recalls(scores)
    recall, margin = float(recalls.mean()), MARGIN * float(recalls.std()) / math.sqrt(len(recalls))
    speed = round(len(recalls) / max(seconds, 1e-9), 1)
    reached = recall - margin >= problem.target
    return Trial(k, leaves, reorder, round(recall, 5), round(margin, 5), speed, reached)


def _widened(
    problem: Problem, held_out: _Half, k: int, leaves: int, reorder: int
) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    """As many leaves as the held-out half needs too, which are seldom more; and (rows found, recall
    of each query) of it."""
    while True:
        scores, rows = problem.search(held_out.queries, k, leaves, reorder)
        recalls = held_out.recalls(scores)
        if recalls.mean() >= problem.target or leaves == problem.num_leaves:
            return leaves, (rows, recalls)
        wider = min(problem.num_leaves, leaves + max(1, leaves // 16))
        logging.info(
            "Held-out recall@%d %.4f is below %.4f: %d leaves are searched, not %d.",
            k,
            recalls.mean(),
            problem.target,
            wider,
            leaves,
        )
        leaves = wider


def found_in(truth: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool [Q, K], which entries of `truth` [Q, K] stand in the same row of `rows` [Q, M]."""
    query = np.arange(len(truth))[:, None]
    return np.isin(pair_keys(query, truth), pair_keys(query, rows)) & (truth >= 0)


def overlap(rows: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of each row of `truth` [Q, K] that stands in the same row of `rows` [Q, M]."""
    return float(found_in(truth, rows).mean()) if truth.size else 1.0


def ndcg(rows: np.ndarray, truth: np.ndarray) -> float:
    """Mean NDCG of the lists `rows` [Q, K], where the rows of `truth` [Q, K] are right, all alike.

    >>> round(ndcg(np.array([[4, 9]]), np.array([[9, 3]])), 4)  # 1 / log2(3) of 1 + 1 / log2(3)
    0.3869
    """
    gains = 1 / np.log2(np.arange(rows.shape[1]) + 2)
    return (
        float((found_in(rows, truth) @ gains).mean() / gains[: truth.shape[1]].sum())
        if truth.size
        else 1.0
    )


def recall_by_decile(
    rows: np.ndarray, truth: np.ndarray, popularity: np.ndarray
) -> tuple[float | None, ...]:
    """The share found of the true items in each tenth of the corpus, from the least to the most
    popular; see `tune`."""
    place = np.empty(len(popularity), np.int64)
    place[np.argsort(popularity, kind="stable")] = np.arange(len(popularity))
    decile, found = place[truth] * DECILES // len(popularity), found_in(truth, rows)
    total = np.bincount(decile.ravel(), minlength=DECILES)
    hits = np.bincount(decile[found], minlength=DECILES)
    return tuple(round(float(h / n), 4) if n else None for h, n in zip(hits, total))


def format_tuning(tuning: Any) -> str:
    """What was tried for an index (the telling part of it) as a table, and what was chosen."""
    if not tuning.tried:
        return f"{tuning.kind}: exact, nothing to tune."
    chosen = {(e.k, e.leaves, e.reorder) for e in tuning.efforts}
    rows = []
    for trial in _telling(tuning.tried, chosen):
        mark = "" if trial.reached else "too low"
        if (trial.k, trial.leaves, trial.reorder) in chosen:
            mark = "chosen"
        rows.append(
            [
                str(trial.k),
                str(trial.leaves),
                str(trial.reorder),
                f"{trial.recall:.4f}",
                f"{trial.recall - trial.margin:.4f}",
                f"{trial.queries_per_second:,.0f}",
                mark,
            ]
        )
    header = ["k", "leaves", "reorder", "recall", "-margin", "queries/s", ""]
    table = format_table(rows, header, align="rrrrrrl")
    target = f"target {tuning.target_recall:.4g}"
    lines = [
        f"{tuning.kind}, {tuning.num_leaves:,} leaves, {target}:",
        textwrap.indent(table, "  "),
    ]
    for e in tuning.efforts:
        setting = f"{e.leaves} leaves" + (f", {e.reorder} candidates" if e.reorder else "")
        lines.append(
            f"Lists of {e.k:,}: {setting}, recall {e.recall:.4f} on {e.queries} held-out users."
        )
    if tuning.recall_by_decile:
        cells = ("-" if value is None else f"{value:.3f}" for value in tuning.recall_by_decile)
        lines.append(
            f"Recall@{tuning.efforts[0].k} by decile of popularity, the least popular first: {' '.join(cells)}"
        )
    return "\n".join(lines)


def _telling(trials: Sequence[Trial], chosen: set[tuple[int, int, int]]) -> list[Trial]:
    """Of each length and number of candidates the fewest leaves that reached the target, or the
    best; and those chosen."""
    best: dict[tuple[int, int], Trial] = {}
    for trial in trials:
        known = best.get(key := (trial.k, trial.reorder))
        rank = lambda t: (t.reached, -t.leaves if t.reached else t.recall)  # noqa: E731
        best[key] = trial if known is None or rank(trial) > rank(known) else known
    told = {t for t in trials if (t.k, t.leaves, t.reorder) in chosen} | set(best.values())
    return sorted(told, key=lambda t: (t.k, t.reorder, t.leaves))


def plot_tuning(trials: Sequence[Trial], target: float, path: Path) -> None:
    """Recall against queries per second of what was tried, as an image; needs the extra `plots`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"A plot needs matplotlib ({error}): pip install 'twotower[plots]'."
        ) from error
    lengths = sorted({trial.k for trial in trials})
    figure = Figure(figsize=(6 * len(lengths), 4.5), layout="constrained")
    for axes, k in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths):
        for reorder in sorted({trial.reorder for trial in trials if trial.k == k}):
            line = sorted(
                (t.recall, t.queries_per_second) for t in trials if (t.k, t.reorder) == (k, reorder)
            )
            axes.plot(
                *zip(*line),
                marker="o",
                label=f"{reorder} candidates" if reorder else "whole vectors",
            )
        axes.axvline(target, color="grey", linestyle="--")
        axes.set(xlabel=f"recall@{k}", ylabel="queries per second", yscale="log")
        axes.legend()
    figure.savefig(path)
