"""Classic item-to-item models, linear in the items that a user has: item-kNN and EASE.

They are fitted on training rows alone, as towers are, and score a query by its seen items, as the
towers' histories hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from twotower.core.progress import progress
from twotower.core.ragged import Ragged
from twotower.evaluation.evaluate import Scores, evaluate
from twotower.evaluation.queries import Queries

T = TypeVar("T")
# A fitted model: queries -> their scores.
ItemModel = Callable[[Queries], Scores]

NEIGHBOURS = (5, 20, 100)  # numbers of neighbours to try
# Ridges (lambda) of EASE to try, from the strongest: the search stops when one brings no gain.
RIDGES = (1000.0, 300.0, 100.0, 30.0, 10.0)
MAX_EASE_ITEMS = 20_000  # a matrix of them takes 1.6 GB, and five are held at once
MAX_ITEM_PAIRS = 10**10  # pairs of two items of one user, which take minutes to count


def make_item_to_item(
    train: Ragged, queries: Queries, tuning: Queries | None
) -> Mapping[str, Scores]:
    """Makes the scores of "item_knn" and "ease", each where the log is not too large for it.

    Args:
        train: Distinct items of each user in training.
        queries: Queries to score. One without seen items gets 0 for all.
        tuning: Validation queries, whose NDCG@10 with seen items masked chooses the number of
            neighbours and the ridge; None takes the middle ones.

    Returns:
        Name -> scores, without the models that are left out; a warning says why.
    """
    pairs = int((train.lengths**2).sum())
    if pairs > MAX_ITEM_PAIRS:
        logging.warning(
            "item_knn and ease are left out: the users have %d pairs of items, "
            "and counting more than %d takes too long.",
            pairs,
            MAX_ITEM_PAIRS,
        )
        return {}
    # Nearest first: the model of fewer neighbours is the first columns of this.
    near, similarity = nearest_items(train, queries.num_items, max(NEIGHBOURS))

    def make_knn(count: int) -> ItemModel:
        return neighbour_model(near[:, :count], similarity[:, :count])

    # NDCG may rise again after it fell, so that all numbers of neighbours are tried.
    knn = _best_model("item_knn: neighbours", NEIGHBOURS, make_knn, tuning, stop_early=False)
    scores = {"item_knn": knn(queries)}
    if queries.num_items > MAX_EASE_ITEMS:
        logging.warning(
            "ease is left out: it inverts a matrix of items by items, "
            "and %d items are more than %d.",
            queries.num_items,
            MAX_EASE_ITEMS,
        )
        return scores
    # On the device once, for all ridges.
    gram = jnp.asarray(gram_matrix(train, queries.num_items))

    def make_ease(ridge: float) -> ItemModel:
        return linear_model(np.asarray(ease(gram, ridge)))

    best_ease = _best_model("ease: ridge", RIDGES, make_ease, tuning, stop_early=True)
    scores["ease"] = best_ease(queries)
    return scores


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
    for item, (others, shared) in enumerate(_shared_users(train, num_items)):
        is_other = others != item
        others = others[is_other]
        cosine = shared[is_other] / np.sqrt(popularity[item] * popularity[others])
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
    for item, (others, shared) in enumerate(_shared_users(train, num_items)):
        gram[item, others] = shared
    return gram


@jax.jit
def ease(gram: Float[Array, "N N"], ridge: Float[Array, ""]) -> Float[Array, "N N"]:
    """Returns the weights that predict a row of X from itself, with a diagonal of 0.

    They are the least squares solution B = I - P / diag(P), with P = (X'X + ridge I)^-1.

    Steck, Embarrassingly shallow autoencoders for sparse data, WWW 2019, eq. 8.
    """
    unit = jnp.eye(len(gram), dtype=gram.dtype)
    # A TPU would otherwise round the factors of an inverse to eight bits.
    with jax.default_matmul_precision("highest"):
        # The sum is positive definite, so that a Cholesky factor suffices.
        factor = jax.scipy.linalg.cho_factor(gram + ridge * unit)
        inverse = jax.scipy.linalg.cho_solve(factor, unit)
    # Without a zero diagonal an item would predict itself.
    return jnp.where(unit == 1, 0.0, -inverse / jnp.diag(inverse)[None, :])


def neighbour_model(near: np.ndarray, similarity: np.ndarray) -> ItemModel:
    """Makes the model that scores an item by its cosines with the seen items that it is near to.

    Args:
        near: Rows of the neighbours of each item, int [N, K].
        similarity: Their cosines, float [N, K].
    """

    def score_user(items: np.ndarray) -> np.ndarray:
        # Where an item has too few neighbours, row 0 stands with a cosine of 0 and adds nothing.
        neighbours = near[items].ravel()
        cosines = similarity[items].ravel()
        return np.bincount(neighbours, weights=cosines, minlength=len(near))

    return _make_item_model(score_user)


def linear_model(weights: np.ndarray) -> ItemModel:
    """Makes the model that scores an item by the sum of the `weights` [N, N] from seen items to
    it."""
    return _make_item_model(lambda items: weights[items].sum(axis=0))


def _make_item_model(score_user: Callable[[np.ndarray], np.ndarray]) -> ItemModel:
    """Makes a model from the function that turns the seen items of one user into scores [N]."""

    def model(queries: Queries) -> Scores:
        def scores(block: slice) -> np.ndarray:
            # Histories are short beside N, so rows are added up rather than multiplied out.
            seen = queries.seen_lists(block)
            return np.stack([score_user(items) for items in seen]).astype(np.float32)

        return scores

    return model


def _best_model(
    title: str,
    values: Sequence[T],
    make: Callable[[T], ItemModel],
    tuning: Queries | None,
    *,
    stop_early: bool,
) -> ItemModel:
    """Makes the model of the value that is best on `tuning`.

    Args:
        title: Name of the choice, for the log.
        values: Values to try, in order.
        make: Function from a value to its model.
        tuning: Queries to measure with; None takes the middle value.
        stop_early: Whether to stop at the first value that is no better than the one before it.
    """
    if tuning is None:
        return make(values[len(values) // 2])
    best: ItemModel | None = None
    best_ndcg = -1.0
    for value in progress(values, total=len(values), what=title):
        model = make(value)
        ndcg = evaluate(model(tuning), tuning, (10,), mask_seen=True)["ndcg@10"]
        logging.info("%s %g: NDCG@10 %.4f on validation.", title, value, ndcg)
        if ndcg > best_ndcg:
            best = model
            best_ndcg = ndcg
        elif stop_early:
            break
    assert best is not None, "an NDCG is at least 0, and there is a value to try"
    return best


def _shared_users(train: Ragged, num_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each item the items that its users have, itself among them, and the number of
    these users that have each."""
    # The transpose: lists of users by item. One row of X'X at a time needs no matrix of users and
    # items.
    item_users = Ragged.from_pairs(train.values, train.rows, num_rows=num_items)
    for users in progress(item_users, total=num_items, what="Item pairs"):
        yield np.unique(train.take(users).values, return_counts=True)
