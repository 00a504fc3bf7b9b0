"""Tables: how rows begin, whichever device makes them, how they are looked up and pooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.towers.embeddings import init_table, padded_rows, pool

D = 8


@pytest.fixture(scope="module")
def table():
    return init_table(jax.random.key(0), 1500, D)


def test_a_table_begins_as_a_smaller_one_does_and_its_padding_row_is_zero(table):
    large = init_table(jax.random.key(0), 5000, D)
    np.testing.assert_array_equal(table, large[: len(table)])
    assert len(table) == padded_rows(1500) == 2048
    assert not table[0].any()
    assert abs(float(jnp.linalg.norm(large[1:], axis=-1).mean()) - 1) < 0.05


@pytest.mark.parametrize("start, count", [(0, 3), (1, 1), (100, 1500), (1023, 2), (1024, 1024)])
def test_any_slice_of_a_table_can_be_made_alone(table, start, count):
    def make(start):
        return init_table(jax.random.key(0), 1500, D, start=start, count=count)

    np.testing.assert_array_equal(make(start), table[start : start + count])
    np.testing.assert_array_equal(jax.jit(make)(jnp.int32(start)), table[start : start + count])


def test_the_devices_of_a_mesh_make_the_table_that_one_device_makes(table):
    share = padded_rows(1500) // 8

    def part():
        start = jax.lax.axis_index("devices") * share
        return init_table(jax.random.key(0), 1500, D, start=start, count=share)

    mesh = jax.sharding.Mesh(jax.devices()[:8], "devices")
    spec = jax.sharding.PartitionSpec("devices")
    parts = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(), out_specs=spec))()
    np.testing.assert_array_equal(parts, table)


def test_pool_ignores_padding():
    rows = jnp.array([[[1.0, 3.0], [3.0, 5.0], [100.0, 100.0]], [[7.0, 7.0]] * 3])
    pooled = pool(rows, jnp.array([[4, 2, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(pooled, [[2.0, 4.0], [0.0, 0.0]])
