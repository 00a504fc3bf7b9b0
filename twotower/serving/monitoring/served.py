"""Figures on what a version has served lately: scores and their drift, coverage, concentration.

They are those of the last lists of a process, of which some are left out where many are asked for.
The drift is the population stability index of the scores of the model's lists: the sum over the
tenths of the reference of (p - q) log(p / q), with p of the lists and q = 1/10. The reference are
the lists of users of the bundle, evenly drawn, as the version makes them when it is loaded. Below
.1 the lists are like them, and from .25 something has changed: the model's features in requests, or
who comes.

Source of the index: S. Siddiqi, "Credit Risk Scorecards", Wiley 2006.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.retrieval.retriever import Retriever
from twotower.serving.types import Answer, Item, Retrieve

LISTS = 2_000  # that the figures are of
LONGEST = 50  # items of a list that are counted
WAITING = 100  # lists between two looks; of more, the latest are left out
K = 10  # items of a list whose scores are compared
USERS = 512  # of the reference
PARTS = 10  # of the scores of the reference
FEWEST = 100  # lists before anything is said
TOP = 0.01  # share of the items whose share of the lists is the concentration
LEAST = 1e-3  # share of a part that is empty


class Figures(NamedTuple):
    """The figures of a version.

    Attributes:
        drift: Population stability index of the scores; NaN without a reference, or of few lists.
        coverage: Share of the items that were shown; NaN of few lists.
        concentration: Share of what was shown that the most shown hundredth of the items has; NaN
            of few lists.
    """

    drift: float
    coverage: float
    concentration: float


class Served:
    """What a version has served lately."""

    def __init__(self, reference: np.ndarray):
        """Starts without lists.

        Args:
            reference: Scores of lists, float [n], none for no drift.
        """
        self._edges = np.zeros(0)
        if len(reference):
            self._edges = np.quantile(reference, np.arange(1, PARTS) / PARTS)
        self._new: collections.deque[tuple[Any, Answer]] = collections.deque()
        self._lists: collections.deque[list[str]] = collections.deque()
        self._counts: collections.Counter[str] = collections.Counter()
        self._parts: collections.deque[np.ndarray] = collections.deque()
        # Their sum, kept as they come and go: adding all of them up would keep requests waiting.
        self._parts_sum = np.zeros(PARTS, np.int64)

    def add(self, request: Any, answer: Answer) -> None:
        """Keeps a list until the next look.

        Args:
            request: Request for it.
            answer: Answer, which nobody changes from now on.
        """
        # Not in the place of an older one: the memory of an answer that is kept for a while is cold
        # when it is freed, and the next answer would be made in other memory each time.
        if len(self._new) < WAITING:
            self._new.append((request, answer))

    def count(self, at_most: int = WAITING) -> None:
        """Counts lists that were kept.

        Args:
            at_most: Greatest number of them: each takes some tens of microseconds.
        """
        for _ in range(min(at_most, len(self._new))):
            self._count(*self._new.popleft())

    def look(self, num_items: int, *, count: int = WAITING) -> Figures:
        """Returns the figures of the last lists.

        Args:
            num_items: Number of items now.
            count: Greatest number of waiting lists that are counted before.
        """
        self.count(count)
        if len(self._lists) < FEWEST:
            return Figures(math.nan, math.nan, math.nan)
        shown = np.sort(np.fromiter(self._counts.values(), np.int64, len(self._counts)))
        top = max(1, round(TOP * num_items))
        return Figures(
            self._drift(),
            len(shown) / max(num_items, len(shown)),
            float(shown[-top:].sum() / shown.sum()),
        )

    def _count(self, request: Any, answer: Answer) -> None:
        items = answer.items[:LONGEST]
        ids = [item.item_id for item in items]
        self._lists.append(ids)
        self._counts.update(ids)
        if len(self._lists) > LISTS:
            for item in self._lists.popleft():
                self._counts[item] -= 1
                if not self._counts[item]:
                    del self._counts[item]
        # Only first pages, by the scores of the model: later pages score lower, and other scores
        # are of another kind.
        is_plain = isinstance(request, Retrieve) and not request.offset
        if is_plain and not request.popularity_weight and len(self._edges):
            parts = self._parts_of(items[:K])
            self._parts.append(parts)
            self._parts_sum += parts
            if len(self._parts) > LISTS:
                self._parts_sum -= self._parts.popleft()

    def _parts_of(self, items: Sequence[Item]) -> np.ndarray:
        """Returns the number of scores of a list in each part of the reference, int [P]."""
        scores = [item.score for item in items if item.source == "model"]
        found = [score for score in scores if score is not None]
        return np.bincount(np.searchsorted(self._edges, found), minlength=PARTS)

    def _drift(self) -> float:
        counts = self._parts_sum
        # Lists of somebody unknown have no score of the model.
        if len(self._parts) < FEWEST or not counts.sum():
            return math.nan
        return stability(counts)


def stability(counts: np.ndarray) -> float:
    """Returns the population stability index of scores in parts that the reference fills equally.

    Args:
        counts: Number of scores in each part, int [P].

    >>> stability(np.array([5, 5, 5, 5]))
    0.0
    """
    shares = np.maximum(counts / max(counts.sum(), 1), LEAST)
    equal = 1 / len(counts)
    return float(((shares - equal) * np.log(shares / equal)).sum())


def reference_of(retriever: Retriever) -> np.ndarray:
    """Returns the scores of lists of a bundle's own users, float32 [n]; none of one without users.

    Args:
        retriever: Retriever of the bundle.
    """
    users = retriever.bundle.users["user_id"]
    rows = evenly_spaced(np.arange(len(users)), USERS)
    drawn = [users[row].as_py() for row in rows.tolist()]
    if not drawn or not len(retriever):
        return np.zeros(0, np.float32)
    return retriever.recommend_many(drawn, K)["score"].to_numpy()
