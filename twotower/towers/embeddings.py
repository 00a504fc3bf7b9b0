"""Embedding tables: fresh rows, lookups, and means of rows.

Tables are plain arrays outside Flax, updated by `twotower.kernels.sparse_update`. Row 0 of every
table is padding and zero.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twotower.core.mesh import ROW_MULTIPLE, DeviceGroup
from twotower.kernels.sparse_update import PADDING, take_rows


def padded_rows(rows: int, devices: int = 1) -> int:
    """Returns the number of rows allocated for `rows` used ones.

    Args:
        rows: Used rows of a table.
        devices: Number of devices that the table is divided over.
    """
    # Divisible over any usual number of devices, so that a checkpoint fits onto another mesh as it
    # is; 3 devices need some more.
    multiple = math.lcm(ROW_MULTIPLE, devices)
    return -(-rows // multiple) * multiple


def blank_from(array: jax.Array, rows: int, *, start: int | Int[Array, ""] = 0) -> jax.Array:
    """Returns an array [C, ...] with zeros from row `rows` of the table on.

    Such are all rows that some numbers of devices need and others do not: checkpoints may have or
    lack them.

    Args:
        array: Rows [start, start + C) of a table, or their slots.
        rows: Number of rows that keep their values.
        start: First row; may be traced.
    """
    is_kept = start + jnp.arange(len(array)) < rows
    return jnp.where(is_kept.reshape(-1, *[1] * (array.ndim - 1)), array, 0)


def init_table(
    key: jax.Array,
    rows: int,
    width: int,
    *,
    start: int | Int[Array, ""] = 0,
    count: int | None = None,
    norm: float = 1.0,
) -> Float[Array, "C D"]:
    """Draws rows [start, start + count) of a table: normal numbers, row 0 zero.

    The values of a row depend on the key and its number alone. So each device of a mesh makes its
    own part of the table that one device would make, and a larger table begins with the rows of a
    smaller one.

    Args:
        key: Random key of the table.
        rows: Used rows of the whole table, which has `padded_rows(rows)`.
        width: D.
        start: First row to make; may be traced, such as `axis_index * count` inside a `shard_map`.
        count: C; None makes all padded rows.
        norm: Expected norm of a row.
    """
    if count is None:
        count = padded_rows(rows)
    # Filled chunk by chunk: the peak of memory is the result and one chunk, not a table of random
    # bits beside it.
    chunk = min(count, ROW_MULTIPLE)

    def draw_row(row: Int[Array, ""]) -> jax.Array:
        # A vector of `width` normal numbers has norm sqrt(width), about.
        values = norm * width**-0.5 * jax.random.normal(jax.random.fold_in(key, row), (width,))
        return jnp.where(row == PADDING, 0.0, values)

    def fill(i: Int[Array, ""], table: jax.Array) -> jax.Array:
        # The last chunk ends with the table and makes some rows of the one before once more.
        offset = jnp.minimum(i * chunk, count - chunk)
        rows = jax.vmap(draw_row)(start + offset + jnp.arange(chunk))
        return jax.lax.dynamic_update_slice(table, rows, (offset, 0))

    # Zero by way of `start`: inside a `shard_map` the loop's first value must vary over the mesh as
    # its others do.
    empty = jnp.full((count, width), start * 0, jnp.result_type(float))
    return jax.lax.fori_loop(0, -(-count // max(chunk, 1)), fill, empty)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns the rows of `ids`; NaN for an id past the end or negative, which stops training,
    instead of some other row."""
    # Negative indices would count from the end of the table.
    rows = jnp.where(ids < 0, len(table), ids)
    return take_rows(table, rows, jnp.nan)


def lookup_rows(
    table: Float[Array, "Vd E"],
    ids: Int[Array, "M"],
    all_ids: Int[Array, "nM"],
    group: DeviceGroup,
) -> Float[Array, "M E"]:
    """Returns the rows of `ids` in a table that is divided over devices; NaN as in `lookup`.

    Each device reads, for all devices, the rows that it holds; a reduce-scatter brings them to
    the devices that look them up. The rows move, never the table.

    Args:
        table: The Vd rows that this device holds.
        ids: Rows of the whole table that this device looks up.
        all_ids: `group.all_gather(ids)`.
        group: The devices.
    """
    if not group.axis:
        return lookup(table, ids)
    local = group.local_rows(all_ids, len(table))
    # Rows of other devices are 0 here, so that each sum has one term: the row itself, to the bit.
    rows = group.scatter_sum(take_rows(table, local, 0.0))
    exists = (ids >= 0) & (ids < len(table) * group.size)
    return jnp.where(exists[:, None], rows, jnp.nan)


def pool(rows: Float[Array, "... L D"], ids: Int[Array, "... L"]) -> Float[Array, "... D"]:
    """Averages the rows whose id is not padding; zero if all are padding."""
    # Row 0 is zero, but must not count in the mean; nor may its gradient be anything but 0.
    valid = (ids != PADDING)[..., None]
    count = jnp.maximum(valid.sum(-2), 1)
    return jnp.where(valid, rows, 0.0).sum(-2) / count.astype(rows.dtype)
