"""Tables: sparse updates equal dense ones, duplicates merge, and no step costs V."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twotower.towers.embeddings import (
    OPTIMIZERS,
    apply_gradients,
    init_table,
    lookup,
    merge_by_hashing,
    merge_by_sorting,
    merge_duplicates,
    padded_rows,
    pool,
    slots_by_hashing,
)

V, D, N = 1024, 8, 64


def _ids(step: int) -> np.ndarray:
    # Zipf-like ids make many duplicates; 0 is padding.
    return (np.random.default_rng(step).zipf(1.3, N) % 40).astype(np.int32)


def _row_loss(rows, step):
    target = np.random.default_rng(100 + step).normal(size=(N, D)).astype(rows.dtype)
    return jnp.sum(jnp.square(rows - target))


def _train_sparse(kind, table, steps, rate, initial=0.1):
    optimizer = OPTIMIZERS[kind]
    slots = optimizer.init(table, initial)
    for step in range(steps):
        ids = jnp.asarray(_ids(step))
        grads = jax.grad(_row_loss)(lookup(table, ids), step)
        table, slots = optimizer.update(table, slots, *merge_duplicates(ids, grads, V), rate, step)
    return table, slots


def _train_dense(optimizer, table, steps):
    state = optimizer.init(table)
    for step in range(steps):
        ids = jnp.asarray(_ids(step))

        def loss(table, ids=ids, step=step):
            rows = jnp.where((ids == 0)[:, None], jax.lax.stop_gradient(table[ids]), table[ids])
            return _row_loss(rows, step)

        updates, state = optimizer.update(jax.grad(loss)(table), state, table)
        table = optax.apply_updates(table, updates)
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
    with jax.enable_x64():
        table = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)))
        ids, optimizer, dense = (
            jnp.arange(V, dtype=jnp.int32),
            OPTIMIZERS["lazy_adam"],
            optax.adam(0.01),
        )
        slots, state, expected = optimizer.init(table, 0.0), dense.init(table), table
        for step in range(20):
            grads = jnp.asarray(np.random.default_rng(step).normal(size=(V, D))).at[0].set(0.0)
            table, slots = optimizer.update(
                table, slots, *merge_duplicates(ids, grads, V), 0.01, step
            )
            updates, state = dense.update(grads, state)
            expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(table, expected, rtol=1e-12, atol=1e-14)


def test_rowwise_adagrad_divides_by_one_number_a_row(key):
    table = init_table(key, V, D)
    new, slots = _train_sparse("rowwise_adagrad", table, 1, 0.1)
    ids = _ids(0)
    grads = np.zeros((V, D), np.float64)
    np.add.at(grads, ids, np.asarray(jax.grad(_row_loss)(lookup(table, jnp.asarray(ids)), 0)))
    grads[0] = 0
    accumulator = 0.1 + np.square(grads).mean(-1)
    np.testing.assert_allclose(
        new, np.asarray(table) - 0.1 * grads / np.sqrt(accumulator)[:, None], atol=1e-6
    )
    np.testing.assert_allclose(slots["accumulator"], accumulator, rtol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rows_not_touched_and_the_padding_row_do_not_change(key, kind):
    table = init_table(key, V, D)
    new, _ = _train_sparse(kind, table, 5, 0.1)
    touched = np.unique(np.concatenate([_ids(s) for s in range(5)]))
    assert 0 in touched
    same = np.setdiff1d(np.arange(V), touched[touched != 0])
    np.testing.assert_array_equal(new[same], table[same])
    assert not np.array_equal(new[touched[1:]], table[touched[1:]])


# By passing over the table, and by the rows used.
SIZES = (N // 2, N, N + 1, 9 * N)


MERGES = {
    "of this platform": merge_duplicates,
    "hashing": merge_by_hashing,
    "sorting": merge_by_sorting,
}


@pytest.mark.parametrize("num_rows", [6, 10, 1000])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merge_duplicates_sums_and_gives_distinct_rows(merge, num_rows):
    none = 0 if merge is merge_duplicates else num_rows  # padding, which has no row
    ids = np.array([5, none, 3, 5, none, 1], np.int32)
    grads = np.arange(12, dtype=np.float32).reshape(6, 2)
    rows, merged = merge(jnp.asarray(ids), jnp.asarray(grads), num_rows=num_rows)
    assert len(set(np.asarray(rows).tolist())) == 6
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
    slot, found = map(
        np.asarray, jax.jit(functools.partial(slots_by_hashing, num_rows=rows))(jnp.asarray(local))
    )
    inside = local < rows
    np.testing.assert_array_equal(found[slot[inside]], local[inside])
    assert (slot[~inside] == len(local)).all() and len(np.unique(found)) == len(local)
    np.testing.assert_array_equal(np.sort(found[found < rows]), np.unique(local[inside]))


@pytest.mark.parametrize("num_rows", [300, 301, 2**20])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("merge", [merge_by_hashing, merge_by_sorting])
def test_gradients_are_summed_whatever_the_ids_are(merge, ids, num_rows):
    """Of whole numbers, which every order of adding sums alike."""
    local = _local(ids, num_rows)
    grads = np.random.default_rng(4).integers(-9, 9, (len(local), 3)).astype(np.float32)
    rows, merged = map(
        np.asarray,
        jax.jit(functools.partial(merge, num_rows=num_rows))(
            jnp.asarray(local), jnp.asarray(grads)
        ),
    )
    assert len(np.unique(rows)) == len(rows) == min(len(local), num_rows) and len(merged) == len(
        rows
    )
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
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_tables_of_every_size_are_updated_alike(key, kind, num_rows):
    """A small table is passed over as a whole, a large one by the rows used: the same numbers, and
    the same rows at rest."""
    optimizer, big = OPTIMIZERS[kind], 20 * N
    whole = jax.random.normal(key, (big, D))
    slots = optimizer.init(whole, 0.1)
    small, small_slots = whole[:num_rows], jax.tree.map(lambda x: x[:num_rows], slots)
    for step in range(2):
        ids = jnp.asarray(_ids(step) % num_rows)
        grads = jax.grad(_row_loss)(lookup(whole, ids), step)
        whole, slots, norm = apply_gradients(optimizer, whole, slots, ids, grads, 0.1, step)
        small, small_slots, small_norm = apply_gradients(
            optimizer, small, small_slots, ids, grads, 0.1, step
        )
        np.testing.assert_allclose(small_norm, norm, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[:num_rows]),
        (small, small_slots),
        (whole, slots),
    )


@pytest.mark.parametrize("share", [N, N * 2, 20 * N])
def test_the_shares_of_a_table_are_updated_as_the_whole_is(key, share):
    """The first row of a later share is no padding, and what is another's is left to it."""
    optimizer, table = OPTIMIZERS["adagrad"], jax.random.normal(key, (4 * share, D))
    slots = optimizer.init(table, 0.1)
    ids = jnp.asarray(np.append(_ids(0)[1:] * 7 % (4 * share), share).astype(np.int32))
    grads = jax.random.normal(key, (N, D))
    expected = apply_gradients(optimizer, table, slots, ids, grads, 0.1, 0)

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
    np.testing.assert_array_equal(found[0][idle], table[idle])
    assert not np.array_equal(found[0][share], table[share])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_compiled_update_makes_no_array_of_table_size(key, kind):
    rows, optimizer = 200_000, OPTIMIZERS[kind]
    table = init_table(key, rows, D)
    slots = optimizer.init(table, 0.1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(table, slots, ids):
        grads = lookup(table, ids) * 2
        return optimizer.update(table, slots, *merge_duplicates(ids, grads, table.shape[0]), 0.1, 3)

    memory = update.lower(table, slots, jnp.asarray(_ids(0))).compile().memory_analysis()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves((table, slots)))
    assert memory.alias_size_in_bytes == state_bytes
    assert memory.temp_size_in_bytes < table.nbytes / 50


