"""The state of training: arrays only, so that it is the checkpoint; and what a step needs besides
arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import optax
from jax.sharding import PartitionSpec

from twotower.config import Config
from twotower.core.mesh import REPLICATED, SHARDED
from twotower.kernels.sparse_update import TABLE_OPTIMIZERS, TableOptimizer
from twotower.objectives import LOSSES, POINTWISE
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.candidates import CorpusSize, NegativeSampling
from twotower.training.checks import check_kinds, check_matryoshka
from twotower.training.optimizers import dense_optimizer, schedule

# (pattern of an array's path in the state, its partition): the first that matches decides.
STATE_SHARDING = ((r"^(tables|table_slots)/", SHARDED), (r"^[a-z_]+(/|$)", REPLICATED))


@flax.struct.dataclass
class TrainState:
    """What a step takes and gives.

    Attributes:
        step: int32 scalar, steps done.
        params: dense parameters, see `Weights`; also those of the heads, and the bias of a loss
            that has one.
        tables: embedding tables, see `Weights`.
        batch_stats: running statistics, see `Weights`.
        opt_state: the dense optimizer's, and the plateau schedule's.
        table_slots: table name -> the sparse optimizer's arrays.
        frequency: {"item": ...}, and "user" for a symmetric loss: what the estimator of
            `config.objective.negatives.frequency` keeps.
        negatives: {"queue": ..., "mined": ...}, as far as they are used.
    """

    step: Any
    params: Any
    tables: Any
    batch_stats: Any
    opt_state: Any
    table_slots: Any
    frequency: Any
    negatives: Any

    @property
    def weights(self) -> Weights:
        return Weights(self.params, self.tables, self.batch_stats)


def state_specs(state: Any, rules: Sequence[tuple[str, PartitionSpec]] = STATE_SHARDING) -> Any:
    """Returns the partition of each array of a state over the devices of a mesh.

    Raises:
        ValueError: No rule covers an array.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, partition in rules:
            if re.match(pattern, name):
                return partition
        raise ValueError(f"No rule of the sharding covers {name!r}.")

    return jax.tree_util.tree_map_with_path(spec, state)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What a step needs besides arrays; built once, static under `jit`.

    Attributes:
        loss: a `Loss`, or the function of a pointwise one.
        corpus: how many users and items there are.
        sampling: of negatives; none for a loss that looks at each row alone.

    Raises (from `build`):
        ConfigError: a loss, optimizer, schedule or estimator is unknown, or options do not go
            together.
    """

    model: TwoTower
    config: Config
    loss: Any
    dense: optax.GradientTransformation
    sparse: TableOptimizer
    schedule: optax.Schedule
    corpus: CorpusSize
    sampling: NegativeSampling

    @classmethod
    def build(cls, config: Config, model: TwoTower, corpus: CorpusSize) -> Trainer:
        loss, dense, sparse, steps_schedule = resolve_kinds(config)
        check_matryoshka(config.objective.matryoshka, model.dim)
        places = model.history_length + 1 if config.training.examples == "sequences" else 1
        return cls(
            model,
            config,
            loss,
            dense,
            sparse,
            steps_schedule,
            corpus,
            NegativeSampling.build(config, loss, corpus, places=places),
        )

    def scaled_to(self, num_examples: int) -> Trainer:
        """Returns the trainer with its steps in proportion to the examples there are.

        See `TrainingConfig.scaled_to`.
        """
        training = self.config.training.scaled_to(num_examples)
        if training is self.config.training:
            return self
        config = dataclasses.replace(self.config, training=training)
        return dataclasses.replace(self, config=config, schedule=schedule(training))


def resolve_kinds(
    config: Config,
) -> tuple[Any, optax.GradientTransformation, TableOptimizer, optax.Schedule]:
    """Returns the loss, the optimizers and the schedule that `config` names."""
    check_kinds(config)
    training, loss = config.training, config.objective.loss
    return (
        LOSSES[loss] if loss in LOSSES else POINTWISE[loss],
        dense_optimizer(training.optimizer),
        TABLE_OPTIMIZERS[training.tables.kind],
        schedule(training),
    )
