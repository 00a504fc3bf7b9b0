"""One step of training: pure functions of arrays, run by the loop under `jit`, and under
`shard_map` on several devices.

The functions see one device's part of the batch and of the table rows; what crosses devices goes
through their `DeviceGroup`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from twotower.core.mesh import SINGLE_DEVICE, DeviceGroup
from twotower.features.base import SIDES
from twotower.kernels.sparse_update import apply_gradients
from twotower.pipeline.batches import Batch
from twotower.towers.embeddings import lookup_rows
from twotower.towers.two_tower import TEMPERATURES, TwoTower, Weights
from twotower.training.candidates import SampledItems, draw, row_keys, take_features
from twotower.training.state import Trainer, TrainState
from twotower.training.step_losses import losses_of, task_weights, update_frequency, weight_sums

Metrics = dict[str, jax.Array]
# More rows than this are embedded block by block, so that the hidden units of a whole catalogue are
# never held at once.
EMBED_BLOCK = 16_384


def train_step(
    state: TrainState,
    batch: Batch,
    catalogue: Mapping[str, Any],
    *,
    trainer: Trainer,
    group: DeviceGroup = SINGLE_DEVICE,
) -> tuple[TrainState, Metrics]:
    """One gradient step.

    Args:
        batch: this device's part of the batch.
        catalogue: what every device has of the corpus, as far as `trainer.sampling` needs it:
            "item_features" [N, ...], "popularity" (an alias table) and "explicit" (pools).

    Returns:
        The next state, and the step's losses, gradient norm (dense and rows) and temperature, as
        scalars on the device.
    """
    batch = flattened(batch)
    key = jax.random.fold_in(jax.random.key(trainer.config.training.seed), state.step)
    drawn = draw(
        trainer.sampling, batch, {**state.negatives, **catalogue}, jax.random.fold_in(key, 2), group
    )
    places = _places(batch, drawn, group)
    features = _features(trainer, batch, drawn, catalogue, places, jax.random.fold_in(key, 0))
    dropout = {
        s: row_keys(jax.random.fold_in(jax.random.fold_in(key, 1), i), places[s])
        for i, s in enumerate(SIDES)
    }
    asked = shared_ids(trainer.model, features, group)
    weights = group.sum(weight_sums(trainer.config.objective, batch))

    def loss_of(params: Any, rows: Any, local: Any) -> tuple[jax.Array, Any]:
        features, dropout, batch = local
        vectors, stats = _embed(
            trainer, state.weights._replace(params=params), rows, features, dropout, group
        )
        vectors["user"] = _asked(vectors["user"], batch)
        sums = losses_of(trainer, params, vectors, batch, drawn, state, catalogue, group)
        means = {
            name: x / jnp.maximum(weights[name], jnp.finfo(x.dtype).tiny)
            for name, x in sums.items()
        }
        tasks = task_weights(trainer.config.objective)
        return sum(tasks[name] * mean for name, mean in means.items()), (
            means,
            stats,
            vectors["item"],
        )

    rows = lookup_all(trainer.model, state.tables, features, asked, group)
    (loss, (means, stats, items)), (grads, row_grads) = _gradients(
        loss_of,
        group.pvary(state.params),
        rows,
        (features, dropout, batch),
        parts=trainer.config.training.accumulate,
    )
    tables, row_norm = _update_tables(
        trainer, state, asked, shared_gradients(trainer.model, row_grads, group), group
    )
    grads, loss, means, row_norm = group.sum((grads, loss, means, row_norm))
    metrics = {
        "loss": loss,
        "grad_norm": jnp.sqrt(optax.tree.norm(grads, squared=True) + row_norm),
        "temperature": trainer.model.temperature(state.params),
    } | ({f"{name}/loss": x for name, x in means.items()} if len(means) > 1 else {})
    state = update_frequency(trainer, state, batch, items, group)
    return _apply(trainer, state, grads, tables, stats), metrics


def _gradients(loss_of: Any, params: Any, rows: Any, local: Any, *, parts: int) -> Any:
    """The value and gradients of `loss_of` at params and rows, of the whole batch or summed over
    its parts, one after another.

    The parts of a sum are summed: what `loss_of` divides by must be of the whole batch.
    """
    differentiate = jax.value_and_grad(loss_of, (0, 1), has_aux=True)
    if parts == 1:
        return differentiate(params, rows, local)
    divided = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (rows, local))
    (loss, (means, stats, items)), (grads, row_grads) = jax.lax.map(
        lambda part: differentiate(params, *part), divided
    )
    loss, means, grads = jax.tree.map(lambda x: x.sum(0), (loss, means, grads))
    items, row_grads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (items, row_grads))
    return (loss, (means, stats, items)), (grads, row_grads)


def flattened(batch: Batch) -> Batch:
    """A batch of packed sequences with a row for each place, but for "user_features" and "query_slot";
    another batch as it is."""
    if batch["user"].ndim == 1:
        return batch
    kept = ("user_features", "query_slot")
    return {
        name: x if name in kept else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x)
        for name, x in batch.items()
    }


def _places(batch: Batch, drawn: SampledItems, group: DeviceGroup) -> dict[str, jax.Array]:
    """What tells the rows of each side apart whatever device they are on: the batch's first, then
    the items drawn."""
    rows, users = len(batch["user"]), len(next(iter(batch["user_features"].values())))
    everyone, hard = rows * group.size, drawn.hard.size * group.size
    # The shared ones last: how many of them are there to fill up the devices must move nobody
    # else's place.
    items = (
        group.row_numbers(rows),
        everyone + hard + group.row_numbers(len(drawn.shared)),
        everyone + group.row_numbers(drawn.hard.size),
    )
    return {"user": group.row_numbers(users), "item": jnp.concatenate(items)}


def _features(
    trainer: Trainer,
    batch: Batch,
    drawn: SampledItems,
    catalogue: Mapping[str, Any],
    places: Mapping[str, jax.Array],
    key: jax.Array,
) -> dict[str, dict[str, jax.Array]]:
    """The encoded features of both sides, the items drawn after the batch's own, with ids
    dropped."""
    features = {side: dict(batch[f"{side}_features"]) for side in SIDES}
    if len(drawn.ids):
        extra = take_features(catalogue["item_features"], trainer.model.inputs["item"], drawn.ids)
        features["item"] = {
            name: jnp.concatenate([x, extra[name]]) for name, x in features["item"].items()
        }
    return {
        side: oov_dropout(
            trainer.model.inputs[side],
            features[side],
            row_keys(jax.random.fold_in(key, i), places[side]),
        )
        for i, side in enumerate(SIDES)
    }


def oov_dropout(
    inputs: Mapping[str, Any], features: Mapping[str, jax.Array], keys: jax.Array
) -> dict[str, jax.Array]:
    """Replaces a share `oov_rate` of known ids by an out-of-vocabulary row, so that those rows are
    trained.

    Args:
        keys: [B] random keys, one a row.
    """

    def drop(name: str, ids: jax.Array) -> jax.Array:
        i, place = inputs[name], list(inputs).index(name)
        if not i.oov_rate:
            return ids
        chosen = jax.vmap(
            lambda k: jax.random.bernoulli(jax.random.fold_in(k, place), i.oov_rate, ids.shape[1:])
        )(keys)
        # Known rows begin after padding and the out-of-vocabulary rows; spread over the latter by
        # the id.
        return jnp.where(chosen & (ids > i.oov_rows), 1 + ids % i.oov_rows, ids)

    return {
        name: drop(name, x) if name in inputs and inputs[name].table else x
        for name, x in features.items()
    }


def _embed(
    trainer: Trainer,
    weights: Weights,
    rows: Any,
    features: Any,
    keys: Mapping[str, jax.Array],
    group: DeviceGroup,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The vectors of both sides, and the new batch statistics of the towers that have some."""
    vectors, stats = {}, {}
    for side in SIDES:

        def of(part: Any, side: str = side) -> tuple[jax.Array, Any]:
            rows, features, keys = part
            return trainer.model.vectors(side, weights, rows, features, keys=keys, axis=group.axis)

        parts, length = (rows[side], features[side], keys[side]), len(keys[side])
        if length <= EMBED_BLOCK:
            vectors[side], new = of(parts)
            stats |= {side: new} if new else {}
        else:
            vectors[side] = _by_blocks(lambda part, of=of: of(part)[0], parts, length)
    return vectors, stats


