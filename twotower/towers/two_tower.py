"""The pair of towers: initialisation, and the vectors of users and items.

A tower is applied in two steps, so that training can differentiate between them: `lookup` takes the
rows that encoded features name from the tables, `vectors` turns rows and dense features into
vectors.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twotower.config import ModelConfig
from twotower.core.errors import ConfigError
from twotower.features.base import SIDES, Input, TableShape
from twotower.features.encoder import Encoder
from twotower.features.history import (
    HISTORY_POSITION,
    HISTORY_SEGMENT,
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
)
from twotower.towers.embeddings import PADDING, init_table, lookup, padded_rows, pool
from twotower.towers.layers import l2_normalize
from twotower.towers.towers import build_tower

# The learned temperature is kept within these: below, float32 softmax saturates; above, cosines
# cannot separate items.
TEMPERATURES = (0.01, 1.0)

Features = Mapping[str, Any]


class Weights(NamedTuple):
    """Everything a tower is made of: arrays only.

    Attributes:
        params: {"user": ..., "item": ..., "log_temperature": scalar}, what optax trains.
        tables: table name -> [V, D], what the sparse optimizer trains.
        batch_stats: {"user": ..., "item": ...}, running statistics of batch normalisation; empty
            without it.
    """

    params: dict[str, Any]
    tables: dict[str, Any]
    batch_stats: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TwoTower:
    """The towers of one configuration and encoder: pure functions, no arrays but the initial rows
    of `tables`.

    Compared by identity, so that it can be a static argument of `jit`. `dim` is D of what `embed`
    gives; see `cut`.
    """

    config: ModelConfig
    inputs: Mapping[str, Mapping[str, Input]]
    tables: Mapping[str, TableShape]
    towers: Mapping[str, nn.Module]
    dim: int

    @classmethod
    def build(cls, config: ModelConfig, encoder: Encoder) -> TwoTower:
        """The towers for what `encoder` encodes; raises as `build_from`."""
        return cls.build_from(config, encoder.inputs, encoder.tables)

    @classmethod
    def build_from(
        cls,
        config: ModelConfig,
        inputs: Mapping[str, Mapping[str, Input]],
        tables: Mapping[str, TableShape],
    ) -> TwoTower:
        """The towers for encoded inputs of each side, and the tables that these name.

        Raises:
            ConfigError: a tower kind or activation is unknown, or the two towers give vectors of
                different widths.
        """

        def build(side: str) -> nn.Module:
            return build_tower(
                getattr(config, side),
                inputs[side],
                history=config.history,
                dtype=config.dtype,
                field=f"config.model.{side}",
            )

        towers = {side: build(side) for side in SIDES}
        model = cls(config, inputs, tables, towers, 0)
        dims = {
            side: jax.eval_shape(lambda s=side: model._embed_example(s)).shape[-1] for side in SIDES
        }
        if dims["user"] != dims["item"]:
            raise ConfigError(
                f"The user tower gives vectors of width {dims['user']}, the item tower of width {dims['item']}: end "
                "config.model.user.layers and config.model.item.layers with one width, or give their features one "
                "total width."
            )
        return dataclasses.replace(model, dim=dims["user"])

    @property
    def normalize(self) -> bool:
        return self.config.normalize

    @property
    def history_length(self) -> int:
        """L of the histories of users; 0 where they are not read."""
        return max((i.history_length for i in self.inputs["user"].values()), default=0)

    def init(self, key: jax.Array) -> Weights:
        """Fresh weights."""
        params, stats = jax.jit(self.init_dense)(
            key
        )  # one program to compile, not one an operation
        tables = {
            name: self.init_rows(key, name) if self.given(name) is None else self.given(name)
            for name in self.tables
        }
        return Weights(params, jax.tree.map(jnp.asarray, tables), stats)

    def given(self, name: str) -> np.ndarray | None:
        """The rows that a table starts from where they are given (pretrained vectors), padded; None
        where they are drawn."""
        shape = self.tables[name]
        if shape.initial is None:
            return None
        return np.pad(
            shape.initial.astype(np.float32), ((0, padded_rows(shape.rows) - shape.rows), (0, 0))
        )

    def init_dense(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fresh `params` and `batch_stats`."""
        variables = {
            side: self._init_tower(side, jax.random.fold_in(key, i)) for i, side in enumerate(SIDES)
        }
        params = {side: v.get("params", {}) for side, v in variables.items()}
        params["log_temperature"] = jnp.log(jnp.float32(self.config.temperature))
        return params, {
            side: v["batch_stats"] for side, v in variables.items() if "batch_stats" in v
        }

    def init_rows(
        self, key: jax.Array, name: str, *, start: Any = 0, count: int | None = None
    ) -> Float[Array, "V E"]:
        """Drawn rows [start, start + count) of a table, all of them by default.

        The key of a table depends on its name alone: adding a feature leaves the others as they
            were.
        """
        shape = self.tables[name]
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return init_table(key, shape.rows, shape.width, start=start, count=count, norm=shape.norm)

    def lookup(
        self, side: str, tables: Mapping[str, jax.Array], features: Features
    ) -> dict[str, jax.Array]:
        """The table rows that the encoded ids name: feature -> [..., D], or [..., L, D] of
        multi-valued ones."""
        return {
            name: lookup(tables[i.table], features[name])
            for name, i in self.inputs[side].items()
            if i.table
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
    ) -> tuple[Float[Array, "B *S D"], dict[str, Any]]:
        """The vectors of one side; of sequences packed into rows, one for each place.

        Args:
            rows: what `lookup` gave for `features`.
            keys: a random key for each row in training; None at inference, when nothing is dropped
                and running statistics are used.
            axis: the mesh axis over which the batch is divided, for the statistics of batch
                normalisation.

        Returns:
            The vectors, and the side's new batch statistics (empty without batch normalisation).
        """
        variables = {"params": weights.params[side]}
        if side in weights.batch_stats:
            variables["batch_stats"] = weights.batch_stats[side]
        x, updates = self.towers[side].apply(
            variables,
            self._columns(side, rows, features),
            history=self._history(side, rows, features),
            keys=keys,
            axis=axis,
            mutable=["batch_stats"] if keys is not None else [],
        )
        return (l2_normalize(x) if self.normalize else x), updates.get("batch_stats", {})

    def embed(self, side: str, weights: Weights, features: Features) -> Float[Array, "B *S D"]:
        """The vectors of encoded features, as served: no dropout, running statistics, cut to
        `dim`."""
        vectors = self.vectors(
            side, weights, self.lookup(side, weights.tables, features), features
        )[0]
        return vectors if vectors.shape[-1] == self.dim else self.shorten(vectors, self.dim)

    def shorten(self, vectors: Float[Array, "... D"], width: int) -> Float[Array, "... W"]:
        """The first `width` numbers of vectors, normalised again where vectors are (Matryoshka,
        Kusupati et al., 2022)."""
        return l2_normalize(vectors[..., :width]) if self.normalize else vectors[..., :width]

    def cut(self, width: int) -> TwoTower:
        """The same towers, whose `embed` gives shortened vectors; needs the same weights."""
        return dataclasses.replace(self, dim=width)

    def temperature(self, params: Mapping[str, Any]) -> Float[Array, ""]:
        """The number that scores are divided by in the loss."""
        log = params["log_temperature"]
        return jnp.exp(log if self.config.learn_temperature else jax.lax.stop_gradient(log))

    def _columns(
        self, side: str, rows: Features, features: Features, *, of_events: bool = False
    ) -> dict[str, jax.Array]:
        """What the tower reads of a user or item, or else of each event of its history."""

        def column(name: str, i: Input) -> jax.Array:
            if not i.table:
                return features[name]
            return pool(rows[name], features[name]) if i.length else rows[name]

        return {
            name: column(name, i)
            for name, i in self.inputs[side].items()
            if bool(i.history_length) == of_events
        }

    def _history(self, side: str, rows: Features, features: Features) -> dict[str, Any] | None:
        """The fields of `twotower.towers.history.History`; None without one."""
        first = next((name for name, i in self.inputs[side].items() if i.history_length), None)
        if first is None:
            return None
        segment = features.get(HISTORY_SEGMENT)
        return {
            "vectors": self._columns(side, rows, features, of_events=True),
            # Packed, it is the start tokens that have no item.
            "valid": features[first] != PADDING if segment is None else segment > 0,
            "gaps": features.get(HISTORY_TIME_SINCE_PREVIOUS),
            "log_weights": features.get(HISTORY_WEIGHT),
            "segment": segment,
            "position": features.get(HISTORY_POSITION),
            "until": features.get(HISTORY_TIME_TO_NEXT),
        }

    def _example(self, side: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the tower reads of one user or item, all of it padding, and of its history."""
        rows, features = {}, {}
        for name, i in self.inputs[side].items():
            shape = (
                1,
                *([i.history_length] if i.history_length else []),
                *([i.length] if i.length else []),
            )
            features[name] = (
                jnp.zeros(shape, jnp.int32) if i.table else jnp.zeros((*shape, i.width))
            )
            if i.table:
                rows[name] = jnp.zeros((*shape, self.tables[i.table].width))
            if i.time_buckets:
                features[HISTORY_TIME_SINCE_PREVIOUS] = features[HISTORY_TIME_TO_NEXT] = jnp.zeros(
                    shape[:2], jnp.int32
                )
        return self._columns(side, rows, features), self._history(side, rows, features)

    def _init_tower(self, side: str, key: jax.Array) -> dict[str, Any]:
        columns, history = self._example(side)
        return self.towers[side].init(key, columns, history=history)

    def _embed_example(self, side: str) -> jax.Array:
        columns, history = self._example(side)
        return self.towers[side].apply(
            self._init_tower(side, jax.random.key(0)), columns, history=history
        )
