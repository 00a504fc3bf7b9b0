"""Trap of the temperature: cosines need one well below 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance import tiny
from twotower.config import DenseOptimizerConfig, ModelConfig
from twotower.training.optimizers import dense_optimizer

pytestmark = pytest.mark.slow


@pytest.mark.trap(8)
def test_cosines_start_at_a_temperature_that_can_tell_items_apart():
    """With T = 1 the answer can reach only e/(e + N/e): normalised vectors begin at 0.05 to 0.07,
    and T is learned."""
    config = ModelConfig()
    assert config.normalize and config.learn_temperature and 0.05 <= config.temperature <= 0.07
    state = tiny.start(tiny.plain())
    np.testing.assert_allclose(
        np.exp(state.params["log_temperature"]), config.temperature, rtol=1e-6
    )


@pytest.mark.trap(8)
def test_the_loss_divides_by_the_temperature_and_trains_it():
    """A temperature that the loss does not use, or that no gradient reaches: both show in one step
    at another T."""
    trainer = tiny.plain()
    state = tiny.start(trainer)
    state = state.replace(params=state.params | {"log_temperature": jnp.log(jnp.float32(0.3))})
    after, metrics, heard = tiny.step(trainer)(state, tiny.batch())
    np.testing.assert_allclose(metrics["temperature"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], tiny.loss_by_hand(state, heard), rtol=1e-5)
    assert after.params["log_temperature"] != state.params["log_temperature"]


@functools.cache
def _still():
    """A trainer whose dense parameters no gradient moves."""
    return tiny.build(training={"optimizer": {"kind": "sgd", "learning_rate": 0.0}})


@pytest.mark.trap(8)
@pytest.mark.parametrize("start, bound", [(1e-4, 0.01), (50.0, 1.0)])
def test_the_temperature_stays_within_bounds(start, bound):
    """Unbounded it drifts until float32 saturates or cosines tell nothing. (The rate is 0: nothing
    else moves it.)"""
    state = tiny.start(_still())
    outside = state.replace(params=state.params | {"log_temperature": jnp.log(jnp.float32(start))})
    after, *_ = tiny.step(_still())(outside, tiny.batch())
    np.testing.assert_allclose(np.exp(after.params["log_temperature"]), bound, rtol=1e-5)


@pytest.mark.trap(8)
def test_the_temperature_does_not_decay():
    """Weight decay pulls log T to 0, that is T to 1."""
    optimizer = dense_optimizer(
        DenseOptimizerConfig(kind="adamw", learning_rate=1.0, weight_decay=0.5)
    )
    params = {"kernel": jnp.ones(2), "log_temperature": jnp.float32(-2.0)}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    assert updates["log_temperature"] == 0 and updates["kernel"].all()
