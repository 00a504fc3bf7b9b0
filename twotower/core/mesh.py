"""The devices of a run as one flat mesh, what a step does across them, and where each array of the
state lives.

The batch and the rows of every table and of its slots are divided over the axis; all else is
replicated. A step is one `shard_map`: its functions take a `DeviceGroup`, whose operations are
collectives there and the identity on a single device, so that one code serves both and can be run
and tested without a mesh.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from twotower.config import TrainingConfig
from twotower.core.errors import ConfigError
from twotower.towers.embeddings import ROW_MULTIPLE, lookup, take_rows

AXIS = "devices"
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()

# (path of an array of the state, how it is divided): the first that matches decides.
STATE_SHARDING = ((r"^(tables|table_slots)/", SHARDED), (r"^[a-z_]+(/|$)", REPLICATED))


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
    """The devices that run a step together. Without an axis there is one, and every operation is
    the identity."""

    axis: str | None = None
    size: int = 1

    def index(self) -> Any:
        """Which of the devices this is."""
        return jax.lax.axis_index(self.axis) if self.axis else 0

    def gather(self, x: jax.Array) -> jax.Array:
        """All devices' x, one after the other along the first axis; its gradient goes back to the
        device of each part."""
        return jax.lax.all_gather(x, self.axis, tiled=True) if self.axis else x

    def all_gather(self, x: jax.Array) -> jax.Array:
        """As `gather`, for what needs no gradient; the result is known to be the same
        everywhere."""
        return jax.lax.all_gather(x, self.axis, tiled=True, to="invarying") if self.axis else x

    def sum(self, tree: Any) -> Any:
        """The sum over devices."""
        return jax.lax.psum(tree, self.axis) if self.axis else tree

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """The sum over devices, of which each keeps its part of the first axis."""
        return (
            jax.lax.psum_scatter(x, self.axis, scatter_dimension=0, tiled=True) if self.axis else x
        )

    def pvary(self, tree: Any) -> Any:
        """A replicated tree as one that each device differentiates alone, so that one `sum`
        completes the gradient."""
        return (
            jax.tree.map(lambda x: jax.lax.pcast(x, self.axis, to="varying"), tree)
            if self.axis
            else tree
        )

    def part(self, x: jax.Array) -> jax.Array:
        """This device's part of an array that all have whole; its first axis must be a multiple of
        the size."""
        if not self.axis:
            return x
        length = x.shape[0] // self.size
        return jax.lax.dynamic_slice_in_dim(x, self.index() * length, length)

    def places(self, length: int) -> Int[Array, "length"]:
        """The numbers of this device's `length` rows among all devices' rows."""
        return self.index() * length + jnp.arange(length, dtype=jnp.int32)


SINGLE_DEVICE = DeviceGroup()


def lookup_rows(
    table: Float[Array, "Vd E"],
    ids: Int[Array, "M"],
    everyone: Int[Array, "nM"],
    group: DeviceGroup,
) -> Float[Array, "M E"]:
    """The rows of `ids` in a table of which each device holds Vd rows; NaN for an id past the end,
    or negative.

    Each device finds, for all devices, the rows that it holds; a reduce-scatter brings them to
    those who asked. What moves is the size of the rows asked for, never of the table.

    Args:
        everyone: `group.all_gather(ids)`.
    """
    if not group.axis:
        return lookup(table, ids)
    mine = localise(everyone, len(table), group)
    found = group.scatter_sum(take_rows(table, mine, 0.0))
    exists = (ids >= 0) & (ids < len(table) * group.size)
    return jnp.where(exists[:, None], found, jnp.nan)


def localise(ids: Int[Array, "M"], rows: int, group: DeviceGroup) -> Int[Array, "M"]:
    """Row numbers of a whole table as those of this device's `rows`; `rows`, which is past the end,
    for others' rows."""
    local = ids - group.index() * rows
    return jnp.where((local >= 0) & (local < rows), local, rows)


