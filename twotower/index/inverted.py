"""Inverted files of FAISS over whole vectors (IVF, flat): many lists of items, one for each centre.

A search compares the query with all centres and then with the items of the nearest lists. Nothing
is compressed, so scores are exact. Tuning counts the lists that are searched as "leaves". Built by
one thread, the same vectors give the same index. index.faiss is a standard FAISS file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.config import RetrievalConfig
from twotower.core.errors import BadIndexError
from twotower.index.base import check_vectors, empty_lists
from twotower.index.exact import ExactIndex
from twotower.index.graphs import import_module, one_thread, read_faiss
from twotower.index.tuned import TunedIndex
from twotower.index.tuning import Tuning

KIND = "faiss_ivf"
FILE = "index.faiss"
# Lists for each of the root of N, within FAISS's advice of 4 to 16.
LISTS_PER_ROOT = 4


class InvertedIndex(TunedIndex):
    """An inverted file with the contract of `ExactIndex.search`, and its tuning."""

    def __init__(self, inverted: Any, tuning: Tuning):
        """Wraps an inverted file.

        Args:
            inverted: FAISS's IndexIVFFlat.
            tuning: Settings of its searches.
        """
        super().__init__(tuning)
        self._inverted = inverted
        self._faiss = import_faiss()

    @classmethod
    def build(
        cls,
        vectors: ArrayLike,
        config: RetrievalConfig,
        *,
        kind: str,
        queries: ArrayLike,
        normalized: bool = False,
        popularity: np.ndarray | None = None,
        leaves_per_root: int | None = None,
    ) -> InvertedIndex | ExactIndex:
        """Builds an inverted file; see `LibraryIndex`. Without items the search is exact."""
        vectors = check_vectors(vectors, what="item")
        num_items, dim = vectors.shape
        if not num_items:
            return ExactIndex(vectors, normalized=normalized)
        num_lists = round((leaves_per_root or LISTS_PER_ROOT) * math.sqrt(num_items))
        num_lists = min(num_lists, num_items)
        tuning = Tuning(kind, num_items, dim, normalized, num_lists, config.target_recall)
        index = cls(_build(vectors, num_lists), tuning)
        # A search of all lists is exact, so some effort always reaches the target but for its
        # margin, which a target of 1 leaves no room for.
        if index.find_efforts(vectors, queries, config.k, popularity):
            return index
        logging.warning(
            "%s does not reach recall %.4g: the search is exact.", kind, config.target_recall
        )
        return ExactIndex(vectors, normalized=normalized)

    def search_with(
        self, queries: np.ndarray, k: int, leaves: int, reorder: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches with a given setting.

        Args:
            queries: float32 [Q, D], checked.
            k: Length of the lists.
            leaves: Lists searched for each query (nprobe).
            reorder: Not used: whole vectors are compared.
        """
        k = min(k, self.num_items)
        if not len(queries) or not k:
            return empty_lists(len(queries), k)
        scores, rows = self._inverted.search(queries, k, params=_search_parameters(leaves))
        # FAISS fills short lists with row -1 and a score of its own.
        if _has_short_lists(rows):
            scores = np.where(rows < 0, np.float32(-np.inf), scores)
        return scores, rows.astype(np.int32)

    def one_thread(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which FAISS searches by one thread."""
        return one_thread(self._faiss)

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the inverted file; see `Index.save`."""
        self._faiss.write_index(self._inverted, str(Path(folder) / FILE))
        return dataclasses.asdict(self.tuning)

    @classmethod
    def load(cls, folder: str | os.PathLike, info: dict[str, Any]) -> InvertedIndex:
        """Returns the index that `save` wrote; see `LibraryIndex`."""
        tuning = Tuning.from_dict(info)
        path = Path(folder) / FILE
        inverted = read_faiss(path, KIND)
        _check(inverted, tuning, path)
        return cls(inverted, tuning)

    @staticmethod
    def import_library(kind: str) -> Any:
        """Returns FAISS's module; see `LibraryIndex`."""
        return import_faiss()


# Making them takes a tenth of the time of a single query.
@functools.lru_cache(maxsize=64)
def _search_parameters(probes: int) -> Any:
    return import_faiss().SearchParametersIVF(nprobe=probes)


def import_faiss() -> Any:
    """Returns FAISS's module.

    Raises:
        ImportError: It is missing; the message names the extra to install.
    """
    return import_module("faiss", "faiss", KIND)


def _has_short_lists(rows: np.ndarray) -> bool:
    """Whether some list of rows [Q, k] ends in -1."""
    # For a single query, whose search takes some 20 microseconds, NumPy would take four.
    if len(rows) == 1:
        return rows.item(-1) < 0
    return bool((rows[:, -1] < 0).any())


def _build(vectors: np.ndarray, num_lists: int) -> Any:
    faiss = import_faiss()
    dim = vectors.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    inverted = faiss.IndexIVFFlat(quantizer, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    # Python would free the quantizer, which the index points to.
    quantizer.this.disown()
    inverted.own_fields = True
    # No warning where the lists are shorter than FAISS's usual ones: they are compared.
    inverted.cp.min_points_per_centroid = 1
    with one_thread(faiss):
        inverted.train(vectors)
        inverted.add(vectors)
    return inverted


def _check(inverted: Any, tuning: Tuning, path: Path) -> None:
    """Refuses a file that holds another index, or rows that there are not.

    Raises:
        BadIndexError: The file is not what `InvertedIndex.save` writes.
    """
    faiss = import_faiss()
    expected = (tuning.num_items, tuning.dim, tuning.num_leaves, faiss.METRIC_INNER_PRODUCT)
    if isinstance(inverted, faiss.IndexIVFFlat):
        found = (inverted.ntotal, inverted.d, inverted.nlist, inverted.metric_type)
        quantizer = faiss.downcast_index(inverted.quantizer)
        lists = faiss.downcast_InvertedLists(inverted.invlists)
        # Other lists may lie in a file elsewhere, which this one names.
        is_plain = isinstance(quantizer, faiss.IndexFlat)
        is_plain = is_plain and isinstance(lists, faiss.ArrayInvertedLists)
        if found == expected and is_plain and _is_whole(inverted, quantizer, lists):
            return
    raise BadIndexError(
        f"{path} holds no inverted file of {tuning.num_leaves} lists over {tuning.num_items} "
        f"vectors {tuning.dim} wide."
    )


def _is_whole(inverted: Any, quantizer: Any, lists: Any) -> bool:
    """Whether each row lies in one list, and the parts are of one size."""
    faiss = import_faiss()
    sizes = (quantizer.ntotal, quantizer.d, lists.nlist, lists.code_size)
    if sizes != (inverted.nlist, inverted.d, inverted.nlist, 4 * inverted.d):
        return False
    rows = [
        faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number)).copy()
        for number in range(lists.nlist)
        if lists.list_size(number)
    ]
    if not rows:
        return False
    found = np.sort(np.concatenate(rows))
    return np.array_equal(found, np.arange(inverted.ntotal))
