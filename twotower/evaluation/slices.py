"""Figures of parts of an evaluation: by popularity of the items, by users, by values of a column.

Nothing is ranked again: they come from the hits of the lists that were measured.

A slice of queries (by user or row) has the means over its queries. A slice of items asks each query
for its right answers of that slice alone, in the list of the whole corpus: a query with answers in
three categories counts once in each. Right answers outside of the corpus are in no slice of items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import Ragged
from twotower.core.arrow import is_list, pc, plain_text
from twotower.core.errors import ConfigError, did_you_mean
from twotower.evaluation.baselines.make import NO_RIVALS
from twotower.evaluation.evaluate import Evaluation
from twotower.evaluation.intervals import paired_intervals
from twotower.evaluation.metrics import RANKING_METRICS, hit_figures
from twotower.evaluation.queries import Queries
from twotower.pipeline.describe import list_separators
from twotower.pipeline.prepare import PreparedData

MIN_QUERIES = 20  # queries below which a value of a column is joined with others
MAX_VALUES = 20  # values of a column that are measured each by itself, those of most queries
NUM_DECILES = 10
NUM_BUCKETS = 5  # quantiles that a column of many numbers is cut into
# First length of each bucket, and its name.
HISTORY_BUCKETS = {
    0: "0",
    1: "1 to 2",
    3: "3 to 5",
    6: "6 to 10",
    11: "11 to 20",
    21: "21 to 50",
    51: "51 to 100",
    101: "over 100",
}
MISSING = "(missing)"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Values that queries, or items, are told apart by.

    Attributes:
        values: Names of the values, in the order of a report.
        groups: Numbers of the values of each query, Q lists, or of each item, N lists.
        of_items: Whether the lists are those of items.
        joins_few: Whether values with few queries are joined to one.
    """

    values: Sequence[str]
    groups: Ragged
    of_items: bool = False
    joins_few: bool = False


@dataclasses.dataclass(frozen=True)
class Cells:
    """Pairs of a query and a value, each of which counts once in the means of the value.

    Attributes:
        slice: The slice, with values of few queries joined.
        query: Number of the query, int [C].
        group: Number of the value, int [C].
        num_relevant: Number of right answers of the query that are of the value, int [C].
        values: Ranking -> metric -> float64 [C].
    """

    slice: Slice
    query: np.ndarray
    group: np.ndarray
    num_relevant: np.ndarray
    values: Mapping[str, Mapping[str, np.ndarray]]


def default_slices(queries: Queries, trained_users: np.ndarray) -> dict[str, Slice]:
    """Returns the slices of every evaluation.

    Args:
        queries: Queries that are measured.
        trained_users: Rows of the users table of training rows.

    Returns:
        "item_popularity", ten parts of the corpus by the training rows of an item; "items" and
        "users", warm ones, of which training had a row, and cold ones; "history", the number of
        distinct items that the user had before.
    """
    is_known = np.isin(queries.user, trained_users)
    history = queries.seen.lengths[queries.seen_row]
    # The bucket before the first that begins above.
    bucket = np.searchsorted(list(HISTORY_BUCKETS), history, side="right") - 1
    temperatures = ("warm", "cold")
    return {
        "item_popularity": popularity_deciles(queries.counts),
        "items": Slice(temperatures, _singles(queries.counts == 0), of_items=True),
        "users": Slice(temperatures, _singles(~is_known)),
        "history": Slice(list(HISTORY_BUCKETS.values()), _singles(bucket)),
    }


def popularity_deciles(counts: np.ndarray) -> Slice:
    """Returns ten equal parts of the corpus, the least popular items first, as all figures have it.

    Items of as many training rows share a part, that of the middle one of them.

    Args:
        counts: Number of training rows of each item, int [N].
    """
    order = np.sort(counts)
    first = np.searchsorted(order, counts, side="left")
    last = np.searchsorted(order, counts, side="right") - 1
    # Of the middle of equals: that of the last would move a whole tail of unsold items up.
    middle = (first + last) / 2
    decile = (NUM_DECILES * middle / len(counts)).astype(int)
    names = [f"tenth {number}" for number in range(1, NUM_DECILES + 1)]
    names[0] += ", least popular"
    names[-1] += ", most popular"
    return Slice(names, _singles(decile), of_items=True)


