"""Options of the towers: what is summed, dropped, normalised, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.config import TowerConfig, from_dict
from twotower.core.errors import ConfigError
from twotower.features.inputs import Input, TableShape
from twotower.towers.layers import MLP
from twotower.towers.two_tower import TwoTower, Weights

pytestmark = pytest.mark.slow

B, F = 4, 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, F)), jnp.float32)


def drawn(module, *args):
    """Parameters of which none is zero or one."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), shapes)


def layer_norm(x, params):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


@pytest.mark.parametrize("order", ["norm_activation", "activation_norm"])
def test_hidden_units_are_normalised_before_or_after_the_activation(order):
    mlp = MLP(TowerConfig(layers=(5, 3), layer_norm=True, activation="tanh", order=order))
    params = drawn(mlp, X)
    hidden = np.asarray(X) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    if order == "norm_activation":
        hidden = np.tanh(layer_norm(hidden, params["LayerNorm_0"]))
    else:
        hidden = layer_norm(np.tanh(hidden), params["LayerNorm_0"])
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    got = jax.jit(mlp.apply)({"params": params}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


TABLES = {"users": TableShape(rows=20, width=8), "items": TableShape(rows=20, width=8)}
INPUTS = {
    "user": {
        "user_id": Input(table="users"),
        "age": Input(width=2, projection=8),
        "past/item_id": Input(table="items", history_length=3),
        "past/price": Input(width=1, projection=8, history_length=3),
    },
    "item": {"item_id": Input(table="items")},
}
FEATURES = {
    "user_id": jnp.array([1, 2, 3, 4]),
    "age": X[:, :2],
    "past/item_id": jnp.array([[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 6]]),
    "past/price": X[:, :3, None],
}


def model_of(inputs=INPUTS, **user):
    values = {"user": user, "history": {"kind": "bag", "dropout": 0.0}, "normalize": False}
    return TwoTower.build_from(from_dict({"model": values}).model, inputs, TABLES)


def embed(model, weights):
    return jax.jit(model.embed, static_argnums=0)("user", weights, FEATURES)


def test_summed_features_are_the_sum_of_what_is_concatenated():
    summed = model_of(combine="sum")
    weights = summed.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, weights.params["user"])
    tables = jax.tree.map(np.asarray, weights.tables)
    values = jax.tree.map(np.asarray, FEATURES)
    age = values["age"] @ params["project_age"]["kernel"] + params["project_age"]["bias"]
    price = values["past/price"] * params["project_past_price"]["kernel"][0]
    valid = values["past/item_id"] > 0
    events = np.where(valid[..., None], tables["items"][values["past/item_id"]] + price, 0)
    # A history's vectors have coordinates of mean square 1.
    past = events.sum(1) / np.maximum(valid.sum(1), 1)[:, None] * np.sqrt(8)
    expected = tables["users"][values["user_id"]] + age + past
    assert params["project_past_price"]["bias"].sum() == 0  # as it begins
    np.testing.assert_allclose(embed(summed, weights), expected, atol=1e-5)


def test_features_of_different_widths_are_not_summed():
    wider = INPUTS["user"] | {"age": Input(width=2, projection=5)}
    message = (
        r"config\.model\.user\.combine='sum' needs features of one width, not: user_id 8, age 5, "
        "history 8"
    )
    with pytest.raises(ConfigError, match=message):
        model_of(INPUTS | {"user": wider}, combine="sum")
    bare = INPUTS["user"] | {"past/price": Input(width=1, history_length=3)}
    with pytest.raises(ConfigError, match="not: past/item_id 8, past/price 1"):
        model_of(INPUTS | {"user": bare}, combine="sum")


def test_the_vector_of_a_tower_may_be_normalised_with_a_scale_of_its_own():
    plain = model_of(layers=(8,))
    normed = model_of(layers=(8,), output_norm=True)
    weights = normed.init(jax.random.key(0))
    scale = {"scale": np.arange(1, 9, dtype=np.float32), "bias": np.arange(8, dtype=np.float32)}
    weights.params["user"]["output_norm"] = scale
    expected = layer_norm(embed(plain, weights), scale)
    vectors = embed(normed, weights)
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)


def test_each_layer_has_a_dropout_of_its_own():
    rates = (0.5, 0.3, 0.8)
    layers = (60, 60, 60)
    user = {"layers": layers, "layer_dropout": rates}
    config = from_dict({"model": {"user": user, "item": {"layers": (60,)}}})
    inputs = {side: {"x": Input(width=60)} for side in ("user", "item")}
    model = TwoTower.build_from(config.model, inputs, {})
    # Each layer passes on what it gets: what is lost once stays lost. A third of the units begins
    # with the features, the next with the first layer, the last with the second.
    blocks = np.repeat(np.eye(3, dtype=np.float32), 20, axis=1)
    biases = (np.zeros(60, np.float32), blocks[1], blocks[2])
    kernel = np.eye(60, dtype=np.float32)
    dense = (
        {"kernel": kernel, "bias": biases[1]},
        {"kernel": kernel, "bias": biases[2]},
        {"kernel": kernel, "bias": biases[0]},
    )
    mlp = {f"Dense_{i}": layer for i, layer in enumerate(dense)}
    weights = Weights({"user": {"mlp": mlp}}, {}, {})
    features = {"x": jnp.broadcast_to(blocks[0], (500, 60))}

    @jax.jit
    def vectors(keys):
        return model.vectors("user", weights, {}, features, keys=keys)[0]

    kept = np.asarray(vectors(jax.random.split(jax.random.key(0), 500)) != 0)
    shares = kept.reshape(500, 3, 20).mean((0, 2))
    np.testing.assert_allclose(shares, [0.5 * 0.7 * 0.2, 0.7 * 0.2, 0.2], atol=0.02)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers": (8, 4), "layer_dropout": (0.1,)}, "must be of length 2 with layers=(8, 4)"),
        ({"layer_dropout": (0.1, 0.2)}, "must be of length 1 with layers=()"),
        ({"layers": (8, 4), "layer_dropout": (0.1, 1.0)}, "must be shares between 0.0 and 0.99"),
        ({"layer_dropout": (0.1,), "dropout": 0.2}, "dropout=0.2 must be 0.0 beside layer_dropout"),
        ({"order": "activation_norm"}, "must be 'norm_activation' without layer_norm"),
        ({"order": "activation_first"}, "order='activation_first' is not known"),
        ({"combine": "concat"}, "combine='concat' is not known; did you mean 'concatenate'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError) as error:
        from_dict({"model": {"user": options}})
    assert "config.model.user." in str(error.value) and message in str(error.value)
