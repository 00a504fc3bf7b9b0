"""Sequences packed into rows: every target once, with the history that its row has, on the host as
inside `jit`."""

import jax
import numpy as np
import pytest

from tests.features.test_history import L, prepared_of, write_log
from twotower.features.history import HISTORY_POSITION, HISTORY_SEGMENT, HISTORY_TIME_SINCE_PREVIOUS
from twotower.pipeline.histories import SPANS
from twotower.pipeline.sequences import (
    SequenceBatches,
    SequencePacking,
    gather_sequences,
    pack,
    sequence_data,
)

IDS = "history/item_id"


@pytest.mark.parametrize(
    "lengths", [[1], [5] * 4, [1] * 7, list(range(1, 6)) * 9, [5, 1, 4, 2, 3, 3, 3]], ids=str
)
def test_rows_are_filled_with_whole_sequences(lengths):
    lengths, size = np.array(lengths), 5
    order, rows, slots = pack(lengths, size, seed=0)
    assert sorted(order) == list(range(len(lengths)))
    for row in range(rows.max() + 1):
        here = rows == row
        ends = np.cumsum(lengths[order[here]])
        assert slots[here].tolist() == [0, *ends[:-1]] and ends[-1] <= size
    assert rows.max() + 1 <= np.ceil(
        1.3 * lengths.sum() / size
    )  # first fit decreasing is within 11/9 of the best


def begun(tmp_path, *, times=None, crop="last", rows=120, **history):
    prepared = prepared_of(
        write_log(tmp_path / "log.csv", times=times, rows=rows),
        {"kind": "leave_last_out"},
        **history,
    )
    return prepared, SequencePacking.build(prepared.histories, crop=crop, seed=0)


@pytest.mark.parametrize(
    "times,feature",
    [(None, {}), (40, {"gaps": 5}), (40, {"gaps": 30, "request_gap": True})],
    ids=["no times", "ties", "ties, times of requests"],
)
def test_each_target_is_asked_with_the_history_of_its_row(tmp_path, times, feature):
    prepared, plan = begun(tmp_path, times=times, **feature)
    data = sequence_data(prepared.train, prepared.features, prepared.histories)
    places = plan.expand(np.arange(len(plan)), np.zeros(len(plan), int))
    batch = gather_sequences(data, places)
    order = prepared.histories.orders["train"]
    expected = prepared.histories.take(prepared.train.context[SPANS][order])
    segment, position = (
        batch["user_features"][name] for name in (HISTORY_SEGMENT, HISTORY_POSITION)
    )
    asked = batch.get("asked", np.broadcast_to(np.arange(plan.places), segment.shape))
    assert ("asked" in batch) == bool(times)
    seen = []
    for b, s in np.argwhere(places[..., 0] >= 0):
        target, at = places[b, s, 0], asked[b, s]
        for name in ("user", "item"):
            assert batch[name][b, s] == getattr(prepared.train, name)[order[target]]
        known = (segment[b] == segment[b, s]) & (np.arange(plan.places) <= at) & (position[b] > 0)
        # What the tower may read there is what the row's own history is, but for what was cut off.
        for name in expected:
            history, cut = batch["user_features"][name][b, known], expected[name][target]
            count = (expected[IDS][target] > 0).sum()
            assert batch["weight"][b, s] == (len(history) > 0 or count == 0)
            if (
                name == HISTORY_TIME_SINCE_PREVIOUS
            ):  # what was before the first event that is read is not known
                assert not history[:1].any() and (history[1:] > 0).all()
                history, cut = history[1:], cut[count - len(history) + 1 :]
                count = len(history)
            np.testing.assert_array_equal(
                history, cut[:count][len(cut[:count]) - len(history) :] if len(history) else []
            )
        seen += [target] * int(batch["weight"][b, s] > 0)
    lengths = np.bincount(prepared.train.user)
    begins = prepared.histories.offsets["train"]
    every = [
        e
        for u in range(len(lengths))
        for e in range(max(begins[u], begins[u + 1] - L), begins[u + 1])
    ]
    if not times:
        assert sorted(seen) == every
    assert (batch["user"][places[..., 0] < 0] == -1).all() and (
        batch["item"][places[..., 0] < 0] == -1
    ).all()
    empty = places[..., 0] < 0
    assert not any(
        x[empty].any()
        for x in [
            batch["weight"],
            *batch["user_features"].values(),
            *batch["item_features"].values(),
        ]
    )
    inside = jax.tree.map(np.asarray, jax.jit(gather_sequences)(data, places))
    jax.tree.map(np.testing.assert_array_equal, inside, jax.tree.map(np.asarray, batch))


def test_a_random_crop_is_another_in_each_pass_and_its_rates_are_known(tmp_path):
    prepared, plan = begun(tmp_path, crop="random")
    count, rows = len(prepared.train), np.arange(len(plan))
    data = sequence_data(prepared.train, prepared.features, prepared.histories)
    targets = []
    for number in range(2000):
        places = plan.expand(rows, np.full(len(rows), number))
        start = places[..., 0] - places[..., 1]
        counts = (places[..., 0] >= 0) & (
            (places[..., 1] > 0) | (data["begin"][places[..., 0]] == start)
        )
        targets.append(np.bincount(places[counts][:, 0], minlength=count))
    np.testing.assert_allclose(np.mean(targets, 0), plan.rates(count), atol=0.05)
    assert any((targets[0] != other).any() for other in targets[1:9])
    np.testing.assert_array_equal(
        plan.expand(rows[:2], np.array([3, 7])), plan.expand(rows[:2], np.array([3, 7]))
    )


@pytest.mark.parametrize("crop", ["last", "random"])
def test_batches_are_full_rows_and_a_function_of_the_step(tmp_path, crop):
    prepared, plan = begun(tmp_path, crop=crop)
    options = {"batch_size": 3, "seed": 1, "resident_megabytes": 1}
    batches = [
        SequenceBatches(prepared.train, prepared.features, prepared.histories, plan, **options)
        for _ in range(2)
    ]
    for step in (5, 0, 17):
        np.testing.assert_array_equal(batches[0].indices(step), batches[1].indices(step))
    one_pass = np.concatenate(
        [batches[0].indices(step) for step in range(len(plan))]
    )  # three passes
    found = np.bincount(one_pass[..., 0][one_pass[..., 0] >= 0], minlength=len(prepared.train))
    if crop == "last":
        assert set(found[plan.rates(len(found)) > 0].tolist()) == {3}
    np.testing.assert_array_equal(
        plan.rates(len(found)), begun(tmp_path, crop=crop)[1].rates(len(found))
    )


def test_the_rates_of_last_crops_are_what_a_pass_has(tmp_path):
    prepared, plan = begun(tmp_path)
    data = sequence_data(prepared.train, prepared.features, prepared.histories)
    batch = gather_sequences(data, plan.expand(np.arange(len(plan)), np.zeros(len(plan), int)))
    weights = np.zeros(len(prepared.train))
    places = plan.expand(np.arange(len(plan)), np.zeros(len(plan), int))[..., 0]
    weights[places[places >= 0]] = batch["weight"][places >= 0]
    np.testing.assert_array_equal(weights, plan.rates(len(weights)))
