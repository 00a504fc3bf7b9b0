"""The tuned index against FAISS, hnswlib and exact search: queries per second at a recall, each peer tuned as carefully.

    python -m experiments.benchmarks.index [--items=200000 --dim=64 --target_recall=.95 --k=10] [--workdir=RUN] [--quick]

Vectors are those of the bundle of --workdir, or drawn: a mixture of N / 150 clusters with a falling spectrum, users near items.
Every index is tuned on one half of the users and measured on the other: the fewest leaves, probes or candidates whose recall,
less 1.64 standard errors, reaches the target; peers for each of several builds. One thread, unless --threads says otherwise
(twotower and JAX take the cores they are given: pin the process). Needs faiss-cpu and hnswlib.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments.benchmarks import harness

_ITEMS = flags.DEFINE_integer("items", 200_000, "N of the drawn vectors.")
_DIM = flags.DEFINE_integer("dim", 64, "D of the drawn vectors.")
_WORKDIR = flags.DEFINE_string("workdir", "", "A run whose bundle's vectors are taken.")
_TARGET = flags.DEFINE_float("target_recall", 0.95, "The recall to reach.")
_K = flags.DEFINE_integer("k", 10, "Length of the lists.")
_THREADS = flags.DEFINE_integer("threads", 1, "Of every contestant.")
_GRID = flags.DEFINE_bool("grid", False, "Also compare the tuner's choice with the best of a full grid.")
USERS = 4_000


class Built(NamedTuple):
    """An index that can be asked.

    Attributes:
        search: (queries, k, effort) -> (scores, rows).
        most: the greatest effort; 0 where there is none to choose.
        graph: the effort is at least k.
        size: bytes on the disk.
    """

    name: str
    search: Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
    most: int
    graph: bool
    seconds: float
    size: int


def draw(items: int, dim: int, users: int = USERS) -> tuple[np.ndarray, np.ndarray]:
    """(users, items), unit vectors; see the head of this file."""
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    spectrum = np.arange(1, dim + 1) ** -0.5
    centres = rng.normal(size=(max(items // 150, 8), dim))
    vectors = unit((centres[rng.integers(0, len(centres), items)] + 0.6 * rng.normal(size=(items, dim))) * spectrum)
    near = vectors[rng.integers(0, items, users)]
    return unit(near + 0.25 / np.sqrt(dim) * rng.normal(size=near.shape)), vectors


def load(workdir: Path, users: int = USERS) -> tuple[np.ndarray, np.ndarray]:
    """(users, items) of a bundle."""
    from twotower.retrieval.bundle import load_bundle
    from twotower.retrieval.embed import evenly_spaced

    bundle = load_bundle(workdir / "bundle")
    return np.asarray(evenly_spaced(bundle.user_vectors, users)), np.asarray(bundle.vectors)


def exact_peers(vectors: np.ndarray) -> Iterator[Built]:
    """JAX, NumPy and FAISS, comparing all."""
    import faiss

    from twotower.retrieval.exact import ExactIndex
    from twotower.retrieval.search import exact_among

    index, flat = ExactIndex(vectors), faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    yield Built("exact, JAX (ours)", lambda q, k, _: index.search(q, k), 0, False, 0.0, vectors.nbytes)
    yield Built("exact, NumPy (ours)", lambda q, k, _: exact_among(vectors, None, q, k), 0, False, 0.0, vectors.nbytes)
    yield Built("exact, FAISS flat", lambda q, k, _: flat.search(q, k), 0, False, 0.0, vectors.nbytes)


def graph_peers(vectors: np.ndarray) -> Iterator[Built]:
    """HNSW of two widths by two libraries."""
    import faiss
    import hnswlib

    for links in (16,) if harness.QUICK.value else (16, 32):
        start = time.perf_counter()
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.init_index(max_elements=len(vectors), M=links, ef_construction=200, random_seed=0)
        graph.add_items(vectors, num_threads=_THREADS.value)

        def ask(queries: np.ndarray, k: int, ef: int, graph: Any = graph) -> tuple[np.ndarray, np.ndarray]:
            graph.set_ef(max(ef, k))
            rows, distances = graph.knn_query(queries, k=k, num_threads=_THREADS.value)
            return 1.0 - distances, rows.astype(np.int64)

        size = _size(lambda path, graph=graph: graph.save_index(str(path)))
        yield Built(f"hnswlib M={links}", ask, 4_096, True, time.perf_counter() - start, size)
        start = time.perf_counter()
        hnsw = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        hnsw.hnsw.efConstruction = 200
        hnsw.add(vectors)

        def search(queries: np.ndarray, k: int, ef: int, hnsw: Any = hnsw) -> tuple[np.ndarray, np.ndarray]:
            return hnsw.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=max(ef, k)))

        size = _size(lambda path, hnsw=hnsw: faiss.write_index(hnsw, str(path)))
        yield Built(f"FAISS HNSW{links}", search, 4_096, True, time.perf_counter() - start, size)


def inverted_peers(vectors: np.ndarray) -> Iterator[Built]:
    """FAISS inverted files over whole vectors, and over 4-bit product codes with the best scored anew."""
    import faiss

    dim, root = vectors.shape[1], round(math.sqrt(len(vectors)))
    codes = f"PQ{dim // 2}x4fs,RFlat"
    for lists in (root,) if harness.QUICK.value else (root, 4 * root):
        for kind in ("Flat", codes):
            for again in (1,) if kind == "Flat" else (8, 32):
                start = time.perf_counter()
                index = faiss.index_factory(dim, f"IVF{lists},{kind}", faiss.METRIC_INNER_PRODUCT)
                index.train(vectors)
                index.add(vectors)

                def search(queries: np.ndarray, k: int, probes: int, index: Any = index, again: int = again):
                    inner = faiss.SearchParametersIVF(nprobe=probes)
                    if isinstance(index, faiss.IndexIVFFlat):
                        return index.search(queries, k, params=inner)
                    return index.search(queries, k, params=faiss.IndexRefineSearchParameters(
                        k_factor=again, base_index_params=inner))  # fmt: skip

                name = f"FAISS IVF{lists},{kind}" + (f" x{again}" if kind != "Flat" else "")
                size = _size(lambda path, index=index: faiss.write_index(index, str(path)))
                yield Built(name, search, lists, False, time.perf_counter() - start, size)


def _size(write: Callable[[Path], Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "index")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def ours(users: np.ndarray, vectors: np.ndarray) -> tuple[Any, Built]:
    """The index as export builds it, for `users` to tune on."""
    from twotower.config import RetrievalConfig
    from twotower.retrieval.scann import build_index, save_index

    start = time.perf_counter()
    config = RetrievalConfig(target_recall=_TARGET.value, k=_K.value)
    index = build_index(vectors, config, normalized=True, queries=users)
    seconds = time.perf_counter() - start
    size = _size(lambda path: save_index(index, path))
    return index, Built(f"twotower ({index.kind})", lambda q, k, _: index.search(q, k), 0, False, seconds, size)


def tuned(built: Built, tuning: np.ndarray, vectors: np.ndarray) -> int | None:
    """The least effort of a peer that reaches the target on `tuning`, by the same rule as ours."""
    from twotower.retrieval import tuning as tuner

    if not built.most:
        return 0
    problem = tuner.Problem(lambda q, k, effort, _: built.search(q, k, effort), len(vectors), built.most, False,
                            _TARGET.value, graph=built.graph)  # fmt: skip
    efforts, _, _ = tuner.tune(problem, vectors, tuning, _K.value)
    return efforts[0].leaves if efforts else None


def measure(built: Built, effort: int, held_out: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Recall, the best of five batches, and the median of single queries."""
    from twotower.retrieval.tuning import overlap

    k = truth.shape[1]
    batches = [_seconds(lambda: built.search(held_out, k, effort)) for _ in range(5)]
    singles = [_seconds(lambda q=q: built.search(q[None], k, effort)) for q in held_out[:500]]
    return {
        "recall": overlap(built.search(held_out, k, effort)[1], truth), "effort": effort,
        "queries_per_second": len(held_out) / min(batches), "single_ms": 1e3 * float(np.median(singles)),
        "build_s": built.seconds, "megabytes": built.size / 1e6,
    }  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def grid_best(index: Any, held_out: np.ndarray, truth: np.ndarray) -> str:
    """The fastest of a full grid of leaves and candidates that reaches the target, beside what the tuner chose."""
    from twotower.retrieval.tuning import CANDIDATES, overlap

    k, tuning, best = truth.shape[1], index.tuning, (0.0, 0, 0)
    for reorder in [k * times for times in CANDIDATES] if tuning.hashed else [0]:
        for leaves in sorted({max(1, round(tuning.num_leaves * 1.15**-step)) for step in range(60)}):
            seconds = min(_seconds(lambda: index.search_with(held_out, k, leaves, reorder)) for _ in range(2))  # noqa: B023
            if overlap(index.search_with(held_out, k, leaves, reorder)[1], truth) >= tuning.target_recall:
                best = max(best, (len(held_out) / seconds, leaves, reorder))
    return f"best of a full grid: {best[0]:,.0f} queries/s at {best[1]} leaves, {best[2]} candidates"


