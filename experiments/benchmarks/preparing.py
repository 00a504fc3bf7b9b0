"""Processor time and peak memory of preparing a long log, from a CSV or Parquet file to arrays.

    python -m experiments.benchmarks.preparing [--rows=10000000] [--kind=csv] [--ids=digits]

    python -m experiments.benchmarks.preparing --workers=duckdb --rows=50000000 --memory=4GB

    python -m experiments.benchmarks.preparing --workers=memory,duckdb,beam --rows=1000000

The log is written in parts, in order of time: 25 rows a user on average, few users with many rows,
few items with most of them. `my_log.py` prepares it: a split by time, the ids and histories of
users, the ids of items. Each measurement is a process of its own, so that peaks are its own; the
peer `pandas` does with pandas what is needed for the arrays of events, and nothing else;
`pandas_folder` leaves what a prepared folder has: tables, arrays, a vocabulary, histories, counts
and hashes. `memory`, `duckdb` and `beam`, whose workers are threads of this process then, are the
engines, which write such a folder: the content of their folders must be the same. `training` goes
on to train the first tenth of an epoch, or --steps, validating five times, and says what memory
either took.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags
from pyarrow import csv

from experiments.benchmarks import floors
from experiments.benchmarks.harness import QUICK, write_json
from twotower.core.arrow import pc
from twotower.data.shop.generate import count_items, count_shoppers

ROWS = flags.DEFINE_integer("rows", 10_000_000, "Number of rows.")
KIND = flags.DEFINE_enum("kind", "csv", ["csv", "parquet"], "Kind of the file.")
IDS = flags.DEFINE_enum("ids", "digits", ["digits", "text", "long"], "Form of the ids.")
WORKERS = flags.DEFINE_list(
    "workers",
    ["twotower", "duckdb", "pandas"],
    "What prepares the log: twotower, memory, duckdb, beam, pandas, pandas_folder; training trains "
    "a tenth of an epoch.",
)
MEMORY = flags.DEFINE_string("memory", "4GB", "Memory of the engines duckdb and beam.")
FILE = flags.DEFINE_string("file", "", "Log to prepare; by default one is written first.")
STEPS = flags.DEFINE_integer("steps", 0, "Steps of `training`; 0 for the tenth of an epoch.")
WORKER = flags.DEFINE_string("worker", "", "What this process measures; for internal use.")

# Seconds and peak memory of pandas, which reports, fits and audits nothing, to ours.
FLOORS = {"speed": 0.7, "memory": 0.8}
PART = 1_000_000  # rows that are written at once
START = 1_400_000_000  # seconds
SECONDS_A_ROW = 3
WORDS = {"digits": ("", ""), "text": ("u", "i"), "long": ("0" * 23 + "-user", "0" * 23 + "-item")}


def main(argv: list[str]) -> None:
    del argv
    if WORKER.value:
        print(json.dumps(_WORKERS[WORKER.value](FILE.value)))
        return
    rows = ROWS.value
    if QUICK.value:
        rows = min(rows, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        path = FILE.value
        if not path:
            path = str(Path(folder) / f"log.{KIND.value}")
            write_log(path, rows, KIND.value, WORDS[IDS.value])
        figures = {}
        for worker in WORKERS.value:
            figures[worker] = _run(worker, path)
            print(f"{worker}: {figures[worker]}", flush=True)
    write_json("preparing", figures, unit="seconds and MB", base="pandas")
    contents = {figure["content"] for figure in figures.values() if "content" in figure}
    if len(contents) > 1:
        raise SystemExit(f"The engines left different folders: {', '.join(sorted(contents))}.")
    if {"pandas", "twotower"} <= set(figures):
        ratios = {}
        for name, figure in (("speed", "seconds"), ("memory", "peak_mb")):
            ratios[name] = figures["pandas"][figure] / figures["twotower"][figure]
            print(f"{name}, pandas to ours: {ratios[name]:.2f}")
        floors.check(ratios, FLOORS)


def write_log(path: str, rows: int, kind: str, words: tuple[str, str]) -> None:
    """Writes a log in parts.

    Args:
        path: File to write.
        rows: Number of rows.
        kind: "csv" or "parquet".
        words: Text before the number of each user and of each item; empty for numbers.
    """
    rng = np.random.default_rng(0)
    num_users = count_shoppers(rows)
    num_items = count_items(rows)
    # Numbers of users and items are in no order of activity or popularity.
    names = (rng.permutation(num_users) + 10_000, rng.permutation(num_items) + 10_000)
    writer = None
    for start in range(0, rows, PART):
        count = min(PART, rows - start)
        user = (num_users * rng.random(count) ** 2).astype(np.int64)
        item = (num_items * rng.random(count) ** 3).astype(np.int64)
        times = START + SECONDS_A_ROW * (start + np.arange(count))
        part = pa.table(
            {
                "user_id": _ids(names[0][user], words[0]),
                "item_id": _ids(names[1][item], words[1]),
                "timestamp": times,
            }
        )
        if writer is None:
            make = csv.CSVWriter if kind == "csv" else pq.ParquetWriter
            writer = make(path, part.schema)
        writer.write_table(part)
    assert writer is not None
    writer.close()


def _ids(numbers: np.ndarray, word: str) -> pa.Array:
    if not word:
        return pa.array(numbers)
    texts = pa.array(numbers).cast(pa.string())
    if len(word) > 1:
        # 36 bytes, as the UUIDs that many shops have.
        texts = pc.utf8_lpad(texts, 8, "0")
    return pc.binary_join_element_wise(word, texts, "")


def _run(worker: str, path: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmarks.preparing"]
    command += [f"--worker={worker}", f"--file={path}", f"--kind={KIND.value}"]
    command += [f"--rows={ROWS.value}", f"--memory={MEMORY.value}", f"--steps={STEPS.value}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class _Meter:
    """Processor time since it was made, and the peak of the process."""

    def __init__(self):
        self._start = time.process_time()
        self.base = _peak()

    def figures(self, rows: int) -> dict[str, float]:
        seconds = time.process_time() - self._start
        return {
            "rows": rows,
            "seconds": round(seconds, 2),
            "rows_a_second": round(rows / seconds),
            "peak_mb": _peak(),
            "imports_mb": self.base,
        }


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _config(path: str):
    from experiments.configs import my_log

    config = my_log.get_config()
    config.data.source = KIND.value
    config.data.interactions.path = path
    return config


def _prepare(path: str) -> dict[str, float]:
    from twotower.config import from_dict
    from twotower.pipeline.prepare import prepare

    meter = _Meter()
    prepared = prepare(from_dict(_config(path)))
    rows = len(prepared.train) + len(prepared.validation) + len(prepared.test)
    return meter.figures(rows)


def _prepare_folder(path: str, engine: str) -> dict[str, Any]:
    from twotower.config import from_dict
    from twotower.pipeline.engines.engine import prepare_folder
    from twotower.pipeline.folder import content_of

    meter = _Meter()
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        config = from_dict(_config(path))
        report = prepare_folder(config, Path(folder), engine=engine, memory=MEMORY.value)
        content = content_of(Path(folder))
    assert report is not None
    return meter.figures(report.rows) | {"content": content[:16]}


def _train(path: str) -> dict[str, float]:
    """Prepares a log and trains in a folder of its own, validating as often as by default."""
    from twotower.config import from_dict
    from twotower.evaluation.evaluate import make_validate
    from twotower.runtime import prepare_process
    from twotower.training.run import train

    prepare_process()
    spent = {"validation": 0.0}

    def make_timed(prepared, model):
        spent["preparing"] = time.process_time() - start
        spent["peak"] = _peak()
        # From here on the peak is that of the training.
        Path("/proc/self/clear_refs").write_text("5")
        validate = make_validate(prepared, model)

        def timed(*arguments):
            begin = time.process_time()
            result = validate(*arguments)
            spent["validation"] += time.process_time() - begin
            return result

        return timed

    config = _config(path)
    # The steps that the schedule would have are those of this tenth.
    tenth = round(0.85 * ROWS.value / config.training.batch_size / 10)
    config.training.steps = STEPS.value or max(tenth, 100)
    config.training.steps_for = 0
    # By default a training validates five times, whatever its length.
    config.training.validate_every = -(-config.training.steps // 5)
    meter = _Meter()
    start = time.process_time()
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        train(from_dict(config), folder, make_validate=make_timed)
    figures = meter.figures(ROWS.value)
    training = figures["seconds"] - spent["preparing"]
    figures["steps"] = config.training.steps
    figures["preparing_seconds"] = round(spent["preparing"], 1)
    figures["preparing_peak_mb"] = spent["peak"]
    figures["training_peak_mb"] = figures["peak_mb"]
    figures["peak_mb"] = max(spent["peak"], figures["peak_mb"])
    figures["share_of_validation"] = round(spent["validation"] / training, 3)
    return figures


def _read_with_pandas(path: str):
    import pandas as pd

    if KIND.value == "csv":
        return pd.read_csv(path, dtype={"user_id": str, "item_id": str, "timestamp": "int64"})
    return pd.read_parquet(path)


def _parts_of(times: np.ndarray) -> np.ndarray:
    """Returns the number of the part of each row, int8 [N], of a log of these times."""
    test = np.quantile(times, 0.9)
    validation = np.quantile(times, 0.85)
    return (times >= validation).astype(np.int8) + (times >= test)


def _prepare_with_pandas(path: str) -> dict[str, float]:
    import pandas as pd

    meter = _Meter()
    log = _read_with_pandas(path)
    user, _ = pd.factorize(log["user_id"])
    item, _ = pd.factorize(log["item_id"])
    times = log["timestamp"].to_numpy()
    part = _parts_of(times)
    # Events by user and then in time, and the span of them before each row.
    order = np.lexsort((times, user))
    begin = np.append(0, np.cumsum(np.bincount(user)))[user]
    end = np.empty(len(user), np.int64)
    end[order] = np.arange(len(user))
    spans = np.stack([np.maximum(begin, end - 100), end], axis=1).astype(np.int32)
    arrays = []
    for number in range(3):
        rows = part == number
        arrays.append((user[rows].astype(np.int32), item[rows].astype(np.int32), spans[rows]))
    return meter.figures(len(log))


def _histories_of(
    user: np.ndarray, times: np.ndarray, part: np.ndarray, events: np.ndarray, num_users: int
) -> dict[str, np.ndarray]:
    """Returns the events that training, test and serving know of, and the span of each row."""
    arrays = {}
    # The order of events, and how many of them come before the moment of each row.
    order = np.lexsort((times, user))
    is_new = np.append(True, (np.diff(user[order]) != 0) | (np.diff(times[order]) != 0))
    moment = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))
    start = 0
    ordered_part = part[order]
    # Training and validation rows know of training, test rows of both; the last is for serving.
    for level, readers in enumerate(((0, 1), (2,), ())):
        is_known = ordered_part <= level
        arrays[f"events_{level}"] = events[order[is_known]]
        arrays[f"order_{level}"] = order[is_known].astype(np.int32)
        lengths = np.bincount(user[part <= level], minlength=num_users)
        offsets = start + np.append(0, np.cumsum(lengths))
        before = np.empty(len(order), np.int64)
        before[order] = start + (np.cumsum(is_known) - is_known)[moment]
        arrays[f"offsets_{level}"] = offsets
        for number in readers:
            rows = np.flatnonzero(part == number)
            begin = np.maximum(offsets[user[rows]], before[rows] - 100)
            spans = np.stack([begin, before[rows]], axis=1)
            arrays[f"spans_{number}"] = spans.astype(np.int32)
        start = int(offsets[-1])
    return arrays


def _prepare_folder_with_pandas(path: str) -> dict[str, float]:
    """Leaves what a prepared folder has: tables, arrays, vocabulary, histories, counts, hashes."""
    import pandas as pd

    from twotower.core.files import digest

    meter = _Meter()
    log = _read_with_pandas(path)
    user, users = pd.factorize(log["user_id"])
    item, items = pd.factorize(log["item_id"])
    times = log["timestamp"].to_numpy()
    part = _parts_of(times)
    count_of_item = np.bincount(item[part == 0], minlength=len(items))
    # Items that training has are the corpus; the most frequent ones come first in the vocabulary.
    corpus = np.flatnonzero(count_of_item)
    row_of_item = np.full(len(items), -1, np.int32)
    row_of_item[corpus] = np.arange(len(corpus))
    frequent = np.lexsort((np.asarray(items[corpus], object), -count_of_item[corpus]))
    row_in_table = np.zeros(len(items), np.int32)
    row_in_table[corpus[frequent]] = 2 + np.arange(len(corpus))
    pairs = np.sort(user * np.int64(len(items)) + item)
    counts = {"repeats": int((pairs[1:] == pairs[:-1]).sum())}
    arrays: dict[str, np.ndarray] = {"row_in_table": row_in_table}
    arrays |= _histories_of(user, times, part, row_in_table[item], len(users))
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        for number in range(3):
            rows = np.flatnonzero(part == number)
            log.take(rows).reset_index(drop=True).to_feather(
                f"{folder}/{number}.arrow", compression="uncompressed"
            )
            arrays[f"user_{number}"] = user[rows].astype(np.int32)
            arrays[f"item_{number}"] = row_of_item[item[rows]]
            arrays[f"weight_{number}"] = np.ones(len(rows), np.float32)
            arrays[f"time_{number}"] = times[rows]
            arrays[f"position_{number}"] = rows.astype(np.int32)
            counts[f"outside_{number}"] = int((row_of_item[item[rows]] < 0).sum())
        pd.DataFrame({"user_id": users}).to_feather(f"{folder}/users.arrow")
        pd.DataFrame({"item_id": items[corpus]}).to_feather(f"{folder}/items.arrow")
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
        hashes = {file.name: digest(file) for file in Path(folder).iterdir()}
    assert len(hashes) == len(arrays) + 5 and counts["repeats"]
    return meter.figures(len(log))


_WORKERS = {
    "twotower": _prepare,
    "memory": functools.partial(_prepare_folder, engine="memory"),
    "duckdb": functools.partial(_prepare_folder, engine="duckdb"),
    "beam": functools.partial(_prepare_folder, engine="beam"),
    "pandas": _prepare_with_pandas,
    "pandas_folder": _prepare_folder_with_pandas,
    "training": _train,
}


if __name__ == "__main__":
    app.run(main)
