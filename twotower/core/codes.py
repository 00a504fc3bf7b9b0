"""Ids of a long log as codes of a dictionary: each distinct id is held, hashed and looked up once.

A coded column has one dictionary for all of its rows. The functions take any other column too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import join_chunks, pc


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
    """Returns a table with some of its columns as codes."""
    for name in names:
        position = table.column_names.index(name)
        table = table.set_column(position, name, encode(table[name]))
    return table


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


def distinct(column: pa.ChunkedArray) -> pa.Array:
    """Returns the distinct values of a column without null, in order of first appearance."""
    if not pa.types.is_dictionary(column.type):
        return pc.unique(column).drop_null()
    codes, values = codes_and_values(column)
    found = pc.unique(pa.array(codes))
    return values.take(found.filter(pc.greater_equal(found, 0)))


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
        indices = indices.fill_null(-1)
    return indices.to_numpy().astype(np.int32, copy=False)


def _encode_digits(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Returns text of digits as codes; None of other text.

    Integers are hashed in half of the time of their digits.
    """
    if not pa.types.is_string(column.type):
        return None
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    coded = _one_chunk(numbers.dictionary_encode())
    codes, integers = codes_and_values(coded)
    values = integers.cast(pa.string())
    # Zeros, signs and spaces before a number make its text longer, never shorter.
    lengths = np.asarray(pc.binary_length(values), np.int64)
    rows_of_code = np.bincount(codes[codes >= 0], minlength=len(values))
    if rows_of_code @ lengths != pc.sum(pc.binary_length(column)).as_py():
        return None
    return pa.chunked_array([pa.DictionaryArray.from_arrays(coded.chunk(0).indices, values)])


def _with_one_dictionary(coded: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = coded.chunks
    # Parts of one column share their dictionary, and unifying hashes that of each chunk anew.
    if all(chunk.dictionary.equals(chunks[0].dictionary) for chunk in chunks[1:]):
        return coded
    return coded.unify_dictionaries()


def _one_chunk(coded: pa.ChunkedArray) -> pa.ChunkedArray:
    # Its chunks share one dictionary already, so that codes alone are copied.
    return pa.chunked_array([coded.combine_chunks()], coded.type)
