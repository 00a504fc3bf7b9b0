"""Updates of embedding tables that touch only the rows a batch used.

Autodiff through `table[ids]` gives a gradient as large as the table, and an optimizer then walks
all of it: 1.5 s a step at ten million rows, against 1 ms for the rows that were used. So a step
looks rows up first and differentiates with respect to the rows; `apply_gradients` then sums the
gradients of equal ids and updates those rows alone. With the table donated, the cost does not
depend on its size. `apply_gradients_densely` is the plain reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from twotower.core.arrays import multiply_shift

# Row 0 of every table is padding: it is zero, and no update reaches it.
PADDING = 0
# XLA for CPUs copies gathered rows of 32 to 64 numbers two to three times as fast when it sees them
# as groups of 8.
_FOLD = 8
# Hash buckets for each id of a batch: few enough for the cache, and most ids are alone in theirs.
_HASH_SLOTS = 8
# Sums that one round of `merge_by_sorting` adds up.
_SUMS_PER_ROUND = 4

# Arrays that an optimizer keeps beside a table, each with one entry for every row.
Slots = dict[str, jax.Array]
# A number, of Python or traced.
Scalar = float | jax.Array


class TableOptimizer(NamedTuple):
    """An optimizer that updates some rows of a table.

    Attributes:
        init: (table [V, D], initial accumulator) -> slots, arrays with V rows.
        update: (table, slots, rows [M], gradients [M, D], learning rate, steps so far) -> (table,
            slots). Rows are distinct, and those from V on are ignored. Where there are as many as
            the table has (M = V), entry i holds row i or an ignored one.
    """

    init: Callable[[jax.Array, float], Slots]
    update: Callable[
        [jax.Array, Slots, jax.Array, jax.Array, Scalar, Scalar], tuple[jax.Array, Slots]
    ]


def apply_gradients(
    optimizer: TableOptimizer,
    table: Float[Array, "V D"],
    slots: Slots,
    ids: Int[Array, "N"],
    grads: Float[Array, "N D"],
    rate: Scalar,
    step: Scalar,
    *,
    first: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "V D"], Slots, Float[Array, ""]]:
    """Updates the rows that a batch used; all other rows, and padding, keep their bits.

    Args:
        optimizer: One of `twotower.kernels.table_optimizers.TABLE_OPTIMIZERS`.
        table: Rows [first, first + V) of the whole table.
        slots: The optimizer's arrays for these rows.
        ids: Rows of the whole table, with duplicates; those that other devices hold are ignored.
        grads: Gradient of each use of an id.
        rate: Learning rate.
        step: Number of steps done before this one.
        first: First row of the whole table that `table` holds.

    Returns:
        The table, the slots, and the squared norm of the gradient of these rows.
    """
    # Summed before the optimizer: Adagrad squares the gradient of a row, not of each use of it.
    rows, merged = merge_duplicates(ids, grads, len(table), first=first)
    table, slots = optimizer.update(table, slots, rows, merged, rate, step)
    return table, slots, jnp.sum(jnp.square(merged))


def apply_gradients_densely(
    optimizer: TableOptimizer,
    table: Float[Array, "V D"],
    slots: Slots,
    ids: Int[Array, "N"],
    grads: Float[Array, "N D"],
    rate: Scalar,
    step: Scalar,
) -> tuple[Float[Array, "V D"], Slots, Float[Array, ""]]:
    """Returns the result of `apply_gradients`, by a gradient as large as the table: the plain
    reference."""
    summed = jnp.zeros_like(table).at[ids].add(grads).at[PADDING].set(0.0)
    # A row whose gradient is 0 was used all the same: the moments of Adam move it.
    used = jnp.zeros(len(table), bool).at[ids].set(True).at[PADDING].set(False)
    rows = _rows_by_entry(used, ids.dtype)
    table, slots = optimizer.update(table, slots, rows, summed, rate, step)
    return table, slots, jnp.sum(jnp.square(summed))


def take_rows(array: Float[Array, "V ..."], rows: Int[Array, "..."], fill: float) -> jax.Array:
    """Returns `array[rows]`, and `fill` for rows from V on."""

    def take(array: jax.Array) -> jax.Array:
        return array.at[rows].get(mode="fill", fill_value=fill)

    def take_folded(array: jax.Array) -> jax.Array:
        folded = array.reshape(len(array), -1, _FOLD)
        return take(folded).reshape(*rows.shape, -1)

    if array.ndim != 2 or array.shape[1] % _FOLD:
        return take(array)
    return jax.lax.platform_dependent(array, cpu=take_folded, default=take)


def merge_duplicates(
    ids: Int[Array, "N"],
    grads: Float[Array, "N D"],
    num_rows: int,
    *,
    first: int | Int[Array, ""] = 0,
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """Sums the gradients of equal ids.

    Args:
        ids: Rows of the whole table. Padding, and rows outside [first, first + num_rows), which
            other devices hold, have no part in the result.
        grads: Gradient of each use of an id.
        num_rows: V, rows that this device holds.
        first: The first of them.

    Returns:
        rows [M]: each distinct id once, less `first`. Entries left over hold distinct rows from V
            on, which a scatter in mode "drop" ignores, so that `unique_indices` is true. M is N;
            for a table of at most N rows, M is V and entry i holds row i or none: the update then
            passes over the whole table.
        grads [M, D]: the summed gradient of `rows`; 0 in the entries left over.
    """
    # Every device merges the ids of all devices and keeps those of its own rows: no update of a row
    # is split, and none is made twice.
    owned = (ids != PADDING) & (ids >= first) & (ids < first + num_rows)
    # Never -1 for "none": a negative index wraps around to the last row.
    local = jnp.where(owned, ids - first, num_rows).astype(ids.dtype)
    # A CPU adds one number after the other, in a fixed order; a GPU does not.
    hashing = functools.partial(merge_by_hashing, num_rows=num_rows)
    sorting = functools.partial(merge_by_sorting, num_rows=num_rows)
    return jax.lax.platform_dependent(local, grads, cpu=hashing, default=sorting)


# Jitted, so that tables of one shape, and programs after the first, do not trace it again.
@functools.partial(jax.jit, static_argnames="num_rows")
def merge_by_hashing(
    local: Int[Array, "N"], grads: Float[Array, "N D"], *, num_rows: int
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """Merges by adding each gradient to the sum of its row, as a CPU does fastest.

    Args:
        local: Rows in [0, num_rows]; `num_rows` itself is no row.
        grads: Gradient of each.
        num_rows: V.

    Returns:
        Rows and their sums, as `merge_duplicates` does.
    """
    count = local.size
    if num_rows <= count:
        # A table smaller than the batch: its rows themselves are the slots.
        used = jnp.zeros(num_rows, bool).at[local].set(True, mode="drop")
        rows = _rows_by_entry(used, local.dtype)
        slot = local
        count = num_rows
    else:
        slot, rows = slots_by_hashing(local, num_rows=num_rows)
    sums = jnp.zeros((count, grads.shape[1]), grads.dtype)
    return rows, sums.at[slot].add(grads, mode="drop")


def slots_by_hashing(
    local: Int[Array, "N"], *, num_rows: int
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """Assigns one slot among N to equal rows, in a sixth of the time of sorting on a CPU.

    Of the rows that a hash function sends to one bucket, the last in the batch takes it, and with
    it all that equal it; the others are hashed once more, by another function, until none is left.

    Returns:
        The slot of each row, which is the position of its last occurrence in the batch, N for no
        row; and the row of each slot, distinct rows past the end where a slot is not used.
    """
    count = local.size
    # A power of two, whose bits the multiplicative hash takes from the top.
    bits = (_HASH_SLOTS * count - 1).bit_length()
    positions = jnp.arange(count, dtype=local.dtype)

    def settle(slot: jax.Array, multiplier: jax.Array) -> tuple[jax.Array, jax.Array]:
        bucket = multiply_shift(local.astype(jnp.uint32), multiplier, bits).astype(jnp.int32)
        # Rows that have a slot claim none.
        claimed = jnp.where(slot < 0, bucket, 2**bits)
        # The maximum does not depend on the order in which a scatter writes: the same slots in
        # every run.
        last = jnp.zeros(2**bits, local.dtype).at[claimed].max(positions, mode="drop")[bucket]
        slot = jnp.where((slot < 0) & (local[last] == local), last, slot)
        # The product of odd numbers is odd: every round has a hash function of its own.
        return slot, multiplier * jnp.uint32(747796405)

    def unsettled(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (carry[0] < 0).any()

    # Made of `local`, so that the loop's first value varies over a mesh as its others do.
    none = jnp.full_like(local, -1) + 0 * local
    # Odd, and 2^32 / the golden ratio: multiples are spread evenly (Knuth).
    start = (none, jnp.uint32(2654435769))
    slot, _ = jax.lax.while_loop(unsettled, lambda carry: settle(*carry), start)
    is_row = local < num_rows
    # The position that gave a slot its number holds its row; all other entries are distinct
    # fillers.
    rows = jnp.where((slot == positions) & is_row, local, num_rows + positions)
    return jnp.where(is_row, slot, count), rows


@functools.partial(jax.jit, static_argnames="num_rows")
def merge_by_sorting(
    local: Int[Array, "N"], grads: Float[Array, "N D"], *, num_rows: int
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """Merges by sums of neighbours, of neighbours of neighbours and so on among the sorted rows.

    Two additions that a GPU makes to one number come in any order: sums by scattering would have
    other bits in every run. Arguments and results are those of `merge_by_hashing`.
    """
    positions = jnp.arange(local.size, dtype=local.dtype)
    # A stable sort: the gradients of a row are added in the order of the batch, in every run.
    ordered, order = jax.lax.sort((local, positions), num_keys=1)
    sums = grads[order]
    span = 1
    while span < local.size:
        neighbours = [_earlier_sums(ordered, sums, i * span) for i in range(1, _SUMS_PER_ROUND)]
        # A barrier, or XLA would make one kernel of all rounds, each of which reads the one before
        # several times.
        sums = jax.lax.optimization_barrier(sum(neighbours) + sums)
        span *= _SUMS_PER_ROUND
    # The last of equal rows has the sum of all of them.
    is_last = jnp.append(ordered[1:] != ordered[:-1], True)
    kept = is_last & (ordered < num_rows)
    rows = jnp.where(kept, ordered, num_rows + positions)
    sums = jnp.where(kept[:, None], sums, 0.0)
    if num_rows > local.size:
        return rows, sums
    # A table smaller than the batch: entry i must be row i, as the update expects.
    used = jnp.zeros(num_rows, bool).at[rows].set(True, mode="drop", unique_indices=True)
    by_row = jnp.zeros((num_rows, grads.shape[1]), grads.dtype)
    by_row = by_row.at[rows].set(sums, mode="drop", unique_indices=True)
    return _rows_by_entry(used, local.dtype), by_row


def _earlier_sums(
    ordered: Int[Array, "N"], sums: Float[Array, "N D"], distance: int
) -> Float[Array, "N D"]:
    """Returns the sums `distance` entries before each, where these are of the same row; else 0."""
    count = max(len(ordered) - distance, 0)
    same = ordered[distance:] == ordered[:count]
    moved = jnp.where(same[:, None], sums[:count], 0.0)
    return jnp.pad(moved, ((len(ordered) - count, 0), (0, 0)))


def _rows_by_entry(used: Bool[Array, "V"], dtype: DTypeLike) -> Int[Array, "V"]:
    """Returns each used row in its own entry, and a row past the end in the others."""
    rows = jnp.arange(len(used), dtype=dtype)
    return jnp.where(used, rows, len(used) + rows)


# Reading and writing rows. Where M = V, entry i of the rows is row i or none: then arrays are
# passed over as a whole, since a scatter that touches most rows is slower than that.


def _is_dense(array: jax.Array, rows: Int[Array, "M"]) -> bool:
    return len(rows) == len(array)


def _update_mask(array: jax.Array, rows: Int[Array, "V"]) -> jax.Array:
    """Returns a mask of the rows that a dense update changes, [V] or [V, 1]."""
    return (rows < len(array)).reshape(-1, *[1] * (array.ndim - 1))


def gather_rows(array: jax.Array, rows: Int[Array, "M"]) -> jax.Array:
    """Returns the rows of a table or of an array beside it."""
    if _is_dense(array, rows):
        return array
    # Rows past the end are entries left over, whose result is dropped again by the write.
    return take_rows(array, rows, 0.0)


def set_rows(array: jax.Array, rows: Int[Array, "M"], values: jax.Array) -> jax.Array:
    """Returns the array with other values in these rows."""
    if _is_dense(array, rows):
        return jnp.where(_update_mask(array, rows), values, array)
    return array.at[rows].set(values, mode="drop", unique_indices=True)


def add_rows(array: jax.Array, rows: Int[Array, "M"], values: jax.Array) -> jax.Array:
    """Returns the array with values added to these rows."""
    if _is_dense(array, rows):
        return jnp.where(_update_mask(array, rows), array + values, array)
    return array.at[rows].add(values, mode="drop", unique_indices=True)
