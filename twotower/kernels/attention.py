"""Attention within the segments of packed sequences, and rotary positions.

`reference_attention` is the plain form, with the logits of all pairs at once. `attend` takes
queries in blocks, so that a causal query forms no logits with positions after its block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Number of queries in a block of causal attention, about; other sizes were no faster on sequences
# of 200 events.
_BLOCK = 50


def attend(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    segment: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H d"]:
    """Averages the values of each segment's positions, by the softmax of q . k.

    Args:
        q: Queries, scaled already.
        k: Keys.
        v: Values.
        segment: Number of the sequence that each position belongs to; positions of different
            segments do not see each other.
        causal: Whether a position sees itself and earlier ones alone.
    """
    # Heads before positions: each product below is then one batched matrix product.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    length = q.shape[2]
    # Blocks of equal size, so that the last is no sliver.
    size = -(-length // max(1, length // _BLOCK)) if causal else length
    out = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        # Later positions get no logit at all: of many blocks half of the products are spared.
        visible = stop if causal else length
        mask = _visible(segment, start, stop, visible, causal)
        out.append(_attend_block(q[:, :, start:stop], k[:, :, :visible], v[:, :, :visible], mask))
    joined = jnp.concatenate(out, 2).astype(v.dtype)
    return joined.transpose(0, 2, 1, 3)


def reference_attention(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    segment: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H d"]:
    """Returns the result of `attend`, by one matrix of logits: the plain reference."""
    length = segment.shape[1]
    mask = _visible(segment, 0, length, length, causal)
    # One mask for all heads; the scale is 1 because queries are scaled already.
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0)


def _visible(
    segment: Int[Array, "B S"], start: int, stop: int, visible: int, causal: bool
) -> Bool[Array, "B Q T"]:
    """Returns a mask: true where a query of [start, stop) sees one of the first `visible`
    positions."""
    query = jnp.arange(start, stop)[:, None]
    other = jnp.arange(visible)[None, :]
    # Padding has a segment of its own, 0: it sees padding, and nothing sees it.
    mask = segment[:, start:stop, None] == segment[:, None, :visible]
    if not causal:
        return mask
    return mask & (query >= other)[None]


# The weights are computed again for the gradient, which costs less than keeping them.
@jax.checkpoint
def _attend_block(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B H T d"],
    v: Float[Array, "B H T d"],
    mask: Bool[Array, "B Q T"],
) -> Float[Array, "B H Q d"]:
    float32 = jnp.float32
    # Logits and sums are float32 whatever the operands are: bfloat16 has 8 significant bits.
    logits = jnp.einsum("bhsd,bhtd->bhst", q, k, preferred_element_type=float32)
    # Every position sees itself, so that no row is empty.
    logits = jnp.where(mask[:, None], logits, -1e30)
    # The maximum cancels out in the quotient, so that its gradient is 0.
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    narrow = weights.astype(v.dtype)
    total = jnp.einsum("bhst,bhtd->bhsd", narrow, v, preferred_element_type=float32)
    # Divided after the product: d numbers a query instead of T.
    return total / weights.sum(-1, keepdims=True)


def rotate(x: Float[Array, "B S H d"], position: Int[Array, "B S"]) -> Float[Array, "B S H d"]:
    """Rotates each pair of coordinates (i, i + d / 2) by position x 10,000^(-2 i / d).

    Products of rotated queries and keys depend on the distance of their positions alone (Su et al.
    2021).
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** -(jnp.arange(half) / half)
    # In float32: bfloat16 does not even tell all positions above 256 apart.
    angle = position[..., None] * frequencies[None, None]
    cos = jnp.cos(angle)[:, :, None].astype(x.dtype)
    sin = jnp.sin(angle)[:, :, None].astype(x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
