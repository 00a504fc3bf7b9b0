"""Embedding tables: initialisation, lookup, and updates that touch only the rows a batch used.

Tables are plain arrays outside Flax. Autodiff through `table[ids]` would give a gradient as large as the table and make the
optimizer walk all of it; so the step looks rows up first, differentiates with respect to the rows, merges the gradients of
duplicate ids, and updates those rows alone. With the table donated the cost of a step does not depend on V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows are padded to a fixed multiple, not to the device count, so that a checkpoint fits any topology.
ROW_MULTIPLE = 1024
# Row 0 of every table is padding: it is zero, and no update reaches it.
PADDING = 0


def padded_rows(rows: int) -> int:
    """The number of rows allocated for `rows` used ones."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def init_table(
    key: jax.Array, rows: int, width: int, *, start: int | Int[Array, ""] = 0, count: int | None = None
) -> Float[Array, "C D"]:
    """Rows [start, start + count) of a table of normal rows of expected norm 1, its row 0 zero; all padded rows by default.

    The values of a row depend on the key and its place alone: each device of a mesh makes its own part of the table that one
    device would make, and a larger table begins with the rows of a smaller one. Filled chunk by chunk: the peak of memory is
    the result and one chunk, not a table of random bits beside it.

    Args:
        rows: used rows of the whole table, which has `padded_rows(rows)`.
        start: may be traced, `axis_index * count` inside a `shard_map`.
    """
    count = padded_rows(rows) if count is None else count
    chunk = min(count, ROW_MULTIPLE)

    def row(place: Int[Array, ""]) -> jax.Array:
        values = width**-0.5 * jax.random.normal(jax.random.fold_in(key, place), (width,))
        return jnp.where(place == PADDING, 0.0, values)

    def fill(i: Int[Array, ""], table: jax.Array) -> jax.Array:
        # The last chunk ends with the table and makes some rows of the one before once more.
        offset = jnp.minimum(i * chunk, count - chunk)
        return jax.lax.dynamic_update_slice(table, jax.vmap(row)(start + offset + jnp.arange(chunk)), (offset, 0))

    # Zero by way of `start`: inside a `shard_map` the loop's first value must vary over the mesh as its others do.
    empty = jnp.full((count, width), start * 0, jnp.result_type(float))
    return jax.lax.fori_loop(0, -(-count // max(chunk, 1)), fill, empty)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The rows of `ids`. An id past the end gives NaN, which stops training, instead of some other row."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def pool(rows: Float[Array, "... L D"], ids: Int[Array, "... L"]) -> Float[Array, "... D"]:
    """Mean of the rows whose id is not padding; zero where all are."""
    valid = (ids != PADDING)[..., None]
    count = jnp.maximum(valid.sum(-2), 1)
    return jnp.where(valid, rows, 0.0).sum(-2) / count.astype(rows.dtype)


def merge_duplicates(
    ids: Int[Array, "N"], grads: Float[Array, "N D"], num_rows: int
) -> tuple[Int[Array, "N"], Float[Array, "N D"]]:
    """Sums the gradients of equal ids.

    Returns:
        rows [N]: each distinct id once; the places left over, and padding, hold distinct rows from `num_rows` on, which a
            scatter in mode "drop" ignores (so `unique_indices` is the truth).
        grads [N, D]: the summed gradient of `rows`.
    """
    # Sorting keys alone and searching costs a third of sorting pairs on CPUs.
    ordered = jax.lax.sort(ids)
    slot = jnp.searchsorted(ordered, ids, method="scan")
    merged = jnp.zeros_like(grads).at[slot].add(grads)
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    keep = first & (ordered != PADDING)
    rows = jnp.where(keep, ordered, num_rows + jnp.arange(ids.size, dtype=ids.dtype))
    return rows, merged


Slots = dict[str, Any]


class TableOptimizer(NamedTuple):
    """A sparse optimizer.

    Attributes:
        init: (table [V, D], initial accumulator) -> slots, arrays with V rows.
        update: (table, slots, rows [N], grads [N, D], learning rate, step from 0) -> (table, slots). Rows are distinct;
            those from V on are dropped.
    """

    init: Callable[[jax.Array, float], Slots]
    update: Callable[[jax.Array, Slots, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Slots]]


def _gather(array: jax.Array, rows: Int[Array, "N"]) -> jax.Array:
    return array.at[rows].get(mode="fill", fill_value=0.0)


def _set(array: jax.Array, rows: Int[Array, "N"], values: jax.Array) -> jax.Array:
    return array.at[rows].set(values, mode="drop", unique_indices=True)


def _add(array: jax.Array, rows: Int[Array, "N"], values: jax.Array) -> jax.Array:
    return array.at[rows].add(values, mode="drop", unique_indices=True)


def _sgd_update(table, slots, rows, grads, rate, step):
    return _add(table, rows, -rate * grads), slots


# Far below optax's 1e-7: of a loss that is a mean over the batch, the square of a row's gradient may be 1e-10, and a larger
# epsilon (or TensorFlow's initial accumulator of 0.1) would leave rows where they began.
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
    return _add(table, rows, update), {"m": _set(slots["m"], rows, m), "v": _set(slots["v"], rows, v)}


OPTIMIZERS: Mapping[str, TableOptimizer] = {
    "sgd": TableOptimizer(lambda table, initial: {}, _sgd_update),
    # Duchi et al. 2011: equal to `optax.adagrad` on the rows touched.
    "adagrad": TableOptimizer(
        lambda table, initial: {"accumulator": jnp.full_like(table, initial)}, _adagrad_update
    ),
    # One accumulator a row (Naumov et al. 2019, DLRM): 1 + 1/D tables of memory instead of 2.
    "rowwise_adagrad": TableOptimizer(
        lambda table, initial: {"accumulator": jnp.full(table.shape[0], initial, table.dtype)}, _rowwise_adagrad_update
    ),
    # Kingma and Ba 2015 with moments that decay only when their row is touched, bias corrected by the global step.
    "lazy_adam": TableOptimizer(
        lambda table, initial: {"m": jnp.zeros_like(table), "v": jnp.zeros_like(table)}, _lazy_adam_update
    ),
}
