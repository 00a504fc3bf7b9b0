"""The bytes of a record: a head of a fixed size, then any number of events of a fixed size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from twotower.pipeline.batches import Batch

# Name -> [N, ...].
Columns = dict[str, np.ndarray]


class Encoded(NamedTuple):
    """Records one after the other.

    Attributes:
        content: Their bytes, uint8.
        ends: End of each in `content`, int64 [N].
    """

    content: np.ndarray
    ends: np.ndarray


class Records(Protocol):
    """The examples of a pass as records."""

    @property
    def name(self) -> str:
        """Name of the examples in messages, such as "training rows"."""
        ...

    @property
    def layout(self) -> Layout:
        """The bytes of a record."""
        ...

    def __len__(self) -> int:
        """Number of examples in a pass."""
        ...

    def encode(self, start: int, stop: int) -> Encoded:
        """Returns the records of the examples in [start, stop)."""
        ...

    def decode(
        self,
        records: Sequence[bytes],
        examples: np.ndarray,
        passes: np.ndarray,
        *,
        event_capacity: int = 0,
    ) -> Batch:
        """Returns the batch of some records.

        Args:
            records: B records.
            examples: int [B], their numbers.
            passes: int [B], the pass over the data in which each stands.
            event_capacity: Number of events that their histories may have, one after the other;
                0 for a window of L events for each row.
        """
        ...

    def span_capacity(self, size: int) -> int:
        """Returns the places for the events of nearly every batch of a size, 0 where windows are
        as good; see `twotower.pipeline.batches.span_capacity`."""
        ...

    def num_events(self, records: Sequence[bytes]) -> int:
        """Returns the number of events in the histories of some records."""
        ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """The bytes of a record.

    Attributes:
        head: Type of its beginning.
        event: Type of each event that follows.
    """

    head: np.dtype
    event: np.dtype

    @classmethod
    def of(cls, head: Columns, event: Columns) -> Layout:
        """Returns the layout of columns, of which the rows alone are left open."""
        return cls(_row_type(head), _row_type(event))

    def describe(self) -> dict[str, Any]:
        """Returns the fields of both parts, as JSON."""
        described = {}
        for part in ("head", "event"):
            fields = []
            for name, (kind, _) in (getattr(self, part).fields or {}).items():
                # Of a subarray type and shape stand apart.
                fields.append([name, str(kind.base), list(kind.shape)])
            described[part] = fields
        return described

    def join(self, head: Columns, event: Columns, counts: np.ndarray) -> Encoded:
        """Returns the records of columns.

        Args:
            head: Columns [N, ...] of the heads.
            event: Columns [M, ...] of the events, those of one record after those of another.
            counts: Number of events in each record, int64 [N].
        """
        ends = np.cumsum(self.head.itemsize + counts * self.event.itemsize)
        events = _to_bytes(event, self.event, counts.sum())
        if not self.head.itemsize:
            return Encoded(events, ends)
        heads = _to_bytes(head, self.head, len(counts))
        # Heads and events are put between each other by one assignment, not record by record.
        positions = self._head_positions(ends - counts * self.event.itemsize)
        content = np.empty(len(heads) + len(events), np.uint8)
        content[positions] = heads.reshape(positions.shape)
        content[_all_but(positions, len(content))] = events
        return Encoded(content, ends)

    def split(self, records: Sequence[bytes]) -> tuple[Columns, Columns, np.ndarray]:
        """Returns the arguments of `join` that some records were made of."""
        content = np.frombuffer(b"".join(records), np.uint8)
        lengths = np.fromiter(map(len, records), np.int64, len(records))
        num_bytes = lengths - self.head.itemsize
        # The length of a record says how many events it has: no number of them is stored.
        counts = num_bytes // max(1, self.event.itemsize)
        if not self.head.itemsize:
            return {}, _from_bytes(content, self.event), counts
        if not self.event.itemsize:
            return _from_bytes(content, self.head), {}, counts
        positions = self._head_positions(np.cumsum(lengths) - num_bytes)
        heads = content[positions].reshape(-1)
        events = content[_all_but(positions, len(content))]
        return _from_bytes(heads, self.head), _from_bytes(events, self.event), counts

    def _head_positions(self, ends: np.ndarray) -> np.ndarray:
        """Returns the places of the bytes of heads, [N, bytes], from the ends of the heads."""
        return (ends - self.head.itemsize)[:, None] + np.arange(self.head.itemsize)


def _row_type(columns: Columns) -> np.dtype:
    fields = [(name, x.dtype, x.shape[1:]) for name, x in columns.items()]
    return np.dtype(fields)


def _to_bytes(columns: Columns, kind: np.dtype, count: int) -> np.ndarray:
    """Returns columns [N, ...] as the bytes of N rows."""
    # An empty type has no bytes to be viewed as.
    if not kind.itemsize:
        return np.zeros(0, np.uint8)
    # One array of structs, whose bytes lie row by row.
    rows = np.empty(count, kind)
    for name, values in columns.items():
        rows[name] = values
    return rows.view(np.uint8)


def _from_bytes(content: np.ndarray, kind: np.dtype) -> Columns:
    rows = content.view(kind)
    return {name: rows[name] for name in kind.names or ()}


def _all_but(positions: np.ndarray, count: int) -> np.ndarray:
    """Returns a mask bool [count] of all places but some."""
    mask = np.ones(count, bool)
    mask[positions] = False
    return mask
