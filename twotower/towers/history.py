"""What a history says of its user: bags of events, and Transformers over them.

Histories come as they are, [B, L] events with padding after the last, and give one vector each, [B,
F]. The causal Transformer also takes sequences packed into rows of S places and gives a vector for
each place, [B, S, F]. A Transformer sees a learned start token before the first event: an empty
history has a vector too, and a trained one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from twotower.config import HistoryConfig
from twotower.core.errors import ConfigError, choose
from twotower.towers.layers import dense, drop_out, of_activations

# Layers of a history are numbered from here on, apart from those of the tower around it; see
# `drop_out`.
_FIRST_LAYER = 1_000
_BLOCK = 50  # queries that causal attention takes at once, about


class History(NamedTuple):
    """The events of each row.

    Attributes:
        vectors: of the items, [B, L, E]; of packed sequences [B, S, E], 0 at the start of each.
        valid: which places hold an event.
        gaps: bucket of the time since the event before, 0 for none; None where it is not read.
        until: bucket of the time until the event after, or the request, from 1; None where it is
            not read.
        log_weights: of the events of a bag; None where all weigh the same.
        segment: of packed sequences: which of the row's sequences each place is of, from 1; 0 where
            it is of none.
        position: of packed sequences: events before it in its sequence; the start token stands at
            0, the first event at 1.
    """

    vectors: Float[Array, "B L E"]
    valid: Bool[Array, "B L"]
    gaps: Int[Array, "B L"] | None = None
    log_weights: Float[Array, "B L"] | None = None
    segment: Int[Array, "B L"] | None = None
    position: Int[Array, "B L"] | None = None
    until: Int[Array, "B L"] | None = None


def pooled(
    vectors: Float[Array, "B L E"], logits: Float[Array, "B L"], where: Bool[Array, "B L"]
) -> Float[Array, "B E"]:
    """The mean of the vectors by the softmax of their logits; zero where there is none."""
    top = jnp.max(logits, 1, keepdims=True, where=where, initial=-jnp.inf)
    weights = jnp.where(
        where, jnp.exp(jnp.where(where, logits, 0.0) - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0
    )
    total = weights.sum(1, keepdims=True)
    return jnp.einsum("bl,ble->be", weights / jnp.where(total > 0, total, 1.0), vectors)


class _Encoder(nn.Module):
    """What the kinds share.

    Attributes:
        length: L.
        gaps: buckets of the time between events; 0: none.
        until: whether the time until the next event, or the request, is read too.
        dtype: of the arithmetic; parameters and vectors are float32 all the same.
    """

    config: HistoryConfig
    length: int
    gaps: int = 0
    dtype: Any = None
    until: bool = False

    def events(self, history: History, keys: Array | None) -> Float[Array, "B L F"]:
        """The vector of each event, of mean square 1 for rows of norm 1, and what the times around
        it say."""
        x = history.vectors * jnp.sqrt(jnp.float32(history.vectors.shape[-1])).astype(
            history.vectors.dtype
        )
        if self.config.width:
            x = flat(dense(self.config.width, self.dtype, name="project"), x)
        if self.gaps:
            table = self.param("gaps", nn.initializers.normal(0.1), (self.gaps + 1, x.shape[-1]))
            x = x + table[history.gaps].astype(x.dtype)
        if self.until:
            # 0 to begin with: a missing time, which no log has, is not trained and says nothing.
            table = self.param("until", nn.initializers.zeros, (self.gaps + 2, x.shape[-1]))
            x = x + table[history.until].astype(x.dtype)
        return x

    def given_logits(self, history: History) -> Float[Array, "B L"]:
        """Of a bag: what weighs an event beside what it is."""
        logits = (
            jnp.zeros(history.valid.shape, jnp.float32)
            if history.log_weights is None
            else history.log_weights
        )
        if not self.config.recency:
            return logits
        weights = self.param("recency", _fading, (self.length,))
        later = history.valid.sum(1, keepdims=True) - 1 - jnp.arange(self.length)[None, :]
        return logits + weights[jnp.maximum(later, 0)]


def _fading(key: Array, shape: tuple[int]) -> Float[Array, "L"]:
    """Log weights to begin with: an event counts e times less for every ten that follow it."""
    return -jnp.arange(shape[0], dtype=jnp.float32) / 10


class Bag(_Encoder):
    """The mean of the events by their weights."""

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B F"]:
        x = self.events(history, keys)
        return drop_out(
            pooled(x, self.given_logits(history), history.valid),
            self.config.dropout,
            keys,
            _FIRST_LAYER,
        )


class AttentionBag(_Encoder):
    """The mean of the events by learned weights, softmax(u . tanh(W x + b)), times their given ones
    (Yang et al., NAACL 2016)."""

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B F"]:
        x = self.events(history, keys)
        logits = _attention_logits(x, self.dtype) + self.given_logits(history)
        return drop_out(pooled(x, logits, history.valid), self.config.dropout, keys, _FIRST_LAYER)


class Causal(_Encoder):
    """A Transformer whose every place knows itself and what is before it; of a history as it is,
    the vector of its last event."""

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B *S F"]:
        if history.segment is not None:
            x = self.events(history, keys)
            return self._encode(x, history.segment, history.position, keys)
        x, segment, position = _started(self.events(history, keys), history.valid)
        x = self._encode(x, segment, position, keys)
        return jnp.take_along_axis(x, history.valid.sum(1)[:, None, None], axis=1)[:, 0]

    def _encode(self, x: Array, segment: Array, position: Array, keys: Array | None) -> Array:
        return _transform(self, x, segment, position, keys, causal=True)


class Bidirectional(_Encoder):
    """A Transformer whose every place knows all events; their vectors pooled (an empty history's is
    the start token's)."""

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B F"]:
        x, segment, position = _started(self.events(history, keys), history.valid)
        x = _transform(self, x, segment, position, keys, causal=False)
        choose(POOLINGS, self.config.pooling, "config.model.history.pooling")
        if self.config.pooling == "cls":
            return x[:, 0]
        logits = (
            _attention_logits(x, self.dtype)
            if self.config.pooling == "attention"
            else jnp.zeros(segment.shape, jnp.float32)
        )
        # The start token is asked only where there is no event.
        return pooled(x, logits, (segment > 0) & ((position > 0) | ~history.valid.any(1)[:, None]))


HISTORIES: Mapping[str, type[_Encoder]] = {
    "bag": Bag,
    "attention": AttentionBag,
    "causal": Causal,
    "bidirectional": Bidirectional,
}
POOLINGS = dict.fromkeys(("mean", "cls", "attention"))


def _started(x: Array, valid: Array) -> tuple[Array, Array, Array]:
    """Events behind a place for the start token: vectors [B, L + 1, F], segments and positions [B,
    L + 1]."""
    segment = jnp.pad(valid.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=1)
    position = jnp.broadcast_to(jnp.arange(x.shape[1] + 1)[None], segment.shape)
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0))), segment, position


