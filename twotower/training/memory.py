"""Memory of a run on each device: logged before anything is allocated, and refused if it cannot
fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from twotower.core.errors import ConfigError


def check_memory(mesh: Mesh, state: Any, resident: Mapping[str, int]) -> None:
    """Logs the bytes on each device of a mesh, and refuses a run that needs more than are free.

    Args:
        mesh: Devices of the run.
        state: `TrainState` of `jax.ShapeDtypeStruct` with shardings.
        resident: Name -> bytes that every device holds whole, such as data.

    Raises:
        ConfigError: The run does not fit; the message has the arithmetic.
    """
    lines = _state_lines(state, mesh.size)
    lines += [f"{name}: {_format_bytes(count)}" for name, count in resident.items() if count]
    # Activations and temporary arrays are left out: their size is known only after compiling.
    needed = _bytes_on_each(state) + sum(resident.values())
    devices = "device" if mesh.size == 1 else "devices"
    total = f"{_format_bytes(needed)} on each of {mesh.size} {devices}"
    parts = "; ".join(lines)
    logging.info("Memory before activations: %s (%s).", total, parts)
    limit = _free_bytes(mesh)
    if limit is not None and needed > limit:
        factor = -(-needed // max(limit, 1))
        raise ConfigError(
            f"The run needs {total}, and {_format_bytes(limit)} is free. It holds: {parts}. "
            f"Divide the tables over more devices (about {factor * mesh.size}), choose "
            "config.training.tables.kind='rowwise_adagrad' (one number of state a row), narrower "
            "embeddings (embedding_size) or fewer rows (min_count)."
        )


def fits(mesh: Mesh, state: Any) -> bool:
    """Returns whether each device of a mesh has room for its part of a state; see
    `check_memory`."""
    limit = _free_bytes(mesh)
    return limit is None or _bytes_on_each(state) <= limit


def _bytes_on_each(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # A replicated array is whole on each device, a sharded one in part.
        part = leaf.sharding.shard_shape(leaf.shape)
        # In int64: a table of 2^31 numbers is no rarity.
        total += int(np.prod(part, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def _state_lines(state: Any, devices: int) -> list[str]:
    """Returns a line for each table, and for each kind of other array."""
    lines = []
    for name, table in state.tables.items():
        rows, width = table.shape
        size = _format_bytes(_bytes_on_each(state.table_slots[name]) + _bytes_on_each(table))
        lines.append(
            f"table {name}: {rows:,} x {width} and its optimizer's state over {devices} = {size}"
        )
    dense = (state.params, state.opt_state, state.batch_stats)
    lines.append(f"dense parameters and their optimizer: {_format_bytes(_bytes_on_each(dense))}")
    sampling = (state.frequency, state.negatives)
    lines.append(f"frequencies and kept negatives: {_format_bytes(_bytes_on_each(sampling))}")
    return lines


def _free_bytes(mesh: Mesh) -> int | None:
    """Returns the bytes that one device may use; None if the machine does not say."""
    # Devices of other processes cannot be asked for their memory.
    process = jax.process_index()
    devices = [device for device in mesh.devices.flat if device.process_index == process]
    if devices[0].platform != "cpu":
        stats = devices[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    # Devices of a CPU share its memory. "Available" includes the system's cache of files, such as
    # the log that was just read.
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            # In KiB.
            return int(line.split()[1]) * 1024 // len(devices)
    return None


def _format_bytes(count: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
