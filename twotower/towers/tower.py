"""One tower: the function from the vectors of one side's features to one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twotower.config import HistoryConfig, TowerConfig
from twotower.core.errors import ConfigError, choose
from twotower.features.base import Input
from twotower.towers.history import HISTORIES, History, HistoryEncoder
from twotower.towers.layers import ACTIVATIONS, MLP, dense, drop_out

# Type of the arithmetic of towers, and of the operands of the loss's products; None keeps the type
# of the parameters.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


class MLPTower(nn.Module):
    """Features, some of them projected, concatenated in the order of the specification; then dense
    layers.

    Attributes:
        config: Options of the layers. Without layers the concatenation itself is the vector.
        projections: Feature -> width of a dense layer of its own before the concatenation.
        history: Encoder of the history, if the side has one.
        dtype: Type of the arithmetic; parameters and vectors are float32 all the same.
    """

    config: TowerConfig
    projections: Mapping[str, int]
    history: HistoryEncoder | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        features: dict[str, Any],
        *,
        history: dict[str, Any] | None = None,
        keys: Array | None = None,
        axis: str | None = None,
    ) -> Float[Array, "... D"]:
        """Returns the vector of each row.

        Args:
            features: Feature -> [B, ...]; [B, S, ...] for sequences packed into rows.
            history: Fields of `History`, whose "vectors" is a mapping like `features`, for each
                event.
            keys: Random keys of the rows [B], for dropout in training; None at inference, when
                running statistics are used too.
            axis: Mesh axis over which batch statistics are taken.
        """
        config = self.config
        columns = self._project(features)
        if history is not None:
            assert self.history is not None, "this side has no history"
            # The vectors of an event's features are projected and concatenated as those of a row
            # are.
            vectors = jnp.concatenate(self._project(history["vectors"]), -1)
            events = History(**history | {"vectors": vectors})
            columns.append(self.history(events, keys=keys))
        # Layer 0 of the tower; the history numbers its own from far above.
        x = drop_out(jnp.concatenate(columns, -1), config.dropout, keys, 0)
        mlp = MLP(
            config.layers,
            config.activation,
            config.dropout,
            config.layer_norm,
            config.batch_norm,
            self.dtype,
            name="mlp",
        )
        # Whatever the arithmetic was in, vectors are at least float32: scores of half precision
        # would not rank.
        return mlp(x, keys=keys, axis=axis).astype(jnp.promote_types(x.dtype, jnp.float32))

    def _project(self, columns: dict[str, Any]) -> list[Array]:
        """Returns the columns, those with a projection behind its dense layer."""
        vectors = []
        for name, x in columns.items():
            if name in self.projections:
                # A slash would separate modules in Flax, and parameters in checkpoints.
                layer_name = f"project_{name}".replace("/", "_")
                x = dense(self.projections[name], self.dtype, name=layer_name)(x)
            vectors.append(x)
        return vectors


def build_tower(
    config: TowerConfig,
    inputs: Mapping[str, Input],
    *,
    history: HistoryConfig,
    dtype: str,
    field: str,
) -> MLPTower:
    """Makes the tower of one side.

    Args:
        config: Options of the tower.
        inputs: Feature -> shape and table of its encoded values.
        history: Options of the encoder of the history.
        dtype: A key of `DTYPES`.
        field: Path of `config` in the configuration, for messages.

    Raises:
        ConfigError: A kind, activation or dtype is unknown.
    """
    if config.kind != "mlp":
        raise ConfigError(f"{field}.kind={config.kind!r} is not known. Known: mlp.")
    choose(ACTIVATIONS, config.activation, f"{field}.activation")
    arithmetic = choose(DTYPES, dtype, "config.model.dtype")
    projections = {name: spec.projection for name, spec in inputs.items() if spec.projection}
    # All features of an event have the same length and times: the first one tells them.
    event = next((spec for spec in inputs.values() if spec.history_length), None)
    encoder = None
    if event is not None:
        kind = choose(HISTORIES, history.kind, "config.model.history.kind")
        encoder = kind(
            history, event.history_length, event.time_buckets, arithmetic, event.time_to_next
        )
    return MLPTower(config, projections, encoder, arithmetic)
