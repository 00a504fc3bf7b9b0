"""Encoded arrays into batches.

Which examples a step sees is a function of (seed, step) alone, so that any step can be resumed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from twotower.core.arrays import round_up
from twotower.core.errors import ConfigError
from twotower.features.inputs import (
    HISTORY_COUNT,
    HISTORY_ROW,
    HISTORY_SLOT,
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    id_array,
)

# "user", "item", "weight": [B]; "user_features", "item_features": {name: [B, ...]}; "labels":
# {column: [B]}, NaN where missing.
Batch = dict[str, Any]

# {"user" or "item": {name: [U or N, ...]}}, the encoded columns of the two tables.
Features = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class InteractionRows:
    """Interactions as arrays.

    Attributes:
        user: int32 [N], row of the users table.
        item: int32 [N], row of the corpus; -1 where the item is not in it, which no training row
            has.
        weight: float32 [N], at least 0.
        timestamp: int64 [N], seconds since the epoch, or None.
        context: User features of the interaction itself, [N, ...] each.
        labels: Column -> float32 [N], 1, 0, or NaN where missing, for the columns that
            `config.objective` names.
    """

    user: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    timestamp: np.ndarray | None
    context: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user)

    def arrays(self) -> dict[str, Any]:
        """Returns the arrays that a batch is gathered from, in mappings that may be changed."""
        return {
            "user": self.user,
            "item": self.item,
            "weight": self.weight,
            "context": dict(self.context),
            "labels": dict(self.labels),
        }

    def take(self, index: np.ndarray) -> InteractionRows:
        """Returns some of the rows, by position or by mask."""
        # A tree with None for missing times, which `map` leaves out.
        arrays = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return InteractionRows(*jax.tree.map(lambda x: x[index], arrays))


# The name, in the context of a row, of the span of its history.
SPANS = "history span"
# Places of a batch of spans that are a multiple of this many events.
SPAN_MULTIPLE = 128
# Spans whose lengths are read at once.
_BLOCK = 2**20


@runtime_checkable
class Examples(Protocol):
    """The examples that a pass over the training data consists of."""

    @property
    def name(self) -> str:
        """Name of the examples in messages, such as "training rows"."""
        ...

    @property
    def data(self) -> Mapping[str, Any]:
        """The arrays that `gather` reads."""
        ...

    def __len__(self) -> int:
        """Number of examples in a pass."""
        ...

    def index(self, examples: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Returns what `gather` takes for some examples.

        Args:
            examples: int [B], their numbers.
            passes: int [B], the pass over the data in which each stands.
        """
        ...

    def gather(self, data: Mapping[str, Any], index: Any) -> Batch:
        """Returns the batch at `index`, from NumPy arrays, or inside `jit` from the device's."""
        ...


@runtime_checkable
class EventSpans(Protocol):
    """The events of a log, of which the histories of training rows are spans.

    `twotower.pipeline.histories.Histories` are such.
    """

    @property
    def training_events(self) -> Mapping[str, np.ndarray]:
        """Array name -> [M, ...], one entry for each event that training rows know of."""
        ...

    @property
    def reads(self) -> Mapping[str, np.ndarray]:
        """Array name -> [V, ...], what is read of an item beside its id, by the row of the id."""
        ...

    @property
    def length(self) -> int:
        """Number of events in a history at most, L."""
        ...


