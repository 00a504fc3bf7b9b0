"""The tuned index against FAISS, hnswlib and exact search: queries per second at a recall, each
peer tuned as carefully.

    python -m experiments.benchmarks.index [--items=200000 --dim=64 --target_recall=.95 --k=10]
    [--workdir=RUN] [--quick]

Vectors are those of the bundle of --workdir (experiments/configs/large_catalogue.py learns many in
minutes), or drawn: a mixture of N / 150 clusters with a falling spectrum, users near items. Every
index is tuned on one half of the users and measured on the other: the fewest leaves, probes or
candidates whose recall, less 1.64 standard errors, reaches the target; peers for each of several
builds. Each peer takes turns with ours: "ours" says how many times ours is as fast, in batches and
for single queries.

One thread, and processor time, which a busy machine lengthens less; with --threads=2 both, and the
clock on the wall (twotower and JAX take the cores they are given: pin the process). Needs faiss-cpu
and hnswlib.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments.benchmarks import harness
from experiments.benchmarks.index_peers import Built, Peer, exact_peers, graph_peers, inverted_peers

_ITEMS = flags.DEFINE_integer("items", 200_000, "N of the drawn vectors.")
_DIM = flags.DEFINE_integer("dim", 64, "D of the drawn vectors.")
_WORKDIR = flags.DEFINE_string("workdir", "", "A run whose bundle's vectors are taken.")
_TARGET = flags.DEFINE_float("target_recall", 0.95, "The recall to reach.")
_K = flags.DEFINE_integer("k", 10, "Length of the lists.")
_THREADS = flags.DEFINE_integer("threads", 1, "Of every contestant.")
_PEERS = flags.DEFINE_list(
    "peers", [], "Only those whose names hold one of these: exact, hnswlib, HNSW, IVF."
)
_INDEX = flags.DEFINE_string("index", "auto", "Ours: config.retrieval.index.")
_GRID = flags.DEFINE_bool(
    "grid", False, "Also compare the tuner's choice with the best of a full grid."
)
USERS = 4_000
ROUNDS, SINGLES = 5, 200  # turns that contestants take; single queries in each


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
    vectors = unit(
        (centres[rng.integers(0, len(centres), items)] + 0.6 * rng.normal(size=(items, dim)))
        * spectrum
    )
    near = vectors[rng.integers(0, items, users)]
    return unit(near + 0.25 / np.sqrt(dim) * rng.normal(size=near.shape)), vectors


def load(workdir: Path, users: int = USERS) -> tuple[np.ndarray, np.ndarray]:
    """(users, items) of a bundle."""
    from twotower.core.arrays import evenly_spaced
    from twotower.retrieval.bundle import load_bundle

    bundle = load_bundle(workdir / "bundle")
    return np.asarray(evenly_spaced(bundle.user_vectors, users)), np.asarray(bundle.vectors)


def size_of(write: Callable[[Path], Any]) -> int:
    """Bytes of what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "index")
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def make_ours(users: np.ndarray, vectors: np.ndarray) -> tuple[Any, Built]:
    """The index as export builds it, for `users` to tune on."""
    from twotower.config import from_dict
    from twotower.index.build import build_index, save_index

    options = {"index": _INDEX.value, "target_recall": _TARGET.value, "k": _K.value}
    config = from_dict({"retrieval": options}).retrieval
    index = build_index(vectors, config, normalized=True, queries=users)
    return index, Built(
        lambda q, k, _: index.search(q, k), write=lambda path: save_index(index, path)
    )


def tuned(built: Built, tuning: np.ndarray, vectors: np.ndarray) -> int | None:
    """The least effort of a peer that reaches the target on `tuning`, by the same rule as ours."""
    from twotower.index import tuning as tuner

    if not built.most:
        return 0
    problem = tuner.TunableIndex(
        lambda q, k, effort, _: built.search(q, k, effort),
        len(vectors),
        built.most,
        False,
        _TARGET.value,
        is_graph=built.graph,
    )
    efforts, _, _ = tuner.tune(problem, vectors, tuning, _K.value)
    return efforts[0].leaves if efforts else None


class Speed(NamedTuple):
    """Seconds a query, in batches and alone; and the recall."""

    batch: float
    single: float
    recall: float


def measure(
    contestants: list[tuple[Built, int]], held_out: np.ndarray, truth: np.ndarray
) -> list[Speed]:
    """Measures each (index, effort), which take turns: the best round in batches, the median of
    single queries in the best round."""
    from twotower.index.recall import list_recall

    k = truth.shape[1]

    def spent(contestant: tuple[Built, int], queries: np.ndarray) -> float:
        built, effort = contestant
        return seconds(lambda: built.search(queries, k, effort))

    batches = np.zeros((len(contestants), ROUNDS))
    singles = np.zeros((len(contestants), ROUNDS))
    for turn in range(ROUNDS):
        some = held_out[(turn * SINGLES + np.arange(SINGLES)) % len(held_out)]
        for n, contestant in enumerate(contestants):
            batches[n, turn] = spent(contestant, held_out) / len(held_out)
            singles[n, turn] = np.median([spent(contestant, query[None]) for query in some])
    speeds = []
    for n, (built, effort) in enumerate(contestants):
        recall = list_recall(built.search(held_out, k, effort)[1], truth)
        speeds.append(Speed(float(batches[n].min()), float(singles[n].min()), recall))
    return speeds


