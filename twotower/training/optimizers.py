"""Optax for the dense parameters, and the schedule that both they and the tables follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from twotower.config import DenseOptimizerConfig, ScheduleConfig, TrainingConfig
from twotower.core.errors import choose

DENSE: Mapping[str, Any] = {
    "adam": lambda c: optax.adam(c.learning_rate),
    "adamw": lambda c: optax.adamw(c.learning_rate, weight_decay=c.weight_decay, mask=_kernels),
    "adagrad": lambda c: optax.adagrad(c.learning_rate),
    "sgd": lambda c: optax.sgd(c.learning_rate),
}


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def dense_optimizer(config: DenseOptimizerConfig) -> optax.GradientTransformation:
    """The optimizer that `config` names, behind clipping; without the schedule."""
    kind = choose(DENSE, config.kind, "config.training.optimizer.kind")(config)
    return (
        optax.chain(optax.clip_by_global_norm(config.clip_norm), kind) if config.clip_norm else kind
    )


SCHEDULES: Mapping[str, Any] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, max(steps, 1)),
    # The plateau's factor is state, moved by validations; the step sees it as `PlateauState.scale`.
    "plateau": lambda steps: optax.constant_schedule(1.0),
}


def schedule(config: TrainingConfig) -> optax.Schedule:
    """step -> factor in [0, 1] on every learning rate, the plateau's apart."""
    kind, warmup = config.schedule.kind, config.schedule.warmup_steps
    after = choose(SCHEDULES, kind, "config.training.schedule.kind")(config.steps - warmup)
    return (
        optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])
        if warmup
        else after
    )


class PlateauState(NamedTuple):
    """Where the plateau schedule stands: arrays, kept in the checkpoint."""

    scale: Any
    best: Any
    waited: Any


def init_plateau() -> PlateauState:
    return PlateauState(jnp.float32(1.0), jnp.float32(-jnp.inf), jnp.int32(0))


def update_plateau(state: PlateauState, value: float, config: ScheduleConfig) -> PlateauState:
    """After a validation: `value` is the metric, larger is better."""
    if config.kind != "plateau":
        return state
    if np.float32(value) > state.best:
        return PlateauState(state.scale, jnp.float32(value), jnp.int32(0))
    waited = int(state.waited) + 1
    if waited < config.patience:
        return state._replace(waited=jnp.int32(waited))
    return state._replace(scale=state.scale * config.factor, waited=jnp.int32(0))
