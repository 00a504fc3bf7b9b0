"""Queries of an evaluation: users, the items that are relevant to them, and those they had seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from twotower.core.arrays import Ragged, evenly_spaced
from twotower.core.errors import ConfigError, choose
from twotower.pipeline.batches import Rows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users


@dataclasses.dataclass(frozen=True)
class Queries:
    """Q queries to a corpus of N items.

    Attributes:
        user: Row of the users table for each query, int32 [Q].
        relevant: Relevant items of each query, Q lists of corpus rows.
        missing: Number of relevant items of each query that are not in the corpus, int32 [Q]. No
            ranking can list them, and they count as missed.
        seen: Items of the earlier rows of each user, a list for each user (not query).
        counts: Number of positive training rows of each item, int64 [N].
        context: Encoded features of the query itself, arrays [Q, ...].
        row: Position, among the positive rows of the split, of the first row of each query, int64
            [Q]; empty where queries were made of no rows.
    """

    user: np.ndarray
    relevant: Ragged
    missing: np.ndarray
    seen: Ragged
    counts: np.ndarray
    context: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    row: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_items(self) -> int:
        return len(self.counts)

    @property
    def num_relevant(self) -> np.ndarray:
        """Number of relevant items of each query, int32 [Q]."""
        return (self.relevant.lengths + self.missing).astype(np.int32)

    def seen_lists(self, block: slice) -> Ragged:
        """Returns the seen items of a slice of the queries, a list for each."""
        return self.seen.take(self.user[block])

    def without_seen(self) -> Queries:
        """Returns the queries without the relevant items that the user had seen.

        Where seen items are masked no list can hold them, so that they would count as missed.
        """
        users = self.user[self.relevant.rows]
        unseen = ~self.seen.contains(users, self.relevant.values)
        return dataclasses.replace(self, relevant=self.relevant.filter(unseen))

    def keep_new_items(self) -> Queries:
        """Returns the queries with only the relevant items that training never saw.

        Many queries are then left without a relevant item.
        """
        is_new = self.counts[self.relevant.values] == 0
        relevant = self.relevant.filter(is_new)
        # Items outside of the corpus are as new, but would only lower every ranking alike.
        return dataclasses.replace(self, relevant=relevant, missing=np.zeros_like(self.missing))

    def keep_new_users(self, trained: np.ndarray) -> Queries:
        """Returns the queries of users that are not among `trained`, the users of training rows."""
        return self.take(np.flatnonzero(~np.isin(self.user, trained)))

    def sample(self, count: int) -> Queries:
        """Returns at most `count` of the queries, evenly spaced, or all where `count` is 0.

        Each of them still ranks the whole corpus.
        """
        if not 0 < count < len(self):
            return self
        return self.take(evenly_spaced(np.arange(len(self)), count))

    def take(self, rows: np.ndarray) -> Queries:
        """Returns the queries at these positions."""
        context = {name: values[rows] for name, values in self.context.items()}
        # `seen` has a list for each user and `counts` a number for each item: both stay.
        return dataclasses.replace(
            self,
            user=self.user[rows],
            relevant=self.relevant.take(rows),
            missing=self.missing[rows],
            context=context,
            row=self.row[rows] if len(self.row) else self.row,
        )


# Parts of the log whose items count as seen when a split is evaluated: never the split itself,
# whose items are the ones to rank first.
EARLIER_PARTS = {"validation": ("train",), "test": ("train", "validation")}


def make_queries(prepared: PreparedData, split: str, kind: str) -> Queries:
    """Returns the queries of the held-out rows of a split.

    Only positive rows (`PreparedData.is_positive`) are relevant, seen or counted.

    Args:
        prepared: Prepared data of a run.
        split: "validation" or "test". Items of training rows count as seen, and for "test" those of
            validation rows too.
        kind: "user" or "interaction". With "user" each user is one query, all of its distinct
            held-out items are relevant, and its context is that of its first held-out row. With
            "interaction" each held-out row is a query with one relevant item.

    Raises:
        ConfigError: The split has no rows or no positive row, or `kind` or `split` is unknown.
    """
    earlier = choose(EARLIER_PARTS, split, "split")
    make = choose(QUERY_KINDS, kind, "config.evaluation.query")
    if not len(getattr(prepared, split)):
        raise ConfigError(
            f"There are no {split} rows to evaluate on: config.split.{split} must be above 0."
        )
    positive = prepared.is_positive(split)
    if not positive.any():
        label = prepared.config.objective.label
        raise ConfigError(
            f"None of the {len(positive):,} {split} rows has config.objective.label={label!r} 1: "
            "no item is relevant."
        )
    # Rows as arrays know items of the corpus alone; the raw table has the ids of all others.
    raw: pa.Table = getattr(prepared.raw, split)
    item_ids = raw["item_id"].filter(pa.array(positive))
    earlier_rows = [prepared.positives(part) for part in earlier]
    seen = items_of_users(earlier_rows, num_users=len(prepared.users))
    trained = prepared.positives("train").item
    counts = np.bincount(trained[trained >= 0], minlength=len(prepared.items))
    return make(prepared.positives(split), item_ids, seen=seen, counts=counts)


def _query_per_interaction(
    rows: Rows, item_ids: pa.ChunkedArray, *, seen: Ragged, counts: np.ndarray
) -> Queries:
    """Makes a query of each row, whose item is the relevant one."""
    del item_ids  # a query has one item: no ids are needed to count distinct missing ones
    in_corpus = rows.item >= 0
    query = np.flatnonzero(in_corpus)
    relevant = Ragged.from_pairs(query, rows.item[in_corpus], num_rows=len(rows))
    return Queries(
        user=rows.user,
        relevant=relevant,
        missing=(~in_corpus).astype(np.int32),
        seen=seen,
        counts=counts,
        context=dict(rows.context),
        row=np.arange(len(rows)),
    )


def _query_per_user(
    rows: Rows, item_ids: pa.ChunkedArray, *, seen: Ragged, counts: np.ndarray
) -> Queries:
    """Makes a query of each user, to whom the distinct items of all its rows are relevant."""
    user, first, query = np.unique(rows.user, return_index=True, return_inverse=True)
    in_corpus = rows.item >= 0
    relevant = Ragged.from_pairs(query[in_corpus], rows.item[in_corpus], num_rows=len(user))
    # Items outside of the corpus have no row; their ids, as numbers, tell them apart.
    encoded_ids = item_ids.combine_chunks().dictionary_encode()
    codes = encoded_ids.indices.to_numpy(zero_copy_only=False)
    missing = Ragged.from_pairs(query[~in_corpus], codes[~in_corpus], num_rows=len(user))
    return Queries(
        user=user,
        relevant=relevant.distinct(),
        missing=missing.distinct().lengths.astype(np.int32),
        seen=seen,
        counts=counts,
        # The context of a later row may tell of an earlier one, whose item is relevant too.
        context={name: values[first] for name, values in rows.context.items()},
        row=first,
    )


QUERY_KINDS = {"user": _query_per_user, "interaction": _query_per_interaction}
