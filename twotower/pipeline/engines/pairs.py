"""The pairs of user and item of the rows of a log, by which repeated ones are counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Rows of a bucket, which is sorted in memory.
_BUCKET = 2**21
# Bits of the number of a part and of the code of an item; users have what is left of 64.
_PART_BITS = 2
_ITEM_BITS = 31


class Pairs:
    """User, item and part of rows that come in any order, on the disk in buckets of users.

    A bucket at a time is sorted in memory, which takes less time than a database takes to count
    distinct pairs.

    Args:
        folder: Folder for the files; it must not exist.
        rows: Number of rows, about.
    """

    def __init__(self, folder: Path, rows: int):
        folder.mkdir(parents=True)
        self._paths = [folder / str(number) for number in range(rows // _BUCKET + 1)]

    def add(self, user: np.ndarray, item: np.ndarray, part: np.ndarray) -> None:
        """Adds rows.

        Args:
            user: Code of the user of each, int [N], below 2^31.
            item: Code of its item likewise.
            part: Number of its part, 0 to 2.
        """
        packed = user.astype(np.uint64) << (_PART_BITS + _ITEM_BITS)
        packed |= item.astype(np.uint64) << _PART_BITS
        packed |= part.astype(np.uint64)
        # Small numbers, which are sorted by counting.
        bucket = (user % len(self._paths)).astype(np.uint16)
        packed = packed[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._paths)))
        for path, rows in zip(self._paths, np.split(packed, ends[:-1]), strict=True):
            if len(rows):
                # Opened each time: a process may not hold as many files open.
                with path.open("ab") as file:
                    rows.tofile(file)

    def _buckets(self) -> Iterator[np.ndarray]:
        """Yields the rows of each bucket, uint64 [M], by user, item and part."""
        for path in self._paths:
            if path.exists():
                rows = np.fromfile(path, np.uint64)
                rows.sort()
                yield rows

    def count(self) -> int:
        """Returns the number of distinct pairs of all parts."""
        return sum(len(_distinct(rows >> _PART_BITS)) for rows in self._buckets())

    def answers(self, part: int, is_in_corpus: np.ndarray) -> np.ndarray:
        """Returns of each user of a part the code, the items that differ, and how many of these are
        in the corpus, int64 [U, 3].

        Args:
            part: Number of the part.
            is_in_corpus: Whether the item of each code is in the corpus, bool.
        """
        found = []
        for rows in self._buckets():
            own = rows[rows & (2**_PART_BITS - 1) == part]
            pairs = _distinct(own >> _PART_BITS)
            user = (pairs >> _ITEM_BITS).astype(np.int64)
            is_found = is_in_corpus[(pairs & (2**_ITEM_BITS - 1)).astype(np.int64)]
            users, answers = np.unique(user, return_counts=True)
            # Running counts: those of a user lie between two of them.
            running = np.append(0, np.cumsum(is_found))
            ends = np.cumsum(answers)
            found.append(np.stack([users, answers, running[ends] - running[ends - answers]], 1))
        return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Returns the distinct numbers of a sorted array."""
    is_first = np.ones(len(rows), bool)
    np.not_equal(rows[1:], rows[:-1], out=is_first[1:])
    return rows[is_first]
