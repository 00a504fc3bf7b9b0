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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from twotower.core.errors import ConfigError
from twotower.core.fork import check_fork

T = TypeVar("T")
# Devices, or their number alone, for which programs can be traced and never run.
AnyMesh = Mesh | AbstractMesh

AXIS = "devices"
SHARDED = PartitionSpec(AXIS)
REPLICATED = PartitionSpec()

# Rows of sharded arrays are padded to a fixed multiple, not to the device count, so that a
# checkpoint fits nearly any topology as it is. Where the devices do not divide it there are some
# rows more, which are zero; see `twotower.towers.embeddings.padded_rows`.
ROW_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
    """The devices that run a step together.

    Without an axis there is one device, and every operation is the identity.

    Attributes:
        axis: Name of the mesh axis; None on a single device.
        size: Number of devices.
    """

    # None rather than an axis of size 1: collectives need a `shard_map` around them.
    axis: str | None = None
    size: int = 1

    def index(self) -> Any:
        """Returns the number of this device, from 0; an int, or a traced int32 scalar."""
        if not self.axis:
            return 0
        return jax.lax.axis_index(self.axis)

    def gather(self, x: jax.Array) -> jax.Array:
        """Returns all devices' x, one after the other along the first axis.

        Its gradient goes back to the device of each part.
        """
        if not self.axis:
            return x
        # Autodiff turns it into a sum scattered over devices: an item that is a negative of every
        # device gets the gradients of all of them.
        return jax.lax.all_gather(x, self.axis, tiled=True)

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Returns all devices' x like `gather`, without a gradient, as a replicated array."""
        if not self.axis:
            return x
        # `to="invarying"` marks the result as equal on all devices, which outputs of a `shard_map`
        # with a replicated spec must be.
        return jax.lax.all_gather(x, self.axis, tiled=True, to="invarying")

    def sum(self, tree: T) -> T:
        """Returns the sum over devices of each array."""
        if not self.axis:
            return tree
        return jax.lax.psum(tree, self.axis)

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """Returns this device's part, along the first axis, of the sum over devices."""
        if not self.axis:
            return x
        # Each device receives its own part alone; a `psum` would move the whole sum to all of them.
        return jax.lax.psum_scatter(x, self.axis, scatter_dimension=0, tiled=True)

    def pvary(self, tree: T) -> T:
        """Returns a replicated tree as one that each device differentiates alone.

        One `sum` then completes the gradient.
        """
        if not self.axis:
            return tree
        # Without the cast, whether JAX itself inserts a sum into the gradient depends on its checks
        # of replication; with it, the one `sum` of the caller is right either way.
        return jax.tree.map(lambda x: jax.lax.pcast(x, self.axis, to="varying"), tree)

    def part(self, x: jax.Array) -> jax.Array:
        """Returns this device's part of an array that all have whole.

        Args:
            x: Array whose first axis has a length that is a multiple of `size`.
        """
        if not self.axis:
            return x
        # Shapes are static under `jit`; the start alone is traced.
        length = x.shape[0] // self.size
        return jax.lax.dynamic_slice_in_dim(x, self.index() * length, length)

    def row_numbers(self, length: int) -> Int[Array, "length"]:
        """Returns the numbers of this device's `length` rows among all devices' rows."""
        # The mesh is flat and parts are contiguous, so that parts joined in order are the array.
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
        # Never a negative row: JAX would count it from the end.
        return jnp.where((local >= 0) & (local < length), local, length)


SINGLE_DEVICE = DeviceGroup()


