"""Vocabularies of embedding tables: the rows of known strings, and hashed rows of unknown ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import mix64, mix64_int
from twotower.core.arrow import pc, texts_reader
from twotower.core.codes import codes_and_values

if TYPE_CHECKING:  # its own import takes longer than many an answer
    from jaxtyping import Int32, UInt64

# Strings are hashed in blocks of about this many bytes, so that the temporary arrays stay within
# tens of megabytes.
_BLOCK_BYTES = 1 << 20
# `index_in` hashes the whole vocabulary on every call: right for a column, a second too long for
# one query. Columns shorter than a sixteenth of the known values are looked up by hash instead, and
# so are the few values of a request.
_VALUES_PER_LOOKUP = 16
_FEW_VALUES = 1_024
# Bytes that are hashed by a table of words, of half a megabyte.
_TABLE_POSITIONS = 64
# Bytes of texts that are hashed by the table: of more, whole-array operations take less time.
_MAX_TABLE_BYTES = 256
_MASK = 2**64 - 1
_MAX_MIXED = 8  # texts whose hashes are mixed one by one
# Values from which on their hashes are written with them: to make them takes a second a million.
_STORED_HASHES = 2**20
# Known values that requests had, whose rows are kept: 150 bytes each at most, and then some text.
_MAX_RECENT = 65_536


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def as_strings(values: pa.Array | pa.ChunkedArray) -> pa.LargeStringArray:
    """Returns strings, numbers or a dictionary of these as one array of text: 42 becomes "42".

    Nulls stay null.

    Raises:
        ValueError: The values have no text form (lists, structs).
    """
    if isinstance(values, pa.ChunkedArray):
        # Without the copy of `concat_arrays`.
        if values.num_chunks == 1:
            return as_strings(values.chunk(0))
        chunks = [as_strings(chunk) for chunk in values.chunks]
        return pa.concat_arrays(chunks or [pa.array([], pa.large_string())])
    if pa.types.is_dictionary(values.type):
        # Each distinct value is converted once.
        return as_strings(values.dictionary).take(values.indices)
    try:
        # Large strings, whose offsets of 64 bits hold a column of any size in one array.
        return values.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"values of type {values.type} are not single strings or numbers ({error})"
        ) from None


def utf8(values: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the UTF-8 bytes of all strings, uint8 [bytes], and their offsets, int64 [N + 1].

    A null is empty.
    """
    if not len(values):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    # Read in place: no Python string is made of any value.
    _, offset_buffer, byte_buffer = values.buffers()
    # A slice shares the buffers of its whole: it begins 8 bytes an offset later.
    offsets = np.frombuffer(offset_buffer, np.int64, len(values) + 1, values.offset * 8)
    data = np.zeros(0, np.uint8)
    if byte_buffer is not None:
        data = np.frombuffer(byte_buffer, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns the sums of `values[offsets[i]:offsets[i + 1]]`, 0 for an empty segment.

    Sums of uint64 are modulo 2^64, so that the difference of two running sums is exact.
    """
    # `np.add.reduceat` would give an empty segment the value after it.
    running = np.cumsum(values, dtype=values.dtype)
    running = np.concatenate([np.zeros(1, values.dtype), running])
    return running[offsets[1:]] - running[offsets[:-1]]


def hash64(values: pa.LargeStringArray) -> UInt64[np.ndarray, " N"]:
    """Hashes the UTF-8 bytes of strings, the same in every process and on every machine.

    It is tabulation hashing: the sum of a pseudo-random word for each (position, byte), mixed once
    more. It needs whole-array operations alone, and has no secret seed as Python's `hash` has.
    """
    data, offsets = utf8(values)
    if offsets[-1] <= _BLOCK_BYTES:
        return _hash_block(data, offsets)
    block_starts = np.arange(0, offsets[-1] + _BLOCK_BYTES, _BLOCK_BYTES)
    edges = np.minimum(np.searchsorted(offsets, block_starts, side="left"), len(values))
    # A string longer than a block makes two edges fall together.
    edges = np.unique([0, *edges, len(values)])
    blocks = [
        _hash_block(data, offsets[low : high + 1])
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    return np.concatenate(blocks or [np.zeros(0, np.uint64)])


def hash_texts(texts: Sequence[str]) -> UInt64[np.ndarray, " N"]:
    """Returns the hashes of a few texts, as `hash64` does.

    The words of the usual few bytes come from a table: one short text takes a tenth of the time.
    """
    encoded = [text.encode() for text in texts]
    lengths = list(map(len, encoded))
    if sum(lengths) > _MAX_TABLE_BYTES or max(lengths, default=0) > _TABLE_POSITIONS:
        offsets = np.cumsum([0, *lengths])
        return _hash_block(np.frombuffer(b"".join(encoded), np.uint8), offsets)
    table = _word_table()
    sums = [sum(map(list.__getitem__, table, data), len(data)) & _MASK for data in encoded]
    # Of one text NumPy's ten calls take most of the time.
    if len(sums) <= _MAX_MIXED:
        return np.array([mix64_int(total) for total in sums], np.uint64)
    return mix64(np.array(sums, np.uint64))


@functools.cache
def _word_table() -> list[list[int]]:
    """Returns the word of each of the first positions and each byte."""
    words = mix64(np.arange(_TABLE_POSITIONS << 8, dtype=np.uint64))
    return words.reshape(_TABLE_POSITIONS, 256).tolist()


def _hash_block(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    lengths = np.diff(offsets)
    positions = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], lengths)
    # Position and byte in one number, so that "ab" and "ba" have different words.
    words = mix64((positions << 8 | data[offsets[0] : offsets[-1]]).astype(np.uint64))
    # The length tells strings apart that end in zero bytes.
    return mix64(segment_sums(words, offsets - offsets[0]) + lengths.astype(np.uint64))


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The rows of a table by value.

    Row 0 is for null (padding), rows 1 to `oov_rows` are for unknown values by hash, and the rows
    of the known values follow.

    Attributes:
        values: Known values, unique, in the order of their rows.
        oov_rows: Number of rows that unknown values are spread over.
        stored: Hashes of the values, where these were written with them.

    Raises:
        ValueError: A value is repeated or null, or there is no row for unknown values.
    """

    values: pa.LargeStringArray
    oov_rows: int = 1
    stored: _HashIndex | None = None

    def __post_init__(self):
        if self.oov_rows < 1:
            raise ValueError(
                f"oov_rows={self.oov_rows} must be at least 1: an unknown value needs a row."
            )
        repeated = 0
        # Hashes that all differ prove that the values do, in less time than counting distinct
        # values takes.
        # Two equal hashes may still be of different values: then they are counted.
        if not self._hash_index.is_unique:
            repeated = len(self.values) - len(pc.unique(self.values))
        if repeated or self.values.null_count:
            raise ValueError(
                f"A vocabulary holds each value once and no nulls, not {repeated} repeated values "
                f"and {self.values.null_count} nulls."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in another process makes anew what is cached here.
        return type(self), (self.values, self.oov_rows)

    @classmethod
    def fit(
        cls,
        values: pa.Array | pa.ChunkedArray,
        weights: np.ndarray | None = None,
        *,
        min_count: int = 1,
        oov_rows: int = 1,
    ) -> Vocabulary:
        """Builds the vocabulary of frequent values, by (count descending, value).

        The order depends on the values and their counts alone, never on the order of the rows.

        Args:
            values: Values [N]; nulls are left out.
            weights: Count of each value, [N]; 1 by default.
            min_count: Least count of a known value.
            oov_rows: Number of rows that unknown values are spread over.
        """
        encoded = as_strings(values).dictionary_encode()
        present = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
        indices = encoded.indices.fill_null(0).to_numpy()[present]
        if weights is not None:
            # Nulls are dropped from both, so that they stay aligned.
            weights = weights[present]
        # Weighted counts are float64, exact up to 2^53.
        counts = np.bincount(indices, weights, minlength=len(encoded.dictionary))
        table = pa.table({"value": encoded.dictionary, "count": counts})
        table = table.filter(pa.array(counts >= min_count))
        # Ties are broken by value, because the order of a log must not decide rows.
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
        """Returns the row of each value.

        It is 0 for null, and an out-of-vocabulary row by hash for an unknown value.
        """
        if pa.types.is_dictionary(values.type):
            return self._rows_of_dictionary(values)
        # A column that a request lacks.
        if pa.types.is_null(values.type):
            return np.zeros(len(values), np.int32)
        if not _is_text(values.type):
            values = as_strings(values)
        if self._are_few(values):
            return self.rows_of_texts(values.to_pylist())
        values = as_strings(values)
        indices = self._find(values)
        # -1 becomes a row of unknown values, which is replaced below.
        rows = (indices + self.first).astype(np.int32)
        unknown = np.flatnonzero(indices < 0)
        if len(unknown):
            rows[unknown] = self._oov_rows_of(values.take(pa.array(unknown)))
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the values as plain arrays: their UTF-8 bytes and offsets, and of a large
        vocabulary the hashes that values are found by."""
        data, offsets = utf8(self.values)
        # Without Arrow's own format: .npy files are mapped and checked like all other arrays.
        arrays = {"bytes": data, "offsets": offsets}
        index = self._hash_index
        if len(self.values) >= _STORED_HASHES and index.is_unique:
            arrays |= {"hashes": index.hashes, "order": index.order}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], *, oov_rows: int) -> Vocabulary:
        """Builds the vocabulary whose `arrays()` these are.

        Arrays that are mapped into memory stay so: nothing of them is copied.

        Raises:
            ValueError: The arrays are not the bytes and offsets of UTF-8 strings.
        """
        offsets = np.ascontiguousarray(arrays["offsets"], np.int64)
        data = np.ascontiguousarray(arrays["bytes"], np.uint8)
        values = pa.LargeStringArray.from_buffers(
            len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data)
        )
        # The buffers come from a file: without this, a wrong offset would read past their end.
        values.validate(full=True)
        # Smaller vocabularies, and those of earlier versions, have none.
        if "hashes" not in arrays:
            return cls(values=values, oov_rows=oov_rows)
        hashes = arrays["hashes"]
        order = arrays["order"]
        if len(hashes) != len(values) or len(order) != len(values) or not _is_rising(hashes):
            raise ValueError("The hashes of a vocabulary are not those of its values.")
        return cls(values, oov_rows, stored=_HashIndex(hashes, order, is_unique=True))

    def _rows_of_dictionary(self, values: pa.DictionaryArray | pa.ChunkedArray) -> np.ndarray:
        codes, known = codes_and_values(values)
        # One more row, that of null, whose code is -1.
        return np.append(self.rows(known), np.int32(0))[codes]

    def _are_few(self, values: pa.Array | pa.ChunkedArray) -> bool:
        """Whether a look-up by hash takes less time than that of a column."""
        is_short = len(values) * _VALUES_PER_LOOKUP <= len(self.values)
        return self._hash_index.is_unique and (is_short or len(values) <= _FEW_VALUES)

    def rows_of_texts(self, texts: Sequence[str | None]) -> Int32[np.ndarray, " N"]:
        """Returns the rows of a few values, as `rows` does.

        It takes microseconds for one value, whatever the vocabulary.
        """
        if not self._hash_index.is_unique:
            return self.rows(pa.array(texts, pa.string()))
        recent = self._recent
        rows = [0 if text is None else recent.get(text) for text in texts]
        missing = [text for text, row in zip(texts, rows) if row is None and text is not None]
        if missing:
            found = self._look_up(missing)
            self._keep_recent(missing, found)
            others = iter(found)
            rows = [next(others) if row is None else row for row in rows]
        return np.array(rows, np.int32)

    def _look_up(self, texts: Sequence[str]) -> list[int]:
        """Returns the rows of texts by their hashes."""
        hashes = hash_texts(texts)
        rows = self._oov_rows_by(hashes).tolist()
        if not len(self.values):
            return rows
        positions = np.searchsorted(self._hash_index.hashes, hashes)
        nearest = self._hash_index.order.take(positions, mode="clip")
        # An unknown value can have the hash of a known one.
        known = self._read_texts(nearest.tolist())
        found = zip(texts, known, nearest.tolist(), rows)
        first = self.first
        return [first + index if text == value else row for text, value, index, row in found]

    def _keep_recent(self, texts: Sequence[str], rows: Sequence[int]) -> None:
        """Keeps the rows of known values."""
        # Of known ones alone: strangers cannot fill it with texts of their own.
        known = {text: row for text, row in zip(texts, rows) if row >= self.first}
        if len(known) > _MAX_RECENT:
            return
        if len(self._recent) + len(known) > _MAX_RECENT:
            self._recent.clear()
        self._recent.update(known)

    def _oov_rows_of(self, values: pa.LargeStringArray) -> np.ndarray:
        rows = self._oov_rows_by(hash64(values))
        is_null = values.is_null().to_numpy(zero_copy_only=False)
        return np.where(is_null, 0, rows)

    def _oov_rows_by(self, hashes: np.ndarray) -> np.ndarray:
        # Without a seed: a server must choose the same row as training did.
        return 1 + (hashes % np.uint64(self.oov_rows)).astype(np.int32)

    def _find(self, values: pa.LargeStringArray) -> np.ndarray:
        """Returns the index int64 [N] of each value among the known ones, or -1."""
        indices = pc.index_in(values, value_set=self.values, skip_nulls=True)
        known_indices = indices.fill_null(-1).to_numpy()
        return known_indices.astype(np.int64)

    @functools.cached_property
    def _recent(self) -> dict[str | None, int]:
        """The rows of values that were looked up lately."""
        return {}

    @functools.cached_property
    def _read_texts(self) -> Callable[[Sequence[int]], list[str]]:
        """Function from indices of known values to their texts."""
        return texts_reader(self.values)

    @functools.cached_property
    def _hash_index(self) -> _HashIndex:
        if self.stored is not None:
            return self.stored
        # Made once, when the vocabulary is checked; 12 bytes a value.
        hashes = hash64(self.values)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        is_unique = bool(np.all(np.diff(hashes)))
        return _HashIndex(hashes, order.astype(np.int32), is_unique)


@dataclasses.dataclass(frozen=True, eq=False)
class _HashIndex:
    """The hashes of known values, in order.

    Attributes:
        hashes: Hashes uint64 [V], ascending.
        order: Index int32 [V] of the value of each hash.
        is_unique: Whether all hashes differ; else the index is of no use.
    """

    hashes: np.ndarray
    order: np.ndarray
    is_unique: bool


def _is_rising(numbers: np.ndarray) -> bool:
    """Returns whether each number is greater than the one before, in blocks."""
    # Of mapped numbers no more than a block is in memory at once.
    for start in range(0, len(numbers), _BLOCK_BYTES):
        part = numbers[start : start + _BLOCK_BYTES + 1]
        if not (part[1:] > part[:-1]).all():
            return False
    return True
