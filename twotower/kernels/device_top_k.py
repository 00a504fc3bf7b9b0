"""The best K of many scores on a device, by JAX: selection, and merging of lists.

`jax.lax.top_k` is the plain reference, whose items come back in the same order. Of most scores only
the maxima of their groups are compared; `twotower.kernels.top_k`, which does the same on a host,
says why that is enough.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twotower.kernels.top_k import GROUP_SIZES


def merge_top_k(k: int, scores: jax.Array, *columns: jax.Array) -> tuple[jax.Array, ...]:
    """Merges lists of scored items into the best `k`, as `twotower.kernels.top_k.merge_top_k` does.

    Args:
        k: Greatest length of the merged list.
        scores: float [B, M]; not NaN.
        columns: Arrays [B, M] of what stands beside each score, such as rows.

    Returns:
        The scores [B, <= k], best first, and the columns in the same order.
    """
    # Stable: of equal scores `top_k` takes the lower position.
    best, order = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return best, *(jnp.take_along_axis(x, order, axis=1) for x in columns)


def select_top_k(
    scores: Float[Array, "B N"], k: int
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Selects the best `k` of each row, and their positions, as `jax.lax.top_k` does.

    Many times as fast on an accelerator where rows are long and lists short: XLA sorts whole rows,
    which are here the maxima of groups first, then the scores of the K best groups. Of equal maxima
    the first groups are taken, since each holds a score as good at a lower position.
    """
    # Groups are used only while at most a fourth of the row has to be looked at twice.
    fitting = (size for size in GROUP_SIZES if scores.shape[1] >= 4 * k * size)
    size = next(fitting, 1)
    if size == 1:
        best, positions = jax.lax.top_k(scores, k)
        return best, positions
    padding = -scores.shape[1] % size
    filled = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    # Padding of -inf makes a group no better.
    maxima = filled.reshape(len(scores), -1, size).max(-1)
    # Maxima of a long row are a long row: groups of groups, until a row is short.
    _, groups = select_top_k(maxima, k)
    # Back in the order of the row: of equal scores the lower position must stay first.
    groups = jnp.sort(groups, axis=1)
    positions = groups[:, :, None] * size + jnp.arange(size)[None, None]
    positions = positions.reshape(len(scores), -1)
    # Positions past the end are those of the padding.
    candidates = jnp.take_along_axis(scores, positions, axis=1, mode="fill", fill_value=-jnp.inf)
    best, order = jax.lax.top_k(candidates, k)
    return best, jnp.take_along_axis(positions, order, axis=1)
