"""Padding to few shapes, and evenly spaced samples."""

import jax.numpy as jnp
import numpy as np
import pytest

from twotower.core.arrays import (
    evenly_spaced,
    next_power_of_two,
    pad_pairs,
    pad_rows,
    round_up,
    stable_argsort,
)


def test_rows_of_zeros_are_appended():
    assert pad_rows(np.array([[1, 2]]), 3).tolist() == [[1, 2], [0, 0], [0, 0]]
    assert pad_rows(np.array([5, 6]), 2).tolist() == [5, 6]


def test_padded_pairs_are_dropped_by_a_scatter():
    rows, columns = pad_pairs(np.array([0, 1]), np.array([2, 0]), 8, num_columns=3)
    assert rows.dtype == columns.dtype == np.int32
    marked = jnp.zeros((2, 3)).at[rows, columns].set(1.0, mode="drop")
    assert marked.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_sizes_are_rounded_up():
    assert [next_power_of_two(n) for n in (0, 1, 2, 5, 8)] == [1, 1, 2, 8, 8]
    assert [round_up(n, 6) for n in (0, 1, 6, 7)] == [0, 6, 6, 12]


@pytest.mark.parametrize(
    "count, expected",
    [
        (0, []),
        (1, [0]),
        (2, [0, 9]),
        (4, [0, 3, 6, 9]),
        (10, list(range(10))),
        (99, list(range(10))),
    ],
)
def test_a_sample_is_evenly_spaced_from_the_first_to_the_last(count, expected):
    assert evenly_spaced(np.arange(10), count).tolist() == expected
    assert evenly_spaced(np.zeros((0, 3)), count).shape == (0, 3)


@pytest.mark.parametrize("low, high", [(0, 5), (-3, 3), (-(2**62), 2**62), (7, 8)])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_equal_keys_keep_their_order(low, high, count):
    keys = np.random.default_rng(0).integers(low, high, count)
    # Few distinct keys, also where they lie too far apart to be packed with a position.
    keys = np.where(keys % 2, keys, low)
    for given in (keys, np.sort(keys), keys[::-1]):
        order = stable_argsort(given)
        np.testing.assert_array_equal(order, np.argsort(given, kind="stable"))
        assert order.dtype == np.int64
