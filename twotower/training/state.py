"""The state of training: arrays only, so that it is the checkpoint; and what a step needs besides
arrays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import optax

from twotower.config import Config, ObjectiveConfig
from twotower.core.errors import ConfigError, choose
from twotower.objectives import LOSSES, POINTWISE
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.heads import check_heads
from twotower.towers.embeddings import OPTIMIZERS, TableOptimizer
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.candidates import CorpusSize, NegativeSampling
from twotower.training.optimizers import dense_optimizer, schedule


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
        loss, *optimizers = resolve_kinds(config)
        widths = config.objective.matryoshka
        if any(not 0 < width < model.dim for width in widths) or len(set(widths)) < len(widths):
            raise ConfigError(
                f"config.objective.matryoshka={widths} must be different widths below that of the vectors, {model.dim}: for "
                f"example ({model.dim // 2}, {model.dim // 4})."
            )
        places = model.history_length + 1 if config.training.examples == "sequences" else 1
        return cls(
            model,
            config,
            loss,
            *optimizers,
            corpus,
            NegativeSampling.build(config, loss, corpus, places=places),
        )

    def over(self, examples: int) -> Trainer:
        """Itself, with the steps in proportion to the examples where `config.training.steps_for`
        says how many they are for.

        Each validation ends with a whole dispatch, and few examples are given no fewer steps than
        were to be before the first.
        """
        training = self.config.training
        if not training.steps_for:
            return self
        validations, dispatch = (
            math.ceil(training.steps / training.validate_every),
            training.steps_per_dispatch,
        )
        needed = round(training.steps * examples / training.steps_for / (validations * dispatch))
        every = (
            max(needed, math.ceil(training.validate_every / (validations * dispatch))) * dispatch
        )
        warmup = round(training.schedule.warmup_steps * validations * every / training.steps)
        training = dataclasses.replace(
            training,
            steps=validations * every,
            validate_every=every,
            schedule=dataclasses.replace(training.schedule, warmup_steps=warmup),
        )
        config = dataclasses.replace(self.config, training=training)
        return dataclasses.replace(self, config=config, schedule=schedule(training))


def resolve_kinds(
    config: Config,
) -> tuple[Any, optax.GradientTransformation, TableOptimizer, optax.Schedule]:
    """The loss, optimizers and schedule that `config` names; refuses unknown ones, needing no
    data."""
    training, objective = config.training, config.objective
    _check_objective(config)
    _check_loss(config)
    check_heads(objective.heads)
    choose(FREQUENCIES, objective.negatives.frequency, "config.objective.negatives.frequency")
    return (
        choose(LOSSES | POINTWISE, objective.loss, "config.objective.loss"),
        dense_optimizer(training.optimizer),
        choose(OPTIMIZERS, training.tables.kind, "config.training.tables.kind"),
        schedule(training),
    )


def _check_objective(config: Config) -> None:
    """Refuses options of the objective that do not go together."""
    objective, negatives, training = config.objective, config.objective.negatives, config.training
    loss, alone = objective.loss, objective.loss in POINTWISE or not objective.weight
    if loss in POINTWISE and not objective.label:
        raise ConfigError(
            f"config.objective.loss={loss!r} learns from labels, and config.objective.label is empty: name the column of the "
            "interactions that holds 0 or 1, or choose a loss that needs positives alone, such as 'softmax'."
        )
    if negatives.explicit and not objective.label:
        raise ConfigError(
            f"config.objective.negatives.explicit={negatives.explicit} draws from rows whose label is 0, and "
            "config.objective.label is empty: name the column of the interactions that holds 0 or 1."
        )
    used = (
        negatives.popularity,
        negatives.catalogue,
        negatives.queue,
        negatives.mined,
        negatives.explicit,
    )
    if alone and (any(used) or negatives.uniform > 0):
        raise ConfigError(
            f"config.objective.negatives has sources that loss={loss!r} with weight={objective.weight} never uses."
        )
    if not alone and not negatives.in_batch and not any(used) and negatives.uniform <= 0:
        raise ConfigError(
            "config.objective.negatives has no source: set in_batch=True, or how many to draw by uniform or popularity, or "
            "catalogue=True."
        )
    if training.accumulate > 1 and not alone:
        raise ConfigError(
            f"config.training.accumulate={training.accumulate} with loss={loss!r}: a batch computed in parts has the negatives "
            "of one part, not of the whole, so it is not the larger batch that it seems. The loss is computed in blocks and "
            f"never holds [B, C] scores: raise config.training.batch_size={training.batch_size} itself; leave accumulate at 1."
        )
    blocks = training.accumulate > 1 or negatives.catalogue
    if blocks and (config.model.user.batch_norm or config.model.item.batch_norm):
        raise ConfigError(
            "config.model with batch_norm=True needs a batch that is computed at once: leave config.training.accumulate at 1 and "
            "config.objective.negatives.catalogue at False, or choose layer_norm."
        )


def _check_loss(config: Config) -> None:
    """Refuses options that the loss does not read, and those without which it learns nothing."""
    objective, model, name = config.objective, config.model, config.objective.loss
    pointwise = name in POINTWISE
    loss = choose(LOSSES | POINTWISE, name, "config.objective.loss")
    read = {
        "positive_temperature": not pointwise and loss.bilateral,
        "calibration": name == "gbce",
        "pos_weight": pointwise,
        "negative_weight": name == "cosine_contrastive",
        "margin": not pointwise,
        "symmetric": not pointwise,
    }
    for field, is_read in read.items():
        value = getattr(objective, field)
        if not is_read and value != getattr(ObjectiveConfig(), field):
            raise ConfigError(
                f"config.objective.{field}={value} is not read by loss={name!r}: leave one of them out."
            )
    if not pointwise and loss.bilateral and model.learn_temperature:
        raise ConfigError(
            f"config.objective.loss={name!r} falls without bound as the temperature does: set "
            "config.model.learn_temperature=False."
        )
    if name in ("hinge", "triplet") and not objective.margin:
        raise ConfigError(
            f"config.objective.margin=0.0 with loss={name!r} is met by vectors that are all alike: set, say, 0.2."
        )
