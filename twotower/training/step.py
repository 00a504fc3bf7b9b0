"""One step of training: a pure function of arrays, run by the loop under `jit`, and under
`shard_map` on several devices.

Its functions see one device's part of the batch and of the table rows; arrays cross devices only
through a `DeviceGroup`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from twotower.core.mesh import SINGLE_DEVICE, DeviceGroup
from twotower.features.inputs import HISTORY_ROW, HISTORY_SLOT, SIDES, Input
from twotower.kernels.sparse_update import apply_gradients
from twotower.pipeline.batches import Batch
from twotower.towers.embeddings import lookup_rows
from twotower.towers.two_tower import TEMPERATURES, TwoTower, Weights
from twotower.training.candidates import SampledItems, row_keys, sample_items, take_features
from twotower.training.optimizers import Optimizers, StepScalars
from twotower.training.state import Trainer, TrainState
from twotower.training.step_losses import (
    loss_sums,
    task_weights,
    update_sampling_state,
    weight_sums,
)

Metrics = dict[str, jax.Array]
# Side -> feature -> encoded values, or table rows, of each row of that side. On the item side the
# rows of the batch come first, then the shared samples, then the hard negatives.
Features = Mapping[str, Mapping[str, jax.Array]]
# Features, random keys and a batch: the arrays of the loss whose first axis is divided into parts.
Inputs = tuple[Features, Mapping[str, jax.Array], Batch]
# (params, table rows, inputs) -> loss, (mean loss of each task, batch statistics, item vectors).
LossFunction = Callable[[Any, Features, Inputs], tuple[jax.Array, Any]]

# Greatest number of rows embedded at once: the hidden units of all items of a large corpus would
# not fit into memory.
EMBED_BLOCK = 16_384


def train_step(
    state: TrainState,
    batch: Batch,
    constants: Mapping[str, Any],
    *,
    trainer: Trainer,
    group: DeviceGroup = SINGLE_DEVICE,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one gradient step, and the metrics of the step.

    Args:
        state: State before the step, with this device's rows of tables and slots.
        batch: This device's part of the batch.
        constants: Arrays of the corpus, whole on every device; see
            `twotower.training.candidates.step_constants`. Beside them "scalars", the numbers of the
            configuration as arguments; without these they are constants of the program.
        trainer: Model, loss, sampling and optimizers.
        group: Devices that run the step together.

    Returns:
        The next state, and scalars: the loss, the mean loss of each task if there are several,
        the norm of the gradient (of dense parameters and table rows) and the temperature.
    """
    model = trainer.model
    objective = trainer.config.objective
    optimizers = trainer.optimizers
    scalars = constants.get("scalars") or StepScalars.build(trainer.config.training)
    batch = flatten_sequences(batch)
    # A function of seed and step alone: a resumed step draws as it would have drawn.
    key = jax.random.fold_in(jax.random.wrap_key_data(scalars.key), state.step)
    oov_key, dropout_key, sampling_key = (jax.random.fold_in(key, i) for i in range(3))

    # Candidates beside the batch's own, and the features of all embedded rows.
    sources = {**state.negatives, **constants}
    sampled = sample_items(trainer.sampling, batch, sources, sampling_key, group)
    numbers = row_numbers(batch, sampled, group)
    features = add_samples(batch, sampled, constants, model.inputs["item"])
    features = {
        side: oov_dropout(model.inputs[side], features[side], keys)
        for side, keys in side_keys(oov_key, numbers).items()
    }
    dropout_keys = side_keys(dropout_key, numbers)

    # The gradient is taken by the rows that are looked up, never by a table: it would be as large
    # as the table.
    ids = gather_ids(model, features, group)
    rows = lookup_all(model, state.tables, features, ids, group)

    # Means are over the rows of all devices: each device divides its own sum by the weight of all,
    # so that the sum over devices is the mean, and its gradient that of one device.
    weights = group.sum(weight_sums(objective, batch))
    tasks = task_weights(objective)

    def mean_loss(params: Any, rows: Features, inputs: Inputs) -> tuple[jax.Array, Any]:
        features, keys, batch = inputs
        towers = state.weights._replace(params=params)
        vectors, stats = embed_sides(model, towers, rows, features, keys, group)
        vectors["user"] = select_user_vectors(vectors["user"], batch)
        sums = loss_sums(trainer, params, vectors, batch, sampled, state, constants, group)
        means = {
            # A batch without any weight has the mean 0, not 0 / 0.
            name: total / jnp.maximum(weights[name], jnp.finfo(total.dtype).tiny)
            for name, total in sums.items()
        }
        loss = sum((tasks[name] * mean for name, mean in means.items()), start=jnp.float32(0))
        return loss, (means, stats, vectors["item"])

    (loss, (means, stats, items)), (grads, row_grads) = loss_and_gradients(
        mean_loss,
        # Differentiated by each device alone; the sums below complete the gradient, once.
        group.pvary(state.params),
        rows,
        (features, dropout_keys, batch),
        parts=trainer.config.training.accumulate,
    )

    # Both updates follow one schedule; those of tables need the gradients of all devices' rows.
    factor = optimizers.rate_factor(state.step, state.opt_state)
    table_grads = gather_gradients(model, row_grads, group)
    tables, slots, row_norm = update_tables(
        optimizers, state, ids, table_grads, factor * scalars.table_rate, group
    )
    # One call for all, which XLA may make a single collective.
    grads, loss, means, row_norm = group.sum((grads, loss, means, row_norm))
    params, dense = update_dense(optimizers.dense_with(scalars), state, grads, factor)
    params["log_temperature"] = bounded_temperature(model, state.params, params)

    metrics = {
        # Of the state before the step: loss, gradient and temperature belong together.
        "loss": loss,
        "grad_norm": jnp.sqrt(optax.tree.norm(grads, squared=True) + row_norm),
        "temperature": model.temperature(state.params),
    }
    if len(means) > 1:
        metrics |= {f"{name}/loss": mean for name, mean in means.items()}
    # After the loss has read both: the correction of a step must not know its own batch.
    frequency, negatives = update_sampling_state(
        objective, trainer.sampling, state, batch, items, group
    )
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        tables=tables,
        batch_stats=state.batch_stats | stats,
        opt_state=state.opt_state | {"dense": dense},
        table_slots=slots,
        frequency=frequency,
        negatives=negatives,
    )
    return new_state, metrics


