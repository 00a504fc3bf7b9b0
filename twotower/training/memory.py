"""What a run will hold on each device, told before anything is allocated and refused where it
cannot fit."""

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
    """Logs the bytes on each device of `mesh`, and refuses what is more than there is.

    Args:
        state: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.
        resident: name -> bytes that every device holds whole, such as data.

    Raises:
        ConfigError: with the arithmetic.
    """
    lines = [
        *_lines(state, mesh.size),
        *(f"{name}: {_size(count)}" for name, count in resident.items() if count),
    ]
    needed = _bytes_on_each(state) + sum(resident.values())
    total = f"{_size(needed)} on each of {mesh.size} device{'s' if mesh.size > 1 else ''}"
    logging.info("Memory before activations: %s (%s).", total, "; ".join(lines))
    limit = _limit(mesh)
    if limit is not None and needed > limit:
        more = -(-needed // max(limit, 1))
        raise ConfigError(
            f"The run needs {total}, and {_size(limit)} is free. It holds: {'; '.join(lines)}. Divide the tables over more "
            f"devices (about {more * mesh.size}), choose config.training.tables.kind='rowwise_adagrad' (one number of state a "
            "row), narrower embeddings (embedding_size) or fewer rows (min_count)."
        )


def fits(mesh: Mesh, state: Any) -> bool:
    """Whether each device of `mesh` has room for its part of `state`; see `check_memory`."""
    limit = _limit(mesh)
    return limit is None or _bytes_on_each(state) <= limit


def _bytes_on_each(tree: Any) -> int:
    def count(x: Any) -> int:
        return int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize

    return sum(count(x) for x in jax.tree.leaves(tree))


def _lines(state: Any, devices: int) -> list[str]:
    parts = {
        "dense parameters and their optimizer": (state.params, state.opt_state, state.batch_stats)
    }
    parts |= {"frequencies and kept negatives": (state.frequency, state.negatives)}
    lines = []
    for name, table in state.tables.items():
        rows, width = table.shape
        slots = _bytes_on_each(state.table_slots[name]) + _bytes_on_each(table)
        lines.append(
            f"table {name}: {rows:,} x {width} and its optimizer's state over {devices} = {_size(slots)}"
        )
    return lines + [f"{name}: {_size(_bytes_on_each(tree))}" for name, tree in parts.items()]


def _limit(mesh: Mesh) -> int | None:
    """Bytes that one device may use; None where the machine does not say."""
    devices = [
        device for device in mesh.devices.flat if device.process_index == jax.process_index()
    ]
    if devices[0].platform != "cpu":
        stats = devices[0].memory_stats() or {}
        return (
            stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
        )
    # Devices of a CPU share its memory. What the system keeps of files, such as the log just read,
    # is free as well.
    known = Path("/proc/meminfo")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // len(devices)
    return None


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
