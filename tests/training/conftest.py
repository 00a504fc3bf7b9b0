"""The small shop as fixtures, and the programs of `fit` compiled once for all tests."""

import jax
import jax.numpy as jnp
import pytest

from tests.training import shop
from twotower.training import init, loop
from twotower.training.candidates import count_rows


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """`fit` takes the program of an earlier test where configuration and shapes are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_steps", shop.jit_steps)
        patch.setattr(init, "jit_init", shop.jit_init)
        yield


@pytest.fixture
def own_programs(monkeypatch):
    """`fit` compiles for itself, as it does outside the tests."""
    monkeypatch.setattr(loop, "jit_steps", shop.jit_steps.__wrapped__)
    monkeypatch.setattr(init, "jit_init", shop.jit_init.__wrapped__)


@pytest.fixture(scope="session")
def prepared():
    return shop.prepared_shop()


@pytest.fixture
def make(prepared):
    """(config) -> (trainer, a fresh state, the first batch)."""

    def build(config):
        trainer = shop.build_trainer(prepared, config)
        counts = {side: jnp.asarray(c) for side, c in count_rows(prepared).items()}
        batches = shop.make_batches(prepared, config)
        batch = batches.load(batches.indices(0))
        return trainer, shop.jit_init_state(trainer)(counts), jax.tree.map(jnp.asarray, batch)

    return build
