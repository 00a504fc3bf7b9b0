"""A training that streams its examples against one whose data lies on the device: the same compiled
step, and the memory that a pass over many rows takes.

    python -m experiments.benchmarks.streaming [--quick] [--json=FILE] [--check] [--rows=5e6]

The small model is that of `experiments.benchmarks.step` (two id tables of width 64, towers 128-64,
batches of 1,024), the sequential one that of `experiments.benchmarks.sequence`. All inputs take
turns in one process, so that a busy machine slows all alike; a turn is longer than what threads
read ahead in those of the others. Figures are processor time of all threads, as if there were no
idle core to read ahead on; with --wall time by the clock.

For --rows rows are drawn into mapped arrays, written as records and read once, each by a process of
its own; its resident memory is counted without that of the imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks import floors, harness
from experiments.benchmarks.contestants.turn import (
    ACCUMULATOR,
    EXPANSION,
    HIDDEN,
    RATE,
    TEMPERATURE,
    WIDTH,
    interactions,
    sequences,
)
from experiments.benchmarks.planning import resident
from experiments.configs import movielens_1m_sequential
from twotower.config import Config, from_dict
from twotower.core.mesh import make_mesh
from twotower.pipeline.batches import InteractionRows
from twotower.pipeline.prepare import PreparedData, prepare
from twotower.pipeline.streaming import shards
from twotower.pipeline.streaming.records import RowRecords
from twotower.pipeline.streaming.stream import Stream
from twotower.runtime import keep_freed_memory
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import corpus_size, count_rows
from twotower.training.init import init_on
from twotower.training.loop import make_batches, open_steps
from twotower.training.metrics import UNWATCHED
from twotower.training.state import Trainer

_ROWS = flags.DEFINE_string("rows", "", "Rows of the pass whose memory is measured, such as 5e6.")
_WALL = flags.DEFINE_bool("wall", False, "Measure time by the clock.")
_CHILD = flags.DEFINE_string("child", "", "Work of a process that this one has started.")

# Time of the resident input to that of the stream; the least is what is promised.
FLOORS = {"small": 1 / 1.5, "sequential": 1 / 1.1}
USERS = 1_000_000
ITEMS = 100_000


def main(argv: list[str]) -> None:
    del argv
    if _CHILD.value:
        work, rows, folder = _CHILD.value.split(",")
        measure_child(work, int(float(rows)), Path(folder))
        return
    keep_freed_memory()
    quick = harness.QUICK.value
    figures = {}
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        # (configuration, steps of a turn)
        models = {"small": (small(folder), 200), "sequential": (sequential(folder), 24)}
        for name, (config, steps) in models.items():
            times = measure(config, Path(folder) / name, steps, rounds=3 if quick else 8)
            title = f"{name} model, B = {config.training.batch_size}"
            table = harness.table(title, times, unit="ms a step", base="stream")
            figures[title] = table
            # Of the best turns one may be without its share of the reading.
            ratios[name] = table["resident"]["median_ratio"]
    harness.write_json("streaming", figures, unit="ms a step", base="stream")
    if _ROWS.value:
        measure_memory(_ROWS.value)
    floors.check(ratios, FLOORS)


def small(folder: str) -> Config:
    """Returns the configuration of the small model on 80,000 interactions."""
    path = Path(folder) / "interactions.csv"
    pairs = np.stack(interactions(), axis=1)
    np.savetxt(path, pairs, fmt="%d", delimiter=",", header="user_id,item_id", comments="")
    feature = {"type": "string", "embedding_size": WIDTH}
    tower = {"layers": (HIDDEN, WIDTH)}
    return from_dict(
        {
            "data": {"source": "csv", "path": str(path)},
            "split": {"kind": "random", "validation": 0.0, "test": 0.0, "accept_leakage": _LEAKS},
            "features": {"user": {"user_id": feature}, "item": {"item_id": feature}},
            "model": {
                "user": tower,
                "item": tower,
                "temperature": TEMPERATURE,
                "learn_temperature": False,
            },
            "objective": {"negatives": {"uniform": 0}},
            "training": {
                "batch_size": 1024,
                "optimizer": {"kind": "adagrad", "learning_rate": RATE},
                "tables": {
                    "kind": "adagrad",
                    "learning_rate": RATE,
                    "initial_accumulator": ACCUMULATOR,
                },
            },
        }
    )


_LEAKS = ("random_split", "repeated_pairs", "identical_rows", "future_rows")


def sequential(folder: str) -> Config:
    """Returns the configuration of a causal transformer over full rows of 50 events."""
    length = 50
    config = movielens_1m_sequential.get_config()
    path = Path(folder) / "pairs.txt"
    lines = []
    for user, row in enumerate(sequences(length)):
        lines += [f"{user} {item}\n" for item in row]
    path.write_text("".join(lines))
    config.data.path = str(path)
    config.split.validation = 0.0
    config.split.test = 0.0
    config.split.accept_leakage = ("repeated_pairs",)
    config.features.user["history"]["max_length"] = length
    config.features.item["item_id"]["embedding_size"] = WIDTH
    config.model.history.block = "sasrec"
    config.model.history.expansion = EXPANSION
    config.training.batch_size = 32
    config.training.crop = "last"
    return from_dict(config)


def measure(config: Config, folder: Path, steps: int, *, rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds a step of each input, one figure a turn."""
    prepared = prepare(config)
    records = prepared.training_records()
    shards.write(records, folder)
    stream = Stream.open(records, folder, config.training)
    print(f"{len(records):,} records, {stream.shards.num_bytes / len(records):,.0f} bytes each")
    with contextlib.ExitStack() as stack:
        runs = {}
        for name in ("stream", "host", "resident"):
            run = stack.enter_context(_steps(prepared, config, name, stream))
            runs[name] = functools.partial(run, steps)
        clock = time.perf_counter if _WALL.value else time.process_time
        times = harness.alternate(runs, rounds=rounds, repeats=1, clock=clock)
    return {name: [x / steps for x in turns] for name, turns in times.items()}


