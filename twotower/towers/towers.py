"""Towers: the vectors of one side's features in, one vector out."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower.config import TowerConfig
from twotower.data.encodings import Input
from twotower.towers.layers import ACTIVATIONS, MLP
from twotower.validation import choose


class MLPTower(nn.Module):
    """Features, some of them projected, concatenated in the order of the specification; then dense layers.

    Attributes:
        config: of the layers. With none the concatenation itself is the vector.
        projections: feature -> width of a dense layer of its own before the concatenation.
    """

    config: TowerConfig
    projections: Mapping[str, int]

    @nn.compact
    def __call__(self, features: dict[str, Float[Array, "..."]], *, train: bool = False) -> Float[Array, "... D"]:
        columns = [
            nn.Dense(self.projections[name], name=f"project_{name}")(x) if name in self.projections else x
            for name, x in features.items()
        ]
        c = self.config
        x = nn.Dropout(c.dropout, deterministic=not train)(jnp.concatenate(columns, -1))
        return MLP(c.layers, c.activation, c.dropout, c.layer_norm, c.batch_norm, name="mlp")(x, train=train)


TOWERS = {"mlp": MLPTower}


def build_tower(config: TowerConfig, inputs: Mapping[str, Input], *, field: str) -> nn.Module:
    """The tower that `config` names for these inputs; `field` is where the configuration holds it, for errors."""
    kind = choose(TOWERS, config.kind, f"{field}.kind")
    choose(ACTIVATIONS, config.activation, f"{field}.activation")
    return kind(config, {name: i.projection for name, i in inputs.items() if i.projection})
