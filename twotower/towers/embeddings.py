"""Embedding tables: initialisation, lookup, and updates that touch only the rows a batch used.

Tables are plain arrays outside Flax. Autodiff through `table[ids]` would give a gradient as large
as the table and make the optimizer walk all of it; so the step looks rows up first, differentiates
with respect to the rows, merges the gradients of duplicate ids, and updates those rows alone. With
the table donated the cost of a step does not depend on V.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from twotower.core.hashing import multiply_shift
from twotower.core.mesh import ROW_MULTIPLE, DeviceGroup

# Row 0 of every table is padding: it is zero, and no update reaches it.
PADDING = 0
# XLA for CPUs copies gathered rows of 32 to 64 numbers two to three times as fast when it sees them
# as groups of 8.
_FOLD = 8
# Places for each id of a batch where distinct ids are found by hashing: few enough for the cache,
# and most ids are alone.
_HASH_PLACES = 8
# Sums that one round of `merge_by_sorting` adds up.
_NEIGHBOURS = 4


def padded_rows(rows: int) -> int:
    """The number of rows allocated for `rows` used ones."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def init_table(
    key: jax.Array,
    rows: int,
    width: int,
    *,
    start: int | Int[Array, ""] = 0,
    count: int | None = None,
    norm: float = 1.0,
) -> Float[Array, "C D"]:
    """Rows [start, start + count) of a table of normal rows of that expected norm, its row 0 zero;
    all padded rows by default.

    The values of a row depend on the key and its place alone: each device of a mesh makes its own
    part of the table that one device would make, and a larger table begins with the rows of a
    smaller one. Filled chunk by chunk: the peak of memory is the result and one chunk, not a table
    of random bits beside it.

    Args:
        rows: used rows of the whole table, which has `padded_rows(rows)`.
        start: may be traced, `axis_index * count` inside a `shard_map`.
    """
    count = padded_rows(rows) if count is None else count
    chunk = min(count, ROW_MULTIPLE)

    def row(place: Int[Array, ""]) -> jax.Array:
        values = norm * width**-0.5 * jax.random.normal(jax.random.fold_in(key, place), (width,))
        return jnp.where(place == PADDING, 0.0, values)

    def fill(i: Int[Array, ""], table: jax.Array) -> jax.Array:
        # The last chunk ends with the table and makes some rows of the one before once more.
        offset = jnp.minimum(i * chunk, count - chunk)
        return jax.lax.dynamic_update_slice(
            table, jax.vmap(row)(start + offset + jnp.arange(chunk)), (offset, 0)
        )

    # Zero by way of `start`: inside a `shard_map` the loop's first value must vary over the mesh as
    # its others do.
    empty = jnp.full((count, width), start * 0, jnp.result_type(float))
    return jax.lax.fori_loop(0, -(-count // max(chunk, 1)), fill, empty)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The rows of `ids`. An id past the end gives NaN, which stops training, instead of some other
    row."""
    return take_rows(table, jnp.where(ids < 0, len(table), ids), jnp.nan)


def take_rows(array: Float[Array, "V ..."], rows: Int[Array, "..."], fill: float) -> jax.Array:
    """`array[rows]`, and `fill` for rows from V on."""

    def take(array: jax.Array) -> jax.Array:
        return array.at[rows].get(mode="fill", fill_value=fill)

    def take_folded(array: jax.Array) -> jax.Array:
        return take(array.reshape(len(array), -1, _FOLD)).reshape(*rows.shape, -1)

    if array.ndim != 2 or array.shape[1] % _FOLD:
        return take(array)
    return jax.lax.platform_dependent(array, cpu=take_folded, default=take)


def lookup_rows(
    table: Float[Array, "Vd E"],
    ids: Int[Array, "M"],
    all_ids: Int[Array, "nM"],
    group: DeviceGroup,
) -> Float[Array, "M E"]:
    """Returns rows of a table that is divided over devices.

    Each device looks up, for all devices, the rows that it holds; a reduce-scatter brings them to
    the devices that need them. As much moves as there are rows to look up, whatever the table's
    size.

    Args:
        table: The rows that this device holds.
        ids: Rows of the whole table. One past the end, or negative, gives NaN.
        all_ids: The ids of all devices, `group.all_gather(ids)`.
        group: The devices that hold the table.
    """
    if not group.axis:
        return lookup(table, ids)
    held = group.local_rows(all_ids, len(table))
    rows = group.scatter_sum(take_rows(table, held, 0.0))
    exists = (ids >= 0) & (ids < len(table) * group.size)
    return jnp.where(exists[:, None], rows, jnp.nan)


def pool(rows: Float[Array, "... L D"], ids: Int[Array, "... L"]) -> Float[Array, "... D"]:
    """Mean of the rows whose id is not padding; zero where all are."""
    valid = (ids != PADDING)[..., None]
    count = jnp.maximum(valid.sum(-2), 1)
    return jnp.where(valid, rows, 0.0).sum(-2) / count.astype(rows.dtype)


def merge_duplicates(
    ids: Int[Array, "N"],
    grads: Float[Array, "N D"],
    num_rows: int,
    *,
    first: int | Int[Array, ""] = 0,
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """Sums the gradients of equal ids.

    Ids are of the whole table. Those of padding and those outside [first, first + num_rows), which
    another device holds, have no part in the result.

    Returns:
        rows [M]: each distinct id once, less `first`; the places left over hold distinct rows from
        `num_rows` on, which a
            scatter in mode "drop" ignores (so `unique_indices` is the truth). M is N; but where the
            table has no more rows than that it is `num_rows`, and place i holds row i or none: the
            update then passes over the whole table.
        grads [M, D]: the summed gradient of `rows`; 0 in the places left over.
    """
    owned = (ids != PADDING) & (ids >= first) & (ids < first + num_rows)
    local = jnp.where(owned, ids - first, num_rows).astype(ids.dtype)
    hashing, sorting = (
        functools.partial(merge, num_rows=num_rows)
        for merge in (merge_by_hashing, merge_by_sorting)
    )
    return jax.lax.platform_dependent(local, grads, cpu=hashing, default=sorting)


def merge_by_hashing(
    local: Int[Array, "N"], grads: Float[Array, "N D"], *, num_rows: int
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """`merge_duplicates` of rows [0, num_rows], the last of which is none: sums form one after the
    other, as a CPU does them."""
    count = local.size
    if num_rows <= count:
        touched = jnp.zeros(num_rows, bool).at[local].set(True, mode="drop")
        slot, rows, count = local, _in_places(touched, local.dtype), num_rows
    else:
        slot, rows = slots_by_hashing(local, num_rows=num_rows)
    return rows, jnp.zeros((count, grads.shape[1]), grads.dtype).at[slot].add(grads, mode="drop")


def merge_by_sorting(
    local: Int[Array, "N"], grads: Float[Array, "N D"], *, num_rows: int
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """As `merge_by_hashing`, by sums of neighbours, of neighbours of neighbours and so on among the
    sorted ids.

    Two additions that a GPU makes to one place come in any order: sums by scattering would have
    other bits in every run.
    """
    places = jnp.arange(local.size, dtype=local.dtype)
    ordered, order = jax.lax.sort((local, places), num_keys=1)
    sums, span = grads[order], 1
    while span < local.size:
        # A barrier, or XLA would make one kernel of all rounds, each of which reads the one before
        # several times.
        sums = jax.lax.optimization_barrier(
            sum(_of_same(ordered, sums, i * span) for i in range(1, _NEIGHBOURS)) + sums
        )
        span *= _NEIGHBOURS
    kept = jnp.append(ordered[1:] != ordered[:-1], True) & (ordered < num_rows)
    rows, sums = jnp.where(kept, ordered, num_rows + places), jnp.where(kept[:, None], sums, 0.0)
    if num_rows > local.size:
        return rows, sums
    distinct = {"mode": "drop", "unique_indices": True}
    touched = jnp.zeros(num_rows, bool).at[rows].set(True, **distinct)
    return _in_places(touched, local.dtype), jnp.zeros((num_rows, grads.shape[1]), grads.dtype).at[
        rows
    ].set(sums, **distinct)


def _in_places(touched: Bool[Array, "V"], dtype: Any) -> Int[Array, "V"]:
    """Each row that is touched in its place; elsewhere one past the end."""
    places = jnp.arange(len(touched), dtype=dtype)
    return jnp.where(touched, places, len(touched) + places)


def _of_same(
    ordered: Int[Array, "N"], sums: Float[Array, "N D"], distance: int
) -> Float[Array, "N D"]:
    """The sums that stand `distance` places before, where those are of the same id; 0 elsewhere."""
    count = max(len(ordered) - distance, 0)
    found = jnp.where((ordered[distance:] == ordered[:count])[:, None], sums[:count], 0.0)
    return jnp.pad(found, ((len(ordered) - count, 0), (0, 0)))


def slots_by_hashing(
    local: Int[Array, "N"], *, num_rows: int
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The place of each row's sum, its last one in the batch, and the row of each place; see
    `merge_duplicates`.

    Of the ids that a hash function sends to one place the last in the batch has it, and with it all
    that equal it; the others are hashed once more, by another function, until none is left. On a CPU this takes a sixth of the time of
    sorting.
    """
    count, bits = local.size, (_HASH_PLACES * local.size - 1).bit_length()
    places = jnp.arange(count, dtype=local.dtype)

    def settle(slot: jax.Array, multiplier: jax.Array) -> tuple[jax.Array, jax.Array]:
        hashed = multiply_shift(local.astype(jnp.uint32), multiplier, bits).astype(jnp.int32)
        claimed = jnp.where(slot < 0, hashed, 2**bits)
        last = jnp.zeros(2**bits, local.dtype).at[claimed].max(places, mode="drop")[hashed]
        slot = jnp.where((slot < 0) & (local[last] == local), last, slot)
        return slot, multiplier * jnp.uint32(747796405)  # odd again

    start = (jnp.full_like(local, -1) + 0 * local, jnp.uint32(2654435769))
    slot, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < 0).any(), lambda carry: settle(*carry), start
    )
    rows = jnp.where((slot == places) & (local < num_rows), local, num_rows + places)
    return jnp.where(local < num_rows, slot, count), rows


