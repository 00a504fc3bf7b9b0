"""The heartbeat of a training: small files in the folder of its run that say where it is.

`heartbeat.json` is that of the first process, with the goodput of the run over all its starts;
`heartbeat.1.json` and so on are those of the others. A thread writes them, every two seconds and
after each save: steps never wait for a disk, and a process that hangs has a heartbeat whose step
stands still. Nothing in them changes a run, and a run whose heartbeat is lost goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from absl import logging

from twotower.core.errors import FolderError
from twotower.core.files import atomic, read_json
from twotower.training.monitoring import goodput
from twotower.training.monitoring.goodput import check_number
from twotower.training.monitoring.phases import PRODUCTIVE, Phases
from twotower.training.monitoring.stragglers import Beat, Watcher, parse_beat
from twotower.training.processes import is_lost_process

# Seconds between two beats.
PERIOD = 2.0
# Beats between two looks at the other processes, of which a look reads a file each: one beat more
# for every twenty processes.
_LOOK = 3
_PROCESSES_PER_BEAT = 20
# What every heartbeat says of its process in numbers.
_NUMBERS = ("time", "beat", "step", "steps", "process", "processes")


def heartbeat_path(workdir: Path, process: int = 0) -> Path:
    """Returns the file of a process.

    Args:
        workdir: Folder of the run.
        process: Number of the process.
    """
    name = f"heartbeat.{process}.json" if process else "heartbeat.json"
    return workdir / name


def read_heartbeat(workdir: Path, process: int = 0) -> dict[str, Any]:
    """Returns the content of a heartbeat; {} where there is none that can be read."""
    path = heartbeat_path(workdir, process)
    try:
        content = read_json(path)
        for name in _NUMBERS:
            check_number(content.get(name), f"{path} is corrupt: {name!r}")
        return content
    except FileNotFoundError:
        return {}
    except (FolderError, OSError) as error:
        logging.warning("%s is left out: %s", path, error)
        return {}


class Heartbeat:
    """Writer of the heartbeat of this process; a context.

    Args:
        workdir: Folder of the run.
        phases: Clock of the training.
        start: Step that the run goes on from.
        steps: Number of steps of the whole run.
    """

    def __init__(self, workdir: Path, phases: Phases, *, start: int, steps: int) -> None:
        self._workdir = workdir
        self._phases = phases
        self._steps = steps
        self._process = jax.process_index()
        self._processes = jax.process_count()
        self._look_every = max(_LOOK, self._processes // _PROCESSES_PER_BEAT)
        self._host = socket.gethostname()
        self._ledger = _open_ledger(workdir, start, self._process)
        # Replaced whole, since another thread reads it.
        self._now = (start, phases.seconds())
        self._noted = time.monotonic()
        self._rates: Mapping[str, float] = {}
        self._state = "training"
        self._beats = 0
        self._written = self._now
        self._step_seconds: dict[str, float] = {}
        self._wake = threading.Event()
        self._is_over = False
        self._has_warned = False
        self._watcher = Watcher(self._process)
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Before the thread ends, since the heartbeats of the others are what tells who is left.
        if isinstance(error, Exception) and is_lost_process(error):
            self._name_lost()
        self._state = "ended" if error is None else "stopped"
        self.note(self._now[0])
        self._is_over = True
        self._wake.set()
        self._thread.join()

    @property
    def ledger(self) -> goodput.Ledger:
        """Time of the run up to now."""
        return self._ledger.plus(self._now[1])

    def note(self, step: int) -> None:
        """Notes the step that training has come to."""
        self._now = (step, self._phases.seconds())
        self._noted = time.monotonic()

    def note_rates(self, rates: Mapping[str, float]) -> None:
        """Notes the rates of the last steps; see `twotower.training.monitoring.rates`."""
        self._rates = rates

    def note_save(self, step: int) -> None:
        """Notes a checkpoint."""
        self.note(step)
        saves = self.ledger.saved(step).saves
        self._ledger = dataclasses.replace(self._ledger, saves=saves)
        self._wake.set()

    def _work(self) -> None:
        """Writes until the training is over, and once more."""
        while True:
            # Read before writing: what is written after the end is then the last state for sure.
            is_over = self._is_over
            self._write()
            if is_over:
                return
            self._beats += 1
            # One process looks at all: a warning from each of thousands would bury it.
            if self._processes > 1 and self._process == 0 and not self._beats % self._look_every:
                self._look()
            self._wake.wait(PERIOD)
            self._wake.clear()

    def _write(self) -> None:
        try:
            with atomic(heartbeat_path(self._workdir, self._process)) as temporary:
                temporary.write_text(json.dumps(self._content(), indent=1), encoding="utf-8")
        except OSError as error:
            # A disk that is full ends the training where it matters, with a cure.
            if not self._has_warned:
                logging.warning("The heartbeat cannot be written: %s", error)
            self._has_warned = True

    def _content(self) -> dict[str, Any]:
        step, seconds = self._now
        before, spent = self._written
        # Between two dispatches no step has ended, and the seconds of the last ones still hold.
        if step > before:
            # Steps that were compiled since the last beat are no measure of others.
            if seconds["start"] == spent["start"]:
                for name in PRODUCTIVE:
                    self._step_seconds[name] = (seconds[name] - spent[name]) / (step - before)
            self._written = (step, seconds)
        content: dict[str, Any] = {
            "state": self._state,
            "time": time.time(),
            # Of a step that never ends, as one that hangs, the phases do not know yet.
            "uncounted": round(time.monotonic() - self._noted, 3),
            "beat": self._beats,
            "step": step,
            "steps": self._steps,
            "process": self._process,
            "processes": self._processes,
            "host": self._host,
            "pid": os.getpid(),
            "step_seconds": self._step_seconds,
            "rates": dict(self._rates),
        }
        # The ledger is of the run, and kept once.
        if self._process == 0:
            content |= self._ledger.plus(seconds).to_json()
        return content

    def _others(self) -> list[Beat]:
        """Returns the beats of all processes that have one."""
        contents = [read_heartbeat(self._workdir, i) for i in range(self._processes)]
        beats = [parse_beat(content) for content in contents]
        return [beat for beat in beats if beat is not None]

    def _look(self) -> None:
        """Says which process the others wait for, if one stands out."""
        said = self._watcher.look(self._others(), time.monotonic())
        if said:
            logging.warning("%s", said)

    def _name_lost(self) -> None:
        """Says which processes have no heartbeat any more."""
        before = {beat.process: beat.number for beat in self._others()}
        # Every one that lives writes within a period.
        time.sleep(1.5 * PERIOD)
        after = {beat.process: beat for beat in self._others()}
        for process in range(self._processes):
            beat = after.get(process)
            if process == self._process:
                continue
            if beat is None:
                logging.error("Process %d has ended, or never began to train.", process)
            elif beat.number == before.get(process):
                logging.error("%s has ended, at step %d or later.", beat.name, beat.step)


def _open_ledger(workdir: Path, start: int, process: int) -> goodput.Ledger:
    """Returns the ledger of a run that starts now."""
    now = time.time()
    content = read_heartbeat(workdir) if process == 0 else {}
    ledger = goodput.read_ledger(content)
    if ledger is None:
        return goodput.begin(now)
    away = 0.0
    # Nobody waits for a run that has come to its end.
    if content.get("state") != "ended":
        # A clock that was set back makes no time.
        away = max(now - content["time"], 0.0) + content.get("uncounted", 0.0)
    return ledger.restarted(start, away)
