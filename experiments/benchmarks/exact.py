"""Exact search of whole lists for all users: twotower against FAISS's flat index and NumPy, in one
process and on the same cores.

    taskset -c 0 python -m experiments.benchmarks.exact [--workdir=RUN | --list_items=38048
    --dim=64] [--list_k=20,100] [--quick] [--json=FILE] [--check]

Vectors are those of the bundle of --workdir, or drawn as in `experiments.benchmarks.index`, of the
size of Yelp2018. The lists are compared first: they may differ only where two scores are within
rounding. The contestants take turns, and times are of the processor, not of the clock, so that
other work on the machine is not counted. Ours has no options: its default is the tuned one. FAISS
also takes shorter blocks of queries. --check fails where ours falls under a floor to FAISS.
Needs faiss-cpu.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.benchmarks import floors, harness
from experiments.benchmarks.index import draw, load

_ITEMS = flags.DEFINE_integer("list_items", 38_048, "N of the drawn vectors.")
_USERS = flags.DEFINE_integer("list_users", 31_668, "Q, the users whose lists are made.")
_K = flags.DEFINE_list("list_k", ["20", "100"], "Lengths of the lists.")
ROUNDS = 3
BLOCK = 256  # queries that NumPy takes at once
# Queries and items that FAISS multiplies at once: its defaults, and the best of a few others.
FAISS_BLOCKS = (4_096, 1_024)
FAISS_TUNED_BLOCKS = (256, 1_024)
# Least ratios of the faster FAISS's time to ours.
FLOORS = {"k=20": 1.0, "k=100": 1.0}


def contestants(
    vectors: np.ndarray,
) -> dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]]:
    """name -> (queries, k) -> (scores, rows)"""
    from twotower.index.exact import ExactIndex
    from twotower.index.graphs import import_library

    faiss = import_library("faiss")
    faiss.omp_set_num_threads(flags.FLAGS.threads)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)

    def in_blocks(
        blocks: tuple[int, int],
    ) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
        def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            # Of the process, so it is set before each search.
            faiss.cvar.distance_compute_blas_query_bs = blocks[0]
            faiss.cvar.distance_compute_blas_database_bs = blocks[1]
            return flat.search(queries, k)

        return search

    return {
        "twotower": ExactIndex(vectors).search,
        "FAISS IndexFlatIP": in_blocks(FAISS_BLOCKS),
        "FAISS IndexFlatIP, tuned": in_blocks(FAISS_TUNED_BLOCKS),
        "NumPy argpartition": lambda queries, k: partitioned(queries, vectors, k),
    }


def partitioned(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The usual way with NumPy: all scores, the best K by `argpartition`, and those sorted."""
    best_scores = []
    best_rows = []
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ vectors.T
        rows = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
        best = np.take_along_axis(scores, rows, axis=1)
        order = np.argsort(-best, axis=1)
        best_scores.append(np.take_along_axis(best, order, axis=1))
        best_rows.append(np.take_along_axis(rows, order, axis=1))
    return np.concatenate(best_scores), np.concatenate(best_rows)


def check(
    found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], name: str
) -> float:
    """The share of places with the same item; refuses lists whose scores differ by more than
    rounding."""
    worst = float(np.abs(found[0] - expected[0]).max())
    if worst > 1e-5:
        raise SystemExit(f"{name}: scores of the lists differ from FAISS's by up to {worst:.1e}.")
    return float((found[1] == expected[1]).mean())


def main(argv: list[str]) -> None:
    workdir, count = flags.FLAGS.workdir, 4_096 if harness.QUICK.value else _USERS.value
    users, vectors = (
        load(Path(workdir), count) if workdir else draw(_ITEMS.value, flags.FLAGS.dim, count)
    )
    width, threads = vectors.shape[1], flags.FLAGS.threads
    print(f"{len(users):,} users, {len(vectors):,} items of width {width}, {threads} threads")
    searches, results = contestants(vectors), {}
    for k in map(int, _K.value):
        expected = searches["FAISS IndexFlatIP"](users, k)
        same = {name: check(search(users, k), expected, name) for name, search in searches.items()}
        print(
            f"K = {k}: places with FAISS's item: "
            + ", ".join(f"{name} {x:.4%}" for name, x in same.items())
        )
        runs = {
            name: lambda search=search, k=k: search(users, k) for name, search in searches.items()
        }
        times = harness.alternate(runs, rounds=ROUNDS, repeats=1, clock=time.process_time)
        results[f"k={k}"] = harness.table(
            f"all lists of {k}", times, unit="milliseconds", base="FAISS IndexFlatIP"
        )
    figures = {
        k: min(rows[name]["best"] for name in rows if "FAISS" in name) / rows["twotower"]["best"]
        for k, rows in results.items()
    }
    print("The faster FAISS to ours: " + ", ".join(f"{k} {x:.2f}" for k, x in figures.items()))
    harness.write_json("exact", results, unit="milliseconds", base="FAISS IndexFlatIP")
    floors.check(figures, FLOORS)


if __name__ == "__main__":
    app.run(main)
