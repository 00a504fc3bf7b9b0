"""Several processes that answer at one address, and the one that starts them and answers nobody.

They share one socket: whoever is free takes the next connection, and those that wait in it are not
lost with a process that dies. Such a process is started again, and takes part when it is ready.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from absl import logging
from prometheus_client.multiprocess import mark_process_dead

from twotower.core.errors import ConfigError
from twotower.serving.processes.signals import signals_to

MAX_FAILURES = 5  # of processes that ended before they were ready, one after another
PAUSE_SECONDS = 1.0  # before such a process is started again
END_SECONDS = 10.0  # beyond the time of the slowest request, until a process is killed
MAX_FOLDER = 70  # letters of the temporary folder: the system bounds the names of sockets at 107
METRICS = "metrics"  # folder of the counters in that of the processes


class Start(NamedTuple):
    """What a process is started with.

    Attributes:
        folder: Folder of the server's processes.
        number: Number of the process.
        processes: Number of all processes.
        is_early: Whether it accepts requests before it is ready.
        parent: Pipe to the process that starts it.
        bound: Socket that all listen at.
    """

    folder: Path
    number: int
    processes: int
    is_early: bool
    parent: Connection
    bound: socket.socket


class _Child(NamedTuple):
    """A process that was started.

    Attributes:
        process: The process.
        pipe: Pipe to it.
        is_early: Whether it accepts requests before it is ready.
    """

    process: SpawnProcess
    pipe: Connection
    is_early: bool


class Supervisor:
    """The parent of the processes of a server."""

    def __init__(
        self, run: Callable[[Start], None], bound: socket.socket, count: int, seconds: float
    ):
        """Prepares them.

        Args:
            run: Function of a module that a child runs, which ends with the child.
            bound: Socket that all listen at.
            count: Number of processes.
            seconds: Time of the slowest request.
        """
        self._run = run
        self._bound = bound
        self._count = count
        self._seconds = seconds
        # Not by fork: threads of JAX and Arrow would be copied in the midst of what they hold.
        self._context = multiprocessing.get_context("spawn")
        self._children: dict[int, _Child] = {}
        self._ready: set[int] = set()
        self._failures = 0
        self._is_ending = False
        self._last = 0.0  # until which the processes may end by themselves

    def serve(self) -> None:
        """Runs the processes until a signal ends them: SIGTERM or Ctrl-C.

        Raises:
            ConfigError: They end before they are ready.
        """
        root = tempfile.gettempdir()
        if len(root) > MAX_FOLDER:
            raise ConfigError(
                f"TMPDIR={root} is too long for the name of a socket in it. Set TMPDIR to a folder "
                f"of {MAX_FOLDER} letters or fewer."
            )
        folder = Path(tempfile.mkdtemp(prefix="twotower-"))
        metrics = folder / METRICS
        metrics.mkdir()
        # Read when the library of the counters is imported, by the children.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
        try:
            with signals_to(self._end):
                self._supervise(folder)
        finally:
            self._kill()
            shutil.rmtree(folder, ignore_errors=True)

    def _supervise(self, folder: Path) -> None:
        for index in range(self._count):
            # A signal may come while they are started.
            if self._is_ending:
                break
            self._start(folder, index, is_early=index == 0)
        while self._children:
            if self._is_ending and time.monotonic() > self._last:
                return
            heard = [child.pipe for child in self._children.values()]
            ended = {child.process.sentinel: n for n, child in self._children.items()}
            by_pipe = {child.pipe: n for n, child in self._children.items()}
            # Signals are noticed within a second, whichever thread they reach.
            for one in connection.wait([*heard, *ended], timeout=1.0):
                if isinstance(one, int):
                    self._replace(folder, ended[one])
                elif isinstance(one, Connection) and by_pipe[one] in self._children:
                    self._hear(by_pipe[one])

    def _start(self, folder: Path, index: int, *, is_early: bool) -> None:
        ours, theirs = self._context.Pipe()
        start = Start(folder, index, self._count, is_early, theirs, self._bound)
        process = self._context.Process(target=self._run, args=(start,), name=f"server-{index}")
        process.start()
        # Held by the child alone, so that its end is seen on the pipe.
        theirs.close()
        self._children[index] = _Child(process, ours, is_early)
        # A signal that came meanwhile has told all but this one.
        if self._is_ending:
            process.terminate()

    def _hear(self, index: int) -> None:
        """Notes that a child is ready, and lets those accept that are."""
        child = self._children[index]
        try:
            child.pipe.recv()
        except (EOFError, OSError):
            # The child has ended, or is about to: its sentinel tells.
            time.sleep(0.01)
            return
        self._failures = 0
        self._ready.add(index)
        # While a process accepts requests that is not ready, it refuses what the others would
        # answer: nobody else joins before it.
        waiting = [n for n, other in self._children.items() if other.is_early]
        if set(waiting) <= self._ready:
            for ready in self._ready:
                with contextlib.suppress(OSError):
                    self._children[ready].pipe.send("accept")

    def _replace(self, folder: Path, index: int) -> None:
        """Starts a child again that has ended.

        Raises:
            ConfigError: Too many have ended before they were ready, and none answers.
        """
        child = self._children.pop(index)
        child.process.join()
        child.pipe.close()
        mark_process_dead(child.process.pid, str(folder / METRICS))
        was_ready = index in self._ready
        self._ready.discard(index)
        if self._is_ending:
            return
        logging.error(
            "Process %d (%d) has ended with status %s, and is started again.",
            index,
            child.process.pid,
            child.process.exitcode,
        )
        if not was_ready:
            self._failures += 1
        # At the start a mistake of the user's ends all of them; its line was written by the child.
        # Later one that cannot start, as its bundle has gone, must not end those that answer.
        is_mistake = child.process.exitcode == os.EX_CONFIG
        if not self._ready and (is_mistake or self._failures >= MAX_FAILURES):
            raise ConfigError("The processes of the server end before they are ready; see above.")
        if not was_ready:
            time.sleep(PAUSE_SECONDS)
            if self._is_ending:
                return
        is_first = not self._ready and child.is_early
        self._start(folder, index, is_early=is_first)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Tells all to answer what they accepted, and to end."""
        del number, frame
        self._is_ending = True
        self._last = time.monotonic() + self._seconds + END_SECONDS
        for child in self._children.values():
            child.process.terminate()

    def _kill(self) -> None:
        """Ends the processes that are left."""
        if not self._is_ending:
            self._end(signal.SIGTERM, None)
        for child in self._children.values():
            child.process.join(max(0.0, self._last - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
