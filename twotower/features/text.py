"""Text -> hashed ids of its words and character n-grams, the same on every machine; and vectors
computed elsewhere."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Shaped

from twotower.core.arrow import pc
from twotower.core.hashing import mix64
from twotower.features.vocabulary import as_strings, segment_sums

# Texts are hashed this many at a time, so that the temporary arrays stay within tens of megabytes.
_BLOCK_TEXTS = 8192
# Beyond Unicode: the two boundaries of a word among its characters.
_WORD_START, _WORD_END = 0x110000, 0x110001

_ARABIC_MARKS = [
    *range(0x0610, 0x061B),
    *range(0x064B, 0x0660),
    0x0670,
    *range(0x06D6, 0x06DD),
    *range(0x06DF, 0x06E9),
    *range(0x06EA, 0x06EE),
    *range(0x08D3, 0x08E2),
    *range(0x08E3, 0x0900),
    0x0640,
]
_INVISIBLE = [
    0x00AD,
    0x061C,
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    0xFEFF,
]
_LETTERS = {
    "ى": "ي",
    "ی": "ي",
    "ة": "ه",
    "ٱ": "ا",
    "ک": "ك",
    "ø": "o",
    "ł": "l",
    "đ": "d",
    "ð": "d",
    "æ": "ae",
    "œ": "oe",
    "ı": "i",
}
_TABLE = str.maketrans(
    dict.fromkeys(map(chr, _ARABIC_MARKS + _INVISIBLE), "")
    | _LETTERS
    | {chr(zero + digit): str(digit) for zero in (0x0660, 0x06F0) for digit in range(10)}
)
_LATIN_ACCENTS = re.compile(r"(?<=[a-z])[\u0300-\u036f]+")


def normalise(text: str) -> str:
    """One spelling of what readers take for the same: case, width, Latin accents, Arabic vowels,
    hamza, digits.

    >>> normalise("Ａ Café, ＬＯＵＤ"), normalise("أَحْمَد") == normalise("احمد"), normalise("١٢٣")
    ('a cafe, loud', True, '123')
    """
    # Decomposed, a letter and its marks stand apart: alef with hamza becomes alef and a mark, é
    # becomes e and a mark.
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return unicodedata.normalize("NFKC", _LATIN_ACCENTS.sub("", text).translate(_TABLE))


def hashed_pieces(
    texts: pa.Array | pa.ChunkedArray,
    *,
    words: Sequence[int] = (1,),
    characters: Sequence[int] = (3, 4, 5),
    buckets: int,
    max_length: int,
) -> Int32[np.ndarray, "N L"]:
    """Ids in [1, buckets) of the pieces of each text, int32 [N, max_length], padded with 0.

    Pieces are runs of `words` words and, within a word and its two boundaries, runs of `characters`
    characters. The first `max_length` are kept: words before n-grams, shorter runs before longer
    ones, then as they stand in the text.
    """
    encoded = as_strings(texts).dictionary_encode()
    distinct = encoded.dictionary
    ids = np.zeros((len(distinct) + 1, max_length), np.int32)
    for low in range(0, len(distinct), _BLOCK_TEXTS):
        block = distinct.slice(low, _BLOCK_TEXTS)
        rows, hashes = _pieces(block, words, characters)
        ids[low : low + len(block)] = pad_lists(
            rows, 1 + (hashes % np.uint64(buckets - 1)).astype(np.int32), len(block), max_length
        )
    return ids[encoded.indices.fill_null(len(distinct)).to_numpy()]


def pad_lists(
    rows: np.ndarray, values: np.ndarray, count: int, length: int
) -> Shaped[np.ndarray, "N L"]:
    """Returns the first `length` values of each row, [count, length], 0 elsewhere.

    Args:
        rows: Row [M] that each value belongs to, ascending.
        values: Values [M].
        count: Number of rows N.
        length: Values L kept of a row.
    """
    starts = np.searchsorted(rows, np.arange(count))
    positions = np.arange(len(rows)) - starts[rows]
    padded = np.zeros((count, length), values.dtype)
    kept = positions < length
    padded[rows[kept], positions[kept]] = values[kept]
    return padded


def _pieces(
    texts: pa.LargeStringArray, words: Sequence[int], characters: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Row and hash of every piece, ordered by row, then as `hashed_pieces` says."""
    joined = normalise("\n".join(pc.replace_substring(texts, "\n", " ").to_pylist()))
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    letter = _is_letter(points)
    start = letter & ~np.concatenate([[False], letter[:-1]])
    row_of_word = np.cumsum(points == ord("\n"))[start]
    word_of_letter = np.cumsum(start)[letter] - 1
    lengths = np.bincount(word_of_letter, minlength=len(row_of_word))
    bounded, ends = _with_boundaries(points[letter], word_of_letter, lengths)
    pieces = [_word_runs(bounded, lengths, row_of_word, size) for size in sorted(words)]
    pieces += _character_runs(
        bounded, ends, np.repeat(row_of_word, lengths + 2), sorted(characters)
    )
    rows, hashes = (np.concatenate(part) for part in zip(*pieces, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], hashes[order]


def _is_letter(points: np.ndarray) -> np.ndarray:
    """Which code points make words: letters, digits and the marks on them."""
    known = np.zeros(0x110000, bool)
    known[points] = True
    for point in np.flatnonzero(known):
        known[point] = chr(point).isalnum() or unicodedata.category(chr(point)).startswith("M")
    return known[points]


def _with_boundaries(
    letters: np.ndarray, word_of_letter: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The letters with a boundary before and after each word, int64 [T], and where the word of each
    ends, int64 [T]."""
    stops = np.cumsum(lengths + 2)
    bounded = np.full(len(letters) + 2 * len(lengths), _WORD_END, np.int64)
    bounded[stops - lengths - 2] = _WORD_START
    bounded[np.arange(len(letters)) + 2 * word_of_letter + 1] = letters
    return bounded, np.repeat(stops, lengths + 2)


def _character_runs(
    bounded: np.ndarray, ends: np.ndarray, rows: np.ndarray, sizes: Sequence[int]
) -> list[tuple]:
    pieces, total = [], np.zeros(len(bounded), np.uint64)
    for size in range(1, max(sizes, default=0) + 1):
        total = total[: len(bounded) - size + 1] + mix64(
            ((size << 21) | bounded[size - 1 :]).astype(np.uint64)
        )
        if size in sizes:
            # A boundary alone says nothing.
            fits = np.arange(len(total)) + size <= ends[: len(total)]
            here = np.flatnonzero(
                fits & ((bounded[: len(total)] < _WORD_START) if size == 1 else True)
            )
            pieces.append((rows[here], mix64(total[here] + np.uint64(size))))
    return pieces


def _word_runs(
    bounded: np.ndarray, lengths: np.ndarray, rows: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(lengths + 2)])
    position = np.arange(len(bounded)) - np.repeat(offsets[:-1], lengths + 2)
    words = mix64(segment_sums(mix64(((position << 21) | bounded).astype(np.uint64)), offsets))
    count = max(len(words) - size + 1, 0)
    total = np.zeros(count, np.uint64)
    for place in range(size):
        total += mix64(words[place : place + count] + np.uint64(place + 1))
    whole = rows[:count] == rows[size - 1 :]
    return rows[:count][whole], mix64(total[whole] + np.uint64(size))
