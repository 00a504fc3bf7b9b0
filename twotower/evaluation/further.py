"""Metrics that take longer than the others, and are measured where they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from twotower.core.arrow import plain_text
from twotower.core.errors import ConfigError, choose, did_you_mean
from twotower.evaluation.queries import Queries

# Bits of a score, sign and exponent among them, that tell the pairs of all queries in order. Two
# scores within a thousandth of each other may count as equal, which is half a pair in order.
_BITS = 20


@dataclasses.dataclass(frozen=True)
class FurtherMetrics:
    """Which of them to measure, and what they read.

    Attributes:
        auc: Whether to measure where each right answer stands among all other items.
        item_vectors: Vectors that intra-list diversity is measured by, float [N, D]; None for none.
        item_values: Column of items -> number of its value of each item, int [N], -1 for none. The
            distinct values of a list are counted.
    """

    auc: bool = False
    item_vectors: np.ndarray | None = None
    item_values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# Names that ask for a metric; "distinct.COLUMN" asks for the values of a column.
NAMES = ("auc", "diversity")
DISTINCT = "distinct."


def item_values(items: pa.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of items whose distinct values are asked for, as numbers.

    Args:
        items: Items of the corpus.
        names: Names of metrics, some of them "distinct.COLUMN".

    Returns:
        Column -> number of the value of each item, int [N], -1 for none.

    Raises:
        ConfigError: A name is that of no metric, or its column is missing; the message names the
            nearest.
    """
    values = {}
    columns = items.column_names
    for name in names:
        column = name.removeprefix(DISTINCT)
        if column == name:
            choose(dict.fromkeys([*NAMES, f"{DISTINCT}COLUMN"]), name, "--further_metrics")
        elif column not in columns:
            hint = did_you_mean(column, columns)
            raise ConfigError(
                f"--further_metrics={name}: items have no column {column!r}{hint} "
                f"Known: {', '.join(columns)}."
            )
        else:
            coded = plain_text(items[column]).combine_chunks().dictionary_encode()
            values[column] = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return values


class RankingAuc:
    """The share of pairs of a right answer and another item that a ranking has in order.

    Equal scores count half, and a right answer outside of the corpus stands behind every item. It
    is the area under the ROC curve of one query.

    Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 1982.
    """

    def __init__(self, queries: Queries, *, mask_seen: bool):
        """Begins with no scores.

        Args:
            queries: Queries without the right answers that no list may hold.
            mask_seen: Whether seen items are none of the other items.
        """
        self._queries = queries
        self._mask_seen = mask_seen
        self._values: list[np.ndarray] = []
        # Of the right answers and of the other items of all queries, by the bits of their scores.
        self._relevant = np.zeros(2**_BITS, np.int64)
        self._others = np.zeros(2**_BITS, np.int64)
        self._missing = 0

    def add(self, block: slice, scores: np.ndarray) -> None:
        """Measures the scores of a slice of the queries.

        Args:
            block: Slice of the queries.
            scores: float32 [b, N], which stay as they are.
        """
        relevant = self._queries.relevant.take(np.arange(block.start, block.stop))
        missing = self._queries.missing[block]
        # Adding 0 makes -0 to 0, whose bits differ.
        ordered = scores.astype(np.float32) + np.float32(0)
        right = ordered[relevant.rows, relevant.values]
        num_items = np.full(len(ordered), ordered.shape[1])
        num_masked = np.zeros(len(ordered), int)
        if self._mask_seen:
            seen = self._queries.seen_lists(block)
            # Below every score, so that they sort first.
            ordered[seen.rows, seen.values] = -np.inf
            num_masked = seen.distinct().lengths
        ordered.sort(axis=1)
        below = np.zeros(len(ordered))
        for query, (row, masked) in enumerate(zip(ordered, num_masked)):
            own = right[relevant.offsets[query] : relevant.offsets[query + 1]]
            unmasked = row[masked:]
            first = np.searchsorted(unmasked, own, side="left")
            last = np.searchsorted(unmasked, own, side="right")
            below[query] = (first + last).sum() / 2
            self._others += np.bincount(_bins(unmasked), minlength=2**_BITS)
        counts = relevant.lengths
        others = num_items - num_masked - counts
        # Among themselves, right answers are in order half of the time.
        in_order = below - counts**2 / 2
        pairs = (counts + missing) * others
        # Without another item there is nothing to be in order with: as good as chance.
        is_measured = pairs > 0
        self._values.append(np.where(is_measured, in_order / np.maximum(pairs, 1), 0.5))
        bins = np.bincount(_bins(right), minlength=2**_BITS)
        self._relevant += bins
        self._others -= bins
        self._missing += int(missing.sum())

    def values(self) -> np.ndarray:
        """Returns the share of each query, float64 [Q]."""
        return np.concatenate(self._values)

    def of_all_queries(self) -> float:
        """Returns the share of pairs of any query's right answer and any query's other item.

        It says how well one threshold serves all users.
        """
        below = np.cumsum(self._others) - self._others / 2
        in_order = float((self._relevant * below).sum())
        pairs = float(self._relevant.sum() + self._missing) * float(self._others.sum())
        if not pairs:
            return 0.5
        return in_order / pairs


