"""The pair of towers: initialisation, and the vectors of users and items.

A tower is applied in two steps, so that training can differentiate between them: `lookup` takes the rows that encoded
features name from the tables, `vectors` turns rows and dense features into vectors.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower.config import ModelConfig
from twotower.data.encoder import Encoder
from twotower.data.encodings import Input, TableShape
from twotower.towers.embeddings import init_table, lookup, padded_rows, pool
from twotower.towers.layers import l2_normalize
from twotower.towers.towers import build_tower
from twotower.validation import ConfigError

SIDES = ("user", "item")
# The learned temperature is kept within these: below, float32 softmax saturates; above, cosines cannot separate items.
TEMPERATURES = (0.01, 1.0)

Features = Mapping[str, Any]


class Weights(NamedTuple):
    """Everything a tower is made of: arrays only.

    Attributes:
        params: {"user": ..., "item": ..., "log_temperature": scalar}, what optax trains.
        tables: table name -> [V, D], what the sparse optimizer trains.
        batch_stats: {"user": ..., "item": ...}, running statistics of batch normalisation; empty without it.
    """

    params: dict[str, Any]
    tables: dict[str, Any]
    batch_stats: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TwoTower:
    """The towers of one configuration and encoder: pure functions, no arrays but the initial rows of `tables`.

    Compared by identity, so that it can be a static argument of `jit`.
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
        cls, config: ModelConfig, inputs: Mapping[str, Mapping[str, Input]], tables: Mapping[str, TableShape]
    ) -> TwoTower:
        """The towers for encoded inputs of each side, and the tables that these name.

        Raises:
            ConfigError: a tower kind or activation is unknown, or the two towers give vectors of different widths.
        """
        towers = {side: build_tower(getattr(config, side), inputs[side], field=f"config.model.{side}") for side in SIDES}
        model = cls(config, inputs, tables, towers, 0)
        dims = {side: jax.eval_shape(lambda s=side: model._embed_example(s)).shape[-1] for side in SIDES}
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

    def init(self, key: jax.Array) -> Weights:
        """Fresh weights."""
        variables = {side: self._init_tower(side, jax.random.fold_in(key, i)) for i, side in enumerate(SIDES)}
        params = {side: v.get("params", {}) for side, v in variables.items()}
        params["log_temperature"] = jnp.log(jnp.float32(self.config.temperature))
        stats = {side: v["batch_stats"] for side, v in variables.items() if "batch_stats" in v}
        return Weights(params, {name: self._init_table(key, name) for name in self.tables}, stats)

    def lookup(self, side: str, tables: Mapping[str, jax.Array], features: Features) -> dict[str, jax.Array]:
        """The table rows that the encoded ids name: feature -> [..., D], or [..., L, D] of multi-valued ones."""
        return {
            name: lookup(tables[i.table], features[name]) for name, i in self.inputs[side].items() if i.table
        }

    def vectors(
        self, side: str, weights: Weights, rows: Features, features: Features, *, dropout: jax.Array | None = None
    ) -> tuple[Float[Array, "B D"], dict[str, Any]]:
        """The vectors of one side.

        Args:
            rows: what `lookup` gave for `features`.
            dropout: a key in training; None at inference, when nothing is dropped and running statistics are used.

        Returns:
            The vectors, and the side's new batch statistics (empty without batch normalisation).
        """
        variables = {"params": weights.params[side]}
        if side in weights.batch_stats:
            variables["batch_stats"] = weights.batch_stats[side]
        train = dropout is not None
        x, updates = self.towers[side].apply(
            variables, self._columns(side, rows, features), train=train,
            mutable=["batch_stats"] if train else [], rngs={"dropout": dropout} if train else {},
        )  # fmt: skip
        return (l2_normalize(x) if self.normalize else x), updates.get("batch_stats", {})

    def embed(self, side: str, weights: Weights, features: Features) -> Float[Array, "B D"]:
        """The vectors of encoded features, as served: no dropout, running statistics."""
        return self.vectors(side, weights, self.lookup(side, weights.tables, features), features)[0]

    def temperature(self, params: Mapping[str, Any]) -> Float[Array, ""]:
        """The number that scores are divided by in the loss."""
        log = params["log_temperature"]
        return jnp.exp(log if self.config.learn_temperature else jax.lax.stop_gradient(log))

    def _columns(self, side: str, rows: Features, features: Features) -> dict[str, jax.Array]:
        def column(name: str, i: Input) -> jax.Array:
            if not i.table:
                return features[name]
            return pool(rows[name], features[name]) if i.length else rows[name]

        return {name: column(name, i) for name, i in self.inputs[side].items()}

    def _example(self, side: str) -> dict[str, jax.Array]:
        def zeros(i: Input) -> jax.Array:
            if not i.table:
                return jnp.zeros((1, i.width))
            return jnp.zeros((1, i.length, self.tables[i.table].width) if i.length else (1, self.tables[i.table].width))

        columns = {name: zeros(i) for name, i in self.inputs[side].items()}
        return {n: x.mean(-2) if self.inputs[side][n].table and self.inputs[side][n].length else x for n, x in columns.items()}

    def _init_tower(self, side: str, key: jax.Array) -> dict[str, Any]:
        return self.towers[side].init(key, self._example(side))

    def _embed_example(self, side: str) -> jax.Array:
        return self.towers[side].apply(self._init_tower(side, jax.random.key(0)), self._example(side))

    def _init_table(self, key: jax.Array, name: str) -> jax.Array:
        shape = self.tables[name]
        # The key of a table depends on its name alone: adding a feature leaves the others as they were.
        table = init_table(jax.random.fold_in(key, zlib.crc32(name.encode())), shape.rows, shape.width)
        if shape.initial is None:
            return table
        extra = padded_rows(shape.rows) - shape.rows
        return jnp.pad(jnp.asarray(shape.initial, jnp.float32), ((0, extra), (0, 0)))