Slots = dict[str, Any]


class TableOptimizer(NamedTuple):
    """A sparse optimizer.

    Attributes:
        init: (table [V, D], initial accumulator) -> slots, arrays with V rows.
        update: (table, slots, rows [M], grads [M, D], learning rate, step from 0) -> (table,
            slots). Rows and gradients are as `merge_duplicates` gives them: distinct, those from V
            on dropped, and of M = V rows each in its place.
    """

    init: Callable[[jax.Array, float], Slots]
    update: Callable[[jax.Array, Slots, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Slots]]


def apply_gradients(
    optimizer: TableOptimizer,
    table: Float[Array, "V D"],
    slots: Slots,
    ids: Int[Array, "N"],
    grads: Float[Array, "N D"],
    rate: Any,
    step: Any,
    *,
    first: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "V D"], Slots, Float[Array, ""]]:
    """One update of the rows that a batch used; all other rows, and padding, stay as they are to
    the bit.

    Args:
        ids: rows of the whole table, with duplicates.
        grads: the gradient of each id's use.
        rate: learning rate.
        step: steps done before this one.
        first: `table` and `slots` are rows [first, first + V) of the whole table; ids outside are
            left to other devices.

    Returns:
        The table and slots, and the square of the norm of the gradient of these rows.
    """
    rows, merged = merge_duplicates(ids, grads, len(table), first=first)
    return *optimizer.update(table, slots, rows, merged, rate, step), jnp.sum(jnp.square(merged))