def _attention_logits(x: Array, dtype: Any) -> Float[Array, "B L"]:
    hidden = jnp.tanh(dense(x.shape[-1], dtype, name="attention_hidden")(x))
    return dense(1, dtype, use_bias=False, name="attention")(hidden)[..., 0].astype(jnp.float32)


def _transform(
    encoder: _Encoder,
    x: Array,
    segment: Array,
    position: Array,
    keys: Array | None,
    *,
    causal: bool,
) -> Array:
    """The blocks, within the scope of `encoder`, over events with places for start tokens, [B, S,
    F]."""
    config, width = encoder.config, x.shape[-1]
    if width % config.heads or (config.positions == "rotary" and width // config.heads % 2):
        raise ConfigError(
            f"config.model.history.heads={config.heads} must divide the width of the events, {width}"
            f"{', into even parts for rotary positions' if config.positions == 'rotary' else ''}."
        )
    start = encoder.param("start", nn.initializers.normal(0.1), (width,))
    x = jnp.where((position == 0)[..., None], start[None, None].astype(x.dtype), x)
    if choose(POSITIONS, config.positions, "config.model.history.positions"):
        table = encoder.param(
            "positions", nn.initializers.normal(0.02), (encoder.length + 1, width)
        )
        x = x + table[position].astype(x.dtype)
    x = drop_out(x, config.dropout, keys, _FIRST_LAYER)
    block = choose(BLOCKS, config.block, "config.model.history.block")
    for i in range(config.blocks):
        x = block(config, i, causal, encoder.dtype, name=f"block_{i}")(
            x, segment, position, keys=keys
        )
    return flat(nn.LayerNorm(name="norm"), x)


def flat(module: nn.Module, x: Float[Array, "B S F"]) -> Float[Array, "B S G"]:
    """`module` of each place: on a CPU, gradients of products of [B S, F] are formed faster than
    those of [B, S, F]."""
    return module(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class _Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) within segments; with rotary positions (Su et al.
    2021) turned by them."""

    config: HistoryConfig
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S F"], segment: Int[Array, "B S"], position: Int[Array, "B S"]
    ) -> Float[Array, "B S F"]:
        width, heads = x.shape[-1], self.config.heads
        qkv = flat(dense(3 * width, self.dtype, name="qkv"), x)
        q, k, v = (
            part.reshape(*x.shape[:2], heads, width // heads) for part in jnp.split(qkv, 3, -1)
        )
        if self.config.positions == "rotary":
            q, k = rotated(q, position), rotated(k, position)
        out = attend(q * (width // heads) ** -0.5, k, v, segment, causal=self.causal)
        return flat(dense(width, self.dtype, name="out"), out.reshape(x.shape))


def attend(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    segment: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H d"]:
    """The mean of v by the softmax of q . k over the places of a segment; where `causal`, up to the
    place itself.

    Queries go in blocks, so that what a causal query cannot see is not computed but for the corner
    of its block.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    length = q.shape[2]
    size = -(-length // max(1, length // _BLOCK)) if causal else length

    # Its shares are made again for the gradient: to keep them costs more than to make them.
    @jax.checkpoint
    def block(q: Array, k: Array, v: Array, mask: Array) -> Array:
        logits = jnp.einsum("bhsd,bhtd->bhst", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(
            mask[:, None], logits, -1e30
        )  # of these, one at least is allowed: the place itself
        shares = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        mean = jnp.einsum(
            "bhst,bhtd->bhsd", shares.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return mean / shares.sum(-1, keepdims=True)

    out = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = stop if causal else length
        place, other = jnp.arange(start, stop)[:, None], jnp.arange(seen)[None, :]
        mask = segment[:, start:stop, None] == segment[:, None, :seen]
        mask = mask & (place >= other)[None] if causal else mask
        out.append(block(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], mask))
    return jnp.concatenate(out, 2).transpose(0, 2, 1, 3).astype(v.dtype)


def rotated(x: Float[Array, "B S H d"], position: Int[Array, "B S"]) -> Float[Array, "B S H d"]:
    """Each pair of coordinates (i, i + d / 2) turned by position x 10,000^(-2 i / d): products
    depend on distances alone."""
    half = x.shape[-1] // 2
    angle = position[..., None] * (10_000.0 ** -(jnp.arange(half) / half))[None, None]
    cos, sin = (f(angle)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class SasrecBlock(nn.Module):
    """x + attention(norm(x)), then x + dense(relu(dense(norm(x)))): Kang and McAuley, ICDM 2018,
    normalised before each part."""

    config: HistoryConfig
    index: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, segment: Array, position: Array, *, keys: Array | None
    ) -> Float[Array, "B S F"]:
        c, layer, width = self.config, _FIRST_LAYER + 1 + 2 * self.index, x.shape[-1]
        normed = flat(nn.LayerNorm(dtype=of_activations(self.dtype)), x)
        added = _Attention(c, self.causal, self.dtype, name="attention")(normed, segment, position)
        x = x + drop_out(added, c.dropout, keys, layer).astype(x.dtype)
        hidden = nn.relu(
            flat(
                dense(c.expansion * width, self.dtype),
                flat(nn.LayerNorm(dtype=of_activations(self.dtype)), x),
            )
        )
        return x + drop_out(
            flat(dense(width, self.dtype), hidden), c.dropout, keys, layer + 1
        ).astype(x.dtype)


class LigrBlock(nn.Module):
    """x + attention(norm(x)) * sigmoid(W x), then x + SwiGLU(norm(x)) * sigmoid(W x).

    The gated residual block of LiGR (Borisyuk et al. 2025, arXiv 2502.03417); SwiGLU of Shazeer
    2020, arXiv 2002.05202.
    """

    config: HistoryConfig
    index: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, segment: Array, position: Array, *, keys: Array | None
    ) -> Float[Array, "B S F"]:
        c, layer, width = self.config, _FIRST_LAYER + 1 + 2 * self.index, x.shape[-1]

        def gated(added: Array, layer: int) -> Array:
            gate = nn.sigmoid(flat(dense(width, self.dtype), x))
            return x + (drop_out(added, c.dropout, keys, layer) * gate).astype(x.dtype)

        normed = flat(nn.LayerNorm(dtype=of_activations(self.dtype)), x)
        x = gated(
            _Attention(c, self.causal, self.dtype, name="attention")(normed, segment, position),
            layer,
        )
        normed = flat(nn.LayerNorm(dtype=of_activations(self.dtype)), x)
        hidden = [
            flat(dense(c.expansion * width, self.dtype, use_bias=False), normed) for _ in range(2)
        ]
        return gated(
            flat(dense(width, self.dtype, use_bias=False), nn.silu(hidden[0]) * hidden[1]),
            layer + 1,
        )


BLOCKS: Mapping[str, type[nn.Module]] = {"sasrec": SasrecBlock, "ligr": LigrBlock}
# Kind of positions -> whether they have a table of vectors.
POSITIONS = {"learned": True, "rotary": False}
