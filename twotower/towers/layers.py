"""Layers that both towers share: dropout, dense layers, an MLP, normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twotower.config import TowerConfig
from twotower.core.arrays import mix32
from twotower.kernels.dense import activation_dtype, bfloat16_product, rounds_operands

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


def drop_out(
    x: Float[Array, "B *F"], rate: float, keys: Array | None, layer: int
) -> Float[Array, "B *F"]:
    """Drops a share of x and scales up the rest.

    Each row has its own key, so that the rows of a batch lose the same units however the batch is
    divided over devices. The bits of a unit are a hash of two random words of its row and of its
    position: drawing all of them costs a CPU more than a dense layer.

    Args:
        x: Activations of each row.
        rate: Share of the units to drop.
        keys: Random keys [B]; None drops nothing.
        layer: Number that tells the layers of one tower apart.
    """
    # Inference, or nothing to drop: no random bits are computed.
    if keys is None or not rate:
        return x

    def draw_words(key: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, layer), (2,), jnp.uint32)

    words = jax.vmap(draw_words)(keys)
    # One word would leave rows with close words the same units, shifted; the second is mixed in
    # after the first hash.
    row_shape = (-1, *[1] * (x.ndim - 1))
    first = words[:, 0].reshape(row_shape)
    second = words[:, 1].reshape(row_shape)
    count = math.prod(x.shape[1:])
    position = jax.lax.iota(jnp.uint32, count).reshape(1, *x.shape[1:])
    bits = mix32(mix32(position + first) ^ second)
    # As integers: a uniform number in float32 has 24 bits and costs a conversion.
    kept = bits >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x * (1 / (1 - rate)), 0.0)


def dropout_rates(config: TowerConfig) -> tuple[float, ...]:
    """Returns the shares that a tower drops: of its combined features, and of each hidden layer.

    >>> dropout_rates(TowerConfig(layers=(128, 64, 32), dropout=0.2))
    (0.2, 0.2, 0.2)
    """
    if config.layer_dropout:
        return config.layer_dropout
    return (config.dropout,) * max(1, len(config.layers))


def dense(width: int, dtype: DTypeLike | None = None, **options: Any) -> nn.Dense:
    """Makes a dense layer.

    Args:
        width: Number of its outputs.
        dtype: Type of the arithmetic, for example bfloat16; None keeps that of the parameters.
        options: Further arguments of `nn.Dense`.
    """
    # Only the operands are rounded: parameters, sums and outputs stay float32.
    if rounds_operands(dtype):
        return nn.Dense(width, dot_general=bfloat16_product, **options)
    return nn.Dense(width, dtype=dtype, **options)


class MLP(nn.Module):
    """Dense layers; every one but the last is normalised, activated and dropped out.

    Attributes:
        config: Options of the layers; an MLP without layers is the identity.
        dtype: Type of the arithmetic; parameters stay float32.
    """

    config: TowerConfig
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "... F"], *, keys: Array | None = None, axis: str | None = None
    ) -> Float[Array, "... D"]:
        config = self.config
        activate = ACTIVATIONS[config.activation]
        rates = dropout_rates(config)
        # Dropout layer 0 is that of the tower's input.
        for layer, width in enumerate(config.layers[:-1], 1):
            x = dense(width, self.dtype)(x)
            if config.order == "activation_norm":
                x = self._normalize(activate(x), keys, axis)
            else:
                x = activate(self._normalize(x, keys, axis))
            x = drop_out(x, rates[layer], keys, layer)
        if not config.layers:
            return x
        # The last layer is linear: vectors may point anywhere, not into one orthant.
        return dense(config.layers[-1], self.dtype)(x)

    def _normalize(
        self, x: Float[Array, "... F"], keys: Array | None, axis: str | None
    ) -> Float[Array, "... F"]:
        """Normalises hidden units, per example and per batch as the options say."""
        normal_dtype = activation_dtype(self.dtype)
        if self.config.layer_norm:
            x = nn.LayerNorm(dtype=normal_dtype)(x)
        if self.config.batch_norm:
            # Without keys it is inference: the running statistics are used.
            norm = nn.BatchNorm(
                use_running_average=keys is None,
                momentum=0.9,
                # Statistics are of the whole batch, over all devices.
                axis_name=axis,
                dtype=normal_dtype,
            )
            x = norm(x)
        return x


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scales vectors to norm 1; the zero vector stays zero, with a zero gradient instead of NaN."""
    square = jnp.sum(x * x, -1, keepdims=True)
    # Norms below 1e-6 are rounding, without a direction.
    positive = square > 1e-12
    # Masked before the root too: its gradient at 0 is infinite, and 0 x inf is NaN.
    safe = jnp.where(positive, square, 1.0)
    return jnp.where(positive, x * jax.lax.rsqrt(safe), 0.0)
