"""Baselines as products of vectors, so that they are embedded, exported and served as towers are.

An item-to-item model scores an item by the sum of weights W [N, N] from the items of a history. It
is the product of two vectors of each item, W = A B', of width D: that of a history is the mean of
its items' A, and an item's own is B. Where the corpus is larger than D that is the best
approximation of rank D (Eckart and Young, 1936), and an export says how good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError, choose
from twotower.evaluation.baselines.als import fit_als
from twotower.evaluation.baselines.content import describe_words, find_categories, word_vectors
from twotower.evaluation.baselines.item_graph import fit_item_graph
from twotower.evaluation.baselines.item_to_item import fit_ease, fit_item_knn
from twotower.evaluation.baselines.make import WEEK, training_lists
from twotower.evaluation.baselines.popularity import popularity_order
from twotower.evaluation.baselines.tuning import Choice, FitCache, binary_matrix
from twotower.evaluation.queries import Queries
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users

ALL = 200  # events of a history that are read where a model reads all
# Why the others are no bundles.
NOT_EXPORTED = {
    "random": "it draws another order for each query",
    "popularity_top_quantile": "it draws another order for each query; export popularity",
    "popularity_window": "a window is an option of evaluate; export popularity_last_week",
    "true_preferences": "nobody knows the preferences that a log was generated from",
}


@dataclasses.dataclass(frozen=True)
class Factors:
    """A baseline as vectors.

    Attributes:
        items: Vectors of items, float32 [N, D].
        popularity: Order of the items for users of whom nothing is known, float32 [N], the best 1
            and the last 0.
        choice: Setting of the baseline.
        read: Vectors of items in a history, float32 [N, D]; None where `users` has vectors.
        length: Number of the last events of a history that are read.
        decay: Weight of each event to that of the next later one.
        users: Vectors of the users of the log, float32 [U, D]; None where histories are read.
        width: Least width of vectors that are exact, W; vectors narrower than that approximate.
    """

    items: np.ndarray
    popularity: np.ndarray
    choice: Choice
    read: np.ndarray | None = None
    length: int = ALL
    decay: float = 1.0
    users: np.ndarray | None = None
    width: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether no vector is narrower than the model."""
        return self.items.shape[1] >= self.width


@dataclasses.dataclass(frozen=True)
class _Source:
    """What baselines are fitted on.

    Attributes:
        prepared: Data of a run.
        train: Distinct items of each user in training, the latest last.
        tuning: Queries that choose settings; None takes middle ones.
        cache: Models that were fitted on the same data before.
        dim: Greatest width of vectors.
        order: Items by falling popularity, int [N].
    """

    prepared: PreparedData
    train: Ragged
    tuning: Queries | None
    cache: FitCache
    dim: int
    order: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.prepared.items)

    @property
    def popularity(self) -> np.ndarray:
        values = np.empty(self.num_items, np.float32)
        values[self.order] = np.linspace(1.0, 0.0, self.num_items)
        return values


def make_factors(
    prepared: PreparedData,
    name: str,
    *,
    dim: int,
    tuning: Queries | None,
    cache: FitCache,
) -> Factors:
    """Fits a baseline, and returns it as vectors.

    Args:
        prepared: Prepared data of a run.
        name: Name of the baseline.
        dim: Greatest width D of the vectors.
        tuning: Queries that choose its settings; None takes middle ones.
        cache: Models that were fitted on the same data before.

    Raises:
        ConfigError: It is no product of vectors, or the data does not allow it.
    """
    # Before `choose`, which would call a known baseline unknown and offer another.
    if name in NOT_EXPORTED:
        raise ConfigError(f"--baseline={name} is no bundle: {NOT_EXPORTED[name]}.")
    make = choose(MAKERS, name, "--baseline")
    order = popularity_order(prepared.positives("train"), len(prepared.items))
    source = _Source(prepared, training_lists(prepared), tuning, cache, dim, order)
    return make(source)


def _popular(source: _Source) -> Factors:
    return _constant(source, source.popularity, Choice("all of training"))


def _last_week(source: _Source) -> Factors:
    train = source.prepared.positives("train")
    if train.timestamp is None:
        raise ConfigError("--baseline=popularity_last_week needs times, and the log has none.")
    # As measured: the week ends with training, not with the log.
    is_late = train.timestamp > train.timestamp.max() - WEEK
    order = popularity_order(train, source.num_items, among=is_late)
    values = np.empty(source.num_items, np.float32)
    values[order] = np.linspace(1.0, 0.0, source.num_items)
    return _constant(source, values, Choice("the last 7 days of training"))


def _constant(source: _Source, popularity: np.ndarray, choice: Choice) -> Factors:
    """Returns the same order for everybody."""
    # Towers need vectors of some width: these leave the order to popularity.
    nothing = np.zeros((source.num_items, 1), np.float32)
    return Factors(nothing, popularity, choice, read=nothing, length=1)


