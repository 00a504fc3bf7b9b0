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

from twotower.core.arrays import stable_argsort
from twotower.core.arrow import join_chunks, plain_text
from twotower.core.errors import ConfigError
from twotower.data.interactions import Split
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
_EVENTS_READ_BY = {"train": "train", "validation": "train", "test": "test"}


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
        orders: The same keys -> int64 [events], the position of each event among the rows of all
            parts joined.
        spans: Part -> int32 [rows, 2 or 3], the history of each of its rows: first event, one after
            the last and, where the feature has a `request_gap`, the bucket of the time from the
            last event to the row.
        times: int64 [M], the time of each event in seconds; empty in a log without times.
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
        if request_times is None:
            request_times = self.times.max(initial=0)
        return _spans(self.feature, offsets[users], offsets[users + 1], self.times, request_times)

    def to_requests(self, raw: Split) -> pa.Array:
        """Returns the raw histories of all users at the end of the log, as requests bring them.

        Args:
            raw: The split that the histories were built from.
        """
        log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
        num_users = len(self.offsets["now"]) - 1
        spans = self.latest_spans(np.arange(num_users))
        lengths = spans[:, 1] - spans[:, 0]
        ends = np.cumsum(lengths)
        total = ends[-1] if len(ends) else 0
        events = np.repeat(spans[:, 0] - (ends - lengths), lengths) + np.arange(total)
        rows = pa.array(self.orders["now"][events - self.offsets["now"][0]])
        fields = ["item_id"]
        if self.feature.weights:
            fields.append("event")
        if self.feature.reads_times:
            fields.append("timestamp")
        columns = []
        for name in fields:
            taken = plain_text(log[name].take(rows))
            columns.append(join_chunks(taken))
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
    log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
    user = np.concatenate(users)
    time = _join_times(users, times)
    _check_columns(feature, log, has_times=time is not None)
    event_names = log["event"] if "event" in log.column_names else None
    columns = encode_events(feature, fitted, log["item_id"], event_names, time)
    rows = _rows_by_user(user, time, columns, raw)

    offsets: dict[str, np.ndarray] = {}
    orders: dict[str, np.ndarray] = {}
    blocks: list[dict[str, np.ndarray]] = []
    moments = [np.zeros(0)]
    start = 0
    for name in ("train", "test", "now"):
        is_known = rows.are_known_to(name)
        block = {array: values[is_known] for array, values in rows.columns.items()}
        if rows.time is not None:
            moments.append(rows.time[is_known])
            block |= _time_arrays(feature, moments[-1])
        orders[name] = rows.order[is_known]
        counts = np.bincount(rows.user[is_known], minlength=num_users)
        offsets[name] = start + np.append(0, np.cumsum(counts))
        blocks.append(block)
        start += len(orders[name])

    events = {array: np.concatenate([block[array] for block in blocks]) for array in blocks[0]}
    event_times = np.concatenate(moments[1:] or moments)
    spans = {}
    part_start = 0
    for number, (name, level) in enumerate(_EVENTS_READ_BY.items()):
        positions = np.flatnonzero(rows.part == number)
        begin = offsets[level][rows.user[positions]]
        end = offsets[level][0] + rows.count_earlier(level)[positions]
        row_times = np.nan if rows.time is None else rows.time[positions]
        by_user = _spans(feature, begin, end, event_times, row_times)
        spans[name] = np.empty_like(by_user)
        spans[name][rows.order[positions] - part_start] = by_user
        part_start += len(by_user)
    reads = read_arrays(feature, fitted)
    return Histories(feature, events, reads, offsets, orders, spans, event_times)


@dataclasses.dataclass(frozen=True, eq=False)
class _RowsByUser:
    """The rows of all parts by user, then in time, then as the file has them.

    In this order running counts tell each row's past, which otherwise is searched for.

    Attributes:
        order: int64 [N], position of each among the joined rows of the parts.
        part: int8 [N], number of the part of each.
        user: int32 [N], row of the users table.
        time: int64 [N], seconds; None in a log without times.
        columns: Array name -> [N, ...], the row as an event.
    """

    order: np.ndarray
    part: np.ndarray
    user: np.ndarray
    time: np.ndarray | None
    columns: Mapping[str, np.ndarray]

    def are_known_to(self, level: str) -> np.ndarray:
        """Marks the rows that those of a part may know of: bool [N]."""
        is_known = np.isin(np.arange(3), KNOWN_PARTS[level])
        return is_known[self.part]

    def count_earlier(self, level: str) -> np.ndarray:
        """Returns the known rows of all users before the moment of each row, int32 [N].

        Of the rows of one moment none counts another, nor a row itself.
        """
        # int32 as spans are.
        counts = np.cumsum(self.are_known_to(level), dtype=np.int32)
        counts = np.append(np.int32(0), counts[:-1])
        # Without times each row is a moment of its own.
        if self.time is None:
            return counts
        is_same = (self.user[1:] == self.user[:-1]) & (self.time[1:] == self.time[:-1])
        # The counts never fall: the greatest of those that begin a moment is that of the last.
        counts[1:][is_same] = 0
        return np.maximum.accumulate(counts)


def _rows_by_user(
    user: np.ndarray,
    time: np.ndarray | None,
    columns: Mapping[str, np.ndarray],
    raw: Split,
) -> _RowsByUser:
    """Sorts the joined rows of a split; see `_RowsByUser`."""
    # The file is in order already, and so is the time of most logs.
    order = stable_argsort(raw.joined_file_positions())
    for keys in (time, user):
        if keys is not None:
            by_key = keys[order]
            order = order[stable_argsort(by_key)]
    ends = np.cumsum([len(raw.train), len(raw.validation)])
    part = np.searchsorted(ends, order, side="right").astype(np.int8)
    if time is not None:
        time = time[order]
    columns = {array: values[order] for array, values in columns.items()}
    return _RowsByUser(order, part, user[order], time, columns)


def _join_times(
    users: Sequence[np.ndarray], times: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Returns the times of all parts, or None where a part that has rows has no times."""
    for part_users, part_times in zip(users, times):
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
    columns = [np.maximum(begin, end - feature.max_length), end]
    if feature.request_gap:
        # The NaN stands for the last event of nobody, where there is no event at all.
        last_times = np.append(times, np.nan)[np.maximum(end, 1) - 1]
        buckets = time_buckets(feature, request_times - last_times)
        columns.append(np.where(end > begin, buckets, 0))
    return np.stack(columns, axis=1).astype(np.int32)


def _check_columns(feature: HistoryFeature, log: pa.Table, *, has_times: bool) -> None:
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
