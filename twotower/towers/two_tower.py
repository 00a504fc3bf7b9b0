"""The pair of towers: initialisation, and the vectors of users and items.

A tower is applied in two steps, so that training can differentiate with respect to what lies
between them: `lookup` takes the rows that encoded features name from the tables, `vectors` turns
rows and dense features into vectors.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twotower.config import ModelConfig
from twotower.core.errors import ConfigError
from twotower.features.inputs import (
    HISTORY_COUNT,
    HISTORY_POSITION,
    HISTORY_ROW,
    HISTORY_SEGMENT,
    HISTORY_SLOT,
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
    SIDES,
    Input,
    TableShape,
)
from twotower.towers.embeddings import PADDING, init_table, lookup, padded_rows, pool
from twotower.towers.layers import l2_normalize
from twotower.towers.tower import Tower, build_tower

# Bounds of the learned temperature: below the first the float32 softmax saturates, above the second
# cosines cannot separate items.
TEMPERATURES = (0.01, 1.0)

Features = Mapping[str, Any]


class Weights(NamedTuple):
    """The arrays of both towers.

    Attributes:
        params: {"user": ..., "item": ..., "log_temperature": scalar}, trained by optax.
        tables: Table name -> [V, E], trained by `twotower.kernels.sparse_update`.
        batch_stats: {"user": ..., "item": ...}, running statistics of batch normalisation; empty
            without it.
    """

    params: dict[str, Any]
    tables: dict[str, Any]
    batch_stats: dict[str, Any]


@runtime_checkable
class EncodedFeatures(Protocol):
    """The inputs and tables of an encoder."""

    @property
    def inputs(self) -> Mapping[str, Mapping[str, Input]]:
        """Side -> feature -> shape and table of its encoded values."""
        ...

    @property
    def tables(self) -> Mapping[str, TableShape]:
        """Embedding tables by name."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TwoTower:
    """The towers of one configuration and encoder: pure functions, and no arrays but pretrained
    rows of tables.

    Compared by identity, so that it can be a static argument of `jit`.

    Attributes:
        config: Options of the model.
        inputs: Side -> feature -> shape and table of its encoded values.
        tables: Table name -> its shape, and its pretrained rows if it has some.
        towers: Side -> tower.
        dim: D, the width of the vectors of `embed`; see `cut`.
    """

    config: ModelConfig
    inputs: Mapping[str, Mapping[str, Input]]
    tables: Mapping[str, TableShape]
    towers: Mapping[str, Tower]
    dim: int

    @classmethod
    def build(cls, config: ModelConfig, encoder: EncodedFeatures) -> TwoTower:
        """Makes the towers for the features of an encoder; see `build_from`."""
        return cls.build_from(config, encoder.inputs, encoder.tables)

    @classmethod
    def build_from(
        cls,
        config: ModelConfig,
        inputs: Mapping[str, Mapping[str, Input]],
        tables: Mapping[str, TableShape],
    ) -> TwoTower:
        """Makes the towers for encoded inputs of each side, and the tables that these name.

        Raises:
            ConfigError: A tower kind or activation is unknown, or the two towers give vectors of
                different widths.
        """

        def build(side: str) -> Tower:
            return build_tower(
                getattr(config, side),
                inputs[side],
                history=config.history,
                dtype=config.dtype,
                field=f"config.model.{side}",
            )

        towers = {side: build(side) for side in SIDES}
        # The width is that of an example, traced and never computed: no tower states its own.
        model = cls(config, inputs, tables, towers, 0)
        dims = {}
        for side in SIDES:
            example = jax.eval_shape(functools.partial(model._embed_example, side))
            dims[side] = example.shape[-1]
        # Scores are dot products: a wider vector has no number to be multiplied with.
        if dims["user"] != dims["item"]:
            raise ConfigError(
                f"The user tower gives vectors of width {dims['user']}, the item tower of width "
                f"{dims['item']}: end config.model.user.layers and config.model.item.layers with "
                "one width, or give their features one total width."
            )
        return dataclasses.replace(model, dim=dims["user"])

    @property
    def normalize(self) -> bool:
        """Whether vectors have length 1."""
        return self.config.normalize

    @property
    def history_length(self) -> int:
        """L, the events of a user's history at most; 0 if histories are not read."""
        # Each feature of the events says how many there are, all of them the same.
        return max((spec.history_length for spec in self.inputs["user"].values()), default=0)

    def init(self, key: jax.Array) -> Weights:
        """Makes fresh weights."""
        pretrained = {name: self.pretrained_rows(name) for name in self.tables}
        drawn = [name for name, rows in pretrained.items() if rows is None]

        def draw(key: jax.Array) -> tuple[Any, Any, dict[str, jax.Array]]:
            return *self.init_dense(key), {name: self.init_rows(key, name) for name in drawn}

        # Under jit there is one program to compile, not one for each operation.
        params, stats, rows = jax.jit(draw)(key)
        tables = {name: jnp.asarray((pretrained | rows)[name]) for name in self.tables}
        return Weights(params, tables, stats)

    def pretrained_rows(self, name: str) -> np.ndarray | None:
        """Returns the pretrained vectors that a table starts from, padded, float32 [V, E]; None
        for a table whose rows are random."""
        shape = self.tables[name]
        if shape.initial is None:
            return None
        # Zeros after the last row: no id ever names them.
        padding = padded_rows(shape.rows) - shape.rows
        return np.pad(shape.initial.astype(np.float32), ((0, padding), (0, 0)))

    def init_dense(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Makes fresh `params` and `batch_stats`, see `Weights`."""
        params = {}
        stats = {}
        # A key for each side: towers of equal shape begin with different parameters.
        for i, side in enumerate(SIDES):
            variables = self._init_tower(side, jax.random.fold_in(key, i))
            params[side] = variables.get("params", {})
            if "batch_stats" in variables:
                stats[side] = variables["batch_stats"]
        # The log, so that the optimizer's steps are relative and the temperature stays above 0.
        params["log_temperature"] = jnp.log(jnp.float32(self.config.temperature))
        return params, stats

    def init_rows(
        self, key: jax.Array, name: str, *, start: Any = 0, count: int | None = None
    ) -> Float[Array, "V E"]:
        """Draws rows [start, start + count) of a table, all of them by default.

        The key of a table depends on its name alone: adding a feature leaves the others as they
        were.
        """
        shape = self.tables[name]
        # Not Python's `hash`, which is salted: every process and restart must draw the same rows.
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return init_table(key, shape.rows, shape.width, start=start, count=count, norm=shape.norm)

    def lookup(
        self, side: str, tables: Mapping[str, jax.Array], features: Features
    ) -> dict[str, jax.Array]:
        """Returns the table rows that encoded ids name: feature -> [..., E], or [..., L, E] for
        features of several values."""
        return {
            name: lookup(tables[spec.table], features[name])
            for name, spec in self.inputs[side].items()
            if spec.table
        }

    def vectors(
        self,
        side: str,
        weights: Weights,
        rows: Features,
        features: Features,
        *,
        keys: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[Float[Array, "B *S D"], Mapping[str, Any]]:
        """Returns the vectors of one side; of sequences packed into rows, one for each position.

        Args:
            side: "user" or "item".
            weights: Weights of both towers, whose tables are not read.
            rows: Result of `lookup` for `features`.
            features: Encoded features, feature -> [B, ...].
            keys: A random key for each row in training; None at inference, when nothing is dropped
                and running statistics are used.
            axis: The mesh axis over which the batch is divided, for the statistics of batch
                normalisation.

        Returns:
            The vectors, and the side's new batch statistics (empty without batch normalisation).
        """
        variables = {"params": weights.params[side]}
        if side in weights.batch_stats:
            variables["batch_stats"] = weights.batch_stats[side]
        training = keys is not None
        # Statistics change in training alone: at inference the running ones are read.
        x, updates = self.towers[side].apply(
            variables,
            self._columns(side, rows, features),
            history=self._history(side, rows, features),
            keys=keys,
            axis=axis,
            mutable=["batch_stats"] if training else [],
        )
        stats = {}
        if "batch_stats" in updates:
            stats = updates["batch_stats"]
        # Last, so that what a layer does to the length is no part of a score.
        if self.normalize:
            x = l2_normalize(x)
        return x, stats

    @property
    def reads_spans(self) -> bool:
        """Whether the events of a batch's histories may lie one after the other, in training."""
        tower = self.towers["user"]
        return tower.history is not None and tower.history.reads_spans

    def embed(self, side: str, weights: Weights, features: Features) -> Float[Array, "B *S D"]:
        """Returns the vectors of encoded features, as served: no dropout, running statistics, cut
        to `dim`."""
        rows = self.lookup(side, weights.tables, features)
        vectors, _ = self.vectors(side, weights, rows, features)
        # Whole vectors have length 1 already where they are normalised.
        if vectors.shape[-1] == self.dim:
            return vectors
        return self.shorten(vectors, self.dim)

    def shorten(self, vectors: Float[Array, "... D"], width: int) -> Float[Array, "... W"]:
        """Returns the first `width` numbers of vectors, normalised again where vectors are
        (Matryoshka, Kusupati et al., 2022)."""
        short = vectors[..., :width]
        if not self.normalize:
            return short
        return l2_normalize(short)

    def cut(self, width: int) -> TwoTower:
        """Returns the same towers, for the same weights, whose `embed` gives shortened vectors."""
        return dataclasses.replace(self, dim=width)

    def temperature(self, params: Mapping[str, Any]) -> Float[Array, ""]:
        """Returns the divisor of the scores in the loss."""
        log = params["log_temperature"]
        if not self.config.learn_temperature:
            # It stays among the parameters, so that a checkpoint is the same with and without
            # learning it.
            log = jax.lax.stop_gradient(log)
        return jnp.exp(log)

    def _columns(
        self, side: str, rows: Features, features: Features, *, of_events: bool = False
    ) -> dict[str, jax.Array]:
        """Returns the vector of each feature of a row; if `of_events`, of each event of its
        history."""
        columns = {}
        # In the order of the specification: the first dense layer's rows follow it.
        for name, spec in self.inputs[side].items():
            # Features of the user are columns of the row, those of its events columns of each
            # event.
            if bool(spec.history_length) != of_events:
                continue
            # Numbers and pretrained vectors need no look-up.
            if not spec.table:
                columns[name] = features[name]
            elif spec.length:
                # Several values, such as tags, are averaged.
                columns[name] = pool(rows[name], features[name])
            else:
                columns[name] = rows[name]
        return columns

    def _history(self, side: str, rows: Features, features: Features) -> dict[str, Any] | None:
        """Returns the fields of `twotower.towers.history.History`; None without a history."""
        events = [name for name, spec in self.inputs[side].items() if spec.history_length]
        if not events:
            return None
        # Several sequences in one row, which must not look at each other.
        segment = features.get(HISTORY_SEGMENT)
        if segment is None:
            valid = features[events[0]] != PADDING
        else:
            # In a packed sequence the start token has no item, and is valid all the same.
            valid = segment > 0
        return {
            "vectors": self._columns(side, rows, features, of_events=True),
            "valid": valid,
            "time_since_previous": features.get(HISTORY_TIME_SINCE_PREVIOUS),
            "log_weights": features.get(HISTORY_WEIGHT),
            "segment": segment,
            "position": features.get(HISTORY_POSITION),
            "time_to_next": features.get(HISTORY_TIME_TO_NEXT),
            "row": features.get(HISTORY_ROW),
            "slot": features.get(HISTORY_SLOT),
            "num_events": features.get(HISTORY_COUNT),
        }

    def _example(self, side: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Returns the columns and the history of one user or item, all of it padding."""
        rows = {}
        features = {}
        for name, spec in self.inputs[side].items():
            # One row: parameters have the same shapes whatever the batch has.
            shape = (1, *(length for length in (spec.history_length, spec.length) if length))
            if spec.table:
                features[name] = jnp.zeros(shape, jnp.int32)
                rows[name] = jnp.zeros((*shape, self.tables[spec.table].width))
            else:
                features[name] = jnp.zeros((*shape, spec.width))
            if spec.time_buckets:
                # Both times at once: a tower takes the one it reads and ignores the other.
                buckets = jnp.zeros(shape[:2], jnp.int32)
                features[HISTORY_TIME_SINCE_PREVIOUS] = buckets
                features[HISTORY_TIME_TO_NEXT] = buckets
        return self._columns(side, rows, features), self._history(side, rows, features)

    def _init_tower(self, side: str, key: jax.Array) -> Mapping[str, Any]:
        columns, history = self._example(side)
        return self.towers[side].init(key, columns, history=history)

    def _embed_example(self, side: str) -> jax.Array:
        columns, history = self._example(side)
        # One pass gives both the parameters and the vectors. Any key: under `eval_shape` nothing is
        # drawn.
        key = jax.random.key(0)
        vectors: Any
        vectors, _ = self.towers[side].init_with_output(key, columns, history=history)
        return vectors
