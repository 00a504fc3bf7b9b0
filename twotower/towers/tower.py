"""One tower: the function from the vectors of one side's features to one vector.

`TOWERS` has the kinds by name; a user's module may add its own, a subclass of `Tower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twotower.config import HistoryConfig, TowerConfig
from twotower.core.errors import ConfigError, choose
from twotower.core.kinds import Kinds
from twotower.features.inputs import Input
from twotower.kernels.dense import fastest_dtype
from twotower.towers.history import HISTORIES, History, HistoryEncoder, empty_some
from twotower.towers.layers import ACTIVATIONS, MLP, dense, drop_out, dropout_rates

# Type of the arithmetic of towers, and of the operands of the loss's products; None keeps the type
# of the parameters.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def arithmetic_type(name: str) -> DTypeLike | None:
    """Returns the type that `config.model.dtype` names, a value of `DTYPES`."""
    if name == "auto":
        name = fastest_dtype()
    return choose(DTYPES, name, "config.model.dtype")


class Tower(nn.Module):
    """Base of all kinds of towers, which makes one vector of the features of one side.

    A kind of one's own is a subclass with a `__call__` like that of `MLPTower`, a
    `flax.linen.compact` method that begins with `combine`, and is applied by `init` and `apply`
    alone.

    Attributes:
        config: Options of the layers.
        field: Path of `config` in the configuration, for messages.
        projections: Feature -> width of a dense layer of its own before features are combined.
        history: Encoder of the history, if the side has one.
        dtype: Type of the arithmetic; parameters and vectors are float32 all the same.
        options: Options that the kind was registered with; None without any.
    """

    config: TowerConfig
    field: str
    projections: Mapping[str, int]
    history: HistoryEncoder | None = None
    dtype: DTypeLike | None = None
    options: Any = None

    def combine(
        self,
        features: dict[str, Any],
        history: dict[str, Any] | None,
        keys: Array | None,
    ) -> Float[Array, "... F"]:
        """Returns the vectors of all features as one, with dropout; see `MLPTower.__call__`.

        Raises:
            ConfigError: Features of different widths are to be summed.
        """
        columns = self._project(features)
        if history is not None:
            assert self.history is not None, "this side has no history"
            # The vectors of an event's features are projected and combined as those of a row are.
            vectors = self._join(self._project(history["vectors"]))
            events = History(**history | {"vectors": vectors})
            events = empty_some(events, self.history.config.empty_rate, keys)
            columns.append(("history", self.history(events, keys=keys)))
        # Layer 0 of the tower; the history numbers its own from far above.
        return drop_out(self._join(columns), dropout_rates(self.config)[0], keys, 0)

    def _project(self, columns: dict[str, Any]) -> list[tuple[str, Array]]:
        """Returns names and columns, those with a projection behind its dense layer."""
        vectors = []
        for name, x in columns.items():
            if name in self.projections:
                # A slash would separate modules in Flax, and parameters in checkpoints.
                layer_name = f"project_{name}".replace("/", "_")
                x = dense(self.projections[name], self.dtype, name=layer_name)(x)
            vectors.append((name, x))
        return vectors

    def _join(self, columns: list[tuple[str, Array]]) -> Float[Array, "... F"]:
        """Returns the named vectors of several features, concatenated or summed."""
        vectors = [x for _, x in columns]
        if self.config.combine == "concatenate":
            return jnp.concatenate(vectors, -1)
        if len({x.shape[-1] for x in vectors}) > 1:
            listed = ", ".join(f"{name} {x.shape[-1]}" for name, x in columns)
            raise ConfigError(
                f"{self.field}.combine='sum' needs features of one width, not: {listed}. Give them "
                "one embedding_size (a history has that of its items, or "
                "config.model.history.width), or set combine='concatenate'."
            )
        return sum(vectors[1:], start=vectors[0])


class MLPTower(Tower):
    """Features, some of them projected, combined in the order of the specification; then dense
    layers.

    Without layers the combined features themselves are the vector.
    """

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
        x = self.combine(features, history, keys)
        vectors = MLP(config, self.dtype, name="mlp")(x, keys=keys, axis=axis)
        # Whatever the arithmetic was in, vectors are at least float32: scores of half precision
        # would not rank.
        vectors = vectors.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not config.output_norm:
            return vectors
        return nn.LayerNorm(name="output_norm")(vectors)


# A user's module may add its own.
TOWERS: Kinds[type[Tower]] = Kinds(
    "tower",
    {"mlp": MLPTower},
    synonyms={"dense": "mlp", "dnn": "mlp", "feed_forward": "mlp", "linear": "mlp"},
)


def tower_options(config: TowerConfig, field: str) -> Any:
    """Returns the options of a tower of one's own, as it was registered; None of other towers.

    Args:
        config: Options of the tower.
        field: Path of `config` in the configuration, for messages.

    Raises:
        ConfigError: The kind is unknown, or an option is unknown, missing, of a wrong type or out
            of range.
    """
    TOWERS.choose(config.kind, f"{field}.kind")
    return TOWERS.build_options(config.kind, config.options, f"{field}.options")


def build_tower(
    config: TowerConfig,
    inputs: Mapping[str, Input],
    *,
    history: HistoryConfig,
    dtype: str,
    field: str,
) -> Tower:
    """Makes the tower of one side.

    Args:
        config: Options of the tower.
        inputs: Feature -> shape and table of its encoded values.
        history: Options of the encoder of the history.
        dtype: A key of `DTYPES`, or "auto".
        field: Path of `config` in the configuration, for messages.

    Raises:
        ConfigError: A kind, activation, dtype or option is unknown.
    """
    options = tower_options(config, field)
    choose(ACTIVATIONS, config.activation, f"{field}.activation")
    arithmetic = arithmetic_type(dtype)
    projections = {name: spec.projection for name, spec in inputs.items() if spec.projection}
    # All features of an event have the same length and times: the first one tells them.
    event = next((spec for spec in inputs.values() if spec.history_length), None)
    encoder = None
    if event is not None:
        kind = HISTORIES.choose(history.kind, "config.model.history.kind")
        encoder = kind(
            history, event.history_length, event.time_buckets, arithmetic, event.time_to_next
        )
    return TOWERS[config.kind](config, field, projections, encoder, arithmetic, options)
