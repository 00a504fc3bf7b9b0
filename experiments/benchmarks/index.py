"""The tuned index against FAISS, hnswlib and exact search: queries per second at a recall, each peer tuned as carefully.

    python -m experiments.benchmarks.index [--items=200000 --dim=64 --target_recall=.95 --k=10] [--workdir=RUN] [--quick]

Vectors are those of the bundle of --workdir (experiments/configs/large_catalogue.py learns many in minutes), or drawn: a mixture
of N / 150 clusters with a falling spectrum, users near items. Every index is tuned on one half of the users and measured on the
other: the fewest leaves, probes or candidates whose recall, less 1.64 standard errors, reaches the target; peers for each of
several builds. Each peer takes turns with ours: "ours" says how many times ours is as fast, in batches and for single queries.

One thread, and processor time, which a busy machine lengthens less; with --threads=2 both, and the clock on the wall (twotower
and JAX take the cores they are given: pin the process). Needs faiss-cpu and hnswlib.
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
_PEERS = flags.DEFINE_list("peers", [], "Only those whose names hold one of these: exact, hnswlib, HNSW, IVF.")
_INDEX = flags.DEFINE_string("index", "auto", "Ours: config.retrieval.index.")
_GRID = flags.DEFINE_bool("grid", False, "Also compare the tuner's choice with the best of a full grid.")
USERS = 4_000
ROUNDS, SINGLES = 5, 200  # turns that contestants take; single queries in each

# (queries, k, effort) -> (scores, rows)
Search = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


class Built(NamedTuple):
    """An index that can be asked.

    Attributes:
        most: the greatest effort; 0 where there is none to choose.
        graph: the effort is at least k.
        write: (path) writes it; its size counts.
    """

    search: Search
    most: int = 0
    graph: bool = False
    write: Callable[[Path], Any] = lambda path: None


# A peer: its name, and what builds it; with what more its name says where one build is asked in several ways.
Peer = tuple[str, Callable[[], dict[str, Built]]]


def now() -> float:
    """Seconds: of this process's processor time where it has one thread, else of the clock."""
    return time.process_time() if _THREADS.value == 1 else time.perf_counter()


def seconds(call: Callable[[], Any]) -> float:
    start = now()
    call()
    return now() - start


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


def exact_peers(vectors: np.ndarray) -> Iterator[Peer]:
    """JAX, NumPy and FAISS, comparing all."""
    import faiss

    from twotower.retrieval.exact import ExactIndex
    from twotower.retrieval.search import exact_among

    def flat() -> dict[str, Built]:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return {"": Built(lambda q, k, _: index.search(q, k))}

    def jax() -> dict[str, Built]:
        index = ExactIndex(vectors)
        return {"": Built(lambda q, k, _: index.search(q, k))}

    yield "exact, JAX (ours)", jax
    yield "exact, NumPy (ours)", lambda: {"": Built(lambda q, k, _: exact_among(vectors, None, q, k))}
    yield "exact, FAISS flat", flat


def graph_peers(vectors: np.ndarray) -> Iterator[Peer]:
    """HNSW of two widths by two libraries."""
    for links in (16,) if harness.QUICK.value else (16, 32):
        yield f"hnswlib M={links}", lambda links=links: _hnswlib(vectors, links)
        yield f"FAISS HNSW{links}", lambda links=links: _faiss_hnsw(vectors, links)


def _hnswlib(vectors: np.ndarray, links: int) -> dict[str, Built]:
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(max_elements=len(vectors), M=links, ef_construction=200, random_seed=0)
    graph.add_items(vectors, num_threads=_THREADS.value)

    def ask(queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        graph.set_ef(max(ef, k))
        rows, distances = graph.knn_query(queries, k=k, num_threads=_THREADS.value)
        return 1.0 - distances, rows.astype(np.int64)

    return {"": Built(ask, 4_096, True, lambda path: graph.save_index(str(path)))}


def _faiss_hnsw(vectors: np.ndarray, links: int) -> dict[str, Built]:
    import faiss

    hnsw = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 200
    hnsw.add(vectors)

    def search(queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        return hnsw.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=max(ef, k)))

    return {"": Built(search, 4_096, True, lambda path: faiss.write_index(hnsw, str(path)))}


