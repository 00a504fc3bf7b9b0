"""Vectors of users who are encoded anew for a list: the latest ones are kept."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Any

from twotower.retrieval.retriever import EncodedUser

USERS = 10_000  # whose vectors are kept


class VectorCache:
    """The encoded users of one version, those that were asked for last.

    Attributes:
        hits: Number of users that were found.
        misses: Number of users that were encoded.
    """

    def __init__(self, size: int = USERS):
        self.hits = 0
        self.misses = 0
        self._size = size
        self._users: collections.OrderedDict[str, tuple[Any, EncodedUser]] = (
            collections.OrderedDict()
        )

    def clear(self) -> None:
        """Forgets everybody."""
        self._users.clear()

    def find(self, user: str, last: Any, encode: Callable[[], EncodedUser]) -> EncodedUser:
        """Returns an encoded user, and encodes them where they have done something since.

        Args:
            user: Id of the user.
            last: Their last event, the same object each time.
            encode: Function that encodes the user.
        """
        kept = self._users.get(user)
        # By identity: the history keeps one object for each event, and two events may well be
        # equal.
        if kept is not None and kept[0] is last:
            self.hits += 1
            self._move_to_end(user)
            return kept[1]
        self.misses += 1
        encoded = encode()
        self._users[user] = (last, encoded)
        self._move_to_end(user)
        if len(self._users) > self._size:
            self._users.popitem(last=False)
        return encoded

    def _move_to_end(self, user: str) -> None:
        # Where lists are made in threads, another one may just have dropped the user.
        with contextlib.suppress(KeyError):
            self._users.move_to_end(user)
