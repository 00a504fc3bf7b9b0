"""Products of dense layers with operands in bfloat16, on a CPU.

A CPU has no bfloat16 but for the operands of matrix products, and converts to float32 and back
around everything else. So there parameters and activations stay float32 and the operands alone are
rounded: several times as fast as float32 products. Other devices compute in the type itself, and
need nothing of this file. `jnp.matmul` of rounded operands is the plain reference.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import DotDimensionNumbers, PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def activation_dtype(dtype: DTypeLike | None) -> DTypeLike | None:
    """Returns the type of sums and normalisations where products are in `dtype`; None keeps the
    type of the parameters."""
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return None
    return dtype


def fastest_dtype() -> Literal["float32", "bfloat16"]:
    """Returns the faster type of products here: bfloat16 where there are instructions for it.

    Steps of batches of 256 to 4,096 were 1.06 to 1.5 times as fast with it on processors with
    AVX512-BF16 or AMX, and none slower.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        # Processes of several machines must compute alike, and need not have one processor.
        if jax.process_count() > 1:
            return "float32"
        known = _cpu_flags() & {"avx512_bf16", "amx_bf16"}
        return "bfloat16" if known else "float32"
    # GPUs of NVIDIA before Ampere have none; others name no number here.
    capability = re.fullmatch(r"[\d.]+", str(getattr(device, "compute_capability", "")))
    is_old = capability is not None and float(capability[0]) < 8
    return "float32" if is_old else "bfloat16"


def _cpu_flags() -> set[str]:
    """Returns the features of the processor, by Linux's names; none where they are not told."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    lines = path.read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split())


def rounds_operands(dtype: DTypeLike | None) -> bool:
    """Returns whether products in `dtype` take float32 and round it, as `bfloat16_product` does."""
    return dtype is not None and activation_dtype(dtype) != dtype


def matmul(
    x: Float[Array, "*B F"], kernel: Float[Array, "F G"], dtype: DTypeLike | None
) -> Float[Array, "*B G"]:
    """Multiplies x and kernel in `dtype` as a dense layer does; None keeps the types they have."""
    if rounds_operands(dtype):
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        return bfloat16_product(x, kernel, dims, None)
    if dtype is not None:
        x = x.astype(dtype)
        kernel = kernel.astype(dtype)
    return jnp.matmul(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def bfloat16_product(
    x: Float[Array, "*B F"],
    kernel: Float[Array, "F G"],
    dims: DotDimensionNumbers,
    precision: PrecisionLike,
) -> Float[Array, "*B G"]:
    """Multiplies x and kernel with operands in bfloat16 and sums in float32.

    Args:
        x: float32 inputs.
        kernel: float32 weights of a dense layer.
        dims, precision: Arguments that `nn.Dense` passes to its `dot_general`; always those of a
            matrix product.
    """
    del dims, precision
    return _rounded_product(x, kernel)


def _forward(
    x: Array, kernel: Array, dims: DotDimensionNumbers, precision: PrecisionLike
) -> tuple[Array, tuple[Array, Array]]:
    # Kept unrounded: the kernel's gradient is formed of them in float32.
    return bfloat16_product(x, kernel, dims, precision), (x, kernel)


def _backward(
    dims: DotDimensionNumbers,
    precision: PrecisionLike,
    residuals: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    x, kernel = residuals
    # XLA multiplies bfloat16 fast only where rows lie one after another: the small kernel is
    # transposed in memory for it. The kernel's own gradient, whose long operand would have to be
    # transposed, is formed in float32.
    transposed = with_layout_constraint(kernel.T, Layout(major_to_minor=(0, 1)))
    inputs = x.reshape(-1, x.shape[-1])
    outputs = cotangent.reshape(-1, cotangent.shape[-1])
    return _rounded_product(cotangent, transposed), _kernel_gradient(inputs, outputs)


bfloat16_product.defvjp(_forward, _backward)


def _kernel_gradient(x: Float[Array, "N F"], y: Float[Array, "N G"]) -> Float[Array, "F G"]:
    """Returns x^T y.

    XLA for CPUs is nearly twice as fast at a wide product as at the tall one that is its transpose,
    and would fold the transposition into the product but for the barrier.
    """
    if x.shape[1] <= y.shape[1]:
        return jnp.matmul(x.T, y)
    wide = jnp.matmul(y.T, x)
    return jax.lax.optimization_barrier(wide).T


def _rounded_product(x: Float[Array, "*B F"], y: Float[Array, "F G"]) -> Float[Array, "*B G"]:
    # The sums stay float32, and so does the output: only the operands lose bits.
    x = x.astype(jnp.bfloat16)
    y = y.astype(jnp.bfloat16)
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
