"""The figures of lists, query by query and over all of them, while blocks of lists come in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from twotower.evaluation import metrics
from twotower.evaluation.all_lists import Resampling, Users, ratio_changes, repeated_share
from twotower.evaluation.further import (
    FurtherMetrics,
    RankingAuc,
    distinct_at,
    diversity_at,
    unit_vectors,
)
from twotower.evaluation.queries import Queries


class Hits(NamedTuple):
    """Right answers that lists hold, by query and then by rank; int [H] each."""

    query: np.ndarray
    rank: np.ndarray  # from 0
    item: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What lists are worth, over all queries and query by query.

    Attributes:
        figures: Means over the queries with an answer, and the figures of all lists together:
            "recall@10", "coverage@10", "queries" and so on.
        values: Name of each mean -> its values, float64 [Q].
        num_relevant: Number of right answers of each query, int32 [Q].
        hits: Right answers in the longest lists.
        exposures: Length of lists -> number of lists that hold each item, int64 [N].
        pseudo_values: Name of a figure of all lists together -> numbers whose mean over the queries
            with an answer it is, by which it is resampled, float64 [Q]; see
            `twotower.evaluation.all_lists`.
    """

    figures: dict[str, float]
    values: Mapping[str, np.ndarray]
    num_relevant: np.ndarray
    hits: Hits
    exposures: Mapping[int, np.ndarray]
    pseudo_values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def resampled(self) -> dict[str, np.ndarray]:
        """Columns float64 [Q] whose means are the figures that have an interval."""
        return {**self.values, **self.pseudo_values}

    @property
    def is_averaged(self) -> np.ndarray:
        """Whether a query has an answer, so that it counts in the means, bool [Q]."""
        return self.num_relevant > 0