def _is_dense(array: jax.Array, rows: Int[Array, "M"]) -> bool:
    return len(rows) == len(array)


def _chosen(array: jax.Array, rows: Int[Array, "V"]) -> jax.Array:
    """Which rows of the array a dense update changes, [V] or [V, 1]."""
    return (rows < len(array)).reshape(-1, *[1] * (array.ndim - 1))


def _gather(array: jax.Array, rows: Int[Array, "M"]) -> jax.Array:
    return array if _is_dense(array, rows) else take_rows(array, rows, 0.0)


def _set(array: jax.Array, rows: Int[Array, "M"], values: jax.Array) -> jax.Array:
    if _is_dense(array, rows):
        return jnp.where(_chosen(array, rows), values, array)
    return array.at[rows].set(values, mode="drop", unique_indices=True)


def _add(array: jax.Array, rows: Int[Array, "M"], values: jax.Array) -> jax.Array:
    if _is_dense(array, rows):
        return jnp.where(_chosen(array, rows), array + values, array)
    return array.at[rows].add(values, mode="drop", unique_indices=True)


def _sgd_update(table, slots, rows, grads, rate, step):
    return _add(table, rows, -rate * grads), slots


# Far below optax's 1e-7: of a loss that is a mean over the batch, the square of a row's gradient
# may be 1e-10, and a larger epsilon (or TensorFlow's initial accumulator of 0.1) would leave rows
# where they began.
_ADAGRAD_EPS = 1e-12