def inverted_peers(vectors: np.ndarray) -> Iterator[Peer]:
    """FAISS inverted files over whole vectors, and over 4-bit product codes with the best scored anew."""
    root, codes = math.sqrt(len(vectors)), f"PQ{vectors.shape[1] // 2}x4fs,RFlat"
    for lists in (round(times * root) for times in ((1,) if harness.QUICK.value else (2, 4, 8))):
        for kind in ("Flat", codes):
            yield f"FAISS IVF{lists},{kind}", lambda lists=lists, kind=kind: _inverted(vectors, lists, kind)


def _inverted(vectors: np.ndarray, lists: int, kind: str) -> dict[str, Built]:
    import faiss

    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},{kind}", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)

    def search(queries: np.ndarray, k: int, probes: int, again: int = 0) -> tuple[np.ndarray, np.ndarray]:
        params = faiss.SearchParametersIVF(nprobe=probes)
        if again:
            params = faiss.IndexRefineSearchParameters(k_factor=again, base_index_params=params)
        return index.search(queries, k, params=params)

    def ways(again: int) -> Built:
        return Built(lambda *asked: search(*asked, again), lists, False, lambda path: faiss.write_index(index, str(path)))

    return {"": ways(0)} if kind == "Flat" else {f" x{again}": ways(again) for again in (4, 16, 32)}


