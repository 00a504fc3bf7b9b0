"""Does a step cost more when tables are larger, and do peers update tables faster?

    python -m experiments.benchmarks.table_size [--quick] [--json=FILE] [--check] [--peers=FOLDER]
        [--core=N]

1. Steps of one table of width 64 (4,096 Zipf-distributed ids looked up, a pointwise loss, its
gradient, the update) of V rows,
   by our sparse optimizers, PyTorch's, and dense Adam of both. Ours of 100,000 rows take their
   turns beside every other size: flatness is a ratio within one table. The optimizers are apart
   from one another, so that two such tables fit into memory; what does not is left out.
2. Whole training steps, as `fit` runs them (batch of 1,024, symmetric softmax, row-wise Adagrad),
of two models that differ
   in the rows of their tables.

Figures are processor time on one core.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from absl import app

from experiments.benchmarks import floors, harness, peers

_ROWS, _QUICK_ROWS = (10_000, 100_000, 1_000_000, 10_000_000), (10_000, 100_000, 1_000_000)
_REFERENCE, _WIDTH = 100_000, 64
# name -> (peer, kind, tables' worth of memory at its peak); each against the first of its group.
_GROUPS = (
    {
        "row-wise Adagrad": ("twotower", "rowwise_adagrad", 1),
        "Adagrad": ("twotower", "adagrad", 2),
        "PyTorch sparse Adagrad": ("torch", "adagrad", 2),
    },
    {
        "lazy Adam": ("twotower", "lazy_adam", 3),
        "PyTorch SparseAdam": ("torch", "lazy_adam", 3),
        "optax dense Adam": ("twotower", "dense_adam", 5),
        "PyTorch dense Adam": ("torch", "dense_adam", 4),
    },
)
_WHOLE_ROWS = (100_000, 10_000_000)
# Least times of PyTorch's sparse optimizers to ours, by rows; about nine tenths of what was
# measured. Flat: how many times the steps of the smaller table those of the larger one may take,
# as their inverse.
FLOORS = {
    "100,000 PyTorch sparse Adagrad": 2.8,
    "1,000,000 PyTorch sparse Adagrad": 2.9,
    "100,000 PyTorch SparseAdam": 2.1,
    "1,000,000 PyTorch SparseAdam": 2.3,
    "flat": 0.8,
}


def main(argv: list[str]) -> None:
    figures = {}
    for rows in _QUICK_ROWS if harness.QUICK.value else _ROWS:
        for group in _GROUPS:
            figures |= _compare(rows, group)
    figures |= _whole_steps(_WHOLE_ROWS)
    harness.write_json("table_size", figures, unit="ms a step", base="first row of each")
    floors.check(_ratios(figures), FLOORS)


def _ratios(figures: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Returns the times of others to ours, by the rows of the table and the name."""
    ratios = {}
    for title, table in figures.items():
        rows = title.split(" rows")[0]
        ratios |= {f"{rows} {name}": values["best_ratio"] for name, values in table.items()}
    small, large = figures["whole step"].values()
    return ratios | {"flat": small["best"] / large["best"]}


def _compare(rows: int, group: dict[str, tuple[str, str, int]]) -> dict[str, dict]:
    """Prints and gives the figures of tables of `rows`: the sparse ones by turns, the dense ones,
    which are large, alone."""
    results: dict[str, list[float]] = {}
    sparse = {name: task for name, task in group.items() if "dense" not in name}
    parts = (
        [sparse]
        if rows <= 10**6
        else [dict(pair) for pair in itertools.combinations(sparse.items(), 2)]
    )
    for part in [*parts, *({name: task} for name, task in group.items() if name not in sparse)]:
        needed = sum(tables for *_, tables in part.values()) * rows * _WIDTH * 4
        if needed > 0.8 * _available_memory():
            left_out = f"{' and '.join(part)} of {rows:,} rows"
            print(f"Without {left_out}: {needed / 2**30:.1f} GiB are not available.")
            continue
        for name, times in _turns(rows, part).items():
            results.setdefault(name, []).extend(times)
    base = next(iter(results), None)
    title = f"{rows:,} rows, {next(iter(group))}"
    return {title: harness.table(title, results, unit="ms a step", base=base)} if base else {}


def _turns(rows: int, part: dict[str, tuple[str, str, int]]) -> dict[str, list[float]]:
    def task(kind: str, rows: int) -> dict:
        return {"task": "tables", "kind": kind, "rows": rows, "batch": 4096}

    wanted = {name: (peer, task(kind, rows)) for name, (peer, kind, _) in part.items()}
    for name, (peer, kind, _) in part.items():
        if peer == "twotower" and kind != "dense_adam" and rows > _REFERENCE:
            wanted[f"{name}, {_REFERENCE:,} rows"] = (peer, task(kind, _REFERENCE))
    with peers.workers(wanted) as found:
        repeats = peers.repeats_for(found, 20 if harness.QUICK.value else 60)
        return peers.turns(found, rounds=6 if harness.QUICK.value else 30, repeats=repeats)


def _whole_steps(sizes: tuple[int, ...]) -> dict[str, dict]:
    wanted = {
        f"{rows:,} rows": ("twotower", {"task": "whole_step", "rows": rows}) for rows in sizes
    }
    with peers.workers(wanted) as found:
        times = peers.turns(
            found, rounds=6 if harness.QUICK.value else 30, repeats=dict.fromkeys(found, 1)
        )
    times = {name: [x / 8 for x in dispatches] for name, dispatches in times.items()}
    return {
        "whole step": harness.table("whole step", times, unit="ms a step", base=next(iter(times)))
    }


def _available_memory() -> float:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    app.run(main)
