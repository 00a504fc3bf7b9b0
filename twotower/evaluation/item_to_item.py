"""Classic item-to-item models, linear in the items that a user has: item-kNN and EASE.

They are fitted on training rows alone, as towers are, and are given the seen items of a query, as
the towers' histories hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from twotower.core.progress import progress
from twotower.core.ragged import Ragged
from twotower.evaluation.evaluate import Scores, evaluate
from twotower.evaluation.queries import Queries

# A fitted model: queries -> their scores.
ItemModel = Callable[[Queries], Scores]

NEIGHBOURS = (5, 20, 100)
RIDGES = (1000.0, 300.0, 100.0, 30.0, 10.0)  # lambda of EASE
MAX_EASE_ITEMS = 20_000  # a matrix of them takes 1.6 GB, and five are held at once
MAX_ITEM_PAIRS = 10**10  # pairs of two items of one user, which take minutes to count


def make_item_to_item(
    train: Ragged, queries: Queries, tuning: Queries | None
) -> Mapping[str, Scores]:
    """Makes the scores of "item_knn" and "ease", less what the log is too large for.

    Args:
        train: distinct items of each user in training.
        queries: queries to score. One without seen items gets 0 for all.
        tuning: validation queries, whose NDCG@10 with seen items masked chooses the number of
            neighbours and the ridge; None takes the middle ones.
    """
    pairs = int((train.lengths**2).sum())
    if pairs > MAX_ITEM_PAIRS:
        logging.warning(
            "item_knn and ease are left out: the users have %d pairs of items, "
            "which to count takes too long above %d.",
            pairs,
            MAX_ITEM_PAIRS,
        )
        return {}
    near, similarity = nearest_items(train, queries.num_items, max(NEIGHBOURS))

    def make_knn(count: int) -> ItemModel:
        return neighbour_model(near[:, :count], similarity[:, :count])

    # Few and many neighbours may both do well, so that all are tried.
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
        best = np.lexsort((-popularity[others], -cosine))[:count]
        near[item, : len(best)] = others[best]
        similarity[item, : len(best)] = cosine[best]
    return near, similarity


def gram_matrix(train: Ragged, num_items: int) -> np.ndarray:
    """Returns X'X of the binary matrix of users and items, float32 [N, N]: the number of users that
    two items share."""
    gram = np.zeros((num_items, num_items), np.float32)
    for item, (others, shared) in enumerate(_shared_users(train, num_items)):
        gram[item, others] = shared
    return gram


@jax.jit
def ease(gram: Float[Array, "N N"], ridge: Float[Array, ""]) -> Float[Array, "N N"]:
    """Returns the weights that predict a row of X from itself with a diagonal of 0.

    They are the least squares solution B = I - P / diag(P), with P = (X'X + ridge I)^-1.

    Steck, Embarrassingly shallow autoencoders for sparse data, WWW 2019, eq. 8.
    """
    unit = jnp.eye(len(gram), dtype=gram.dtype)
    # A TPU would otherwise round the factors of an inverse to eight bits.
    with jax.default_matmul_precision("highest"):
        factor = jax.scipy.linalg.cho_factor(gram + ridge * unit)
        inverse = jax.scipy.linalg.cho_solve(factor, unit)
    return jnp.where(unit == 1, 0.0, -inverse / jnp.diag(inverse)[None, :])


def neighbour_model(near: np.ndarray, similarity: np.ndarray) -> ItemModel:
    """Makes the model that scores an item by its cosines with the seen items that it is near to.

    Args:
        near: rows of the neighbours of each item, int [N, K].
        similarity: their cosines, float [N, K].
    """

    def score_user(items: np.ndarray) -> np.ndarray:
        return np.bincount(
            near[items].ravel(), weights=similarity[items].ravel(), minlength=len(near)
        )

    return _model_of_users(score_user)


def linear_model(weights: np.ndarray) -> ItemModel:
    """Makes the model that scores an item by the sum of the `weights` [N, N] from seen items to
    it."""
    return _model_of_users(lambda items: weights[items].sum(axis=0))


def _model_of_users(score_user: Callable[[np.ndarray], np.ndarray]) -> ItemModel:
    """Makes a model of the function from the seen items of one user to scores [N]."""

    def model(queries: Queries) -> Scores:
        def scores(block: slice) -> np.ndarray:
            # Histories are short beside N, so rows are added up rather than multiplied out.
            seen = queries.seen_lists(block)
            return np.stack([score_user(items) for items in seen]).astype(np.float32)

        return scores

    return model


def _best_model(
    title: str,
    values: Sequence[Any],
    make: Callable[[Any], ItemModel],
    tuning: Queries | None,
    *,
    stop_early: bool,
) -> ItemModel:
    """Makes the model of the value that is best on `tuning`.

    Args:
        title: name of the choice, for the log.
        values: values to try, in order.
        make: function from a value to its model.
        tuning: queries to measure with; None takes the middle value.
        stop_early: whether to stop at the first value that is no better than the one before it.
    """
    if tuning is None:
        return make(values[len(values) // 2])
    best: ItemModel | None = None
    highest = -1.0
    for value in progress(values, total=len(values), what=title):
        model = make(value)
        ndcg = evaluate(model(tuning), tuning, (10,), mask_seen=True)["ndcg@10"]
        logging.info("%s %g: NDCG@10 %.4f on validation.", title, value, ndcg)
        if ndcg > highest:
            best = model
            highest = ndcg
        elif stop_early:
            break
    assert best is not None, "an NDCG is at least 0, and there is a value to try"
    return best


def _shared_users(train: Ragged, num_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each item the items that its users have, itself among them, and how many of these
    users have each."""
    users_of = Ragged.from_pairs(train.values, train.rows, num_rows=num_items)
    for users in progress(users_of, total=num_items, what="Item pairs"):
        yield np.unique(train.take(users).values, return_counts=True)