class InteractionExamples:
    """Training rows as examples: each is one user with one item.

    Args:
        rows: The training rows, N.
        features: The encoded columns of users and items.
        histories: The histories of the rows, where they are a feature.
    """

    name = "training rows"

    def __init__(
        self, rows: InteractionRows, features: Features, histories: EventSpans | None = None
    ) -> None:
        self.data = rows.arrays() | {
            "user_features": dict(features["user"]),
            "item_features": dict(features["item"]),
        }
        self._count = len(rows)
        self._history_length = 0
        if histories is not None:
            self.data |= {"events": histories.training_events, "reads": histories.reads}
            self._history_length = histories.length

    def __len__(self) -> int:
        return self._count

    def index(self, examples: np.ndarray, passes: np.ndarray) -> np.ndarray:
        del passes  # a row is the same in every pass
        return examples

    def gather(self, data: Mapping[str, Any], index: Any) -> Batch:
        return gather_rows(data, index, history_length=self._history_length)

    def gather_spans(self, data: Mapping[str, Any], index: Any, num_events: int) -> Batch:
        """Returns the batch with its histories one after the other; see `flat_events`."""
        return gather_rows(data, index, history_length=self._history_length, num_events=num_events)

    def span_capacity(self, size: int) -> int:
        """Returns the places M for the events of nearly every batch of a size; see
        `span_capacity`."""
        return span_capacity(self.data["context"].get(SPANS), size, self._history_length)

    def span_lengths(self, index: np.ndarray) -> np.ndarray:
        """Returns the numbers of events in the histories of some rows, int [B]."""
        spans = self.data["context"][SPANS][index]
        return spans[:, 1] - spans[:, 0]


def span_capacity(spans: np.ndarray | None, size: int, history_length: int) -> int:
    """Returns the places M for the events of nearly every batch of a size; 0 where windows of L
    events each take hardly more, or where there are no histories.

    Args:
        spans: Spans int32 [N, 2 or 3] of all training rows; None without histories.
        size: Rows of a batch that lie on one device.
        history_length: L.
    """
    if spans is None or not len(spans):
        return 0
    total = 0
    total_of_squares = 0
    # By blocks, as spans may be mapped: numbers of all of them would take memory.
    for start in range(0, len(spans), _BLOCK):
        block = spans[start : start + _BLOCK]
        lengths = (block[:, 1] - block[:, 0]).astype(np.int64)
        total += int(lengths.sum())
        total_of_squares += int((lengths**2).sum())
    mean = total / len(spans)
    variance = max(0.0, total_of_squares / len(spans) - mean**2)
    # Six standard deviations: hardly any batch of a training holds more.
    enough = size * mean + 6 * np.sqrt(size * variance)
    event_capacity = round_up(int(enough) + 1, SPAN_MULTIPLE)
    # Below half of the windows: what spans save must outweigh what it takes to tell their rows
    # apart.
    return event_capacity if 2 * event_capacity <= size * history_length else 0


def enough_capacity(event_capacity: int, num_events: int) -> int:
    """Returns the places of the program for a batch: hardly ever more than the usual ones."""
    while event_capacity < num_events:
        event_capacity *= 2
    return event_capacity


def gather_rows(
    data: Mapping[str, Any], index: Any, *, history_length: int = 0, num_events: int = 0
) -> Batch:
    """Returns the batch of some training rows.

    Works on NumPy arrays, and inside `jit` on those of the device.

    Args:
        data: The arrays of `InteractionExamples`.
        index: int [B], the rows.
        history_length: L of the histories whose spans are in the context, if there are any.
        num_events: Places for all events of the batch one after the other; 0 for a window of L
            events for each row.
    """
    user = data["user"][index]
    item = data["item"][index]
    user_features = {name: x[user] for name, x in data["user_features"].items()}
    context = {name: x[index] for name, x in data["context"].items()}
    if SPANS in context:
        # A batch holds two numbers for a history until here; the windows are cut where it is used.
        spans = context.pop(SPANS)
        if num_events:
            context |= flat_events(data["events"], data["reads"], spans, num_events)
        else:
            context |= windows(data["events"], data["reads"], spans, history_length)
    return {
        "user": user,
        "item": item,
        "weight": data["weight"][index],
        "user_features": user_features | context,
        "item_features": {name: x[item] for name, x in data["item_features"].items()},
        "labels": {name: x[index] for name, x in data["labels"].items()},
    }


