"""Queries of an evaluation: users, the items that are relevant to them, and those they had seen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrays import Ragged, count_values, evenly_spaced, stable_argsort
from twotower.core.errors import ConfigError, choose
from twotower.pipeline.batches import SPANS, InteractionRows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users, time_order


@dataclasses.dataclass(frozen=True)
class Queries:
    """Q queries to a corpus of N items.

    Attributes:
        user: Row of the users table for each query, int32 [Q].
        relevant: Relevant items of each query, Q lists of corpus rows.
        missing: Number of relevant items of each query that are not in the corpus, int32 [Q]. No
            ranking can list them, and they count as missed.
        seen: Items of earlier rows: a list for each user, or for each of `seen_list`.
        counts: Number of positive training rows of each item, int64 [N].
        context: Encoded features of the query itself, arrays [Q, ...].
        row: Position, among the positive rows of the split, of the first row of each query, int64
            [Q]; empty where queries were made of no rows.
        seen_list: List of `seen` of each query, int [Q]; None for that of its user.
    """

    user: np.ndarray
    relevant: Ragged
    missing: np.ndarray
    seen: Ragged
    counts: np.ndarray
    context: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    row: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    seen_list: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_items(self) -> int:
        return len(self.counts)

    @property
    def num_relevant(self) -> np.ndarray:
        """Number of relevant items of each query, int32 [Q]."""
        return (self.relevant.lengths + self.missing).astype(np.int32)

    @property
    def seen_row(self) -> np.ndarray:
        """Row in `seen` of each query, int [Q]."""
        return self.user if self.seen_list is None else self.seen_list

    def seen_lists(self, block: slice) -> Ragged:
        """Returns the seen items of a slice of the queries, a list for each."""
        return self.seen.take(self.seen_row[block])

    def is_repeat(self) -> np.ndarray:
        """Marks the relevant items that the user had seen, bool [relevant items]."""
        return self.seen.contains(self.seen_row[self.relevant.rows], self.relevant.values)

    def without_seen(self) -> Queries:
        """Returns the queries without the relevant items that the user had seen.

        Where seen items are masked no list can hold them, so that they would count as missed.
        """
        return self._without_seen

    @functools.cached_property
    def _without_seen(self) -> Queries:
        # Each of a dozen baselines asks for it.
        return dataclasses.replace(self, relevant=self.relevant.filter(~self.is_repeat()))

    def keep_new_items(self) -> Queries:
        """Returns the queries with only the relevant items that training never saw.

        Many queries are then left without a relevant item.
        """
        is_new = self.counts[self.relevant.values] == 0
        relevant = self.relevant.filter(is_new)
        # Items outside of the corpus are as new, but would only lower every ranking alike.
        return dataclasses.replace(self, relevant=relevant, missing=np.zeros_like(self.missing))

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
            seen_list=None if self.seen_list is None else self.seen_list[rows],
        )


# Parts of the log whose items count as seen when a split is evaluated: never the split itself,
# whose items are the ones to rank first.
EARLIER_PARTS = {"train": (), "validation": ("train",), "test": ("train", "validation")}

# Rows of a user that are to be found: the last one, each after the other, one drawn, or all as one
# set. Gusak et al., Time to Split, arXiv 2507.16289.
Targets = Literal["", "last", "successive", "random", "all"]
TARGETS: tuple[str, ...] = get_args(Targets)[1:]
TRAIN_QUERIES = 10_000  # rows of training that are asked for where nobody names a number


def make_queries(
    prepared: PreparedData,
    split: str,
    kind: str,
    *,
    targets: str = "",
    max_queries: int = 0,
    sample: int = 0,
) -> Queries:
    """Returns the queries of the rows of a split.

    Only positive rows (`PreparedData.is_positive`) are relevant, seen or counted.

    Args:
        prepared: Prepared data of a run.
        split: "validation", "test" or "train". Items of training rows count as seen, and for "test"
            those of validation rows too; for "train" only those of the rows before.
        kind: "user" or "interaction". With "user" each user is one query, all of its distinct
            held-out items are relevant, and its context is that of its first held-out row. With
            "interaction" each held-out row is a query with one relevant item.
        targets: "all" is the kind "user". With "last", "successive" and "random" a query is the
            last row of each user, each row, or one drawn by `config.split.seed`; all rows of the
            user before it, those of the split itself among them, are its history and count as seen.
            "" follows `kind`; for "train" it is "successive", and for validation by user "last", as
            these users have no earlier rows.
        max_queries: Greatest number of training rows that are asked, evenly spaced; 0 takes
            `TRAIN_QUERIES`. Other splits are asked whole, see `Queries.sample`.
        sample: Number of queries that are kept, as by `Queries.sample`, which saves the memory for
            what all others had seen; 0 keeps all.

    Raises:
        ConfigError: The split has no rows or no positive row, or a name is unknown.
    """
    earlier = choose(EARLIER_PARTS, split, "split")
    make = choose(QUERY_KINDS, kind, "config.evaluation.query")
    if targets:
        choose(dict.fromkeys(TARGETS), targets, "targets")
    else:
        targets = usual_targets(split, prepared.config.split)
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
    trained = prepared.positives("train").item
    counts = count_values(trained, len(prepared.items))
    rows = prepared.positives(split)
    if targets in ("", "all"):
        nothing = Ragged.empty(len(prepared.users))
        make = QUERY_KINDS["user"] if targets else make
        queries = make(rows, item_ids, seen=nothing, counts=counts).sample(sample)
        if not earlier_rows:
            return queries
        # Of the users that are asked alone: to sort all rows of a long log takes gigabytes.
        asked = queries.user if sample else None
        seen = items_of_users(earlier_rows, num_users=len(prepared.users), asked=asked)
        return dataclasses.replace(queries, seen=seen)
    # Before the sample, which is drawn of the rows that are asked for.
    chosen = _target_rows(rows, targets, prepared.config.split.seed)
    if split == "train":
        chosen = evenly_spaced(chosen, max_queries or TRAIN_QUERIES)
    spans = prepared.rolled_spans(split)
    # Histories that go on within the split: each row reads what came before it.
    if spans is not None:
        context = {**rows.context, SPANS: spans[positive]}
        rows = dataclasses.replace(rows, context=context)
    queries = _query_per_interaction(
        rows.take(chosen), item_ids, seen=_seen_before(earlier_rows, rows, chosen), counts=counts
    )
    queries = dataclasses.replace(queries, row=chosen, seen_list=np.arange(len(chosen)))
    return queries.sample(sample)


def usual_targets(split: str, config: SplitConfig) -> str:
    """Returns the targets of a split where none are named."""
    if split == "validation" and config.validation_by == "user":
        return "last"
    return "successive" if split == "train" else ""


def _target_rows(rows: InteractionRows, targets: str, seed: int) -> np.ndarray:
    """Returns the positions of the rows that are to be found, rising, int64 [Q]."""
    if targets == "successive":
        return np.arange(len(rows))
    order = time_order([rows])
    if targets == "random":
        # The last of a random order is a random one of each user's rows.
        order = np.random.default_rng(seed).permutation(len(rows))
    target = np.full(int(rows.user.max()) + 1, -1, np.int64)
    # Of a user's rows the last is written last.
    target[rows.user[order]] = order
    return np.sort(target[target >= 0])


def _seen_before(
    earlier: Sequence[InteractionRows], rows: InteractionRows, chosen: np.ndarray
) -> Ragged:
    """Returns the distinct items of all rows of a user before the moment of each chosen row.

    Rows of one moment do not know of each other; without times each row is a moment.

    Args:
        earlier: Rows of the parts before.
        rows: Rows of the part itself.
        chosen: Positions among `rows`, int64 [Q].

    Returns:
        Q lists, the latest item last.
    """
    parts = [*earlier, rows]
    order = time_order(parts)
    user = np.concatenate([part.user for part in parts])[order]
    by_user = stable_argsort(user)
    # The sort is stable: within a user the order of time stays.
    order = order[by_user]
    user = user[by_user]
    is_later = np.ones(len(order), bool)
    is_later[1:] = user[1:] != user[:-1]
    if all(part.timestamp is not None for part in parts if len(part)):
        times = [part.timestamp for part in parts if part.timestamp is not None]
        time = np.concatenate(times)[order]
        is_later[1:] |= time[1:] != time[:-1]
    else:
        is_later[:] = True
    # Where each moment begins, among the rows of all users in this order.
    begin = np.maximum.accumulate(np.where(is_later, np.arange(len(order)), 0))
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    own = position[sum(map(len, earlier)) + chosen]
    item = np.concatenate([part.item for part in parts])[order]
    first = np.searchsorted(user, rows.user[chosen])
    # Each list is a part of the rows of its user: one `take` of them all.
    lengths = begin[own] - first
    offsets = np.append(0, np.cumsum(lengths))
    positions = np.repeat(first - offsets[:-1], lengths) + np.arange(offsets[-1])
    lists = Ragged(offsets, item[positions].astype(np.int32, copy=False))
    # -1 stands for an item that is not in the corpus.
    return lists.filter(lists.values >= 0).distinct(keep="last")


def _query_per_interaction(
    rows: InteractionRows, item_ids: pa.ChunkedArray, *, seen: Ragged, counts: np.ndarray
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
    rows: InteractionRows, item_ids: pa.ChunkedArray, *, seen: Ragged, counts: np.ndarray
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
