"""Batches: every row once a pass, a function of (seed, step) alone, one content whether resident or
streamed."""

import jax
import numpy as np
import pytest

from twotower.core.errors import ConfigError
from twotower.pipeline.batches import Batches, Rows, gather

N, USERS, ITEMS = 103, 11, 7


def _batches(batch_size=10, seed=0, resident_megabytes=100, rows=N):
    rng = np.random.default_rng(0)
    return Batches(
        Rows(
            rng.integers(0, USERS, rows).astype(np.int32),
            rng.integers(0, ITEMS, rows).astype(np.int32),
            rng.random(rows, np.float32),
            None,
            {"hour": np.arange(rows, dtype=np.int32)},
        ),
        {
            "user": {"id": np.arange(USERS, dtype=np.int32) + 100},
            "item": {"words": np.arange(ITEMS * 3).reshape(ITEMS, 3)},
        },
        batch_size=batch_size,
        seed=seed,
        resident_megabytes=resident_megabytes,
    )


def test_every_row_once_a_pass_though_batches_cross_its_end():
    batches = _batches()
    stream = np.concatenate([batches.indices(step) for step in range(31)])
    for i in range(3):
        assert sorted(stream[i * N : (i + 1) * N]) == list(range(N))
    assert not np.array_equal(stream[:N], stream[N : 2 * N])


def test_order_is_a_function_of_seed_and_step():
    late_first = _batches()
    expected = late_first.indices(25).copy()
    np.testing.assert_array_equal(_batches().indices(25), expected)
    late_first.indices(3)
    np.testing.assert_array_equal(late_first.indices(25), expected)
    assert not np.array_equal(_batches(seed=1).indices(25), expected)


def test_a_batch_joins_rows_with_their_entities_and_context():
    batches = _batches()
    index, batch = batches.indices(4), batches.load(batches.indices(4))
    np.testing.assert_array_equal(batch["user_features"]["id"], batch["user"] + 100)
    np.testing.assert_array_equal(batch["user_features"]["hour"], index)
    np.testing.assert_array_equal(batch["item_features"]["words"][:, 0], batch["item"] * 3)


def test_gathered_on_the_device_equals_streamed():
    batches = _batches()
    on_device = jax.jit(gather)(batches.resident, batches.indices(2))
    jax.tree.map(np.testing.assert_array_equal, on_device, batches.load(batches.indices(2)))


def test_data_above_the_budget_is_not_resident():
    assert _batches(resident_megabytes=0).resident is None


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ConfigError, match="batch_size=200 is larger than the data: there are 103 training rows"
    ):
        _batches(batch_size=200)
