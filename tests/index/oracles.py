"""Vectors for tests of search, and the answers that a sort of all scores gives."""

import numpy as np

from twotower.core.arrays import Ragged


def unit(vectors):
    """Vectors of length 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def integer_vectors(count, seed, dim=5):
    """Small integers: sums are exact in any order, and ties are plenty."""
    return np.random.default_rng(seed).integers(-2, 3, (count, dim)).astype(np.float32)


def clustered_vectors(num_users, num_items, dim=16):
    """User and item vectors around the same forty centres, as a trained model has them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, dim))
    counts = (num_users, num_items)
    users, items = (
        unit(centres[rng.integers(0, 40, n)] + 0.5 * rng.normal(size=(n, dim))) for n in counts
    )
    return users, items


def ragged(lists):
    """Lists of rows as `Ragged`."""
    queries = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
    return Ragged.from_pairs(queries, np.concatenate(lists), num_rows=len(lists))


def rising_exclusions(num_queries, num_items, most):
    """Exclusions of each query, from none for the first to nearly `most` for the last."""
    rng = np.random.default_rng(2)
    sizes = [most * query // num_queries for query in range(num_queries)]
    return ragged([rng.permutation(num_items)[:size] for size in sizes])


def stable_sort(queries, items, k, exclude=None, allowed=None):
    """(scores, rows) of a stable sort of all scores, less what is excluded or not allowed, at most
    as long as there are items; -inf and -1 after the last."""
    scores = (queries @ items.T).astype(np.float32)
    if exclude is not None:
        scores[exclude.rows, exclude.values] = -np.inf
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    best = np.take_along_axis(scores, rows, axis=1)
    return best, np.where(np.isneginf(best), -1, rows)


def assert_same_lists(found, expected):
    """Checks scores and rows for equality."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
