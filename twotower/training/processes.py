"""Several processes as one run, by `jax.distributed`."""

from __future__ import annotations

import jax
from absl import logging

from twotower.core.errors import ConfigError


def join(coordinator: str, processes: int, process: int, *, cluster: bool = False) -> None:
    """Joins the other processes of a run; does nothing for a run of one.

    It must come before any other use of JAX.

    Args:
        coordinator: HOST:PORT of process 0; empty for a single process, or if the cluster knows it.
        processes: Number of processes.
        process: Number of this process, from 0.
        cluster: Whether to ask the cluster (Cloud TPU, Slurm, Kubernetes, Open MPI) for all three.

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
        if cluster:
            _initialize()
        return
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} must be from 0 to --processes={processes} less 1.")
    if ":" not in coordinator or not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476.")
    _initialize(coordinator, processes, process)


def _initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Starts `jax.distributed`, which asks the cluster for each argument that is None."""
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator, num_processes=processes, process_id=process
        )
    except ValueError as error:
        # Neither the environment nor an argument names a cluster.
        raise ConfigError(
            f"--distributed: no cluster is known here ({str(error).splitlines()[0]}). Say who is "
            "who by --coordinator=HOST:PORT --processes=N --process=I."
        ) from error
    logging.info(
        "Process %d of %d, with %d devices in all.",
        jax.process_index(),
        jax.process_count(),
        jax.device_count(),
    )
