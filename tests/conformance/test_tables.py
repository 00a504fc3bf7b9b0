"""Traps of embedding tables: padding, ids out of range, unknown ids, rows that nobody touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from tests.conformance import tiny
from twotower.config import DenseOptimizerConfig
from twotower.core.mesh import SHARDED, DeviceGroup, make_mesh
from twotower.features.inputs import Input
from twotower.features.spec import from_mappings
from twotower.features.vocabulary import Vocabulary
from twotower.kernels.sparse_update import apply_gradients
from twotower.kernels.table_optimizers import TABLE_OPTIMIZERS
from twotower.towers.embeddings import init_table, lookup, lookup_rows, pool
from twotower.training.optimizers import dense_optimizer
from twotower.training.step import oov_dropout

pytestmark = pytest.mark.slow

V = 1024
E = 4
KNOWN = Vocabulary.fit(pa.array([f"v{n}" for n in range(50)]), oov_rows=8)


@pytest.fixture
def table():
    return init_table(jax.random.key(0), V, E)


@pytest.mark.trap(25)
def test_row_0_is_padding_and_no_item(table):
    """Id 0 as both: no value has row 0, it is zero, it is masked by length, and what it holds
    changes nothing."""
    assert KNOWN.rows(pa.array(["v0", "new", None, "v49"])).tolist()[2] == 0
    assert (KNOWN.rows(pa.array(["v0", "new", "v49"])) > 0).all() and not table[0].any()
    ids = jnp.array([[5, 7, 0, 0], [0, 0, 0, 0]])
    other = table.at[0].set(99.0)
    for one in (table, other):
        np.testing.assert_allclose(
            pool(lookup(one, ids), ids), [(table[5] + table[7]) / 2, np.zeros(E)], rtol=1e-6
        )
    gradient = jax.grad(lambda t: jnp.sum(jnp.sin(pool(lookup(t, ids), ids))))(other)
    assert not gradient[0].any() and gradient[5].any()


@pytest.mark.trap(27)
def test_each_side_drops_units_of_its_own():
    """The same of dropout: a unit that a user lost has no gradient in the user's row, and its item
    lost others."""
    trainer = tiny.build(dropout=0.5)
    state = tiny.start(trainer)
    after, *_ = tiny.step(trainer)(
        state, tiny.batch(users=np.arange(tiny.B), items=np.arange(tiny.B))
    )
    first = tiny.OOV + 1
    user, item = (
        np.asarray(after.tables[s] != state.tables[s])[first : first + tiny.B]
        for s in ("user", "item")
    )
    both = user.any(1) & item.any(1)  # a vector of one unit or none has no gradient
    assert both.sum() > 4 and not user[both].all() and (user[both] != item[both]).mean() > 0.25


# Of each form that an update has: few ids of a large table, more of them, and more ids than rows.
SIZES = pytest.mark.parametrize("rows, count", [(V, 8), (V, 200), (256, 300)])


@pytest.mark.trap(25)
@SIZES
def test_no_update_reaches_row_0(table, rows, count):
    """Padding has a gradient when it is looked up with the others: its row stays zero all the
    same."""
    ids = jnp.zeros(count, jnp.int32).at[:3].set(jnp.array([3, 0, 7]))
    table = table[:rows]
    for kind, optimizer in TABLE_OPTIMIZERS.items():
        update = jax.jit(
            lambda table, ids, optimizer=optimizer: apply_gradients(
                optimizer, table, optimizer.init(table, 0.0), ids, jnp.ones((count, E)), 0.1, 0
            )
        )
        new, _, _ = update(table, ids)
        assert not new[0].any() and (new[3] != table[3]).all(), kind


@pytest.mark.trap(25)
def test_the_first_item_of_the_corpus_is_an_item():
    """Items are numbered from 0, and the first of them is a candidate and an answer like others."""
    trainer = tiny.plain()
    state = tiny.start(trainer)
    rows = tiny.batch(items=np.arange(tiny.B) // 2, users=np.arange(tiny.B))
    after, metrics, heard = tiny.step(trainer)(state, rows)
    np.testing.assert_allclose(metrics["loss"], tiny.loss_by_hand(state, heard), rtol=1e-5)
    assert 0 in heard["shared"]["ids"]
    moved = np.asarray((after.tables["item"] != state.tables["item"]).any(1))
    assert np.flatnonzero(moved).tolist() == list(range(tiny.OOV + 1, tiny.OOV + 9))


@pytest.mark.trap(26)
def test_an_id_out_of_range_is_nan_on_any_number_of_devices(table):
    """Clamped or wrapped it would be another row, silently: it is NaN, which stops training; its
    neighbours are themselves."""
    ids = jnp.array([3, V, -1, V - 1, 10 * V, 0, 5, -V])
    mesh = make_mesh(4)
    group = DeviceGroup("devices", 4)
    over_devices = jax.shard_map(
        lambda t, i: lookup_rows(t, i, group.all_gather(i), group),
        mesh=mesh,
        in_specs=(SHARDED, SHARDED),
        out_specs=SHARDED,
    )
    for found in (lookup(table, ids), jax.jit(over_devices)(table, ids)):
        assert np.isnan(found).all(1).tolist() == [
            False,
            True,
            True,
            False,
            True,
            False,
            False,
            True,
        ]
        np.testing.assert_array_equal(
            found[jnp.array([0, 3, 5, 6])], table[jnp.array([3, V - 1, 0, 5])]
        )


@pytest.mark.trap(26)
@pytest.mark.trap(27)
def test_unknown_values_have_several_rows_of_their_own():
    """One row for all unknown ids gives every new user one list: they are spread by hash, and lie
    within the table."""
    rows = KNOWN.rows(pa.array([f"new{n}" for n in range(400)]))
    assert set(rows.tolist()) == set(range(1, 9)) and np.bincount(rows)[1:].min() > 20
    assert KNOWN.rows(pa.array([f"v{n}" for n in range(50)])).min() == 9 and KNOWN.size == 59
    feature = from_mappings({"user": {"user_id": {"type": "string"}}}).user["user_id"]
    assert feature.oov_rows > 1 and feature.oov_rate > 0


@pytest.mark.trap(27)
def test_known_ids_are_dropped_so_that_rows_of_unknown_ones_are_trained():
    """Untrained rows are random: a share of known ids stands in for unknown ones, over all their
    rows, never padding."""
    inputs = {"id": Input(table="t", oov_rate=0.25, oov_rows=4)}
    ids = jnp.concatenate(
        [jnp.arange(5, 1005), jnp.zeros(100, jnp.int32), jnp.ones(100, jnp.int32)]
    ).astype(jnp.int32)
    found = np.asarray(
        oov_dropout(inputs, {"id": ids}, jax.random.split(jax.random.key(0), 1200))["id"]
    )
    dropped = found[:1000] != ids[:1000]
    assert 0.2 < dropped.mean() < 0.3 and set(found[:1000][dropped].tolist()) == {1, 2, 3, 4}
    np.testing.assert_array_equal(found[1000:], ids[1000:])


@pytest.mark.trap(27)
def test_a_step_trains_rows_of_unknown_ids_and_each_side_drops_its_own():
    """In the whole step; and one key for both sides would drop a user and its item together, or
    neither."""
    trainer = tiny.build(oov_rate=0.5)
    state = tiny.start(trainer)
    after, *_ = tiny.step(trainer)(
        state, tiny.batch(users=np.arange(tiny.B), items=np.arange(tiny.B))
    )
    moved = {
        side: np.asarray((after.tables[side] != state.tables[side]).any(1))
        for side in ("user", "item")
    }
    for side, rows in moved.items():
        assert rows[1 : tiny.OOV + 1].all() and not rows[0], side
    user, item = (rows[tiny.OOV + 1 : tiny.OOV + 1 + tiny.B] for rows in moved.values())
    assert 0 < user.sum() < tiny.B and (user != item).any()


@pytest.mark.trap(28)
@pytest.mark.parametrize("kind", TABLE_OPTIMIZERS)
@SIZES
def test_rows_that_no_batch_touched_keep_their_bits(table, kind, rows, count):
    """Dense Adam or decay moves rows that nobody touched: each step changes those it used, and
    leaves those of the one before."""
    optimizer = TABLE_OPTIMIZERS[kind]
    table = table[:rows]
    update = jax.jit(lambda *x: apply_gradients(optimizer, *x, jnp.ones((count, E)), 0.1, 0)[:2])
    slots = optimizer.init(table, 0.1)
    for first in (20, 120):
        new, slots = update(table, slots, jnp.arange(count, dtype=jnp.int32) % 5 + first)
        assert np.flatnonzero(np.asarray(new != table).any(1)).tolist() == list(
            range(first, first + 5)
        )
        table = new


@pytest.mark.trap(28)
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_moves_the_rows_it_used_alone(devices):
    """The same in the whole step, of every table and its slots, on one device and on many."""
    trainer = tiny.everything()
    state = tiny.start(trainer, devices)
    after, _, heard = tiny.step(trainer, devices)(state, tiny.batch())
    used = {
        "user": {*np.asarray(heard["own"]["query_ids"])},
        "item": {*np.asarray(heard["shared"]["ids"])},
    }
    used["item"] |= {*np.asarray(heard["own"]["hard"]).ravel()}
    for side, ids in used.items():
        changed = set(np.flatnonzero(np.asarray(after.tables[side] != state.tables[side]).any(1)))
        allowed = {i + tiny.OOV + 1 for i in ids if i >= 0} | set(range(1, tiny.OOV + 1))
        assert changed and changed <= allowed


@pytest.mark.trap(28)
def test_decay_is_of_kernels_alone():
    """Decay on tables shrinks rare items; tables are not optax's, and of what is, biases and scales
    are spared."""
    optimizer = dense_optimizer(
        DenseOptimizerConfig(kind="adamw", learning_rate=1.0, weight_decay=0.5)
    )
    params = {
        "layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "log_temperature": jnp.float32(-2.0),
    }
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    assert (updates["layer"]["kernel"] == -0.5).all() and not updates["layer"]["bias"].any()
