"""Values of any library as those of Arrow and NumPy.

Arrow's compute functions under a name that type checkers accept, its types of lists, its text as
bytes, conversions that name the row that they refuse, a digest of rows, and memory that was freed.
"""

from __future__ import annotations

import ctypes
import decimal
import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute

from twotower.core.errors import ConfigError, TwotowerError, echo

# PyArrow makes these functions when it is imported. No type checker sees them in its source, so
# they come through this one name.
pc: Any = pyarrow.compute

# Bytes of a string array, whose offsets are 32 bits.
LARGEST_TEXT = 2**31 - 1
# Coded rows whose text is made at once.
_BLOCK = 2**20

Convert = Callable[[pa.ChunkedArray], pa.ChunkedArray]


class BadValue(TwotowerError, ValueError):
    """A value, or a whole column, that is not what its use says.

    Attributes:
        value: Value as it was read; None where the problem is that of the whole column.
        problem: What is wrong with it, and the way out, as in "is not a number".
        row: Row of the column, from 0; None for a single value or a whole column.
    """

    def __init__(self, value: object, problem: str, row: int | None = None):
        shown = "it" if value is None else echo(value)
        super().__init__(f"{shown} {problem}.")
        self.value = value
        self.problem = problem
        self.row = row


@runtime_checkable
class ArrowStream(Protocol):
    """A table that hands its rows over by Arrow's PyCapsule interface.

    Frames of pandas (2.2 and later) and polars, tables of Arrow and relations of DuckDB do.
    """

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


def int_array(values: np.ndarray) -> pa.Int64Array:
    """Returns integers as an Arrow array without nulls.

    `pa.array` takes several times as long for few of them, and loads pandas at its first call.
    """
    values = np.ascontiguousarray(values, np.int64)
    return pa.Int64Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def is_table(rows: object) -> bool:
    """Returns whether an object is a table of any library, and not a single column."""
    # As `isinstance(rows, ArrowStream)`, which takes tens of microseconds of a request.
    return hasattr(rows, "__arrow_c_stream__") and hasattr(rows, "columns")


def table_of(source: ArrowStream) -> pa.Table:
    """Returns a table of any library as one of Arrow, texts and categories as plain text.

    Raises:
        BadValue: A column has values of several types, or two columns have one name.
    """
    try:
        table = pa.table(source)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        reason = " ".join(map(str, error.args))
        problem = (
            f"a column has values of several types ({reason}). Make it one type, such as text: "
            "frame['COLUMN'] = frame['COLUMN'].astype('string')"
        )
        raise BadValue(None, problem) from None
    # The index of a pandas frame that has no name holds nothing but row numbers.
    index = [column for column in table.column_names if column.startswith("__index_level_")]
    table = table.drop_columns(index).replace_schema_metadata()
    plain = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in plain:
            raise BadValue(None, f"two columns have the name {name!r}: rename or drop one")
        chunks = [_plain_types(chunk) for chunk in column.chunks]
        # Without a chunk there is nothing that could be of a wrong type.
        plain[name] = pa.chunked_array(chunks) if chunks else column
    return pa.table(plain)


