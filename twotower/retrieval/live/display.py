"""Single values of display columns, read from Arrow's buffers: several times as fast as through its
scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa


def reader(column: pa.ChunkedArray) -> Callable[[int], Any]:
    """row -> the value as `column[row].as_py()` gives it.

    >>> read = reader(pa.chunked_array([["a", None, "été"]]))
    >>> [read(row) for row in range(3)]
    ['a', None, 'été']
    """
    array = (
        column.chunk(0)
        if column.num_chunks == 1
        else pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    )
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        read = _text(array)
    elif (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not array.null_count:
        return array.to_numpy().item
    else:
        return lambda row: array[row].as_py()
    if not array.null_count:
        return read
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda row: read(row) if valid[row] else None


def _text(array: pa.Array) -> Callable[[int], str]:
    _, bounds, data = array.buffers()
    starts = (
        memoryview(bounds)
        .cast("B")
        .cast("i" if pa.types.is_string(array.type) else "q")[array.offset :]
    )
    data = memoryview(b"" if data is None else data)
    return lambda row: str(data[starts[row] : starts[row + 1]], "utf-8")
