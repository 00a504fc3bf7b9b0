r"""All metrics over the whole corpus beside other libraries: processor time and memory.

    python -m experiments.benchmarks.evaluation [--ks=10,50,100] [--users=4000]\
        [--core=1] [--quick] [--check]

The lists of seen and of held-out items are Yelp2018's, where TWOTOWER_DATA has them, or drawn;
vectors are drawn. Each library measures both protocols, seen items masked and not, in a process of
its own on one core, and they take turns. FactorizedTopK of TensorFlow Recommenders knows one metric
and no masking.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import floors, harness, peers
from twotower.core.tables import format_table

_KS = flags.DEFINE_list("ks", ["10", "50", "100"], "Lengths of the lists.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each library.", lower_bound=1)

_USERS = flags.DEFINE_integer(
    "users", 31_668, "Number of users, the first of the log; 4,000 with --quick.", lower_bound=1
)
_SIDES = flags.DEFINE_list("sides", ["rectools", "ranx", "tensorflow"], "Libraries beside ours.")

WIDTH = 64
# Yelp2018 has 31,668 users and 38,048 items.
USERS = 31_668
ITEMS = 38_048
# Of --quick too, where a library's imports are most of the memory.
FLOORS = {"rectools time": 4.0, "ranx time": 4.0, "tensorflow time": 4.0}
# Without intervals over with them: these take a quarter more at most.
FLOORS["without intervals"] = 0.8


def yelp_lists(name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the lists of a file of Yelp2018 as offsets and values; None where it is not there."""
    path = Path(os.environ.get("TWOTOWER_DATA", "")) / "yelp2018" / f"{name}.txt"
    if not path.is_file():
        return None
    lists = [np.zeros(0, np.int32)] * USERS
    for line in path.read_text().splitlines():
        user, *items = line.split()
        lists[int(user)] = np.unique(np.array(items, np.int32))
    lengths = [len(items) for items in lists]
    return np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(lists)


def drawn_lists(users: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns lists of `length` distinct items for each user, as offsets and values."""
    generator = np.random.default_rng(seed)
    # Distinct without a loop: a random start, and steps of a fixed size.
    starts = generator.integers(0, ITEMS, (users, 1))
    values = np.sort((starts + 97 * np.arange(length)) % ITEMS, axis=1)
    return np.arange(0, users * length + 1, length), values.ravel().astype(np.int32)


def write_data(path: Path, users: int) -> str:
    """Writes the vectors and lists of an evaluation, and returns what they are."""
    generator = np.random.default_rng(0)
    arrays = {
        "users": generator.normal(size=(users, WIDTH)).astype(np.float32),
        "items": generator.normal(size=(ITEMS, WIDTH)).astype(np.float32),
    }
    what = "Yelp2018's lists"
    for name, file, length in (("seen", "train", 39), ("relevant", "test", 10)):
        lists = yelp_lists(file)
        if lists is None:
            what = "drawn lists"
            lists = drawn_lists(users, length, seed=length)
        offsets, values = lists
        arrays[f"{name}_offsets"] = offsets[: users + 1]
        arrays[f"{name}_values"] = values[: offsets[users]]
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return what


def measure(side: str, python: str, path: Path) -> dict[str, Any]:
    """Returns what `evaluation_side` prints of a library."""
    core = peers.CORE.value if peers.CORE.value >= 0 else max(os.sched_getaffinity(0))
    module = "experiments.benchmarks.contestants.evaluation_side"
    ks = json.dumps([int(k) for k in _KS.value])
    command = ("taskset", "-c", str(core), python, "-m", module, side, str(path), ks)
    settings: dict[str, str] = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )
    # TensorFlow Recommenders refuses a newer Keras.
    settings["TF_USE_LEGACY_KERAS"] = "1"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **settings}, check=False
    )
    if done.returncode:
        sys.exit(f"{side}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    del argv
    users = _USERS.value
    if harness.QUICK.value:
        users = min(users, 4_000)
    pythons = {"twotower": sys.executable, "intervals": sys.executable}
    for peer in _SIDES.value:
        python = peers.python_of(peer)
        if python:
            pythons[peer] = python
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        what = write_data(path, users)
        for _ in range(_ROUNDS.value):
            for side, python in pythons.items():
                found = measure(side, python, path)
                if side not in best or found["seconds"] < best[side]["seconds"]:
                    best[side] = found
    ours = best["twotower"]
    rows = []
    ratios = {}
    for side, found in best.items():
        ratios[f"{side} time"] = found["seconds"] / ours["seconds"]
        ratios[f"{side} memory"] = found["peak_mb"] / ours["peak_mb"]
        name = f"recall@{_KS.value[0]}"
        recall = found["figures"].get(name, float("nan"))
        figures = (found["seconds"], ratios[f"{side} time"], found["peak_mb"], recall)
        rows.append([side, *(f"{figure:.4g}" for figure in figures)])
    ratios["without intervals"] = ours["seconds"] / best["intervals"]["seconds"]
    print(f"{users:,} users x {ITEMS:,} items of width {WIDTH}, {what}, K = {_KS.value}:")
    header = ("library", "s", "to ours", "peak MB", f"recall@{_KS.value[0]}")
    print(format_table(rows, header, align="lr"))
    harness.write_json("evaluation", best, unit="s", base="twotower")
    floors.check(ratios, FLOORS)


if __name__ == "__main__":
    app.run(main)