def _categories(source: _Source) -> Factors:
    found = find_categories(source.prepared.items)
    if found is None:
        raise ConfigError(
            "--baseline=popularity_in_categories needs a column of the items with few values, and "
            "there is none."
        )
    column, categories = found
    of_items = binary_matrix(categories, int(categories.values.max()) + 1).toarray()
    trained = source.prepared.positives("train").item
    # A row whose item is not in the corpus has item -1.
    counts = np.bincount(trained[trained >= 0], minlength=source.num_items)
    return Factors(
        # The count weighs the item, not the user: each list of categories is then ranked by it.
        of_items * counts[:, None].astype(np.float32),
        source.popularity,
        Choice(f"by {column}"),
        read=of_items,
    )


def _words(source: _Source) -> Factors:
    vectors = word_vectors(source.prepared.items)
    if vectors is None:
        raise ConfigError("--baseline=last_item_words needs a column of texts, and there is none.")

    def times(x: np.ndarray) -> np.ndarray:
        # From the right: all cosines would be a full matrix of items by items.
        return vectors @ (vectors.T @ x)

    # Cosines are symmetric, so that the matrix is its own transpose.
    product = _Product(source.num_items, times, times)
    return _of_product(source, product, describe_words(source.prepared.items), length=1)


def _graph(source: _Source) -> Factors:
    model, choice = fit_item_graph(
        source.train, source.num_items, source.tuning, cache=source.cache
    )
    second = model.walk.second
    steps = model.graph.steps
    discount = model.graph.discount

    def times(x: np.ndarray) -> np.ndarray:
        # From the right: the square of the graph is never made, which is nearly full.
        first = steps @ (discount[:, None] * x)
        return first + second * (steps @ first)

    def transposed(x: np.ndarray) -> np.ndarray:
        first = steps.T @ x
        return discount[:, None] * (first + second * (steps.T @ first))

    product = _Product(source.num_items, times, transposed)
    walk = model.walk
    return _of_product(source, product, choice, length=walk.items, decay=walk.decay)


def _item_knn(source: _Source) -> Factors:
    model, choice = fit_item_knn(source.train, source.num_items, source.tuning, cache=source.cache)
    return _of_product(source, _matrix(model.weights, source.num_items), choice)


def _ease(source: _Source) -> Factors:
    model, choice = fit_ease(source.train, source.num_items, source.tuning, cache=source.cache)
    return _of_product(source, _matrix(model.weights, source.num_items), choice)


def _als(source: _Source) -> Factors:
    model, choice = fit_als(source.train, source.num_items, source.tuning, cache=source.cache)
    prepared = source.prepared
    # As the baseline is measured on the test rows: solved for from all rows before them.
    earlier = [prepared.positives(part) for part in ("train", "validation")]
    seen = items_of_users(earlier, num_users=len(prepared.users))
    return Factors(model.factors, source.popularity, choice, users=model.users(seen))


# Name of a baseline -> the function that makes it of vectors.
MAKERS: dict[str, Callable[[_Source], Factors]] = {
    "popularity": _popular,
    "popularity_last_week": _last_week,
    "popularity_in_categories": _categories,
    "last_item_words": _words,
    "item_graph": _graph,
    "item_knn": _item_knn,
    "ease": _ease,
    "als": _als,
}


@dataclasses.dataclass(frozen=True)
class _Product:
    """A matrix [N, N] by its products with others [N, M], and those of its transpose."""

    size: int
    times: Callable[[np.ndarray], Any]
    transposed: Callable[[np.ndarray], Any]


def _matrix(weights: Any, size: int) -> _Product:
    return _Product(size, lambda x: weights @ x, lambda x: weights.T @ x)


def _of_product(
    source: _Source, product: _Product, choice: Choice, *, length: int = ALL, decay: float = 1.0
) -> Factors:
    read, items = factorize(product, source.dim)
    return Factors(items, source.popularity, choice, read, length, decay, width=product.size)


def factorize(product: _Product, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors A and B, float32 [N, D] each, whose products A B' are nearest to a matrix.

    By a randomised range finder with power iterations, the same for the same matrix (Halko,
    Martinsson and Tropp, Finding structure with randomness, SIAM Review 2011, algorithm 4.4).

    Args:
        product: Matrix [N, N].
        dim: Greatest D; a matrix that is no larger is returned as it is, beside the identity.
    """
    size = product.size
    if size <= dim:
        # A small corpus is exact, and the identity picks its columns.
        identity = np.eye(size, dtype=np.float32)
        return np.asarray(product.times(identity), np.float32), identity
    # A few more directions than are kept make the kept ones nearly exact.
    width = min(size, dim + 20)
    # float32, or the weights of EASE would be copied as float64 at each product.
    sketch = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)
    basis = np.linalg.qr(np.asarray(product.times(sketch)))[0]
    for _ in range(2):
        # Powers make the greatest singular values stand out, and orthogonal columns keep the others
        # from being lost in rounding. Two rounds suffice, in half of the time of four.
        basis = np.linalg.qr(np.asarray(product.transposed(basis)))[0]
        basis = np.linalg.qr(np.asarray(product.times(basis)))[0]
    small = np.asarray(product.transposed(basis)).T
    left, values, right = np.linalg.svd(small, full_matrices=False)
    # The root to each side, so that vectors of users and of items have lengths of one size.
    scale = np.sqrt(values[:dim])
    read = (basis @ left[:, :dim]) * scale
    items = right[:dim].T * scale
    return read.astype(np.float32), items.astype(np.float32)