class Lists:
    """The figures of the lists of one protocol, while blocks of lists come in.

    Attributes:
        mask_seen: Whether seen items are no part of the lists, nor of the relevant items.
    """

    def __init__(
        self,
        queries: Queries,
        ks: Sequence[int],
        size: int,
        *,
        mask_seen: bool,
        further: FurtherMetrics,
        resampled: bool = False,
    ):
        """Begins with no lists.

        Args:
            queries: Queries that are measured.
            ks: Lengths of the lists.
            size: Greatest number of queries of a block.
            mask_seen: Whether seen items are no part of the lists, nor of the relevant items.
            further: Metrics that take longer.
            resampled: Whether figures of all lists together get pseudo-values.
        """
        self.mask_seen = mask_seen
        # Both halves belong together: an item that no list may hold would count as missed.
        self._queries = queries.without_seen() if mask_seen else queries
        self._ks = sorted(set(ks))
        # Once: each is computed from all queries or all items.
        self._num_relevant = self._queries.num_relevant
        self._is_answerable = self._num_relevant > 0
        self._item_values = _item_values(queries)
        self._popularity_rank = metrics.popularity_ranks(queries.counts)
        self._item_hashes = np.random.default_rng(0).integers(
            0, 2**64, queries.num_items + 1, dtype=np.uint64
        )
        # Of rank without an item, -1, which changes no sum.
        self._item_hashes[-1] = 0
        self._values: dict[str, list[np.ndarray]] = {}
        self._hits: list[Hits] = []
        # Length -> sums of the hashes of the items of each list, uint64 [b] of each block.
        self._list_hashes: dict[int, list[np.ndarray]] = {k: [] for k in self._ks}
        # Length -> number of lists that hold an item, int64 [N].
        self._exposures = {k: np.zeros(queries.num_items, np.int64) for k in self._ks}
        self._users = Users(queries.user, self._is_answerable)
        self._resampling = None
        if resampled:
            self._resampling = Resampling(self._users, self._ks, queries.num_items)
        # Of one block of queries: a table is quicker to ask than a search.
        self._is_relevant = np.zeros((size, queries.num_items), bool)
        self._further = further
        self._units = None
        if further.item_vectors is not None:
            self._units = unit_vectors(further.item_vectors)
        self._auc = None
        if further.auc:
            self._auc = RankingAuc(self._queries, mask_seen=mask_seen)

    def add_scores(self, block: slice, scores: np.ndarray) -> None:
        """Measures the scores [b, N] of a slice of the queries, where AUC was asked for."""
        if self._auc is not None:
            self._auc.add(block, scores)

    def add(self, block: slice, rows: np.ndarray) -> None:
        """Measures the lists of a slice of the queries.

        Args:
            block: Slice of the queries.
            rows: Items of the lists, int [b, K], best first and -1 where no item is left.
        """
        relevant = self._queries.relevant.take(np.arange(block.start, block.stop))
        is_filled = rows >= 0
        self._is_relevant[relevant.rows, relevant.values] = True
        hits = self._is_relevant[np.arange(len(rows))[:, None], rows] & is_filled
        # Only what was set: clearing the whole table would take longer than the look-up.
        self._is_relevant[relevant.rows, relevant.values] = False
        # Without a mask: a list that could not be filled is still K long to these.
        query, rank = np.nonzero(hits)
        item = rows[query, rank]
        self._hits.append(Hits(block.start + query, rank, item))
        figures = metrics.hit_figures(query, rank, self._num_relevant[block], self._ks)
        for name, values in self._item_values.items():
            means = metrics.means_at(values[rows], is_filled, self._ks)
            figures |= {f"{name}@{k}": mean for k, mean in zip(self._ks, means)}
        lengths = is_filled.sum(1)
        figures |= {f"short_list@{k}": (lengths < k).astype(float) for k in self._ks}
        for k in self._ks:
            is_surprise = (rank < k) & (self._popularity_rank[item] >= k)
            surprises = np.bincount(query[is_surprise], minlength=len(rows))
            figures[f"serendipity@{k}"] = surprises / k
        figures |= self._further_figures(rows)
        for name, values in figures.items():
            self._values.setdefault(name, []).append(values)
        # Coverage is over the same queries as the means.
        counted = np.where(self._is_answerable[block, None], rows, -1)
        if self._resampling is not None:
            self._resampling.add(block, counted)
        start = 0
        # A sum, so that the order of the items does not matter.
        hashes = np.zeros(len(rows), np.uint64)
        for k in self._ks:
            items = counted[:, start:k]
            listed = items[items >= 0]
            self._exposures[k] += np.bincount(listed, minlength=self._queries.num_items)
            hashes = hashes + self._item_hashes[rows[:, start:k]].sum(1)
            self._list_hashes[k].append(hashes)
            start = k

    def _further_figures(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the metrics of lists that were asked for."""
        figures = {}
        if self._units is not None:
            diversities = diversity_at(self._units, rows, self._ks)
            figures |= {f"diversity@{k}": x for k, x in zip(self._ks, diversities)}
        for column, values in self._further.item_values.items():
            counts = distinct_at(values, rows, self._ks)
            figures |= {f"distinct.{column}@{k}": x for k, x in zip(self._ks, counts)}
        return figures

    def evaluation(self) -> Evaluation:
        """Returns the means over the queries that have an answer, and the numbers of queries."""
        result: dict[str, float] = {}
        joined = {name: np.concatenate(values) for name, values in self._values.items()}
        if self._auc is not None:
            joined["auc"] = self._auc.values()
        for name, values in joined.items():
            result[name] = _average(values, self._is_answerable)
        pseudo_values: dict[str, np.ndarray] = {}
        exposures = np.zeros(self._queries.num_items, np.int64)
        exposures_at: dict[int, np.ndarray] = {}
        for k in self._ks:
            # Those of the ranks after the next smaller length were counted for this one.
            exposures = exposures + self._exposures[k]
            exposures_at[k] = exposures
            result[f"coverage@{k}"] = float(metrics.coverage(exposures > 0))
            result[f"gini@{k}"] = metrics.gini(exposures)
            hashes = np.concatenate(self._list_hashes[k])[self._is_answerable]
            share, changes = repeated_share(self._users, hashes)
            result[f"repeated_list@{k}"] = share
            of_users = {"repeated_list": changes}
            lift = self._popularity_lift(joined[f"average_popularity@{k}"])
            if lift is not None:
                result[f"popularity_lift@{k}"], of_users["popularity_lift"] = lift
            if self._resampling is not None and self._users.count:
                of_users |= self._resampling.changes(k, exposures, result[f"gini@{k}"])
                for name, changes in of_users.items():
                    figure = result[f"{name}@{k}"]
                    column = self._users.pseudo_values(figure, changes)
                    pseudo_values[f"{name}@{k}"] = column
        if self._auc is not None:
            result["auc_of_all"] = self._auc.of_all_queries()
        result["queries"] = int(self._is_answerable.sum())
        result["queries_without_answer"] = int((~self._is_answerable).sum())
        hits = Hits(*map(np.concatenate, zip(*self._hits)))
        return Evaluation(result, joined, self._num_relevant, hits, exposures_at, pseudo_values)

    def _popularity_lift(self, average_popularity: np.ndarray) -> tuple[float, np.ndarray] | None:
        """Returns how much more popular the lists are than what their users had; None without it.

        The mean popularity of the lists over that of the users' histories, less 1, of queries whose
        user had anything (Abdollahpouri et al., The unfairness of popularity bias in
        recommendation, RMSE 2019); and by how much it falls without each user.
        """
        is_known, own = self._history_popularity
        # Users whose items have no training row: no lift over nothing.
        if not own.sum():
            return None
        lists = np.where(is_known, average_popularity[self._users.rows], 0.0)
        changes = ratio_changes(self._users, lists, own)
        return float(lists.sum() / own.sum() - 1), changes

    @functools.cached_property
    def _history_popularity(self) -> tuple[np.ndarray, np.ndarray]:
        """Which averaged queries have a history, bool [A], and its mean popularity, float64 [A]."""
        history = self._queries.seen
        popularity = self._queries.counts[history.values].astype(float)
        sums = np.bincount(history.rows, popularity, minlength=len(history))
        rows = self._queries.seen_row[self._users.rows]
        lengths = history.lengths[rows]
        return lengths > 0, sums[rows] / np.maximum(lengths, 1)


def _item_values(queries: Queries) -> dict[str, np.ndarray]:
    """Returns what a list is measured by besides its hits: a number for each item, float64 [N]."""
    counts = queries.counts
    information = metrics.self_information(counts, int(counts.sum()), len(counts))
    return {
        "novelty": np.asarray(information),
        "average_popularity": counts.astype(float),
        "long_tail": metrics.is_long_tail(counts).astype(float),
        "never_trained": (counts == 0).astype(float),
    }


def _average(values: np.ndarray, where: np.ndarray) -> float:
    if not where.any():
        return 0.0
    # In float64: a sum of many float32 values loses digits.
    return float(values[where].mean(dtype=np.float64))
