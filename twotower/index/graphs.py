"""Graph indexes (HNSW) by hnswlib or FAISS, for machines where ScaNN cannot be installed: the
meaning of `ExactIndex.search`.

They are tuned as a ScaNN index is: what a query may be given more of is the number of candidates
that a search of the graph keeps (efSearch). Built by one thread, the same vectors give the same
graph. index.faiss is a standard FAISS file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from twotower.index import tuning as tuner
from twotower.index.base import check_k, check_queries, check_vectors
from twotower.index.exact import ExactIndex
from twotower.index.tuning import Problem

LINKS, EF_CONSTRUCTION = 32, 200  # of each item; candidates kept while building
MOST_EF = 4_096


class Library(NamedTuple):
    """How one library builds, asks, writes and reads.

    Attributes:
        build: vectors -> graph.
        ask: (graph, queries, k, ef) -> (scores, rows), -1 where fewer than k were found.
        write: (graph, path).
        read: (path, number of items, width) -> graph.
        shared: the graph itself holds how hard is searched, so that one search at a time may ask
            it.
    """

    module: str
    extra: str
    file: str
    build: Any
    ask: Any
    write: Any
    read: Any
    shared: bool


def _import(kind: str) -> Any:
    library = GRAPHS[kind]
    try:
        return importlib.import_module(library.module)
    except ImportError as error:
        raise ImportError(
            f"index={kind} needs {library.module} ({error}): pip install 'twotower[{library.extra}]'."
        ) from error


def _build_hnswlib(vectors: np.ndarray) -> Any:
    graph = _import("hnswlib").Index(space="ip", dim=vectors.shape[1])
    graph.init_index(
        max_elements=len(vectors), M=LINKS, ef_construction=EF_CONSTRUCTION, random_seed=0
    )
    graph.add_items(vectors, np.arange(len(vectors)), num_threads=1)
    return graph


def _ask_hnswlib(graph: Any, queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
    graph.set_ef(max(ef, k))
    try:
        rows, distances = graph.knn_query(queries, k=k)
    except RuntimeError:  # some query found fewer than k
        return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    return 1.0 - distances, rows.astype(np.int64)


def _read_hnswlib(path: Path, num_items: int, dim: int) -> Any:
    graph = _import("hnswlib").Index(space="ip", dim=dim)
    graph.load_index(str(path), max_elements=num_items)
    return graph


def _build_faiss(vectors: np.ndarray) -> Any:
    faiss = _import("faiss")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        graph = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        graph.add(vectors)
    finally:
        faiss.omp_set_num_threads(threads)
    return graph


def _ask_faiss(graph: Any, queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
    # Parameters of the search and not of the graph: threads may ask for lists of different lengths
    # at once.
    return graph.search(
        queries, k, params=_import("faiss").SearchParametersHNSW(efSearch=max(ef, k))
    )


GRAPHS = {
    "hnswlib": Library(
        "hnswlib",
        "hnswlib",
        "index.hnsw",
        _build_hnswlib,
        _ask_hnswlib,
        lambda graph, path: graph.save_index(str(path)),
        _read_hnswlib,
        shared=True,
    ),
    "faiss": Library(
        "faiss",
        "faiss",
        "index.faiss",
        _build_faiss,
        _ask_faiss,
        lambda graph, path: _import("faiss").write_index(graph, str(path)),
        lambda path, *_: _import("faiss").read_index(str(path)),
        shared=False,
    ),
}


class GraphIndex:
    """A graph and how it is searched; `tuning` counts in "leaves" the candidates kept."""

    def __init__(self, graph: Any, tuning: Any):
        self._graph, self.tuning = graph, tuning
        self._lock = threading.Lock() if GRAPHS[tuning.kind].shared else contextlib.nullcontext()
        self.kind, self.num_items, self.dim, self.normalized = (
            tuning.kind,
            tuning.num_items,
            tuning.dim,
            tuning.normalized,
        )

    @classmethod
    def build(
        cls,
        vectors: Any,
        tuning: Any,
        *,
        queries: np.ndarray,
        k: int,
        popularity: np.ndarray | None = None,
    ) -> GraphIndex | ExactIndex:
        """Builds the graph and tunes it on `queries`; exact search where it cannot reach the target
        of `tuning`."""
        vectors = check_vectors(vectors, what="item")
        tuning = dataclasses.replace(tuning, num_leaves=MOST_EF)
        index = cls(GRAPHS[tuning.kind].build(vectors), tuning)
        queries = check_queries(queries, index.dim)
        problem = Problem(
            index.search_with, index.num_items, MOST_EF, False, tuning.target_recall, graph=True
        )
        efforts, tried, deciles = tuner.tune(
            problem, vectors, queries[queries.any(axis=1)], k, popularity
        )
        if not efforts:
            logging.warning(
                "%s does not reach recall %.4g: the search is exact.",
                tuning.kind,
                tuning.target_recall,
            )
            return ExactIndex(vectors, normalized=tuning.normalized)
        index.tuning = dataclasses.replace(
            tuning, efforts=efforts, tried=tried, recall_by_decile=deciles
        )
        return index

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `ScannIndex.search`."""
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        check_k(k)
        return self.search_with(queries, k, *self.tuning.effort(k))

    def search_with(
        self, queries: np.ndarray, k: int, leaves: int, reorder: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` of checked queries with `leaves` candidates kept."""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        if len(queries):
            count = min(k, self.num_items)
            with self._lock:
                found, where = GRAPHS[self.kind].ask(self._graph, queries, count, leaves)
            rows[:, :count], scores[:, :count] = where, np.where(where < 0, -np.inf, found)
        return scores, rows

    def save(self, folder: str | os.PathLike) -> None:
        GRAPHS[self.kind].write(self._graph, Path(folder) / GRAPHS[self.kind].file)

    @classmethod
    def load(cls, folder: str | os.PathLike, tuning: Any) -> GraphIndex:
        """The index that `save_index` wrote."""
        library = GRAPHS[tuning.kind]
        return cls(library.read(Path(folder) / library.file, tuning.num_items, tuning.dim), tuning)
