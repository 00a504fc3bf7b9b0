"""The log of the generated shop: sessions of shoppers, and what they look at, put in their carts
and buy."""

from __future__ import annotations

import dataclasses

import numpy as np

START = 1_735_689_600  # 2025-01-01 00:00 UTC, a Wednesday
DAYS = 90
EVENTS = ("view", "add_to_cart", "purchase")
CART_RATE, PURCHASE_RATE = 0.22, 0.45  # of views, and of carts
SESSION_VIEWS = 4.0
_CHUNK = 500_000


@dataclasses.dataclass(frozen=True)
class Log:
    """The rows, in order of time: [N] each."""

    user: np.ndarray
    item: np.ndarray
    event: np.ndarray
    time: np.ndarray


def draw_log(
    rng: np.random.Generator,
    rows: int,
    *,
    theta: np.ndarray,
    phi: np.ndarray,
    joined: np.ndarray,
    created: np.ndarray,
    activity: np.ndarray,
) -> Log:
    """Exactly `rows` events of shoppers with mixtures theta [U, T] over tastes phi [T, I].

    Args:
        joined, created: int64 [U] and [I] seconds; nobody acts and nothing is seen before.
        activity: float [U], how many sessions a shopper has relative to others.
    """
    views = rows  # more than enough: some views add a cart and a purchase
    session, user, start = _sessions(rng, views, joined, activity)
    carts = rng.random(views) < CART_RATE
    length = (1 + carts + (carts & (rng.random(views) < PURCHASE_RATE))).astype(np.int8)
    views = int(np.searchsorted(np.cumsum(length, dtype=np.int64), rows)) + 1
    session, length = session[:views], length[:views]
    row_view = np.repeat(np.arange(views, dtype=np.int32), length)
    first_row = np.cumsum(length, dtype=np.int64) - length
    event = (np.arange(len(row_view)) - first_row[row_view]).astype(np.int8)
    row_session = session[row_view]
    time = start[row_session] + _since_start(rng, row_session)
    item = _draw_items(rng, user[session], time[first_row], theta, created, phi)[row_view]
    order = np.argsort(time[:rows], kind="stable")
    return Log(
        user=user[row_session][order], item=item[order], event=event[order], time=time[order]
    )


def _sessions(
    rng: np.random.Generator, views: int, joined: np.ndarray, activity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """session int32 [views] of each view; user int32 and start int64 of each session. Every user's
    first come first."""
    lengths = rng.geometric(1 / SESSION_VIEWS, views)
    count = int(np.searchsorted(np.cumsum(lengths), views)) + 1
    session = np.repeat(np.arange(count, dtype=np.int32), lengths[:count])[:views]
    hours, passed = _rhythm(rng)
    present_from = np.interp(joined - START, hours, passed)
    weight = np.cumsum(activity * (1 - present_from))
    everyone = rng.permutation(len(weight))[:count]
    drawn = np.searchsorted(weight, rng.random(count - len(everyone)) * weight[-1])
    user = np.concatenate([everyone, np.minimum(drawn, len(weight) - 1)]).astype(np.int32)
    moment = present_from[user] + rng.random(count) * (1 - present_from[user])
    begins = START + np.interp(moment, passed, hours).astype(np.int64)
    return session, user, np.maximum(begins, joined[user])


def _rhythm(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each full hour since the start, and the share of sessions that start before it."""
    hour = np.arange(DAYS * 24)
    daily = np.array(
        [3, 2, 1, 1, 1, 2, 4, 6, 8, 9, 10, 10, 11, 10, 9, 9, 10, 12, 14, 17, 19, 18, 13, 7], float
    )
    weekly = np.array(
        [1.0, 1.1, 1.4, 1.3, 0.9, 0.9, 0.95]
    )  # from Wednesday: the weekend is Friday and Saturday
    weight = daily[hour % 24] * weekly[hour // 24 % 7] * np.exp(rng.normal(0, 0.1, len(hour)))
    return np.arange(DAYS * 24 + 1) * 3600.0, np.concatenate(
        [[0], np.cumsum(weight) / weight.sum()]
    )


def _since_start(rng: np.random.Generator, session: np.ndarray) -> np.ndarray:
    """int64 [N]: seconds from the start of its session to each row; rows of a session lie together,
    minutes apart."""
    gaps = 5 + rng.exponential(90, len(session)).astype(np.int64)
    passed = np.cumsum(gaps)
    first = np.flatnonzero(np.diff(session, prepend=-1))
    return passed - np.repeat(passed[first], np.diff(first, append=len(session)))


def _draw_items(
    rng: np.random.Generator,
    user: np.ndarray,
    time: np.ndarray,
    theta: np.ndarray,
    created: np.ndarray,
    phi: np.ndarray,
) -> np.ndarray:
    """int32 [M]: an item for each view, from theta @ phi over the items that exist at its time."""
    item = np.empty(len(user), np.int32)
    cumulative = np.cumsum(phi, axis=1, dtype=np.float64)
    for start in range(0, len(user), _CHUNK):
        todo = np.arange(start, min(start + _CHUNK, len(user)))
        while len(
            todo
            # What does not exist yet is drawn again, taste and all: that renormalises the mixture
            # exactly.
        ):
            item[todo] = _draw(rng, theta[user[todo]], cumulative)
            todo = todo[created[item[todo]] > time[todo]]
    return item


def _draw(rng: np.random.Generator, theta: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    """int32 [M] from theta [M, T] and the tastes' cumulative distributions [T, I], by inverting
    both."""
    mixture = np.cumsum(theta, axis=1)
    taste = np.minimum(
        (mixture < rng.random((len(theta), 1)) * mixture[:, -1:]).sum(axis=1), theta.shape[1] - 1
    )
    uniform = rng.random(len(theta))
    item = np.empty(len(theta), np.int32)
    for t in range(theta.shape[1]):
        rows = np.flatnonzero(taste == t)
        item[rows] = np.searchsorted(cumulative[t], uniform[rows] * cumulative[t, -1], side="right")
    return np.minimum(item, cumulative.shape[1] - 1)
