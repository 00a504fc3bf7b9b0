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
        columns = [log[name].combine_chunks().take(rows) for name in fields]
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
    part = np.repeat(np.arange(3), [len(rows) for rows in users])
    user = np.concatenate(users).astype(np.int64)
    time = _join_times(users, times)
    _check_columns(feature, log, has_times=time is not None)
    file_order = raw.joined_file_positions()
    # One integer orders users and, within a user, moments: dense numbers of moments keep it small.
    moment = np.unique(file_order if time is None else time, return_inverse=True)[1]
    keys = user * (moment.max(initial=0) + 1) + moment

    event_names = log["event"] if "event" in log.column_names else None
    columns = encode_events(feature, fitted, log["item_id"], event_names, time)
    offsets: dict[str, np.ndarray] = {}
    orders: dict[str, np.ndarray] = {}
    blocks: list[dict[str, np.ndarray]] = []
    start = 0
    for name in ("train", "test", "now"):
        rows = np.flatnonzero(np.isin(part, KNOWN_PARTS[name]))
        order = rows[np.lexsort((file_order[rows], keys[rows]))]
        counts = np.bincount(user[rows], minlength=num_users)
        block = {array: values[order] for array, values in columns.items()}
        if time is not None:
            block |= _time_arrays(feature, time[order])
        orders[name] = order
        offsets[name] = start + np.append(0, np.cumsum(counts))
        blocks.append(block)
        start += len(order)

    events = {array: np.concatenate([block[array] for block in blocks]) for array in blocks[0]}
    event_times = np.zeros(0)
    if time is not None:
        event_times = np.concatenate([time[order] for order in orders.values()])
    spans = {}
    for number, (name, level) in enumerate(_EVENTS_READ_BY.items()):
        rows = part == number
        begin = offsets[level][user[rows]]
        # "left": of the events of one moment none knows of another, nor a row of itself.
        earlier = np.searchsorted(keys[orders[level]], keys[rows], side="left")
        end = offsets[level][0] + earlier
        row_times = np.nan if time is None else time[rows]
        spans[name] = _spans(feature, begin, end, event_times, row_times)
    reads = read_arrays(feature, fitted)
    return Histories(feature, events, reads, offsets, orders, spans, event_times)


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