def column_slice(prepared: PreparedData, queries: Queries, split: str, name: str) -> Slice:
    """Returns the slice by a column of users, items or rows.

    A column of lists, or of texts that a feature reads as lists, puts its user or item into each of
    its members. A column of more than `MAX_VALUES` numbers is cut into `NUM_BUCKETS` parts.

    Args:
        prepared: Prepared data of a run.
        queries: Queries that are measured.
        split: Name of the rows that the queries were made of.
        name: Column, "user.", "row." or "item." before it where several tables have it; without,
            that of the first of these tables that has it.

    Raises:
        ConfigError: No table has such a column; the message names the nearest.
    """
    tables = {
        "user": prepared.users,
        "row": getattr(prepared.raw, split),
        "item": prepared.items,
    }
    table, column = _find_column(tables, name)
    values = tables[table][column]
    if table == "user":
        values = values.take(pa.array(queries.user))
    # Queries are numbered by positive rows; the raw part has the others too.
    if table == "row":
        positive = values.filter(pa.array(prepared.is_positive(split)))
        values = positive.take(pa.array(queries.row))
    # Of text that a feature reads as a list: a genre is a value, "Comedy|Drama" is none.
    separator = list_separators(prepared.encoder.spec).get(column, "")
    return _slice_by_values(values, separator, of_items=table == "item")


def measure_slices(
    slices: Mapping[str, Slice],
    queries: Queries,
    evaluations: Mapping[str, Evaluation],
    ks: Sequence[int],
    *,
    keep: Callable[[str, Cells], None] | None = None,
) -> dict[str, Any]:
    """Measures slices of lists with seen items masked.

    Args:
        slices: Slices by name.
        queries: Queries that were measured.
        evaluations: What was measured of each ranking with seen items masked; "model" is one.
        ks: Lengths of the lists.
        keep: Function that is given the name and the cells of each slice of items.

    Returns:
        Name of the slice -> value -> "queries", the number of queries that are averaged; "model",
        its metrics of accuracy; "intervals" of them; and of the baseline whose recall at the
        shortest lists is the best of this value, "baseline_name", "baseline", "baseline_intervals"
        and "baseline_differences", the model less the baseline over the same users.
    """
    # As the lists are: right answers that are masked would count as missed.
    unseen = queries.without_seen()
    measured = {}
    for name, part in slices.items():
        if part.joins_few:
            part = _join_few(part, unseen)
        cells_of = _item_cells if part.of_items else _query_cells
        # One slice after the other: its cells hold all figures of all rankings.
        cells = cells_of(part, unseen, evaluations, sorted(ks))
        measured[name] = _measure_slice(cells, unseen, min(ks))
        if keep is not None and part.of_items:
            keep(name, cells)
    return measured


def label_queries(slices: Mapping[str, Slice], queries: Queries) -> dict[str, list[str]]:
    """Returns the value of each query by the name of a slice; "" of one that is in none.

    Slices of items are left out, as they divide the right answers of a query, of which one figure
    is recorded; and so are those that put a query into several values.

    Args:
        slices: Slices by name.
        queries: Queries that were measured.
    """
    unseen = queries.without_seen()
    labels = {}
    for name, part in slices.items():
        if part.of_items or part.groups.lengths.max(initial=0) > 1:
            continue
        # As they are measured: values of few queries tell nothing apart in a comparison either.
        if part.joins_few:
            part = _join_few(part, unseen)
        values = np.full(len(queries), "", object)
        values[part.groups.rows] = np.array(part.values, object)[part.groups.values]
        labels[name] = values.tolist()
    return labels


