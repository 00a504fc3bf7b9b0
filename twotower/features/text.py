"""Text as hashed words and character n-grams, with equal ids on every machine."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from twotower.core.arrays import mix64
from twotower.core.arrow import pc
from twotower.features.base import Feature, Fitted, column_of, pad_lists
from twotower.features.inputs import Input, TableShape
from twotower.features.vocabulary import as_strings, segment_sums

if TYPE_CHECKING:  # its own import takes longer than many an answer
    from jaxtyping import Int32

# Texts are hashed this many at a time, so that the temporary arrays stay within tens of megabytes.
_BLOCK_TEXTS = 8192
_FEW_POINTS = 16_384  # code points of a text that is looked at by its letters
# The two boundaries of a word among its characters: the first numbers that are no code points.
_WORD_START = 0x110000
_WORD_END = 0x110001
# Lengths of runs that a specification may ask for.
_MAX_RUN = 8

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
_DIGITS = {
    chr(zero + digit): str(digit)
    for zero in (0x0660, 0x06F0)  # Arabic and Persian
    for digit in range(10)
}
_REPLACEMENTS = str.maketrans(
    dict.fromkeys(map(chr, _ARABIC_MARKS + _INVISIBLE), "") | _LETTERS | _DIGITS
)
_LATIN_ACCENTS = re.compile(r"(?<=[a-z])[\u0300-\u036f]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextColumns(Feature):
    """Text of one column, or of several as one: a title and a description.

    Attributes:
        columns: Columns that are joined, in this order; missing and blank ones are left out. Empty
            for `column` alone, which is left out where there are several.
    """

    columns: tuple[str, ...] = ()

    # Text between two columns.
    separator: ClassVar[str] = " "

    def __post_init__(self):
        super().__post_init__()
        if not self.columns:
            return
        distinct = len(set(self.columns)) == len(self.columns)
        self._check(distinct and all(self.columns), "columns", "distinct names of columns")
        first = self.columns[0]
        # The name is the default; a saved specification has the column that is set below.
        is_left_out = self.column in (self.name, first)
        self._check(is_left_out, "column", "left out beside columns")
        object.__setattr__(self, "column", first)

    @property
    def columns_read(self) -> tuple[str, ...]:
        return self.columns or (self.column,)

    def read(self, rows: pa.Table) -> pa.ChunkedArray:
        if not self.columns:
            return super().read(rows)
        texts = []
        for name in self.columns:
            values = as_strings(column_of(rows, name))
            texts.append(_blank_as_null(values))
        separator = pa.scalar(self.separator, pa.large_string())
        joined, *others = texts
        # Two at a time: of a row whose texts are all null, Arrow's join of several that skips nulls
        # makes no row at all.
        for other in others:
            both = pc.binary_join_element_wise(joined, other, separator)
            joined = pc.coalesce(both, joined, other)
        return pa.chunked_array([joined])


def _blank_as_null(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    is_blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return pc.if_else(is_blank, pa.scalar(None, pa.large_string()), texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFeature(TextColumns):
    """Text as the mean over its words and character n-grams, each hashed to a row of the table.

    Attributes:
        words: Lengths of runs of words; (1, 2) takes words and pairs of neighbours.
        characters: Lengths of runs of characters within a word, its two boundaries counted as
            characters.
        buckets: Rows V of the table.
        max_length: Pieces L kept of a text: its words first, then its n-grams.
    """

    words: tuple[int, ...] = (1,)
    characters: tuple[int, ...] = (3, 4, 5)
    buckets: int = 65_536
    max_length: int = 96

    # Hashes need no vocabulary, so features may share rows whatever they cut texts into.
    shared_fields: ClassVar[tuple[str, ...]] = ("embedding_size", "buckets")

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "max_length")
        self._check_at_least(2, "buckets")
        any_pieces = bool(self.words or self.characters)
        self._check(any_pieces, "words", "one or more lengths when characters is empty")
        for field in ("words", "characters"):
            lengths = getattr(self, field)
            distinct = len(set(lengths)) == len(lengths)
            in_range = all(1 <= length <= _MAX_RUN for length in lengths)
            self._check(distinct and in_range, field, f"distinct lengths from 1 to {_MAX_RUN}")

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        return hashed_pieces(
            column,
            words=self.words,
            characters=self.characters,
            buckets=self.buckets,
            max_length=self.max_length,
        )

    def input(self, fitted: Fitted) -> Input:
        return Input(table=self.table, length=self.max_length)

    def table_shape(self, fitted: Fitted) -> TableShape:
        return TableShape(rows=self.buckets, width=self.embedding_size)


def normalise(text: str) -> str:
    """Returns a text in one spelling for all variants that readers take for the same.

    Case, width, Latin accents, Arabic vowels and hamza, and Arabic and Persian digits are unified.

    >>> normalise("Ａ Café, ＬＯＵＤ"), normalise("أَحْمَد") == normalise("احمد"), normalise("١٢٣")
    ('a cafe, loud', True, '123')
    """
    # Decomposed, a letter and its marks stand apart: alef with hamza becomes alef and a mark, é
    # becomes e and a mark.
    text = unicodedata.normalize("NFKD", text).casefold()
    # Again, since case folding can make letters that are not decomposed.
    text = unicodedata.normalize("NFKD", text)
    text = _LATIN_ACCENTS.sub("", text).translate(_REPLACEMENTS)
    # Composed again, so that n-grams count a letter and the marks that stay on it as one.
    return unicodedata.normalize("NFKC", text)


def hashed_pieces(
    texts: pa.Array | pa.ChunkedArray,
    *,
    words: Sequence[int] = (1,),
    characters: Sequence[int] = (3, 4, 5),
    buckets: int,
    max_length: int,
) -> Int32[np.ndarray, "N L"]:
    """Hashes the pieces of each text to ids in [1, buckets), padded with 0.

    Pieces are runs of words and, within a word and its two boundaries, runs of characters. The
    first `max_length` are kept: words before n-grams, shorter runs before longer ones, then in the
    order of the text.

    Args:
        texts: Texts [N]; null has no pieces.
        words: Lengths of runs of words.
        characters: Lengths of runs of characters.
        buckets: Number of rows of the table.
        max_length: Number L of pieces kept of a text.
    """
    # Each distinct text is cut once: titles and categories repeat.
    encoded = as_strings(texts).dictionary_encode()
    distinct = encoded.dictionary
    # One more row, without pieces, for null.
    ids = np.zeros((len(distinct) + 1, max_length), np.int32)
    for low in range(0, len(distinct), _BLOCK_TEXTS):
        block = distinct.slice(low, _BLOCK_TEXTS)
        rows, hashes = _pieces(block, words, characters)
        # Row 0 stays padding.
        block_ids = 1 + (hashes % np.uint64(buckets - 1)).astype(np.int32)
        ids[low : low + len(block)] = pad_lists(rows, block_ids, len(block), max_length)
    return ids[encoded.indices.fill_null(len(distinct)).to_numpy()]


def _pieces(
    texts: pa.LargeStringArray, words: Sequence[int], characters: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and hash of every piece, ordered by row, then in the order of `hashed_pieces`."""
    # All texts at once, one a line: Unicode is normalised in C, and the rest is whole arrays.
    lines = pc.replace_substring(texts, "\n", " ").to_pylist()
    joined = normalise("\n".join(lines))
    # Four bytes a character: positions in the array are positions in the text.
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    letter = _is_letter(points)
    # A word begins at a letter that follows none.
    start = letter & ~np.concatenate([[False], letter[:-1]])
    row_of_word = np.cumsum(points == ord("\n"))[start]
    word_of_letter = np.cumsum(start)[letter] - 1
    lengths = np.bincount(word_of_letter, minlength=len(row_of_word))
    # Boundaries make "^ring" and "ring$" pieces, which tell prefixes from suffixes.
    bounded, ends = _with_boundaries(points[letter], word_of_letter, lengths)
    row_of_character = np.repeat(row_of_word, lengths + 2)
    pieces = [_word_runs(bounded, lengths, row_of_word, size) for size in sorted(words)]
    pieces += _character_runs(bounded, ends, row_of_character, characters)
    rows = np.concatenate([piece_rows for piece_rows, _ in pieces])
    hashes = np.concatenate([piece_hashes for _, piece_hashes in pieces])
    # Stable, so that within a row the order of kinds and of the text remains.
    order = np.argsort(rows, kind="stable")
    return rows[order], hashes[order]


