"""The common ground of the benchmarks: taking turns in one process, and a table of ratios."""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from twotower.core.files import atomic

QUICK = flags.DEFINE_bool("quick", False, "A smaller version, under a minute.")
JSON = flags.DEFINE_string("json", "", "Also write the figures to this file.")


def steady_allocator() -> None:
    """Keeps glibc from returning and asking again for XLA's buffers at every step, which can double
    the time of one."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds a call of each run, one figure a round: the runs take turns, so that a busy
    machine slows all alike.

    Args:
        clock: Seconds; `time.process_time` does not count what other processes take of the cores.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            for _ in range(repeats):
                run()
            times[name].append((clock() - start) / repeats * 1e3)
    return times


def report(title: str, times: Mapping[str, list[float]], *, unit: str, base: str) -> None:
    """Prints best and median and their ratios to `base`; writes them to --json."""
    write_json(title, table(title, times, unit=unit, base=base), unit=unit, base=base)


def table(
    title: str, times: Mapping[str, list[float]], *, unit: str, base: str
) -> dict[str, dict[str, float]]:
    """Prints best and median and their ratios to `base`, and gives them."""
    rows = {name: {"best": min(t), "median": statistics.median(t)} for name, t in times.items()}
    print(f"{title}: {unit}\n{'':32}{'best':>10}{'median':>10}{'best/base':>12}{'median/base':>13}")
    for name, row in rows.items():
        row |= {f"{k}_ratio": row[k] / rows[base][k] for k in ("best", "median")}
        print(
            f"{name:32}{row['best']:10.3f}{row['median']:10.3f}{row['best_ratio']:12.2f}{row['median_ratio']:13.2f}",
            flush=True,
        )
    return rows


def write_json(title: str, results: Mapping[str, Any], *, unit: str, base: str) -> None:
    """Writes figures to --json, if given."""
    if JSON.value:
        figures = {"benchmark": title, "unit": unit, "base": base, "results": results}
        with atomic(JSON.value) as temporary:
            temporary.write_text(json.dumps(figures, indent=2))