def _asked(vectors: jax.Array, batch: Batch) -> jax.Array:
    """A user vector for each row of a flattened batch, [B S, D] of [B, S, D]."""
    if vectors.ndim == 2:
        return vectors
    if "query_slot" in batch:
        vectors = jnp.take_along_axis(vectors, batch["query_slot"][..., None], axis=1)
    return vectors.reshape(-1, vectors.shape[-1])


def _by_blocks(function: Any, tree: Any, length: int) -> jax.Array:
    """`function` of arrays with `length` rows, a block at a time, its inner results made again for
    the gradient."""
    blocks = -(-length // EMBED_BLOCK)

    def divided(x: jax.Array) -> jax.Array:
        # Filled up with its own first rows, since keys cannot be padded; what comes of them is cut
        # off.
        filled = jnp.concatenate([x, x[: blocks * EMBED_BLOCK - length]])
        return filled.reshape(blocks, EMBED_BLOCK, *x.shape[1:])

    out = jax.lax.map(jax.checkpoint(function), jax.tree.map(divided, tree))
    return out.reshape(-1, out.shape[-1])[:length]


def _update_tables(
    trainer: Trainer,
    state: TrainState,
    asked: Mapping[str, jax.Array],
    grads: Mapping[str, jax.Array],
    group: DeviceGroup,
) -> tuple[dict[str, Any], jax.Array]:
    """{"tables", "table_slots"} after the step, of this device's rows, and the square of the norm
    of their gradient."""
    factor = trainer.schedule(state.step) * state.opt_state["plateau"].scale
    rate = factor * trainer.config.training.tables.learning_rate
    tables, slots, norm = {}, {}, jnp.float32(0)
    for name, table in state.tables.items():
        if name in asked:
            table, slots[name], square = apply_gradients(
                trainer.sparse,
                table,
                state.table_slots[name],
                asked[name],
                grads[name],
                rate,
                state.step,
                first=group.index() * len(table),
            )
            norm += square
        tables[name] = table
    return {"tables": tables, "table_slots": state.table_slots | slots}, norm


def _apply(
    trainer: Trainer, state: TrainState, grads: Any, tables: Mapping[str, Any], stats: Any
) -> TrainState:
    factor = trainer.schedule(state.step) * state.opt_state["plateau"].scale
    updates, dense = trainer.dense.update(grads, state.opt_state["dense"], state.params)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: factor * u, updates))
    params["log_temperature"] = _temperature(trainer, state.params, params)
    return state.replace(
        step=state.step + 1,
        params=params,
        opt_state=state.opt_state | {"dense": dense},
        batch_stats=state.batch_stats | stats,
        **tables,
    )