def _bins(scores: np.ndarray) -> np.ndarray:
    """Returns the number of each score, float32 [M], that rises with it, int64 [M]."""
    bits = np.ascontiguousarray(scores).view(np.uint32)
    # The bits of negative numbers rise as they fall, and those of others begin with 0.
    flip = np.where(bits >> 31, np.uint32(2**32 - 1), np.uint32(2**31))
    return ((bits ^ flip) >> (32 - _BITS)).astype(np.int64)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors of length 1, and one of zeros behind them: float32 [N + 1, D]."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, 1e-12)
    return np.concatenate([units, np.zeros_like(units[:1])])


def diversity_at(units: np.ndarray, rows: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
    """Returns the intra-list diversity at several lengths: the mean of 1 - cosine over pairs.

    It is 0 of a list with less than two items.

    Ziegler et al., Improving recommendation lists through topic diversification, WWW 2005.

    Args:
        units: Vectors as `unit_vectors` returns them.
        rows: Items of the lists, int [b, K], -1 where no item is left.
        ks: Lengths, rising, K at most.
    """
    total = np.zeros((len(rows), units.shape[1]))
    squares = np.zeros(len(rows))
    counts = np.zeros(len(rows))
    diversities = []
    start = 0
    for k in ks:
        part = rows[:, start:k]
        # -1 is the last one, of zeros.
        vectors = units[part]
        total += vectors.sum(1)
        squares += (vectors**2).sum((1, 2))
        counts += (part >= 0).sum(1)
        # The square of a sum holds each pair twice, and each vector with itself.
        cosines = (total**2).sum(1) - squares
        pairs = np.maximum(counts * (counts - 1), 1)
        diversities.append(np.where(counts > 1, 1 - cosines / pairs, 0.0))
        start = k
    return diversities


def distinct_at(values: np.ndarray, rows: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
    """Returns the number of distinct values in each list, at several lengths.

    Args:
        values: Number of the value of each item, int [N], -1 for none.
        rows: Items of the lists, int [b, K], -1 where no item is left.
        ks: Lengths, K at most.
    """
    listed = np.where(rows >= 0, values[rows], -1)
    order = np.argsort(listed, axis=1, kind="stable")
    arranged = np.take_along_axis(listed, order, axis=1)
    is_new = np.ones(listed.shape, bool)
    is_new[:, 1:] = arranged[:, 1:] != arranged[:, :-1]
    is_first = np.zeros(listed.shape, bool)
    # Back to the ranks: a stable order begins each value with its best rank.
    np.put_along_axis(is_first, order, is_new & (arranged >= 0), axis=1)
    return [is_first[:, :k].sum(1).astype(float) for k in ks]
