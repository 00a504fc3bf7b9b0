"""One step of training: pure functions of arrays, jitted by the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from twotower.config import Config, ObjectiveConfig
from twotower.data.batches import Batch
from twotower.objectives import LOSSES
from twotower.objectives.frequency import log_expected_count
from twotower.objectives.negatives import in_batch
from twotower.towers.embeddings import OPTIMIZERS, TableOptimizer, merge_duplicates
from twotower.towers.two_tower import SIDES, TEMPERATURES, TwoTower, Weights
from twotower.training.optimizers import dense_optimizer, init_plateau, schedule
from twotower.training.state import TrainState
from twotower.validation import choose

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What a step needs besides arrays; built once, static under `jit`.

    Raises (from `build`):
        ConfigError: a loss, optimizer or schedule is unknown.
    """

    model: TwoTower
    config: Config
    loss: Callable[..., jax.Array]
    dense: optax.GradientTransformation
    sparse: TableOptimizer
    schedule: optax.Schedule

    @classmethod
    def build(cls, config: Config, model: TwoTower) -> Trainer:
        return cls(model, config, *chosen_kinds(config))


def chosen_kinds(config: Config) -> tuple[Callable, optax.GradientTransformation, TableOptimizer, optax.Schedule]:
    """The loss, optimizers and schedule that `config` names; refuses unknown ones, needing no data."""
    training = config.training
    return (
        choose(LOSSES, config.objective.loss, "config.objective.loss"), dense_optimizer(training.optimizer),
        choose(OPTIMIZERS, training.tables.kind, "config.training.tables.kind"), schedule(training),
    )  # fmt: skip


def init_state(trainer: Trainer, frequency: Mapping[str, jax.Array]) -> TrainState:
    """A fresh state. `frequency` is what `TrainState` documents."""
    training = trainer.config.training
    weights = trainer.model.init(jax.random.key(training.seed))
    slots = {n: trainer.sparse.init(t, training.tables.initial_accumulator) for n, t in weights.tables.items()}
    opt_state = {"dense": trainer.dense.init(weights.params), "plateau": init_plateau()}
    return TrainState(jnp.int32(0), *weights, opt_state, slots, dict(frequency))


def train_step(state: TrainState, batch: Batch, *, trainer: Trainer) -> tuple[TrainState, Metrics]:
    """One gradient step.

    Returns:
        The next state, and the step's loss, gradient norm (dense and rows) and temperature, as scalars on the device.
    """
    model = trainer.model
    drop, dropout = jax.random.split(jax.random.fold_in(jax.random.key(trainer.config.training.seed), state.step))
    features = {
        side: drop_ids(model.inputs[side], batch[f"{side}_features"], jax.random.fold_in(drop, i))
        for i, side in enumerate(SIDES)
    }
    rows = {side: model.lookup(side, state.tables, features[side]) for side in SIDES}

    def loss_of(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        weights = Weights(params, state.tables, state.batch_stats)
        vectors, stats = {}, {}
        for i, side in enumerate(SIDES):
            key = jax.random.fold_in(dropout, i)
            vectors[side], new = model.vectors(side, weights, rows[side], features[side], dropout=key)
            stats |= {side: new} if new else {}
        losses = example_losses(trainer, params, vectors, batch, state.frequency)
        return weighted_mean(losses, batch["weight"]), stats

    (loss, stats), (grads, row_grads) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(state.params, rows)
    merged = merge_rows(model, state.tables, features, row_grads)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm((grads, {n: g for n, (_, g) in merged.items()})),
        "temperature": model.temperature(state.params),
    }
    return _apply(trainer, state, grads, merged, stats), metrics


def example_losses(
    trainer: Trainer, params: Any, vectors: Mapping[str, jax.Array], batch: Batch, frequency: Mapping[str, jax.Array]
) -> jax.Array:
    """The loss of each row of the batch, [B]: its item among the batch's items and, if symmetric, its user likewise."""
    objective: ObjectiveConfig = trainer.config.objective
    size = batch["user"].shape[0]

    def one_way(query: str, answer: str) -> jax.Array:
        counts = log_expected_count(frequency[answer], frequency["rows"], batch[answer], size) if objective.logq else None
        return trainer.loss(
            vectors[query], vectors[answer],
            inverse_temperature=1.0 / trainer.model.temperature(params),
            owners=batch[query], positives=jnp.arange(size, dtype=jnp.int32),
            candidates=in_batch(batch[answer], batch[query], counts),
            mask_same_user=objective.mask_same_user,
        )  # fmt: skip

    forward = one_way("user", "item")
    return (forward + one_way("item", "user")) / 2 if objective.symmetric else forward


def weighted_mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """The one place where losses are reduced: sum of weight x loss over the sum of weights; 0 when that is 0."""
    return jnp.sum(losses * weights) / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)


def drop_ids(inputs: Mapping[str, Any], features: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Replaces a share `oov_rate` of known ids by an out-of-vocabulary row, so that those rows are trained."""

    def drop(name: str, ids: jax.Array) -> jax.Array:
        i = inputs[name]
        if not i.oov_rate:
            return ids
        chosen = jax.random.bernoulli(jax.random.fold_in(key, list(inputs).index(name)), i.oov_rate, ids.shape)
        # Known rows begin after padding and the out-of-vocabulary rows; spread over the latter by the id.
        return jnp.where(chosen & (ids > i.oov_rows), 1 + ids % i.oov_rows, ids)

    return {name: drop(name, x) if inputs[name].table else x for name, x in features.items()}


def merge_rows(
    model: TwoTower, tables: Mapping[str, jax.Array], features: Mapping[str, Any], row_grads: Mapping[str, Any]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Table name -> (distinct rows, summed gradients) over all uses of the table by either tower."""
    uses: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
    for side in SIDES:
        for name, grads in row_grads[side].items():
            table = model.inputs[side][name].table
            uses.setdefault(table, []).append((features[side][name].ravel(), grads.reshape(-1, grads.shape[-1])))
    return {
        table: merge_duplicates(*(jnp.concatenate(parts) for parts in zip(*pairs)), tables[table].shape[0])
        for table, pairs in uses.items()
    }


def _apply(trainer: Trainer, state: TrainState, grads: Any, merged: Mapping[str, Any], stats: Any) -> TrainState:
    factor = trainer.schedule(state.step) * state.opt_state["plateau"].scale
    updates, dense = trainer.dense.update(grads, state.opt_state["dense"], state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: factor * u, updates))
    params["log_temperature"] = _temperature(trainer, state.params, params)
    rate = factor * trainer.config.training.tables.learning_rate
    updated = {
        name: trainer.sparse.update(state.tables[name], state.table_slots[name], rows, row_grads, rate, state.step)
        for name, (rows, row_grads) in merged.items()
    }
    return state.replace(
        step=state.step + 1, params=params, opt_state=state.opt_state | {"dense": dense},
        tables=state.tables | {n: t for n, (t, _) in updated.items()},
        table_slots=state.table_slots | {n: s for n, (_, s) in updated.items()},
        batch_stats=state.batch_stats | stats,
    )  # fmt: skip


def _temperature(trainer: Trainer, old: Any, new: Any) -> jax.Array:
    """Kept as it was when not learned; otherwise within bounds after, not inside, the gradient, so that it never sticks."""
    if not trainer.config.model.learn_temperature:
        return old["log_temperature"]
    low, high = (jnp.log(jnp.float32(t)) for t in TEMPERATURES)
    return jnp.clip(new["log_temperature"], low, high)
