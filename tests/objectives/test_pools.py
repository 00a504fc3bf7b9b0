"""Pools of hard negatives: how they are built, and that they are drawn from as they state, however
the batch is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.objectives.draws import IDS, TRIALS, N, agree
from twotower.objectives import negatives
from twotower.objectives.negatives import build_pools, explicit_pools
from twotower.pipeline.batches import InteractionRows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pools():
    """Of four users: 7 items, one, none, 3."""
    users, items = np.repeat([0, 1, 3], [7, 1, 3]), np.r_[10:17, 20, 30:33]
    return jax.tree.map(jnp.asarray, build_pools(users, items, num_users=4, size=8))


def row_keys(key, rows):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def test_pools_are_drawn_evenly_for_their_user_alone(pools):
    users = jnp.arange(4, dtype=jnp.int32)
    draw = lambda key: negatives.draw_pool(row_keys(key, users), pools, users, 5)[0]  # noqa: E731
    ids = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), TRIALS)))
    assert (ids[:, 2] == -1).all()
    for user, items in ((0, np.arange(10, 17)), (1, [20]), (3, np.arange(30, 33))):
        observed = np.bincount(ids[:, user].ravel(), minlength=N)
        assert observed.sum() == 5 * TRIALS and set(np.flatnonzero(observed)) == set(items)
        mine = {name: x[jnp.array([user])] for name, x in pools.items()}
        stated = negatives.pool_log_expected_count(mine, jnp.array([0]), IDS[None], 5)[0]
        agree(stated, observed)


def test_what_a_pool_states_of_its_draws_and_of_others(pools):
    users = jnp.array([0, 2, 3, -1], jnp.int32)
    ids, stated = negatives.draw_pool(row_keys(jax.random.key(1), users), pools, users, 2)
    np.testing.assert_allclose(
        stated, np.log([[2 / 7] * 2, [1] * 2, [2 / 3] * 2, [1] * 2]), rtol=1e-5
    )
    assert (np.asarray(ids)[[1, 3]] == -1).all()
    other = negatives.pool_log_expected_count(pools, users[:1], jnp.array([[10, 20, -1]]), 2)
    np.testing.assert_allclose(other, [[np.log(2 / 7), -np.inf, 0]], rtol=1e-5)


def test_a_divided_batch_draws_what_a_whole_one_draws(pools):
    users, rows = jnp.tile(jnp.arange(4, dtype=jnp.int32), 4), jnp.arange(16, dtype=jnp.int32)
    key = jax.random.key(5)
    mesh, split = Mesh(np.array(jax.devices()[:8]), ("devices",)), PartitionSpec("devices")

    def draw(users, key):
        mine = jax.lax.axis_index("devices") * 2 + jnp.arange(2)
        hard, _ = negatives.draw_pool(row_keys(key, mine), pools, users, 3)
        shared = jax.lax.dynamic_slice_in_dim(
            negatives.uniform(key, 16, N), jax.lax.axis_index("devices") * 2, 2
        )
        return hard, shared

    divided = jax.jit(
        jax.shard_map(draw, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split)
    )(users, key)
    np.testing.assert_array_equal(
        divided[0], negatives.draw_pool(row_keys(key, rows), pools, users, 3)[0]
    )
    np.testing.assert_array_equal(divided[1], negatives.uniform(key, 16, N))
    assert (
        len(np.unique(np.asarray(divided[0])[::4], axis=0)) > 1
    )  # rows of one user do not draw alike


def test_pools_keep_the_order_given_and_each_item_once():
    pools = build_pools(
        np.array([2, 0, 2, 0, 2, 2]), np.array([7, 5, 7, 6, 8, 9]), num_users=3, size=2
    )
    assert pools["items"].tolist() == [[5, 6], [-1, -1], [7, 8]] and pools["sizes"].tolist() == [
        2,
        0,
        2,
    ]


def test_explicit_pools_are_what_was_shown_and_never_taken():
    user = np.array([0, 0, 0, 0, 0, 0, 1, 1, 3], np.int32)
    item = np.array([5, 6, 7, 5, 8, 9, 5, 5, 4], np.int32)
    label = np.array([0, 0, 1, 0, 0, np.nan, 0, 1, 1], np.float32)
    rows = InteractionRows(
        user, item, np.ones(9, np.float32), np.array([9, 2, 3, 1, 5, 6, 1, 0, 1]), {}
    )
    pools = explicit_pools(rows, label, num_users=5)
    # Of user 0 the latest first: 5 at time 9, 8 at 5, 6 at 2. User 1 took item 5 in another row.
    assert pools["items"].tolist() == [[5, 8, 6], [-1] * 3, [-1] * 3, [-1] * 3, [-1] * 3]
    assert pools["sizes"].tolist() == [3, 0, 0, 0, 0]
    assert explicit_pools(rows, label, num_users=5, size=2)["items"][0].tolist() == [5, 8]
    untimed = InteractionRows(user, item, rows.weight, None, {})
    assert explicit_pools(untimed, label, num_users=5)["items"][0].tolist() == [8, 5, 6]
    assert (
        explicit_pools(untimed, np.ones(9, np.float32), num_users=5)["items"].tolist() == [[-1]] * 5
    )
