"""Classic item-to-item models, linear in the items that a user has: item-kNN and EASE.

They are fitted on training rows alone, as towers are, and score a query by its seen items, as the
towers' histories hold them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from absl import logging

from twotower.core.arrays import Ragged
from twotower.core.progress import progress
from twotower.evaluation.baselines.tuning import (
    NO_CACHE,
    Baselines,
    Choice,
    FitCache,
    Fitted,
    best_model,
    binary_matrix,
    sparse_array,
)
from twotower.evaluation.evaluate import Scores
from twotower.evaluation.queries import Queries

NEIGHBOURS = (5, 20, 100)  # numbers of neighbours to try
# Ridges (lambda) of EASE to try, from the strongest: the search stops when one brings no gain.
RIDGES = (1000.0, 300.0, 100.0, 30.0, 10.0)
# A matrix of them takes 1.6 GB, and three are held: the counts, and the weights of two ridges.
MAX_EASE_ITEMS = 20_000
EASE_MATRICES = 3
MIN_TIMED_ITEMS = 4_000  # of fewer EASE takes a second or so, and less than to find that out
MAX_ITEM_PAIRS = 10**10  # pairs of two items of one user, which take minutes to count
BLOCK_BYTES = 2**27  # bytes of counts of items by items that are held at once


def make_item_to_item(
    train: Ragged,
    queries: Queries,
    tuning: Queries | None,
    *,
    without: Collection[str] = (),
    cache: FitCache = NO_CACHE,
) -> Baselines:
    """Makes the scores of "item_knn" and "ease", each where the log is not too large for it.

    Args:
        train: Distinct items of each user in training.
        queries: Queries to score. One without seen items gets 0 for all.
        tuning: Validation queries, whose NDCG@10 with seen items masked chooses the number of
            neighbours and the ridge; None takes the middle ones.
        without: Names of models to leave out.
        cache: Models that were fitted on the same data before.

    Returns:
        Name -> scores, without the models that are left out; a warning says why.
    """
    made = Baselines()
    pairs = int((train.lengths**2).sum())
    if pairs > MAX_ITEM_PAIRS:
        logging.warning(
            "item_knn and ease are left out: the users have %d pairs of items, "
            "and counting more than %d takes too long.",
            pairs,
            MAX_ITEM_PAIRS,
        )
        return made
    num_items = queries.num_items
    if "item_knn" not in without:
        model, choice = fit_item_knn(train, num_items, tuning, cache=cache)
        made.add("item_knn", model(queries), choice)
    if num_items > MAX_EASE_ITEMS:
        logging.warning(
            "ease is left out: it inverts a matrix of items by items, "
            "and %d items are more than %d.",
            num_items,
            MAX_EASE_ITEMS,
        )
    elif "ease" not in without:
        linear, choice = fit_ease(train, num_items, tuning, cache=cache)
        made.add("ease", linear(queries), choice)
    return made


def fit_item_knn(
    train: Ragged, num_items: int, tuning: Queries | None, *, cache: FitCache = NO_CACHE
) -> tuple[NeighbourModel, Choice]:
    """Fits "item_knn", see `make_item_to_item`."""
    fitted = cache.fit("item_knn", NEIGHBOURS, lambda: _fit_knn(train, num_items, tuning))
    return NeighbourModel(fitted.arrays["near"], fitted.arrays["similarity"]), fitted.choice


def fit_ease(
    train: Ragged, num_items: int, tuning: Queries | None, *, cache: FitCache = NO_CACHE
) -> tuple[LinearModel, Choice]:
    """Fits "ease", see `make_item_to_item`."""
    fitted = cache.fit("ease", RIDGES, lambda: _fit_ease(train, num_items, tuning))
    return LinearModel(fitted.arrays["weights"]), fitted.choice


def _fit_knn(train: Ragged, num_items: int, tuning: Queries | None) -> Fitted:
    # Nearest first: the model of fewer neighbours is the first columns of this.
    near, similarity = nearest_items(train, num_items, max(NEIGHBOURS))

    def make_knn(count: int) -> NeighbourModel:
        return NeighbourModel(near[:, :count], similarity[:, :count])

    # NDCG may rise again after it fell, so that all numbers of neighbours are tried.
    model, choice = best_model("item_knn: neighbours", NEIGHBOURS, make_knn, tuning)
    return Fitted({"near": model.near, "similarity": model.similarity}, choice)


def _fit_ease(train: Ragged, num_items: int, tuning: Queries | None) -> Fitted:
    seconds = 0.0
    if num_items >= MIN_TIMED_ITEMS:
        seconds = _inversion_seconds(num_items)
    if seconds > 1:
        logging.info(
            "ease: %d items take %.1f GB and about %.0f s for each of at most %d ridges.",
            num_items,
            EASE_MATRICES * 4 * num_items**2 / 2**30,
            seconds,
            len(RIDGES),
        )
    gram = gram_matrix(train, num_items)

    def make_ease(ridge: float) -> LinearModel:
        return LinearModel(ease(gram, ridge))

    model, choice = best_model("ease: ridge", RIDGES, make_ease, tuning, stop_early=True)
    return Fitted({"weights": model.weights}, choice)


def _inversion_seconds(num_items: int, *, sample: int = 500) -> float:
    """Returns about how long this machine takes for `ease`, in seconds of wall clock."""
    # The cost grows with the third power of the number of items.
    size = min(num_items, sample)
    gram = np.eye(size, dtype=np.float32)
    # The first call loads the library, and wakes its threads.
    ease(gram, 1.0)
    start = time.perf_counter()
    ease(gram, 1.0)
    return (time.perf_counter() - start) * (num_items / size) ** 3


def nearest_items(train: Ragged, num_items: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the items of greatest cosine with each item, the nearest first.

    cos(i, j) = |users of both| / sqrt(|users of i| |users of j|). An item is not its own neighbour;
    of equal cosines the more popular item comes first.

    Sarwar et al., Item-based collaborative filtering recommendation algorithms, WWW 2001.

    Returns:
        Rows of the neighbours, int32 [N, count], and their cosines, float32 [N, count], which are 0
        where no more items share a user.
    """
    near = np.zeros((num_items, count), np.int32)
    similarity = np.zeros((num_items, count), np.float32)
    popularity = np.bincount(train.values, minlength=num_items)
    for first, shared in _shared_users(train, num_items):
        for row in range(shared.shape[0]):
            item = first + row
            entries = slice(shared.indptr[row], shared.indptr[row + 1])
            is_other = shared.indices[entries] != item
            others = shared.indices[entries][is_other]
            users = shared.data[entries][is_other]
            cosine = users / np.sqrt(popularity[item] * popularity[others])
            # The last key is the first to sort by.
            best = np.lexsort((-popularity[others], -cosine))[:count]
            near[item, : len(best)] = others[best]
            similarity[item, : len(best)] = cosine[best]
    return near, similarity