def _plain_types(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return array.cast(pa.string())
    if isinstance(array, pa.DictionaryArray):
        return _plain_types(array.dictionary).take(array.indices)
    if isinstance(array, (pa.ListArray, pa.LargeListArray)):
        members = _plain_types(array.values)
        return type(array).from_arrays(array.offsets, members, mask=array.is_null())
    if isinstance(array, pa.StructArray):
        fields = [_plain_types(array.field(i)) for i in range(kind.num_fields)]
        names = [field.name for field in kind]
        return pa.StructArray.from_arrays(fields, names, mask=array.is_null())
    return array


def texts_reader(
    array: pa.StringArray | pa.LargeStringArray,
) -> Callable[[Sequence[int]], list[str]]:
    """Returns a function from rows to their texts, read from the array's buffers.

    A few texts take a fraction of the time that Arrow's scalars take; null is read as "".
    """
    # Buffers: which values are null, the offset of each text, and all texts one after another.
    _, offsets, text = array.buffers()
    # Offsets of a large_string have 64 bits.
    width = "i" if pa.types.is_string(array.type) else "q"
    # The buffers of a slice begin before it.
    bounds = memoryview(offsets or b"").cast("B").cast(width)[array.offset :]
    # An array of empty texts has no buffer of them.
    data = memoryview(text or b"")
    return lambda rows: [str(data[bounds[row] : bounds[row + 1]], "utf-8") for row in rows]


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a type is one of Arrow's three types of lists."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_missing(value: object) -> bool:
    """Returns whether a single value is None, NaN, or what pandas writes for one that is missing.

    >>> is_missing(None), is_missing(float("nan")), is_missing(0)
    (True, True, False)
    """
    # By name, since pandas need not be installed; its NA compares with nothing.
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    # NaN of any type, decimals too, and NumPy's NaT differ from themselves.
    if not np.isscalar(value) and not isinstance(value, decimal.Decimal):
        return False
    return bool(value != value)


def plain_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns text of any of Arrow's types, categories too, as plain text; others as they are."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        # Chunk by chunk: dictionaries of several files have different codes for one value.
        # By blocks: the text of a long log may not fit one array.
        chunks = []
        for chunk in column.chunks:
            starts = range(0, max(1, len(chunk)), _BLOCK)
            chunks += [_dictionary_values(chunk.slice(start, _BLOCK)) for start in starts]
        return pa.chunked_array(chunks) if chunks else column.cast(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    return column


def _dictionary_values(chunk: pa.DictionaryArray) -> pa.Array:
    values = chunk.dictionary
    # Arrow cannot take from views, which frames of polars have.
    if pa.types.is_string_view(values.type) or pa.types.is_large_string(values.type):
        values = values.cast(pa.string())
    return values.take(chunk.indices)


def join_chunks(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array; text that a string array cannot hold is a large string."""
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_string(column.type):
        total = sum(len(text_bytes(chunk)[0]) for chunk in column.chunks)
        if total > LARGEST_TEXT:
            column = column.cast(pa.large_string())
    return column.combine_chunks()


def convert_rows(column: pa.ChunkedArray, convert: Convert, problem: str) -> pa.ChunkedArray:
    """Converts a column, or names the first row at which that fails.

    The row is found by halving: Arrow's messages do not say which it was.

    Args:
        column: Values.
        convert: Conversion of each value by itself, which raises pa.ArrowInvalid.
        problem: Words for a value that cannot be converted, such as "is not a number".

    Raises:
        BadValue: A value cannot be converted.
    """
    try:
        return convert(column)
    except pa.ArrowInvalid:
        pass
    # About twenty conversions for a million rows; row by row it would be a million.
    low = 0
    high = len(column)
    # Rows before `low` convert, and those before `high` do not.
    while high - low > 1:
        middle = (low + high) // 2
        try:
            convert(column.slice(low, middle - low))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    raise BadValue(column[low].as_py(), problem, low)


def read_value(convert: Callable[[Any], Any], value: Any, location: str) -> Any:
    """Returns a single value converted, or refuses it with its place."""
    try:
        return convert(value)
    except BadValue as error:
        raise ConfigError(f"{location}: {echo(value)} {error.problem}.") from None


def members_of(values: Any, what: str) -> Iterable[Any]:
    """Returns the members of a list of a caller.

    Raises:
        ConfigError: A single value, whose letters or keys would be taken for members.
    """
    if is_table(values):
        try:
            table = table_of(values)
        except BadValue as error:
            raise ConfigError(f"{what}: {error.problem}.") from None
        if table.num_columns != 1:
            raise ConfigError(
                f"{what} is a table with the columns {', '.join(table.column_names)}: give the one "
                "of the ids."
            )
        values = table[0]
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values.to_pylist()
    is_single = isinstance(values, (str, bytes, bytearray, memoryview, Mapping))
    if is_single or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise ConfigError(
            f"{what}={echo(values)} must be a list, not of type {type(values).__name__!r}: write "
            f"[{echo(values)}] for one."
        )
    return values


def as_matrix(values: object) -> np.ndarray:
    """Returns vectors of any library as contiguous float32 [N, D].

    Args:
        values: Array of NumPy or JAX, frame of numbers, lists of numbers, or a column of lists.

    Raises:
        ValueError: They are no numbers, or rows differ in width.
    """
    # Columns of lists have one object a row for NumPy.
    to_list = getattr(values, "to_pylist", None) or getattr(values, "to_list", None)
    if to_list is not None and not isinstance(values, np.ndarray):
        values = to_list()
    array = np.asarray(values)
    # Text that NumPy would parse, and complex numbers of which it would drop a half.
    if array.dtype.kind not in "fiuO" and array.size:
        raise ValueError(f"values of type {array.dtype} are no numbers")
    try:
        # What float32 cannot hold becomes infinite, which whoever needs finite vectors refuses.
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, np.float32)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


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


def _column_bytes(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Yields the values of a column of text or integers as arrays of bytes.

    Reading Arrow's buffers avoids one Python object a value.
    """
    if pa.types.is_dictionary(column.type):
        yield from _decoded_bytes(column)
        return
    if not pa.types.is_string(column.type):
        # Null as a value that no timestamp has.
        smallest = np.iinfo(np.int64).min
        # Chunk by chunk: those of a file are read when they are asked for.
        for chunk in column.chunks:
            yield np.asarray(pc.fill_null(chunk.cast(pa.int64()), smallest))
        return
    # Lengths go before the text, so that ("ab", "c") differs from ("a", "bc"); null has -1.
    yield np.asarray(pc.fill_null(pc.binary_length(column), -1), np.int32)
    for chunk in column.chunks:
        yield text_bytes(chunk.drop_null())[0]


def _decoded_bytes(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Yields the bytes of a column of codes as those of the text that they stand for."""
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
        yield np.asarray(pc.fill_null(lengths, -1), np.int32)
    for chunk in column.chunks:
        # By blocks: the text of a long log may not fit one array.
        for start in range(0, len(chunk), _BLOCK):
            block = chunk.slice(start, _BLOCK)
            texts = block.dictionary.take(block.indices.drop_null())
            yield text_bytes(texts)[0]


def text_bytes(values: pa.StringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the text of an array as bytes, without a Python object a value.

    Returns:
        The UTF-8 bytes of all values, uint8 [bytes], the first byte of each, int32 [N], and the
        number of bytes of each, int32 [N]. Nulls have none.
    """
    if values.null_count:
        values = values.fill_null("")
    _, offsets, text = values.buffers()
    if not len(values) or offsets is None or text is None:
        nothing = np.zeros(len(values), np.int32)
        return np.zeros(0, np.uint8), nothing, nothing
    # A chunk may be a slice: its offsets start in the middle of shared buffers.
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(text, np.uint8)[ends[0] : ends[-1]]
    starts = ends[:-1] - ends[0]
    return data, starts, np.diff(ends)


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, once a work that needed far more is done.

    A training keeps what is freed for the next step (`twotower.runtime.keep_freed_memory`), and
    would stay as large as the preparation of its log was, with its own memory on top.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    # Arrow has an allocator of its own.
    pa.default_memory_pool().release_unused()
