"""Selecting and merging the best K, against a stable sort of all scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from twotower.kernels import device_top_k
from twotower.kernels import top_k as kernel
from twotower.kernels.top_k import RunningTopK

HOST_AND_DEVICE = [(np, kernel.merge_top_k), (jnp, device_top_k.merge_top_k)]


def stable_top_k(scores, k):
    """Rows in the order of a stable sort, and their scores; -1 for scores of -inf."""
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, rows, axis=1)
    return best, np.where(np.isneginf(best), -1, rows)


@pytest.fixture
def scores():
    """Few different numbers, so that ties are plenty; the last query has three items alone."""
    scores = np.random.default_rng(0).integers(0, 9, (3, 320)).astype(np.float32)
    scores[2, 3:] = -np.inf
    return scores


@pytest.mark.parametrize("module, merge_top_k", HOST_AND_DEVICE, ids=["host", "device"])
def test_merged_lists_keep_the_lower_row_of_equal_scores(scores, module, merge_top_k):
    parts = [stable_top_k(scores[:, :100], 7), stable_top_k(scores[:, 100:], 7)]
    lists = module.asarray(np.concatenate([best for best, _ in parts], axis=1))
    rows = np.concatenate([parts[0][1], np.where(parts[1][1] < 0, -1, parts[1][1] + 100)], axis=1)
    best, merged = merge_top_k(7, lists, module.asarray(rows))
    expected, expected_rows = stable_top_k(scores, 7)
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(np.where(np.isneginf(best), -1, merged), expected_rows)


@pytest.mark.parametrize("module, merge_top_k", HOST_AND_DEVICE, ids=["host", "device"])
def test_a_merged_list_is_no_longer_than_what_it_is_made_of(scores, module, merge_top_k):
    (best,) = merge_top_k(1_000, module.asarray(scores))
    np.testing.assert_array_equal(best, -np.sort(-scores, axis=1))


def test_packed_scores_sort_as_the_scores_do():
    """Both signs, zeros of both, infinities, numbers beside 0 and the greatest, each twice."""
    info = np.finfo(np.float32)
    numbers = [0.0, 1.5, -1.5, info.max, info.min, info.smallest_subnormal, np.inf, 1e-30]
    numbers += [-number for number in numbers] * 2
    row = np.array(numbers + numbers, np.float32)
    rows = np.stack([np.roll(row, turn) for turn in range(64)])
    assert rows.size >= kernel.MIN_SCORES_TO_PACK
    columns = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    best, found = kernel.merge_top_k(20, rows, columns)
    order = np.argsort(-rows, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(found, order)
    np.testing.assert_array_equal(best, np.take_along_axis(rows, order, axis=1))


@pytest.mark.parametrize("k, size", [(1, 32), (9, 16), (40, 4), (80, 2), (90, 1)])
def test_groups_are_small_where_lists_are_long(scores, k, size, monkeypatch):
    monkeypatch.setattr(kernel, "MIN_SCORES_TO_GROUP", 0)
    padded, maxima = kernel.with_maxima(scores[:, :315], k)
    np.testing.assert_array_equal(maxima, padded.reshape(3, -1, size).max(-1))
    np.testing.assert_array_equal(padded[:, :315], scores[:, :315])
    assert np.isneginf(padded[:, 315:]).all()


@pytest.mark.parametrize("max_appended, min_grouped", [(2_048, 2**15), (0, 2**15), (0, 0)])
@pytest.mark.parametrize("block", [1, 33, 65, 320])
@pytest.mark.parametrize("k", [1, 5, 400])
def test_a_running_top_k_equals_the_sort_however_scores_come(
    scores, block, k, max_appended, min_grouped, monkeypatch
):
    """Blocks that are sorted as they are, that are compared one by one, and in groups."""
    monkeypatch.setattr(kernel, "MAX_SCORES_TO_SORT", max_appended)
    monkeypatch.setattr(kernel, "MIN_SCORES_TO_GROUP", min_grouped)
    best = RunningTopK(len(scores), k)
    for first in range(0, scores.shape[1], block):
        best.add(scores[:, first : first + block], first)
    found, rows = best.best()
    expected, expected_rows = stable_top_k(scores, k)
    np.testing.assert_array_equal(rows[:, : expected.shape[1]], expected_rows[:, : rows.shape[1]])
    np.testing.assert_array_equal(found, expected[:, : found.shape[1]])
    assert np.isneginf(expected[:, found.shape[1] :]).all()


def test_a_running_top_k_goes_on_from_lists_found_elsewhere(scores):
    best = RunningTopK(len(scores), 5)
    best.add_lists(*stable_top_k(scores[:, :50], 5))
    best.add(scores[:, 50:], 50)
    found, rows = best.best()
    expected, expected_rows = stable_top_k(scores, 5)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(rows, expected_rows)
