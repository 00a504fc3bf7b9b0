"""The time of one request in process, and of an upsert: 200,000 items of width 64.

    taskset -c 0 python -m experiments.benchmarks.request [--bundle=FOLDER] [--quick] [--check]

The bundle is that of `experiments.benchmarks.bundle`: its user tower reads the id, the city, the
gender and a bag of the last 100 events; ids of all items and users are known; a user has 40 seen
items, and a list shows four columns. Histories are drawn as often as items occur in the log. The
questions take turns, a few calls each, so that a busy machine slows all alike; times are of this
thread on the processor. --check holds the least share of the time of a request that bare search of
ten items takes.

An upsert is timed by the clock, because it waits for the disk: alone, beside six threads that ask
for lists, and alone without syncs, which is what is ours of it.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import bundle, floors, harness

_BUNDLE = flags.DEFINE_string("bundle", "", "Folder of the bundle, made if it is not there.")
ITEMS = 200_000
ROUNDS = 40
CALLS = 25  # calls of one question in a round
UPSERTS = 100
READERS = 6
SEARCH = "the index alone"
# Least share of a request's median time that the index alone takes.
FLOORS = {
    "a known user": 0.15,
    "a known user, k=100": 0.04,
    "similar items": 0.15,
    "an unknown user": 0.05,
    "features": 0.05,
    "a history of 5": 0.035,
    "a history of 50": 0.025,
    "a history of 500": 0.01,
}


def questions(retriever: Any) -> dict[str, Callable[[int], Any]]:
    """Returns the requests by name: call of a number from 0 on."""
    loaded = retriever.bundle
    rng = np.random.default_rng(1)
    rows = rng.permutation(len(loaded.users))
    users = loaded.users["user_id"].to_pylist()
    users = [users[row] for row in rows]
    vectors = np.ascontiguousarray(loaded.user_vectors[rows])
    items = loaded.items["item_id"].to_pylist()
    chances = np.maximum(loaded.counts, 1) / np.maximum(loaded.counts, 1).sum()
    histories = {}
    for length in (5, 50, 500):
        drawn = rng.choice(len(items), (200, length), p=chances)
        histories[length] = [[items[item] for item in history] for history in drawn.tolist()]

    def ask(make: Callable[[int], dict[str, Any]]) -> Callable[[int], Any]:
        return lambda n: retriever.recommend(rows=[make(n)])

    def with_history(length: int) -> Callable[[int], Any]:
        lists = histories[length]
        return ask(lambda n: {"age_group": "25-34", "history": lists[n % len(lists)]})

    return {
        SEARCH: lambda n: loaded.index.search(vectors[n : n + 1], 10),
        "a known user": lambda n: retriever.recommend(users[n]),
        "a known user, k=100": lambda n: retriever.recommend(users[n], k=100),
        "similar items": lambda n: retriever.similar_items(items[n]),
        "an unknown user": lambda n: retriever.recommend(f"nobody-{n}"),
        "features": ask(
            lambda n: {"user_id": f"new-{n}", "age_group": "25-34", "gender": "female"}
        ),
        **{f"a history of {length}": with_history(length) for length in histories},
    }


def answering(retriever: Any) -> dict[str, list[float]]:
    """Returns the milliseconds of each call by question."""
    calls = questions(retriever)
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = ROUNDS // 8 if harness.QUICK.value else ROUNDS
    for number in range(rounds + 1):
        for name, call in calls.items():
            measured = []
            for turn in range(CALLS):
                start = time.thread_time()
                call(number * CALLS + turn)
                measured.append(1e3 * (time.thread_time() - start))
            # The first round compiles.
            if number:
                times[name] += measured
    return times


def changing(retriever: Any) -> dict[str, list[float]]:
    """Returns the milliseconds of each upsert by the clock."""
    times = {"an upsert": _upserts(retriever, "a")}
    stop = threading.Event()

    def read(first: int) -> None:
        users = list(retriever.user_rows.row_by_id)
        while not stop.is_set():
            retriever.recommend(users[first % len(users)])
            first += 7

    readers = [threading.Thread(target=read, args=(first,)) for first in range(READERS)]
    for reader in readers:
        reader.start()
    times[f"an upsert beside {READERS} readers"] = _upserts(retriever, "b")
    stop.set()
    for reader in readers:
        reader.join()
    # What is left without the disk.
    retriever._live._log._open().execute("PRAGMA synchronous=OFF")
    times["an upsert without syncs"] = _upserts(retriever, "c")
    return times


def _upserts(retriever: Any, name: str) -> list[float]:
    measured = []
    for number in range(UPSERTS // 4 if harness.QUICK.value else UPSERTS):
        start = time.perf_counter()
        retriever.upsert([{"item_id": f"{name}-{number}", "title": "A new lamp", "price": 3.0}])
        measured.append(1e3 * (time.perf_counter() - start))
    return measured


def percentiles(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Prints and returns p50, p99 and the slowest of each kind of call."""
    found = {}
    for name, values in times.items():
        found[name] = {
            "p50": float(np.percentile(values, 50)),
            "p99": float(np.percentile(values, 99)),
            "slowest": max(values),
        }
        shown = "".join(f"{value:10.3f}" for value in found[name].values())
        print(f"{name:32}{shown}", flush=True)
    return found


def main(argv: list[str]) -> None:
    from twotower.retrieval.retriever import Retriever

    logging.set_verbosity(logging.ERROR)
    items = ITEMS // 10 if harness.QUICK.value else ITEMS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_BUNDLE.value or temporary) / f"items-{items}"
        if not (folder / "manifest.json").exists():
            bundle.make(folder, items)
        # A copy: upserts would stay with the bundle.
        copy = Path(temporary) / "copy"
        shutil.copytree(folder, copy)
        start = time.perf_counter()
        retriever = Retriever.load(copy)
        loaded = time.perf_counter() - start
        print(f"loaded in {loaded:.2f} s; {retriever.warm()}")
        print(f"{items:,} items, milliseconds{'p50':>10}{'p99':>10}{'slowest':>10}")
        answers = percentiles(answering(retriever))
        changes = percentiles(changing(retriever))
    harness.write_json("request", {**answers, **changes}, unit="milliseconds", base=SEARCH)
    shares = {name: answers[SEARCH]["p50"] / row["p50"] for name, row in answers.items()}
    floors.check(shares, FLOORS)


if __name__ == "__main__":
    app.run(main)
