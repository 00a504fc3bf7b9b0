"""Losses of a step as sums over this device's rows: the retrieval or pointwise loss, and the
heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from twotower.config import ObjectiveConfig
from twotower.core.mesh import DeviceGroup
from twotower.features.inputs import SIDES
from twotower.kernels.loss_inputs import (
    Candidates,
    HardNegatives,
    Loss,
    LossInputs,
    LossOptions,
    Positives,
)
from twotower.kernels.streaming_softmax import streaming_softmax
from twotower.objectives.alias import AliasTable
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.heads import head_losses
from twotower.objectives.losses import POINTWISE_LOSS, PointwiseLoss, bind_constants
from twotower.objectives.negatives import push, queue_candidates
from twotower.pipeline.batches import Batch
from twotower.towers.tower import arithmetic_type
from twotower.training.candidates import (
    NegativeSampling,
    SampledItems,
    gather_candidates,
    log_expected_count,
)
from twotower.training.state import Trainer, TrainState

# Side -> vectors. "user": one of each row of the batch, [B, D]. "item": those of the rows, then the
# shared samples, then the hard negatives row by row.
SideVectors = Mapping[str, jax.Array]


def task_weights(objective: ObjectiveConfig) -> dict[str, float]:
    """Returns the weight of each task's mean in the loss: "retrieval", unless the heads are trained
    alone, and the heads by name."""
    weights = {name: head.weight for name, head in objective.heads.items()}
    if not objective.weight:
        return weights
    return {"retrieval": objective.weight} | weights


def weight_sums(objective: ObjectiveConfig, batch: Batch) -> dict[str, jax.Array]:
    """Returns the sum of the weights of this device's rows that count for each task."""
    sums = {}
    if objective.weight:
        sums["retrieval"] = _row_weights(objective, batch).sum()
    for name, head in objective.heads.items():
        # Each head divides by its own rows: they have labels of their own.
        is_missing = jnp.isnan(batch["labels"][head.label])
        sums[name] = jnp.where(is_missing, 0, batch["weight"]).sum()
    return sums


def loss_sums(
    trainer: Trainer,
    params: Mapping[str, Any],
    vectors: SideVectors,
    batch: Batch,
    sampled: SampledItems,
    state: TrainState,
    constants: Mapping[str, Any],
    group: DeviceGroup,
) -> dict[str, jax.Array]:
    """Returns the sum of weight x loss over this device's rows of each task.

    Args:
        trainer: Model, loss and sampling.
        params: Dense parameters, by which the loss is differentiated.
        vectors: Vectors of both sides.
        batch: This device's part of the batch.
        sampled: Items sampled for the step.
        state: State before the step: frequencies and the queue.
        constants: Arrays of the corpus, of which the popularity table is read.
        group: Devices of the step.
    """
    objective = trainer.config.objective
    rows = len(batch["user"])
    sums = {}
    # A pointwise loss compares no candidates.
    if objective.weight and not isinstance(trainer.loss, Loss):
        # Each user with the item of its own row, and no other.
        scores = jnp.sum(vectors["user"] * vectors["item"][:rows], -1)
        scores = scores / trainer.model.temperature(params) + params["bias"]
        sums["retrieval"] = _pointwise_sum(objective, trainer.loss, scores, batch)
    elif objective.weight:
        sampling = trainer.sampling
        compare_widths = functools.partial(_mean_over_widths, trainer, params)
        popularity = constants.get("popularity")
        inputs = _user_loss_inputs(
            objective, sampling, vectors, batch, sampled, state, popularity, group
        )
        sums["retrieval"] = compare_widths(inputs, corpus=trainer.corpus.items)
        # Items look for their users too; the two directions weigh the same.
        if objective.symmetric:
            inputs = _item_loss_inputs(
                objective, sampling, vectors, batch, state.frequency["user"], group
            )
            other = compare_widths(inputs, corpus=trainer.corpus.users)
            sums["retrieval"] = (sums["retrieval"] + other) / 2
    if objective.heads:
        # Labels are of the batch's rows: samples have none.
        items = vectors["item"][:rows]
        losses_by_head = head_losses(
            objective.heads, params["heads"], vectors["user"], items, batch["labels"]
        )
        for name, (losses, where) in losses_by_head.items():
            sums[name] = jnp.sum(jnp.where(where, losses * batch["weight"], 0))
    return sums


