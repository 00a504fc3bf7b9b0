"""Traps of what a checkpoint must hold: the optimizer's slots and the estimates of frequency, on
any division of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance import tiny
from twotower.core.mesh import make_mesh
from twotower.objectives.frequency import FREQUENCIES
from twotower.training.candidates import log_expected_count
from twotower.training.checkpoint import Checkpoints
from twotower.training.init import abstract_state

pytestmark = pytest.mark.slow


def _open(folder):
    return Checkpoints(folder, metric="recall@10", keep=9, run="kit")


def _equal(state, other):
    for (path, array), expected in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(array, expected, err_msg=jax.tree_util.keystr(path))


@pytest.mark.trap(29)
@pytest.mark.trap(30)
def test_a_state_goes_from_eight_devices_to_four_to_one_and_back(tmp_path):
    """Slots that are not restored restart training cold, and frequencies jump: every array comes
    back, where it is asked for.

    Slots and estimates are made to differ from fresh ones first.
    """
    trainer = tiny.build(
        objective={"negatives": {"uniform": 8, "frequency": "gap"}},
        training={"tables": {"kind": "adagrad"}},
    )
    fresh = tiny.start(trainer, 8)
    state = jax.tree.map(
        lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % 7 + 1, fresh
    )
    assert all(
        (a != b).all()
        for a, b in zip(jax.tree.leaves(state.table_slots), jax.tree.leaves(fresh.table_slots))
    )
    with _open(tmp_path) as checkpoints:
        for step, devices in enumerate((4, 1, 8)):
            checkpoints.save(step, state, record={}, metrics={})
            checkpoints.wait()
            restored, _ = checkpoints.restore(step, abstract_state(trainer, make_mesh(devices)))
            _equal(restored, state)
            assert restored.frequency["item"].keys() == fresh.frequency["item"].keys()
            for table in (restored.tables["item"], restored.table_slots["item"]["accumulator"]):
                assert len(table.sharding.device_set) == devices
                assert table.addressable_shards[0].data.shape[0] == len(table) // devices
            state = restored


@pytest.mark.trap(30)
def test_a_step_asks_the_frequencies_before_it_updates_them():
    """Updated before use, an estimate knows the draw that it is to correct, and jumps at resume."""
    trainer = tiny.everything()
    state = tiny.start(trainer)
    table = tiny.catalogue(trainer)["popularity"]
    for seed in range(2):
        after, _, heard = tiny.step(trainer)(state, tiny.batch(seed))
        items = jnp.asarray(tiny.batch(seed)["item"])
        # The queue holds one batch more each time.
        expected, updated = (
            log_expected_count(trainer.sampling, frequency["item"], table, tiny.B * seed, items)
            for frequency in (state.frequency, after.frequency)
        )
        np.testing.assert_allclose(heard["own"]["log_count"], expected, rtol=1e-5)
        assert (updated != expected).any()
        new = FREQUENCIES["gap"].update(state.frequency["item"], items, jnp.int32(seed))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.frequency["item"], new
        )
        state = after


@pytest.mark.trap(16)
@pytest.mark.trap(30)
@pytest.mark.parametrize("name", FREQUENCIES)
def test_estimates_are_arrays_alone_and_padding_does_not_touch_them(name):
    """What is no array is not in the checkpoint; and rows without an id, which fill a batch up, are
    not counted as one."""
    estimator = FREQUENCIES[name]
    arrays = estimator.init(jnp.arange(1.0, 9.0), jnp.float32(36))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(arrays))
    update = jax.jit(estimator.update)
    new = update(arrays, jnp.array([3, 3, -1, -1, 5], jnp.int32), jnp.int32(0))
    ids = jnp.array([0, 3, 5, 7], jnp.int32)
    found = np.asarray(estimator.log_expected_count(new, ids, 5))
    assert np.isfinite(found).all() and (found[3] <= found[1:3]).all() if estimator.learns else True
    without = update(arrays, jnp.array([3, 3, 5, 5, 5], jnp.int32)[:3], jnp.int32(0))
    kept = {"exact": "counts", "gap": "last", "sketch": "counts"}[name]
    np.testing.assert_array_equal(new[kept], without[kept])


@pytest.mark.trap(30)
def test_ids_are_hashed_alike_in_every_process():
    """Python's salted hash differs from process to process: these are the counters of ids 0 to 3,
    now and always."""
    sketch = FREQUENCIES["sketch"]
    arrays = sketch.init(jnp.ones(4), jnp.float32(4))
    arrays = sketch.update(arrays, jnp.arange(4, dtype=jnp.int32), jnp.int32(0))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(arrays["counts"])] == HASHED


HASHED = [[0, 565, 718, 871], [0, 280, 652, 932], [0, 22, 523, 546], [0, 276, 552, 828]]
