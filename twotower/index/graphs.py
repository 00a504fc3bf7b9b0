"""Graph indexes (HNSW) by hnswlib or FAISS, for machines where ScaNN cannot be installed.

They are tuned as a ScaNN index is: the setting is the number of candidates that a search of the
graph keeps (efSearch). How a graph is built is not tuned, since each try would be a build: M and
ef_construction are options. Built by one thread, the same vectors give the same graph. index.faiss
is a standard FAISS file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from twotower.config import RetrievalConfig
from twotower.core.errors import BadIndexError
from twotower.core.install import install_line
from twotower.index.base import check_vectors, empty_lists
from twotower.index.exact import ExactIndex
from twotower.index.tuned import TunedIndex
from twotower.index.tuning import Tuning

MAX_EF_SEARCH = 4_096  # candidates kept by a search, at most
_READING = threading.Lock()  # taken while FAISS's limit is that of one file


class Construction(NamedTuple):
    """The parameters that a graph is built with (Malkov and Yashunin 2016).

    Attributes:
        m: Links of an item in each layer, M.
        ef_construction: Candidates among which the links of an item are chosen.
    """

    m: int
    ef_construction: int


class Library(NamedTuple):
    """The functions with which one library builds, searches, writes and reads a graph.

    Attributes:
        module: Name of the module to import.
        extra: Extra of the package that installs it.
        file: Name of the file that holds the graph.
        build: (vectors [N, D], construction) -> graph.
        construction: Graph -> the parameters that it was built with.
        search: (graph, queries [Q, D], k, ef) -> (scores, rows) [Q, k]; row -1 where fewer than k
            were found.
        write: (graph, path), writes the graph.
        read: (path, number of items, width) -> graph.
        one_search_at_a_time: Whether the graph itself holds efSearch, so that two searches at once
            would change each other's.
    """

    module: str
    extra: str
    file: str
    build: Callable[[np.ndarray, Construction], Any]
    construction: Callable[[Any], Construction]
    search: Callable[[Any, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
    write: Callable[[Any, Path], None]
    read: Callable[[Path, int, int], Any]
    one_search_at_a_time: bool


def import_module(name: str, extra: str, kind: str) -> Any:
    """Returns the module of a library that an extra of the package installs.

    Args:
        name: Name of the module.
        extra: Name of the extra.
        kind: Key of `twotower.index.build.KINDS` that needs it.

    Raises:
        ImportError: It is missing; the message names the extra to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"index={kind} needs {name} ({error}): {install_line(extra)}.") from error


def import_library(kind: str) -> Any:
    """Returns the module of a library.

    Raises:
        ImportError: It is missing; the message names the extra to install.
    """
    library = GRAPHS[kind]
    return import_module(library.module, library.extra, kind)


