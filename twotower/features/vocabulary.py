"""Strings <-> rows of an embedding table: 0 is padding, then hashed out-of-vocabulary rows, then
the known values."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, UInt64

from twotower.core.arrow import pc
from twotower.core.hashing import mix64

# Strings are hashed in blocks of about this many bytes, so that the temporary arrays stay within
# tens of megabytes.
_BLOCK_BYTES = 1 << 20


def as_strings(values: pa.Array | pa.ChunkedArray) -> pa.LargeStringArray:
    """One array of text, whatever `values` held: 42 becomes "42", nulls stay.

    Raises:
        ValueError: the values have no text form (lists, structs).
    """
    if isinstance(values, pa.ChunkedArray):
        if values.num_chunks == 1:
            return as_strings(values.chunk(0))
        chunks = [as_strings(chunk) for chunk in values.chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
    if pa.types.is_dictionary(values.type):
        return as_strings(values.dictionary).take(values.indices)
    try:
        return values.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"values of type {values.type} are not single strings or numbers ({error})"
        ) from None


def utf8(values: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes uint8 [bytes] of all strings, and the offsets int64 [N + 1] at which each starts; a
    null is empty."""
    offsets = (
        np.frombuffer(values.buffers()[1], np.int64, len(values) + 1, values.offset * 8)
        if len(values)
        else np.zeros(1, np.int64)
    )
    buffer = values.buffers()[2]
    data = np.zeros(0, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of `values[offsets[i]:offsets[i + 1]]`, modulo 2^64 for uint64; an empty segment is
    0."""
    total = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values, dtype=values.dtype)])
    return total[offsets[1:]] - total[offsets[:-1]]


def hash64(values: pa.LargeStringArray) -> UInt64[np.ndarray, " N"]:
    """A 64-bit hash of each string's UTF-8 bytes, uint64 [N]: the same in every process and on
    every machine.

    It is tabulation hashing: the sum of a pseudo-random word for each (position, byte), mixed once
    more. Only whole-array operations, and no secret seed as Python's `hash` has.
    """
    data, offsets = utf8(values)
    edges = np.searchsorted(
        offsets, np.arange(0, offsets[-1] + _BLOCK_BYTES, _BLOCK_BYTES), side="left"
    )
    edges = np.unique(np.concatenate([[0], np.minimum(edges, len(values)), [len(values)]]))
    blocks = [
        _hash_block(data, offsets[low : high + 1])
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.uint64)


def _hash_block(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    lengths = np.diff(offsets)
    position = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], lengths)
    words = mix64((position << 8 | data[offsets[0] : offsets[-1]]).astype(np.uint64))
    return mix64(segment_sums(words, offsets - offsets[0]) + lengths.astype(np.uint64))


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Rows of a table by value: 0 for null (padding), 1 to `oov_rows` for unknown values by hash,
    then the known ones.

    Attributes:
        values: the known values, unique, in the order of their rows.
        oov_rows: how many rows the unknown values are spread over.
    """

    values: pa.LargeStringArray
    oov_rows: int = 1

    def __post_init__(self):
        if self.oov_rows < 1:
            raise ValueError(
                f"oov_rows={self.oov_rows} must be at least 1: an unknown value needs a row."
            )
        # Hashes that all differ prove that the values do, in less time than counting distinct
        # values takes.
        repeated = (
            0
            if self._index[2]
            else len(self.values) - pc.count_distinct(self.values, mode="all").as_py()
        )
        if repeated or self.values.null_count:
            raise ValueError(
                f"A vocabulary holds each value once and no nulls, not {repeated} repeated values "
                f"and {self.values.null_count} nulls."
            )

    @classmethod
    def fit(
        cls,
        values: pa.Array | pa.ChunkedArray,
        weights: np.ndarray | None = None,
        *,
        min_count: int = 1,
        oov_rows: int = 1,
    ) -> Vocabulary:
        """The values whose weights [N] (1 each when not given) sum to `min_count` or more, by (sum
        descending, value).

        The order depends on the values and their sums alone, never on the order of the rows.
        """
        encoded = as_strings(values).dictionary_encode()
        present = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
        rows = encoded.indices.fill_null(0).to_numpy()[present]
        kept_weights = None if weights is None else weights[present]
        counts = np.bincount(rows, kept_weights, minlength=len(encoded.dictionary))
        table = pa.table({"value": encoded.dictionary, "count": counts}).filter(
            pa.array(counts >= min_count)
        )
        order = pc.sort_indices(table, sort_keys=[("count", "descending"), ("value", "ascending")])
        return cls(values=as_strings(table["value"].take(order)), oov_rows=oov_rows)

    @property
    def first(self) -> int:
        """Row of the first known value."""
        return 1 + self.oov_rows

    @property
    def size(self) -> int:
        """Rows V of the table."""
        return self.first + len(self.values)

    def rows(self, values: pa.Array | pa.ChunkedArray) -> Int32[np.ndarray, " N"]:
        """The row of each value, int32 [N]: 0 for null, a hashed out-of-vocabulary row for an
        unknown value."""
        if pa.types.is_dictionary(values.type):
            return self._rows_of_dictionary(values)
        values = as_strings(values)
        found = self._find(values)
        rows = (found + self.first).astype(np.int32)
        unknown = np.flatnonzero(found < 0)
        rows[unknown] = self._oov(values.take(pa.array(unknown))) if len(unknown) else 0
        return rows

    def _rows_of_dictionary(self, values: pa.DictionaryArray | pa.ChunkedArray) -> np.ndarray:
        if isinstance(values, pa.ChunkedArray):
            values = values.unify_dictionaries().combine_chunks()
        rows = np.append(self.rows(values.dictionary), np.int32(0))
        return rows[values.indices.fill_null(len(values.dictionary)).to_numpy()]

    def _oov(self, values: pa.LargeStringArray) -> np.ndarray:
        rows = 1 + (hash64(values) % np.uint64(self.oov_rows)).astype(np.int32)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), 0, rows)

    def _find(self, values: pa.LargeStringArray) -> np.ndarray:
        """Position of each value among the known ones, int64 [N], or -1."""
        # index_in hashes the whole vocabulary on every call: right for a column, a second too long
        # for one query.
        if len(values) * 16 > len(self.values) or not self._index[2]:
            found = pc.index_in(values, value_set=self.values, skip_nulls=True)
            return found.fill_null(-1).to_numpy().astype(np.int64)
        hashes, order, _ = self._index
        place = np.minimum(np.searchsorted(hashes, hash64(values)), len(order) - 1)
        same = pc.equal(self.values.take(pa.array(order[place])), values).fill_null(False)
        return np.where(same.to_numpy(zero_copy_only=False), order[place], -1)

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Sorted hashes, the positions they belong to, and whether all hashes differ (else they are
        of no use)."""
        hashes = hash64(self.values)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order.astype(np.int32), bool(np.all(np.diff(hashes[order])))

    def arrays(self) -> dict[str, np.ndarray]:
        """The values as plain arrays: their UTF-8 bytes and offsets."""
        data, offsets = utf8(self.values)
        return {"bytes": data, "offsets": offsets}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], *, oov_rows: int) -> Vocabulary:
        """The vocabulary whose `arrays()` these are.

        Raises:
            ValueError: the arrays are not the bytes and offsets of UTF-8 strings.
        """
        offsets = np.ascontiguousarray(arrays["offsets"], np.int64)
        data = np.ascontiguousarray(arrays["bytes"], np.uint8)
        values = pa.LargeStringArray.from_buffers(
            len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data)
        )
        values.validate(full=True)
        return cls(values=values, oov_rows=oov_rows)
