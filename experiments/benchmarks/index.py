"""The tuned index against FAISS, hnswlib and exact search: queries per second at a recall, each
peer tuned as carefully.

    python -m experiments.benchmarks.index [--items=200000 --dim=64 --target_recall=.95 --k=10]
    [--vectors=easy|hard | --workdir=RUN] [--built=FOLDER] [--quick] [--json=FILE] [--check]

Vectors are those of the bundle of --workdir (experiments/configs/large_catalogue.py learns many in
minutes), or drawn: a mixture of N / 150 clusters with a falling spectrum, users near items; of hard
ones the clusters are twice as wide, and users twice as far from items. Every index is tuned on one
half of the users and measured on the other: the fewest leaves, probes or candidates whose recall,
less 1.64 standard errors, reaches the target; peers for each of several builds. Ours is what each
of "auto" (default) and "fastest" (tuned) takes for queries and for batches. Each peer takes turns
with all of ours, which are measured on their own use; "to ours" is the peer's time to theirs.
--check fails where ours is behind the best peer by more than a floor allows.

One thread, and processor time, which a busy machine lengthens less; with --threads=2 both, and the
clock on the wall (twotower and JAX take the cores they are given: pin the process). Needs
faiss-cpu; hnswlib is left out where it is missing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments.benchmarks import floors, harness
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
_VECTORS = flags.DEFINE_enum("vectors", "easy", ["easy", "hard"], "Kind of the drawn vectors.")
_BUILT = flags.DEFINE_string(
    "built", "", "Folder that keeps ours, so that another target needs no other builds."
)
_GRID = flags.DEFINE_bool(
    "grid", False, "Also compare the tuner's choice with the best of a full grid."
)
# Distance of the items of a cluster from its centre, and of users from items.
NOISE = {"easy": (0.6, 0.25), "hard": (1.2, 0.5)}
# Ours: values of config.retrieval.index, and the uses that each is optimised for.
KINDS = ("auto", "fastest")
USES = ("queries", "batches")
# Least ratios of the best peer's time to ours. "fastest" takes the best of ScaNN's and FAISS's
# builds, which is never behind but for what two turns of one index differ by.
FLOORS = {
    "auto, queries": 0.7,
    "auto, batches": 0.9,
    "fastest, queries": 0.9,
    "fastest, batches": 0.9,
}
USERS = 4_000
ROUNDS, SINGLES = 5, 200  # turns that contestants take; single queries in each


def now() -> float:
    """Seconds: of this process's processor time where it has one thread, else of the clock."""
    return time.process_time() if _THREADS.value == 1 else time.perf_counter()


def seconds(call: Callable[[], Any]) -> float:
    start = now()
    call()
    return now() - start


