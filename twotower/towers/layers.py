"""The few Linen blocks that towers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "tanh": jnp.tanh
}  # fmt: skip


class MLP(nn.Module):
    """Dense layers; every one but the last is normalised, activated and dropped out."""

    layers: tuple[int, ...]
    activation: str = "relu"
    dropout: float = 0.0
    layer_norm: bool = False
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... F"], *, train: bool = False) -> Float[Array, "... D"]:
        for width in self.layers[:-1]:
            x = nn.Dense(width)(x)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = ACTIVATIONS[self.activation](x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.layers[-1])(x) if self.layers else x


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors of norm 1; the zero vector stays zero, with a zero gradient instead of NaN."""
    square = jnp.sum(x * x, -1, keepdims=True)
    positive = square > 1e-12
    return jnp.where(positive, x * jax.lax.rsqrt(jnp.where(positive, square, 1.0)), 0.0)