def size_of(write: Callable[[Path], Any]) -> int:
    """Bytes of what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "index")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def make_ours(users: np.ndarray, vectors: np.ndarray) -> tuple[Any, Built]:
    """The index as export builds it, for `users` to tune on."""
    from twotower.config import RetrievalConfig
    from twotower.retrieval.scann import build_index, save_index

    config = RetrievalConfig(index=_INDEX.value, target_recall=_TARGET.value, k=_K.value)
    index = build_index(vectors, config, normalized=True, queries=users)
    return index, Built(lambda q, k, _: index.search(q, k), write=lambda path: save_index(index, path))


def tuned(built: Built, tuning: np.ndarray, vectors: np.ndarray) -> int | None:
    """The least effort of a peer that reaches the target on `tuning`, by the same rule as ours."""
    from twotower.retrieval import tuning as tuner

    if not built.most:
        return 0
    problem = tuner.Problem(lambda q, k, effort, _: built.search(q, k, effort), len(vectors), built.most, False,
                            _TARGET.value, graph=built.graph)  # fmt: skip
    efforts, _, _ = tuner.tune(problem, vectors, tuning, _K.value)
    return efforts[0].leaves if efforts else None


class Speed(NamedTuple):
    """Seconds a query, in batches and alone; and the recall."""

    batch: float
    single: float
    recall: float


def measure(contestants: list[tuple[Built, int]], held_out: np.ndarray, truth: np.ndarray) -> list[Speed]:
    """Of each (index, effort), which take turns: the best round in batches, the median of single queries in the best round."""
    from twotower.retrieval.tuning import overlap

    k, count = truth.shape[1], len(contestants)
    batches, singles = ([[] for _ in range(count)] for _ in range(2))
    for turn in range(ROUNDS):
        some = held_out[(turn * SINGLES + np.arange(SINGLES)) % len(held_out)]
        for n, (built, effort) in enumerate(contestants):
            batches[n].append(seconds(lambda: built.search(held_out, k, effort)) / len(held_out))  # noqa: B023
            singles[n].append(np.median([seconds(lambda q=q: built.search(q[None], k, effort)) for q in some]))  # noqa: B023
    found = [overlap(built.search(held_out, k, effort)[1], truth) for built, effort in contestants]
    return [Speed(min(batches[n]), float(min(singles[n])), found[n]) for n in range(count)]


def grid_best(index: Any, users: np.ndarray, vectors: np.ndarray, held_out: np.ndarray, truth: np.ndarray) -> str:
    """What tuning takes, and the fastest of a full grid of leaves and candidates that reaches the target beside its choice."""
    from twotower.retrieval import tuning as tuner

    k, tuning = truth.shape[1], index.tuning
    problem = tuner.Problem(index.search_with, len(vectors), tuning.num_leaves, tuning.hashed, tuning.target_recall)
    spent = seconds(lambda: tuner.tune(problem, vectors, users, k))
    settings = [tuning.effort(k)]
    for reorder in [k * times for times in tuner.CANDIDATES] if tuning.hashed else [0]:
        for leaves in sorted({max(1, round(tuning.num_leaves * 1.1**-step)) for step in range(100)}):
            if tuner.overlap(index.search_with(held_out, k, leaves, reorder)[1], truth) >= tuning.target_recall:
                settings.append((leaves, reorder))
                break  # more leaves are slower
    speeds = measure([(Built(lambda q, k, _, s=s: index.search_with(q, k, *s)), 0) for s in settings], held_out, truth)
    text = [f"Tuning takes {spent:.1f} s and chose {settings[0]}, (leaves, candidates). Best of a full grid"]
    for way in ("batch", "single"):
        best = min(range(len(settings)), key=lambda n: getattr(speeds[n], way))
        times = getattr(speeds[0], way) / getattr(speeds[best], way)
        text.append(f"{way}: {settings[best]}, to which the tuner's takes {times:.2f} times as long")
    return "; ".join(text) + "."


def shown(name: str, speed: Speed, ours: Speed, effort: int, build: float, built: Built) -> dict[str, float]:
    """One row, printed."""
    row = {
        "recall": speed.recall, "effort": effort, "queries_per_second": 1 / speed.batch, "ours_batch": speed.batch / ours.batch,
        "single_ms": 1e3 * speed.single, "ours_single": speed.single / ours.single, "build_s": build,
        "megabytes": size_of(built.write) / 1e6,
    }  # fmt: skip
    print(f"{name:36}{row['recall']:8.4f}{effort:8}{row['queries_per_second']:11,.0f}{row['ours_batch']:6.2f}"
          f"{row['single_ms']:11.4f}{row['ours_single']:6.2f}{build:9.1f}{row['megabytes']:8.1f}", flush=True)  # fmt: skip
    return row


def against(own: Built, peer: Peer, users: np.ndarray, vectors: np.ndarray, truth: np.ndarray) -> dict[str, dict]:
    """The rows of a peer in all its ways, each tuned and measured in turns with ours."""
    name, make = peer
    start, rows = now(), {}
    ways = make()
    build, held_out = now() - start, np.ascontiguousarray(users[1::2])
    for way, other in ways.items():
        effort = tuned(other, users[::2], vectors)
        if effort is None:
            print(f"{name + way:36}does not reach the target; built in {build:.1f} s", flush=True)
            continue
        ours, theirs = measure([(own, 0), (other, effort)], held_out, truth)
        rows[name + way] = shown(name + way, theirs, ours, effort, build, other)
    return rows


def main(argv: list[str]) -> None:
    import faiss

    from twotower.retrieval.exact import ExactIndex

    faiss.omp_set_num_threads(_THREADS.value)
    items = 10_000 if harness.QUICK.value else _ITEMS.value
    users, vectors = load(Path(_WORKDIR.value)) if _WORKDIR.value else draw(items, _DIM.value)
    held_out = np.ascontiguousarray(users[1::2])
    truth = ExactIndex(vectors).search(held_out, _K.value)[1]
    print(f"{len(vectors):,} items of width {vectors.shape[1]}, k={_K.value}, target {_TARGET.value}, "
          f"{len(os.sched_getaffinity(0))} cores, {_THREADS.value} threads, {len(held_out)} held-out users")  # fmt: skip
    print(f"{'':36}{'recall':>8}{'effort':>8}{'queries/s':>11}{'ours':>6}{'single ms':>11}{'ours':>6}{'build s':>9}{'MB':>8}")
    start = now()
    index, own = make_ours(users[::2], vectors)
    build, (speed,) = now() - start, measure([(own, 0)], held_out, truth)
    name, efforts = f"twotower ({index.kind})", getattr(getattr(index, "tuning", None), "efforts", ())
    results = {name: shown(name, speed, speed, efforts[0].leaves if efforts else 0, build, own)}
    if _GRID.value and efforts:
        print(grid_best(index, users[::2], vectors, held_out, truth), flush=True)
    for peers in (exact_peers, graph_peers, inverted_peers):
        for peer in peers(vectors):
            if not _PEERS.value or any(text in peer[0] for text in _PEERS.value):
                results |= against(own, peer, users, vectors, truth)
    harness.write_json("index", results, unit="queries_per_second", base=name)


if __name__ == "__main__":
    app.run(main)
