"""The losses of a step as sums over this device's rows: retrieval or pointwise, and the heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from twotower.config import ObjectiveConfig
from twotower.core.mesh import DeviceGroup
from twotower.objectives import POINTWISE, streaming_loss
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.heads import head_losses
from twotower.objectives.negatives import (
    Candidates,
    HardNegatives,
    Positives,
    push,
    queue_candidates,
)
from twotower.pipeline.batches import Batch
from twotower.towers.tower import DTYPES
from twotower.training.candidates import SampledItems, gathered, log_expected_count
from twotower.training.state import Trainer, TrainState

Vectors = Mapping[str, jax.Array]


def task_weights(objective: ObjectiveConfig) -> dict[str, float]:
    """Name -> weight of its mean in the loss: "retrieval", unless the heads are trained alone, and
    the heads."""
    main = {"retrieval": objective.weight} if objective.weight else {}
    return main | {name: head.weight for name, head in objective.heads.items()}


def weight_sums(objective: ObjectiveConfig, batch: Batch) -> dict[str, jax.Array]:
    """Name -> sum of the weights of the rows that count for it."""
    main = {"retrieval": _row_weights(objective, batch).sum()} if objective.weight else {}
    labelled = {
        n: jnp.where(jnp.isnan(batch["labels"][h.label]), 0, batch["weight"])
        for n, h in objective.heads.items()
    }
    return main | {name: weights.sum() for name, weights in labelled.items()}


def losses_of(
    trainer: Trainer,
    params: Any,
    vectors: Vectors,
    batch: Batch,
    drawn: SampledItems,
    state: TrainState,
    catalogue: Mapping[str, Any],
    group: DeviceGroup,
) -> dict[str, jax.Array]:
    """Name -> sum of weight x loss over this device's rows.

    Args:
        vectors: "user" [b, D], and "item": the batch's items [b, D], then the items drawn.
    """
    objective, rows = trainer.config.objective, len(batch["user"])
    sums = {}
    if objective.weight and objective.loss in POINTWISE:
        sums["retrieval"] = _pointwise(
            trainer, params, vectors["user"], vectors["item"][:rows], batch
        )
    elif objective.weight:
        sums["retrieval"] = _items(trainer, params, vectors, batch, drawn, state, catalogue, group)
        if objective.symmetric:
            users = _users(trainer, params, vectors, batch, state, group)
            sums["retrieval"] = (sums["retrieval"] + users) / 2
    if objective.heads:
        found = head_losses(
            objective.heads,
            params["heads"],
            vectors["user"],
            vectors["item"][:rows],
            batch["labels"],
        )
        sums |= {
            name: jnp.sum(jnp.where(where, losses * batch["weight"], 0))
            for name, (losses, where) in found.items()
        }
    return sums


def _row_weights(objective: ObjectiveConfig, batch: Batch) -> jax.Array:
    """A row with label 0 is no positive of a retrieval loss; a row without a label counts for
    neither kind."""
    if not objective.label:
        return batch["weight"]
    label = batch["labels"][objective.label]
    counts = ~jnp.isnan(label) if objective.loss in POINTWISE else label == 1
    return jnp.where(counts, batch["weight"], 0)


def _owners(objective: ObjectiveConfig, batch: Batch, side: str) -> jax.Array:
    """Whose positive each row's answer is; nobody's where the label says that it is none."""
    if not objective.label:
        return batch[side]
    return jnp.where(batch["labels"][objective.label] == 1, batch[side], -1)


def _pointwise(
    trainer: Trainer, params: Any, users: jax.Array, items: jax.Array, batch: Batch
) -> jax.Array:
    objective = trainer.config.objective
    scores = jnp.sum(users * items, -1) / trainer.model.temperature(params) + params["bias"]
    labels = batch["labels"][objective.label]
    losses = trainer.loss(
        scores, jnp.where(jnp.isnan(labels), 0, labels), pos_weight=objective.pos_weight
    )
    return jnp.sum(losses * _row_weights(objective, batch))


def _items(
    trainer: Trainer,
    params: Any,
    vectors: Vectors,
    batch: Batch,
    drawn: SampledItems,
    state: TrainState,
    catalogue: Mapping[str, Any],
    group: DeviceGroup,
) -> jax.Array:
    """The users' items among the candidates of all sources."""
    sources, rows, shared = trainer.sampling, len(batch["user"]), len(drawn.shared)
    own, others, hard = jnp.split(vectors["item"], [rows, rows + shared])
    parts = [(others, drawn.shared, jnp.full(shared, -1, jnp.int32))]
    if sources.config.in_batch and not sources.config.catalogue:
        parts.insert(0, (own, batch["item"], _owners(trainer.config.objective, batch, "user")))
    items, ids, owners = gathered(*map(list, zip(*parts)), group)
    queued = 0
    if sources.config.queue:
        past, known, used = queue_candidates(
            state.negatives["queue"],
            state.step,
            warmup=sources.config.queue_warmup,
            age=sources.config.queue_age,
        )
        items, ids, owners = (
            jnp.concatenate(pair) for pair in zip((items, ids, owners), (past, *known))
        )
        queued = used

    def log_count(ids: jax.Array, own: jax.Array | None = None) -> jax.Array:
        return log_expected_count(
            sources, state.frequency["item"], catalogue.get("popularity"), queued, ids, own
        )

    further = None
    if sources.hard:
        counts = log_count(drawn.hard, drawn.hard_log_count)
        further = HardNegatives(hard.reshape(rows, sources.hard, -1), drawn.hard, counts)
    positives = Positives(own, batch["item"], log_count(batch["item"]))
    known = Candidates(ids, owners, log_count(ids))
    return _streamed(
        trainer,
        params,
        vectors["user"],
        positives,
        items,
        known,
        batch,
        batch["user"],
        further,
        trainer.corpus.items,
    )


