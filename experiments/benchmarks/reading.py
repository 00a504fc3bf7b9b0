"""CPU time and peak memory of reading a log under the contract of columns, from CSV or Parquet.

    python -m experiments.benchmarks.reading --kind=csv [--rows=3000000] [--file=LOG]

The log has users that are numbers, items that are text, times in seconds, and three columns that
nothing computes with. A process of its own reads each kind: peaks are of a whole process.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags
from pyarrow import csv

from twotower.config import DataConfig, TableConfig
from twotower.data.sources.load import load_dataset

ROWS = flags.DEFINE_integer("rows", 3_000_000, "Number of rows.")
KIND = flags.DEFINE_enum("kind", "csv", ["csv", "parquet"], "Kind of the file.")


FILE = flags.DEFINE_string("file", "", "File to read; by default one is written first.")


def main(argv: list[str]) -> None:
    if FILE.value:
        _read(FILE.value)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{KIND.value}"
        write = csv.write_csv if KIND.value == "csv" else pq.write_table
        write(_log(ROWS.value), path)
        # In a process of its own, whose peak is that of reading.
        subprocess.run([sys.executable, __file__, f"--kind={KIND.value}", f"--file={path}"])


def _read(path: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    load_dataset(DataConfig(source=KIND.value, interactions=TableConfig(path=path)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{KIND.value}: {seconds:.2f} s of CPU, peak {after.ru_maxrss / 1024:.0f} MB")


def _log(rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    items = rng.integers(0, 50_000, rows).astype(str)
    return pa.table(
        {
            "user_id": rng.integers(0, 300_000, rows),
            "item_id": pa.array(np.char.add("i", items)),
            "timestamp": np.sort(rng.integers(1_600_000_000, 1_750_000_000, rows)),
            "event": np.array(["view", "cart", "buy"])[rng.integers(0, 3, rows)],
            "price": np.round(100 * rng.random(rows), 2),
            "device": np.array(["ios", "web", "tv"])[rng.integers(0, 3, rows)],
        }
    )


if __name__ == "__main__":
    app.run(main)
