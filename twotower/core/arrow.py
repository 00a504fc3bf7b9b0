"""Arrow's compute functions under a name that type checkers accept, its types of lists, its units
of times, and a digest of rows."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

# PyArrow makes these functions when it is imported. No type checker sees them in its source, so
# they come through this one name.
pc: Any = pyarrow.compute

# Integers, so that nanoseconds are divided without rounding.
UNITS_PER_SECOND: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a type is one of Arrow's three types of lists."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def fingerprint(rows: pa.Table) -> str:
    """Returns a hex digest of the ids and timestamps of the rows, in order.

    It does not depend on how the columns are cut into chunks.
    """
    digest = hashlib.sha256()
    for name in ("user_id", "item_id", "timestamp"):
        if name in rows.column_names:
            # Name and length apart the columns, whose bytes follow each other without a separator.
            digest.update(f"{name} {rows.num_rows} ".encode())
            for part in _column_bytes(rows[name]):
                digest.update(part.data)
    # 64 bits are enough to notice a change; it is not a signature.
    return digest.hexdigest()[:16]


def _column_bytes(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Returns the values of a column of text or integers as arrays of bytes.

    Reading Arrow's buffers avoids one Python object a value.
    """
    if not pa.types.is_string(column.type):
        # Null as a value that no timestamp has.
        smallest = np.iinfo(np.int64).min
        return [np.asarray(pc.fill_null(column.cast(pa.int64()), smallest))]
    # Lengths go before the text, so that ("ab", "c") differs from ("a", "bc"); null has -1.
    lengths = np.asarray(pc.fill_null(pc.binary_length(column), -1), np.int32)
    return [lengths, *(_text_bytes(chunk.drop_null()) for chunk in column.chunks)]


def _text_bytes(values: pa.StringArray) -> np.ndarray:
    _, offsets, text = values.buffers()
    if not len(values) or offsets is None or text is None:
        return np.zeros(0, np.uint8)
    # A chunk may be a slice: its offsets start in the middle of shared buffers.
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return np.frombuffer(text, np.uint8)[ends[0] : ends[-1]]
