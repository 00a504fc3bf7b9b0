"""Distinct ids and their codes, in buckets by their hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from twotower.core.arrow import join_chunks, pc
from twotower.features.vocabulary import hash64, mix64
from twotower.pipeline.engines.reading.columns import Columns

# Column of an id -> its name in a table of the database.
COLUMNS = {"user_id": "u", "item_id": "i"}


def plain_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns ids in a type by which they can be grouped: UUIDs are bytes there."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def typed_ids(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Returns ids that `plain_ids` gave another type as those of their own."""
    if not isinstance(kind, pa.BaseExtensionType):
        return column
    chunks = [pa.ExtensionArray.from_storage(kind, chunk) for chunk in column.chunks]
    return pa.chunked_array(chunks, kind)


def first_positions(ids: pa.ChunkedArray, positions: np.ndarray) -> pa.Table:
    """Returns distinct ids, without null, and the first position of each: columns id and first."""
    return _earliest(pa.table({"id": plain_ids(ids), "first": positions}).drop_null())


def merge(tables: Iterable[pa.Table]) -> pa.Table:
    """Returns the ids of several tables of `first_positions` as one."""
    return _earliest(pa.concat_tables(tables))


def _earliest(table: pa.Table) -> pa.Table:
    grouped = table.group_by("id", use_threads=False).aggregate([("first", "min")])
    return grouped.rename_columns(["id", "first"])


def split_by_hash(table: pa.Table, column: str, buckets: int) -> Iterator[tuple[int, pa.Table]]:
    """Yields the rows of each bucket, by the hash of a column; null is in the first.

    Args:
        table: Rows.
        column: Column of ids, as `plain_ids` returns them.
        buckets: Number of buckets; those without rows are left out.
    """
    if buckets == 1:
        yield 0, table
        return
    bucket = (_hash(table[column]) % np.uint64(buckets)).astype(np.int32)
    order = np.argsort(bucket, kind="stable")
    rows = table.take(pa.array(order))
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    first = 0
    for number, end in enumerate(ends.tolist()):
        if end > first:
            yield number, rows.slice(first, end - first)
        first = end


def _hash(ids: pa.ChunkedArray) -> np.ndarray:
    """Returns a hash of each id, uint64 [N], the same on every machine."""
    values = join_chunks(ids)
    if pa.types.is_integer(values.type):
        return mix64(np.asarray(pc.fill_null(values, 0)).astype(np.uint64))
    if pa.types.is_fixed_size_binary(values.type):
        # The bytes of UUIDs are no text, and are hashed as if they were.
        texts = values.cast(pa.large_binary()).fill_null(b"").view(pa.large_string())
    else:
        texts = pc.fill_null(values.cast(pa.large_string()), "")
    return hash64(texts)


def join_codes(rows: pa.Table, column: str, codes: pa.Table) -> pa.Table:
    """Returns rows with codes in the place of ids; -1 where an id is missing.

    Args:
        rows: Rows.
        column: Column of ids, as `plain_ids` returns them.
        codes: Columns id and code, with all ids of the rows.
    """
    index = pc.index_in(rows[column], value_set=join_chunks(codes["id"]))
    found = join_chunks(codes["code"]).take(join_chunks(index))
    return rows.set_column(rows.column_names.index(column), column, pc.fill_null(found, -1))


def coded_later(rows: pa.Table, columns: Columns, failed: np.ndarray) -> pa.Table:
    """Returns rows as those of the table `log`, but for positions, and with ids.

    Args:
        rows: Rows under our names.
        columns: Their columns.
        failed: Number of the first condition that each row fails, int16 [N].
    """
    table = {column: plain_ids(rows[key]) for key, column in COLUMNS.items()}
    table |= {column: rows[name] for name, column in columns.names.items()}
    return pa.table(table | {"failed": failed})