def gram_matrix(train: Ragged, num_items: int) -> np.ndarray:
    """Returns the number of users that two items share, float32 [N, N].

    It is X'X of the binary matrix X of users and items.
    """
    # Counts are exact in float32 up to 2**24 users.
    gram = np.zeros((num_items, num_items), np.float32)
    for first, shared in _shared_users(train, num_items):
        gram[first : first + shared.shape[0]] = shared.toarray()
    return gram


def ease(gram: np.ndarray, ridge: float) -> np.ndarray:
    """Returns the weights that predict a row of X from itself, with a diagonal of 0.

    They are the least squares solution B = I - P / diag(P), with P = (X'X + ridge I)^-1.

    Steck, Embarrassingly shallow autoencoders for sparse data, WWW 2019, eq. 8.

    Args:
        gram: Number of users that two items share, float32 [N, N].
        ridge: Strength of the regularisation, above 0.

    Returns:
        Weights from each item (row) to each other (column), float32 [N, N].
    """
    # Imported where it is used: every command loads this module, and few fit baselines.
    import scipy.linalg

    # Type checkers know it in part only.
    lapack: Any = scipy.linalg.lapack
    diagonal = np.diag_indices(len(gram))
    # One copy, which LAPACK turns into the inverse in place; it reads and writes the lower
    # triangle of columns, which is the upper one of the rows here.
    inverse = gram.copy()
    inverse[diagonal] += ridge
    # The sum is positive definite, so that a Cholesky factor suffices.
    factor, failed_at = lapack.spotrf(inverse.T, lower=True, overwrite_a=True)
    assert not failed_at, "counts with a ridge are positive definite"
    inverse, _ = lapack.spotri(factor, lower=True, overwrite_c=True)
    weights = _mirror(inverse.T)
    # Without a zero diagonal an item would predict itself.
    weights /= -np.diag(weights)
    weights[diagonal] = 0.0
    return weights


def _mirror(upper: np.ndarray, *, block: int = 1024) -> np.ndarray:
    """Writes the upper triangle of a matrix [N, N] into the lower one, and returns it."""
    # By blocks: the transpose of all of it would be one more matrix.
    for start in range(0, len(upper), block):
        stop = start + block
        upper[stop:, start:stop] = upper[start:stop, stop:].T
        square = upper[start:stop, start:stop]
        square[:] = np.triu(square) + np.triu(square, 1).T
    return upper


@dataclasses.dataclass(frozen=True)
class NeighbourModel:
    """Scores of an item by its cosines with the seen items that it is near to.

    Attributes:
        near: Rows of the neighbours of each item, int [N, K].
        similarity: Their cosines, float [N, K]; 0 where an item has too few neighbours.
    """

    near: np.ndarray
    similarity: np.ndarray

    @property
    def weights(self) -> Any:
        """Weights from each item (row) to each other, a sparse array float64 [N, N]."""
        num_items, count = self.near.shape
        ends = np.arange(0, self.near.size + 1, count)
        # float64: sums of equal cosines must be equal whatever their order.
        cosines = self.similarity.ravel().astype(np.float64)
        return sparse_array(cosines, self.near.ravel(), ends, num_items)

    def __call__(self, queries: Queries) -> Scores:
        num_items = len(self.near)
        weights = self.weights

        def scores(block: slice) -> np.ndarray:
            seen = binary_matrix(queries.seen_lists(block), num_items)
            return (seen.astype(np.float64) @ weights).toarray().astype(np.float32)

        return scores


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Scores of an item by the sum of the weights from seen items to it.

    Attributes:
        weights: float32 [N, N], from each item (row) to each other (column).
    """

    weights: np.ndarray

    def __call__(self, queries: Queries) -> Scores:
        num_items = len(self.weights)
        return lambda block: binary_matrix(queries.seen_lists(block), num_items) @ self.weights


def _shared_users(train: Ragged, num_items: int) -> Iterator[tuple[int, Any]]:
    """Yields the number of users that two items share, a block of items by all items at a time.

    An item shares its users with itself too.

    Yields:
        The first item of the block, and a sparse matrix, float32 [b, N].
    """
    users = binary_matrix(train, num_items)
    item_users = users.T.tocsr()
    # A count takes eight bytes with its column, were no two items without a common user.
    size = max(1, BLOCK_BYTES // (8 * num_items))
    starts = range(0, num_items, size)
    for start in progress(starts, total=len(starts), what="Item pairs"):
        shared = item_users[start : start + size] @ users
        # In the order of the items, which decides between equals.
        shared.sort_indices()
        yield start, shared