def _temperature(trainer: Trainer, old: Any, new: Any) -> jax.Array:
    """Kept as it was when not learned; otherwise within bounds after, not inside, the gradient, so
    that it never sticks."""
    if not trainer.config.model.learn_temperature:
        return old["log_temperature"]
    low, high = (jnp.log(jnp.float32(t)) for t in TEMPERATURES)
    return jnp.clip(new["log_temperature"], low, high)


# (side, feature) pairs that read one table, in a fixed order.
Uses = dict[str, list[tuple[str, str]]]


def table_uses(model: TwoTower) -> Uses:
    """Table name -> the features that read it, of either tower."""
    uses: Uses = {}
    for side in SIDES:
        for name, i in model.inputs[side].items():
            if i.table:
                uses.setdefault(i.table, []).append((side, name))
    return uses


def shared_ids(
    model: TwoTower, features: Mapping[str, Any], group: DeviceGroup
) -> dict[str, jax.Array]:
    """Table name -> the ids that all devices ask of it, device after device, as `lookup_all` and
    the update need them."""
    return {
        table: group.all_gather(
            jnp.concatenate([features[side][name].ravel() for side, name in uses])
        )
        for table, uses in table_uses(model).items()
    }


def lookup_all(
    model: TwoTower,
    tables: Mapping[str, jax.Array],
    features: Mapping[str, Any],
    asked: Mapping[str, jax.Array],
    group: DeviceGroup,
) -> dict[str, dict[str, jax.Array]]:
    """{"user": {feature: [..., E]}, "item": ...}: the rows of every feature that reads a table, one
    lookup a table.

    Args:
        asked: `shared_ids` of the same features.
    """
    rows: dict[str, dict[str, jax.Array]] = {side: {} for side in SIDES}
    for table, uses in table_uses(model).items():
        ids = [features[side][name] for side, name in uses]
        flat = jnp.concatenate([x.ravel() for x in ids])
        found = lookup_rows(tables[table], flat, asked[table], group)
        ends = list(itertools.accumulate(x.size for x in ids))
        for (side, name), x, part in zip(uses, ids, jnp.split(found, ends[:-1])):
            rows[side][name] = part.reshape(*x.shape, found.shape[-1])
    return rows


def shared_gradients(
    model: TwoTower, row_grads: Mapping[str, Any], group: DeviceGroup
) -> dict[str, jax.Array]:
    """Table name -> the gradient of each of its `shared_ids`."""

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    return {
        table: group.all_gather(
            jnp.concatenate([flat(row_grads[side][name]) for side, name in uses])
        )
        for table, uses in table_uses(model).items()
    }
