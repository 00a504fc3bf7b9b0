"""The log of the generated shop: sessions of views, carts and purchases.

Rows of a session are views of items; some views are followed by a cart, some carts by a purchase.
"""

from __future__ import annotations

import dataclasses

import numpy as np

START = 1_735_689_600  # 2025-01-01 00:00 UTC, a Wednesday
DAYS = 90
SECONDS_A_DAY = 86_400
EVENTS = ("view", "add_to_cart", "purchase")
CART_RATE = 0.22  # of views
PURCHASE_RATE = 0.45  # of carts
VIEWS_IN_SESSION = 4.0  # on average
# Users or views that are drawn at once, so that memory does not grow with the log.
BLOCK = 500_000

# Sessions by hour of the day.
HOURLY = (3, 2, 1, 1, 1, 2, 4, 6, 8, 9, 10, 10, 11, 10, 9, 9, 10, 12, 14, 17, 19, 18, 13, 7)
# Sessions by day of the week, from Wednesday: the weekend is Friday and Saturday.
WEEKLY = (1.0, 1.1, 1.4, 1.3, 0.9, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Log:
    """The rows of a log in order of time, [N] each.

    Attributes:
        user: int32, row of the users table.
        item: int32, row of the items table.
        event: int8, number in `EVENTS`.
        time: int64, seconds since the epoch.
    """

    user: np.ndarray
    item: np.ndarray
    event: np.ndarray
    time: np.ndarray


def draw_log(
    rng: np.random.Generator,
    num_rows: int,
    *,
    mixture: np.ndarray,
    tastes: np.ndarray,
    joined: np.ndarray,
    created: np.ndarray,
    activity: np.ndarray,
) -> Log:
    """Draws exactly `num_rows` events.

    The order of the draws must not change: a seed would give another log.

    Args:
        rng: Source of random numbers.
        num_rows: Number of events of the log.
        mixture: Share of each taste of a shopper, float32 [U, T].
        tastes: Distribution of each taste over the items, float32 [T, I].
        joined: Time in seconds from which on a shopper visits, int64 [U].
        created: Time in seconds from which on an item can be seen, int64 [I].
        activity: Number of sessions of a shopper relative to others, float [U].
    """
    # As many views as rows are more than enough: some views add a cart and a purchase.
    num_views = num_rows
    session_of_view, user_of_session, start = _draw_sessions(rng, num_views, joined, activity)
    # Drawn for all views: how many of them are needed is known only with their carts.
    has_cart = rng.random(num_views) < CART_RATE
    has_purchase = has_cart & (rng.random(num_views) < PURCHASE_RATE)
    num_events = (1 + has_cart + has_purchase).astype(np.int8)
    # The first view whose events complete the rows.
    num_views = int(np.searchsorted(np.cumsum(num_events, dtype=np.int64), num_rows)) + 1
    session_of_view = session_of_view[:num_views]
    num_events = num_events[:num_views]

    # From here on one entry a row.
    view = np.repeat(np.arange(num_views, dtype=np.int32), num_events)
    first_row = np.cumsum(num_events, dtype=np.int64) - num_events
    event = (np.arange(len(view)) - first_row[view]).astype(np.int8)
    session = session_of_view[view]
    time = start[session] + _draw_time_in_session(rng, session)

    user_of_view = user_of_session[session_of_view]
    item_of_view = _draw_items(rng, user_of_view, time[first_row], mixture, created, tastes)
    # Stable: events of one second keep one order on every machine.
    order = np.argsort(time[:num_rows], kind="stable")
    return Log(
        user=user_of_session[session][order],
        item=item_of_view[view][order],
        event=event[order],
        time=time[order],
    )


def draw_arrivals(rng: np.random.Generator, count: int, late_share: float) -> np.ndarray:
    """Draws the times at which shoppers join, or items appear: int64 [count], in seconds.

    A share of them lies within the period of the log, the others in the two years before it.
    """
    before = START - rng.integers(1, 2 * 365 * SECONDS_A_DAY, count)
    # Not in the last days, so that everybody has time to do something.
    within = START + rng.integers(1, int(0.97 * DAYS * SECONDS_A_DAY), count)
    # Both are drawn for everyone: one draw each, whatever the share.
    return np.where(rng.random(count) < late_share, within, before)


def _draw_sessions(
    rng: np.random.Generator, num_views: int, joined: np.ndarray, activity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws sessions, of which the first ones are one for each user, so that nobody has none.

    Returns:
        The session of each view, int32 [views], and the user and the start in seconds of each
        session, int32 and int64 [sessions].
    """
    # Geometric with that mean: each view is the last one with the same probability.
    lengths = rng.geometric(1 / VIEWS_IN_SESSION, num_views)
    count = int(np.searchsorted(np.cumsum(lengths), num_views)) + 1
    session = np.repeat(np.arange(count, dtype=np.int32), lengths[:count])[:num_views]
    hours, started_share = _draw_rhythm(rng)
    # A user is there from a moment on that is measured in sessions, not in hours.
    joined_share = np.interp(joined - START, hours, started_share)
    weight = np.cumsum(activity * (1 - joined_share))
    everyone = rng.permutation(len(weight))[:count]
    others = np.searchsorted(weight, rng.random(count - len(everyone)) * weight[-1])
    user = np.concatenate([everyone, np.minimum(others, len(weight) - 1)]).astype(np.int32)
    moment = joined_share[user] + rng.random(count) * (1 - joined_share[user])
    start = START + np.interp(moment, started_share, hours).astype(np.int64)
    # Interpolation rounds, so a session may begin a second too early.
    return session, user, np.maximum(start, joined[user])


def _draw_rhythm(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the seconds of each full hour, and the share of sessions that start before it."""
    hour = np.arange(DAYS * 24)
    by_hour = np.array(HOURLY, float)[hour % 24]
    by_day = np.array(WEEKLY)[hour // 24 % 7]
    weight = by_hour * by_day * np.exp(rng.normal(0, 0.1, len(hour)))
    started_share = np.concatenate([[0], np.cumsum(weight) / weight.sum()])
    return np.arange(DAYS * 24 + 1) * 3600.0, started_share


def _draw_time_in_session(rng: np.random.Generator, session: np.ndarray) -> np.ndarray:
    """Draws the seconds from the start of a session to each of its rows, minutes apart.

    Args:
        rng: Source of random numbers.
        session: int32 [N], session of each row; rows of a session lie together.
    """
    # At least five seconds, so that the events of a session are never of one second.
    intervals = 5 + rng.exponential(90, len(session)).astype(np.int64)
    passed = np.cumsum(intervals)
    first_rows = np.flatnonzero(np.diff(session, prepend=-1))
    rows_in_session = np.diff(first_rows, append=len(session))
    return passed - np.repeat(passed[first_rows], rows_in_session)


def _draw_items(
    rng: np.random.Generator,
    user: np.ndarray,
    time: np.ndarray,
    mixture: np.ndarray,
    created: np.ndarray,
    tastes: np.ndarray,
) -> np.ndarray:
    """Draws an item for each view, int32 [M], from mixture @ tastes over the items of its time."""
    item = np.empty(len(user), np.int32)
    # float64: in float32, sums over 100,000 items could leave some of them no share at all.
    cumulative = np.cumsum(tastes, axis=1, dtype=np.float64)
    for start in range(0, len(user), BLOCK):
        views = np.arange(start, min(start + BLOCK, len(user)))
        # What does not exist yet is drawn again, taste and all: that renormalises the mixture
        # exactly.
        while len(views):
            item[views] = _draw_from_mixture(rng, mixture[user[views]], cumulative)
            views = views[created[item[views]] > time[views]]
    return item


def _draw_from_mixture(
    rng: np.random.Generator, mixture: np.ndarray, cumulative: np.ndarray
) -> np.ndarray:
    """Draws items by inverting two cumulative distributions: first a taste, then its item.

    Args:
        rng: Source of random numbers.
        mixture: Share of each taste, float32 [M, T].
        cumulative: Cumulative distributions of the tastes, float64 [T, I].

    Returns:
        int32 [M].
    """
    num_draws, num_tastes = mixture.shape
    num_items = cumulative.shape[1]
    bounds = np.cumsum(mixture, axis=1)
    target = rng.random((num_draws, 1)) * bounds[:, -1:]
    # Rounding may let a target pass the last bound.
    taste = np.minimum((bounds < target).sum(axis=1), num_tastes - 1)
    uniform = rng.random(num_draws)
    item = np.empty(num_draws, np.int32)
    for t in range(num_tastes):
        rows = np.flatnonzero(taste == t)
        target = uniform[rows] * cumulative[t, -1]
        item[rows] = np.searchsorted(cumulative[t], target, side="right")
    return np.minimum(item, num_items - 1)