def make_mesh(devices: int = 0) -> Mesh:
    """Returns a flat mesh over all devices of all processes.

    Args:
        devices: Number of devices to use, the first ones of a single process; 0 uses all.

    Raises:
        ConfigError: The number does not divide the devices there are.
        ForkError: The process was forked from one that had used JAX.
    """
    check_fork()
    # Of all processes: a mesh covers the same devices in each of them.
    known = jax.devices()
    count = devices or len(known)
    if count < 1 or len(known) % count:
        fits = [str(n) for n in range(1, len(known) + 1) if len(known) % n == 0]
        raise ConfigError(
            f"--devices={devices} must divide the {len(known)} devices here. Choose one of "
            f"{', '.join(fits)}."
        )
    # The first ones could all belong to one process, and the others would have no part in a step.
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
    # The same axis name, so that specs written for the accelerators hold here.
    return Mesh(np.asarray(jax.local_devices(backend="cpu")[:1]), (AXIS,))


def device_group(mesh: AnyMesh) -> DeviceGroup:
    """Returns the group of the devices of `mesh`, for use inside `shard_map`.

    A mesh of one device is `SINGLE_DEVICE`, whose program needs no collectives.
    """
    if mesh.size == 1:
        return SINGLE_DEVICE
    return DeviceGroup(AXIS, mesh.size)


def shardings(mesh: AnyMesh, specs: Any) -> Any:
    """Returns a tree of `PartitionSpec` as shardings of `mesh`."""
    # A PartitionSpec is a leaf of a tree, although it has parts.
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def put(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Returns host arrays as arrays on the devices of `mesh`.

    Each process copies only the parts that its devices hold.

    Args:
        mesh: Devices.
        tree: Host arrays, equal in every process.
        spec: Partition of each of them.
    """
    sharding = NamedSharding(mesh, spec)

    def put_array(x: Any) -> jax.Array:
        # An array of another device comes to the host first.
        x = np.asarray(x)
        if not mesh.is_multi_process:
            return jax.device_put(x, sharding)
        # This way of copying is explicit, but JAX takes it for an implicit transfer.
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_array, tree)


def put_parts(mesh: Mesh, tree: Any, spec: PartitionSpec, axis: int) -> Any:
    """Returns each process's parts of arrays as global arrays on the devices of `mesh`.

    Args:
        mesh: Devices.
        tree: Host arrays, the parts of this process.
        spec: Partition of each of them.
        axis: Axis that is divided over processes, of the same length on each device.
    """
    sharding = NamedSharding(mesh, spec)

    def put_array(x: Any) -> jax.Array:
        if not mesh.is_multi_process:
            return jax.device_put(x, sharding)
        # Process-local arrays have their own rows along `axis`; the global shape has those of all.
        length = x.shape[axis] // len(mesh.local_devices) * mesh.size
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        # Explicit too, as in `put`.
        with jax.transfer_guard("allow"):
            return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put_array, tree)


def process_part(mesh: Mesh, rows: int) -> slice:
    """Returns the rows of a batch that the devices of this process work on.

    The devices of a process follow each other in the mesh.

    Args:
        mesh: Devices of all processes.
        rows: Number of rows of the whole batch.
    """
    process = jax.process_index()
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == process]
    # Rows are a multiple of the devices, so both divisions are exact.
    start = own[0] * rows // mesh.size
    stop = (own[-1] + 1) * rows // mesh.size
    return slice(start, stop)


def shard_map_if_needed(
    mesh: AnyMesh, function: Callable, in_specs: Any, out_specs: Any
) -> Callable:
    """Returns a function of local arrays as one of global arrays.

    On a mesh of one device they are the same, and the function is returned as it is.
    """
    # No shard_map: the program is smaller, and can be run without `jit` in a test.
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
    """Returns the options with which a program gives the same bits in every run.

    A GPU otherwise adds numbers to one address in any order, and XLA chooses its algorithms of
    matrix products by timing them.

    Args:
        mesh: Devices of the program; None for the default device.
    """
    # A mesh may lie on the host beside an accelerator, as `host_mesh` does.
    platform = jax.default_backend()
    if mesh:
        platform = mesh.devices.flat[0].platform
    # An option of XLA's GPU compiler.
    if platform != "gpu":
        return {}
    return {"xla_gpu_deterministic_ops": True}
