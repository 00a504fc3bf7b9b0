"""Faults of every kind, thrown at trainings of two processes: no run may be lost, none may silently
begin from zero, and each must end in the bits of a run that nobody disturbed.

    python -m experiments.benchmarks.soak [--quick] [--faults=30] [--seed=0] [--json=FILE]
    python -m experiments.benchmarks.soak --regroup

Each run has ten faults, each at a random step, and after each both processes are started again by
the same command: on Kubernetes the JobSet would do so. Disks fill and become read-only only where
this user may mount (root). The file is also the experiment that the processes train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tabulate import tabulate

from experiments.benchmarks import harness
from twotower.config import defaults
from twotower.training.metrics import read_lines
from twotower.training.monitoring.goodput import format_ledger, read_ledger
from twotower.training.monitoring.heartbeat import read_heartbeat
from twotower.training.run import load_run

_FAULTS = flags.DEFINE_integer("faults", 30, "Number of faults; --quick throws a twentieth.")
_REGROUP = flags.DEFINE_bool("regroup", False, "In their place: 4, 2, 3, 4 processes of one run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of their kinds and steps.")

# A Python that keeps compiled programs of both processes: most of a start would be compiling.
_PYTHON = (sys.executable, "-m", "tests.training.keep_programs")
STEPS = 1_500
BATCH = 48
# Devices of the processes that go on with one run, one after the other.
_GROUPS = ((1, 1, 1, 1), (2, 2), (1, 1, 1), (1, 1, 1, 1))
_FEW = 400  # steps of their run
_PER_RUN = 10  # faults of a run
_HEARTBEAT = 10  # seconds of silence after which a process counts as lost
_LONG_STOP = 60.0
_SHORT_STOP = 5.0
_LIMIT = 600.0  # seconds for anything to happen
_DISK = 48 * 2**20


def get_config():
    """A tiny model with all that a resumed run must restore or draw again."""
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 1000
    user_id = {"type": "string", "embedding_size": 8}
    history = {"type": "history", "max_length": 4}
    config.features.user = {"user_id": user_id, "history": history}
    config.features.item = {"item_id": {"type": "string", "embedding_size": 8}}
    config.model.user.layers = (8,)
    config.model.user.dropout = 0.4
    config.model.item.layers = (8,)
    config.model.history.kind = "bag"
    # Divided by four devices and by three.
    config.training.batch_size = BATCH
    config.training.steps = STEPS
    config.training.validate_every = 40
    config.training.log_every = 10
    config.training.tables.kind = "lazy_adam"
    return config


class Training:
    """Processes of one run, started together; none outlives it.

    Args:
        workdir: Folder of the run.
        logs: Folder of what they say.
        devices: Number of devices of each process.
        log_every: Number of steps between two lines of metrics.
        steps: Number of steps of the whole run.
        options: Further flags.
    """

    def __init__(
        self,
        workdir: Path,
        logs: Path,
        devices: Sequence[int] = (1, 1),
        log_every: int = 10,
        steps: int = STEPS,
        options: Sequence[str] = (),
    ) -> None:
        self.workdir = workdir
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        self._logs = []
        for number, count in enumerate(devices):
            environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
            command = [
                *_PYTHON,
                "-m",
                "experiments.train",
                f"--config={__file__}",
                f"--workdir={workdir}",
                f"--coordinator=127.0.0.1:{port}",
                f"--config.training.log_every={log_every}",
                f"--config.training.steps={steps}",
                f"--processes={len(devices)}",
                f"--process={number}",
                f"--heartbeat_timeout={_HEARTBEAT}",
                *options,
            ]
            log = logs / f"{len(list(logs.iterdir()))}.log"
            self._logs.append(log)
            with log.open("w") as file:
                process = subprocess.Popen(
                    command, env=os.environ | environment, stdout=file, stderr=file
                )
            self.processes.append(process)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    @property
    def is_running(self) -> bool:
        """Whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def has_begun(self) -> bool:
        """Returns whether the training has read where it is to go on, or has ended."""
        return "Compiling:" in self.said() or not self.is_running

    def wait_for_step(self, step: int) -> None:
        """Waits until the metrics of a step are written, or a process has ended."""

        def has_come() -> bool:
            return last_step(self.workdir) >= step or not self.is_running

        wait_until(has_come, f"step {step}")

    def wait(self) -> list[int]:
        """Waits for all ends and returns their statuses."""
        wait_until(lambda: all(x.poll() is not None for x in self.processes), "the end")
        return [process.returncode for process in self.processes]

    def said(self) -> str:
        """Returns what all have logged."""
        return "\n".join(log.read_text(errors="replace") for log in self._logs)


def wait_until(has_come: Callable[[], bool], what: str) -> None:
    """Waits for a condition.

    Raises:
        AssertionError: It has not come in time.
    """
    end = time.monotonic() + _LIMIT
    while not has_come():
        assert time.monotonic() < end, f"{what} has not come within {_LIMIT:.0f} seconds"
        time.sleep(0.02)


