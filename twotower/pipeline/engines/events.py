"""The histories of a log whose rows come by user and time in blocks.

The arrays are those of `twotower.pipeline.histories`, which makes them of rows in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from twotower.core.arrays import index_type
from twotower.features.history import HistoryFeature, time_buckets
from twotower.features.inputs import HISTORY_TIME_SINCE_PREVIOUS, HISTORY_TIME_TO_NEXT
from twotower.pipeline.engines.arrays import ArrayFile, Scatter
from twotower.pipeline.histories import EVENTS_READ_BY, KNOWN_PARTS, keeps_times

LEVELS = ("train", "test", "now")
_PART_NUMBERS = np.arange(3)


@dataclasses.dataclass(frozen=True)
class EventBlock:
    """Rows by user, then in time, then as the file has them.

    Attributes:
        user: Row of the users table, int32 [N].
        time: Seconds, int64 [N].
        joined: Position among the rows of all parts joined, int [N].
        events: Array name -> [N], the row as an event.
    """

    user: np.ndarray
    time: np.ndarray
    joined: np.ndarray
    events: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HistoryFiles:
    """The files of the histories, by the names of `twotower.pipeline.histories.Histories`."""

    events: Mapping[str, ArrayFile]
    offsets: Mapping[str, ArrayFile]
    orders: Mapping[str, ArrayFile]
    spans: Mapping[str, ArrayFile]
    times: ArrayFile


def write_histories(
    blocks: Iterator[EventBlock],
    files: HistoryFiles,
    feature: HistoryFeature,
    user_counts: np.ndarray,
    sizes: Sequence[int],
    scratch: Path,
) -> None:
    """Writes the histories of all rows.

    Args:
        blocks: The rows, in blocks.
        files: Files to write.
        feature: The history feature.
        user_counts: Rows of each user in each part, int64 [3, U], by row of the users table.
        sizes: Rows of each part.
        scratch: Folder for what lies on the disk meanwhile; it must not exist.
    """
    start = 0
    levels = {}
    # Offsets first: they say where in the files the events of each level begin.
    for name in LEVELS:
        counts = user_counts[list(KNOWN_PARTS[name])].sum(axis=0)
        offsets = start + np.append(0, np.cumsum(counts))
        files.offsets[name].append(offsets)
        levels[name] = _Level(name, offsets, files, feature)
        start = int(offsets[-1])
    ends = np.cumsum(sizes)
    width = _span_width(feature)
    # Rows come by user, and spans are kept by the order of the file.
    scatter = Scatter(scratch, int(ends[-1]), width)
    moments = _Moments()
    for block in blocks:
        part = (block.joined >= ends[0]).astype(np.int8) + (block.joined >= ends[1])
        begin = moments.begin(block)
        spans = np.zeros((len(part), width), np.int32)
        # A row is an event of several levels, and reads one of them.
        for name, level in levels.items():
            is_known = np.isin(_PART_NUMBERS, KNOWN_PARTS[name])[part]
            reads = np.array([read == name for read in EVENTS_READ_BY.values()])[part]
            rows = np.flatnonzero(reads)
            earlier, last_times = level.add(block, is_known, begin, rows)
            first = level.offsets[block.user[rows]]
            end = level.offsets[0] + earlier
            spans[rows, 0] = np.maximum(first, end - feature.max_length)
            spans[rows, 1] = end
            if last_times is not None:
                buckets = time_buckets(feature, block.time[rows] - last_times)
                # An empty history has no last event, and bucket 0.
                spans[rows, 2] = np.where(end > first, buckets, 0)
        scatter.add(block.joined, spans)
    for level in levels.values():
        level.end()
    _write_spans(scatter, files.spans, sizes)


def _span_width(feature: HistoryFeature) -> int:
    """Returns the numbers in a span."""
    return 3 if feature.request_gap else 2


def _write_spans(scatter: Scatter, spans: Mapping[str, ArrayFile], sizes: Sequence[int]) -> None:
    """Writes the spans of all rows into the files of their parts."""
    ends = np.cumsum(sizes)
    first = 0
    for block in scatter.blocks():
        # A block may end in the midst of a part, and hold several small ones.
        cuts = np.clip(ends - first, 0, len(block))
        begin = 0
        for file, cut in zip(spans.values(), cuts, strict=True):
            file.append(block[begin:cut])
            begin = max(begin, int(cut))
        first += len(block)


class _Moments:
    """The moments of users: their rows of one time, which do not know of each other."""

    def __init__(self):
        # No user has this number: the first row of all begins a moment.
        self._last = (-1, 0)

    def begin(self, block: EventBlock) -> np.ndarray:
        """Returns the first row of each row's moment, int [N]; -1 for one of the block before."""
        user = np.append(self._last[0], block.user)
        time = np.append(self._last[1], block.time)
        is_same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
        self._last = (int(user[-1]), int(time[-1]))
        # A moment may have begun in the block before, where its rows are gone by now.
        own = np.where(is_same, -1, np.arange(len(is_same)))
        return np.maximum.accumulate(own)


