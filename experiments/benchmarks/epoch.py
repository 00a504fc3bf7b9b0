"""Resident memory of a log that is prepared out of core and of an epoch that is streamed from it.

    python -m experiments.benchmarks.epoch --rows=50000000 [--log=films] [--memory=3GB]

    python -m experiments.benchmarks.epoch --rows=50000000 --folder=DIR --phases=train --steps=500

    python -m experiments.benchmarks.epoch --rows=50000000 --log=films --light --memory=3GB

The log is that of `preparing.py` ("shop") or MovieLens expanded fractally ("films", `fractal.py`).
The engine duckdb prepares it into a folder with its records; then an epoch of a small model with
histories of 20 events is streamed, or --steps of it, in batches of 2,048, with five validations;
with --light it is of ids alone, in batches of 16,384 and with 16 negatives that all rows share, so
that a whole epoch of fifty million rows takes minutes.
Each phase is a process of its own. Its memory is read five times a second by kind: anonymous, which
the system cannot have back, and pages of files, which it can. The greatest of each tenth of a
phase's time are printed as well, so that what grows with the rows that were read is seen.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from experiments.benchmarks import fractal, preparing
from experiments.benchmarks.harness import QUICK, write_json

# --rows, --memory and --steps are those of `preparing`.
_LOG = flags.DEFINE_enum("log", "shop", ["shop", "films"], "Log that is streamed.")
_LIGHT = flags.DEFINE_bool("light", False, "A model of ids alone, with few negatives.")
_FOLDER = flags.DEFINE_string("folder", "", "Folder to keep, in the place of a temporary one.")
_PHASES = flags.DEFINE_list("phases", ["write", "prepare", "train"], "What is done.")
_PHASE = flags.DEFINE_string("phase", "", "What this process does; for internal use.")

BATCH = 2048
LIGHT_BATCH = 16_384
WIDTH = 16
HISTORY = 20
VALIDATIONS = 5
SECONDS_BETWEEN = 0.2
MIB = 2**20
# Kind -> the line of /proc/PID/status that counts it. Shared memory is of no file that is written.
KINDS = {"anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem"}


class Memory(NamedTuple):
    """Resident memory of a process at a moment, in MiB."""

    anonymous: float
    files: float
    shared: float


def main(argv: list[str]) -> None:
    del argv
    if _PHASE.value:
        _WORK[_PHASE.value](Path(_FOLDER.value))
        return
    rows = preparing.ROWS.value
    if QUICK.value:
        rows = min(rows, 300_000)
    with contextlib.ExitStack() as stack:
        folder = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
        figures = {}
        for phase in _PHASES.value:
            figures[phase] = measure(phase, rows, folder)
            print(f"{phase}: {figures[phase]}", flush=True)
    write_json(f"epoch of {_LOG.value}, {rows:,} rows", figures, unit="s and MiB", base="train")


def measure(phase: str, rows: int, folder: str) -> dict[str, Any]:
    """Runs a phase in a process of its own, and returns its time and its memory."""
    command = [sys.executable, "-m", "experiments.benchmarks.epoch", f"--phase={phase}"]
    command += [f"--rows={rows}", f"--folder={folder}", f"--log={_LOG.value}"]
    command += [f"--memory={preparing.MEMORY.value}", f"--steps={preparing.STEPS.value}"]
    command += [f"--light={_LIGHT.value}"]
    start = time.perf_counter()
    child = subprocess.Popen(command)
    samples: list[Memory] = []
    while True:
        sample = _read_memory(child.pid)
        if sample is not None:
            samples.append(sample)
        process, status, usage = os.wait4(child.pid, os.WNOHANG)
        if process:
            break
        time.sleep(SECONDS_BETWEEN)
    # Told here, since the process was waited for behind its back.
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{phase} ended with {child.returncode}")
    return {
        "rows": rows,
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak": round(usage.ru_maxrss / 1024),
        "peak_of_kind": _greatest(samples),
        "anonymous_by_tenth": [_greatest(part)["anonymous"] for part in _tenths(samples)],
        "files_by_tenth": [_greatest(part)["files"] for part in _tenths(samples)],
    }


def _read_memory(process: int) -> Memory | None:
    """Returns the resident memory of a process; None of one that has ended."""
    lines = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        lines[name] = value
    # A process that has ended and was not waited for has no memory.
    if KINDS["anonymous"] not in lines:
        return None
    # In KiB, as in " 1024 kB".
    return Memory(*(int(lines[name].split()[0]) / 1024 for name in KINDS.values()))


def _greatest(samples: Sequence[Memory]) -> dict[str, int]:
    return {kind: round(max(values)) for kind, values in zip(KINDS, zip(*samples))}


def _tenths(samples: Sequence[Memory]) -> list[Sequence[Memory]]:
    size = math.ceil(len(samples) / 10)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _log_path(folder: Path) -> Path:
    return folder / "log.parquet"


def _config(folder: Path) -> Any:
    from experiments.configs import my_log

    config = my_log.get_config()
    config.data.source = "parquet"
    config.data.interactions.path = str(_log_path(folder))
    features = (*config.features.user.values(), *config.features.item.values())
    for feature in features:
        if "embedding_size" in feature:
            feature["embedding_size"] = WIDTH
    config.features.user["history"]["max_length"] = HISTORY
    config.model.user.layers = (WIDTH,)
    config.model.item.layers = (WIDTH,)
    config.training.batch_size = BATCH
    config.training.input = "stream"
    if _LIGHT.value:
        config.features.user = {"user_id": config.features.user["user_id"]}
        config.training.batch_size = LIGHT_BATCH
        # In the place of the batch's other rows, whose scores would be 2.7e8 a step.
        config.objective.negatives.in_batch = False
        config.objective.negatives.uniform = 16
    return config


def _write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = preparing.ROWS.value
    if _LOG.value == "films":
        fractal.write_films(_log_path(folder), rows)
        return
    preparing.write_log(str(_log_path(folder)), rows, "parquet", preparing.WORDS["text"])


def _prepare(folder: Path) -> None:
    from twotower.config import from_dict
    from twotower.pipeline.engines.engine import prepare_folder

    config = from_dict(_config(folder))
    prepare_folder(config, folder / "data", engine="duckdb", memory=preparing.MEMORY.value)


def _train(folder: Path) -> None:
    from twotower.config import from_dict
    from twotower.evaluation.evaluate import make_validate
    from twotower.pipeline import folder as data_folder
    from twotower.runtime import prepare_process
    from twotower.training.run import train

    prepare_process()
    config = _config(folder)
    data = folder / "data"
    rows = data_folder.load(data, from_dict(config), data_folder.load_encoder(data)).num_examples
    config.training.steps = preparing.STEPS.value or rows // config.training.batch_size
    config.training.steps_for = 0
    config.training.validate_every = math.ceil(config.training.steps / VALIDATIONS)
    # Nothing is to end the epoch early.
    config.training.patience = 0
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        train(from_dict(config), workdir, data=data, make_validate=make_validate)


_WORK: Mapping[str, Callable[[Path], None]] = {
    "write": _write,
    "prepare": _prepare,
    "train": _train,
}


if __name__ == "__main__":
    app.run(main)