def _row_weights(objective: ObjectiveConfig, batch: Batch) -> jax.Array:
    """Returns the weight of each row in the main loss.

    A row with label 0 is no positive of a retrieval loss; a row without a label counts for neither
    kind of loss.
    """
    if not objective.label:
        return batch["weight"]
    label = batch["labels"][objective.label]
    if objective.loss == POINTWISE_LOSS:
        counts = ~jnp.isnan(label)
    else:
        counts = label == 1
    return jnp.where(counts, batch["weight"], 0)


def _positive_query_ids(objective: ObjectiveConfig, batch: Batch, side: str) -> jax.Array:
    """Returns the query id (user or item) that each row's answer is a positive of; -1 for a row
    without the label 1."""
    if not objective.label:
        return batch[side]
    # Its item is still a candidate, and may be a negative of its own user.
    return jnp.where(batch["labels"][objective.label] == 1, batch[side], -1)


def _pointwise_sum(
    objective: ObjectiveConfig, loss: PointwiseLoss, scores: jax.Array, batch: Batch
) -> jax.Array:
    labels = batch["labels"][objective.label]
    # Their weight is 0, but 0 x NaN is NaN.
    labels = jnp.where(jnp.isnan(labels), 0, labels)
    losses = loss(scores, labels, pos_weight=objective.pos_weight)
    return jnp.sum(losses * _row_weights(objective, batch))


def _user_loss_inputs(
    objective: ObjectiveConfig,
    sampling: NegativeSampling,
    vectors: SideVectors,
    batch: Batch,
    sampled: SampledItems,
    state: TrainState,
    popularity: AliasTable | None,
    group: DeviceGroup,
) -> LossInputs:
    """Returns the loss inputs of the batch's users as queries, with the candidates of all
    sources."""
    rows = len(batch["user"])
    shared = len(sampled.shared)
    # The order in which the step embeds the items.
    own, samples, hard_vectors = jnp.split(vectors["item"], [rows, rows + shared])
    parts = [samples]
    part_ids = [sampled.shared]
    # A sampled item is a positive of nobody as far as the step knows.
    part_query_ids = [jnp.full(shared, -1, jnp.int32)]
    # With all items as candidates, those of the batch would count twice.
    if sampling.config.in_batch and not sampling.config.catalogue:
        parts = [own, *parts]
        part_ids = [batch["item"], *part_ids]
        part_query_ids = [_positive_query_ids(objective, batch, "user"), *part_query_ids]
    # The batch's items of all devices: more negatives, and the same loss on any number of devices.
    items, ids, query_ids = gather_candidates(parts, part_ids, part_query_ids, group)
    queued = 0
    if sampling.config.queue:
        # The queue is the same on every device, so that it is not gathered.
        past, (past_ids, past_query_ids), queued = queue_candidates(
            state.negatives["queue"],
            state.step,
            warmup=sampling.config.queue_warmup,
            age=sampling.config.queue_age,
        )
        items = jnp.concatenate([items, past])
        ids = jnp.concatenate([ids, past_ids])
        query_ids = jnp.concatenate([query_ids, past_query_ids])

    # One function for positives, candidates and hard negatives: an item's expected count does not
    # depend on the source that it came from.
    log_count = functools.partial(
        log_expected_count, sampling, state.frequency["item"], popularity, queued
    )
    hard = None
    if sampling.hard:
        hard = HardNegatives(
            hard_vectors.reshape(rows, sampling.hard, -1),
            sampled.hard,
            log_count(sampled.hard, sampled.hard_log_count),
        )
    return LossInputs(
        queries=vectors["user"],
        query_ids=batch["user"],
        weights=_row_weights(objective, batch),
        positives=Positives(own, batch["item"], log_count(batch["item"])),
        candidates=Candidates(items, ids, query_ids, log_count(ids)),
        hard=hard,
    )


