"""Several processes as one run, by `jax.distributed`."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from twotower.core.errors import ConfigError

# Seconds for which JAX itself would wait longer: it ends a process without saying what it waited
# for, so the time must run out here first.
_MARGIN = 30
# Words of the libraries that carry messages between processes: Gloo on CPUs, NCCL and RCCL on GPUs,
# gRPC between JAX's own services.
_LOST_PROCESS = re.compile(r"\b(Gloo|NCCL|RCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b")


def join(
    coordinator: str,
    processes: int,
    process: int,
    *,
    cluster: bool = False,
    init_timeout: int = 60,
    heartbeat_timeout: int = 20,
) -> None:
    """Joins the other processes of a run; does nothing for a run of one.

    It must come before any other use of JAX. If the others do not come in time, it ends this
    process with the status `os.EX_TEMPFAIL` and says what was missing.

    Args:
        coordinator: HOST:PORT of process 0; empty for a single process, or if the cluster knows it.
        processes: Number of processes.
        process: Number of this process, from 0.
        cluster: Whether to ask the cluster (Cloud TPU, Slurm, Kubernetes, Open MPI) for all three.
        init_timeout: Seconds to wait for the other processes.
        heartbeat_timeout: Seconds of silence after which another process counts as lost.

    Raises:
        ConfigError: The three do not go together, or there is no cluster.
    """
    # A negative number of the process is the flag's default, and means none.
    if not coordinator:
        if processes or process >= 0:
            raise ConfigError(
                f"--processes={processes} --process={process} need --coordinator=HOST:PORT, of "
                "process 0."
            )
        if not cluster:
            return
        missing = _MissingProcesses(init_timeout)
        _initialize(missing, heartbeat_timeout)
        return
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} must be from 0 to --processes={processes} less 1.")
    if ":" not in coordinator or not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476.")
    if process == 0:
        _check_port(coordinator)
    missing = _MissingProcesses(init_timeout, coordinator, processes)
    _initialize(missing, heartbeat_timeout, coordinator, processes, process)


def is_one_of_several() -> bool:
    """Returns whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this process is the one that the others depend on."""
    return jax.process_index() == 0


def is_lost_process(error: Exception) -> bool:
    """Returns whether an error means that another process of the run has ended.

    Args:
        error: Error of a run of several processes.
    """
    # Gloo's errors come as a plain ValueError, those of NCCL and gRPC as a JaxRuntimeError.
    is_of_jax = isinstance(error, (ValueError, jax.errors.JaxRuntimeError))
    return is_of_jax and _LOST_PROCESS.search(str(error)) is not None


class Preemption:
    """Listens for SIGTERM, by which a scheduler asks a run to end; a context.

    One process listens itself. In several JAX does, which lets all of them stop after the same
    dispatch, whichever was asked.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        # Only the main thread may. A handler of JAX's, in C++, must stay.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and not is_one_of_several():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True

    def is_due(self, dispatch: int) -> bool:
        """Returns whether the run is to end now.

        Args:
            dispatch: Number of the dispatch that was launched last. All processes call this after
                each, with numbers that rise by one, since JAX names the one to stop after.
        """
        if is_one_of_several():
            return multihost_utils.reached_preemption_sync_point(dispatch)
        return self._is_asked


class _MissingProcesses:
    """The end of a process whose others do not come.

    Attributes:
        seconds: Seconds to wait for them.
    """

    def __init__(self, seconds: int, coordinator: str = "", processes: int = 0):
        self.seconds = seconds
        self._coordinator = coordinator
        self._processes = processes

    def end(self) -> None:
        """Says what is missing and ends this process, from whatever thread."""
        print(
            f"Error: not all processes of the run have joined within --init_timeout={self.seconds} "
            f"seconds: {self._find_reason()}",
            file=sys.stderr,
            flush=True,
        )
        # The main thread waits inside of JAX, where no exception reaches it.
        os._exit(os.EX_TEMPFAIL)

    def _find_reason(self) -> str:
        if not self._coordinator:
            return (
                "the cluster names more processes than have started, or they cannot reach the "
                "first one. See the logs of the others."
            )
        host, _, port = self._coordinator.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                pass
        except OSError as error:
            return (
                f"--coordinator={self._coordinator} does not answer ({error}). It must be the "
                "address of the machine of --process=0, with a port that the others can reach."
            )
        return (
            f"--coordinator={self._coordinator} answers, but some of --processes="
            f"{self._processes} are missing. Each --process from 0 to {self._processes - 1} must "
            "be started once."
        )


def _check_port(coordinator: str) -> None:
    """Refuses a port that another program listens at: JAX would crash without a word."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"--coordinator={coordinator}: port {port} of this machine cannot be used ({error}). "
            "Choose another one."
        ) from error


def _initialize(
    missing: _MissingProcesses,
    heartbeat_timeout: int,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Starts `jax.distributed`, which asks the cluster for each argument that is None."""
    timer = threading.Timer(missing.seconds, missing.end)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            initialization_timeout=missing.seconds + _MARGIN,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if coordinator:
            raise ConfigError(
                f"--coordinator={coordinator} --processes={processes} --process={process}: the "
                f"processes cannot join ({reason})."
            ) from error
        # Nothing in the environment names a cluster, or the cluster does not answer.
        raise ConfigError(
            f"--distributed: no cluster is known here ({reason}). Say who is who by "
            "--coordinator=HOST:PORT --processes=N --process=I."
        ) from error
    finally:
        timer.cancel()
    logging.info(
        "Process %d of %d, with %d devices in all.",
        jax.process_index(),
        jax.process_count(),
        jax.device_count(),
    )
    check_devices(Counter(device.process_index for device in jax.devices()))


def check_devices(counts: Mapping[int, int]) -> None:
    """Refuses processes with different numbers of devices, which JAX and Orbax cannot let wait for
    each other.

    Args:
        counts: Process -> number of its devices.

    Raises:
        ConfigError: The numbers differ.
    """
    if len(set(counts.values())) < 2:
        return
    listed = ", ".join(f"process {process}: {count}" for process, count in sorted(counts.items()))
    raise ConfigError(
        f"The processes have different numbers of devices ({listed}). Start them on machines of "
        "one kind, or let each see as many as the others (CUDA_VISIBLE_DEVICES)."
    )
