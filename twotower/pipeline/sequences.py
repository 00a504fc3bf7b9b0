"""Training on sequences: windows of users' events, packed into rows of S = L + 1 places, and the
batches made of them.

A place holds a target, the event to be predicted there; its input is the event before it, and at
the beginning of a sequence the start token. So a sequence takes as many places as it has targets,
and one pass over a row trains all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from twotower.features.history import HISTORY_POSITION, HISTORY_SEGMENT
from twotower.pipeline.batches import Batch, Batches, Rows
from twotower.pipeline.histories import SPANS, Histories, read_events


@dataclasses.dataclass(frozen=True, eq=False)
class SequencePacking:
    """Which sequence stands where.

    Attributes:
        places: S.
        begins: int64 [W], the first event of each sequence's user.
        ends: int64 [W], the one after the last.
        lengths: int64 [W], places that each sequence takes, at most S.
        offsets: int64 [rows + 1], the sequences of each packed row, as they stand in the arrays
            above.
        slots: int64 [W], the first place of each sequence in its row.
        crop: see `config.training.crop`.
        seed: of random crops.
    """

    places: int
    begins: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray
    crop: str
    seed: int

    @classmethod
    def build(cls, histories: Histories, *, crop: str, seed: int) -> SequencePacking:
        """All training sequences, packed."""
        offsets, places = histories.offsets["train"], histories.length + 1
        begins, ends = (x[np.diff(offsets) > 0] for x in (offsets[:-1], offsets[1:]))
        lengths = np.minimum(ends - begins, places)
        order, rows, slots = pack(lengths, places, seed=seed)
        counts = np.bincount(rows, minlength=rows.max(initial=-1) + 1)
        return cls(
            places,
            begins[order],
            ends[order],
            lengths[order],
            np.append(0, np.cumsum(counts)),
            slots,
            crop,
            seed,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def expand(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """int32 [B, S, 2]: the target of each place (-1: none), and how many places of its sequence
        are before it.

        Args:
            rows: int [B].
            passes: int [B], which pass over the data each is of: random crops are another in each.
        """
        counts = np.diff(self.offsets)[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        chosen = self.offsets[rows][owner] + _ramp(counts)
        lengths = self.lengths[chosen]
        row, position = np.repeat(owner, lengths), _ramp(lengths)
        out = np.full((len(rows), self.places, 2), -1, np.int32)
        at = (row, np.repeat(self.slots[chosen], lengths) + position)
        out[at] = np.stack(
            [np.repeat(self._starts(chosen, passes[owner]), lengths) + position, position], axis=1
        )
        return out

    def rates(self, events: int) -> np.ndarray:
        """float64 [events], how often a pass has each event as a target that counts.

        The first of a window does not, its history being cut off, unless it is the user's first.
        """
        rates, cropped = np.ones(events), self.ends - self.begins > self.lengths
        sizes = (self.ends - self.begins)[cropped]
        at, last, length = (
            _ramp(sizes),
            *(np.repeat(x, sizes) for x in (sizes - self.lengths[cropped], self.lengths[cropped])),
        )
        if self.crop == "last":
            found = at > last
        else:  # windows begin at 0 to `last`, each as likely
            windows = np.minimum(at - 1, last) - np.maximum(at - length + 1, 0) + 1
            found = (np.maximum(windows, 0) + (at == 0)) / (last + 1)
        rates[np.repeat(self.begins[cropped], sizes) + at] = found
        return rates

    def _starts(self, windows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """The first target of each sequence."""
        last = self.ends[windows] - self.lengths[windows]
        if self.crop == "last":
            return last
        starts = np.empty(len(windows), np.int64)
        for number in np.unique(passes):
            here = passes == number
            draws = np.random.default_rng((self.seed, int(number), 1)).random(len(self.begins))[
                windows[here]
            ]
            begin = self.begins[windows[here]]
            starts[here] = begin + (draws * (last[here] - begin + 1)).astype(np.int64)
        return starts


def pack(lengths: np.ndarray, size: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts sequences into rows of `size` places: each row takes the longest that still fits, again
    and again.

    Args:
        lengths: int [W], from 1 to `size`.

    Returns:
        order [W]: the sequences row by row; and of each in this order its row and its first place.
        Sequences of one length are shuffled.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    left = np.bincount(lengths, minlength=size + 1)
    next_of = np.cumsum(left) - left
    left, next_of = left.tolist(), next_of.tolist()
    order, rows, slots = [], [], []
    row, free, length = 0, size, size
    while len(order) < len(lengths):
        length = min(length, free)
        while length and not left[length]:
            length -= 1
        if not length:
            row, free, length = row + 1, size, size
            continue
        order.append(next_of[length])
        rows.append(row)
        slots.append(size - free)
        left[length], next_of[length], free = left[length] - 1, next_of[length] + 1, free - length
    return by_length[np.array(order, np.int64)], np.array(rows, np.int64), np.array(slots, np.int64)


class SequenceBatches(Batches):
    """Shuffled batches of B packed rows; otherwise as `Batches`.

    Args:
        rows: the training rows.
        histories: their histories.
        plan: how they are packed.
    """

    def __init__(
        self,
        rows: Rows,
        features: Mapping[str, Mapping[str, np.ndarray]],
        histories: Histories,
        plan: SequencePacking,
        *,
        batch_size: int,
        seed: int,
        resident_megabytes: int,
    ) -> None:
        self._plan = plan
        data = sequence_data(rows, features, histories)
        super()._begin(
            data,
            len(plan),
            f"packed rows of {plan.places} places",
            batch_size,
            seed,
            resident_megabytes,
        )

    @property
    def gather(self) -> Callable[[Mapping[str, Any], Any], Batch]:
        return gather_sequences

    def indices(self, step: int) -> np.ndarray:
        """int32 [B, S, 2], see `SequencePacking.expand`."""
        places = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        return self._plan.expand(super().indices(step), places // self._rows)


def sequence_data(
    rows: Rows, features: Mapping[str, Mapping[str, np.ndarray]], histories: Histories
) -> dict[str, Any]:
    """What `gather_sequences` gathers from: training rows by user and time."""
    order = histories.orders["train"]
    ordered = rows.take(order)
    begins = histories.offsets["train"][ordered.user]
    # The first event that is not earlier than each: itself, but where several happened in one
    # second.
    ends = ordered.context[SPANS][:, 1]
    data = {
        "user": ordered.user,
        "item": ordered.item,
        "weight": ordered.weight,
        "labels": dict(ordered.labels),
        "begin": begins.astype(np.int32),
        "events": histories.training_events,
        "reads": histories.reads,
        "context": {name: x for name, x in ordered.context.items() if name != SPANS},
        "user_features": dict(features["user"]),
        "item_features": dict(features["item"]),
    }
    return data if np.array_equal(ends, np.arange(len(ends))) else data | {"end": ends}


def gather_sequences(data: Mapping[str, Any], places: Any) -> Batch:
    """The batch of packed rows, [B, S] of all that `batches.gather` has [B] of; "user" and "item"
    are -1 where a place is empty.

    The target of a place is asked from the place whose input is the last event that is strictly
    earlier: "asked" [B, S], where that is not always the place itself. A target has no weight where
    its history was cut off and nothing of it is left.

    Works on NumPy arrays, and inside `jit` on those that rest on the device.

    Args:
        places: int32 [B, S, 2], see `SequencePacking.expand`.
    """
    valid, position = places[..., 0] >= 0, places[..., 1] * (places[..., 0] >= 0)
    target = places[..., 0] * valid
    begun = valid & (position > 0)
    start, known = target - position, position
    slot = np.arange(places.shape[1], dtype=np.int32)[None]
    batch: Batch = {}
    if "end" in data:
        end = data["end"][target]
        known = (end - start) * (end > start)
        batch["asked"] = slot - position + known
    user, item = data["user"][target], data["item"][target]
    weight = data["weight"][target] * (valid & ((known > 0) | (data["begin"][target] == start)))

    def at(x: Any, ids: Any) -> Any:
        found = x[ids]
        return found * valid.reshape(*valid.shape, *[1] * (found.ndim - 2))

    events = read_events(
        data["events"], data["reads"], (target - 1) * begun, begun, first=position == 1
    )
    return batch | {
        "user": user * valid - ~valid,
        "item": item * valid - ~valid,
        "weight": weight,
        "labels": {name: x[target] for name, x in data["labels"].items()},
        "item_features": {name: at(x, item) for name, x in data["item_features"].items()},
        "user_features": events
        | {name: at(x, user) for name, x in data["user_features"].items()}
        | {name: at(x, target) for name, x in data["context"].items()}
        | {
            HISTORY_SEGMENT: (valid & (position == 0)).cumsum(1).astype(np.int32) * valid,
            HISTORY_POSITION: position,
        },
    }


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... of each length, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