def _item_loss_inputs(
    objective: ObjectiveConfig,
    sampling: NegativeSampling,
    vectors: SideVectors,
    batch: Batch,
    frequency: dict[str, Any],
    group: DeviceGroup,
) -> LossInputs:
    """Returns the loss inputs of the batch's items as queries, with its users as candidates."""
    rows = len(batch["user"])
    users, ids, query_ids = gather_candidates(
        [vectors["user"]], [batch["user"]], [_positive_query_ids(objective, batch, "item")], group
    )

    def log_count(ids: jax.Array) -> jax.Array:
        # 0 for all changes no softmax, and no comparison either.
        if not sampling.corrected:
            return jnp.zeros(ids.shape)
        # Users come from the batch alone: it is their only source.
        estimator = FREQUENCIES[sampling.config.frequency]
        return estimator.log_expected_count(frequency, ids, sampling.batch_size)

    return LossInputs(
        queries=vectors["item"][:rows],
        query_ids=batch["item"],
        weights=_row_weights(objective, batch),
        positives=Positives(vectors["user"], batch["user"], log_count(batch["user"])),
        candidates=Candidates(users, ids, query_ids, log_count(ids)),
    )


def _mean_over_widths(
    trainer: Trainer, params: Mapping[str, Any], inputs: LossInputs, *, corpus: int
) -> jax.Array:
    """Returns the sum of weight x loss, averaged over the widths of Matryoshka vectors.

    Args:
        trainer: Model and loss.
        params: Dense parameters.
        inputs: Queries and candidates, without scale and bias.
        corpus: Number of items (or users) that a candidate may be.
    """
    objective = trainer.config.objective
    inputs = inputs._replace(scale=1 / trainer.model.temperature(params), bias=params.get("bias"))
    assert isinstance(trainer.loss, Loss), "a pointwise loss compares no candidates"
    options = LossOptions(
        bind_constants(trainer.loss, objective, corpus),
        margin=objective.margin,
        positive_temperature=objective.positive_temperature,
        mask_same_user=objective.mask_same_user,
    )
    compare = functools.partial(
        streaming_softmax,
        options=options,
        block=objective.block,
        dtype=arithmetic_type(trainer.config.model.dtype),
        kernel=objective.softmax_kernel,
    )
    whole = compare(inputs)
    # The first numbers of all vectors are compared as well, each width normalised for itself.
    shorter = []
    for width in objective.matryoshka:
        cut = functools.partial(trainer.model.shorten, width=width)
        shorter.append(compare(inputs.map_vectors(cut)))
    # A mean: with more widths the loss, and with it the learning rate, stays of one size.
    return (whole + sum(shorter)) / (1 + len(shorter))


def update_sampling_state(
    objective: ObjectiveConfig,
    sampling: NegativeSampling,
    state: TrainState,
    batch: Batch,
    items: jax.Array,
    group: DeviceGroup,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `frequency` and `negatives` of the next state: the estimators of frequency after the
    batch, and the queue with its items.

    A step reads both before it updates them, since its batch must not change its own loss.

    Args:
        objective: Options, of which the label decides whose positive an item is.
        sampling: Sources of negatives.
        state: State before the step.
        batch: This device's part of the batch.
        items: Vectors of the step's items, those of the batch first.
        group: Devices of the step.
    """
    frequency = state.frequency
    negatives = state.negatives
    estimator = FREQUENCIES[sampling.config.frequency]
    # Exact counts and no queue: nothing is gathered.
    if not (estimator.learns or sampling.config.queue):
        return frequency, negatives
    # Of all devices, so that the estimates stay the same on each of them.
    ids = {side: group.all_gather(batch[side]) for side in SIDES}
    if estimator.learns:
        frequency = {
            side: estimator.update(estimates, ids[side], state.step)
            for side, estimates in frequency.items()
        }
    if sampling.config.queue:
        vectors = group.all_gather(jax.lax.stop_gradient(items[: len(batch["item"])]))
        query_ids = ids["user"]
        if objective.label:
            query_ids = group.all_gather(_positive_query_ids(objective, batch, "user"))
        queue = push(negatives["queue"], vectors, ids["item"], query_ids, state.step)
        negatives = negatives | {"queue": queue}
    return frequency, negatives
