"""Ids of a long log as codes of a dictionary: each distinct id is held, hashed and looked up once.

A coded column has one dictionary for all of its rows. The functions take any other column too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import index_type
from twotower.core.arrow import join_chunks, pc

# Numbers that a table may always hold, of 4 MiB.
_SMALL_TABLE = 2**20


def encode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column as codes of its distinct values, in order of first appearance; null is null.

    A column of codes is returned as it is.
    """
    if pa.types.is_dictionary(column.type):
        return column
    coded = _encode_digits(column)
    if coded is None:
        coded = _one_chunk(column.dictionary_encode())
    return coded


def encode_columns(table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """Returns a table with some of its columns as codes, each of another value."""
    for name in names:
        position = table.column_names.index(name)
        column = table[name]
        # Codes of somebody else: one value of two codes would be two users.
        if pa.types.is_dictionary(column.type) and not _has_plain_dictionaries(column):
            column = column.cast(column.type.value_type)
        table = table.set_column(position, name, encode(column))
    return table


def _has_plain_dictionaries(column: pa.ChunkedArray) -> bool:
    """Returns whether the dictionaries of a column hold each value once, and no null."""
    checked: list[pa.Array] = []
    for chunk in column.chunks:
        values = chunk.dictionary
        # Chunks of one column share their dictionary nearly always.
        if any(values.equals(other) for other in checked[-1:]):
            continue
        if values.null_count or pc.count_distinct(values).as_py() < len(values):
            return False
        checked.append(values)
    return True


def codes_and_values(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Returns the code of each row, int32 [N], -1 of null, and the values by code.

    Codes of a column that comes coded may be of values that no row has.
    """
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    coded = _with_one_dictionary(encode(column))
    if not coded.num_chunks:
        return np.zeros(0, np.int32), pa.array([], coded.type.value_type)
    codes = [_codes_of_chunk(chunk) for chunk in coded.chunks]
    if len(codes) == 1:
        return codes[0], coded.chunk(0).dictionary
    return np.concatenate(codes), coded.chunk(0).dictionary


def count_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Returns the rows of null and then of each code, int64 [C + 1], and the C values by code."""
    coded = _with_one_dictionary(encode(column))
    if not coded.num_chunks:
        return np.zeros(1, np.int64), pa.array([], coded.type.value_type)
    values = coded.chunk(0).dictionary
    counts = np.zeros(len(values) + 1, np.int64)
    # Chunk by chunk: those of a file are read when they are asked for.
    for chunk in coded.chunks:
        # One more for null, whose code is -1.
        counts += np.bincount(_codes_of_chunk(chunk) + 1, minlength=len(counts))
    return counts, values


def distinct(column: pa.ChunkedArray) -> pa.Array:
    """Returns the distinct values of a column without null, in order of first appearance."""
    if not pa.types.is_dictionary(column.type):
        return pc.unique(column).drop_null()
    codes, values = codes_and_values(column)
    # One more for null, whose code is -1.
    first = _first_rows(codes, len(values) + 1)[:-1]
    order = np.argsort(first, kind="stable")
    return values.take(pa.array(order[first[order] < len(codes)]))


def count_distinct(column: pa.ChunkedArray) -> int:
    """Returns the number of distinct values without null."""
    return len(distinct(column))


def positions(column: pa.ChunkedArray, values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns the position of each row's value among others, int32 [N]; -1 where it is not there.

    Args:
        column: Values [N], coded or not.
        values: Values to look up, each once.
    """
    if isinstance(values, pa.ChunkedArray):
        values = join_chunks(values)
    if not pa.types.is_dictionary(column.type):
        return _filled(pc.index_in(column, value_set=values.cast(column.type)))
    codes, known = codes_and_values(column)
    # One more for null, whose code is -1.
    found = np.append(_filled(pc.index_in(known, value_set=values.cast(known.type))), np.int32(-1))
    return found[codes]


def _filled(numbers: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(numbers, -1)).astype(np.int32, copy=False)


def _codes_of_chunk(chunk: pa.DictionaryArray) -> np.ndarray:
    indices = chunk.indices
    if indices.null_count:
        # Signed first: categories of polars have codes without a sign.
        indices = indices.cast(pa.int32()).fill_null(-1)
    return indices.to_numpy().astype(np.int32, copy=False)


def _encode_digits(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Returns text of digits as codes; None of other text.

    Integers are hashed in half of the time of their digits.
    """
    if not pa.types.is_string(column.type) or _holds_letters(column):
        return None
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    coded = _encode_dense(numbers) or _one_chunk(numbers.dictionary_encode()).chunk(0)
    codes = _codes_of_chunk(coded)
    values = coded.dictionary.cast(pa.string())
    # Zeros, signs and spaces before a number make its text longer, never shorter.
    lengths = np.append(np.asarray(pc.binary_length(values), np.int64), 0)
    rows_of_code = np.bincount(codes + 1, minlength=len(lengths))
    if np.roll(rows_of_code, -1) @ lengths != pc.sum(pc.binary_length(column)).as_py():
        return None
    return pa.chunked_array([pa.DictionaryArray.from_arrays(coded.indices, values)])


def _holds_letters(column: pa.ChunkedArray) -> bool:
    """Returns whether any byte of the text comes after "9".

    Arrow reads "0x1F" as a number too, whose digits may be as many as the letters were.
    """
    for chunk in column.chunks:
        text = chunk.buffers()[2]
        # Those of a slice hold the bytes around it as well: its text is then hashed as it is.
        if text is not None and (np.frombuffer(text, np.uint8) > ord("9")).any():
            return True
    return False


def _encode_dense(numbers: pa.ChunkedArray) -> pa.DictionaryArray | None:
    """Returns integers as codes by a table of all numbers between the least and the greatest; None
    where these are too many, or some are missing.

    It takes a third of the time of hashing.
    """
    bounds = pc.min_max(numbers).as_py()
    if numbers.null_count or bounds["min"] is None:
        return None
    low = bounds["min"]
    span = bounds["max"] - low + 1
    if span > max(len(numbers), _SMALL_TABLE):
        return None
    offsets = (numbers.to_numpy() - low).astype(index_type(span))
    first = _first_rows(offsets, span)
    found = np.flatnonzero(first < len(offsets))
    found = found[np.argsort(first[found])]
    code_of_offset = np.empty(span, np.int32)
    code_of_offset[found] = np.arange(len(found), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(code_of_offset[offsets], pa.array(found + low))


def _first_rows(codes: np.ndarray, count: int) -> np.ndarray:
    """Returns the first row of each code, int [count]; the number of rows where there is none."""
    rows = len(codes)
    first = np.full(count, rows, index_type(rows))
    # Backwards: of several rows with one code the last write is the first row.
    first[codes[::-1]] = np.arange(rows - 1, -1, -1, dtype=index_type(rows))
    return first


def _with_one_dictionary(coded: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = coded.chunks
    # Parts of one column share their dictionary, and unifying hashes that of each chunk anew.
    if all(chunk.dictionary.equals(chunks[0].dictionary) for chunk in chunks[1:]):
        return coded
    return coded.unify_dictionaries()


def _one_chunk(coded: pa.ChunkedArray) -> pa.ChunkedArray:
    # Its chunks share one dictionary already, so that codes alone are copied.
    return pa.chunked_array([coded.combine_chunks()], coded.type)
