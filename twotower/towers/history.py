"""Encoders of a user's history: bags of events, and Transformers and recurrent networks over them.

An encoder takes [B, L] events with padding after the last and gives one vector for each history,
[B, F]. The causal Transformer and the recurrent network also take sequences packed into rows of S
positions and give a vector for each position, [B, S, F]. Both, and the bidirectional Transformer,
see a learned start token before the first event, so that an empty history has a vector too, and a
trained one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from twotower.config import HistoryConfig
from twotower.core.errors import ConfigError, choose
from twotower.core.kinds import Kinds
from twotower.kernels.attention import attend, rotate
from twotower.kernels.dense import activation_dtype, matmul
from twotower.towers.layers import dense, drop_out

# Dropout tells the layers of one tower apart by number: those of a history are numbered from here
# on, those of the tower around it from 0.
_FIRST_LAYER = 1_000
# Below the layers of a history and above those of any tower.
_EMPTY_LAYER = _FIRST_LAYER - 1


class History(NamedTuple):
    """The events of each row.

    Attributes:
        vectors: Vectors of the items, [B, L, E]; of packed sequences [B, S, E], 0 at the start of
            each.
        valid: Whether a position holds an event.
        time_since_previous: Bucket of the time since the event before, 0 for none; None if times
            are not read.
        log_weights: Log weights of the events of a bag; None for equal weights.
        segment: Number of the packed sequence, within its row, that each position belongs to, from
            1; 0 for padding.
        position: Number of events before it in its packed sequence; the start token has 0, the
            first event 1.
        time_to_next: Bucket of the time until the next event, or the request, from 1; None if it
            is not read.
        row: Row of each event [M] where the events of all rows lie one after the other, and the
            arrays above are [M, ...] instead of [B, L, ...]; None for windows of L events.
        slot: Number of events before it in its history, beside `row`.
        num_events: Number of events of each row [B], beside `row`.
    """

    vectors: Float[Array, "*N E"]
    valid: Bool[Array, "*N"]
    time_since_previous: Int[Array, "*N"] | None = None
    log_weights: Float[Array, "*N"] | None = None
    segment: Int[Array, "B L"] | None = None
    position: Int[Array, "B L"] | None = None
    time_to_next: Int[Array, "*N"] | None = None
    row: Int[Array, "M"] | None = None
    slot: Int[Array, "M"] | None = None
    num_events: Int[Array, "B"] | None = None


def mean_events(
    history: History, vectors: Float[Array, "*N F"], logits: Float[Array, "*N"]
) -> Float[Array, "B F"]:
    """Averages the events of each history by the softmax of their logits."""
    if history.row is None or history.num_events is None:
        return weighted_mean(vectors, logits, history.valid)
    return mean_of_spans(vectors, logits, history.valid, history.row, len(history.num_events))


def mean_of_spans(
    vectors: Float[Array, "M F"],
    logits: Float[Array, "M"],
    where: Bool[Array, "M"],
    row: Int[Array, "M"],
    num_rows: int,
) -> Float[Array, "B F"]:
    """Averages as `weighted_mean` does, the vectors of all rows one after the other.

    Args:
        vectors: Vectors, those of one row together.
        logits: Logits of their weights.
        where: Whether a vector counts.
        row: Row of each vector, never falling.
        num_rows: Number B of rows.
    """
    allowed = jnp.where(where, logits, -jnp.inf)
    top = jax.ops.segment_max(allowed, row, num_rows, indices_are_sorted=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # Masked before the exponential too: the gradient of a masked entry must not be NaN.
    weights = jnp.where(where, jnp.exp(jnp.where(where, logits, 0.0) - top[row]), 0.0)
    total = jax.ops.segment_sum(weights, row, num_rows, indices_are_sorted=True)
    shares = weights / jnp.where(total > 0, total, 1.0)[row]
    weighed = shares[:, None] * vectors
    return jax.ops.segment_sum(weighed, row, num_rows, indices_are_sorted=True)


def weighted_mean(
    vectors: Float[Array, "B L E"], logits: Float[Array, "B L"], where: Bool[Array, "B L"]
) -> Float[Array, "B E"]:
    """Averages vectors by the softmax of their logits; zero for rows without an allowed one."""
    top = jnp.max(logits, 1, keepdims=True, where=where, initial=-jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # Masked before the exponential too: the gradient of a masked entry must not be NaN.
    allowed = jnp.where(where, logits, 0.0)
    weights = jnp.where(where, jnp.exp(allowed - top), 0.0)
    total = weights.sum(1, keepdims=True)
    shares = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bl,ble->be", shares, vectors)


def empty_some(history: History, rate: float, keys: Array | None) -> History:
    """Empties whole histories, each by chance.

    Args:
        history: Events of each row, not packed into sequences.
        rate: Share of the histories to empty.
        keys: Random keys of the rows [B]; None empties nothing.
    """
    if keys is None or not rate:
        return history
    keep = drop_out(jnp.ones((len(keys), 1)), rate, keys, _EMPTY_LAYER) > 0
    if history.row is not None:
        keep = keep[history.row, 0]
    return history._replace(valid=history.valid & keep)


class HistoryEncoder(nn.Module):
    """Base of the encoders.

    Attributes:
        config: Options of the history.
        length: L, events of a history at most.
        time_buckets: Number of buckets of the time between events; 0: not read.
        dtype: Type of the arithmetic; parameters and vectors are float32 all the same.
        reads_time_to_next: Whether the time until the next event, or the request, is read too.
    """

    config: HistoryConfig
    length: int
    time_buckets: int = 0
    dtype: DTypeLike | None = None
    reads_time_to_next: bool = False
    # Whether the events of all rows may lie one after the other; see `History.row`.
    reads_spans: ClassVar[bool] = False

    def event_vectors(self, history: History) -> Float[Array, "*N F"]:
        """Returns a vector for each event: its item, and the times around it.

        Vectors have a mean square of 1 where the rows of tables have norm 1.
        """
        width = jnp.float32(history.vectors.shape[-1])
        # Layers are initialised for coordinates of mean square 1; those of a row are 1 / width.
        x = history.vectors * jnp.sqrt(width).astype(history.vectors.dtype)
        if self.config.width:
            x = apply_tokenwise(dense(self.config.width, self.dtype, name="project"), x)
        if self.time_buckets:
            # Bucket 0 is that of the first event. The names "gaps" and "until" are those in
            # checkpoints.
            shape = (self.time_buckets + 1, x.shape[-1])
            table = self.param("gaps", nn.initializers.normal(0.1), shape)
            x = x + table[history.time_since_previous].astype(x.dtype)
        if self.reads_time_to_next:
            # 0 to begin with: a missing time, which no log has, is not trained and adds nothing.
            shape = (self.time_buckets + 2, x.shape[-1])
            table = self.param("until", nn.initializers.zeros, shape)
            x = x + table[history.time_to_next].astype(x.dtype)
        return x

    def event_log_weights(self, history: History) -> Float[Array, "*N"]:
        """Returns log weights of the events in a bag: those of their kind, plus a learned one for
        each number of later events."""
        if history.log_weights is None:
            logits = jnp.zeros(history.valid.shape, jnp.float32)
        else:
            logits = history.log_weights
        if not self.config.recency:
            return logits
        weights = self.param("recency", _init_recency, (self.length,))
        if history.row is None or history.slot is None or history.num_events is None:
            counts = history.valid.sum(1, keepdims=True)
            later_events = counts - 1 - jnp.arange(self.length)[None, :]
        else:
            later_events = history.num_events[history.row] - 1 - history.slot
        return logits + weights[jnp.maximum(later_events, 0)]


def _init_recency(key: Array, shape: tuple[int]) -> Float[Array, "L"]:
    """Returns initial log weights: an event counts e times less for every ten later ones."""
    return -jnp.arange(shape[0], dtype=jnp.float32) / 10


class Bag(HistoryEncoder):
    """The weighted mean of the events."""

    reads_spans = True

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B F"]:
        x = self.event_vectors(history)
        mean = mean_events(history, x, self.event_log_weights(history))
        return drop_out(mean, self.config.dropout, keys, _FIRST_LAYER)


class AttentionBag(HistoryEncoder):
    """The mean of the events by learned weights, softmax(u . tanh(W x + b)), times those of a bag
    (Yang et al., NAACL 2016)."""

    reads_spans = True

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B F"]:
        x = self.event_vectors(history)
        logits = _attention_logits(x, self.dtype) + self.event_log_weights(history)
        mean = mean_events(history, x, logits)
        return drop_out(mean, self.config.dropout, keys, _FIRST_LAYER)


class SequenceEncoder(HistoryEncoder):
    """Base of the encoders whose every position sees itself and earlier ones.

    A history that is not packed has the vector of its last event.
    """

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B *S F"]:
        x = self.event_vectors(history)
        if history.segment is not None and history.position is not None:
            return self.encode(x, history.segment, history.position, keys)
        # Padding after the last event is in segment 0, which no event sees.
        x, segment, position = _with_start_token(x, history.valid)
        x = self.encode(x, segment, position, keys)
        # The start token is position 0, so that the last of n events is position n.
        last = history.valid.sum(1)[:, None, None]
        return jnp.take_along_axis(x, last, axis=1)[:, 0]

    def encode(
        self, x: Array, segment: Array, position: Array, keys: Array | None
    ) -> Float[Array, "B S F"]:
        """Returns a vector for each position of packed sequences.

        Args:
            x: Vectors of the events [B, S, F], with a position for each start token.
            segment: As in `History`.
            position: As in `History`.
            keys: Random keys of the rows [B], for dropout in training.
        """
        raise NotImplementedError


class Causal(SequenceEncoder):
    """A Transformer whose every position sees itself and earlier ones."""

    def encode(
        self, x: Array, segment: Array, position: Array, keys: Array | None
    ) -> Float[Array, "B S F"]:
        return _transform(self, x, segment, position, keys, causal=True)


class Gru(SequenceEncoder):
    """Layers of gated recurrent units (Cho et al., EMNLP 2014) over the events, as GRU4Rec reads
    a session (Hidasi et al., ICLR 2016)."""

    def encode(
        self, x: Array, segment: Array, position: Array, keys: Array | None
    ) -> Float[Array, "B S F"]:
        config = self.config
        x = _with_start_vectors(self, x, position)
        x = drop_out(x, config.dropout, keys, _FIRST_LAYER)
        # Every sequence begins with its start token, so that the state of the one before it in the
        # row ends there; padding comes last, and no event sees it.
        for i in range(config.blocks):
            x = GruLayer(self.dtype, name=f"layer_{i}")(x, position == 0)
            x = drop_out(x, config.dropout, keys, _FIRST_LAYER + 1 + i)
        return x


class Bidirectional(HistoryEncoder):
    """A Transformer whose every position sees all events, with a pool of their vectors.

    An empty history has the vector of the start token.
    """

    @nn.compact
    def __call__(self, history: History, *, keys: Array | None = None) -> Float[Array, "B F"]:
        x, segment, position = _with_start_token(self.event_vectors(history), history.valid)
        x = _transform(self, x, segment, position, keys, causal=False)
        choose(POOLINGS, self.config.pooling, "config.model.history.pooling")
        if self.config.pooling == "cls":
            return x[:, 0]
        if self.config.pooling == "attention":
            logits = _attention_logits(x, self.dtype)
        else:
            logits = jnp.zeros(segment.shape, jnp.float32)
        # The start token takes part only in a history without events.
        is_empty = ~history.valid.any(1)[:, None]
        return weighted_mean(x, logits, (segment > 0) & ((position > 0) | is_empty))


HISTORIES: Kinds[type[HistoryEncoder]] = Kinds(
    "history encoder",
    {
        "bag": Bag,
        "attention": AttentionBag,
        "causal": Causal,
        "gru": Gru,
        "bidirectional": Bidirectional,
    },
    synonyms={
        "mean": "bag",
        "average": "bag",
        "pooling": "bag",
        "transformer": "causal",
        "sasrec": "causal",
        "gpt": "causal",
        "rnn": "gru",
        "lstm": "gru",
        "gru4rec": "gru",
        "bert": "bidirectional",
        "bert4rec": "bidirectional",
    },
)
POOLINGS: Mapping[str, None] = dict.fromkeys(("mean", "cls", "attention"))


def _with_start_token(
    x: Float[Array, "B L F"], valid: Bool[Array, "B L"]
) -> tuple[Array, Array, Array]:
    """Returns events behind an empty position for the start token: vectors [B, L + 1, F], segments
    and positions [B, L + 1]."""
    # One sequence a row, of segment 1; padding has segment 0, as in packed rows.
    segment = jnp.pad(valid.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=1)
    position = jnp.broadcast_to(jnp.arange(x.shape[1] + 1)[None], segment.shape)
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0))), segment, position


def _with_start_vectors(
    encoder: HistoryEncoder, x: Float[Array, "B S F"], position: Int[Array, "B S"]
) -> Float[Array, "B S F"]:
    """Returns events with the learned vector of the start token, a parameter of `encoder`, at the
    start of each sequence."""
    start = encoder.param("start", nn.initializers.normal(0.1), (x.shape[-1],))
    # Every packed sequence begins with a start token, wherever it begins within its row.
    return jnp.where((position == 0)[..., None], start[None, None].astype(x.dtype), x)


def _attention_logits(x: Float[Array, "*N F"], dtype: DTypeLike | None) -> Float[Array, "*N"]:
    """Returns the logits u . tanh(W x + b), by layers of the module that calls."""
    hidden = jnp.tanh(dense(x.shape[-1], dtype, name="attention_hidden")(x))
    logits = dense(1, dtype, use_bias=False, name="attention")(hidden)
    # Softmax weights are formed in float32, whatever the arithmetic of the layers is.
    return logits[..., 0].astype(jnp.float32)


def _transform(
    encoder: HistoryEncoder,
    x: Array,
    segment: Array,
    position: Array,
    keys: Array | None,
    *,
    causal: bool,
) -> Float[Array, "B S F"]:
    """Applies the blocks of a Transformer, as modules of `encoder`.

    Args:
        encoder: The history encoder that has their options and parameters.
        x: Vectors of the events [B, S, F], with a position for each start token.
        segment: As in `History`.
        position: As in `History`.
        keys: Random keys of the rows [B], for dropout in training.
        causal: Whether a position sees itself and earlier ones alone.
    """
    config = encoder.config
    width = x.shape[-1]
    _check_heads(config, width)
    x = _with_start_vectors(encoder, x, position)
    if choose(POSITIONS, config.positions, "config.model.history.positions"):
        # L events and the start token.
        shape = (encoder.length + 1, width)
        table = encoder.param("positions", nn.initializers.normal(0.02), shape)
        x = x + table[position].astype(x.dtype)
    x = drop_out(x, config.dropout, keys, _FIRST_LAYER)
    block = choose(BLOCKS, config.block, "config.model.history.block")
    for i in range(config.blocks):
        layer = block(config, i, causal, encoder.dtype, name=f"block_{i}")
        x = layer(x, segment, position, keys=keys)
    # Pre-norm blocks leave their sum unnormalised, so that the last norm belongs to the encoder.
    return apply_tokenwise(nn.LayerNorm(name="norm"), x)


def _check_heads(config: HistoryConfig, width: int) -> None:
    rotary = config.positions == "rotary"
    if width % config.heads or (rotary and width // config.heads % 2):
        parts = ", into even parts for rotary positions" if rotary else ""
        raise ConfigError(
            f"config.model.history.heads={config.heads} must divide the width of the events, "
            f"{width}{parts}."
        )


def apply_tokenwise(module: nn.Module, x: Float[Array, "*N F"]) -> Float[Array, "*N G"]:
    """Applies a module to each position."""
    # On a CPU gradients of products of [B S, F] are formed faster than those of [B, S, F].
    tokens = module(x.reshape(-1, x.shape[-1]))
    return tokens.reshape(*x.shape[:-1], -1)


class GruLayer(nn.Module):
    """One layer of gated recurrent units, whose state begins anew at the start of each sequence.

    With the state h before an event x, gates r and z, and a candidate n:

        r = sigmoid(W_r x + U_r h)
        z = sigmoid(W_z x + U_z h)
        n = tanh(W_n x + r * (U_n h + b))
        h' = (1 - z) * n + z * h

    The form of `flax.linen.GRUCell` and cuDNN. A cell of Flax would need one of its lifted loops;
    this one loops by `jax.lax.scan` over arrays alone.

    Attributes:
        dtype: Type of the products; parameters and states are float32 all the same.
    """

    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S F"], is_start: Bool[Array, "B S"]
    ) -> Float[Array, "B S F"]:
        width = x.shape[-1]
        # What events alone decide is one product over all positions; the loop keeps the rest.
        inputs = apply_tokenwise(dense(3 * width, self.dtype, name="input"), x)
        # Each matrix is orthogonal by itself: powers of it neither grow nor vanish.
        kernel = self.param("recurrent", _init_recurrent, (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros, (width,))

        def step(state: Array, event: tuple[Array, Array]) -> tuple[Array, Array]:
            gates, starts = event
            state = jnp.where(starts[:, None], 0.0, state)
            reset_x, update_x, new_x = jnp.split(gates, 3, -1)
            hidden = matmul(state, kernel, self.dtype)
            reset_h, update_h, new_h = jnp.split(hidden, 3, -1)
            reset = nn.sigmoid(reset_x + reset_h)
            update = nn.sigmoid(update_x + update_h)
            new = jnp.tanh(new_x + reset * (new_h + bias[None]))
            state = (1.0 - update) * new + update * state
            return state, state

        # Positions before rows, which `scan` walks along.
        inputs = inputs.astype(jnp.promote_types(x.dtype, jnp.float32)).transpose(1, 0, 2)
        # Zero by way of the inputs: inside a `shard_map` the loop's first state must vary over the
        # mesh as the later ones do.
        first = jnp.zeros_like(inputs[0, :, :width])
        _, states = jax.lax.scan(step, first, (inputs, is_start.T))
        return states.transpose(1, 0, 2)


def _init_recurrent(key: Array, shape: tuple[int, int]) -> Float[Array, "F G"]:
    """Draws the recurrent matrices of both gates and of the candidate, side by side."""
    width = shape[0]
    keys = jax.random.split(key, 3)
    orthogonal = nn.initializers.orthogonal()
    return jnp.concatenate([orthogonal(key, (width, width)) for key in keys], 1)


class SelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) within segments, with rotary positions if the
    options name them."""

    config: HistoryConfig
    causal: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S F"], segment: Int[Array, "B S"], position: Int[Array, "B S"]
    ) -> Float[Array, "B S F"]:
        width = x.shape[-1]
        heads = self.config.heads
        # One product for all three: wide products are faster than narrow ones.
        qkv = apply_tokenwise(dense(3 * width, self.dtype, name="qkv"), x)
        shape = (*x.shape[:2], heads, width // heads)
        q, k, v = (part.reshape(shape) for part in jnp.split(qkv, 3, -1))
        if self.config.positions == "rotary":
            q = rotate(q, position)
            k = rotate(k, position)
        # The scale goes onto the queries, which are fewer numbers than the logits.
        out = attend(q * (width // heads) ** -0.5, k, v, segment, causal=self.causal)
        return apply_tokenwise(dense(width, self.dtype, name="out"), out.reshape(x.shape))


class TransformerBlock(nn.Module):
    """Base of the blocks of a Transformer.

    Attributes:
        config: Options of the history.
        index: Number of the block, from 0.
        causal: Whether a position sees itself and earlier ones alone.
        dtype: Type of the arithmetic; parameters stay float32.
    """

    config: HistoryConfig
    index: int
    causal: bool
    dtype: DTypeLike | None

    def normalize(self, x: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
        return apply_tokenwise(nn.LayerNorm(dtype=activation_dtype(self.dtype)), x)

    def self_attention(self, x: Array, segment: Array, position: Array) -> Float[Array, "B S F"]:
        attention = SelfAttention(self.config, self.causal, self.dtype, name="attention")
        return attention(self.normalize(x), segment, position)

    def project(self, width: int, x: Array, **options: Any) -> Float[Array, "B S F"]:
        return apply_tokenwise(dense(width, self.dtype, **options), x)

    def drop_out(self, x: Array, keys: Array | None, part: int) -> Float[Array, "B S F"]:
        """Drops units out of one of the block's two parts, 0 or 1."""
        # `_FIRST_LAYER` itself is the dropout of the events.
        layer = _FIRST_LAYER + 1 + 2 * self.index + part
        return drop_out(x, self.config.dropout, keys, layer)


class SasrecBlock(TransformerBlock):
    """The block x + attention(norm(x)), then x + dense(relu(dense(norm(x)))): Kang and McAuley,
    ICDM 2018, normalised before each part."""

    @nn.compact
    def __call__(
        self, x: Array, segment: Array, position: Array, *, keys: Array | None
    ) -> Float[Array, "B S F"]:
        width = x.shape[-1]
        # The residual sum stays in the type of x, whatever the layers compute in.
        added = self.self_attention(x, segment, position)
        x = x + self.drop_out(added, keys, 0).astype(x.dtype)
        hidden = nn.relu(self.project(self.config.expansion * width, self.normalize(x)))
        added = self.project(width, hidden)
        return x + self.drop_out(added, keys, 1).astype(x.dtype)


class LigrBlock(TransformerBlock):
    """The block x + attention(norm(x)) * sigmoid(W x), then x + SwiGLU(norm(x)) * sigmoid(W x).

    The gated residual block of LiGR (Borisyuk et al. 2025, arXiv 2502.03417); SwiGLU of Shazeer
    2020, arXiv 2002.05202.
    """

    @nn.compact
    def __call__(
        self, x: Array, segment: Array, position: Array, *, keys: Array | None
    ) -> Float[Array, "B S F"]:
        width = x.shape[-1]
        # Flax numbers unnamed layers in the order in which they are made: the order of these lines
        # is that of the parameters in checkpoints.
        added = self.self_attention(x, segment, position)
        x = self._add_gated(x, added, keys, 0)
        normed = self.normalize(x)
        hidden_width = self.config.expansion * width
        gate = nn.silu(self.project(hidden_width, normed, use_bias=False))
        hidden = gate * self.project(hidden_width, normed, use_bias=False)
        added = self.project(width, hidden, use_bias=False)
        return self._add_gated(x, added, keys, 1)

    def _add_gated(self, x: Array, added: Array, keys: Array | None, part: int) -> Array:
        gate = nn.sigmoid(self.project(x.shape[-1], x))
        return x + (self.drop_out(added, keys, part) * gate).astype(x.dtype)


BLOCKS: Mapping[str, type[TransformerBlock]] = {"sasrec": SasrecBlock, "ligr": LigrBlock}
# Kind of positions -> whether they have a table of vectors; rotary ones turn queries and keys.
POSITIONS = {"learned": True, "rotary": False}
