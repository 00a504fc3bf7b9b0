"""Towers: the vectors of one side's features in, one vector out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower.config import HistoryConfig, TowerConfig
from twotower.core.errors import choose
from twotower.features.base import Input
from twotower.towers.history import HISTORIES, History
from twotower.towers.layers import ACTIVATIONS, MLP, dense, drop_out


class MLPTower(nn.Module):
    """Features, some of them projected, concatenated in the order of the specification; then dense
    layers.

    Attributes:
        config: of the layers. With none the concatenation itself is the vector.
        projections: feature -> width of a dense layer of its own before the concatenation.
        history: what reads a history, where there is one.
        dtype: of the arithmetic; parameters and vectors are float32 all the same.

    Called with features [B, ...] each, [B, S, ...] for sequences packed into rows, and in training
    with a random key for each row ([B], for dropout; None at inference, when running statistics are
    used too) and the mesh axis over which batch statistics are taken.
    """

    config: TowerConfig
    projections: Mapping[str, int]
    history: nn.Module | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        features: dict[str, Any],
        *,
        history: dict[str, Any] | None = None,
        keys: Array | None = None,
        axis: str | None = None,
    ) -> Float[Array, "... D"]:
        """Args: history: fields of `History`; "vectors" is a mapping like `features`, of each
        event."""

        def projected(columns: dict[str, Any]) -> list[Array]:
            return [
                dense(self.projections[name], self.dtype, name=f"project_{name}".replace("/", "_"))(
                    x
                )
                if name in self.projections
                else x
                for name, x in columns.items()
            ]

        c, columns = self.config, projected(features)
        if history is not None:
            events = History(
                **history | {"vectors": jnp.concatenate(projected(history["vectors"]), -1)}
            )
            columns.append(self.history(events, keys=keys))
        x = drop_out(jnp.concatenate(columns, -1), c.dropout, keys, 0)
        mlp = MLP(
            c.layers, c.activation, c.dropout, c.layer_norm, c.batch_norm, self.dtype, name="mlp"
        )
        # Whatever the arithmetic was in, vectors are at least float32: scores of half precision
        # would not rank.
        return mlp(x, keys=keys, axis=axis).astype(jnp.promote_types(x.dtype, jnp.float32))


TOWERS = {"mlp": MLPTower}
# What the arithmetic of towers and of the loss's products is in; None keeps the type of the
# parameters.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def build_tower(
    config: TowerConfig,
    inputs: Mapping[str, Input],
    *,
    history: HistoryConfig,
    dtype: str,
    field: str,
) -> nn.Module:
    """The tower that `config` names for these inputs; `field` is where the configuration holds it,
    for errors."""
    kind = choose(TOWERS, config.kind, f"{field}.kind")
    choose(ACTIVATIONS, config.activation, f"{field}.activation")
    dtype = choose(DTYPES, dtype, "config.model.dtype")
    first = next((i for i in inputs.values() if i.history_length), None)
    reader = None
    if first is not None:
        reader = choose(HISTORIES, history.kind, "config.model.history.kind")(
            history, first.history_length, first.time_buckets, dtype, first.time_to_next
        )
    return kind(
        config, {name: i.projection for name, i in inputs.items() if i.projection}, reader, dtype
    )
