"""Figures of all lists together: how far each of them hangs on each user, which gives intervals.

The mean over users has its interval by resampling them. Coverage has not: a resample leaves out a
third of the users and with them the items that nobody else was shown, so that it always falls; the
Gini coefficient and the share of repeated lists move likewise. Here such a figure becomes a mean
too, of the jackknife's pseudo-values: the figure, and how far it would move without the user. They
are resampled by the counts that all other figures have, about the figure and not beside it.

Where the figure moves by jumps, as coverage does, the interval is rather too wide than too narrow:
Efron and Stein, The jackknife estimate of variance, Annals of Statistics 1981.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.core.arrays import pair_keys

NOBODY = -1
SEVERAL = -2
# Entries of lists that are kept for the interval of the Gini coefficient: of more lists, those of
# some users, evenly spaced, stand for all.
MAX_ENTRIES = 2**22


class Holders:
    """The user whose lists alone hold an item.

    Attributes:
        user: int32 [N]; `NOBODY` of an item in no list, `SEVERAL` of one that two users have.
    """

    def __init__(self, num_items: int):
        self.user = np.full(num_items, NOBODY, np.int32)

    def add(self, items: np.ndarray, users: np.ndarray) -> None:
        """Adds entries of lists, an item and the user of its list each, int [M]."""
        # After a few blocks nearly all items are several users', and nothing more is asked of them.
        is_open = self.user[items] != SEVERAL
        items = items[is_open]
        users = users[is_open]
        is_free = self.user[items] == NOBODY
        # Of two users of one block either may be written: the other is seen below.
        self.user[items[is_free]] = users[is_free]
        self.user[items[self.user[items] != users]] = SEVERAL

    def join(self, other: Holders) -> Holders:
        """Returns the holders of the entries of both."""
        joined = Holders(len(self.user))
        joined.user[:] = np.where(self.user == NOBODY, other.user, self.user)
        is_other = (self.user != NOBODY) & (other.user != NOBODY) & (self.user != other.user)
        joined.user[is_other] = SEVERAL
        return joined

    def changes(self, num_users: int) -> np.ndarray:
        """Returns by how much the coverage falls without each user, float64 [U]."""
        own = self.user[self.user >= 0]
        return np.bincount(own, minlength=num_users) / max(1, len(self.user))


class Users:
    """The users of the queries that are averaged, by numbers from 0.

    Attributes:
        rows: Positions of these queries, int [A].
        owner: Number of the user of each of them, int [A].
        count: Number U of users.
        num_queries: Number Q of all queries.
    """

    def __init__(self, users: np.ndarray, is_averaged: np.ndarray):
        self.rows = np.flatnonzero(is_averaged)
        names, first, self.owner = np.unique(
            users[self.rows], return_index=True, return_inverse=True
        )
        self.count = len(names)
        self._first = first
        self.num_queries = len(users)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Returns the sums of numbers [A] of the queries by user, float64 [U]."""
        return np.bincount(self.owner, values, minlength=self.count)

    def pseudo_values(self, figure: float, changes: np.ndarray) -> np.ndarray:
        """Returns numbers of all queries whose mean over those that are averaged is a figure.

        Args:
            figure: Figure of all lists.
            changes: By how much it falls without each user, float64 [U].

        Returns:
            float64 [Q]. Each user's change stands in one of its queries: users are resampled whole.
        """
        values = np.full(self.num_queries, figure)
        # Centred: all users together move nothing.
        values[self.rows[self._first]] += len(self.rows) * (changes - changes.mean())
        return values


def ratio_changes(
    users: Users, above: np.ndarray, below: np.ndarray, taken: np.ndarray | None = None
) -> np.ndarray:
    """Returns by how much sum(above) / sum(below) falls without each user, float64 [U].

    Args:
        users: Users of the queries.
        above, below: float [A], of each query.
        taken: What a user takes out of `above` besides its own, float [U].
    """
    own = users.sums(above)
    if taken is not None:
        own = own + taken
    left = below.sum() - users.sums(below)
    total = above.sum() / below.sum()
    # The only user that counts: without it there is no figure that could have moved.
    others = np.divide(above.sum() - own, left, out=np.full(users.count, total), where=left > 0)
    return total - others


