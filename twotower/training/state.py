"""The state of training, arrays only, so that it is the checkpoint; and the trainer, the static
parts of a step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
from absl import logging
from jax.sharding import PartitionSpec

from twotower.config import Config
from twotower.core.mesh import REPLICATED, SHARDED
from twotower.kernels.loss_inputs import Loss
from twotower.objectives.losses import LOSSES, PointwiseLoss, binary_cross_entropy
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.candidates import CorpusSize, NegativeSampling
from twotower.training.checks import check_kinds, check_matryoshka
from twotower.training.optimizers import Optimizers

# (pattern of an array's path in the state, its partition): the first that matches decides. Only
# tables and their slots are divided; everything else is read whole by every device.
STATE_SHARDING = ((r"^(tables|table_slots)/", SHARDED), (r"^[a-z_]+(/|$)", REPLICATED))


class TrainState(flax.struct.PyTreeNode):
    """Arrays that a step reads and replaces.

    Attributes:
        step: Number of steps done, an int32 scalar.
        params: Dense parameters of the towers and heads, the temperature, and the bias of a loss
            that has one; see `Weights`.
        tables: Embedding tables by name, [V, E] each.
        batch_stats: Running statistics of batch normalisation; see `Weights`.
        opt_state: State of the dense optimizer ("dense"), and of the plateau schedule ("plateau")
            if the configuration has it.
        table_slots: State of the sparse optimizer by table, arrays with V rows.
        frequency: State of the frequency estimator of items ("item"), and of users ("user") for a
            symmetric loss.
        negatives: Past item vectors ("queue") and pools of mined hard negatives ("mined"), if they
            are used.
    """

    # Arrays and dicts of arrays; shapes, partitions and options of saving have the same fields.
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
        """Weights of the towers."""
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
    """Static parts of a step, built once and compared by identity.

    Attributes:
        config: Configuration of the run.
        model: Pair of towers.
        loss: Retrieval loss, or the function of a pointwise one.
        optimizers: Optimizers of dense parameters and tables, with their schedule.
        corpus: Numbers of users and items.
        sampling: Sources of negatives; none for a pointwise loss.
    """

    config: Config
    model: TwoTower
    loss: Loss | PointwiseLoss
    optimizers: Optimizers
    corpus: CorpusSize
    sampling: NegativeSampling

    @classmethod
    def build(cls, config: Config, model: TwoTower, corpus: CorpusSize) -> Trainer:
        """Returns the trainer of a configuration.

        Raises:
            ConfigError: A loss, optimizer, schedule or estimator is unknown, or options do not go
                together.
        """
        # Before sizes are looked at: a misspelt kind is the better message.
        loss, optimizers = resolve_kinds(config)
        check_matryoshka(config.objective.matryoshka, model.dim)
        positions = 1
        if config.training.examples == "sequences":
            # A packed row of whole sequences has a start token before each user's L events.
            positions = model.history_length + 1
        sampling = NegativeSampling.build(config, loss, corpus, positions=positions)
        return cls(config, model, loss, optimizers, corpus, sampling)

    def scaled_to(self, num_examples: int, *, devices: int = 1) -> Trainer:
        """Returns the trainer with a batch no larger than a pass, and as many steps as the examples
        of a pass ask for; see `TrainingConfig.scaled_to`.

        Args:
            num_examples: Number of examples of a pass.
            devices: Number of devices, over which the batch is divided evenly.
        """
        trainer = self._with_batch_within(num_examples, devices)
        # The schedule depends on the number of steps, so that the optimizers are built anew.
        training = trainer.config.training.scaled_to(num_examples)
        if training is trainer.config.training:
            return trainer
        config = dataclasses.replace(trainer.config, training=training)
        return dataclasses.replace(trainer, config=config, optimizers=Optimizers.build(training))

    def _with_batch_within(self, num_examples: int, devices: int) -> Trainer:
        """Returns the trainer with a batch of at most all examples."""
        training = self.config.training
        unit = devices * training.accumulate
        batch_size = num_examples // unit * unit
        # A queue holds whole batches of the size that was asked for: such a batch is refused later.
        has_queue = self.sampling.config.queue > 0
        if training.batch_size <= num_examples or not batch_size or has_queue:
            return self
        logging.warning(
            "config.training.batch_size=%d is larger than the data: batches have %d of the %d "
            "examples.",
            training.batch_size,
            batch_size,
            num_examples,
        )
        training = dataclasses.replace(training, batch_size=batch_size)
        config = dataclasses.replace(self.config, training=training)
        # Anew, as the number of negatives may follow that of the batch.
        return Trainer.build(config, self.model, self.corpus)


def resolve_kinds(config: Config) -> tuple[Loss | PointwiseLoss, Optimizers]:
    """Returns the loss and the optimizers that a configuration names, without its data.

    Raises:
        ConfigError: One of them is unknown, or options do not go together.
    """
    check_kinds(config)
    name = config.objective.loss
    loss = LOSSES.get(name, binary_cross_entropy)
    return loss, Optimizers.build(config.training)
