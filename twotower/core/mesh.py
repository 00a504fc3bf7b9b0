"""The devices of a run as one flat mesh, and the operations of a step across them.

Batches and the rows of large arrays are divided over the one axis; all else is replicated. A step
is one `shard_map`: its functions take a `DeviceGroup`, whose operations are collectives there and
the identity on a single device, so that one code serves both and can be run and tested without a
mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from twotower.core.errors import ConfigError

T = TypeVar("T")

AXIS = "devices"
SHARDED = PartitionSpec(AXIS)
REPLICATED = PartitionSpec()

# Rows of sharded arrays are padded to a fixed multiple, not to the device count, so that a
# checkpoint fits any topology.
ROW_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
    """The devices that run a step together.

    Without an axis there is one device, and every operation is the identity.

    Attributes:
        axis: The name of the mesh axis.
        size: The number of devices.
    """

    axis: str | None = None
    size: int = 1

    def index(self) -> Any:
        """Returns the number of this device, from 0; an int, or a traced int32 scalar."""
        return jax.lax.axis_index(self.axis) if self.axis else 0

    def gather(self, x: jax.Array) -> jax.Array:
        """Returns all devices' x, one after the other along the first axis.

        Its gradient goes back to the device of each part.
        """
        return jax.lax.all_gather(x, self.axis, tiled=True) if self.axis else x

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Returns what `gather` does, without a gradient and known to be the same everywhere."""
        if not self.axis:
            return x
        return jax.lax.all_gather(x, self.axis, tiled=True, to="invarying")

    def sum(self, tree: T) -> T:
        """Returns the sum over devices of each array."""
        return jax.lax.psum(tree, self.axis) if self.axis else tree

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """Returns this device's part, along the first axis, of the sum over devices."""
        if not self.axis:
            return x
        return jax.lax.psum_scatter(x, self.axis, scatter_dimension=0, tiled=True)

    def pvary(self, tree: T) -> T:
        """Returns a replicated tree as one that each device differentiates alone.

        One `sum` then completes the gradient.
        """
        if not self.axis:
            return tree
        return jax.tree.map(lambda x: jax.lax.pcast(x, self.axis, to="varying"), tree)

    def part(self, x: jax.Array) -> jax.Array:
        """Returns this device's part of an array that all have whole.

        Args:
            x: The array; the length of its first axis is a multiple of `size`.
        """
        if not self.axis:
            return x
        length = x.shape[0] // self.size
        return jax.lax.dynamic_slice_in_dim(x, self.index() * length, length)

    def row_numbers(self, length: int) -> Int[Array, "length"]:
        """Returns the numbers of this device's `length` rows among all devices' rows."""
        return self.index() * length + jnp.arange(length, dtype=jnp.int32)

    def local_rows(self, rows: Int[Array, "M"], length: int) -> Int[Array, "M"]:
        """Returns rows of a sharded array as rows of this device's part.

        Args:
            rows: Row numbers in the whole array.
            length: Rows in the part of each device.

        Returns:
            Rows in [0, length); `length`, which is past the end, for rows of other devices.
        """
        local = rows - self.index() * length
        return jnp.where((local >= 0) & (local < length), local, length)


SINGLE_DEVICE = DeviceGroup()


def make_mesh(devices: int = 0) -> Mesh:
    """Returns a flat mesh over all devices of all processes.

    Args:
        devices: The number of devices to use, the first of a single process; 0 uses all.

    Raises:
        ConfigError: The number does not divide the devices there are, or the rows of tables.
    """
    known = jax.devices()
    count = devices or len(known)
    if count < 1 or len(known) % count or ROW_MULTIPLE % count:
        divisors = [n for n in range(1, len(known) + 1) if len(known) % n == 0]
        fits = [str(n) for n in divisors if ROW_MULTIPLE % n == 0]
        raise ConfigError(
            f"--devices={devices or count} must divide the {len(known)} devices here, and "
            f"{ROW_MULTIPLE}, by which table rows are padded. Choose one of {', '.join(fits)}."
        )
    if jax.process_count() > 1 and count != len(known):
        raise ConfigError(
            f"--devices={devices}: with several processes all {len(known)} devices take part; "
            "leave it out."
        )
    return Mesh(np.asarray(known[:count]), (AXIS,))


def host_mesh() -> Mesh:
    """Returns the memory of this machine as a mesh of one device.

    For arrays that are to be made without an accelerator.
    """
    return Mesh(np.asarray(jax.local_devices(backend="cpu")[:1]), (AXIS,))


def device_group(mesh: Mesh) -> DeviceGroup:
    """Returns the group of the devices of `mesh`, for use inside `shard_map`.

    A mesh of one device is `SINGLE_DEVICE`, whose program needs no collectives.
    """
    return DeviceGroup(AXIS, mesh.size) if mesh.size > 1 else SINGLE_DEVICE


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Returns a tree of `PartitionSpec` as shardings of `mesh`."""

    def is_spec(x: Any) -> bool:
        return isinstance(x, PartitionSpec)

    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def put(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Returns host arrays as arrays on the devices of `mesh`.

    Each process copies only the parts that its devices hold.

    Args:
        mesh: The devices.
        tree: Host arrays, which every process has alike.
        spec: The partition of each of them.
    """
    sharding = NamedSharding(mesh, spec)

    def put_array(x: Any) -> jax.Array:
        # What lies on another device comes to the host first.
        x = np.asarray(x)
        if not mesh.is_multi_process:
            return jax.device_put(x, sharding)
        # This way of copying is explicit, but JAX takes it for an implicit transfer.
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_array, tree)


def put_parts(mesh: Mesh, tree: Any, spec: PartitionSpec, rows: int, axis: int) -> Any:
    """Returns each process's parts of arrays as global arrays on the devices of `mesh`.

    Args:
        mesh: The devices.
        tree: Host arrays, the parts of this process.
        spec: The partition of each of them.
        rows: The length of the global arrays along `axis`.
        axis: The axis that is divided over processes.
    """
    sharding = NamedSharding(mesh, spec)

    def put_array(x: Any) -> jax.Array:
        if not mesh.is_multi_process:
            return jax.device_put(x, sharding)
        shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
        with jax.transfer_guard("allow"):  # see `put`
            return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put_array, tree)


def process_part(mesh: Mesh, rows: int) -> slice:
    """Returns the rows of a batch that the devices of this process work on.

    The devices of a process follow each other in the mesh.

    Args:
        mesh: The devices of all processes.
        rows: The rows of the whole batch.
    """
    process = jax.process_index()
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == process]
    start = own[0] * rows // mesh.size
    stop = (own[-1] + 1) * rows // mesh.size
    return slice(start, stop)


def shard_map_if_needed(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns a function of local arrays as one of global arrays.

    On a mesh of one device they are the same, and the function is returned as it is.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
    """Returns the options with which a program gives the same bits in every run.

    A GPU otherwise adds numbers to one address in any order, and XLA chooses its products by timing
    them.

    Args:
        mesh: The devices of the program; None for the default device.
    """
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    return {"xla_gpu_deterministic_ops": True} if platform == "gpu" else {}
