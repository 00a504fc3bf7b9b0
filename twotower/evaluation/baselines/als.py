"""Implicit ALS: a matrix factorisation of who took what, by the package `implicit` (extra: als)."""

from __future__ import annotations

import dataclasses

import numpy as np
from absl import logging

from twotower.core.arrays import Ragged
from twotower.core.install import extra
from twotower.evaluation.baselines.tuning import (
    NO_CACHE,
    Choice,
    FitCache,
    Fitted,
    best_model,
    binary_matrix,
)
from twotower.evaluation.evaluate import Scores
from twotower.evaluation.queries import Queries

FACTORS = 64
ITERATIONS = 15
MAX_PAIRS = 20_000_000  # pairs of user and item, a few minutes on one core
# Of one core, in half-steps of conjugate gradients: measured at 4,000 users and 2,500 items, to
# tell how long it takes.
OPERATIONS_A_SECOND = 5e9


@dataclasses.dataclass(frozen=True)
class AlsSetting:
    """A setting of the factorisation.

    Attributes:
        confidence: Weight of a pair that was taken, to that of one that was not.
        regularization: Strength of the penalty on the factors.
    """

    confidence: float
    regularization: float

    def __str__(self) -> str:
        return f"{self.confidence:g} and regularization {self.regularization:g}"


SETTINGS = (
    AlsSetting(confidence=2.0, regularization=1.0),
    AlsSetting(confidence=5.0, regularization=10.0),
    AlsSetting(confidence=20.0, regularization=10.0),
)


@dataclasses.dataclass(frozen=True)
class AlsModel:
    """Scores by factors of the items, and of users that are solved for from what they have seen.

    Hu, Koren and Volinsky, Collaborative filtering for implicit feedback datasets, ICDM 2008,
    eq. 4.

    Attributes:
        factors: Factors of the items, float32 [N, D].
        setting: Confidence and penalty.
    """

    factors: np.ndarray
    setting: AlsSetting

    def users(self, seen: Ragged) -> np.ndarray:
        """Returns the factors of users with these items, float32 [b, D]; 0 of none."""
        items = self.factors.astype(np.float64)
        width = items.shape[1]
        # The same for all users: only the items that one took are added to it (the paper's
        # speed-up).
        everybody = items.T @ items + self.setting.regularization * np.eye(width)
        users = np.zeros((len(seen), width), np.float32)
        for row, listed in enumerate(seen):
            # The solution without items is 0 as well, at the price of a system of equations.
            if not len(listed):
                continue
            taken = items[listed]
            # An item that was taken is in the sum of all already, with weight 1.
            weighed = everybody + (self.setting.confidence - 1.0) * (taken.T @ taken)
            users[row] = np.linalg.solve(weighed, self.setting.confidence * taken.sum(0))
        return users

    def __call__(self, queries: Queries) -> Scores:
        # Users are solved for block by block: all scores at once would be users by items.
        return lambda block: self.users(queries.seen_lists(block)) @ self.factors.T


def make_als(
    train: Ragged, queries: Queries, tuning: Queries | None, *, cache: FitCache = NO_CACHE
) -> tuple[Scores, Choice]:
    """Makes the scores of "als".

    Args:
        train: Distinct items of each user in training.
        queries: Queries to score. One without seen items gets 0 for all.
        tuning: Validation queries, whose NDCG@10 with seen items masked chooses the setting; None
            takes the middle one.
        cache: Models that were fitted on the same data before.

    Raises:
        ConfigError: The extra "als" is not installed.
    """
    model, choice = fit_als(train, queries.num_items, tuning, cache=cache)
    return model(queries), choice


def fit_als(
    train: Ragged, num_items: int, tuning: Queries | None, *, cache: FitCache = NO_CACHE
) -> tuple[AlsModel, Choice]:
    """Fits the model of `make_als`."""
    fitted = cache.fit("als", SETTINGS, lambda: _fit(train, num_items, tuning))
    confidence, regularization = fitted.arrays["setting"].tolist()
    setting = AlsSetting(confidence, regularization)
    return AlsModel(fitted.arrays["factors"], setting), fitted.choice


def _fit(train: Ragged, num_items: int, tuning: Queries | None) -> Fitted:
    settings = SETTINGS if tuning is not None else SETTINGS[1:2]
    # `implicit` takes three steps of conjugate gradients, each over the factors of all pairs and a
    # square of them for each row. Twice below: users, then items.
    operations = 6.0 * FACTORS * len(train.values) + 3.0 * FACTORS**2 * (len(train) + num_items)
    seconds = 2 * ITERATIONS * len(settings) * operations / OPERATIONS_A_SECOND
    # Below that nobody asks what is going on.
    if seconds > 5:
        logging.info(
            "als: %d users and %d items take about %.0f s on one core for %d settings.",
            len(train),
            num_items,
            seconds,
            len(settings),
        )

    def make(setting: AlsSetting) -> AlsModel:
        return AlsModel(factorize(train, num_items, setting), setting)

    model, choice = best_model("als: confidence", SETTINGS, make, tuning)
    setting = np.array([model.setting.confidence, model.setting.regularization])
    return Fitted({"factors": model.factors, "setting": setting}, choice)


def factorize(train: Ragged, num_items: int, setting: AlsSetting, *, seed: int = 0) -> np.ndarray:
    """Returns the factors of the items, float32 [N, D], the same for the same seed.

    Raises:
        ConfigError: The extra "als" is not installed.
    """
    with extra("als", "The baseline als"):
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    import scipy.sparse

    # One thread: several add up the factors in the order in which they happen to end.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors=min(FACTORS, num_items),
            regularization=setting.regularization,
            alpha=setting.confidence,
            iterations=ITERATIONS,
            num_threads=1,
            random_state=seed,
        )
        model.fit(scipy.sparse.csr_matrix(binary_matrix(train, num_items)), show_progress=False)
    return np.asarray(model.item_factors, np.float32)


def has_implicit() -> bool:
    """Whether the extra "als" is installed."""
    # Looked for and not imported, which takes seconds and starts threads.
    import importlib.util

    return importlib.util.find_spec("implicit") is not None
