"""What reads histories: no position knows the future, padding and neighbours change nothing, pools
against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.config import HistoryConfig
from twotower.core.errors import ConfigError
from twotower.towers.history import HISTORIES, History, empty_some, weighted_mean

pytestmark = pytest.mark.slow

L, E = 6, 8
# What a batch of packed sequences may be read by.
SEQUENCES = [
    ("causal", {"block": "sasrec", "positions": "learned"}),
    ("causal", {"block": "ligr", "positions": "rotary"}),
    ("gru", {}),
]


@functools.cache
def _made(kind, gaps, options):
    module = HISTORIES[kind](
        HistoryConfig(**{"kind": kind, "dropout": 0.0, "expansion": 1} | dict(options)), L, gaps
    )
    rng, shapes = (
        np.random.default_rng(0),
        jax.eval_shape(module.init, jax.random.key(1), of([3], gaps=gaps)),
    )
    # Zero biases and the like would hide what is mixed up.
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes)
    return jax.jit(functools.partial(module.apply, params))


def make(kind, gaps=0, **options):
    """(history) -> vectors, of drawn parameters."""
    return _made(kind, gaps, tuple(options.items()))


def of(lengths, seed=0, gaps=0):
    """Histories of so many events; what stands behind them is not zero, so that nobody may look at
    it."""
    rng = np.random.default_rng(seed)
    valid = np.arange(L)[None] < np.asarray(lengths)[:, None]
    found = jnp.asarray(rng.integers(0, gaps + 1, valid.shape), jnp.int32) if gaps else None
    vectors = jnp.asarray(rng.normal(size=(len(lengths), L, E)), jnp.float32)
    return History(vectors, jnp.asarray(valid), found)


def packed(history, rows, slots):
    """The histories of `rows` (lists of numbers) in rows of `slots` positions, a start token before
    each."""
    lengths = np.asarray(history.valid.sum(1))
    vectors, segment = (
        np.zeros((len(rows), slots, E), np.float32),
        np.zeros((len(rows), slots), np.int32),
    )
    position = np.zeros_like(segment)
    for r, chosen in enumerate(rows):
        at = 0
        for n, which in enumerate(chosen, 1):
            end = at + lengths[which] + 1
            vectors[r, at + 1 : end] = history.vectors[which, : lengths[which]]
            segment[r, at:end], position[r, at:end] = n, np.arange(end - at)
            at = end
    return History(
        jnp.asarray(vectors),
        jnp.asarray(segment > 0),
        segment=jnp.asarray(segment),
        position=jnp.asarray(position),
    )


@pytest.mark.parametrize("kind,options", SEQUENCES, ids=str)
def test_no_position_depends_on_a_later_item_or_on_another_sequence(kind, options):
    apply = make(kind, **options)
    rows = packed(of([3, 4, 2]), [[0, 1], [2]], 10)

    def vectors(x):
        return apply(rows._replace(vectors=x))

    # [B, S, B, S]: what each place knows of each. A sum of squares, so that no coordinate cancels
    # another.
    jacobian = np.abs(
        jax.jit(jax.jacrev(lambda x: jnp.square(vectors(x)) @ jnp.arange(1.0, E + 1)))(rows.vectors)
    ).max(-1)
    segment, position = np.asarray(rows.segment), np.asarray(rows.position)
    for b, s in np.argwhere(segment > 0):
        known = np.argwhere(jacobian[b, s] > 1e-7)
        expected = [
            (b, t) for t in range(s + 1) if segment[b, t] == segment[b, s] and position[b, t] > 0
        ]
        assert sorted(map(tuple, known)) == expected, (b, s)


def test_no_position_knows_when_a_later_one_was_asked():
    rows = packed(of([3, 4, 2]), [[0, 1], [2]], 10)
    every = jnp.arange(rows.valid.size).reshape(rows.valid.shape)  # a bucket for each place
    rows = rows._replace(time_since_previous=jnp.zeros_like(every), time_to_next=every)
    module = HISTORIES["causal"](
        HistoryConfig(dropout=0.0, expansion=1, blocks=2), L, every.size - 2, None, True
    )
    rng, shapes = np.random.default_rng(0), jax.eval_shape(module.init, jax.random.key(1), rows)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes)[
        "params"
    ]

    def vectors(table):
        return jnp.square(module.apply({"params": params | {"until": table}}, rows)) @ jnp.arange(
            1.0, E + 1
        )

    jacobian = np.abs(jax.jit(jax.jacrev(vectors))(params["until"])).max(-1)
    segment, position = np.asarray(rows.segment), np.asarray(rows.position)
    for b, s in np.argwhere(segment > 0):
        known = [
            every[b, t]
            for t in range(s + 1)
            if segment[b, t] == segment[b, s] and position[b, t] > 0
        ]
        assert np.flatnonzero(jacobian[b, s] > 1e-7).tolist() == known, (b, s)


@pytest.mark.parametrize("kind,options", SEQUENCES, ids=str)
def test_packed_sequences_have_the_vectors_of_each_alone(kind, options):
    apply = make(kind, **options)
    history = of([3, 6, 2, 0])
    rows = apply(packed(history, [[0, 2], [3, 1]], L + 3))
    alone = apply(history)
    for place, which in (((0, 3), 0), ((0, 6), 2), ((1, 0), 3), ((1, 7), 1)):
        np.testing.assert_allclose(rows[place], alone[which], atol=1e-5)
    prefix = apply(history._replace(valid=jnp.arange(L)[None] < jnp.array([2, 5, 1, 0])[:, None]))
    for place, which in (((0, 2), 0), ((0, 5), 2), ((1, 6), 1)):
        np.testing.assert_allclose(rows[place], prefix[which], atol=1e-5)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("bag", {}),
        ("attention", {}),
        ("causal", {"block": "ligr"}),
        ("gru", {}),
        *(
            ("bidirectional", {"pooling": pooling, "blocks": 1})
            for pooling in ("mean", "cls", "attention")
        ),
    ],
    ids=str,
)
def test_what_stands_in_padding_changes_nothing_and_an_empty_history_has_a_vector(kind, options):
    apply = make(kind, gaps=5, **options)
    history, other = of([3, 0, 6], gaps=5), of([3, 0, 6], seed=1, gaps=5)
    changed = [
        jnp.where(history.valid.reshape(3, L, *[1] * (x.ndim - 2)), x, y)
        for x, y in zip(history, other)
        if x is not None
    ]
    got = apply(history)
    assert got.shape == (3, E) and np.isfinite(got).all()
    np.testing.assert_array_equal(got, apply(History(changed[0], history.valid, changed[2])))
    later = history._replace(time_since_previous=(history.time_since_previous + 1) % 6)
    assert not np.allclose(got[0], apply(later)[0])
    empty = apply(of([0, 0], seed=2, gaps=5))
    np.testing.assert_array_equal(empty[0], empty[1])
    assert bool(jnp.any(empty)) == (kind not in ("bag", "attention"))  # a bag of nothing is zero


def test_order_counts_in_sequences_and_not_in_bags():
    history = of([6])
    turned = history._replace(vectors=history.vectors[:, ::-1])
    for kind, counts in {
        "bag": False,
        "attention": False,
        "causal": True,
        "gru": True,
        "bidirectional": True,
    }.items():
        apply = make(kind, positions="learned")
        assert np.allclose(apply(history), apply(turned), atol=1e-6) != counts, kind


def test_a_gru_is_the_cells_of_flax_from_the_start_token_on():
    history = of([4, 0, 6])
    module = HISTORIES["gru"](HistoryConfig(kind="gru", blocks=1, dropout=0.0), L)
    made = jax.jit(module.init)(jax.random.key(1), history)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), made)
    layer = params["layer_0"]
    cell = {}
    for gate, block in zip("rzn", range(3)):
        part = slice(block * E, (block + 1) * E)
        dense = layer["input"]
        cell[f"i{gate}"] = {"kernel": dense["kernel"][:, part], "bias": dense["bias"][part]}
        cell[f"h{gate}"] = {"kernel": layer["recurrent"][:, part]}
    cell["hn"]["bias"] = layer["bias"]
    starts = np.broadcast_to(params["start"], (3, 1, E))
    events = np.concatenate([starts, history.vectors * np.sqrt(E)], 1)
    states = jax.jit(nn.RNN(nn.GRUCell(E)).apply)({"params": {"cell": cell}}, events)
    # After the start token and the last event.
    expected = states[jnp.arange(3), history.valid.sum(1)]
    got = jax.jit(module.apply)({"params": params}, history)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # As it begins: orthogonal.
    for part in np.split(np.asarray(made["layer_0"]["recurrent"]), 3, 1):
        np.testing.assert_allclose(part @ part.T, np.eye(E), atol=1e-5)


def test_a_gru_on_eight_devices_is_the_one_of_one():
    history = of([3, 0, 6, 1, 2, 5, 4, 6])
    module = HISTORIES["gru"](HistoryConfig(kind="gru", blocks=1, dropout=0.0), L)
    params = jax.jit(module.init)(jax.random.key(1), history)
    arrays = (history.vectors, history.valid)

    def gradients(vectors, valid):
        def total(vectors):
            return jnp.square(module.apply(params, History(vectors, valid))).sum()

        return jax.grad(total)(vectors)

    mesh = jax.sharding.Mesh(jax.devices()[:8], "devices")
    spec = jax.sharding.PartitionSpec("devices")
    divided = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_allclose(jax.jit(divided)(*arrays), jax.jit(gradients)(*arrays), atol=1e-6)


def test_a_gru_in_bfloat16_is_near_the_one_in_float32():
    rows = packed(of([4, 0, 6]), [[0, 2], [1]], L + 6)
    modules = {
        dtype: HISTORIES["gru"](HistoryConfig(kind="gru", dropout=0.0), L, 0, dtype)
        for dtype in (None, jnp.bfloat16)
    }
    params = jax.jit(modules[None].init)(jax.random.key(1), rows)
    exact = jax.jit(modules[None].apply)(params, rows)
    rounded = jax.jit(modules[jnp.bfloat16].apply)(params, rows)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.abs(rounded - exact).max() < 0.05


def test_a_weighted_bag_is_the_weighted_mean():
    history = of([3, 5])._replace(
        log_weights=jnp.asarray(
            np.log(np.random.default_rng(0).uniform(1, 10, (2, L))), jnp.float32
        )
    )
    weights = np.where(history.valid, np.exp(history.log_weights), 0)
    expected = np.einsum(
        "bl,ble->be", weights / weights.sum(1, keepdims=True), history.vectors
    ) * np.sqrt(E)
    np.testing.assert_allclose(make("bag")(history), expected, rtol=1e-5)
    far = history._replace(
        log_weights=history.log_weights - 500.0
    )  # old events alone: what counts are their shares
    np.testing.assert_allclose(make("bag")(far), expected, rtol=1e-3)
    twice = make("attention")
    assert not np.allclose(twice(history), twice(history._replace(log_weights=None)))


def test_a_bag_may_learn_what_recent_events_are_worth():
    history = of([3, 6])
    weights = np.exp(-np.arange(L) / 10)
    expected = [
        weights[:n][::-1] @ x[:n] / weights[:n].sum() * np.sqrt(E)
        for n, x in zip((3, 6), np.asarray(history.vectors))
    ]
    bag = HISTORIES["bag"](HistoryConfig(kind="bag", dropout=0.0, recency=True), L, 0)
    params = jax.jit(bag.init)(jax.random.key(0), history)
    np.testing.assert_allclose(jax.jit(bag.apply)(params, history), expected, rtol=1e-4, atol=1e-6)
    first = jax.jit(jax.grad(lambda params: bag.apply(params, history)[0, 0]))
    learned = first(params)["params"]["recency"]
    assert jnp.all(learned[:3] != 0) and not jnp.any(learned[3:])
    turned = of([6])._replace(vectors=of([6]).vectors[:, ::-1])
    for kind in ("bag", "attention"):
        apply = make(kind, recency=True)
        assert not np.allclose(apply(turned), apply(of([6]))), kind


def test_pooling_nothing_is_zero_and_so_is_its_gradient():
    of = jax.jit(
        jax.grad(lambda x, logits: weighted_mean(x, logits, jnp.zeros((1, 3), bool)).sum(), (0, 1))
    )
    grad = of(jnp.ones((1, 3, 2)), jnp.ones((1, 3)))
    assert all(not x.any() for x in grad)


@pytest.mark.parametrize("kind", ["causal", "gru"])
def test_dropped_units_depend_on_the_row_alone(kind):
    history, keys, apply = (
        of([3, 6, 2]),
        jax.random.split(jax.random.key(2), 3),
        make(kind, dropout=0.5, blocks=1),
    )
    all_rows = apply(history, keys=keys)
    np.testing.assert_allclose(
        all_rows[::-1], apply(jax.tree.map(lambda x: x[::-1], history), keys=keys[::-1]), atol=1e-5
    )
    assert not np.allclose(all_rows, apply(history))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"heads": 3}, "heads=3 must divide the width of the events, 8"),
        ({"heads": 8, "positions": "rotary"}, "into even parts"),
        ({"block": "sasrek"}, "did you mean 'sasrec'"),
        ({"positions": "learnt"}, "did you mean 'learned'"),
    ],
)
def test_transformers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make("causal", **options)


def test_emptied_histories_are_whole_ones_or_none():
    """About a share of the rows loses all of its events, the others none; at inference no row
    does."""
    history = of([4] * 400)
    keys = jax.random.split(jax.random.key(0), 400)
    kept = np.asarray(empty_some(history, 0.25, keys).valid.sum(1))
    assert set(kept.tolist()) == {0, 4}
    assert abs((kept == 0).mean() - 0.25) < 0.08
    assert empty_some(history, 0.25, None) is history


@pytest.mark.parametrize("kind", ["bag", "attention"])
def test_events_one_after_the_other_have_the_vectors_and_gradients_of_windows(kind):
    history = of([3, 0, L, 1], gaps=5)
    apply = make(kind, gaps=5, recency=True)
    rng = np.random.default_rng(2)
    history = history._replace(log_weights=rng.normal(size=history.valid.shape).astype(np.float32))
    lengths = np.asarray(history.valid.sum(1))
    row = np.repeat(np.arange(4), lengths)
    slot = np.concatenate([np.arange(length) for length in lengths])
    # Two places of padding, whose numbers nobody may look at.
    places = len(row) + 2
    padded_row = np.append(row, [3, 3]).astype(np.int32)
    padded_slot = np.append(slot, [L - 1, L - 1]).astype(np.int32)

    def flat_of(history):
        arrays = {
            name: getattr(history, name)[padded_row, padded_slot]
            for name in ("vectors", "time_since_previous", "log_weights")
        }
        return History(
            **arrays,
            valid=jnp.arange(places) < len(row),
            row=jnp.asarray(padded_row),
            slot=jnp.asarray(padded_slot),
            num_events=jnp.asarray(lengths, jnp.int32),
        )

    def loss(vectors, form):
        return jnp.square(apply(form(history._replace(vectors=vectors)))) @ jnp.arange(1.0, E + 1)

    def value_and_gradient(form):
        return jax.jit(jax.value_and_grad(lambda v: loss(v, form).sum()))(history.vectors)

    expected = value_and_gradient(lambda h: h)
    found = value_and_gradient(flat_of)
    np.testing.assert_allclose(apply(flat_of(history)), apply(history), rtol=1e-5, atol=1e-6)
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert np.abs(expected[1]).max() > 0.1
