"""Exact search, graphs and inverted files that `experiments.benchmarks.index` compares with: each a
name and what builds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# (queries, k, effort) -> (scores, rows)
Search = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


class Built(NamedTuple):
    """An index that can be asked.

    Attributes:
        most: The greatest effort; 0 where there is none to choose.
        graph: The effort is at least k.
        write: (path) writes it; its size counts.
    """

    search: Search
    most: int = 0
    graph: bool = False
    write: Callable[[Path], Any] = lambda path: None


# A peer: its name, and what builds it; with what more its name says where one build is asked in
# several ways.
Peer = tuple[str, Callable[[], dict[str, Built]]]


def exact_peers(vectors: np.ndarray) -> Iterator[Peer]:
    """JAX, NumPy and FAISS, comparing all."""
    from twotower.index.exact import ExactIndex
    from twotower.index.graphs import import_library
    from twotower.index.search import brute_force_search

    faiss = import_library("faiss")

    def flat() -> dict[str, Built]:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return {"": Built(lambda q, k, _: index.search(q, k))}

    def jax() -> dict[str, Built]:
        index = ExactIndex(vectors)
        return {"": Built(lambda q, k, _: index.search(q, k))}

    yield "exact, JAX (ours)", jax
    yield (
        "exact, NumPy (ours)",
        lambda: {"": Built(lambda q, k, _: brute_force_search(vectors, None, q, k))},
    )
    yield "exact, FAISS flat", flat


def graph_peers(vectors: np.ndarray, widths: Sequence[int], threads: int) -> Iterator[Peer]:
    """HNSW by two libraries, with so many links an item."""
    for links in widths:
        yield f"hnswlib M={links}", lambda links=links: _hnswlib(vectors, links, threads)
        yield f"FAISS HNSW{links}", lambda links=links: _faiss_hnsw(vectors, links)


def _hnswlib(vectors: np.ndarray, links: int, threads: int) -> dict[str, Built]:
    from twotower.index.graphs import import_library

    hnswlib = import_library("hnswlib")
    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(max_elements=len(vectors), M=links, ef_construction=200, random_seed=0)
    graph.add_items(vectors, num_threads=threads)

    def ask(queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        graph.set_ef(max(ef, k))
        rows, distances = graph.knn_query(queries, k=k, num_threads=threads)
        return 1.0 - distances, rows.astype(np.int64)

    return {"": Built(ask, 4_096, True, lambda path: graph.save_index(str(path)))}


def _faiss_hnsw(vectors: np.ndarray, links: int) -> dict[str, Built]:
    from twotower.index.graphs import import_library

    faiss = import_library("faiss")
    hnsw = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 200
    hnsw.add(vectors)

    def search(queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        return hnsw.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=max(ef, k)))

    return {"": Built(search, 4_096, True, lambda path: faiss.write_index(hnsw, str(path)))}


def inverted_peers(vectors: np.ndarray, per_root: Sequence[int]) -> Iterator[Peer]:
    """FAISS inverted files over whole vectors, and over 4-bit product codes with the best scored
    anew; so many lists for each of the root of N."""
    codes = f"PQ{vectors.shape[1] // 2}x4fs,RFlat"
    for lists in (round(times * math.sqrt(len(vectors))) for times in per_root):
        for kind in ("Flat", codes):
            yield (
                f"FAISS IVF{lists},{kind}",
                lambda lists=lists, kind=kind: _inverted(vectors, lists, kind),
            )


def _inverted(vectors: np.ndarray, lists: int, kind: str) -> dict[str, Built]:
    from twotower.index.graphs import import_library

    faiss = import_library("faiss")
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},{kind}", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)

    def search(
        queries: np.ndarray, k: int, probes: int, again: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        params = faiss.SearchParametersIVF(nprobe=probes)
        if again:
            params = faiss.IndexRefineSearchParameters(k_factor=again, base_index_params=params)
        return index.search(queries, k, params=params)

    def ways(again: int) -> Built:
        return Built(
            lambda queries, k, probes: search(queries, k, probes, again),
            lists,
            False,
            lambda path: faiss.write_index(index, str(path)),
        )

    return (
        {"": ways(0)} if kind == "Flat" else {f" x{again}": ways(again) for again in (16, 32, 64)}
    )
