"""Classic item-to-item models, linear in what a user did: item-kNN and EASE. They know training
rows alone, as towers do, and are asked with the history that the towers are asked with."""

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

# What a fitted model says to queries.
Asked = Callable[[Queries], Scores]

NEIGHBOURS = (5, 20, 100)
RIDGES = (1000.0, 300.0, 100.0, 30.0, 10.0)  # the lambda of EASE
MOST_ITEMS = 20_000  # of EASE: a matrix takes 1.6 GB, and five are held at once
MOST_PAIRS = 10**10  # of two items that one user has, to be counted: minutes


def make_item_to_item(
    train: Ragged, queries: Queries, tuning: Queries | None
) -> Mapping[str, Scores]:
    """{"item_knn": scores of the queries, "ease": likewise}, less what the log is too large for.

    Args:
        train: the distinct items of each user in training.
        queries: asked with the items that they hold as seen; without any all scores are 0.
        tuning: queries of validation, whose NDCG@10 with seen items masked chooses the number of
            neighbours and the ridge; None takes the middle ones.
    """
    pairs = int((train.lengths**2).sum())
    if pairs > MOST_PAIRS:
        logging.warning(
            "item_knn and ease are left out: the users have %d pairs of items, which to count takes too long above %d.",
            pairs,
            MOST_PAIRS,
        )
        return {}
    near, similarity = nearest_items(train, queries.num_items, max(NEIGHBOURS))
    knn = lambda count: neighbour_scores(near[:, :count], similarity[:, :count])  # noqa: E731
    made = {
        "item_knn": _tuned("item_knn: neighbours", NEIGHBOURS, knn, tuning, peaked=False)(queries)
    }
    if queries.num_items > MOST_ITEMS:
        logging.warning(
            "ease is left out: it inverts a matrix of items by items, and %d items are more than %d.",
            queries.num_items,
            MOST_ITEMS,
        )
        return made
    gram = jnp.asarray(gram_matrix(train, queries.num_items))
    weigh = lambda ridge: weight_scores(np.asarray(ease(gram, ridge)))  # noqa: E731
    return made | {"ease": _tuned("ease: ridge", RIDGES, weigh, tuning, peaked=True)(queries)}


def nearest_items(train: Ragged, num_items: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [N, count] rows of the items of greatest cosine, float32 [N, count] cosines), without
    the item itself, the nearest first and of equals the more popular; cosine 0 where no more items
    share a user.

    cos(i, j) = |users of both| / sqrt(|users of i| |users of j|) (Sarwar et al., "Item-based
    collaborative filtering recommendation algorithms", WWW 2001).
    """
    near, similarity = (
        np.zeros((num_items, count), np.int32),
        np.zeros((num_items, count), np.float32),
    )
    popularity = np.bincount(train.values, minlength=num_items)
    for item, (others, both) in enumerate(_shared_users(train, num_items)):
        others, both = others[others != item], both[others != item]
        cosine = both / np.sqrt(popularity[item] * popularity[others])
        best = np.lexsort((-popularity[others], -cosine))[:count]
        near[item, : len(best)], similarity[item, : len(best)] = others[best], cosine[best]
    return near, similarity


def gram_matrix(train: Ragged, num_items: int) -> np.ndarray:
    """float32 [N, N], X'X of the binary matrix of users and items: the users that two items
    share."""
    gram = np.zeros((num_items, num_items), np.float32)
    for item, (others, both) in enumerate(_shared_users(train, num_items)):
        gram[item, others] = both
    return gram


@jax.jit
def ease(gram: Float[Array, "N N"], ridge: Float[Array, ""]) -> Float[Array, "N N"]:
    """B = I - P / diag(P), P = (X'X + ridge I)^-1: the weights that predict a row of X from itself
    with least squares and a diagonal of 0 (Steck, "Embarrassingly shallow autoencoders for sparse
    data", WWW 2019, eq. 8)."""
    unit = jnp.eye(len(gram), dtype=gram.dtype)
    with jax.default_matmul_precision("highest"):
        precision = jax.scipy.linalg.cho_solve(
            jax.scipy.linalg.cho_factor(gram + ridge * unit), unit
        )
    return jnp.where(unit == 1, 0.0, -precision / jnp.diag(precision)[None, :])


def neighbour_scores(near: np.ndarray, similarity: np.ndarray) -> Asked:
    """An item's score is the sum of its cosines with the seen items that it is a neighbour of."""

    def of_user(items: np.ndarray) -> np.ndarray:
        return np.bincount(
            near[items].ravel(), weights=similarity[items].ravel(), minlength=len(near)
        )

    return _sums(of_user, len(near))


def weight_scores(weights: np.ndarray) -> Asked:
    """An item's score is the sum of `weights` [N, N] from the seen items to it."""
    return _sums(lambda items: weights[items].sum(axis=0), len(weights))


def _sums(of_user: Callable[[np.ndarray], np.ndarray], num_items: int) -> Asked:
    """queries -> scores, where `of_user` makes those of one from its seen items."""

    def scores(queries: Queries, chosen: slice) -> np.ndarray:
        # Histories are short beside N, so rows are added up rather than multiplied out.
        lists = queries.seen_of(chosen)
        return np.stack([of_user(items) for items in lists]).astype(np.float32)

    return lambda queries: lambda chosen: scores(queries, chosen)


def _tuned(
    what: str,
    values: Sequence[float],
    make: Callable[[Any], Asked],
    tuning: Queries | None,
    *,
    peaked: bool,
) -> Asked:
    """What `make` gives for the best of `values`; `peaked` stops at the first that is worse than
    the one before it."""
    if tuning is None:
        return make(values[len(values) // 2])
    best, highest = None, -1.0
    for value in progress(values, total=len(values), what=what):
        made = make(value)
        found = evaluate(made(tuning), tuning, (10,), mask_seen=True)["ndcg@10"]
        logging.info("%s %g: NDCG@10 %.4f on validation.", what, value, found)
        if found > highest:
            best, highest = made, found
        elif peaked:
            break
    return best


def _shared_users(train: Ragged, num_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each item (the items that its users have, itself among them; how many of these users have
    each)."""
    users_of = Ragged.from_pairs(train.values, train.rows, num_rows=num_items)
    for users in progress(users_of, total=num_items, what="Item pairs"):
        yield np.unique(train.take(users).values, return_counts=True)