def grid_best(
    index: Any, users: np.ndarray, vectors: np.ndarray, held_out: np.ndarray, truth: np.ndarray
) -> str:
    """Measures the time of tuning, and beside its choice the fastest of a full grid of leaves and
    candidates, by the tuner's own rule of what reaches the target."""
    from twotower.core.arrays import evenly_spaced
    from twotower.index import tuning as tuner
    from twotower.index.base import TUNING_QUERIES
    from twotower.index.exact import ExactIndex
    from twotower.index.recall import isin_lists

    k, tuning = truth.shape[1], index.tuning
    problem = tuner.TunableIndex(
        index.search_with, len(vectors), tuning.num_leaves, tuning.hashed, tuning.target_recall
    )
    spent = seconds(lambda: tuner.tune(problem, vectors, users, k))
    settings, asked = (
        [tuning.effort(k)],
        np.ascontiguousarray(evenly_spaced(users, TUNING_QUERIES)[::2]),
    )
    exact = ExactIndex(vectors).search(asked, k)[1]
    for reorder in [k * times for times in tuner.REORDER_FACTORS] if tuning.hashed else [0]:
        for leaves in sorted(
            {max(1, round(tuning.num_leaves * 1.1**-step)) for step in range(100)}
        ):
            found = isin_lists(exact, index.search_with(asked, k, leaves, reorder)[1]).mean(1)
            if (
                found.mean() - tuner.MARGIN_ERRORS * found.std() / math.sqrt(len(found))
                >= tuning.target_recall
            ):
                settings.append((leaves, reorder))
                break  # more leaves are slower
    speeds = measure(
        [(Built(lambda q, k, _, s=s: index.search_with(q, k, *s)), 0) for s in settings],
        held_out,
        truth,
    )
    text = [
        f"Tuning takes {spent:.1f} s and chose {settings[0]}, (leaves, candidates). "
        "Best of a full grid"
    ]
    for way in ("batch", "single"):
        best = min(range(len(settings)), key=lambda n: getattr(speeds[n], way))
        times = getattr(speeds[0], way) / getattr(speeds[best], way)
        text.append(
            f"{way}: {settings[best]}, to which the tuner's takes {times:.2f} times as long"
        )
    return "; ".join(text) + "."


def shown(
    name: str, speed: Speed, ours: Speed, effort: int, build: float, built: Built
) -> dict[str, float]:
    """One row, printed."""
    row = {
        "recall": speed.recall,
        "effort": effort,
        "queries_per_second": 1 / speed.batch,
        "ours_batch": speed.batch / ours.batch,
        "single_ms": 1e3 * speed.single,
        "ours_single": speed.single / ours.single,
        "build_s": build,
        "megabytes": size_of(built.write) / 1e6,
    }
    print(
        f"{name:36}{row['recall']:8.4f}{effort:8}"
        f"{row['queries_per_second']:11,.0f}{row['ours_batch']:6.2f}"
        f"{row['single_ms']:11.4f}{row['ours_single']:6.2f}{build:9.1f}{row['megabytes']:8.1f}",
        flush=True,
    )
    return row


def against(
    own: Built, peer: Peer, users: np.ndarray, vectors: np.ndarray, truth: np.ndarray
) -> dict[str, dict]:
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
    from twotower.index.exact import ExactIndex
    from twotower.index.graphs import import_library

    faiss = import_library("faiss")
    faiss.omp_set_num_threads(_THREADS.value)
    items = 10_000 if harness.QUICK.value else _ITEMS.value
    users, vectors = load(Path(_WORKDIR.value)) if _WORKDIR.value else draw(items, _DIM.value)
    held_out = np.ascontiguousarray(users[1::2])
    truth = ExactIndex(vectors).search(held_out, _K.value)[1]
    cores = len(os.sched_getaffinity(0))
    print(
        f"{len(vectors):,} items of width {vectors.shape[1]}, k={_K.value}, "
        f"target {_TARGET.value}, {cores} cores, {_THREADS.value} threads, "
        f"{len(held_out)} held-out users"
    )
    print(
        f"{'':36}{'recall':>8}{'effort':>8}{'queries/s':>11}{'ours':>6}"
        f"{'single ms':>11}{'ours':>6}{'build s':>9}{'MB':>8}"
    )
    start = now()
    index, own = make_ours(users[::2], vectors)
    build, (speed,) = now() - start, measure([(own, 0)], held_out, truth)
    name, efforts = (
        f"twotower ({index.kind})",
        getattr(getattr(index, "tuning", None), "efforts", ()),
    )
    results = {name: shown(name, speed, speed, efforts[0].leaves if efforts else 0, build, own)}
    if _GRID.value and efforts:
        print(grid_best(index, users[::2], vectors, held_out, truth), flush=True)
    quick = harness.QUICK.value
    graphs = graph_peers(vectors, (16,) if quick else (16, 32), _THREADS.value)
    for peer in (
        *exact_peers(vectors),
        *graphs,
        *inverted_peers(vectors, (1,) if quick else (2, 4, 8)),
    ):
        if not _PEERS.value or any(text in peer[0] for text in _PEERS.value):
            results |= against(own, peer, users, vectors, truth)
    harness.write_json("index", results, unit="queries_per_second", base=name)


if __name__ == "__main__":
    app.run(main)
