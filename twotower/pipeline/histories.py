"""The histories of a log: what each user had done before each row, as spans of flat arrays.

The events of all users lie in flat arrays, by user and then in time. A history is a span of them:
two numbers (first event, one after the last), whatever its length. `windows` turns spans into
arrays [N, L], on the host or inside `jit`; `twotower.features.history` names these arrays.

An event is earlier than a row when its time is: events of the same second do not know of each
other. In a log without times the order of the file is the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import index_type, stable_argsort
from twotower.core.arrow import join_chunks, plain_text
from twotower.core.errors import ConfigError
from twotower.data.interactions import PARTS, Split
from twotower.features.base import Fitted
from twotower.features.history import (
    HistoryFeature,
    encode_events,
    read_arrays,
    time_buckets,
)
from twotower.features.inputs import HISTORY_TIME_SINCE_PREVIOUS, HISTORY_TIME_TO_NEXT
from twotower.pipeline.batches import windows

# Part of a split -> the numbers of the parts whose events its rows may know of; "now" stands for a
# user who is served at the end of the log.
KNOWN_PARTS = {"train": (0,), "validation": (0,), "test": (0, 1), "now": (0, 1, 2)}
# Part of a split -> the events that it reads. Validation rows know what training rows know.
EVENTS_READ_BY = {"train": "train", "validation": "train", "test": "test"}
# Part of a split -> the events that hold its own rows too.
_LEVEL_WITH = {"train": "train", "validation": "test", "test": "now"}

# Rows whose spans are made at once.
MAX_EVENTS = 2**31 - 1  # that int32 numbers, of all levels together
_BLOCK = 2**19


@dataclasses.dataclass(frozen=True, eq=False)
class Histories:
    """The events of a log, and the histories that they make.

    Attributes:
        feature: The history feature.
        events: Array name -> [M, ...], one entry for each event; the events that training rows know
            of come first.
        reads: Array name -> [V, ...], the features of an item that are read beside its id, by the
            row of the id.
        offsets: "train", "test" or "now" -> int64 [U + 1], the first event of each user.
        orders: The same keys -> int32 [events], the position of each event among the rows of all
            parts joined.
        spans: Part -> int32 [rows, 2 or 3], the history of each of its rows: first event, one after
            the last and, where the feature has a `request_gap`, the bucket of the time from the
            last event to the row.
        times: int64 [M], the time of each event in seconds; empty in a log without times, and where
            the feature has neither `gaps` nor a `request_gap`.
    """

    feature: HistoryFeature
    events: Mapping[str, np.ndarray]
    reads: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]
    orders: Mapping[str, np.ndarray]
    spans: Mapping[str, np.ndarray]
    times: np.ndarray

    @property
    def length(self) -> int:
        """The events L that a history has at most."""
        return self.feature.max_length

    @property
    def training_events(self) -> dict[str, np.ndarray]:
        """The events that training rows know of."""
        count = len(self.orders["train"])
        return {name: values[:count] for name, values in self.events.items()}

    def take(self, spans: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays [N, L, ...] of the histories at `spans`."""
        return windows(self.events, self.reads, spans, self.length)

    def latest_spans(
        self, users: np.ndarray, request_times: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the spans int32 [N, 2 or 3] of users' histories at the end of the log.

        Args:
            users: Rows [N] of the users table.
            request_times: Times [N] in seconds at which recommendations are requested; by default
                the newest time of the log.
        """
        users = np.asarray(users)
        offsets = self.offsets["now"]
        # The end of the log is now: by the clock every user would have been away for as long as the
        # log is old.
        if request_times is None:
            request_times = self.times.max(initial=0)
        return _spans(self.feature, offsets[users], offsets[users + 1], self.times, request_times)

    def rolled_spans(
        self, part: str, users: Sequence[np.ndarray], times: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        """Returns the spans int32 [rows, 2 or 3] of the rows of a part, by all rows before them.

        Those of `spans` know nothing of the other rows of a held-out part.

        Args:
            part: "train", "validation" or "test".
            users: Row of the users table of each row of train, validation and test.
            times: Time in seconds of each row of the same parts; None in a log without times.
        """
        number = PARTS.index(part)
        level = _LEVEL_WITH[part]
        order = self.orders[level]
        # Rows of the parts before, which come first in the joined arrays.
        known = [len(users[other]) for other in range(number)]
        first = sum(known)
        user = np.concatenate(users)[order]
        is_later = np.ones(len(order), bool)
        time = _join_times(users, times)
        if time is not None:
            same_time = time[order][1:] == time[order][:-1]
            is_later[1:] = (user[1:] != user[:-1]) | ~same_time
        # Where each moment begins, as events of one moment do not know of each other.
        begin_of_moment = np.maximum.accumulate(np.where(is_later, np.arange(len(order)), 0))
        rank = np.empty(sum(map(len, users)), np.int64)
        rank[order] = np.arange(len(order))
        own = rank[first : first + len(users[number])]
        offsets = self.offsets[level]
        row_times = np.nan
        if time is not None:
            row_times = time[first : first + len(users[number])]
        end = offsets[0] + begin_of_moment[own]
        return _spans(self.feature, offsets[users[number]], end, self.times, row_times)

    def to_requests(self, raw: Split) -> pa.Array:
        """Returns the raw histories of all users at the end of the log, as requests bring them.

        Args:
            raw: The split that the histories were built from.
        """
        num_users = len(self.offsets["now"]) - 1
        return self.requests_at(raw, self.latest_spans(np.arange(num_users)))

    def requests_at(self, raw: Split, spans: np.ndarray) -> pa.Array:
        """Returns the raw histories at some spans, as requests bring them.

        Args:
            raw: The split that the histories were built from.
            spans: Spans int32 [N, 2 or 3], all of rows of one part or of the end of the log.
        """
        log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
        lengths = spans[:, 1] - spans[:, 0]
        # An empty span tells nothing of its level.
        starts = spans[lengths > 0, 0]
        level = "train"
        # The events of a level follow those of the level before.
        for name, offsets in self.offsets.items():
            if len(starts) and offsets[0] <= starts[0] < offsets[-1]:
                level = name
        ends = np.cumsum(lengths)
        total = ends[-1] if len(ends) else 0
        events = np.repeat(spans[:, 0] - (ends - lengths), lengths) + np.arange(total)
        rows = pa.array(self.orders[level][events - self.offsets[level][0]])
        fields = ["item_id"]
        if self.feature.weights:
            fields.append("event")
        if self.feature.reads_times:
            fields.append("timestamp")
        columns = []
        for name in fields:
            taken = plain_text(log[name].take(rows))
            columns.append(join_chunks(taken))
        # A bare list of ids where nothing else is read, as requests bring it.
        values = columns[0]
        if len(columns) > 1:
            values = pa.StructArray.from_arrays(columns, fields)
        offsets = np.append(0, ends).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values)


def build_histories(
    feature: HistoryFeature,
    fitted: Fitted,
    raw: Split,
    users: Sequence[np.ndarray],
    times: Sequence[np.ndarray | None],
    num_users: int,
) -> Histories:
    """Builds the histories of the rows of a split.

    Args:
        feature: The history feature.
        fitted: The state that the encoder fitted for it.
        raw: The interactions.
        users: Row of the users table of each row of train, validation and test.
        times: Time in seconds of each row of the same parts; None in a log without times.
        num_users: Rows U of the users table.

    Raises:
        ConfigError: The log lacks a column that the feature reads.
    """
    rows = _rows_by_user(feature, fitted, raw, users, times)
    offsets: dict[str, np.ndarray] = {}
    orders: dict[str, np.ndarray] = {}
    times_of_levels: list[np.ndarray] = []
    start = 0
    # Three levels, each sorted by user: a span must be one piece whatever it may know of. Rows of
    # training lie in all of them, which costs memory and saves a mask at every read.
    for name in ("train", "test", "now"):
        is_known = rows.are_known_to(name)
        if rows.time is not None:
            times_of_levels.append(rows.time[is_known])
        orders[name] = rows.order if is_known.all() else rows.order[is_known]
        # By user: each user's events begin where those of the users before end.
        bounds = np.searchsorted(rows.user[is_known], np.arange(num_users + 1))
        offsets[name] = start + bounds
        start += len(orders[name])
    if start > MAX_EVENTS:
        raise ConfigError(
            f"{feature.location}: the histories of this log hold {start:,} events, in three "
            f"levels, and more than {MAX_EVENTS:,} cannot be numbered. Train on the latest rows: "
            "config.data.where=[('timestamp', '>=', ...)]."
        )
    events = {}
    # Taken out one by one, so that a column is freed before the next one is joined.
    for array in [*rows.columns]:
        events[array] = _join_levels(rows.columns.pop(array), rows, orders)
    # Per level: the event before is another one where more events are known.
    blocks = [_time_arrays(feature, known) for known in times_of_levels]
    for array in blocks[0] if blocks else ():
        events[array] = np.concatenate([block[array] for block in blocks])
    event_times = np.concatenate([np.zeros(0, np.int64), *times_of_levels])
    spans = {}
    first_row = 0
    for number, (name, level) in enumerate(EVENTS_READ_BY.items()):
        spans[name] = _spans_of_part(
            feature, rows, number, offsets[level], rows.count_earlier(level), event_times, first_row
        )
        first_row += len(spans[name])
    reads = read_arrays(feature, fitted)
    return Histories(feature, events, reads, offsets, orders, spans, event_times)


def _join_levels(
    values: np.ndarray, rows: _RowsByUser, orders: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the values of the rows that each level knows, one level after the other."""
    lengths = [len(order) for order in orders.values()]
    joined = np.empty((sum(lengths), *values.shape[1:]), values.dtype)
    starts = np.cumsum([0, *lengths])
    for name, start, length in zip(orders, starts, lengths):
        joined[start : start + length] = values[rows.are_known_to(name)]
    return joined


@dataclasses.dataclass(frozen=True, eq=False)
class _RowsByUser:
    """The rows of all parts by user, then in time, then as the file has them.

    In this order running counts tell each row's past, which otherwise is searched for.

    Attributes:
        order: int32 [N], position of each among the joined rows of the parts.
        part: int8 [N], number of the part of each.
        user: int32 [N], row of the users table.
        is_same_moment: bool [N], whether user and time are those of the row before.
        time: int64 [N], seconds; None where the feature keeps no times.
        columns: Array name -> [N, ...], the row as an event.
    """

    order: np.ndarray
    part: np.ndarray
    user: np.ndarray
    is_same_moment: np.ndarray
    time: np.ndarray | None
    columns: dict[str, np.ndarray]

    def are_known_to(self, level: str) -> np.ndarray:
        """Marks the rows that those of a part may know of: bool [N]."""
        is_known = np.isin(np.arange(3), KNOWN_PARTS[level])
        return is_known[self.part]

    def count_earlier(self, level: str) -> np.ndarray:
        """Returns the known rows of all users before the moment of each row, int32 [N].

        Of the rows of one moment none counts another, nor a row itself.
        """
        counts = np.zeros(len(self.part) + 1, np.int32)
        np.cumsum(self.are_known_to(level), out=counts[1:])
        counts = counts[:-1]
        # The counts never fall: the greatest of those that begin a moment is that of the last.
        counts[self.is_same_moment] = 0
        return np.maximum.accumulate(counts, out=counts)


def _rows_by_user(
    feature: HistoryFeature,
    fitted: Fitted,
    raw: Split,
    users: Sequence[np.ndarray],
    times: Sequence[np.ndarray | None],
) -> _RowsByUser:
    """Sorts the joined rows of a split; see `build_histories` and `_RowsByUser`."""
    log = pa.concat_tables(raw.tables, promote_options="default")
    time = _join_times(users, times)
    check_columns(feature, log, has_times=time is not None)
    event_names = log["event"] if "event" in log.column_names else None
    columns = encode_events(feature, fitted, log["item_id"], event_names, time)
    user = np.concatenate(users).astype(np.int32, copy=False)
    order = _order(user, time, raw)
    user = user[order]
    for name, values in columns.items():
        columns[name] = values[order]
    ends = np.cumsum([len(raw.train), len(raw.validation)])
    part = (order >= ends[0]).astype(np.int8)
    part += order >= ends[1]
    # Without times each row is a moment of its own.
    is_same = np.zeros(len(order), bool)
    if time is not None:
        time = time[order]
        is_same[1:] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    # Eight bytes an event that nothing would read.
    if not keeps_times(feature):
        time = None
    return _RowsByUser(order, part, user, is_same, time, columns)


def _order(user: np.ndarray, time: np.ndarray | None, raw: Split) -> np.ndarray:
    """Returns the joined rows by user, then in time, then as the file has them, int32 [N]."""
    order = None
    # The last key is the first to sort by: each sort is stable.
    for keys in (raw.joined_file_positions(), time, user):
        if keys is None:
            continue
        ordered = keys if order is None else keys[order]
        # Files are in order already, and so are the times of most.
        if (ordered[:-1] <= ordered[1:]).all():
            continue
        by_key = stable_argsort(ordered).astype(index_type(len(ordered)))
        order = by_key if order is None else order[by_key]
    if order is None:
        order = np.arange(len(user), dtype=index_type(len(user)))
    return order


def keeps_times(feature: HistoryFeature) -> bool:
    """Returns whether the feature reads the times between events, or from one to the request."""
    return bool(feature.gaps or feature.request_gap)


def _spans_of_part(
    feature: HistoryFeature,
    rows: _RowsByUser,
    number: int,
    offsets: np.ndarray,
    earlier: np.ndarray,
    event_times: np.ndarray,
    first_row: int,
) -> np.ndarray:
    """Returns the spans int32 [rows, 2 or 3] of the rows of a part.

    Args:
        feature: The history feature.
        rows: Rows of all parts.
        number: Number of the part.
        offsets: First event of each user among those that the part reads, int64 [U + 1].
        earlier: Number of these events before each row of all parts, int32 [N].
        event_times: Time of each event in seconds; empty where the feature keeps none.
        first_row: Position of the part's first row among the joined rows.
    """
    count = np.count_nonzero(rows.part == number)
    spans = np.zeros((count, 3 if feature.request_gap else 2), np.int32)
    for start in range(0, len(rows.part), _BLOCK):
        positions = start + np.flatnonzero(rows.part[start : start + _BLOCK] == number)
        begin = offsets[rows.user[positions]]
        end = offsets[0] + earlier[positions]
        row_times = np.nan if rows.time is None else rows.time[positions]
        block = _spans(feature, begin, end, event_times, row_times)
        spans[rows.order[positions] - first_row] = block
    return spans


def _join_times(
    users: Sequence[np.ndarray], times: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Returns the times of all parts, or None where a part that has rows has no times."""
    for part_users, part_times in zip(users, times):
        # An empty part has no times, and takes none from the others.
        if len(part_users) and part_times is None:
            return None
    return np.concatenate([part_times for part_times in times if part_times is not None])


def _time_arrays(feature: HistoryFeature, times: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the buckets of the times to the neighbours of events in order.

    Between the events of two users they mean nothing: `windows` reads neither.
    """
    arrays = {}
    if feature.gaps:
        since_previous = np.diff(times, prepend=times[:1])
        arrays[HISTORY_TIME_SINCE_PREVIOUS] = time_buckets(feature, since_previous)
    if feature.request_gap:
        to_next = np.diff(times, append=times[-1:])
        arrays[HISTORY_TIME_TO_NEXT] = time_buckets(feature, to_next)
    return arrays


def _spans(
    feature: HistoryFeature,
    begin: np.ndarray,
    end: np.ndarray,
    times: np.ndarray,
    request_times: Any,
) -> np.ndarray:
    """Returns the spans int32 [N, 2 or 3] of the last L events within [begin, end).

    Args:
        feature: The history feature.
        begin: First event [N] of each user.
        end: One after the last event [N].
        times: Times [M] of the events in seconds; empty without.
        request_times: One number or [N], the time of the request after each history.
    """
    # The latest events of a long history.
    columns = [np.maximum(begin, end - feature.max_length), end]
    if feature.request_gap:
        # The NaN stands for the last event of nobody, where there is no event at all.
        last_times = np.append(times, np.nan)[np.maximum(end, 1) - 1]
        buckets = time_buckets(feature, request_times - last_times)
        columns.append(np.where(end > begin, buckets, 0))
    return np.stack(columns, axis=1).astype(np.int32)


def check_columns(feature: HistoryFeature, log: pa.Table, *, has_times: bool) -> None:
    """Refuses a log that lacks what a history reads of its events.

    Args:
        feature: The history feature.
        log: Rows of the log, of which the columns are looked at.
        has_times: Whether its rows have times.

    Raises:
        ConfigError: There are no kinds of events, or no times.
    """
    if feature.weights and "event" not in log.column_names:
        raise ConfigError(
            f"{feature.location}.weights={dict(feature.weights)} needs a column 'event' of the "
            "interactions."
        )
    for field in ("gaps", "half_life"):
        value = getattr(feature, field)
        if value and not has_times:
            raise ConfigError(
                f"{feature.location}.{field}={value} needs a time in every row; this log has none."
            )
