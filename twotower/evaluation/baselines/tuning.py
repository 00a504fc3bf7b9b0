"""What baselines that are fitted share: settings that validation chooses, and a folder that keeps
what was fitted."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from absl import logging

from twotower.core.arrays import Ragged
from twotower.core.errors import FolderError
from twotower.core.files import read_folder, write_folder
from twotower.core.progress import progress
from twotower.evaluation.evaluate import Scores, evaluate
from twotower.evaluation.queries import Queries

KIND = "baseline"
FITTED = "evaluation/baselines"  # folder of a run that keeps its baselines as they were fitted
MAX_KEPT_BYTES = 2**28  # of a fitted model; of larger ones the choice alone would be kept
FORMAT = 1  # of what is fitted: another one fits anew


@runtime_checkable
class ItemModel(Protocol):
    """A fitted model: queries -> their scores."""

    def __call__(self, queries: Queries) -> Scores: ...


T = TypeVar("T")
M = TypeVar("M", bound=ItemModel)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The setting of a baseline.

    Attributes:
        setting: Setting in words, such as "ridge 100.0".
        tried: Number of settings that validation chose from; 1 where nothing was chosen.
    """

    setting: str
    tried: int = 1

    def __str__(self) -> str:
        # "The best of 1" would claim a choice.
        if self.tried == 1:
            return self.setting
        return f"{self.setting}, the best of {self.tried} on validation"


class Baselines(dict[str, Scores]):
    """Scores of baselines by name, and how they were set.

    Attributes:
        choices: Name -> setting, of those that have one.
    """

    def __init__(self, scores: Mapping[str, Scores] | Iterable[tuple[str, Scores]] = ()):
        super().__init__(scores)
        self.choices: dict[str, Choice] = {}

    def add(self, name: str, scores: Scores, choice: Choice) -> None:
        """Adds a baseline with its setting."""
        self[name] = scores
        self.choices[name] = choice

    def join(self, others: Baselines) -> None:
        """Adds all of others."""
        self.update(others)
        self.choices |= others.choices


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The arrays of a fitted model, and its setting."""

    arrays: Mapping[str, np.ndarray]
    choice: Choice


class FitCache:
    """Models that are fitted once, and kept in a folder for the same data.

    Args:
        folder: Folder of the models, one folder each; None keeps nothing.
        data: Hash of all that they are fitted on, see `data_hash`.
    """

    def __init__(self, folder: Path | None, data: str = ""):
        self._folder = folder
        self._data = data

    def fit(self, name: str, settings: object, fit: Callable[[], Fitted]) -> Fitted:
        """Returns the model that is kept, or fits it and keeps it.

        Args:
            name: Name of the baseline.
            settings: Settings that are tried; others fit anew.
            fit: Function that fits it.
        """
        if self._folder is None:
            return fit()
        folder = self._folder / name
        # Settings are in it as text: whoever changes a list of them wants new models.
        key = f"{FORMAT} {self._data} {settings}"
        try:
            state, arrays = read_folder(folder, KIND)
            if state.get("key") == key:
                return Fitted(arrays, Choice(state["setting"], state["tried"]))
        # Nothing is lost with it: it is fitted again.
        except (FolderError, OSError):
            pass
        fitted = fit()
        # A model that is larger would fill the folder of every run.
        if sum(array.nbytes for array in fitted.arrays.values()) <= MAX_KEPT_BYTES:
            state = {"key": key} | dataclasses.asdict(fitted.choice)
            write_folder(folder, KIND, state, fitted.arrays)
        return fitted


NO_CACHE = FitCache(None)


def data_hash(train: Ragged, num_items: int, tuning: Queries | None) -> str:
    """Returns a hash of the training lists and of the queries that choose settings."""
    digest = hashlib.sha256(f"{num_items}".encode())
    arrays = [train.offsets, train.values]
    if tuning is not None:
        relevant = tuning.relevant
        arrays += [tuning.user, relevant.offsets, relevant.values]
    for array in arrays:
        # An empty array has no bytes to hash, and would be the same as none.
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"-")
    return digest.hexdigest()


def best_model(
    title: str,
    values: Sequence[T],
    make: Callable[[T], M],
    tuning: Queries | None,
    *,
    stop_early: bool = False,
) -> tuple[M, Choice]:
    """Makes the model of the value that is best on `tuning`.

    Args:
        title: Name of the baseline and of the choice, such as "ease: ridge".
        values: Values to try, in order.
        make: Function from a value to its model.
        tuning: Queries to measure with; None takes the middle value.
        stop_early: Whether to stop at the first value that is no better than the one before it.

    Returns:
        The model, and its choice.
    """
    _, _, what = title.partition(": ")
    if tuning is None:
        # Without a measurement: the ends of a list are for odd data.
        middle = values[len(values) // 2]
        return make(middle), Choice(f"{what} {middle}")
    # Models are made one after another, and two are held at most: EASE's are large.
    best: tuple[M, T] | None = None
    best_ndcg = -1.0
    tried = 0
    for value in progress(values, total=len(values), what=title):
        model = make(value)
        tried += 1
        ndcg = evaluate(model(tuning), tuning, (10,), mask_seen=True)["ndcg@10"]
        logging.info("%s %s: NDCG@10 %.4f on validation.", title, value, ndcg)
        # Only a gain: of equals the first one stays, which is the simplest or the most regularised.
        if ndcg > best_ndcg:
            best = (model, value)
            best_ndcg = ndcg
        elif stop_early:
            break
    assert best is not None, "an NDCG is at least 0, and there is a value to try"
    model, value = best
    return model, Choice(f"{what} {value}", tried)


def binary_matrix(lists: Ragged, num_items: int) -> Any:
    """Returns the sparse matrix of lists by items, 1 where a list has one: float32 [R, N]."""
    ones = np.ones(len(lists.values), np.float32)
    return sparse_array(ones, lists.values, lists.offsets, num_items)


def sparse_array(
    values: np.ndarray, columns: np.ndarray, offsets: np.ndarray, num_columns: int
) -> Any:
    """Returns a sparse array of scipy of which row r is `values[offsets[r]:offsets[r + 1]]`."""
    # Imported where it is used, as in `ease`.
    import scipy.sparse

    shape = (len(offsets) - 1, num_columns)
    return scipy.sparse.csr_array((values, columns, offsets), shape=shape)
