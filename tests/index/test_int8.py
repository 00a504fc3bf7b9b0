"""Item vectors as int8: rounded as said, of one shape with their scales."""

import numpy as np
import pytest

from twotower.index.vectors import Int8Vectors, error_bound, quantize


def drawn(rows=300, dim=24):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, dim)) * rng.lognormal(0, 2, (rows, 1))).astype(np.float32)


def test_the_largest_number_is_127_steps_and_the_length_stays():
    vectors = np.array([[2.54, -1.27, 0.011], [0, 0, 0], [-3e-5, 1e-5, 2e-5]], np.float32)
    stored = quantize(vectors)
    assert stored.codes.tolist() == [[127, -64, 1], [0, 0, 0], [-127, 42, 85]]
    expected = np.linalg.norm(vectors, axis=1) / np.maximum(np.linalg.norm(stored.codes, axis=1), 1)
    np.testing.assert_allclose(stored.scales, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(stored), stored.codes * stored.scales[:, None])
    for rows in (0, slice(1, 3), np.array([2, 0])):
        np.testing.assert_array_equal(stored[rows], np.asarray(stored)[rows])
    lengths = np.linalg.norm(np.asarray(quantize(drawn())), axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(drawn(), axis=1), rtol=1e-6)


def test_rounding_what_is_rounded_changes_nothing():
    once = quantize(drawn())
    twice = quantize(np.asarray(once))
    np.testing.assert_array_equal(twice.codes, once.codes)
    np.testing.assert_allclose(twice.scales, once.scales, rtol=2e-7)


def test_scores_differ_by_less_than_the_bound_which_is_not_idle():
    vectors, queries = drawn(), drawn(40)
    error = np.abs(queries @ (np.asarray(quantize(vectors)) - vectors).T)
    bound = error_bound(queries, vectors)
    assert (error <= bound).all() and (error / bound).max() > 0.3
    # As bad as it gets: every number half a step off, and the query along the error.
    worst = np.full((1, 24), 0.5 - 1e-5, np.float32)
    worst[0, 0] = 127
    off = np.asarray(quantize(worst)) - worst
    assert 0.9 < (np.abs(off @ off.T) / error_bound(off, worst)).item() <= 1


def test_codes_and_scales_of_other_shapes_or_types_are_refused():
    codes, scales = np.zeros((3, 2), np.int8), np.ones(3, np.float32)
    for wrong in (
        (codes.astype(np.int16), scales),
        (codes[0], scales),
        (codes, scales[:2]),
        (codes, np.ones(3)),
    ):
        with pytest.raises(ValueError, match="must be"):
            Int8Vectors(*wrong)
