"""Sparse updates equal dense ones, duplicates merge, and no step costs the size of its table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twotower.kernels.sparse_update import (
    apply_gradients,
    apply_gradients_densely,
    merge_by_hashing,
    merge_by_sorting,
    merge_duplicates,
    slots_by_hashing,
)
from twotower.kernels.table_optimizers import TABLE_OPTIMIZERS
from twotower.towers.embeddings import init_table, lookup

V, D, N = 1024, 8, 64


def _ids(step: int) -> np.ndarray:
    # Zipf-like ids make many duplicates; 0 is padding.
    return (np.random.default_rng(step).zipf(1.3, N) % 40).astype(np.int32)


def _targets(step: int) -> np.ndarray:
    return np.random.default_rng(100 + step).normal(size=(N, D))


def _row_loss(rows, targets):
    return jnp.sum(jnp.square(rows - targets))


@functools.partial(jax.jit, static_argnames="kind")
def _sparse_step(kind, table, slots, ids, targets, rate, step):
    grads = jax.grad(_row_loss)(lookup(table, ids), targets)
    rows, merged = merge_duplicates(ids, grads, len(table))
    return TABLE_OPTIMIZERS[kind].update(table, slots, rows, merged, rate, step)


def _train_sparse(kind, table, steps, rate, initial=0.1):
    slots = TABLE_OPTIMIZERS[kind].init(table, initial)
    for step in range(steps):
        targets = jnp.asarray(_targets(step), table.dtype)
        table, slots = _sparse_step(kind, table, slots, _ids(step), targets, rate, step)
    return table, slots


def _train_dense(optimizer, table, steps):
    def loss(table, ids, targets):
        rows = jnp.where((ids == 0)[:, None], jax.lax.stop_gradient(table[ids]), table[ids])
        return _row_loss(rows, targets)

    @jax.jit
    def update(table, state, ids, targets):
        updates, state = optimizer.update(jax.grad(loss)(table, ids, targets), state, table)
        return optax.apply_updates(table, updates), state

    state = optimizer.init(table)
    for step in range(steps):
        table, state = update(table, state, _ids(step), jnp.asarray(_targets(step), table.dtype))
    return table, state


@pytest.mark.parametrize("initial", [0.0, 0.1])
def test_sparse_adagrad_equals_dense_adagrad(key, initial):
    table = init_table(key, V, D)
    sparse, slots = _train_sparse("adagrad", table, 30, 0.1, initial)
    dense, state = _train_dense(
        optax.adagrad(0.1, initial_accumulator_value=initial, eps=1e-12), table, 30
    )
    np.testing.assert_allclose(sparse, dense, atol=1e-6)
    np.testing.assert_allclose(slots["accumulator"], state[0].sum_of_squares, rtol=1e-6)


def test_sparse_sgd_equals_dense_sgd(key):
    table = init_table(key, V, D)
    np.testing.assert_allclose(
        _train_sparse("sgd", table, 10, 0.01)[0],
        _train_dense(optax.sgd(0.01), table, 10)[0],
        atol=1e-6,
    )


def test_lazy_adam_equals_adam_when_every_row_is_touched(key):
    optimizer = TABLE_OPTIMIZERS["lazy_adam"]
    dense = optax.adam(0.01)
    ids = np.arange(V, dtype=np.int32)

    @jax.jit
    def both(table, slots, expected, state, grads, step):
        rows, merged = merge_duplicates(jnp.asarray(ids), grads, V)
        table, slots = optimizer.update(table, slots, rows, merged, 0.01, step)
        updates, state = dense.update(grads, state)
        return table, slots, optax.apply_updates(expected, updates), state

    with jax.enable_x64():
        table = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)))
        slots = optimizer.init(table, 0.0)
        state = dense.init(table)
        expected = table
        for step in range(20):
            grads = jnp.asarray(np.random.default_rng(step).normal(size=(V, D))).at[0].set(0.0)
            table, slots, expected, state = both(table, slots, expected, state, grads, step)
    np.testing.assert_allclose(table, expected, rtol=1e-12, atol=1e-14)


def test_rowwise_adagrad_divides_by_one_number_a_row(key):
    table = init_table(key, V, D)
    new, slots = _train_sparse("rowwise_adagrad", table, 1, 0.1)
    ids = _ids(0)
    grads = np.zeros((V, D), np.float64)
    np.add.at(grads, ids, 2 * (np.asarray(table)[ids] - _targets(0)))
    grads[0] = 0
    accumulator = 0.1 + np.square(grads).mean(-1)
    expected = np.asarray(table) - 0.1 * grads / np.sqrt(accumulator)[:, None]
    np.testing.assert_allclose(new, expected, atol=1e-6)
    np.testing.assert_allclose(slots["accumulator"], accumulator, rtol=1e-5)


# Rows of tables that are passed over as a whole, and of those whose used rows are updated alone.
SIZES = (N // 2, N, N + 1, 9 * N)


# Programs of one shape are shared by all cases of it.
MERGES = {
    "of this platform": jax.jit(merge_duplicates, static_argnames="num_rows"),
    "hashing": jax.jit(merge_by_hashing, static_argnames="num_rows"),
    "sorting": jax.jit(merge_by_sorting, static_argnames="num_rows"),
}
SLOTS = jax.jit(slots_by_hashing, static_argnames="num_rows")


@pytest.mark.parametrize("num_rows", [6, 10, 1000])
@pytest.mark.parametrize("merge", MERGES)
def test_merge_duplicates_sums_and_gives_distinct_rows(merge, num_rows):
    none = 0 if merge == "of this platform" else num_rows  # padding, which has no row
    ids = np.array([5, none, 3, 5, none, 1], np.int32)
    grads = np.arange(12, dtype=np.float32).reshape(6, 2)
    rows, merged = map(np.asarray, MERGES[merge](ids, grads, num_rows=num_rows))
    assert len(set(rows.tolist())) == 6
    found = {int(r): m.tolist() for r, m in zip(rows, merged) if r < num_rows}
    assert found == {3: [4, 5], 5: [0 + 6, 1 + 7], 1: [10, 11]}
    assert not merged[rows >= num_rows].any()


IDS = ["alike", "few", "many", "of no row", "one", "that differ in their last bits"]


def _local(ids: str, rows: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return {
        "alike": np.full(300, 7),
        "few": rng.integers(0, 5, 300),
        "many": rng.integers(0, rows, 300),
        "of no row": np.where(rng.random(300) < 0.5, rows, rng.integers(0, 40, 300)),
        "one": np.array([rows - 1]),
        "that differ in their last bits": np.arange(300) * (rows // 300) + rng.integers(0, 2, 300),
    }[ids].astype(np.int32)


@pytest.mark.parametrize("ids", IDS)
def test_distinct_ids_are_found_whatever_they_are(ids):
    """Every id's places share one slot, which holds its row; all other slots hold rows past the
    end, each another one."""
    rows = 2**30
    local = _local(ids, rows)
    slot, found = map(np.asarray, SLOTS(local, num_rows=rows))
    inside = local < rows
    np.testing.assert_array_equal(found[slot[inside]], local[inside])
    assert (slot[~inside] == len(local)).all() and len(np.unique(found)) == len(local)
    np.testing.assert_array_equal(np.sort(found[found < rows]), np.unique(local[inside]))


@pytest.mark.parametrize("num_rows", [300, 301, 2**20])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("merge", ["hashing", "sorting"])
def test_gradients_are_summed_whatever_the_ids_are(merge, ids, num_rows):
    """Of whole numbers, which every order of adding sums alike."""
    local = _local(ids, num_rows)
    grads = np.random.default_rng(4).integers(-9, 9, (len(local), 3)).astype(np.float32)
    rows, merged = map(np.asarray, MERGES[merge](local, grads, num_rows=num_rows))
    assert len(np.unique(rows)) == len(rows) == min(len(local), num_rows)
    assert len(merged) == len(rows)
    used = np.flatnonzero(rows < num_rows)
    np.testing.assert_array_equal(np.sort(rows[used]), np.unique(local[local < num_rows]))
    for row, total in zip(rows[used], merged[used]):
        np.testing.assert_array_equal(total, grads[local == row].sum(0))
    assert not merged[rows >= num_rows].any()
    if num_rows <= len(local):
        np.testing.assert_array_equal(used, rows[used])


def test_sums_by_sorting_scatter_into_distinct_rows_alone():
    """A scatter that adds to one row twice does so in any order on a GPU."""
    text = (
        jax.jit(functools.partial(merge_by_sorting, num_rows=5))
        .lower(jnp.zeros(9, jnp.int32), jnp.zeros((9, 2)))
        .as_text()
    )
    assert text.count('"stablehlo.scatter"(') == text.count("unique_indices = true") == 2


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
def test_tables_of_every_size_are_updated_as_the_plain_reference_does(kind, num_rows):
    optimizer = TABLE_OPTIMIZERS[kind]
    fast = jax.jit(functools.partial(apply_gradients, optimizer))
    plain = jax.jit(functools.partial(apply_gradients_densely, optimizer))
    first = np.random.default_rng(5).normal(size=(num_rows, D)).astype(np.float32)
    table = expected = jnp.asarray(first)
    slots = expected_slots = optimizer.init(table, 0.1)
    for step in range(2):
        ids = _ids(step) % num_rows
        grads = _targets(step).astype(np.float32)
        table, slots, norm = fast(table, slots, ids, grads, 0.1, step)
        expected, expected_slots, expected_norm = plain(
            expected, expected_slots, ids, grads, 0.1, step
        )
        np.testing.assert_allclose(norm, expected_norm, rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        (table, slots),
        (expected, expected_slots),
    )
    idle = np.setdiff1d(np.arange(num_rows), np.concatenate([_ids(0), _ids(1)]) % num_rows)
    np.testing.assert_array_equal(np.asarray(table)[idle], first[idle])


@pytest.mark.parametrize("share", [N, N * 2, 20 * N])
def test_the_shares_of_a_table_are_updated_as_the_whole_is(share):
    """The first row of a later share is no padding, and what is another's is left to it."""
    optimizer = TABLE_OPTIMIZERS["adagrad"]
    rng = np.random.default_rng(6)
    table = rng.normal(size=(4 * share, D)).astype(np.float32)
    slots = optimizer.init(jnp.asarray(table), 0.1)
    ids = jnp.asarray(np.append(_ids(0)[1:] * 7 % (4 * share), share), jnp.int32)
    grads = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    whole = jax.jit(functools.partial(apply_gradients, optimizer))
    expected = whole(table, slots, ids, grads, 0.1, 0)

    def part(table, slots):
        first = jax.lax.axis_index("devices") * share
        table, slots, norm = apply_gradients(
            optimizer, table, slots, ids, grads, 0.1, 0, first=first
        )
        return table, slots, jax.lax.psum(norm, "devices")

    mesh, split = (
        jax.sharding.Mesh(jax.devices()[:4], "devices"),
        jax.sharding.PartitionSpec("devices"),
    )
    specs = (split, {"accumulator": split}, jax.sharding.PartitionSpec())
    found = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs[:2], out_specs=specs))(
        table, slots
    )
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found[:2], expected[:2])
    idle = np.setdiff1d(np.arange(4 * share), np.asarray(ids))
    updated = np.asarray(found[0])
    np.testing.assert_array_equal(updated[idle], table[idle])
    assert not np.array_equal(updated[share], table[share])


@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
def test_the_compiled_update_makes_no_array_of_table_size(kind):
    optimizer = TABLE_OPTIMIZERS[kind]
    table = jax.ShapeDtypeStruct((200_000, D), jnp.float32)
    slots = jax.eval_shape(lambda table: optimizer.init(table, 0.1), table)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(table, slots, ids):
        grads = lookup(table, ids) * 2
        return optimizer.update(table, slots, *merge_duplicates(ids, grads, table.shape[0]), 0.1, 3)

    memory = update.lower(table, slots, _ids(0)).compile().memory_analysis()
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((table, slots)))
    assert memory.alias_size_in_bytes == state_bytes
    assert memory.temp_size_in_bytes < table.size * 4 / 50
