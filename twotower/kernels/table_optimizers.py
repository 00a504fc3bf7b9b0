"""The optimizers of embedding tables: rules that change the rows a batch used and no others.

A rule gets distinct rows with their summed gradients from `twotower.kernels.sparse_update`. To add
one, write its `init` and `update` and name it in TABLE_OPTIMIZERS.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from twotower.kernels.sparse_update import (
    Scalar,
    Slots,
    TableOptimizer,
    add_rows,
    gather_rows,
    set_rows,
)


def _sgd_init(table: jax.Array, initial: float) -> Slots:
    return {}


def _sgd_update(
    table: jax.Array, slots: Slots, rows: jax.Array, grads: jax.Array, rate: Scalar, step: Scalar
) -> tuple[jax.Array, Slots]:
    return add_rows(table, rows, -rate * grads), slots


# Far below optax's 1e-7: of a loss that is a mean over the batch, the square of a row's gradient
# may be 1e-10, and a larger epsilon (or TensorFlow's initial accumulator of 0.1) would leave rows
# where they began.
_ADAGRAD_EPS = 1e-12


def _adagrad_init(table: jax.Array, initial: float) -> Slots:
    return {"accumulator": jnp.full_like(table, initial)}


def _adagrad_update(
    table: jax.Array, slots: Slots, rows: jax.Array, grads: jax.Array, rate: Scalar, step: Scalar
) -> tuple[jax.Array, Slots]:
    accumulator = gather_rows(slots["accumulator"], rows) + jnp.square(grads)
    update = -rate * jax.lax.rsqrt(accumulator + _ADAGRAD_EPS) * grads
    kept = set_rows(slots["accumulator"], rows, accumulator)
    return add_rows(table, rows, update), {"accumulator": kept}


def _rowwise_adagrad_init(table: jax.Array, initial: float) -> Slots:
    return {"accumulator": jnp.full(table.shape[0], initial, table.dtype)}


def _rowwise_adagrad_update(
    table: jax.Array, slots: Slots, rows: jax.Array, grads: jax.Array, rate: Scalar, step: Scalar
) -> tuple[jax.Array, Slots]:
    accumulator = gather_rows(slots["accumulator"], rows) + jnp.mean(jnp.square(grads), -1)
    update = -rate * jax.lax.rsqrt(accumulator + _ADAGRAD_EPS)[:, None] * grads
    kept = set_rows(slots["accumulator"], rows, accumulator)
    return add_rows(table, rows, update), {"accumulator": kept}


def _lazy_adam_init(table: jax.Array, initial: float) -> Slots:
    return {"m": jnp.zeros_like(table), "v": jnp.zeros_like(table)}


def _lazy_adam_update(
    table: jax.Array,
    slots: Slots,
    rows: jax.Array,
    grads: jax.Array,
    rate: Scalar,
    step: Scalar,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[jax.Array, Slots]:
    # Epsilon is added after the bias is corrected, as in optax; added before, as in PyTorch, it
    # made a step of small gradients differ by 7e-3.
    m = b1 * gather_rows(slots["m"], rows) + (1 - b1) * grads
    v = b2 * gather_rows(slots["v"], rows) + (1 - b2) * jnp.square(grads)
    t = step + 1
    update = -rate * (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
    kept = {"m": set_rows(slots["m"], rows, m), "v": set_rows(slots["v"], rows, v)}
    return add_rows(table, rows, update), kept


# None has weight decay, which would shrink rows that no batch used.
TABLE_OPTIMIZERS: Mapping[str, TableOptimizer] = {
    "sgd": TableOptimizer(_sgd_init, _sgd_update),
    # Duchi et al. 2011: equal to `optax.adagrad` on the rows touched.
    "adagrad": TableOptimizer(_adagrad_init, _adagrad_update),
    # One accumulator a row (Naumov et al. 2019, DLRM): 1 + 1/D tables of memory instead of 2.
    "rowwise_adagrad": TableOptimizer(_rowwise_adagrad_init, _rowwise_adagrad_update),
    # Kingma and Ba 2015 with moments that decay only when their row is touched; the bias is
    # corrected by the global step.
    "lazy_adam": TableOptimizer(_lazy_adam_init, _lazy_adam_update),
}