def main(argv: list[str]) -> None:
    import faiss

    from twotower.retrieval.exact import ExactIndex

    faiss.omp_set_num_threads(_THREADS.value)
    items = 10_000 if harness.QUICK.value else _ITEMS.value
    users, vectors = load(Path(_WORKDIR.value)) if _WORKDIR.value else draw(items, _DIM.value)
    tuning, held_out = users[::2], np.ascontiguousarray(users[1::2])
    truth = ExactIndex(vectors).search(held_out, _K.value)[1]
    cores = len(os.sched_getaffinity(0))
    print(f"{len(vectors):,} items of width {vectors.shape[1]}, k={_K.value}, target {_TARGET.value}, {cores} cores, "
          f"{_THREADS.value} threads, {len(held_out)} held-out users")  # fmt: skip
    print(f"{'':34}{'recall':>8}{'effort':>8}{'queries/s':>11}{'single ms':>11}{'build s':>9}{'MB':>8}")
    index, own = ours(tuning, vectors)
    results = {}
    for makes in (lambda _: [own], exact_peers, graph_peers, inverted_peers):
        for built in makes(vectors):
            effort = tuned(built, tuning, vectors)
            if effort is None:
                print(f"{built.name:34}does not reach the target")
                continue
            results[built.name] = row = measure(built, effort, held_out, truth)
            print(f"{built.name:34}{row['recall']:8.4f}{effort:8}{row['queries_per_second']:11,.0f}{row['single_ms']:11.4f}"
                  f"{row['build_s']:9.1f}{row['megabytes']:8.1f}", flush=True)  # fmt: skip
    if _GRID.value and getattr(index, "tuning", None) and index.tuning.efforts:
        print(grid_best(index, held_out, truth))
    harness.write_json("index", results, unit="queries_per_second", base=own.name)


if __name__ == "__main__":
    app.run(main)