def windows(
    events: Mapping[str, Any], reads: Mapping[str, Any], spans: Any, length: int
) -> dict[str, Any]:
    """Returns the arrays [N, L, ...] of spans of events, 0 after the end of each.

    Works on NumPy arrays, and inside `jit` on those of the device.

    Args:
        events: See `twotower.pipeline.histories.Histories`.
        reads: See `twotower.pipeline.histories.Histories`.
        spans: Spans int32 [N, 2 or 3] of at most L events.
        length: L.
    """
    slot = np.arange(length, dtype=np.int32)[None]
    rows = spans[:, :1] + slot
    valid = rows < spans[:, 1:2]
    # Slots after the end read event 0, and become 0.
    arrays = read_events(events, reads, rows * valid, valid, first=slot == 0)
    if HISTORY_TIME_TO_NEXT in arrays:
        # After the latest event comes the request, of which the span itself knows.
        latest = rows == spans[:, 1:2] - 1
        to_next = arrays[HISTORY_TIME_TO_NEXT]
        arrays[HISTORY_TIME_TO_NEXT] = to_next * ~latest + spans[:, 2:] * latest
    return arrays


def flat_events(
    events: Mapping[str, Any], reads: Mapping[str, Any], spans: Any, size: int
) -> dict[str, Any]:
    """Returns the arrays [M, ...] of the events of all spans, one span after the other.

    A batch then costs what its histories hold, not what the longest could. Beside the arrays stand
    the row of each event, its number within its span, both int32 [M], and the length of each span,
    int32 [N]. Works on NumPy arrays, and inside `jit` on those of the device.

    Args:
        events: See `twotower.pipeline.histories.Histories`.
        reads: See `twotower.pipeline.histories.Histories`.
        spans: Spans int32 [N, 2 or 3].
        size: M, at least the sum of the lengths of the spans; places after it are 0.
    """
    xp = np if isinstance(spans, np.ndarray) else jnp
    lengths = spans[:, 1] - spans[:, 0]
    ends = xp.cumsum(lengths, dtype=np.int32)
    position = xp.arange(size, dtype=np.int32)
    # Places after the last event belong to the last row, as padding.
    row = xp.minimum(xp.searchsorted(ends, position, side="right"), len(spans) - 1)
    row = row.astype(np.int32)
    slot = position - (ends - lengths)[row]
    valid = position < ends[-1]
    arrays = read_events(events, reads, (spans[row, 0] + slot) * valid, valid, first=slot == 0)
    if HISTORY_TIME_TO_NEXT in arrays:
        latest = (slot == lengths[row] - 1) & valid
        to_next = arrays[HISTORY_TIME_TO_NEXT]
        arrays[HISTORY_TIME_TO_NEXT] = xp.where(latest, spans[row, 2], to_next)
    beside = {HISTORY_ROW: row, HISTORY_SLOT: slot * valid, HISTORY_COUNT: lengths}
    return arrays | beside


def read_events(
    events: Mapping[str, Any], reads: Mapping[str, Any], rows: Any, valid: Any, *, first: Any
) -> dict[str, Any]:
    """Returns the arrays [N, S, ...] or [M, ...] of single events.

    Args:
        events: See `twotower.pipeline.histories.Histories`.
        reads: See `twotower.pipeline.histories.Histories`.
        rows: Rows int32 [N, S] or [M] of the events.
        valid: Mask bool of the same shape; everything else becomes 0.
        first: Mask bool of the same shape, of events that begin a history; their time since the
            event before is not known.
    """
    arrays = {name: values[rows] * valid for name, values in events.items()}
    if HISTORY_TIME_SINCE_PREVIOUS in arrays:
        arrays[HISTORY_TIME_SINCE_PREVIOUS] = arrays[HISTORY_TIME_SINCE_PREVIOUS] * ~first
    # Features of an item are read by its id, and not kept once more with each event.
    ids = arrays[id_array(arrays)]
    return arrays | {name: values[ids] for name, values in reads.items()}