def repeated_share(users: Users, hashes: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the share of lists whose items are those of another user's list, in any order.

    Args:
        users: Users of the queries.
        hashes: uint64 [A], a hash of the items of each list.

    Returns:
        The share, and by how much it falls without each user.
    """
    if not len(hashes):
        return 0.0, np.zeros(0)
    _, number = np.unique(hashes, return_inverse=True)
    # A user that is asked twice repeats nobody else.
    pairs, lists = np.unique(pair_keys(number, users.owner), return_counts=True)
    group = pairs >> 32
    num_users = np.bincount(group)
    is_repeated = (num_users[number] > 1).astype(float)
    # Of two users with one list, the other one's is repeated no more.
    others = np.where(num_users[group] == 2, np.bincount(number)[group] - lists, 0)
    taken = np.bincount(pairs & (2**32 - 1), others, minlength=users.count)
    changes = ratio_changes(users, is_repeated, np.ones(len(hashes)), taken)
    return float(is_repeated.mean()), changes


class Resampling:
    """What lists leave behind for the intervals of coverage and Gini, while blocks come in."""

    def __init__(self, users: Users, ks: Sequence[int], num_items: int):
        """Begins with no lists.

        Args:
            users: Users of the queries that are averaged.
            ks: Lengths of the lists, rising.
            num_items: Number N of items.
        """
        self._users = users
        # By length, of the ranks that the next smaller one has not.
        self._holders = {k: Holders(num_items) for k in ks}
        self._joined = Holders(num_items)
        # Whole users, whose queries go up and down together.
        step = -(-len(users.rows) * ks[-1] // MAX_ENTRIES)
        self._kept_owner = users.owner[users.owner % max(1, step) == 0]
        self._is_kept = np.zeros(users.num_queries, bool)
        self._is_kept[users.rows] = users.owner % max(1, step) == 0
        self._owner = np.zeros(users.num_queries, np.int32)
        self._owner[users.rows] = users.owner
        self._kept: list[np.ndarray] = []

    def add(self, block: slice, rows: np.ndarray) -> None:
        """Adds the lists of a slice of the queries.

        Args:
            block: Slice of the queries.
            rows: Items of the lists, int [b, K]; -1 where no item is left, and in all of a query
                that is not averaged.
        """
        self._kept.append(rows[self._is_kept[block]].astype(np.int32))
        owner = self._owner[block, None]
        start = 0
        for k, holders in self._holders.items():
            items = rows[:, start:k]
            is_filled = items >= 0
            users = np.broadcast_to(owner, items.shape)
            holders.add(items[is_filled], users[is_filled])
            start = k

    def changes(self, k: int, exposures: np.ndarray, gini: float) -> dict[str, np.ndarray]:
        """Returns by how much figures fall without each user, float64 [U], by their names.

        It is to be asked for the lengths in their order.

        Args:
            k: Length of the lists.
            exposures: Number of them that hold each item, int64 [N].
            gini: Their Gini coefficient.
        """
        self._joined = self._joined.join(self._holders[k])
        # Once, and not for each length: they are most of what an evaluation holds.
        if len(self._kept) > 1:
            self._kept = [np.concatenate(self._kept)]
        lists = self._kept[0][:, :k]
        return {
            "coverage": self._joined.changes(self._users.count),
            "gini": gini_changes(self._users, self._kept_owner, lists, exposures, gini),
        }


def gini_changes(
    users: Users, owner: np.ndarray, lists: np.ndarray, exposures: np.ndarray, gini: float
) -> np.ndarray:
    """Returns by how much the Gini coefficient falls without each user, float64 [U].

    The coefficient is sum_i r_i x_i / ((N - 1) sum_i x_i), r_i = 2 i - N - 1, with rising exposures
    x. Without a list, an item that it holds stands where the first of its equals stood, so that
    r of that place is taken from the numerator.

    Args:
        users: Users of the queries.
        owner: Number of the user of each list, int [L]: of all users, or of some of them.
        lists: Items of the lists, int [L, K], -1 where no item is left.
        exposures: Number of lists that hold each item, int64 [N].
        gini: The coefficient.
    """
    changes = np.zeros(users.count)
    count = len(exposures)
    total = float((count - 1) * exposures.sum())
    # Of one item, or of nothing listed, nothing can be unequal.
    if count < 2 or not total:
        return changes
    before = np.searchsorted(np.sort(exposures), exposures, side="left")
    # Of rank without an item, -1, which takes nothing.
    ranks = np.append(2.0 * before - count + 1, 0.0)
    above = np.bincount(owner, ranks[lists].sum(1), minlength=users.count)
    below = np.bincount(owner, (count - 1.0) * (lists >= 0).sum(1), minlength=users.count)
    is_kept = np.bincount(owner, minlength=users.count) > 0
    left = np.maximum(total - below, 1.0)
    changes = np.where(is_kept, gini - (gini * total - above) / left, 0.0)
    # Few stand for all: about their own mean, and with the sum of squares that all would have.
    changes[is_kept] -= changes[is_kept].mean()
    return changes / np.sqrt(is_kept.mean())
