"""What an evaluation asks: for whom, which answers are right, which items were seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.errors import ConfigError, choose
from twotower.core.ragged import Ragged
from twotower.pipeline.batches import Rows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users


@dataclasses.dataclass(frozen=True)
class Queries:
    """Q questions to a corpus of N items.

    Attributes:
        user: int32 [Q], row of the users table.
        right: Q lists of right answers, rows of the corpus.
        missing: int32 [Q], right answers that are not in the corpus: nothing can find them, and
            they count as missed.
        seen: for each user (not query) the items of its earlier rows.
        counts: int64 [N], training rows of each item that are positives.
        context: encoded features of the query itself, [Q, ...] each.
    """

    user: np.ndarray
    right: Ragged
    missing: np.ndarray
    seen: Ragged
    counts: np.ndarray
    context: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_items(self) -> int:
        return len(self.counts)

    @property
    def num_right(self) -> np.ndarray:
        """int32 [Q]"""
        return (self.right.lengths + self.missing).astype(np.int32)

    def seen_of(self, chosen: slice) -> Ragged:
        """The seen items of some queries, one list a query."""
        return self.seen.take(self.user[chosen])

    def less_seen(self) -> Queries:
        """Without the right answers that the user had seen: they cannot come back when seen items
        are masked."""
        asked = self.user[self.right.rows]
        return dataclasses.replace(
            self, right=self.right.filter(~self.seen.contains(asked, self.right.values))
        )

    def of_new_items(self) -> Queries:
        """With the right answers alone that training never saw; many queries then have none."""
        kept = self.counts[self.right.values] == 0
        return dataclasses.replace(
            self, right=self.right.filter(kept), missing=np.zeros_like(self.missing)
        )

    def of_new_users(self, known: np.ndarray) -> Queries:
        """Those of users without a training row; `known` are the users of training rows."""
        return self.take(np.flatnonzero(~np.isin(self.user, known)))

    def sample(self, count: int) -> Queries:
        """At most `count` of the queries, evenly spaced; all where `count` is 0. Every one is still
        asked of the whole corpus."""
        return (
            self.take(evenly_spaced(np.arange(len(self)), count)) if 0 < count < len(self) else self
        )

    def take(self, rows: np.ndarray) -> Queries:
        """Some of the queries."""
        context = {name: values[rows] for name, values in self.context.items()}
        return dataclasses.replace(
            self,
            user=self.user[rows],
            right=self.right.take(rows),
            missing=self.missing[rows],
            context=context,
        )


def make_queries(prepared: PreparedData, split: str, kind: str) -> Queries:
    """The queries of a split.

    Args:
        split: "validation" or "test". Seen are the training rows, and for test the validation rows
            too; of all of them only those that are positives (`PreparedData.is_positive`).
        kind: "user": one query a user, all its distinct held-out items right; its context is that
            of its first held-out row. "interaction": each held-out row is a query with one right
            answer.

    Raises:
        ConfigError: the split has no rows, or `kind` or `split` is unknown.
    """
    earlier = choose({"validation": ("train",), "test": ("train", "validation")}, split, "split")
    make = choose(
        {"user": _by_user, "interaction": _by_interaction}, kind, "config.evaluation.query"
    )
    if not len(getattr(prepared, split)):
        raise ConfigError(
            f"There are no {split} rows to evaluate on: config.split.{split} must be above 0."
        )
    right = prepared.is_positive(split)
    if not right.any():
        label = prepared.config.objective.label
        raise ConfigError(
            f"None of the {len(right):,} {split} rows has config.objective.label={label!r} 1: no answer is right."
        )
    trained = prepared.positives("train").item
    return Queries(
        **make(
            prepared.positives(split),
            getattr(prepared.raw, split)["item_id"].filter(pa.array(right)),
        ),
        seen=items_of_users(
            [prepared.positives(name) for name in earlier], num_users=len(prepared.users)
        ),
        counts=np.bincount(trained[trained >= 0], minlength=len(prepared.items)),
    )


def _by_interaction(rows: Rows, item_ids: Any) -> dict[str, Any]:
    known = rows.item >= 0
    right = Ragged.from_pairs(np.flatnonzero(known), rows.item[known], num_rows=len(rows))
    return {
        "user": rows.user,
        "right": right,
        "missing": (~known).astype(np.int32),
        "context": dict(rows.context),
    }


def _by_user(rows: Rows, item_ids: pa.ChunkedArray) -> dict[str, Any]:
    user, first, query = np.unique(rows.user, return_index=True, return_inverse=True)
    known = rows.item >= 0
    right = Ragged.from_pairs(query[known], rows.item[known], num_rows=len(user)).distinct()
    # Items outside of the corpus have no row; their ids tell them apart.
    codes = item_ids.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    missing = Ragged.from_pairs(query[~known], codes[~known], num_rows=len(user)).distinct()
    context = {name: values[first] for name, values in rows.context.items()}
    return {
        "user": user,
        "right": right,
        "missing": missing.lengths.astype(np.int32),
        "context": context,
    }