def _measure_slice(found: Cells, queries: Queries, k: int) -> dict[str, Any]:
    """Measures each value of a slice, beside the baseline that is best in lists of length k."""
    # Chance and the truth are no systems that anybody could serve instead.
    rivals = [name for name in found.values if name != "model" and name not in NO_RIVALS]
    best_by = f"recall@{k}"
    measured: dict[str, Any] = {}
    for number, value in enumerate(found.slice.values):
        rows = np.flatnonzero((found.group == number) & (found.num_relevant > 0))
        # A value that no query asks for has no mean.
        if not len(rows):
            continue
        means = {
            ranking: {name: float(column[rows].mean()) for name, column in columns.items()}
            for ranking, columns in found.values.items()
        }
        shown = ["model"]
        if rivals:
            shown.append(max(rivals, key=lambda name, means=means: means[name][best_by]))
        columns = {
            ranking: {name: column[rows] for name, column in found.values[ranking].items()}
            for ranking in shown
        }
        # Users are drawn, not queries: those of one user are not independent.
        intervals, differences = paired_intervals(
            columns, queries.user[found.query[rows]], np.ones(len(rows), bool), first="model"
        )
        measured[value] = {
            "queries": len(rows),
            "model": means["model"],
            "intervals": intervals["model"],
        }
        for best in shown[1:]:
            measured[value] |= {
                "baseline_name": best,
                "baseline": means[best],
                "baseline_intervals": intervals[best],
                "baseline_differences": differences[best],
            }
    return measured


def _query_cells(
    part: Slice, queries: Queries, evaluations: Mapping[str, Evaluation], ks: Sequence[int]
) -> Cells:
    """Returns the cells of a slice of queries, with the figures that the queries have."""
    del ks  # those of the evaluations
    query = part.groups.rows
    values = {}
    for ranking, evaluation in evaluations.items():
        columns = {}
        for name, column in evaluation.values.items():
            if name.partition("@")[0] in RANKING_METRICS:
                columns[name] = column[query]
        values[ranking] = columns
    return Cells(part, query, part.groups.values, queries.num_relevant[query], values)