def _users(
    trainer: Trainer,
    params: Any,
    vectors: Vectors,
    batch: Batch,
    state: TrainState,
    group: DeviceGroup,
) -> jax.Array:
    """The items' users among the batch's."""
    own = vectors["item"][: len(batch["user"])]
    users, ids, owners = gathered(
        [vectors["user"]],
        [batch["user"]],
        [_owners(trainer.config.objective, batch, "item")],
        group,
    )

    def log_count(ids: jax.Array) -> jax.Array:
        if not trainer.sampling.corrected:
            return jnp.zeros(ids.shape)
        estimator = FREQUENCIES[trainer.sampling.config.frequency]
        return estimator.log_expected_count(
            state.frequency["user"], ids, trainer.sampling.batch_size
        )

    positives = Positives(vectors["user"], batch["user"], log_count(batch["user"]))
    known = Candidates(ids, owners, log_count(ids))
    return _streamed(
        trainer,
        params,
        own,
        positives,
        users,
        known,
        batch,
        batch["item"],
        None,
        trainer.corpus.users,
    )


def _streamed(
    trainer: Trainer,
    params: Any,
    queries: jax.Array,
    positives: Positives,
    candidates: jax.Array,
    known: Candidates,
    batch: Batch,
    owners: jax.Array,
    hard: HardNegatives | None,
    corpus: int,
) -> jax.Array:
    """The mean over all widths that vectors are compared at.

    Args:
        corpus: how many things there are that candidates may be.
    """
    objective, loss = trainer.config.objective, trainer.loss
    options = {
        "loss": loss,
        "weights": _row_weights(objective, batch),
        "scale": 1 / trainer.model.temperature(params),
        "bias": params.get("bias"),
        "owners": owners,
        "margin": objective.margin,
        "positive_temperature": objective.positive_temperature,
        "mask_same_user": objective.mask_same_user,
        "constants": loss.constants(objective, corpus),
        "block": objective.block,
        "dtype": DTYPES[trainer.config.model.dtype],
    }

    def of_width(width: int) -> jax.Array:
        def cut(vectors: jax.Array) -> jax.Array:
            return trainer.model.shorten(vectors, width)

        own, further = (
            positives._replace(vectors=cut(positives.vectors)),
            hard and hard._replace(vectors=cut(hard.vectors)),
        )
        return streaming_loss(cut(queries), own, cut(candidates), known, hard=further, **options)

    whole = streaming_loss(queries, positives, candidates, known, hard=hard, **options)
    return (whole + sum(map(of_width, objective.matryoshka))) / (1 + len(objective.matryoshka))


def update_frequency(
    trainer: Trainer, state: TrainState, batch: Batch, items: jax.Array, group: DeviceGroup
) -> TrainState:
    """The state with what this step's batch teaches the estimators of frequency, and its item
    vectors in the queue.

    After the loss: a step must not see itself.
    """
    config = trainer.sampling.config
    estimator = FREQUENCIES[config.frequency]
    ids = (
        {side: group.all_gather(batch[side]) for side in ("user", "item")}
        if estimator.learns or config.queue
        else {}
    )
    frequency = state.frequency
    if estimator.learns:
        frequency = {
            side: estimator.update(x, ids[side], state.step) for side, x in frequency.items()
        }
    kept = state.negatives
    if config.queue:
        vectors = group.all_gather(jax.lax.stop_gradient(items[: len(batch["item"])]))
        labelled = trainer.config.objective.label
        owners = (
            group.all_gather(_owners(trainer.config.objective, batch, "user"))
            if labelled
            else ids["user"]
        )
        kept = kept | {"queue": push(kept["queue"], vectors, ids["item"], owners, state.step)}
    return state.replace(frequency=frequency, negatives=kept)