def last_step(workdir: Path) -> int:
    """Returns the last step with a line of metrics."""
    lines = read_lines(workdir)
    return lines[-1]["step"] if lines else 0


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of the whole checkpoints."""
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


# The faults: each is thrown at two processes that train, and returns what is done after their end.
Repair = Callable[[], None]


def _nothing() -> None:
    pass


def kill_one(training: Training) -> Repair:
    """SIGKILL of the second process."""
    training.processes[1].kill()
    return _nothing


def kill_coordinator(training: Training) -> Repair:
    """SIGKILL of the first process."""
    training.processes[0].kill()
    return _nothing


def terminate_all(training: Training) -> Repair:
    """SIGTERM of both."""
    for process in training.processes:
        process.terminate()
    return _nothing


def terminate_one(training: Training) -> Repair:
    """SIGTERM of the second process."""
    training.processes[1].terminate()
    return _nothing


def stop_long(training: Training) -> Repair:
    """SIGSTOP of the second process for a minute, longer than the others wait."""
    process = training.processes[1]
    process.send_signal(signal.SIGSTOP)
    time.sleep(_LONG_STOP)
    process.send_signal(signal.SIGCONT)
    return _nothing


def stop_short(training: Training) -> Repair:
    """SIGSTOP of the second process for five seconds, which the others wait for."""
    process = training.processes[1]
    process.send_signal(signal.SIGSTOP)
    time.sleep(_SHORT_STOP)
    process.send_signal(signal.SIGCONT)
    training.wait_for_step(last_step(training.workdir) + 50)
    assert training.is_running, training.said()
    return terminate_all(training)


def fill_disk(training: Training) -> Repair:
    """A disk that is full while the run saves."""
    filler = training.workdir / "filler"
    free = shutil.disk_usage(training.workdir).free
    filler.write_bytes(bytes(max(0, free - 16_384)))
    return filler.unlink


def make_read_only(training: Training) -> Repair:
    """A checkpoint folder that can no longer be written."""
    folder = str(training.workdir / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    return lambda: subprocess.run(["umount", "-l", folder], check=True) and None


def truncate_newest(training: Training) -> Repair:
    """SIGKILL of both, and a newest checkpoint whose largest file is cut in half."""
    for process in training.processes:
        process.kill()

    def truncate() -> None:
        steps = saved_steps(training.workdir)
        if not steps:
            return
        newest = training.workdir / "checkpoints" / str(steps[-1])
        files = [path for path in newest.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)

    return truncate


FAULTS = (
    kill_one,
    terminate_all,
    fill_disk,
    make_read_only,
    truncate_newest,
    kill_coordinator,
    stop_long,
    stop_short,
    terminate_one,
)
_OF_MOUNTS = (fill_disk, make_read_only)


@dataclasses.dataclass
class Outcome:
    """A fault and what came of it.

    Attributes:
        fault: Its kind.
        step: Step that was logged when it struck.
        statuses: Exit statuses of both processes.
        saved: Newest checkpoint afterwards.
        resumed: Step that the next start went on from.
        refused: Whether the start after it was refused with a cure, which was taken.
    """

    fault: str
    step: int
    statuses: list[int]
    saved: int
    resumed: int = 0
    refused: bool = False


def start(workdir: Path, logs: Path, outcome: Outcome | None) -> Training:
    """Starts both processes again, and takes the cure that a refusal names.

    Args:
        workdir: Folder of the run.
        logs: Folder of what they say.
        outcome: The fault before; None for the first start.
    """
    while True:
        training = Training(workdir, logs)
        wait_until(training.has_begun, "the start")
        said = training.said()
        if "Compiling:" in said:
            break
        training.wait()
        cure = re.search(r"(\S+/checkpoints/\d+) cannot be restored: .* Delete that folder", said)
        assert cure and outcome, said
        shutil.rmtree(cure[1])
        outcome.refused = True
    if outcome is not None:
        found = re.search(r"Resuming at step (\d+)", said)
        outcome.resumed = int(found[1]) if found else 0
        steps = saved_steps(workdir)
        # Never from zero where there is something to go on from.
        assert outcome.resumed == (steps[-1] if steps else 0), said
    return training


def disturb(workdir: Path, logs: Path, faults: list[Any], rng: random.Random) -> list[Outcome]:
    """Trains with faults to the end.

    Args:
        workdir: Folder of the run.
        logs: Folder of what the processes say.
        faults: Faults, one for each start.
        rng: Draws the steps at which they strike.
    """
    outcomes: list[Outcome] = []
    for fault in faults:
        with start(workdir, logs, outcomes[-1] if outcomes else None) as training:
            resumed = outcomes[-1].resumed if outcomes else 0
            training.wait_for_step(resumed + rng.randrange(20, 90))
            step = last_step(workdir)
            assert training.is_running, training.said()
            repair = fault(training)
            statuses = training.wait()
            said = training.said()
            repair()
        # At least one says by its status what to do, and none came to the end.
        assert 0 not in statuses, said
        saved = (saved_steps(workdir) or [0])[-1]
        outcomes.append(Outcome(fault.__name__, step, statuses, saved))
        print(outcomes[-1], flush=True)
    with start(workdir, logs, outcomes[-1]) as training:
        statuses = training.wait()
        assert statuses == [0, 0], training.said()
    return outcomes


def check_same_end(workdir: Path, whole: Path) -> None:
    """Compares the state of two runs, bit for bit.

    Raises:
        AssertionError: They differ.
    """
    runs = [load_run(path, checkpoint="latest") for path in (workdir, whole)]
    assert runs[0].step == runs[1].step == STEPS
    records = []
    for path in (workdir, whole):
        # The checksum of the whole state, slots and schedule included.
        record = (path / "checkpoints" / str(STEPS) / "record" / "metadata").read_text()
        records.append(json.loads(record)["checksum"])
    assert records[0] == records[1]
    jax.tree.map(np.testing.assert_array_equal, runs[0].weights, runs[1].weights)


def regroup(scratch: Path, logs: Path) -> None:
    """Lets other numbers of processes go on with a run of four devices, and prints how far its end
    is from that of one process.

    Raises:
        AssertionError: A process ended with another status than it should.
    """
    # From a stream, whose processes say how many examples they have read.
    options = ("--config.training.input=stream",)
    examples = 0
    begun = 0
    whole = scratch / "one"
    with Training(whole, logs, (4,), log_every=1, steps=_FEW, options=options) as training:
        assert training.wait() == [0], training.said()
    workdir = scratch / "several"
    for stage, devices in enumerate(_GROUPS):
        begun = (saved_steps(workdir) or [0])[-1]
        several = Training(workdir, logs, devices, log_every=1, steps=_FEW, options=options)
        with several as training:
            if stage < len(_GROUPS) - 1:
                training.wait_for_step(_FEW * (stage + 1) // len(_GROUPS))
                training.processes[-1].terminate()
            statuses = training.wait()
            expected = os.EX_TEMPFAIL if stage < len(_GROUPS) - 1 else 0
            assert set(statuses) == {expected}, training.said()
            print(f"{len(devices)} processes: {statuses}, {saved_steps(workdir)[-1]}", flush=True)
            counts = re.findall(r"This process read ([\d,]+) examples", training.said())
            examples = sum(int(count.replace(",", "")) for count in counts)
    # Those before read ahead of the steps that they took; these leave out none and repeat none.
    assert examples == (_FEW - begun) * BATCH, examples
    print(f"the last {len(_GROUPS[-1])} read {examples:,} examples, all from step {begun} on")
    losses = []
    for path in (whole, workdir):
        lines = [line for line in read_lines(path) if "loss" in line]
        losses.append([line["loss"] for line in lines])
    runs = [load_run(path, checkpoint="latest") for path in (whole, workdir)]
    print(f"losses differ by at most {np.max(np.abs(np.subtract(*losses))):.2g}")
    for kind, weights in (("tables", "tables"), ("weights of the towers", "params")):
        pairs = zip(*(jax.tree.leaves(getattr(run.weights, weights)) for run in runs), strict=True)
        far = [float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs]
        print(f"{kind} differ by at most {max(far):.2g}")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a small disk at a folder, and yields whether this user may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", str(folder)]
    may = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield may
    finally:
        if may:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def draw_faults(count: int, may_mount: bool) -> list[Any]:
    """Returns the faults: all kinds in turn."""
    kinds = [fault for fault in FAULTS if may_mount or fault not in _OF_MOUNTS]
    return [kinds[i % len(kinds)] for i in range(count)]


def main(argv: list[str]) -> None:
    rng = random.Random(_SEED.value)
    count = _FAULTS.value
    if harness.QUICK.value:
        count = max(1, count // 20)
    table = []
    ledgers = []
    with tempfile.TemporaryDirectory() as scratch, small_disk(Path(scratch) / "disk") as may:
        logs = Path(scratch) / "logs"
        logs.mkdir()
        if _REGROUP.value:
            regroup(Path(scratch), logs)
            return
        whole = Path(scratch) / "whole"
        with Training(whole, logs) as training:
            assert training.wait() == [0, 0], training.said()
        faults = draw_faults(count, may)
        for first in range(0, count, _PER_RUN):
            workdir = Path(scratch) / "disk" / f"run{first}"
            outcomes = disturb(workdir, logs, faults[first : first + _PER_RUN], rng)
            check_same_end(workdir, whole)
            ledger = read_ledger(read_heartbeat(workdir))
            assert ledger is not None and ledger.starts >= len(outcomes)
            ledgers.append(format_ledger(ledger))
            print(ledgers[-1], flush=True)
            for outcome in outcomes:
                table.append(dataclasses.astuple(outcome))
            shutil.rmtree(workdir)
    names = [field.name for field in dataclasses.fields(Outcome)]
    print(tabulate(table, headers=names, tablefmt="github"))
    print(f"{count} faults: no run was lost, and each ended in the bits of the undisturbed one.")
    print("\n".join(ledgers))
    if harness.JSON.value:
        figures = {"outcomes": table, "goodput": ledgers}
        Path(harness.JSON.value).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app.run(main)