def _is_letter(points: np.ndarray) -> np.ndarray:
    """Returns a mask of the code points that make words: letters, digits and the marks on them."""
    # Each distinct code point is looked up in Unicode's data once. For the text of a request these
    # are a short list; for a column a table of all takes less time than sorting.
    if len(points) < _FEW_POINTS:
        distinct = np.unique(points)
        flags = np.fromiter(map(_makes_words, distinct.tolist()), bool, len(distinct))
        return flags[np.searchsorted(distinct, points)]
    is_letter = np.zeros(0x110000, bool)
    is_letter[points] = True
    for point in np.flatnonzero(is_letter).tolist():
        is_letter[point] = _makes_words(point)
    return is_letter[points]


def _makes_words(point: int) -> bool:
    character = chr(point)
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _with_boundaries(
    letters: np.ndarray, word_of_letter: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Puts a boundary before and after each word.

    Returns:
        The characters int64 [T], and for each the end int64 [T] of its word.
    """
    ends = np.cumsum(lengths + 2)
    # Filled with the end mark, over which starts and letters are written.
    bounded = np.full(len(letters) + 2 * len(lengths), _WORD_END, np.int64)
    bounded[ends - lengths - 2] = _WORD_START
    bounded[np.arange(len(letters)) + 2 * word_of_letter + 1] = letters
    return bounded, np.repeat(ends, lengths + 2)


def _character_runs(
    bounded: np.ndarray, ends: np.ndarray, rows: np.ndarray, sizes: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns row and hash of the runs of characters within words, shorter runs first."""
    pieces = []
    totals = np.zeros(len(bounded), np.uint64)
    for size in range(1, max(sizes, default=0) + 1):
        # The sum over a run is that over the run shorter by one, and its last character.
        count = len(bounded) - size + 1
        # Code points have 21 bits, so size and character never mix.
        last = ((size << 21) | bounded[size - 1 :]).astype(np.uint64)
        totals = totals[:count] + mix64(last)
        if size not in sizes:
            continue
        within_word = np.arange(len(totals)) + size <= ends[: len(totals)]
        if size == 1:
            # A boundary alone says nothing.
            within_word &= bounded < _WORD_START
        starts = np.flatnonzero(within_word)
        pieces.append((rows[starts], mix64(totals[starts] + np.uint64(size))))
    return pieces


def _word_runs(
    bounded: np.ndarray, lengths: np.ndarray, rows: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and hash of the runs of `size` words within a text."""
    offsets = np.concatenate([[0], np.cumsum(lengths + 2)])
    positions = np.arange(len(bounded)) - np.repeat(offsets[:-1], lengths + 2)
    characters = mix64(((positions << 21) | bounded).astype(np.uint64))
    # One hash a word, from which the hashes of runs are made.
    words = mix64(segment_sums(characters, offsets))
    # A block with fewer words than a run has none.
    count = max(len(words) - size + 1, 0)
    totals = np.zeros(count, np.uint64)
    for position in range(size):
        totals += mix64(words[position : position + count] + np.uint64(position + 1))
    # Runs that reach into the next text are no runs of either.
    within_text = rows[:count] == rows[size - 1 :]
    return rows[:count][within_text], mix64(totals[within_text] + np.uint64(size))