def _item_cells(
    part: Slice, queries: Queries, evaluations: Mapping[str, Evaluation], ks: Sequence[int]
) -> Cells:
    """Returns the cells of a slice of items, measured by their own right answers."""
    num_groups = len(part.values)

    def keys_of(query: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a number for each query and value of pairs, and the pair that it is of."""
        groups = part.groups.take(item)
        pair = groups.rows
        return query[pair].astype(np.int64) * num_groups + groups.values, pair

    relevant = queries.relevant
    keys, _ = keys_of(relevant.rows, relevant.values)
    cells, num_relevant = np.unique(keys, return_counts=True)
    values = {}
    for ranking, evaluation in evaluations.items():
        hits = evaluation.hits
        keys, pair = keys_of(hits.query, hits.item)
        # The hits of a cell lie together, best first.
        order = np.argsort(keys, kind="stable")
        # Every hit is a right answer, so that its cell is among them.
        cell = np.searchsorted(cells, keys[order])
        values[ranking] = hit_figures(cell, hits.rank[pair[order]], num_relevant, ks)
    return Cells(part, cells // num_groups, cells % num_groups, num_relevant, values)


def _join_few(part: Slice, queries: Queries) -> Slice:
    """Joins the values with few queries to one, and puts those of most queries first."""
    pairs = part.groups
    # A query counts once for a category, however many of its answers are of it.
    if part.of_items:
        of_answers = part.groups.take(queries.relevant.values)
        query = queries.relevant.rows[of_answers.rows]
        pairs = Ragged.from_pairs(query, of_answers.values, num_rows=len(queries)).distinct()
    # Queries without an answer are averaged in no slice.
    is_counted = queries.num_relevant[pairs.rows] > 0
    counts = np.bincount(pairs.values[is_counted], minlength=len(part.values))
    order = np.argsort(-counts, kind="stable")
    is_kept = counts[order] >= MIN_QUERIES
    is_kept[MAX_VALUES:] = False
    kept = order[is_kept]
    joined = order[~is_kept & (counts[order] > 0)]
    # One alone is no more telling under another name.
    if len(joined) == 1:
        kept = np.append(kept, joined)
        joined = joined[:0]
    # Values that no query asks for stay -1, and are in no slice.
    numbers = np.full(len(part.values), -1)
    numbers[kept] = np.arange(len(kept))
    names = [part.values[number] for number in kept.tolist()]
    if len(joined):
        numbers[joined] = len(names)
        names.append(f"other ({len(joined):,} values)")
    number = numbers[part.groups.values]
    is_named = number >= 0
    rows = part.groups.rows[is_named]
    groups = Ragged.from_pairs(rows, number[is_named], num_rows=len(part.groups))
    return dataclasses.replace(part, values=names, groups=groups.distinct())


def _find_column(tables: Mapping[str, pa.Table], name: str) -> tuple[str, str]:
    """Returns the table and the column that a name of a slice means."""
    known = []
    for table, rows in tables.items():
        prefix, _, column = name.partition(".")
        if prefix == table and column in rows.column_names:
            return table, column
        known += [f"{table}.{column}" for column in rows.column_names]
    for table, rows in tables.items():
        if name in rows.column_names:
            return table, name
    hint = did_you_mean(name, known)
    raise ConfigError(f"--slices={name} is no column{hint} Known: {', '.join(known)}.")


def _slice_by_values(column: pa.ChunkedArray, separator: str, *, of_items: bool) -> Slice:
    """Returns the slice of the values of a column, one for each query or each item."""
    count = len(column)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    # A year or a rating of few values is told apart by its values.
    if is_number and len(pc.unique(column.drop_null())) > MAX_VALUES:
        names, number = _buckets(column.to_numpy())
        return Slice(names, _singles(number), of_items=of_items)
    column = plain_text(column)
    if separator and pa.types.is_string(column.type):
        column = pc.split_pattern(column, separator)
    if is_list(column.type):
        # A list that is missing or empty has no member, and is put back below.
        rows = pc.list_parent_indices(column).to_numpy()
        members = pc.list_flatten(column)
    else:
        rows = np.arange(count)
        members = column
    texts = pc.fill_null(pc.cast(members, pa.string()), MISSING)
    coded = pc.dictionary_encode(texts).combine_chunks()
    names = coded.dictionary.to_pylist()
    number = coded.indices.to_numpy(zero_copy_only=False)
    # Every query is in some value, or the values would not add up to the whole.
    without = np.setdiff1d(np.arange(count), rows)
    if len(without):
        if MISSING not in names:
            names.append(MISSING)
        rows = np.concatenate([rows, without])
        number = np.concatenate([number, np.full(len(without), names.index(MISSING))])
    groups = Ragged.from_pairs(rows, number, num_rows=count).distinct()
    return Slice(names, groups, of_items=of_items, joins_few=True)


def _buckets(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Returns the names of the quantiles of numbers, and the quantile of each, int [N]."""
    is_known = ~np.isnan(values)
    known = np.sort(values[is_known])
    # Numbers rather than shares of rows, so that equal numbers share a bucket.
    starts = np.unique(known[np.arange(NUM_BUCKETS) * len(known) // NUM_BUCKETS])
    number = np.searchsorted(starts, values, side="right") - 1
    names = []
    for bucket in range(len(starts)):
        inside = values[is_known & (number == bucket)]
        names.append(f"{inside.min():g} to {inside.max():g}")
    if not is_known.all():
        number[~is_known] = len(names)
        names.append(MISSING)
    return names, number


def _singles(number: np.ndarray) -> Ragged:
    """Returns one number a list."""
    return Ragged(np.arange(len(number) + 1), number.astype(np.int32))
