"""Lists that are more than the order of the scores: boosts, caps, promotions and exploration.

The candidates are ordered by their boosted scores. Where a request or a hook re-ranks, it reorders
a window of the best ones, which is the same for every page; those behind the window follow by
score. The positions of the list are then filled one by one, from the first:

- A promotion of p percent has the first position i at which i p / 100 reaches another whole number:
  of 20 percent, positions 5, 10, 15 and so on, on whatever page they are. It is given to the best
  item of the promotion that is not in the list yet. Where none is left the position is like others.
- Any other position is given to the best item that is left or, where it explores, to one drawn from
  the best `EXPLORED` that are left.
- An item whose category is full is left out, promoted or not.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from twotower.retrieval.live.conditions import Conditions
from twotower.retrieval.retriever import Recommendation, Recommendations, Retriever

MAX_POOL = 10_000  # candidates of one search
# Candidates of all searches of a list, each of 20 µs, until no more are searched: others wait.
MAX_CANDIDATES = 20_000
MULTIPLE = 5  # candidates at first, in multiples of the list, where some may be left out
EXPLORED = 100  # candidates that a position which explores draws from


class Search(Protocol):
    """A list of the best `k` items that satisfy conditions."""

    def __call__(self, k: int, where: Conditions) -> Recommendations: ...


class Boost(NamedTuple):
    """A change of the scores of some items.

    Attributes:
        where: Conditions of the items.
        factor: Factor of their scores. A score below 0 is divided by it, so that a factor above 1
            always raises.
        add: Addend of their scores, after the factor.
    """

    where: Conditions
    factor: float = 1.0
    add: float = 0.0

    def apply(self, score: float) -> float:
        """Returns the changed score."""
        scaled = score * self.factor
        if score < 0:
            scaled = score / self.factor
        return scaled + self.add


class Promotion(NamedTuple):
    """Positions that are kept for some items.

    Attributes:
        where: Conditions of the items.
        percent: Share of the positions.
    """

    where: Conditions
    percent: float


class Reorder(NamedTuple):
    """A re-ranking of the best candidates.

    Attributes:
        choose: Function from candidates, best first, and a number of them to so many positions, in
            their new order.
        window: Number of candidates, by their boosted scores. It must not depend on the page, or
            pages would be of different orders and repeat or lose items.
        is_greedy: Whether a choice of fewer items is the beginning of one of more, so that it need
            not be asked for all.
    """

    choose: Callable[[Sequence[Recommendation], int], Sequence[int]]
    window: int
    is_greedy: bool = False


class Placed(NamedTuple):
    """An item at its position of a list.

    Attributes:
        item: The item, with its boosted score.
        by: What gave it the position.
        propensity: Probability of the item at this position, after those before it.
        is_best: Whether the item would be there without exploration.
        is_behind: Whether the item is behind the window that was re-ranked.
    """

    item: Recommendation
    by: Literal["score", "promotion", "exploration"] = "score"
    propensity: float = 1.0
    is_best: bool = True
    is_behind: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """The wishes of a request for its list.

    Attributes:
        length: Length of the list.
        where: Conditions of all items.
        boosts: Boosts, in the order in which they are applied.
        promotions: Promotions; their percentages sum to 100 at most.
        max_per: Column -> greatest number of items with one value in it.
        explore: Probability that a position explores.
        seed: Seed of the exploration; None for another list each time.
        reorder: Re-ranking of the best candidates; None where the order of the scores stays.
    """

    length: int
    where: Conditions = ()
    boosts: Sequence[Boost] = ()
    promotions: Sequence[Promotion] = ()
    max_per: Mapping[str, int] = dataclasses.field(default_factory=dict)
    explore: float = 0.0
    seed: int | None = None
    reorder: Reorder | None = None

    @property
    def searches(self) -> int:
        """Number of searches that one look at the candidates takes."""
        return (1 + len(self.promotions)) * (1 + len(self.boosts))


def make_list(retriever: Retriever, search: Search, shape: Shape) -> list[Placed]:
    """Returns a list in its shape.

    Args:
        retriever: Retriever that `search` asks.
        search: Search for the candidates.
        shape: Wishes for the list.
    """
    size = shape.length
    # Each search has its part of what a list may take: without a bound the 289 searches of one
    # request kept a server busy for two minutes.
    share = MAX_CANDIDATES // shape.searches
    most = min(MAX_POOL, max(size, share))

    def find(where: Conditions, k: int) -> list[Recommendation]:
        return search_boosted(retriever, search, where, k, shape.boosts, most)

    count = size
    if shape.explore:
        # Each position draws from a whole hundred, however long the list: a longer list begins with
        # the shorter one, and its pages fit together.
        count += EXPLORED
    if shape.max_per or shape.promotions:
        size *= MULTIPLE
    size = max(size, count)
    ranked = None
    if shape.reorder is not None:
        # Searched apart, as an index that is approximate may find others in a longer search.
        width = min(shape.reorder.window, share, MAX_POOL)
        ranked = _Ranked(shape.reorder, find(shape.where, width), width)
    while True:
        size = min(size, most)
        if ranked is None:
            found = find(shape.where, size)
            candidates = _Found(found, len(found) < size)
        else:
            candidates = ranked.first(count, size, functools.partial(find, shape.where))
        queues = [find((*shape.where, *each.where), size) for each in shape.promotions]
        placed, is_full = _fill(candidates, queues, shape)
        # Caps may have left out so many that the list is short.
        if is_full or candidates.is_all or size == most:
            return placed
        # Fourfold, so that the work of all tries together is a third more than that of the last.
        size *= 4
        count *= 4


class _Found(NamedTuple):
    """The candidates of a list, in their order.

    Attributes:
        items: Candidates.
        is_all: Whether there are no more.
        behind: Position of the first one behind the window that was re-ranked; None without one.
    """

    items: list[Recommendation]
    is_all: bool
    behind: int | None = None


class _Ranked:
    """The candidates of a list whose window is re-ranked."""

    def __init__(self, reorder: Reorder, window: list[Recommendation], width: int):
        """Asks for nothing yet.

        Args:
            reorder: The re-ranking.
            window: Candidates to reorder, best first.
            width: Number of candidates that were searched for.
        """
        self._reorder = reorder
        self._window = window
        self._is_all = len(window) < width

    def first(self, count: int, size: int, find: Callable[[int], list[Recommendation]]) -> _Found:
        """Returns the first candidates, `count` or more where there are so many.

        Args:
            count: Number of candidates.
            size: Number of those that are searched for, where that is beyond the window.
            find: Function that searches for so many, those in the window included.
        """
        window = self._window
        asked = len(window)
        if self._reorder.is_greedy:
            asked = min(asked, count)
        chosen = []
        if window:
            chosen = [window[row] for row in self._reorder.choose(window, asked)]
        # What a re-ranker leaves out of those that it was asked for has no part in the list, such
        # as items beyond a cap; then nothing comes behind its choice either.
        if len(chosen) < asked or (self._is_all and asked == len(window)):
            return _Found(chosen, True)
        if count <= asked:
            return _Found(chosen, False)
        inside = {item.item_id for item in window}
        found = find(size)
        rest = [item for item in found if item.item_id not in inside]
        return _Found([*chosen, *rest], len(found) < size, len(chosen))


def search_boosted(
    retriever: Retriever,
    search: Search,
    where: Conditions,
    k: int,
    boosts: Sequence[Boost],
    most: int = MAX_POOL,
) -> list[Recommendation]:
    """Returns the `k` items of the greatest boosted scores, exactly so as far as `search` is exact.

    Items are taken from the best of all and from the best of each boost. None that was not found
    can have a score above those that it was not found by (the threshold algorithm of Fagin, Lotem
    and Naor 2001); as long as that might still enter the list, more are searched.

    Args:
        retriever: Retriever that knows which items satisfy conditions.
        search: Search for items.
        where: Conditions of all items.
        k: Length of the list.
        boosts: Boosts.
        most: Greatest number of items of one search.
    """
    if not boosts:
        return list(search(k, where))
    asked = k
    while True:
        best = search(asked, where)
        found = {item.item_id: item for item in best}
        # Fewer than asked for are all there are, and nothing unseen is left to be above them.
        bound = -np.inf
        if len(best) == asked:
            bound = best[-1].score
        for boost in boosts:
            best = search(asked, (*where, *boost.where))
            found |= {item.item_id: item for item in best}
            if len(best) == asked:
                # An item that no search has found scores at most as the last one here, before its
                # boosts.
                bound = max(bound, _greatest_boosted(best[-1].score, boosts))
        items = _apply(retriever, list(found.values()), boosts)[:k]
        is_settled = len(items) == k and items[-1].score >= bound
        if is_settled or bound == -np.inf or asked >= most:
            return items
        asked = min(4 * asked, most)


def _greatest_boosted(score: float, boosts: Sequence[Boost]) -> float:
    """Returns the greatest score that boosts can make of one."""
    for boost in boosts:
        score = max(score, boost.apply(score))
    return score


def _apply(
    retriever: Retriever, items: Sequence[Recommendation], boosts: Sequence[Boost]
) -> list[Recommendation]:
    """Returns items with their boosted scores, best first."""
    ids = [item.item_id for item in items]
    scores = [item.score for item in items]
    # All conditions in one look: each item is looked up once, whatever the number of boosts.
    meets = retriever.meets_each(ids, [boost.where for boost in boosts])
    for boost, is_meant in zip(boosts, meets):
        for row in np.flatnonzero(is_meant).tolist():
            scores[row] = boost.apply(scores[row])
    changed = [dataclasses.replace(item, score=score) for item, score in zip(items, scores)]
    # Stable: items of equal scores keep the order of the search.
    return sorted(changed, key=lambda item: -item.score)


class _Caps:
    """The numbers of items of each category that are in a list."""

    def __init__(self, max_per: Mapping[str, int]):
        self._max_per = max_per
        self._counts: collections.Counter[tuple[str, Hashable]] = collections.Counter()
        self._taken: set[str] = set()

    def fit(self, item: Recommendation) -> bool:
        """Whether an item may still come into the list."""
        if item.item_id in self._taken:
            return False
        for column, label in self._labels(item):
            if self._counts[column, label] >= self._max_per[column]:
                return False
        return True

    def take(self, item: Recommendation) -> None:
        """Counts an item of the list."""
        self._taken.add(item.item_id)
        self._counts.update(self._labels(item))

    def _labels(self, item: Recommendation) -> list[tuple[str, Hashable]]:
        labels = []
        for column in self._max_per:
            label = item.display.get(column)
            # A list of tags is one label: that of the whole list.
            if isinstance(label, list):
                label = tuple(label)
            # Items without one may always come.
            if label is not None:
                labels.append((column, label))
        return labels


def _fill(
    found: _Found, queues: Sequence[Sequence[Recommendation]], shape: Shape
) -> tuple[list[Placed], bool]:
    """Returns the list that the positions are filled to, one by one.

    Returns:
        The list, and whether more candidates would leave it as it is.
    """
    caps = _Caps(shape.max_per)
    organic = collections.deque(found.items)
    behind: set[str] = set()
    if found.behind is not None:
        behind = {item.item_id for item in found.items[found.behind :]}
    promoted = [collections.deque(queue) for queue in queues]
    given = [0] * len(promoted)
    draw = random.Random(shape.seed)
    placed: list[Placed] = []
    is_full = True
    while len(placed) < shape.length:
        chosen = None
        number = _due(len(placed) + 1, shape.promotions, given)
        if number >= 0:
            # Also where none of its items is left: the position goes to the others, and is not owed
            # later.
            given[number] += 1
            first = _next(promoted[number], caps, 1)
            chosen = Placed(first[0], "promotion") if first else None
        if chosen is None:
            wanted = EXPLORED if shape.explore else 1
            left = _next(organic, caps, wanted)
            is_full = is_full and len(left) == wanted
            if not left:
                break
            chosen = _draw(left, shape.explore, draw)
            if chosen.item.item_id in behind:
                chosen = chosen._replace(is_behind=True)
        caps.take(chosen.item)
        placed.append(chosen)
    return placed, is_full


def _due(position: int, promotions: Sequence[Promotion], given: Sequence[int]) -> int:
    """Returns the number of the promotion that has a position, counted from 1; -1 for none."""
    chosen = -1
    # Where two promotions are due at once, the one that waits for more goes first; the other has
    # the next position.
    most = 1.0
    for number, promotion in enumerate(promotions):
        # Rounded, as 3 positions of 100 / 3 percent are 1.
        due = round(position * promotion.percent / 100, 6) - given[number]
        if due >= most and (chosen < 0 or due > most):
            chosen = number
            most = due
    return chosen


def _next(
    queue: collections.deque[Recommendation], caps: _Caps, count: int
) -> list[Recommendation]:
    """Returns the first items of a queue that may come into the list."""
    # An item that does not fit now never will: categories only fill.
    while queue and not caps.fit(queue[0]):
        queue.popleft()
    if count == 1:
        return [queue[0]] if queue else []
    left = []
    for item in queue:
        if len(left) == count:
            break
        if caps.fit(item):
            left.append(item)
    return left


def _draw(left: Sequence[Recommendation], explore: float, draw: random.Random) -> Placed:
    """Returns the best item or, with a probability, one drawn from all, with its propensity."""
    if not explore:
        return Placed(left[0])
    explores = draw.random() < explore
    row = draw.randrange(len(left)) if explores else 0
    # The best item is drawn among the others too, with this probability beside its own.
    propensity = explore / len(left)
    if row == 0:
        propensity += 1 - explore
    by = "exploration" if explores else "score"
    return Placed(left[row], by, propensity, row == 0)
