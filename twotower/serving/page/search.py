"""Search in the titles and ids of a bundle while somebody types."""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

MAX_LOOKED = 2_000  # places of a text that one search looks at
# Letters that people write one for the other, beside those that differ by a mark alone.
_ALIKE = str.maketrans({"ى": "ي", "ة": "ه", "ـ": None, "ı": "i"})
_ALIKE |= str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", "01234567890123456789")


def fold(text: str) -> str:
    """Returns a text without the differences that people leave out when they type.

    >>> fold("Crème  BRÛLÉE"), fold("أكياس شاي")
    ('creme brulee', 'اكياس شاي')
    """
    if not text.isascii():
        # Marks become letters of their own, which are then left out; wide and joined forms become
        # plain ones.
        parts = unicodedata.normalize("NFKD", text)
        text = "".join(letter for letter in parts if not unicodedata.combining(letter))
        text = text.translate(_ALIKE)
    return " ".join(text.casefold().split())


class Texts:
    """Texts to search in, in the order in which equally good ones are found."""

    def __init__(self, texts: Iterable[str]):
        """Folds the texts.

        Args:
            texts: Texts, the first ones preferred.
        """
        lines = [fold(text) for text in texts]
        # One long text: looking through it takes less than a Python object for each word.
        self._all = "\n" + "\n".join(lines) + "\n"
        lengths = np.fromiter((len(line) + 1 for line in lines), np.int64, len(lines))
        self._starts = np.concatenate([[1], 1 + np.cumsum(lengths)])

    def find(self, text: str, k: int) -> list[int]:
        """Returns the numbers of the first `k` texts that hold all words of a text.

        Texts that begin with it come first, then those with a word that does, then all others. Of
        words that stand nearly everywhere only the first `MAX_LOOKED` places are looked at.

        Args:
            text: Text to search for.
            k: Greatest number of texts.
        """
        wanted = fold(text)
        if not wanted:
            return list(range(min(k, len(self._starts) - 1)))
        words = wanted.split()
        # The longest word stands at the fewest places.
        word = max(words, key=len)
        # A dict for its order: the best ones first, each once.
        found = dict.fromkeys(itertools.islice(self._rows_with(f"\n{wanted}"), k))
        within = []
        for row in self._rows_with(word):
            if len(found) == k:
                break
            line = self._all[self._starts[row] : self._starts[row + 1] - 1]
            if row in found or not all(each in line for each in words):
                continue
            if f" {word}" in f" {line}":
                found[row] = None
            else:
                within.append(row)
        return [*found, *within][:k]

    def _rows_with(self, needle: str) -> Iterator[int]:
        """Yields the texts that hold a text, each once, as far as they are looked at."""
        position = 0
        for _ in range(MAX_LOOKED):
            position = self._all.find(needle, position)
            if position < 0:
                return
            # The line break before a text belongs to the needle.
            inside = position + needle.startswith("\n")
            row = int(np.searchsorted(self._starts, inside, side="right")) - 1
            yield row
            # On to the line break before the next text: a text counts once, and the next one may
            # begin with the needle.
            position = int(self._starts[row + 1]) - 1


class Prefixes:
    """Ids to search in by their beginning."""

    def __init__(self, ids: Sequence[str], weights: np.ndarray):
        """Sorts the ids.

        Args:
            ids: Ids, each once.
            weights: Frequency of each, int [N]; the greatest are found by an empty text.
        """
        self._sorted = sorted(ids)
        first = np.argsort(-weights, kind="stable")
        self._first = [ids[int(row)] for row in first[:MAX_LOOKED]]

    def find(self, text: str, k: int) -> list[str]:
        """Returns the first `k` ids that begin with a text; itself first where it is one."""
        if not text:
            return self._first[:k]
        start = bisect.bisect_left(self._sorted, text)
        found = self._sorted[start : start + k]
        return [name for name in found if name.startswith(text)]
