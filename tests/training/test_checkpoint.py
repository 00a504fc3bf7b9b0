"""Checkpoints of earlier versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.divided import mesh_of
from twotower.core.errors import CheckpointError
from twotower.training.checkpoint import Checkpoints, OldPlateau
from twotower.training.state import TrainState


def make_state(**opt_state):
    array = jnp.arange(6.0).reshape(2, 3)
    return TrainState(
        step=jnp.int32(3),
        params={"kernel": array},
        tables={"item": array + 1},
        batch_stats={},
        opt_state={"dense": {"mu": array + 2}, **opt_state},
        table_slots={"item": {"accumulator": array + 3}},
        frequency={},
        negatives={},
    )


def abstract_of(state):
    def describe(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(describe, state)


@pytest.fixture
def old_checkpoints(tmp_path):
    """The folder of a run that kept a plateau's state though its schedule is another."""
    plateau = OldPlateau(jnp.float32(1.0), jnp.float32(0.25), jnp.int32(2))
    with Checkpoints(tmp_path / "old", metric="recall@10", keep=1, run="r") as checkpoints:
        checkpoints.save(3, make_state(plateau=plateau), record={}, metrics={})
        checkpoints.wait()
        yield checkpoints


def test_the_old_state_of_a_plateau_is_read_and_dropped(old_checkpoints):
    expected = make_state()
    restored, _ = old_checkpoints.restore(3, abstract_of(expected))
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_another_model_is_refused_as_before(old_checkpoints):
    other = make_state()
    other.tables["user"] = other.tables.pop("item")
    with pytest.raises(CheckpointError, match="cannot be restored"):
        old_checkpoints.restore(3, abstract_of(other))


def test_rows_that_another_number_of_devices_pads_are_left_out_and_no_others(tmp_path):
    table = jnp.zeros((3072, 2)).at[:1000].set(jnp.arange(2000.0).reshape(1000, 2))
    sharded = jax.sharding.NamedSharding(mesh_of(3), jax.P("devices"))
    saved = make_state().replace(tables={"item": jax.device_put(table, sharded)})
    with Checkpoints(tmp_path / "three", metric="recall@10", keep=1, run="r") as checkpoints:
        checkpoints.save(3, saved, record={}, metrics={})
        checkpoints.wait()
        alone = make_state().replace(tables={"item": table[:1024]})
        restored, _ = checkpoints.restore(3, abstract_of(alone))
        np.testing.assert_array_equal(restored.tables["item"], table[:1024])
        # The rows of more items than three devices pad to 3,072.
        other = make_state().replace(tables={"item": jnp.zeros((4096, 2))})
        with pytest.raises(CheckpointError, match="cannot be restored"):
            checkpoints.restore(3, abstract_of(other))