def join_parts(parts: Sequence[Batch]) -> Batch:
    """Returns the batch of parts that lie on devices one after the other."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


class Batches:
    """Shuffled batches of B examples.

    Step s takes the positions [s B, (s + 1) B) of an endless stream, one shuffled pass over the
    examples after the other: every batch is full, so no shape changes and no example is dropped.

    Args:
        examples: The examples of a pass.
        batch_size: B.
        seed: Seed of the shuffles.
        resident_megabytes: Largest size of the arrays that are put on the device.

    Attributes:
        num_bytes: Size of the arrays of the examples.
        resident: The arrays of the examples where they fit into `resident_megabytes`; put on the
            device once, they let each batch be gathered there. Otherwise None, and `load` gathers
            on the host.

    Raises:
        ConfigError: A batch is larger than a pass.
    """

    def __init__(
        self, examples: Examples, *, batch_size: int, seed: int, resident_megabytes: float
    ) -> None:
        count = len(examples)
        if batch_size > count:
            raise ConfigError(
                f"config.training.batch_size={batch_size} is larger than the data: there are "
                f"{count} {examples.name}. Choose at most {count}."
            )
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self.num_bytes = sum(x.nbytes for x in jax.tree.leaves(examples.data))
        self.resident = examples.data if self.num_bytes <= resident_megabytes * 2**20 else None
        # A batch needs the pass it lies in, and the next one where it crosses the border.
        self._shuffled = functools.lru_cache(maxsize=2)(self._shuffle)

    def indices(self, step: int) -> np.ndarray:
        """Returns what `gather` takes for the batch of a step, [B, ...]."""
        start = step * self._batch_size
        positions = np.arange(start, start + self._batch_size)
        # A batch that crosses the end of a pass goes on in the next one.
        passes, offsets = np.divmod(positions, len(self._examples))
        parts = [self._shuffled(int(n))[offsets[passes == n]] for n in np.unique(passes)]
        return self._examples.index(np.concatenate(parts), passes)

    def gather(self, data: Mapping[str, Any], indices: Any) -> Batch:
        """Returns the batch at `indices`, on the host or inside `jit`."""
        return self._examples.gather(data, indices)

    def span_capacity(self, size: int) -> int:
        """Returns the places for the events of nearly every batch of a size, where its histories
        are read as spans; 0 where they are not. See `InteractionExamples.span_capacity`."""
        if not isinstance(self._examples, InteractionExamples):
            return 0
        return self._examples.span_capacity(size)

    def num_events(self, indices: np.ndarray, parts: int) -> int:
        """Returns the greatest number of events in the histories of a part of a batch.

        Args:
            indices: What `gather` takes for the batch, [B].
            parts: Number of equal parts that the batch is divided into.
        """
        assert isinstance(self._examples, InteractionExamples), "sequences are not spans"
        # The greatest part: all devices run one program of one shape.
        lengths = self._examples.span_lengths(indices)
        return int(lengths.reshape(parts, -1).sum(axis=1).max())

    def gather_spans(self, data: Mapping[str, Any], indices: Any, num_events: int) -> Batch:
        """Returns the batch at `indices` with its histories one after the other."""
        assert isinstance(self._examples, InteractionExamples), "sequences are not spans"
        return self._examples.gather_spans(data, indices, num_events)

    def load(self, indices: np.ndarray, *, event_capacity: int = 0, parts: int = 1) -> Batch:
        """Returns the batch at `indices`, gathered on the host.

        Args:
            indices: What `gather` takes, [B].
            event_capacity: Number of events that the histories of each part may have, one after the
                other; 0 for a window of L events for each row.
            parts: Number of equal parts, those of devices, that the batch is divided into.
        """
        if not event_capacity:
            return self.gather(self._examples.data, indices)
        gathered = []
        for part in np.split(indices, parts):
            gathered.append(self.gather_spans(self._examples.data, part, event_capacity))
        return join_parts(gathered)

    def _shuffle(self, number: int) -> np.ndarray:
        """Returns the examples in the order of pass `number`."""
        examples = np.arange(len(self._examples), dtype=np.int32)
        # The number of the pass is part of the seed: any pass can be had without those before it.
        return np.random.default_rng((self._seed, number)).permutation(examples)