@contextlib.contextmanager
def _steps(prepared: PreparedData, config: Config, name: str, stream: Stream) -> Any:
    """Yields a function that runs so many further steps."""
    training = dataclasses.replace(config.training, input=name, steps=10**6)
    config = dataclasses.replace(config, training=training)
    model = TwoTower.build(config.model, prepared.encoder)
    trainer = Trainer.build(config, model, corpus_size(prepared))
    batches = stream
    if name != "stream":
        batches = make_batches(prepared, training)
    mesh = make_mesh()
    state = [init_on(mesh, trainer, count_rows(prepared))]
    position = [0]
    with open_steps(trainer, batches, prepared, mesh, UNWATCHED, 0, 0) as run_steps:

        def run(steps: int) -> None:
            end = position[0] + steps
            while position[0] < end:
                # As many in a dispatch as `fit` would take.
                most = end - position[0]
                state[0], _, count = run_steps(state[0], position[0], most)
                position[0] += count
            jax.block_until_ready(state[0])

        yield run


def measure_memory(rows: str) -> None:
    """Prints the resident memory and the time of writing and of reading many rows."""
    with tempfile.TemporaryDirectory() as folder:
        for work in ("draw", "write", "read"):
            child = f"--child={work},{rows},{folder}"
            command = [sys.executable, "-m", "experiments.benchmarks.streaming", child]
            subprocess.run(command, check=True)


def measure_child(work: str, rows: int, folder: Path) -> None:
    """Draws rows, writes them as records or reads these once, and says what it took."""
    paths = {name: folder / f"{name}.npy" for name in ("user", "item", "weight")}
    if work == "draw":
        rng = np.random.default_rng(0)
        for name, high in (("user", USERS), ("item", ITEMS), ("weight", 2)):
            kind = np.float32 if name == "weight" else np.int32
            array = np.lib.format.open_memmap(paths[name], "w+", kind, (rows,))
            for start in range(0, rows, 2**20):
                stop = min(start + 2**20, rows)
                array[start:stop] = rng.integers(0, high, stop - start)
        return
    columns = {name: np.asarray(np.load(path, mmap_mode="r")) for name, path in paths.items()}
    ids = {"user": USERS, "item": ITEMS}
    features = {side: {"id": np.arange(count, dtype=np.int32)} for side, count in ids.items()}
    rows_of_log = InteractionRows(columns["user"], columns["item"], columns["weight"], None, {})
    records = RowRecords(rows_of_log, features)
    before = resident("VmRSS")
    start = time.perf_counter()
    processor = time.process_time()
    if work == "write":
        shards.write(records, folder / "shards")
    else:
        _read_once(records, folder / "shards")
    seconds = time.perf_counter() - start
    processor = time.process_time() - processor
    memory = (resident("VmHWM") - before) / 2**20
    size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    print(
        f"{work}: {rows:,} rows in {seconds:.1f} s ({processor / rows * 1e6:.2f} us of processor "
        f"time a row), {memory:,.0f} MiB more than before, {size / rows:.1f} bytes a record",
        flush=True,
    )


def _read_once(records: RowRecords, folder: Path) -> None:
    batch = 8192
    stream = Stream(records, shards.Shards(folder, records), batch, seed=0)
    with stream.batches(0, len(records) // batch, part=slice(0, batch)) as batches:
        for _ in batches:
            pass


if __name__ == "__main__":
    app.run(main)