class _Level:
    """The events that the rows of some parts know of, as they are written one after the other."""

    def __init__(
        self, name: str, offsets: np.ndarray, files: HistoryFiles, feature: HistoryFeature
    ):
        self.offsets = offsets
        self._start = int(offsets[0])
        self._feature = feature
        self._events = files.events
        self._order = files.orders[name]
        self._times = files.times if keeps_times(feature) else None
        self._count = 0
        self._last_time = np.nan
        # Of the moment that the block before ended in: events before it, and their latest time.
        self._open = (0, np.nan)

    def add(
        self, block: EventBlock, is_known: np.ndarray, begin: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Writes the events of a block.

        Args:
            block: Rows.
            is_known: Rows that are events of this level, bool [N].
            begin: First row of each row's moment.
            rows: Numbers of the rows that read this level, int [M].

        Returns:
            For each of `rows` the events of all users before its moment, int64 [M], and the time of
            the last of them, float64 [M]; None where no row reads it.
        """
        position = self._start + self._count
        # Whole columns where all rows are events: nothing is copied.
        events = slice(None) if is_known.all() else np.flatnonzero(is_known)
        time = block.time[events]
        self._order.append(block.joined[events])
        for name, values in block.events.items():
            self._events[name].write(position, values[events])
        if self._times is not None:
            self._times.write(position, time)
            self._write_gaps(position, time)
        # Running counts, of which the last row of the block is asked for as well.
        before = np.cumsum(is_known, dtype=np.int32)
        # For rows of the next block that are of the moment in which this one ends.
        asked = np.append(rows, len(is_known) - 1)
        begin = begin[asked]
        is_open = begin < 0
        events_before = before[begin] - is_known[begin]
        earlier = np.where(is_open, self._open[0], self._count + events_before)
        last_times = None
        if self._feature.request_gap:
            # The last event of the block before stands in front, as the one before the first here.
            times = np.append(self._last_time, time.astype(np.float64))
            last_times = np.where(is_open, self._open[1], times[events_before])
        self._open = (int(earlier[-1]), np.nan if last_times is None else float(last_times[-1]))
        self._count += len(time)
        if len(time):
            self._last_time = float(time[-1])
        if last_times is not None:
            last_times = last_times[:-1]
        return earlier[:-1], last_times

    def _write_gaps(self, position: int, time: np.ndarray) -> None:
        """Writes the times between each event and its neighbours, of which one may come later."""
        if not len(time):
            return
        # Before the very first event there is none, and the gap is 0.
        previous = time[:1] if np.isnan(self._last_time) else [np.int64(self._last_time)]
        gaps = time_buckets(self._feature, np.diff(time, prepend=previous))
        if self._feature.gaps:
            self._events[HISTORY_TIME_SINCE_PREVIOUS].write(position, gaps)
        if self._feature.request_gap:
            # The time to the next event is that event's time since this one.
            first = int(position == self._start)
            self._events[HISTORY_TIME_TO_NEXT].write(position - 1 + first, gaps[first:])

    def end(self) -> None:
        """Writes what the last event knows of a next one: nothing."""
        if self._feature.request_gap and self._count:
            # As in memory, where the last time is appended to itself.
            last = time_buckets(self._feature, np.zeros(1))
            self._events[HISTORY_TIME_TO_NEXT].write(self._start + self._count - 1, last)


def history_shapes(
    feature: HistoryFeature, events: Mapping[str, np.dtype], num_users: int, sizes: Sequence[int]
) -> dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]] | tuple[np.dtype, tuple[int, ...]]]:
    """Returns type and shape of the arrays of the histories, in the order in which they are kept.

    Args:
        feature: The history feature.
        events: Name and type of the arrays of events that are made of single rows.
        num_users: Rows U of the users table.
        sizes: Rows of each part.
    """
    known = {name: sum(sizes[part] for part in KNOWN_PARTS[name]) for name in LEVELS}
    total = sum(known.values())
    arrays = {name: (np.dtype(dtype), (total,)) for name, dtype in events.items()}
    if feature.gaps:
        arrays[HISTORY_TIME_SINCE_PREVIOUS] = (np.dtype(np.int32), (total,))
    if feature.request_gap:
        arrays[HISTORY_TIME_TO_NEXT] = (np.dtype(np.int32), (total,))
    number = np.dtype(index_type(sum(sizes)))
    spans = {}
    for name, size in zip(EVENTS_READ_BY, sizes, strict=True):
        spans[name] = (np.dtype(np.int32), (size, _span_width(feature)))
    times = total if keeps_times(feature) else 0
    return {
        "events": arrays,
        "offsets": {name: (np.dtype(np.int64), (num_users + 1,)) for name in LEVELS},
        "orders": {name: (number, (count,)) for name, count in known.items()},
        "spans": spans,
        "times": (np.dtype(np.int64), (times,)),
    }