@contextlib.contextmanager
def one_thread(faiss: Any) -> Iterator[None]:
    """Lets FAISS work by one thread, which does the same each time; the number is the process's."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def read_faiss(path: Path, kind: str) -> Any:
    """Returns the index of FAISS that a file holds.

    Raises:
        BadIndexError: It cannot be read.
        ImportError: FAISS is missing.
    """
    faiss = import_module("faiss", "faiss", kind)
    try:
        with _size_limit(faiss, path.stat().st_size):
            # Lists that lie in a file elsewhere, which this one names, are opened to be read alone.
            return faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise BadIndexError(f"{path} cannot be read: {reason}") from error


@contextlib.contextmanager
def _size_limit(faiss: Any, size: int) -> Iterator[None]:
    """Makes FAISS refuse parts that are longer than the file itself, of `size` bytes.

    Where a damaged file says that it holds more, FAISS would clear as much memory before it finds
    the end.
    """
    # Versions of FAISS before this function have no limit.
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    # The limit is the process's.
    with _READING:
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)


def _build_hnswlib(vectors: np.ndarray, construction: Construction) -> Any:
    graph = import_library("hnswlib").Index(space="ip", dim=vectors.shape[1])
    graph.init_index(
        max_elements=len(vectors),
        M=construction.m,
        ef_construction=construction.ef_construction,
        random_seed=0,
    )
    # By one thread: several would link the items in another order each time.
    graph.add_items(vectors, np.arange(len(vectors)), num_threads=1)
    return graph


def _construction_hnswlib(graph: Any) -> Construction:
    return Construction(graph.M, graph.ef_construction)


def _search_hnswlib(
    graph: Any, queries: np.ndarray, k: int, ef: int
) -> tuple[np.ndarray, np.ndarray]:
    # hnswlib finds efSearch items at most. The setting is the graph's: see `one_search_at_a_time`.
    graph.set_ef(max(ef, k))
    try:
        rows, distances = graph.knn_query(queries, k=k)
    # Some query found fewer than k, and hnswlib returns none of the lists. The tuner sees a recall
    # of 0 then, and raises efSearch.
    except RuntimeError:
        shape = (len(queries), k)
        return np.full(shape, -np.inf, np.float32), np.full(shape, -1)
    # Its distance is 1 - dot product.
    return 1.0 - distances, rows.astype(np.int64)


def _write_hnswlib(graph: Any, path: Path) -> None:
    graph.save_index(str(path))


def _read_hnswlib(path: Path, num_items: int, dim: int) -> Any:
    graph = import_library("hnswlib").Index(space="ip", dim=dim)
    graph.load_index(str(path), max_elements=num_items)
    return graph


def _build_faiss(vectors: np.ndarray, construction: Construction) -> Any:
    faiss = import_library("faiss")
    graph = faiss.IndexHNSWFlat(vectors.shape[1], construction.m, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = construction.ef_construction
    # As of hnswlib, by one thread.
    with one_thread(faiss):
        graph.add(vectors)
    return graph


def _construction_faiss(graph: Any) -> Construction:
    hnsw = graph.hnsw
    # Of layer 1: the lowest layer, 0, has twice as many links.
    return Construction(hnsw.nb_neighbors(1), hnsw.efConstruction)


def _search_faiss(
    graph: Any, queries: np.ndarray, k: int, ef: int
) -> tuple[np.ndarray, np.ndarray]:
    # Parameters of the search and not of the graph: threads may ask for lists of different lengths
    # at once.
    parameters = import_library("faiss").SearchParametersHNSW(efSearch=max(ef, k))
    return graph.search(queries, k, params=parameters)


def _write_faiss(graph: Any, path: Path) -> None:
    import_library("faiss").write_index(graph, str(path))


def _read_faiss(path: Path, num_items: int, dim: int) -> Any:
    faiss = import_library("faiss")
    graph = read_faiss(path, "faiss")
    expected = (num_items, dim, faiss.METRIC_INNER_PRODUCT)
    is_graph = isinstance(graph, faiss.IndexHNSWFlat)
    if not is_graph or (graph.ntotal, graph.d, graph.metric_type) != expected:
        raise BadIndexError(f"{path} holds no graph of {num_items} vectors {dim} wide.")
    return graph


GRAPHS = {
    "hnswlib": Library(
        module="hnswlib",
        extra="hnswlib",
        file="index.hnsw",
        build=_build_hnswlib,
        construction=_construction_hnswlib,
        search=_search_hnswlib,
        write=_write_hnswlib,
        read=_read_hnswlib,
        one_search_at_a_time=True,
    ),
    "faiss": Library(
        module="faiss",
        extra="faiss",
        file="index.faiss",
        build=_build_faiss,
        construction=_construction_faiss,
        search=_search_faiss,
        write=_write_faiss,
        read=_read_faiss,
        one_search_at_a_time=False,
    ),
}


class GraphIndex(TunedIndex):
    """A graph with the contract of `ExactIndex.search`, and its tuning.

    The tuning counts the candidates that a search keeps as "leaves".
    """

    is_graph = True

    def __init__(self, graph: Any, tuning: Tuning):
        """Wraps a graph.

        Args:
            graph: Graph of the library `tuning.kind`.
            tuning: Settings of its searches.
        """
        super().__init__(tuning)
        self._graph = graph
        self._library = GRAPHS[tuning.kind]
        # Taken in every search, and free where the library's searches do not meet.
        self._lock = contextlib.nullcontext()
        if self._library.one_search_at_a_time:
            self._lock = threading.Lock()

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
    ) -> GraphIndex | ExactIndex:
        """Builds a graph, or exact search where it cannot reach the target; see `LibraryIndex`."""
        construction = Construction(config.hnsw_m, config.hnsw_ef_construction)
        vectors = check_vectors(vectors, what="item")
        num_items, dim = vectors.shape
        tuning = Tuning(kind, num_items, dim, normalized, MAX_EF_SEARCH, config.target_recall)
        index = cls(GRAPHS[kind].build(vectors, construction), tuning)
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
            leaves: Candidates that the search keeps (efSearch).
            reorder: Not used: whole vectors are compared.
        """
        k = min(k, self.num_items)
        if not len(queries) or not k:
            return empty_lists(len(queries), k)
        with self._lock:
            scores, rows = self._library.search(self._graph, queries, k, leaves)
        # FAISS fills short lists with row -1 and a score of its own.
        scores = np.where(rows < 0, -np.inf, scores)
        return scores.astype(np.float32, copy=False), rows.astype(np.int32, copy=False)

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes the graph; see `Index.save`."""
        self._library.write(self._graph, Path(folder) / self._library.file)
        # Asked of the graph itself, which also a loaded one can tell.
        construction = self._library.construction(self._graph)
        return dataclasses.asdict(self.tuning) | {
            "hnsw_m": construction.m,
            "hnsw_ef_construction": construction.ef_construction,
        }

    @classmethod
    def load(cls, folder: str | os.PathLike, info: dict[str, Any]) -> GraphIndex:
        """Returns the index that `save` wrote; see `LibraryIndex`."""
        tuning = Tuning.from_dict(info)
        library = GRAPHS[tuning.kind]
        graph = library.read(Path(folder) / library.file, tuning.num_items, tuning.dim)
        return cls(graph, tuning)

    @staticmethod
    def import_library(kind: str) -> Any:
        """Returns hnswlib's or FAISS's module; see `LibraryIndex`."""
        return import_library(kind)
