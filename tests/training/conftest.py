"""A small generated shop, encoded, and a trainer for it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from twotower.config import from_dict
from twotower.pipeline.batches import Batches
from twotower.pipeline.prepare import prepare
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import corpus_size, count_rows
from twotower.training.init import init_state
from twotower.training.state import Trainer

FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 16},
        "city": {"type": "string", "embedding_size": 4},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 16},
        "title": {"type": "text", "embedding_size": 8, "buckets": 500},
        "price": {"type": "float"},
    },
}


def small_config(**overrides):
    """The configuration of a run of seconds; `training={...}` and the like replace single
    fields."""
    values = {
        "data": {"source": "shop", "num_interactions": 3000},
        "features": FEATURES,
        "model": {"user": {"layers": (16,)}, "item": {"layers": (16,)}},
        "training": {"batch_size": 64, "steps": 12, "validate_every": 4, "log_every": 2},
    }
    for section, fields in overrides.items():
        values[section] = values.get(section, {}) | fields
    return from_dict(values)


@pytest.fixture(scope="session")
def prepared():
    return prepare(small_config())


@pytest.fixture
def make(prepared):
    """(config) -> (trainer, a fresh state, the first batch)."""

    def build(config):
        trainer = Trainer.build(
            config, TwoTower.build(config.model, prepared.encoder), corpus_size(prepared)
        )
        counts = {side: jnp.asarray(c) for side, c in count_rows(prepared).items()}
        batches = make_batches(prepared, config)
        batch = batches.load(batches.indices(0))
        state = jax.jit(functools.partial(init_state, trainer))(counts)
        return trainer, state, jax.tree.map(jnp.asarray, batch)

    return build


def make_batches(prepared, config):
    training = config.training
    return Batches(
        prepared.training_examples(),
        batch_size=training.batch_size,
        seed=training.seed,
        resident_megabytes=training.resident_megabytes,
    )
