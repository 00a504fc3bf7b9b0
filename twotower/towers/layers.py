"""The few Linen blocks that towers share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from twotower.core.hashing import mix32

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


def drop_out(
    x: Float[Array, "B *F"], rate: float, keys: Array | None, layer: int
) -> Float[Array, "B *F"]:
    """Drops a share `rate` of x and scales up the rest; x itself where `keys` is None.

    Each row has its own key, so that the rows of a batch lose the same units however the batch is
    divided over devices. The bits of a unit are a hash of two random words of its row and of its
    place: drawing all of them costs a CPU more than a dense layer.

    Args:
        keys: [B] random keys.
        layer: tells the layers of one tower apart.
    """
    if keys is None or not rate:
        return x
    words = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, layer), (2,), jnp.uint32))(
        keys
    )
    first, second = (words[:, i].reshape(-1, *[1] * (x.ndim - 1)) for i in range(2))
    place = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:])).reshape(1, *x.shape[1:])
    kept = mix32(mix32(place + first) ^ second) >= jnp.uint32(rate * 2**32)
    return jnp.where(kept, x * (1 / (1 - rate)), 0.0)


def dense(width: int, dtype: Any = None, **options: Any) -> nn.Dense:
    """A dense layer with its arithmetic in `dtype`; see `of_activations` for bfloat16 on a CPU."""
    if dtype is not None and of_activations(dtype) != dtype:
        return nn.Dense(width, dot_general=_product, **options)
    return nn.Dense(width, dtype=dtype, **options)


def of_activations(dtype: Any) -> Any:
    """What is added and normalised in, where the arithmetic is to be in `dtype`; None keeps the
    type of the parameters.

    A CPU has no bfloat16 but for the operands of matrix products, and converts to float32 and back
    around everything else.
    """
    return None if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x: Float[Array, "*B F"], kernel: Float[Array, "F G"], dims: Any, precision: Any
) -> Float[Array, "*B G"]:
    """x @ kernel as `nn.Dense` asks for it, of float32 and with operands in bfloat16: on a CPU
    several times as fast."""
    del dims, precision  # always those of a matrix product
    return _half(x, kernel)


def _product_forward(
    x: Array, kernel: Array, dims: Any, precision: Any
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, dims, precision), (x, kernel)


def _product_backward(
    dims: Any, precision: Any, kept: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    # XLA multiplies bfloat16 fast only where rows lie one after another: the small kernel is
    # transposed in memory for it, and the kernel's gradient, whose long operand would have to be,
    # is formed in float32.
    turned = with_layout_constraint(kernel.T, Layout(major_to_minor=(0, 1)))
    return _half(g, turned), _transposed_product(
        x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    )


def _transposed_product(x: Float[Array, "N F"], y: Float[Array, "N G"]) -> Float[Array, "F G"]:
    """x^T y. XLA for CPUs is nearly twice as fast at a wide product as at the tall one that is its
    transpose, and would fold the transposition into the product but for the barrier."""
    if x.shape[1] <= y.shape[1]:
        return jnp.matmul(x.T, y)
    return jax.lax.optimization_barrier(jnp.matmul(y.T, x)).T


_product.defvjp(_product_forward, _product_backward)


def _half(x: Float[Array, "*B F"], y: Float[Array, "F G"]) -> Float[Array, "*B G"]:
    return jnp.matmul(
        x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )


class MLP(nn.Module):
    """Dense layers; every one but the last is normalised, activated and dropped out.

    Attributes:
        dtype: of the arithmetic; parameters stay float32.
    """

    layers: tuple[int, ...]
    activation: str = "relu"
    dropout: float = 0.0
    layer_norm: bool = False
    batch_norm: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "... F"], *, keys: Array | None = None, axis: str | None = None
    ) -> Float[Array, "... D"]:
        normal = of_activations(self.dtype)
        for layer, width in enumerate(self.layers[:-1], 1):
            x = dense(width, self.dtype)(x)
            if self.layer_norm:
                x = nn.LayerNorm(dtype=normal)(x)
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=keys is None, momentum=0.9, axis_name=axis, dtype=normal
                )(x)
            x = drop_out(ACTIVATIONS[self.activation](x), self.dropout, keys, layer)
        return dense(self.layers[-1], self.dtype)(x) if self.layers else x


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors of norm 1; the zero vector stays zero, with a zero gradient instead of NaN."""
    square = jnp.sum(x * x, -1, keepdims=True)
    positive = square > 1e-12
    return jnp.where(positive, x * jax.lax.rsqrt(jnp.where(positive, square, 1.0)), 0.0)
