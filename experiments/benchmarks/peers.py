"""Peers to compare with, each in a process of its own that is pinned, kept warm, and given turns by
one driver.

Peers are extras of the benchmarks, never of the library: each is installed by pip, from whatever
index that is configured for, into a virtual environment of its own under --peers. One that cannot
be installed is said to be missing, and the others run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks.environments import python_with

PEERS = flags.DEFINE_string(
    "peers", "", "Folder of the peers' environments; by default one in the user's cache folder."
)
CORE = flags.DEFINE_integer("core", -1, "The core that all are pinned to; the last one by default.")

_ROOT = Path(__file__).parents[2]
# For all that are tuned: glibc otherwise returns buffers to the system and asks for them again at
# every step, which can double the time of one; and large arrays in huge pages.
_TUNED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_ENVIRONMENT = {
    "TF_USE_LEGACY_KERAS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


def python_of(peer: str) -> str | None:
    """The interpreter that has `peer`, installed where needed; None, and a line that says why,
    where that cannot be."""
    if peer == "twotower":
        return sys.executable
    return python_with(peer, PEERS.value)


class Worker:
    """One contestant: a process that runs `experiments.benchmarks.contestants.<module>` and times
    what it is told to.

    Attributes:
        note: What the contestant has to say of itself, a version or the options that it found best.
    """

    def __init__(self, peer: str, python: str, options: Mapping[str, Any]) -> None:
        core = CORE.value if CORE.value >= 0 else max(os.sched_getaffinity(0))
        command = (
            python,
            "-m",
            f"experiments.benchmarks.contestants.{peer}_side",
            json.dumps({**options, "core": core}),
        )
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(_ROOT)}
        # Those of a default user set nothing.
        if options.get("tuned", True):
            environment |= _TUNED
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=_ROOT,
        )
        assert self._process.stdin and self._process.stdout
        self._input = self._process.stdin
        self._output = self._process.stdout
        self._peer = peer
        self.note = ""

    def ready(self) -> None:
        """Waits until it has been built and warmed up."""
        self.note = self._answer()["note"]

    def __call__(self, repeats: int) -> float:
        """Milliseconds a repetition."""
        self._input.write(f"{repeats}\n")
        self._input.flush()
        return self._answer()["milliseconds"]

    def close(self) -> None:
        self._input.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._output.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"The contestant {self._peer} ended with status {status}.")
        return json.loads(line)


@contextlib.contextmanager
def workers(wanted: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Iterator[dict[str, Worker]]:
    """Warm workers: name -> (peer, options), those of missing peers left out; ended on the way
    out."""
    found: dict[str, Worker] = {}
    try:
        for name, (peer, options) in wanted.items():
            python = python_of(peer)
            if python:
                found[name] = Worker(peer, python, options)
                # One after the other: they share a core, and a choice made by timing should not be
                # disturbed.
                found[name].ready()
        yield found
    finally:
        for worker in found.values():
            worker.close()


def turns(
    contestants: Mapping[str, Worker], *, rounds: int, repeats: Mapping[str, int]
) -> dict[str, list[float]]:
    """Milliseconds a repetition of each, one figure a round: they take turns, so that a busy
    machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, worker in contestants.items():
            times[name].append(worker(repeats[name]))
    return times


def repeats_for(contestants: Mapping[str, Worker], milliseconds: float) -> dict[str, int]:
    """Returns how often each is to run for its turn to take about so long."""
    return {name: max(1, round(milliseconds / worker(1))) for name, worker in contestants.items()}