def flatten_sequences(batch: Batch) -> Batch:
    """Returns a batch of packed sequences with a row for each position, [B S, ...] instead of
    [B, S, ...]; any other batch unchanged.

    User features stay as they are, since the user tower reads whole sequences, and so does
    "query_slot", the position that each target is predicted from.
    """
    if batch["user"].ndim == 1:
        return batch
    unchanged = ("user_features", "query_slot")

    def flatten(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    flat = {}
    for name, values in batch.items():
        if name not in unchanged:
            values = jax.tree.map(flatten, values)
        flat[name] = values
    return flat


def row_numbers(batch: Batch, sampled: SampledItems, group: DeviceGroup) -> dict[str, jax.Array]:
    """Returns a number for each embedded row of each side: distinct numbers, which do not depend on
    the division of the batch over devices."""
    rows = len(batch["user"])
    users = rows
    if HISTORY_ROW not in batch["user_features"]:
        # Of packed sequences the user tower has fewer rows, which hold several positions each.
        users = len(next(iter(batch["user_features"].values())))
    hard = sampled.hard.size
    samples = rows * group.size
    # The shared samples have the last numbers: their padding depends on the number of devices, and
    # must not change the number of any other row.
    shared = samples + hard * group.size
    items = (
        group.row_numbers(rows),
        shared + group.row_numbers(len(sampled.shared)),
        samples + group.row_numbers(hard),
    )
    return {"user": group.row_numbers(users), "item": jnp.concatenate(items)}


def side_keys(key: jax.Array, numbers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns a random key for each row of each side.

    Args:
        key: Random key of one purpose.
        rows_of: Numbers of the rows of each side; see `row_numbers`.
    """
    return {
        side: row_keys(jax.random.fold_in(key, i), numbers[side]) for i, side in enumerate(SIDES)
    }


def add_samples(
    batch: Batch, sampled: SampledItems, constants: Mapping[str, Any], inputs: Mapping[str, Input]
) -> dict[str, dict[str, jax.Array]]:
    """Returns the encoded features of both sides, those of the sampled items after the batch's
    own.

    Args:
        batch: This device's part of the batch.
        sampled: Items sampled for the step.
        constants: Arrays of the corpus, of which "item_features" are read.
        inputs: Inputs of the item tower by feature.
    """
    features = {side: dict(batch[f"{side}_features"]) for side in SIDES}
    if len(sampled.ids):
        # In the order in which `embed_sides` returns the vectors and `step_losses` splits them.
        extra = take_features(constants["item_features"], inputs, sampled.ids)
        features["item"] = {
            name: jnp.concatenate([own, extra[name]]) for name, own in features["item"].items()
        }
    return features


def oov_dropout(
    inputs: Mapping[str, Input], features: Mapping[str, jax.Array], keys: Key[Array, "B"]
) -> dict[str, jax.Array]:
    """Replaces a share `oov_rate` of known ids by out-of-vocabulary rows, which are trained so.

    Args:
        inputs: Inputs of one tower by feature.
        features: Encoded features of that side, [B, ...] each.
        keys: Random keys, one a row.
    """
    # Each feature has draws of its own: a user's id and city are not dropped together.
    numbers = {name: number for number, name in enumerate(inputs)}

    def drop(name: str, ids: jax.Array) -> jax.Array:
        rate = inputs[name].oov_rate
        oov_rows = inputs[name].oov_rows
        if not rate:
            return ids

        shape = ids.shape[1:]
        is_flat = bool(inputs[name].history_length) and HISTORY_ROW in features
        if is_flat:
            # Drawn as for windows, so that an event is dropped alike in either form.
            shape = (inputs[name].history_length, *shape)

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, numbers[name]), rate, shape)

        is_dropped = jax.vmap(draw)(keys)
        if is_flat:
            is_dropped = is_dropped[features[HISTORY_ROW], features[HISTORY_SLOT]]
        # Row 0 is padding, rows 1 to `oov_rows` are out of vocabulary, known rows follow. The id
        # chooses the row that replaces it, so that all of them are trained.
        return jnp.where(is_dropped & (ids > oov_rows), 1 + ids % oov_rows, ids)

    replaced = {}
    for name, values in features.items():
        # Features without a table have no ids; positions of packed rows are no input at all.
        if name in inputs and inputs[name].table:
            values = drop(name, values)
        replaced[name] = values
    return replaced


def embed_sides(
    model: TwoTower,
    weights: Weights,
    rows: Features,
    features: Features,
    keys: Mapping[str, jax.Array],
    group: DeviceGroup,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns the vectors of both sides, and the new statistics of towers with batch
    normalisation.

    Args:
        model: Pair of towers.
        weights: Weights of the towers, of which the tables are not read.
        rows: Table rows of each side, by feature.
        features: Encoded features of each side.
        keys: Random keys of the rows of each side, for dropout.
        group: Devices that share the statistics of batch normalisation.
    """
    vectors = {}
    statistics = {}
    for side in SIDES:

        def embed(part: Any, side: str = side) -> tuple[jax.Array, Mapping[str, Any]]:
            rows, features, keys = part
            return model.vectors(side, weights, rows, features, keys=keys, axis=group.axis)

        parts = (rows[side], features[side], keys[side])
        length = len(keys[side])
        if length <= EMBED_BLOCK:
            vectors[side], changed = embed(parts)
            if changed:
                statistics[side] = changed
        else:
            # No statistics: `check_batch_norm` refuses batch normalisation of so many rows.
            vectors[side] = _map_blocks(lambda part, embed=embed: embed(part)[0], parts, length)
    return vectors, statistics


def _map_blocks(function: Callable[[Any], jax.Array], tree: Any, length: int) -> jax.Array:
    """Applies a function to arrays with `length` rows, one block of rows at a time."""
    blocks = -(-length // EMBED_BLOCK)

    def divide(x: jax.Array) -> jax.Array:
        # Filled up with its own first rows, since random keys cannot be padded; their results are
        # cut off.
        filled = jnp.concatenate([x, x[: blocks * EMBED_BLOCK - length]])
        return filled.reshape(blocks, EMBED_BLOCK, *x.shape[1:])

    # Inner results are computed again for the gradient: kept, they would be as large as without
    # blocks.
    out = jax.lax.map(jax.checkpoint(function), jax.tree.map(divide, tree))
    return out.reshape(-1, out.shape[-1])[:length]


def select_user_vectors(vectors: jax.Array, batch: Batch) -> Float[Array, "B D"]:
    """Returns a user vector for each row of a flattened batch.

    Args:
        vectors: Vectors of users [B, D], or of the positions of packed sequences [B, S, D].
        batch: The batch, whose "query_slot" [B, S], if any, is the position that each target is
            predicted from; without it each target is predicted from its own.
    """
    if vectors.ndim == 2:
        return vectors
    if "query_slot" in batch:
        vectors = jnp.take_along_axis(vectors, batch["query_slot"][..., None], axis=1)
    return vectors.reshape(-1, vectors.shape[-1])


def loss_and_gradients(
    loss_function: LossFunction, params: Any, rows: Features, inputs: Inputs, *, parts: int
) -> tuple[tuple[jax.Array, Any], tuple[Any, Any]]:
    """Returns the value of a loss and its gradients by parameters and table rows, of the whole
    batch or summed over its parts, one after the other.

    Args:
        loss_function: Loss to differentiate. The losses of the parts are summed, so its divisor
            must be that of the whole batch.
        params: Dense parameters.
        rows: Table rows.
        inputs: Other arrays with a row an example.
        parts: Number of parts.
    """
    differentiate = jax.value_and_grad(loss_function, (0, 1), has_aux=True)
    if parts == 1:
        return differentiate(params, rows, inputs)
    divided = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (rows, inputs))
    (loss, (means, stats, items)), (grads, row_grads) = jax.lax.map(
        lambda part: differentiate(params, *part), divided
    )
    # Parameters are shared by all parts; vectors and table rows belong to one part each.
    loss, means, grads = jax.tree.map(lambda x: x.sum(0), (loss, means, grads))
    items, row_grads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (items, row_grads))
    return (loss, (means, stats, items)), (grads, row_grads)


def update_tables(
    optimizers: Optimizers,
    state: TrainState,
    ids: Mapping[str, jax.Array],
    grads: Mapping[str, jax.Array],
    rate: Any,
    group: DeviceGroup,
) -> tuple[dict[str, jax.Array], dict[str, Any], jax.Array]:
    """Returns this device's rows of the tables and of their slots after the step, and the square
    of the norm of these rows' gradient.

    Args:
        optimizers: Optimizers of the run.
        state: State before the step.
        ids: Ids of each table that all devices looked up; see `gather_ids`.
        grads: Gradient of each of these ids; see `gather_gradients`.
        rate: Learning rate, the factor of the schedule included.
        group: Devices that share the rows of the tables.
    """
    tables = dict(state.tables)
    slots = dict(state.table_slots)
    # Summed over the table rows of this device; `train_step` adds up the devices.
    norm = jnp.float32(0)
    for name, table in state.tables.items():
        # A table that no feature reads keeps its bits.
        if name not in ids:
            continue
        tables[name], slots[name], square = apply_gradients(
            optimizers.tables,
            table,
            state.table_slots[name],
            ids[name],
            grads[name],
            rate,
            state.step,
            first=group.index() * len(table),
        )
        norm += square
    return tables, slots, norm


def update_dense(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any, factor: Any
) -> tuple[dict[str, Any], Any]:
    """Returns the dense parameters and the state of their optimizer after the step.

    Args:
        optimizer: Optimizer without the schedule.
        state: State before the step.
        grads: Gradient of the parameters, summed over devices.
        factor: Factor of the schedule on the learning rate.
    """
    updates, dense = optimizer.update(grads, state.opt_state["dense"], state.params)
    # The optimizer has no schedule of its own: tables follow the same factor.
    updates = jax.tree.map(lambda update: factor * update, updates)
    params: Any = optax.apply_updates(state.params, updates)
    return params, dense


def bounded_temperature(
    model: TwoTower, old: Mapping[str, Any], new: Mapping[str, Any]
) -> jax.Array:
    """Returns the log of the temperature after a step: within bounds, and unchanged if it is not
    learned.

    It is bounded after the update, not inside the loss, whose gradient would be 0 past a bound: the
    temperature would never come back.
    """
    if not model.config.learn_temperature:
        return old["log_temperature"]
    low, high = (jnp.log(jnp.float32(bound)) for bound in TEMPERATURES)
    return jnp.clip(new["log_temperature"], low, high)


def table_uses(model: TwoTower) -> dict[str, list[tuple[str, str]]]:
    """Returns the features (side, name) of both towers that read each table, in a fixed order."""
    uses: dict[str, list[tuple[str, str]]] = {}
    for side in SIDES:
        for name, i in model.inputs[side].items():
            if i.table:
                uses.setdefault(i.table, []).append((side, name))
    return uses


def gather_ids(
    model: TwoTower, features: Features, group: DeviceGroup
) -> dict[str, Int[Array, "M"]]:
    """Returns the ids that all devices look up in each table, device after device."""
    ids = {}
    for table, uses in table_uses(model).items():
        # Features of one table together: their gradients of one row must be summed before its
        # update.
        own = jnp.concatenate([features[side][name].ravel() for side, name in uses])
        ids[table] = group.all_gather(own)
    return ids


def lookup_all(
    model: TwoTower,
    tables: Mapping[str, jax.Array],
    features: Features,
    ids: Mapping[str, jax.Array],
    group: DeviceGroup,
) -> dict[str, dict[str, jax.Array]]:
    """Returns the table rows of every feature that reads a table, [..., E], by side and feature.

    Args:
        model: Pair of towers.
        tables: This device's rows of the tables.
        features: Encoded features of both sides.
        ids: Ids that all devices look up: `gather_ids` of the same features.
        group: Devices that share the rows of the tables.
    """
    rows: dict[str, dict[str, jax.Array]] = {side: {} for side in SIDES}
    for table, uses in table_uses(model).items():
        # One lookup a table, in the order of `gather_ids`: on several devices it is a collective.
        own = [features[side][name] for side, name in uses]
        flat = jnp.concatenate([x.ravel() for x in own])
        looked_up = lookup_rows(tables[table], flat, ids[table], group)
        ends = list(itertools.accumulate(x.size for x in own))
        for (side, name), x, part in zip(uses, own, jnp.split(looked_up, ends[:-1])):
            rows[side][name] = part.reshape(*x.shape, looked_up.shape[-1])
    return rows


def gather_gradients(
    model: TwoTower, row_grads: Features, group: DeviceGroup
) -> dict[str, Float[Array, "M E"]]:
    """Returns the gradient of each of the `gather_ids` of each table.

    Args:
        model: Pair of towers.
        row_grads: Gradients of this device's table rows, by side and feature.
        group: Devices that share the rows of the tables.
    """
    grads = {}
    for table, uses in table_uses(model).items():
        # In the order of `gather_ids`.
        own = [row_grads[side][name] for side, name in uses]
        own = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in own])
        grads[table] = group.all_gather(own)
    return grads
