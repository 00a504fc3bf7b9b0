"""Heads: what they compute, that a missing label is as if the row were not there, and that devices
add up to one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import expit

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.objectives import heads as multitask

pytestmark = pytest.mark.slow

B, D = 16, 5
HEADS = {
    "click": {"label": "clicked", "combine": "multiply", "weight": 0.5, "pos_weight": 3.0},
    "like": {"label": "liked", "combine": "concatenate", "layers": (7,)},
}


def heads_of(**heads):
    return from_dict({"objective": {"heads": heads or HEADS}}).objective.heads


@pytest.fixture
def problem(key):
    """heads, params, users, items, labels (some missing), weights"""
    rng = np.random.default_rng(0)
    users, items = (jnp.asarray(rng.normal(size=(B, D)), jnp.float32) for _ in range(2))
    labels = {
        name: rng.choice([0, 1, np.nan], B).astype(np.float32) for name in ("clicked", "liked")
    }
    labels["clicked"][:2], labels["liked"][:2] = (
        (np.nan, 1),
        (0, np.nan),
    )  # known for one head and not for the other
    heads = heads_of()
    weights = jnp.asarray(rng.random(B), jnp.float32)
    labels = {name: jnp.asarray(x) for name, x in labels.items()}
    return heads, multitask.init_heads(heads, D, key), users, items, labels, weights


def total_of(heads, params, users, items, labels, weights, everyone=lambda x: x):
    """The sum over heads of weight x weighted mean of its loss; `everyone` adds up the weights of
    all devices."""
    losses = multitask.head_losses(heads, params, users, items, labels)
    sums = {
        name: (jnp.sum(loss * weights), everyone(jnp.sum(where * weights)))
        for name, (loss, where) in losses.items()
    }
    return sum(
        heads[name].weight * loss / jnp.maximum(weight, 1e-30)
        for name, (loss, weight) in sums.items()
    )


# Jitted, since its operations one by one would be compiled one by one.
def logits_of(heads, params, users, items):
    return jax.jit(functools.partial(multitask.head_logits, heads))(params, users, items)


def by_hand(name, params, users, items):
    """The logits in NumPy, from the parameters alone."""
    users, items = (
        np.sqrt(D) * x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in map(np.float64, (users, items))
    )
    layers = jax.tree.map(np.float64, params[name]["mlp"])
    if name == "click":
        return users * items @ layers["Dense_0"]["kernel"][:, 0] + layers["Dense_0"]["bias"]
    hidden = (
        np.concatenate([users, items], 1) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]
    )
    return np.maximum(hidden, 0) @ layers["Dense_1"]["kernel"][:, 0] + layers["Dense_1"]["bias"]


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_dense_layers_over_the_combined_vectors(problem, name):
    heads, params, users, items, *_ = problem
    params = jax.tree.map(lambda x: x + 0.3, params)  # biases too
    found = logits_of(heads, params, users, items)
    assert list(found) == list(HEADS) and found[name].shape == (B,)
    np.testing.assert_allclose(
        found[name], by_hand(name, params, users, items), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", HEADS)
def test_fresh_logits_of_unit_vectors_are_of_order_1(name, key):
    """Unit vectors have small coordinates; a head that starts at zero to all purposes would take
    thousands of steps to wake."""
    users, items = (
        x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in jax.random.normal(key, (2, 500, 64))
    )
    heads = heads_of()
    params = multitask.init_heads(heads, 64, key)
    logits = logits_of(heads, params, users, items)
    assert 0.3 < float(logits[name].std()) < 3
    scaled = logits_of(heads, params, 50 * users, items / 50)
    np.testing.assert_allclose(scaled[name], logits[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_losses_are_cross_entropies_where_there_is_a_label_and_0_elsewhere(problem, name):
    heads, params, users, items, labels, _ = problem
    p, y = expit(by_hand(name, params, users, items)), labels[HEADS[name]["label"]]
    loss, where = multitask.head_losses(heads, params, users, items, labels)[name]
    np.testing.assert_array_equal(where, ~np.isnan(y))
    expected = -(HEADS[name].get("pos_weight", 1.0) * y * np.log(p) + (1 - y) * np.log(1 - p))
    np.testing.assert_allclose(loss, np.nan_to_num(expected), rtol=1e-4)


def test_a_missing_label_is_as_if_the_row_were_not_there(problem):
    """In the loss and in every gradient, none of which is NaN."""
    heads, params, users, items, labels, weights = problem
    for name in heads:
        one = {name: heads[name]}
        known = np.flatnonzero(~np.isnan(labels[heads[name].label]))
        sliced = {column: x[known] for column, x in labels.items()}
        value = jax.jit(jax.value_and_grad(functools.partial(total_of, one), (0, 1, 2)))
        masked, (of_params, *of_vectors) = value(params, users, items, labels, weights)
        expected, (params_expected, *rows_expected) = value(
            params, users[known], items[known], sliced, weights[known]
        )
        assert 0 < len(known) < B and float(masked) == pytest.approx(float(expected), rel=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            of_params,
            params_expected,
        )
        for found, right in zip(of_vectors, rows_expected):
            np.testing.assert_allclose(found[known], right, rtol=1e-4, atol=1e-6)
            assert not np.delete(found, known, axis=0).any()


def test_a_head_whose_labels_are_all_missing_costs_and_moves_nothing(problem):
    heads, params, users, items, labels, weights = problem
    labels = labels | {"clicked": jnp.full(B, jnp.nan)}
    arrays = (params, users, items, labels, weights)
    value, grads = jax.jit(jax.value_and_grad(functools.partial(total_of, heads)))(*arrays)
    alone = jax.jit(functools.partial(total_of, {"like": heads["like"]}))(*arrays)
    assert float(value) == float(alone) and not jax.tree.reduce(
        lambda a, b: a + float(abs(b).sum()), grads["click"], 0.0
    )


def test_a_zero_vector_gives_finite_gradients(problem):
    heads, params, users, items, labels, weights = problem
    grads = jax.jit(jax.grad(functools.partial(total_of, heads), (0, 1, 2)))(
        params, users.at[1].set(0), items.at[3].set(0), labels, weights
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_the_shares_of_devices_add_up_to_one_device(problem):
    heads, params, users, items, labels, weights = problem
    everyone = functools.partial(jax.lax.psum, axis_name="devices")

    def step(params, *rows):
        params = jax.lax.pcast(params, "devices", to="varying")
        return everyone(
            jax.value_and_grad(lambda params: total_of(heads, params, *rows, everyone=everyone))(
                params
            )
        )

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), *[P("devices")] * 4), out_specs=P())
    )
    found = sharded(params, users, items, labels, weights)
    alone = jax.jit(jax.value_and_grad(functools.partial(total_of, heads)))
    expected = alone(params, users, items, labels, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_another_head_leaves_the_parameters_of_the_others_as_they_were(key):
    one, both = (
        multitask.init_heads(heads_of(like=HEADS["like"]), D, key),
        multitask.init_heads(heads_of(), D, key),
    )
    jax.tree.map(np.testing.assert_array_equal, one["like"], both["like"])
    twins = multitask.init_heads(heads_of(a=HEADS["like"], b=HEADS["like"]), D, key)
    kernels = [twins[name]["mlp"]["Dense_0"]["kernel"] for name in "ab"]
    assert not np.array_equal(*kernels)


def test_a_weighted_dot_product_learns_what_a_sum_of_two_terms_cannot(key):
    """Label 1 where the two vectors agree in their first coordinate."""
    rng = np.random.default_rng(0)
    users, items = (jnp.asarray(rng.normal(size=(400, D)), jnp.float32) for _ in range(2))
    labels = {"y": jnp.asarray(users[:, 0] * items[:, 0] > 0, jnp.float32)}

    def trained(combine):
        heads = heads_of(head={"label": "y", "combine": combine})
        step = jax.jit(
            jax.grad(lambda params: total_of(heads, params, users, items, labels, jnp.ones(400)))
        )
        params = multitask.init_heads(heads, D, key)
        for _ in range(200):
            params = jax.tree.map(lambda x, g: x - 0.5 * g, params, step(params))
        logits = multitask.head_logits(heads, params, users, items)["head"]
        return float(((logits > 0) == (labels["y"] == 1)).mean())

    assert trained("multiply") > 0.9 and trained("concatenate") < 0.65


def test_a_head_may_not_be_called_what_the_towers_loss_is_called():
    with pytest.raises(ConfigError, match=r"heads\.retrieval: 'retrieval' is the name"):
        from_dict({"objective": {"heads": {"retrieval": HEADS["like"]}}})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"combine": "multiplied"},
            r"heads\.click\.combine='multiplied' is not known; did you mean 'multiply'",
        ),
        ({"weight": -1.0}, r"heads\.click\.weight=-1\.0 must be at least 0"),
        ({"pos_weight": 0.0}, r"heads\.click\.pos_weight=0\.0 must be above 0"),
        ({"layers": (8, 0)}, r"heads\.click\.layers=\(8, 0\) must be widths"),
    ],
)
def test_a_head_that_cannot_be_trained_is_refused(wrong, message):
    from_dict({"objective": {"heads": HEADS}})
    with pytest.raises(ConfigError, match=message):
        from_dict({"objective": {"heads": HEADS | {"click": HEADS["click"] | wrong}}})
