"""What all indexes share whose searches take an effort that was tuned to a recall."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.index import tuning as tuner
from twotower.index.base import check_queries, list_length
from twotower.index.tuning import TunableIndex, Tuning


class TunedIndex:
    """An index of a library that holds its own tuning.

    Attributes:
        is_graph: Whether the effort is the candidates of a graph; see `TunableIndex.is_graph`.
        tuning: Settings of the searches.
    """

    is_graph = False

    def __init__(self, tuning: Tuning):
        """Takes what a search needs to know from `tuning`."""
        self.set_tuning(tuning)
        self.kind = tuning.kind
        self.num_items = tuning.num_items
        self.dim = tuning.dim
        self.normalized = tuning.normalized

    def set_tuning(self, tuning: Tuning) -> None:
        """Makes searches follow `tuning`."""
        self.tuning = tuning
        # Interpolating the effort would take a tenth of the time of a single query.
        self._effort = functools.lru_cache(maxsize=1_024)(tuning.effort)

    def search(self, queries: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the nearly best items of each query, best first; see `Index.search`."""
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        k = list_length(k, self.num_items)
        return self.search_with(queries, k, *self._effort(k))

    def search_with(
        self, queries: np.ndarray, k: int, leaves: int, reorder: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches with given settings.

        Args:
            queries: float32 [Q, D], checked.
            k: Length of the lists.
            leaves: Leaves searched for each query.
            reorder: Candidates scored anew with whole vectors.
        """
        raise NotImplementedError

    def one_thread(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which one thread searches, of an index that can be told so."""
        return contextlib.nullcontext()

    def find_efforts(
        self, vectors: np.ndarray, queries: ArrayLike, k: int, popularity: np.ndarray | None
    ) -> bool:
        """Sets the cheapest efforts that reach the target, and returns whether there are any.

        Args:
            vectors: float32 [N, D], vectors of the index.
            queries: float [Q, D], user vectors to tune on.
            k: Usual length of the lists.
            popularity: Popularity of each item, [N]; see `twotower.index.tuning.tune`.
        """
        queries = check_queries(queries, self.dim)
        # A query of length 0 has no best items that could be found.
        queries = queries[queries.any(axis=1)]
        if not len(queries):
            queries = vectors
        tuning = self.tuning
        tunable = TunableIndex(
            self.search_with,
            self.num_items,
            tuning.num_leaves,
            tuning.hashed,
            tuning.target_recall,
            self.is_graph,
        )
        efforts, trials, deciles = tuner.tune(tunable, vectors, queries, k, popularity)
        tuning = dataclasses.replace(
            tuning, efforts=efforts, tried=trials, recall_by_decile=deciles
        )
        self.set_tuning(tuning)
        for effort in efforts:
            logging.info(
                "%s, lists of %d: %d of %d leaves, %d candidates, recall %.4f, target %.4f.",
                self.kind,
                effort.k,
                effort.leaves,
                tuning.num_leaves,
                effort.reorder,
                effort.recall,
                tuning.target_recall,
            )
        return bool(efforts)
