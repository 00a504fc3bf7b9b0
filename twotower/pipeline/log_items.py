"""Items that are described by the rows of the log: one row an item, made of training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from twotower.core.arrow import is_list, pc
from twotower.data.dataset import Dataset, collapse
from twotower.data.interactions import Split, codes, timestamps

# Share of the items with several rows from which on a column that differs within them is no
# attribute of an item: names change now and then, buyers and order numbers with every row.
VARYING = 0.2
# Columns of a log that describe its events.
OF_EVENTS = ("user_id", "timestamp", "event", "weight", "rating", "label", "split")


def with_items_of_log(dataset: Dataset, parts: Split, wanted: Collection[str]) -> Dataset:
    """Returns a dataset whose items are described by its training rows.

    Args:
        dataset: The log. Its items are returned as they are unless they come from the rows of the
            log.
        parts: Parts of the log.
        wanted: Columns that something reads, kept though they differ within items.
    """
    rows = dataset.log_items
    # Without positions nothing tells which rows of the file are training's.
    if rows is None or parts.file_positions is None:
        return dataset
    positions = dataset.log_positions[parts.file_positions[0]]
    # Training rows of another file describe no item.
    is_described = positions >= 0
    times = timestamps(parts.train)
    if times is not None:
        times = times[is_described]
    described = rows.take(pa.array(positions[is_described]))
    items, varying = items_of_rows(described, times, wanted=wanted)
    return dataclasses.replace(
        dataset,
        items=items,
        has_catalogue=False,
        notes=(*dataset.notes, *describe_varying(varying, items.column_names)),
    )


def items_of_rows(
    rows: pa.Table, times: np.ndarray | None, *, wanted: Collection[str] = ()
) -> tuple[pa.Table, dict[str, float]]:
    """Returns one row for each item, with the latest value of each column.

    Columns of events, and those that differ within many items, are left out unless they are wanted.

    Args:
        rows: item_id and further columns, a row for each event.
        times: Time of each row, int64 [N]; None for the order of the rows.
        wanted: Columns to keep in any case.

    Returns:
        The items in order of first appearance, and for each column that differs within some items
        the share of them, from 0 to 1, among the items with several rows.
    """
    item = codes(rows["item_id"])
    varying = {}
    kept = ["item_id"]
    for name in rows.column_names:
        if name == "item_id" or (name in OF_EVENTS and name not in wanted):
            continue
        share = _share_varying(item, rows[name])
        if share:
            varying[name] = share
        if share < VARYING or name in wanted:
            kept.append(name)
    order = np.arange(len(rows))
    if times is not None:
        # Stable: rows of one second stay in the order of the file.
        order = np.argsort(times, kind="stable")
    # Of the values of a key the first is taken: the latest, backwards.
    latest = collapse(rows.select(kept).take(pa.array(order[::-1])), "item_id")
    # The order of first appearance, which taking the latest rows first has turned around.
    ids = pc.unique(rows["item_id"])
    return latest.take(pc.index_in(ids, value_set=latest["item_id"])), varying


def describe_varying(varying: Mapping[str, float], kept: Collection[str]) -> list[str]:
    """Returns sentences on columns that differ within items.

    Args:
        varying: Share of the items within which each column differs.
        kept: Columns of the items.
    """
    left_out = []
    latest = []
    for name, share in varying.items():
        words = f"{name!r} (in {share:.0%} of them)"
        if name in kept:
            latest.append(words)
        else:
            left_out.append(words)
    sentences = []
    if latest:
        sentences.append(
            f"Items of the log have the latest value of columns that differ: {', '.join(latest)}."
        )
    if left_out:
        sentences.append(
            f"Items of the log are without columns that differ: {', '.join(left_out)}; one that a "
            "feature reads, or that config.retrieval.display names, is kept."
        )
    return sentences


def _share_varying(item: np.ndarray, column: pa.ChunkedArray) -> float:
    """Returns the share of the items with several rows in which a column has several values."""
    if is_list(column.type) or pa.types.is_nested(column.type):
        return 0.0
    # A gap is no other value: it is filled from another row of the item.
    is_valid = np.asarray(pc.is_valid(column))
    item = item[is_valid]
    rows_of_item = np.bincount(item)
    value = codes(column.drop_null())
    if not len(value):
        return 0.0
    pairs = np.sort(item * (value.max() + 1) + value)
    is_first = np.append(True, pairs[1:] != pairs[:-1])
    values_of_item = np.bincount(pairs[is_first] // (value.max() + 1))
    has_several = rows_of_item > 1
    if not has_several.any():
        return 0.0
    return float((values_of_item[has_several] > 1).mean())
