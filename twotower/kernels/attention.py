"""Attention within the segments of packed sequences, and rotary positions.

`reference_attention` is the plain form, with the logits of all pairs at once. `attend` takes
queries in blocks, so that a causal query forms no logits with what is after its block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries that causal attention takes at once, about.
_BLOCK = 50


def attend(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    segment: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H d"]:
    """Averages values over the positions of each segment, by the softmax of q . k.

    Args:
        q: queries, scaled already.
        k: keys.
        v: values.
        segment: number of the sequence that each position belongs to; positions of different
            segments do not see each other.
        causal: whether a position sees itself and earlier ones alone.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    length = q.shape[2]
    # Blocks of equal size, so that the last is no sliver.
    size = -(-length // max(1, length // _BLOCK)) if causal else length
    out = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        visible = stop if causal else length
        mask = _visible(segment, start, stop, visible, causal)
        out.append(_attend_block(q[:, :, start:stop], k[:, :, :visible], v[:, :, :visible], mask))
    return jnp.concatenate(out, 2).transpose(0, 2, 1, 3).astype(v.dtype)


def reference_attention(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    segment: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H d"]:
    """Does what `attend` does with one matrix of logits: the plain reference."""
    length = segment.shape[1]
    mask = _visible(segment, 0, length, length, causal)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0)


def _visible(
    segment: Int[Array, "B S"], start: int, stop: int, visible: int, causal: bool
) -> Bool[Array, "B Q T"]:
    """Returns which of the first `visible` positions each query in [start, stop) sees."""
    query = jnp.arange(start, stop)[:, None]
    other = jnp.arange(visible)[None, :]
    mask = segment[:, start:stop, None] == segment[:, None, :visible]
    return mask & (query >= other)[None] if causal else mask


# The weights are formed again for the gradient: to keep them costs more than to form them.
@jax.checkpoint
def _attend_block(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B H T d"],
    v: Float[Array, "B H T d"],
    mask: Bool[Array, "B Q T"],
) -> Float[Array, "B H Q d"]:
    logits = jnp.einsum("bhsd,bhtd->bhst", q, k, preferred_element_type=jnp.float32)
    # At least one is allowed, the position itself, so that no row is empty.
    logits = jnp.where(mask[:, None], logits, -1e30)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = jnp.einsum(
        "bhst,bhtd->bhsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return total / weights.sum(-1, keepdims=True)


def rotate(x: Float[Array, "B S H d"], position: Int[Array, "B S"]) -> Float[Array, "B S H d"]:
    """Turns each pair of coordinates (i, i + d / 2) by position x 10,000^(-2 i / d), so that
    products depend on distances alone (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angle = position[..., None] * (10_000.0 ** -(jnp.arange(half) / half))[None, None]
    cos = jnp.cos(angle)[:, :, None].astype(x.dtype)
    sin = jnp.sin(angle)[:, :, None].astype(x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