def draw(
    items: int, dim: int, users: int = USERS, kind: str = "easy"
) -> tuple[np.ndarray, np.ndarray]:
    """(users, items), unit vectors; see the head of this file."""
    noise, distance = NOISE[kind]
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    spectrum = np.arange(1, dim + 1) ** -0.5
    centres = rng.normal(size=(max(items // 150, 8), dim))
    vectors = unit(
        (centres[rng.integers(0, len(centres), items)] + noise * rng.normal(size=(items, dim)))
        * spectrum
    )
    near = vectors[rng.integers(0, items, users)]
    return unit(near + distance / np.sqrt(dim) * rng.normal(size=near.shape)), vectors


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


class Ours(NamedTuple):
    """One of ours.

    Attributes:
        index: Index that was taken.
        built: The same as a contestant.
        build_s: Seconds of all builds that were compared, with their tuning.
    """

    index: Any
    built: Built
    build_s: float


def make_ours(users: np.ndarray, vectors: np.ndarray) -> dict[str, Ours]:
    """The index that export would take for each kind and use, for `users` to tune on.

    Each build is made once, for all.
    """
    from twotower.config import from_dict
    from twotower.index.base import Build
    from twotower.index.build import MIN_GAINS, build_index, builds_to_compare, save_index
    from twotower.index.comparison import fastest_index

    made: dict[Build, tuple[Any, float]] = {}
    ours: dict[str, Ours] = {}
    for kind in KINDS:
        options = {"index": kind, "target_recall": _TARGET.value, "k": _K.value}
        config = from_dict({"retrieval": options}).retrieval

        def make(build: Build, sample: np.ndarray, config: Any = config) -> Any:
            if build not in made:
                start = now()
                index = build_one(build, sample, config, users)
                made[build] = (index, now() - start)
            return made[build][0]

        builds = builds_to_compare(config, *vectors.shape, normalized=True)
        for use in USES:
            if len(builds) == 1:
                index = build_index(vectors, config, normalized=True, queries=users)
            else:
                index = fastest_index(
                    builds,
                    make,
                    vectors,
                    users,
                    _K.value,
                    optimize_for=use,
                    min_gain=MIN_GAINS[kind],
                )
            built = Built(
                lambda q, k, _, index=index: index.search(q, k),
                write=lambda path, index=index: save_index(index, path),
            )
            spent = sum(made[build][1] for build in builds if build in made)
            ours[f"{kind}, {use}"] = Ours(index, built, spent)
    return ours


def build_one(build: Any, vectors: np.ndarray, config: Any, users: np.ndarray) -> Any:
    """Builds one index and tunes it, or tunes anew what --built keeps."""
    from twotower.index.build import LIBRARIES, load_index, save_index

    folder = Path(_BUILT.value) / f"{build.kind}-{build.leaves_per_root}"
    if _BUILT.value and (folder / "index.json").exists():
        index: Any = load_index(folder, vectors)
        index.set_tuning(dataclasses.replace(index.tuning, target_recall=_TARGET.value))
        if not index.find_efforts(vectors, users, _K.value, None):
            raise SystemExit(f"{folder} does not reach the target; give no --built.")
        return index
    index = LIBRARIES[build.kind].build(
        vectors,
        config,
        kind=build.kind,
        queries=users,
        normalized=True,
        leaves_per_root=build.leaves_per_root,
    )
    if _BUILT.value:
        save_index(index, folder)
    return index


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


def show(
    name: str, recall: float, effort: int, speed: Speed, build: float, built: Built
) -> dict[str, float]:
    """Prints one row, and returns it."""
    row = {
        "recall": recall,
        "effort": effort,
        "queries_per_second": 1 / speed.batch,
        "single_ms": 1e3 * speed.single,
        "build_s": build,
        "megabytes": size_of(built.write) / 1e6,
    }
    print(
        f"{name:36}{recall:8.4f}{effort:8}{row['queries_per_second']:11,.0f}"
        f"{row['single_ms']:11.4f}{build:9.1f}{row['megabytes']:8.1f}",
        flush=True,
    )
    return row


def show_ours(
    ours: dict[str, Ours], held_out: np.ndarray, truth: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Measures all of ours, and prints a row for each."""
    speeds = measure([(each.built, 0) for each in ours.values()], held_out, truth)
    rows: dict[str, dict[str, Any]] = {}
    for (name, each), speed in zip(ours.items(), speeds):
        tuning = getattr(each.index, "tuning", None)
        effort = tuning.efforts[0].leaves if tuning and tuning.efforts else 0
        leaves = tuning.num_leaves if tuning else 0
        label = f"{name}: {each.index.kind} {leaves}"
        rows[name] = show(label, speed.recall, effort, speed, each.build_s, each.built)
        rows[name]["kind"] = each.index.kind
        rows[name]["leaves"] = leaves
    return rows


def against(
    ours: dict[str, Ours],
    peer: Peer,
    users: np.ndarray,
    vectors: np.ndarray,
    truth: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """The rows of a peer in all its ways, each tuned and measured in turns with ours."""
    name, make = peer
    start = now()
    try:
        ways = make()
    except ImportError as error:
        print(f"{name:36}left out: {error}", flush=True)
        return {}
    build = now() - start
    held_out = np.ascontiguousarray(users[1::2])
    rows: dict[str, dict[str, Any]] = {}
    for way, other in ways.items():
        effort = tuned(other, users[::2], vectors)
        if effort is None:
            print(f"{name + way:36}does not reach the target; built in {build:.1f} s", flush=True)
            continue
        # Several of ours may be one index, which needs one turn.
        own = {id(each.index): each.built for each in ours.values()}
        turns = [(built, 0) for built in own.values()]
        *speeds, theirs = measure([*turns, (other, effort)], held_out, truth)
        speed_of = dict(zip(own, speeds, strict=True))
        row: dict[str, Any] = show(name + way, theirs.recall, effort, theirs, build, other)
        row["to_ours"] = {
            mine: ratio(mine, theirs, speed_of[id(each.index)]) for mine, each in ours.items()
        }
        ratios = ", ".join(f"{mine} {times:.2f}" for mine, times in row["to_ours"].items())
        print(f"{'':8}to ours: {ratios}", flush=True)
        rows[name + way] = row
    return rows


def ratio(name: str, theirs: Speed, ours: Speed) -> float:
    """A peer's time to ours, in the use that ours is for."""
    if name.endswith("batches"):
        return theirs.batch / ours.batch
    return theirs.single / ours.single


def main(argv: list[str]) -> None:
    from twotower.index.exact import ExactIndex
    from twotower.index.graphs import import_library

    faiss = import_library("faiss")
    faiss.omp_set_num_threads(_THREADS.value)
    quick = harness.QUICK.value
    # Trees are built from 50,000 items of 64 numbers on.
    items = 50_000 if quick else _ITEMS.value
    if _WORKDIR.value:
        users, vectors = load(Path(_WORKDIR.value))
    else:
        users, vectors = draw(items, _DIM.value, kind=_VECTORS.value)
    tuning = np.ascontiguousarray(users[::2])
    held_out = np.ascontiguousarray(users[1::2])
    truth = ExactIndex(vectors).search(held_out, _K.value)[1]
    cores = len(os.sched_getaffinity(0))
    kind = "learned" if _WORKDIR.value else _VECTORS.value
    print(
        f"{len(vectors):,} {kind} items of width {vectors.shape[1]}, k={_K.value}, "
        f"target {_TARGET.value}, {cores} cores, {_THREADS.value} threads, "
        f"{len(held_out)} held-out users"
    )
    print(
        f"{'':36}{'recall':>8}{'effort':>8}{'queries/s':>11}{'single ms':>11}"
        f"{'build s':>9}{'MB':>8}"
    )
    ours = make_ours(tuning, vectors)
    results = show_ours(ours, held_out, truth)
    default = ours["auto, queries"].index
    if _GRID.value and getattr(default, "tuning", None):
        print(grid_best(default, tuning, vectors, held_out, truth), flush=True)
    peers = [
        *exact_peers(vectors),
        *graph_peers(vectors, (16,) if quick else (16, 32), _THREADS.value),
        *inverted_peers(vectors, (4,) if quick else (2, 4, 8)),
    ]
    best = {name: math.inf for name in ours}
    for peer in peers:
        if _PEERS.value and not any(text in peer[0] for text in _PEERS.value):
            continue
        rows = against(ours, peer, users, vectors, truth)
        for row in rows.values():
            best = {name: min(times, row["to_ours"][name]) for name, times in best.items()}
        results |= rows
    print("Best peer's time to ours: " + ", ".join(f"{n} {x:.2f}" for n, x in best.items()))
    results["best peer to ours"] = best
    harness.write_json(f"index, {kind}", results, unit="queries_per_second", base="auto, queries")
    floors.check(best, FLOORS)


if __name__ == "__main__":
    app.run(main)