def _adagrad_update(table, slots, rows, grads, rate, step):
    accumulator = _gather(slots["accumulator"], rows) + jnp.square(grads)
    update = -rate * jax.lax.rsqrt(accumulator + _ADAGRAD_EPS) * grads
    return _add(table, rows, update), {"accumulator": _set(slots["accumulator"], rows, accumulator)}


def _rowwise_adagrad_update(table, slots, rows, grads, rate, step):
    accumulator = _gather(slots["accumulator"], rows) + jnp.mean(jnp.square(grads), -1)
    update = -rate * jax.lax.rsqrt(accumulator + _ADAGRAD_EPS)[:, None] * grads
    return _add(table, rows, update), {"accumulator": _set(slots["accumulator"], rows, accumulator)}


def _lazy_adam_update(table, slots, rows, grads, rate, step, b1=0.9, b2=0.999, eps=1e-8):
    m = b1 * _gather(slots["m"], rows) + (1 - b1) * grads
    v = b2 * _gather(slots["v"], rows) + (1 - b2) * jnp.square(grads)
    t = step + 1
    update = -rate * (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
    return _add(table, rows, update), {
        "m": _set(slots["m"], rows, m),
        "v": _set(slots["v"], rows, v),
    }


OPTIMIZERS: Mapping[str, TableOptimizer] = {
    "sgd": TableOptimizer(lambda table, initial: {}, _sgd_update),
    # Duchi et al. 2011: equal to `optax.adagrad` on the rows touched.
    "adagrad": TableOptimizer(
        lambda table, initial: {"accumulator": jnp.full_like(table, initial)}, _adagrad_update
    ),
    # One accumulator a row (Naumov et al. 2019, DLRM): 1 + 1/D tables of memory instead of 2.
    "rowwise_adagrad": TableOptimizer(
        lambda table, initial: {"accumulator": jnp.full(table.shape[0], initial, table.dtype)},
        _rowwise_adagrad_update,
    ),
    # Kingma and Ba 2015 with moments that decay only when their row is touched, bias corrected by
    # the global step.
    "lazy_adam": TableOptimizer(
        lambda table, initial: {"m": jnp.zeros_like(table), "v": jnp.zeros_like(table)},
        _lazy_adam_update,
    ),
}
