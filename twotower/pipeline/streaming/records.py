"""Training examples as bytes, each with all that a batch needs of its rows.

A record has a head of a fixed size and then any number of events of a fixed size. The record of a
training row has the row as its head and the history as its events; that of a packed row of
sequences has no head, and the events of its sequences. The columns of users and items stay where
they are, in tables that are mapped into memory: they belong to no row.

Records are read a batch at a time, into arrays of the form that the arrays of the whole log have,
so that `gather_rows` and `gather_sequences` make a batch of them as of any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twotower.core.errors import FolderError
from twotower.pipeline.batches import (
    SPANS,
    Batch,
    EventSpans,
    Features,
    InteractionRows,
    gather_rows,
    span_capacity,
)
from twotower.pipeline.histories import Histories
from twotower.pipeline.sequences import SequencePacking, count_up, gather_sequences
from twotower.pipeline.streaming.layout import Columns, Encoded, Layout

# Groups of arrays, whose columns are named "labels/clicked".
_GROUPS = ("context", "labels", "events")
# The third number of a span, which the row knows and no event.
_TIME_TO_ROW = "time to row"
# How many events before a row the last one is that it knows of: 0, but among equal times.
_EVENTS_SINCE = "events since"


def _flat(arrays: Mapping[str, Any]) -> Columns:
    """Returns single arrays and groups of arrays as columns."""
    columns = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            columns |= {f"{name}/{key}": x for key, x in value.items()}
        else:
            columns[name] = value
    return columns


def _nested(columns: Columns) -> dict[str, Any]:
    """Returns columns as the single arrays and groups that `_flat` was given."""
    arrays: dict[str, Any] = {group: {} for group in _GROUPS}
    for name, values in columns.items():
        group, slash, key = name.partition("/")
        if slash:
            arrays[group][key] = values
        else:
            arrays[name] = values
    return arrays


class RowRecords:
    """Training rows as records: each row with the events of its history.

    Args:
        rows: The training rows, N.
        features: The encoded columns of users and items.
        histories: The histories of the rows, where they are a feature.
    """

    name = "training rows"

    def __init__(
        self, rows: InteractionRows, features: Features, histories: EventSpans | None = None
    ) -> None:
        arrays = rows.arrays()
        self._spans = arrays["context"].pop(SPANS, None)
        self._head = _flat(arrays)
        self._event: Columns = {}
        self._tables = _tables(features)
        self._history_length = 0
        self._count = len(rows)
        if histories is not None:
            self._event = _flat({"events": histories.training_events})
            self._tables["reads"] = histories.reads
            self._history_length = histories.length
        # The bucket from the last event to the row, which the row has of its span.
        if self._spans is not None and self._spans.shape[1] > 2:
            self._head[_TIME_TO_ROW] = self._spans[:, 2]
        self.layout = Layout.of(self._head, self._event)

    def __len__(self) -> int:
        return self._count

    def encode(self, start: int, stop: int) -> Encoded:
        head = {name: x[start:stop] for name, x in self._head.items()}
        if self._spans is None:
            return self.layout.join(head, {}, np.zeros(stop - start, np.int64))
        # int64: sums over a block of long histories pass int32.
        begins, ends = self._spans[start:stop, :2].astype(np.int64).T
        counts = ends - begins
        events = np.repeat(begins, counts) + count_up(counts)
        event = {name: x[events] for name, x in self._event.items()}
        return self.layout.join(head, event, counts)

    def span_capacity(self, size: int) -> int:
        return span_capacity(self._spans, size, self._history_length)

    def num_events(self, records: Sequence[bytes]) -> int:
        num_bytes = sum(map(len, records)) - len(records) * self.layout.head.itemsize
        return num_bytes // max(1, self.layout.event.itemsize)

    def decode(
        self,
        records: Sequence[bytes],
        examples: np.ndarray,
        passes: np.ndarray,
        *,
        event_capacity: int = 0,
    ) -> Batch:
        del examples, passes  # a row is the same in every pass
        head, event, counts = self.layout.split(records)
        time_to_row = head.pop(_TIME_TO_ROW, None)
        arrays = _nested(head)
        if self._spans is not None:
            ends = np.cumsum(counts)
            # Spans of the events of this batch, which lie one record after the other.
            spans = [ends - counts, ends]
            if time_to_row is not None:
                spans.append(time_to_row)
            arrays["context"][SPANS] = np.stack(spans, axis=1).astype(np.int32)
            # A history without events still reads one, and forgets it.
            events = _nested(event)["events"]
            arrays["events"] = {name: _padded(x) for name, x in events.items()}
        # The arrays hold the rows of the batch alone, so that their order is the batch.
        index = np.arange(len(records))
        return gather_rows(
            arrays | self._tables,
            index,
            history_length=self._history_length,
            num_events=event_capacity,
        )


def _tables(features: Features) -> dict[str, Any]:
    return {f"{side}_features": dict(features[side]) for side in ("user", "item")}


def _padded(values: np.ndarray) -> np.ndarray:
    end = np.zeros((1, *values.shape[1:]), values.dtype)
    return np.concatenate([values, end])


class SequenceRecords:
    """Packed rows of sequences as records: the events of the users of each row.

    A user whose sequences are cropped at random is there with all events, of which each pass takes
    its crop.

    Args:
        rows: The training rows.
        features: The encoded columns of users and items.
        histories: The histories of the rows.
        packing: Which sequence stands in which packed row.
    """

    def __init__(
        self,
        rows: InteractionRows,
        features: Features,
        histories: Histories,
        packing: SequencePacking,
    ) -> None:
        self.name = f"packed rows of {packing.num_slots} events"
        arrays = rows.arrays()
        self._ends = arrays["context"].pop(SPANS)[:, 1]
        self._of_row = _flat(arrays)
        self._of_event = _flat({"events": histories.training_events})
        self._order = histories.orders["train"]
        self._tables = _tables(features) | {"reads": histories.reads}
        self._packing = packing
        since = {_EVENTS_SINCE: self._ends[:0]}
        self.layout = Layout.of({}, self._of_row | self._of_event | since)
        # As `sequence_data` finds out, of the whole log: a batch has the same arrays in each step.
        self._has_ties = not _are_whole_histories(self._ends, self._order)

    def __len__(self) -> int:
        return len(self._packing)

    def encode(self, start: int, stop: int) -> Encoded:
        sequences = np.arange(self._packing.offsets[start], self._packing.offsets[stop])
        begins, sizes = self._kept(sequences)
        events = np.repeat(begins, sizes) + count_up(sizes)
        rows = self._order[events]
        columns = {name: x[rows] for name, x in self._of_row.items()}
        columns |= {name: x[events] for name, x in self._of_event.items()}
        # As a difference: the end itself is a number in the whole log.
        columns[_EVENTS_SINCE] = self._ends[rows] - events
        first_events = np.append(0, np.cumsum(sizes))
        offsets = self._packing.offsets[start : stop + 1] - self._packing.offsets[start]
        return self.layout.join({}, columns, np.diff(first_events[offsets]))

    def span_capacity(self, size: int) -> int:
        del size
        return 0  # packed rows are no windows with room to spare

    def num_events(self, records: Sequence[bytes]) -> int:
        return sum(map(len, records)) // self.layout.event.itemsize

    def decode(
        self,
        records: Sequence[bytes],
        examples: np.ndarray,
        passes: np.ndarray,
        *,
        event_capacity: int = 0,
    ) -> Batch:
        del event_capacity
        _, columns, counts = self.layout.split(records)
        first = self._packing.offsets[examples]
        num_sequences = self._packing.offsets[examples + 1] - first
        sequences = np.repeat(first, num_sequences) + count_up(num_sequences)
        begins, sizes = self._kept(sequences)
        # Records of another packing would give other rows in silence.
        if sizes.sum() != counts.sum():
            raise FolderError(
                f"Records hold {counts.sum():,} events, not {sizes.sum():,}: they are those of "
                "other sequences."
            )
        # Events have other numbers here than in the log, those of a sequence by one difference.
        shifts = np.cumsum(sizes) - sizes - begins
        events_since = columns.pop(_EVENTS_SINCE)
        arrays = _nested(columns)
        begins_of_users = np.repeat(self._packing.begins[sequences] + shifts, sizes)
        arrays["begin"] = begins_of_users.astype(np.int32)
        if self._has_ties:
            numbers = np.arange(len(events_since), dtype=np.int32)
            arrays["end"] = numbers + events_since
        content = self._packing.expand(examples, passes)
        # Slots are filled sequence by sequence.
        is_filled = content[..., 0] >= 0
        content[is_filled, 0] += np.repeat(shifts, self._packing.lengths[sequences])
        return gather_sequences(arrays | self._tables, content)

    def _kept(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first event of sequences that records hold, and the number of these."""
        packing = self._packing
        ends = packing.ends[sequences]
        begins = packing.begins[sequences]
        if packing.crop == "last":
            begins = ends - packing.lengths[sequences]
        return begins, ends - begins


def _are_whole_histories(ends: np.ndarray, order: np.ndarray, block: int = 2**20) -> bool:
    """Returns whether each row knows all events before it.

    Args:
        ends: End of the history of each row, int32 [N].
        order: Row of each event, int32 [N].
        block: Number of events looked at together.
    """
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        if not np.array_equal(ends[rows], np.arange(start, start + len(rows))):
            return False
    return True
