"""The small shop as fixtures, and the programs of `fit` compiled once for all tests."""

import jax
import jax.numpy as jnp
import pytest

from tests.training import shop
from twotower.core.mesh import make_mesh
from twotower.training import loop
from twotower.training.candidates import count_rows
from twotower.training.init import init_on


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """`fit` takes the program of an earlier test where configuration and shapes are the same."""
    with pytest.MonkeyPatch.context() as patch:
        shop.share(patch)
        yield


@pytest.fixture
def own_programs(monkeypatch):
    """`fit` compiles for itself, as it does outside the tests."""
    monkeypatch.setattr(loop, "jit_steps", shop.jit_steps.__wrapped__)


@pytest.fixture(scope="session")
def prepared():
    return shop.prepared_shop()


@pytest.fixture
def make(prepared):
    """(config) -> (trainer, a fresh state, the first batch)."""

    def build(config):
        trainer = shop.build_trainer(prepared, config)
        state = init_on(make_mesh(1), trainer, count_rows(prepared))
        batches = shop.make_batches(prepared, config)
        batch = batches.load(batches.indices(0))
        return trainer, state, jax.tree.map(jnp.asarray, batch)

    return build
