"""Batches: every row once a pass, a function of (seed, step), the same on host and device."""

import jax
import numpy as np
import pytest

from twotower.core.errors import ConfigError
from twotower.pipeline.batches import Batches, InteractionExamples, InteractionRows, gather_rows

N = 103
USERS = 11
ITEMS = 7


def make_batches(*, batch_size=10, seed=0, resident_megabytes=100):
    rng = np.random.default_rng(0)
    rows = InteractionRows(
        user=rng.integers(0, USERS, N).astype(np.int32),
        item=rng.integers(0, ITEMS, N).astype(np.int32),
        weight=rng.random(N, np.float32),
        timestamp=None,
        context={"hour": np.arange(N, dtype=np.int32)},
    )
    features = {
        "user": {"id": np.arange(USERS, dtype=np.int32) + 100},
        "item": {"words": np.arange(ITEMS * 3).reshape(ITEMS, 3)},
    }
    return Batches(
        InteractionExamples(rows, features),
        batch_size=batch_size,
        seed=seed,
        resident_megabytes=resident_megabytes,
    )


def test_every_row_once_a_pass_though_batches_cross_its_end():
    batches = make_batches()
    stream = np.concatenate([batches.indices(step) for step in range(31)])
    for i in range(3):
        assert sorted(stream[i * N : (i + 1) * N]) == list(range(N))
    assert not np.array_equal(stream[:N], stream[N : 2 * N])


def test_order_is_a_function_of_seed_and_step():
    late_first = make_batches()
    expected = late_first.indices(25).copy()
    np.testing.assert_array_equal(make_batches().indices(25), expected)
    late_first.indices(3)
    np.testing.assert_array_equal(late_first.indices(25), expected)
    assert not np.array_equal(make_batches(seed=1).indices(25), expected)


def test_a_batch_joins_rows_with_their_entities_and_context():
    batches = make_batches()
    index = batches.indices(4)
    batch = batches.load(index)
    np.testing.assert_array_equal(batch["user_features"]["id"], batch["user"] + 100)
    np.testing.assert_array_equal(batch["user_features"]["hour"], index)
    np.testing.assert_array_equal(batch["item_features"]["words"][:, 0], batch["item"] * 3)


def test_gathered_on_the_device_equals_streamed():
    batches = make_batches()
    index = batches.indices(2)
    on_device = jax.jit(gather_rows)(batches.resident, index)
    jax.tree.map(np.testing.assert_array_equal, on_device, batches.load(index))


def test_data_above_the_budget_is_not_resident():
    assert make_batches(resident_megabytes=0).resident is None


def test_a_batch_larger_than_the_data_is_refused():
    message = "batch_size=200 is larger than the data: there are 103 training rows"
    with pytest.raises(ConfigError, match=message):
        make_batches(batch_size=200)
