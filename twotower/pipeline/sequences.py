"""Training on sequences: windows of users' events, packed into rows of S = L + 1 slots.

A slot holds a target, the event to be predicted there. Its input is the event before it, and at the
beginning of a sequence the start token. So a sequence takes as many slots as it has targets, and
one pass over a row trains all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from twotower.features.inputs import HISTORY_POSITION, HISTORY_SEGMENT
from twotower.pipeline.batches import SPANS, Batch, Features, InteractionRows, read_events
from twotower.pipeline.histories import Histories


@dataclasses.dataclass(frozen=True, eq=False)
class SequencePacking:
    """The place of each sequence in the packed rows.

    A user with at most S events is one sequence; of a longer one each pass crops S events.

    Attributes:
        num_slots: S, the slots of a row.
        begins: int64 [W], first event of the user of each sequence.
        ends: int64 [W], one after the last event of that user.
        lengths: int64 [W], slots that each sequence takes, at most S.
        offsets: int64 [rows + 1], first sequence of each packed row, in the arrays above.
        first_slots: int64 [W], first slot of each sequence in its row.
        crop: "last" takes the latest events of a long user, "random" others in each pass.
        seed: Seed of random crops.
    """

    num_slots: int
    begins: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    first_slots: np.ndarray
    crop: str
    seed: int

    @classmethod
    def build(cls, histories: Histories, *, crop: str, seed: int) -> SequencePacking:
        """Packs the sequences of all users with training events."""
        num_slots = histories.length + 1
        offsets = histories.offsets["train"]
        # Users of held-out rows alone have nothing to train on.
        has_events = np.diff(offsets) > 0
        begins = offsets[:-1][has_events]
        ends = offsets[1:][has_events]
        lengths = np.minimum(ends - begins, num_slots)
        order, rows, first_slots = pack(lengths, num_slots, seed=seed)
        num_rows = rows.max(initial=-1) + 1
        sequences_in_row = np.bincount(rows, minlength=num_rows)
        return cls(
            num_slots=num_slots,
            begins=begins[order],
            ends=ends[order],
            lengths=lengths[order],
            offsets=np.append(0, np.cumsum(sequences_in_row)),
            first_slots=first_slots,
            crop=crop,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def expand(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Returns the content of packed rows.

        Args:
            rows: int [B], the rows.
            passes: int [B], the pass over the data in which each stands: random crops differ
                between passes.

        Returns:
            int32 [B, S, 2]: the target of each slot (-1: none), and the number of slots of its
            sequence that are before it.
        """
        counts = np.diff(self.offsets)[rows]
        row_of_sequence = np.repeat(np.arange(len(rows)), counts)
        sequences = self.offsets[rows][row_of_sequence] + count_up(counts)
        lengths = self.lengths[sequences]
        first_targets = self._first_targets(sequences, passes[row_of_sequence])
        # From here on one entry a filled slot.
        position = count_up(lengths)
        row = np.repeat(row_of_sequence, lengths)
        slot = np.repeat(self.first_slots[sequences], lengths) + position
        target = np.repeat(first_targets, lengths) + position
        # -1 marks an empty slot, whose number no event has.
        content = np.full((len(rows), self.num_slots, 2), -1, np.int32)
        content[row, slot] = np.stack([target, position], axis=1)
        return content

    def target_rates(self, num_events: int) -> np.ndarray:
        """Returns how often a pass has each event as a target that counts, float64 [events].

        The first target of a crop does not count, since its history was cut off, unless it is the
        first event of the user.
        """
        rates = np.ones(num_events)
        num_user_events = self.ends - self.begins
        # All others are whole in every pass: each of their events is a target once.
        is_cropped = num_user_events > self.lengths
        sizes = num_user_events[is_cropped]
        # One entry for each event of the users whose sequences are cropped.
        position = count_up(sizes)
        length = np.repeat(self.lengths[is_cropped], sizes)
        last_start = np.repeat(sizes, sizes) - length
        if self.crop == "last":
            cropped_rates = position > last_start
        else:
            # Crops start at 0 to `last_start`, each as likely. Those that hold an event, and not as
            # their first target, start at least one and at most `length` - 1 events before it.
            latest = np.minimum(position - 1, last_start)
            earliest = np.maximum(position - length + 1, 0)
            crops = np.maximum(latest - earliest + 1, 0) + (position == 0)
            cropped_rates = crops / (last_start + 1)
        rates[np.repeat(self.begins[is_cropped], sizes) + position] = cropped_rates
        return rates

    def _first_targets(self, sequences: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Returns the first target, int64 [M], of sequences in their passes over the data."""
        last_start = self.ends[sequences] - self.lengths[sequences]
        if self.crop == "last":
            return last_start
        starts = np.empty(len(sequences), np.int64)
        for number in np.unique(passes):
            is_in_pass = passes == number
            # One draw for every sequence, so that a crop does not depend on the batch.
            rng = np.random.default_rng((self.seed, int(number), 1))
            uniform = rng.random(len(self.begins))[sequences[is_in_pass]]
            begin = self.begins[sequences[is_in_pass]]
            num_starts = last_start[is_in_pass] - begin + 1
            starts[is_in_pass] = begin + (uniform * num_starts).astype(np.int64)
        return starts


def pack(lengths: np.ndarray, size: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts sequences into rows of `size` slots, the longest that still fits first.

    Args:
        lengths: int [W], from 1 to `size`.
        size: Slots of a row.
        seed: Seed of the shuffle of sequences of one length.

    Returns:
        The sequences row by row, int64 [W], and for each of them in this order its row and its
        first slot, int64 [W] each.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    # Shuffled first: the order of users would else decide which of them share a row.
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    counts = np.bincount(lengths, minlength=size + 1)
    # Lists: the loop below reads single numbers, which NumPy is slow at.
    next_position = (np.cumsum(counts) - counts).tolist()
    left = counts.tolist()
    order = []
    rows = []
    first_slots = []
    row = 0
    free = size
    length = size
    while len(order) < len(lengths):
        length = min(length, free)
        while length and not left[length]:
            length -= 1
        if not length:  # nothing that is left fits into this row
            row += 1
            free = size
            length = size
            continue
        order.append(next_position[length])
        rows.append(row)
        first_slots.append(size - free)
        next_position[length] += 1
        left[length] -= 1
        free -= length
    sequences = by_length[np.array(order, np.int64)]
    return sequences, np.array(rows, np.int64), np.array(first_slots, np.int64)


class SequenceExamples:
    """Packed rows of sequences as examples, for `twotower.pipeline.batches.Batches`.

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
        self.data = sequence_data(rows, features, histories)
        self._packing = packing

    def __len__(self) -> int:
        return len(self._packing)

    def index(self, examples: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Returns the content of packed rows, see `SequencePacking.expand`."""
        return self._packing.expand(examples, passes)

    def gather(self, data: Mapping[str, Any], index: Any) -> Batch:
        return gather_sequences(data, index)


def sequence_data(
    rows: InteractionRows, features: Features, histories: Histories
) -> dict[str, Any]:
    """Returns the arrays that `gather_sequences` reads: training rows by user and time.

    Row and event are the same thing here: event i of the histories is row i.
    """
    ordered = rows.take(histories.orders["train"])
    begins = histories.offsets["train"][ordered.user]
    data = ordered.arrays()
    spans = data["context"].pop(SPANS)
    data |= {
        "begin": begins.astype(np.int32),
        "events": histories.training_events,
        "reads": histories.reads,
        "user_features": dict(features["user"]),
        "item_features": dict(features["item"]),
    }
    # The end of a row's history is the row itself, but where several rows of a user have one time:
    # then it is the first of them.
    ends = spans[:, 1]
    if not np.array_equal(ends, np.arange(len(ends))):
        data["end"] = ends
    return data


def gather_sequences(data: Mapping[str, Any], content: Any) -> Batch:
    """Returns the batch of packed rows, with [B, S] of all that a batch of rows has [B] of.

    "user" and "item" are -1 in an empty slot. A target is predicted from the slot whose input is
    the last event that is strictly earlier: "query_slot" int32 [B, S], where that is not always
    its own slot. A target has no weight where its history was cut off and nothing of it is left.

    Works on NumPy arrays, and inside `jit` on those of the device.

    Args:
        data: Result of `sequence_data`.
        content: int32 [B, S, 2], see `SequencePacking.expand`.
    """
    is_filled = content[..., 0] >= 0
    # Empty slots read row 0, and are set to 0 below: inside `jit` shapes cannot depend on them.
    target = content[..., 0] * is_filled
    position = content[..., 1] * is_filled
    has_input = is_filled & (position > 0)
    start = target - position
    # Number of earlier events that the sequence holds.
    num_known = position
    batch: Batch = {}
    if "end" in data:
        end = data["end"][target]
        num_known = (end - start) * (end > start)
        slot = np.arange(content.shape[1], dtype=np.int32)[None]
        batch["query_slot"] = slot - position + num_known
    user = data["user"][target]
    item = data["item"][target]
    # The first event of a user is predicted from the start token alone, as it is for a new one.
    is_whole = data["begin"][target] == start
    counts = is_filled & ((num_known > 0) | is_whole)

    def read(values: Any, rows: Any) -> Any:
        """Returns values [V, ...] at rows [B, S], 0 in empty slots."""
        taken = values[rows]
        trailing = [1] * (taken.ndim - 2)
        return taken * is_filled.reshape(*is_filled.shape, *trailing)

    # The input of a slot is the event before its target.
    user_features = read_events(
        data["events"], data["reads"], (target - 1) * has_input, has_input, first=position == 1
    )
    user_features |= {name: read(x, user) for name, x in data["user_features"].items()}
    user_features |= {name: read(x, target) for name, x in data["context"].items()}
    begins_here = is_filled & (position == 0)
    # Sequences of a row are numbered from 1, 0 is empty: attention stays within a number.
    user_features[HISTORY_SEGMENT] = begins_here.cumsum(1).astype(np.int32) * is_filled
    user_features[HISTORY_POSITION] = position
    return batch | {
        "user": user * is_filled - ~is_filled,
        "item": item * is_filled - ~is_filled,
        "weight": data["weight"][target] * counts,
        "labels": {name: x[target] for name, x in data["labels"].items()},
        "item_features": {name: read(x, item) for name, x in data["item_features"].items()},
        "user_features": user_features,
    }


def count_up(lengths: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ... up to each length, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