def test_a_table_begins_as_a_smaller_one_does_and_its_padding_row_is_zero(key):
    small, large = init_table(key, 1500, D), init_table(key, 5000, D)
    np.testing.assert_array_equal(small, large[: len(small)])
    assert len(small) == padded_rows(1500) == 2048
    assert not small[0].any()
    assert abs(float(jnp.linalg.norm(large[1:], axis=-1).mean()) - 1) < 0.05


@pytest.mark.parametrize("start, count", [(0, 3), (1, 1), (100, 1500), (1023, 2), (1024, 1024)])
def test_any_slice_of_a_table_can_be_made_alone(key, start, count):
    table = init_table(key, 1500, D)
    np.testing.assert_array_equal(
        init_table(key, 1500, D, start=start, count=count), table[start : start + count]
    )
    traced = jax.jit(lambda start: init_table(key, 1500, D, start=start, count=count))(
        jnp.int32(start)
    )
    np.testing.assert_array_equal(traced, table[start : start + count])


def test_the_devices_of_a_mesh_make_the_table_that_one_device_makes(key):
    share = padded_rows(1500) // 8

    def part():
        return init_table(key, 1500, D, start=jax.lax.axis_index("devices") * share, count=share)

    mesh, spec = (
        jax.sharding.Mesh(jax.devices()[:8], "devices"),
        jax.sharding.PartitionSpec("devices"),
    )
    parts = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(), out_specs=spec))()
    np.testing.assert_array_equal(parts, init_table(key, 1500, D))


def test_an_id_out_of_range_is_nan_not_another_row(key):
    table = init_table(key, 100, D)
    assert jnp.isnan(lookup(table, jnp.array([len(table), -1]))).all()


def test_pool_ignores_padding():
    rows = jnp.array(
        [[[1.0, 3.0], [3.0, 5.0], [100.0, 100.0]], [[7.0, 7.0], [7.0, 7.0], [7.0, 7.0]]]
    )
    pooled = pool(rows, jnp.array([[4, 2, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(pooled, [[2.0, 4.0], [0.0, 0.0]])