def make_mesh(devices: int = 0) -> Mesh:
    """A flat mesh over all devices of all processes, or over the first `devices` of a single
    process.

    Raises:
        ConfigError: the number does not divide the devices there are, or the rows of tables.
    """
    known = jax.devices()
    count = devices or len(known)
    if count < 1 or len(known) % count or ROW_MULTIPLE % count:
        fits = [
            n for n in range(1, len(known) + 1) if len(known) % n == 0 and ROW_MULTIPLE % n == 0
        ]
        raise ConfigError(
            f"--devices={devices or count} must divide the {len(known)} devices here, and {ROW_MULTIPLE}, by which table rows "
            f"are padded. Choose one of {', '.join(map(str, fits))}."
        )
    if jax.process_count() > 1 and count != len(known):
        raise ConfigError(
            f"--devices={devices}: with several processes all {len(known)} devices take part; leave it out."
        )
    return Mesh(np.asarray(known[:count]), (AXIS,))


def host_mesh() -> Mesh:
    """The memory of this machine as a mesh of one device, for what is to be made without an
    accelerator."""
    return Mesh(np.asarray(jax.local_devices(backend="cpu")[:1]), (AXIS,))


def group_of(mesh: Mesh) -> DeviceGroup:
    """The group inside `shard_map` over `mesh`; alone where it has one device, whose program needs
    no collectives."""
    return DeviceGroup(AXIS, mesh.size) if mesh.size > 1 else SINGLE_DEVICE


def state_specs(state: Any, rules: Sequence[tuple[str, PartitionSpec]] = STATE_SHARDING) -> Any:
    """The partition of each array of a state.

    Raises:
        ValueError: no rule covers an array.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = "/".join(
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
        )
        for pattern, found in rules:
            if re.match(pattern, name):
                return found
        raise ValueError(f"No rule of the sharding covers {name!r}.")

    return jax.tree_util.tree_map_with_path(spec, state)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Partitions as shardings of `mesh`."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def put(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Host arrays, which every process has alike, on the devices of `mesh`: each process copies
    only what its devices hold."""
    sharding = NamedSharding(mesh, spec)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        if mesh.is_multi_process:
            with jax.transfer_guard(
                "allow"
            ):  # meant, which this way of doing it cannot say of itself
                return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree)


def put_parts(mesh: Mesh, tree: Any, spec: PartitionSpec, rows: int, axis: int) -> Any:
    """Each process's part of host arrays that together have `rows` along `axis`, on the devices of
    `mesh`."""
    sharding = NamedSharding(mesh, spec)

    def put(x: Any) -> jax.Array:
        shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
        if mesh.is_multi_process:
            with jax.transfer_guard("allow"):  # see `place`
                return jax.make_array_from_process_local_data(sharding, x, shape)
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree)


def process_part(mesh: Mesh, rows: int) -> slice:
    """Which of the `rows` of a batch this process's devices work on; they are one after the other
    in the mesh."""
    own = [
        i
        for i, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]
    return slice(own[0] * rows // mesh.size, (own[-1] + 1) * rows // mesh.size)


def shard_map_if_needed(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` of local arrays as one of global arrays."""
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def compiler_options(mesh: Mesh | None) -> dict[str, bool]:
    """What makes a program of `mesh` (None: of the default device) give the same bits in every run.

    A GPU otherwise adds in any order to one place, and XLA chooses its products by timing them.
    """
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    return {"xla_gpu_deterministic_ops": True} if platform == "gpu" else {}


def check_batch(training: TrainingConfig, mesh: Mesh) -> None:
    """Refuses a batch that cannot be divided evenly over the devices, or on each into the parts it
    is to be computed in."""
    size, parts = training.batch_size, training.accumulate
    if size % mesh.size:
        below = size // mesh.size * mesh.size
        near = f"{below} or {below + mesh.size}" if below else f"{mesh.size}"
        raise ConfigError(
            f"config.training.batch_size={size} cannot be divided evenly over {mesh.size} devices: choose {near}, or "
            f"--devices={math.gcd(size, mesh.size)}."
        )
    if size // mesh.size % parts:
        raise ConfigError(
            f"config.training.accumulate={parts} must divide the {size // mesh.size} rows of config.training.batch_size={size} "
            f"that each of {mesh.size} devices has."
        )
