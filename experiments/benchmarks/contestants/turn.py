"""The process of a contestant: builds its program, then runs it as often as each
line of its input says."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

WIDTH = 64
# The sizes of MovieLens-100K, and of the model.
USERS, ITEMS, INTERACTIONS = 943, 1_682, 80_000
BATCHES = 64
FILMS = 3_416  # of MovieLens-1M, as papers have it
EXPANSION = 4  # of a Transformer's hidden layers
HIDDEN, TEMPERATURE, RATE, ACCUMULATOR = 128, 0.05, 0.1, 0.1


def serve(tasks: Mapping[str, Callable[..., tuple[Callable[[int], None], str]]]) -> None:
    """Serves the task that the command line asks for.

    Args:
        tasks: Name -> function of the options, which gives a function that repeats the work so many
            times, and a note.
    """
    options = json.loads(sys.argv[1])
    # Before a framework counts the cores.
    os.sched_setaffinity(0, {options.pop("core")})
    out, sys.stdout = sys.stdout, sys.stderr
    task = options.pop("task")
    run, note = tasks[task](**options)
    # Every row that will be used has then been used once; what walks over whole tables anyway would
    # take minutes.
    run(BATCHES if task == "tables" and options["kind"] != "dense_adam" else 2)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    answer(note=note)
    for line in sys.stdin:
        answer(milliseconds=seconds(run, int(line)) * 1e3)


def seconds(run: Callable[[int], None], repeats: int = 1) -> float:
    """Seconds a repetition, of processor time: on one core what a clock would show were nobody else
    there."""
    start = time.process_time()
    run(repeats)
    return (time.process_time() - start) / repeats


def fastest(
    makes: Mapping[str, Callable[[], Callable[[int], None]]], *, rounds: int = 5
) -> tuple[str, Callable[[int], None]]:
    """Returns the name and the run of the option that takes least time, by the median of passes
    taken in turns.

    Args:
        makes: Name of an option -> function that builds its run; one that fails is left out.
        rounds: Number of passes of each.
    """
    runs = {}
    for name, make in makes.items():
        try:
            run = make()
            # Compiled, and once more for what the first pass changed.
            run(2)
        except Exception as error:  # not every version can compile every kind
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    if len(runs) > 1:
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(seconds(run))
    medians = {name: statistics.median(passes or [0.0]) for name, passes in times.items()}
    best = min(medians, key=medians.__getitem__)
    shown = ", ".join(f"{name} {1e3 * median:.4g}" for name, median in medians.items())
    print(f"Median milliseconds a pass: {shown}", file=sys.stderr)
    return best, runs[best]


def table_ids(rows: int, batch: int, batches: int = BATCHES) -> np.ndarray:
    """int64 [batches, batch]: Zipf-distributed ids, as many distinct ones in every table of 100,000
    rows or more."""
    used = min(rows, 100_000)
    drawn = np.random.default_rng(0).zipf(1.1, (batches, batch)) * 7919 % used
    # Apart by a random distance: rows at one distance would share few of the sets of a cache.
    used_rows = np.sort(np.random.default_rng(1).choice(rows, used, replace=False))
    return np.maximum(used_rows[drawn], 1)


def table_targets(batch: int) -> np.ndarray:
    """float32 [batch, WIDTH], with which the rows are multiplied for the loss."""
    return np.random.default_rng(1).normal(size=(batch, WIDTH)).astype(np.float32)


def sequences(length: int) -> np.ndarray:
    """int64 [512, length + 1]: items of users whose sequences fill their rows, popular ones more
    often; all `FILMS` occur."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(10, FILMS + 10)
    drawn = rng.choice(FILMS, (512, length + 1), p=popularity / popularity.sum())
    drawn.flat[rng.choice(drawn.size, FILMS, replace=False)] = np.arange(FILMS)
    return drawn


def interactions() -> tuple[np.ndarray, np.ndarray]:
    """int32 users and items of 80,000 interactions, popular items more often; from 1 on."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, ITEMS + 1)
    items = rng.choice(ITEMS, INTERACTIONS, p=popularity / popularity.sum())
    return rng.integers(1, USERS + 1, INTERACTIONS).astype(np.int32), items.astype(np.int32) + 1
