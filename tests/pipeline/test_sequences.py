"""Packed sequences: every target once, with the history of its row, alike on host and device."""

import jax
import numpy as np
import pytest

from tests.pipeline.history_log import LENGTH, prepare_log, write_log
from twotower.features.inputs import HISTORY_POSITION, HISTORY_SEGMENT, HISTORY_TIME_SINCE_PREVIOUS
from twotower.pipeline.batches import SPANS, Batches
from twotower.pipeline.sequences import (
    SequenceExamples,
    SequencePacking,
    gather_sequences,
    pack,
    sequence_data,
)

IDS = "history/item_id"


def prepare_and_pack(tmp_path, *, times=None, crop="last", **history):
    path = write_log(tmp_path / "log.csv", times=times, rows=120)
    prepared = prepare_log(path, {"kind": "leave_last_out"}, **history)
    return prepared, SequencePacking.build(prepared.histories, crop=crop, seed=0)


def data_of(prepared):
    return sequence_data(prepared.train, prepared.features, prepared.histories)


def first_pass(packing):
    """The content of all packed rows in their first pass."""
    return packing.expand(np.arange(len(packing)), np.zeros(len(packing), int))


@pytest.mark.parametrize(
    "lengths", [[1], [5] * 4, [1] * 7, list(range(1, 6)) * 9, [5, 1, 4, 2, 3, 3, 3]], ids=str
)
def test_rows_are_filled_with_whole_sequences(lengths):
    size = 5
    lengths = np.array(lengths)
    order, rows, first_slots = pack(lengths, size, seed=0)
    assert sorted(order) == list(range(len(lengths)))
    for row in range(rows.max() + 1):
        in_row = rows == row
        ends = np.cumsum(lengths[order[in_row]])
        assert first_slots[in_row].tolist() == [0, *ends[:-1]]
        assert ends[-1] <= size
    # First fit decreasing is within 11/9 of the best.
    assert rows.max() + 1 <= np.ceil(1.3 * lengths.sum() / size)


CASES = {
    "no times": (None, {}),
    "ties": (40, {"gaps": 5}),
    "ties, times of requests": (40, {"gaps": 30, "request_gap": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_target_is_predicted_from_the_history_of_its_row(tmp_path, case):
    times, feature = CASES[case]
    prepared, packing = prepare_and_pack(tmp_path, times=times, **feature)
    data = data_of(prepared)
    content = first_pass(packing)
    batch = gather_sequences(data, content)
    order = prepared.histories.orders["train"]
    histories = prepared.histories.take(prepared.train.context[SPANS][order])
    features = batch["user_features"]
    segment = features[HISTORY_SEGMENT]
    position = features[HISTORY_POSITION]
    slots = np.arange(packing.num_slots)
    assert ("query_slot" in batch) == bool(times)
    query_slot = batch.get("query_slot", np.broadcast_to(slots, segment.shape))
    counted = []
    for row, slot in np.argwhere(content[..., 0] >= 0):
        target = content[row, slot, 0]
        for name in ("user", "item"):
            assert batch[name][row, slot] == getattr(prepared.train, name)[order[target]]
        # What the tower may read there is the row's own history, but for what was cut off.
        is_read = segment[row] == segment[row, slot]
        is_read &= slots <= query_slot[row, slot]
        is_read &= position[row] > 0
        count = (histories[IDS][target] > 0).sum()
        assert batch["weight"][row, slot] == (is_read.any() or count == 0)
        for name in histories:
            seen = features[name][row, is_read]
            whole = histories[name][target][:count]
            if name == HISTORY_TIME_SINCE_PREVIOUS:
                # The time since an event that was cut off is not known.
                assert not seen[:1].any() and (seen[1:] > 0).all()
                seen = seen[1:]
            np.testing.assert_array_equal(seen, whole[count - len(seen) :])
        if batch["weight"][row, slot] > 0:
            counted.append(target)
    if not times:
        assert sorted(counted) == targets_with_history(prepared)
    check_empty_slots(batch, content[..., 0] < 0)
    inside = jax.jit(gather_sequences)(data, content)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(inside), batch)


def targets_with_history(prepared):
    """The training events that a sequence holds together with an event before."""
    begins = prepared.histories.offsets["train"]
    targets = []
    for begin, end in zip(begins[:-1], begins[1:]):
        targets += range(max(begin, end - LENGTH), end)
    return targets


def check_empty_slots(batch, is_empty):
    assert is_empty.any()
    for name in ("user", "item"):
        assert (batch[name][is_empty] == -1).all()
    arrays = [batch["weight"], *batch["user_features"].values(), *batch["item_features"].values()]
    for values in arrays:
        assert not values[is_empty].any()


def test_a_random_crop_differs_between_passes_and_its_rates_are_known(tmp_path):
    prepared, packing = prepare_and_pack(tmp_path, crop="random")
    num_events = len(prepared.train)
    begin_of_user = data_of(prepared)["begin"]
    rows = np.arange(len(packing))
    counts = []
    for number in range(2000):
        content = packing.expand(rows, np.full(len(rows), number))
        targets, positions = content[content[..., 0] >= 0].T
        is_whole = begin_of_user[targets] == targets - positions
        counts.append(np.bincount(targets[(positions > 0) | is_whole], minlength=num_events))
    np.testing.assert_allclose(np.mean(counts, 0), packing.target_rates(num_events), atol=0.05)
    assert any((counts[0] != other).any() for other in counts[1:9])
    passes = np.array([3, 7])
    np.testing.assert_array_equal(
        packing.expand(rows[:2], passes), packing.expand(rows[:2], passes)
    )


@pytest.mark.parametrize("crop", ["last", "random"])
def test_batches_are_full_rows_and_a_function_of_the_step(tmp_path, crop):
    prepared, packing = prepare_and_pack(tmp_path, crop=crop)
    one, other = (
        Batches(
            SequenceExamples(prepared.train, prepared.features, prepared.histories, packing),
            batch_size=3,
            seed=1,
            resident_megabytes=1,
        )
        for _ in range(2)
    )
    for step in (5, 0, 17):
        np.testing.assert_array_equal(one.indices(step), other.indices(step))
    if crop == "last":
        # As many steps of three rows as there are rows are three passes.
        three_passes = np.concatenate([one.indices(step) for step in range(len(packing))])
        targets = three_passes[..., 0]
        num_events = len(prepared.train)
        counts = np.bincount(targets[targets >= 0], minlength=num_events)
        assert set(counts[packing.target_rates(num_events) > 0].tolist()) == {3}


def test_the_rates_of_last_crops_are_what_a_pass_has(tmp_path):
    prepared, packing = prepare_and_pack(tmp_path)
    content = first_pass(packing)
    batch = gather_sequences(data_of(prepared), content)
    is_filled = content[..., 0] >= 0
    weights = np.zeros(len(prepared.train))
    weights[content[is_filled][:, 0]] = batch["weight"][is_filled]
    np.testing.assert_array_equal(weights, packing.target_rates(len(weights)))
