"""Fresh states: shapes first, then each array on its own devices, so that no table is ever whole on
one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from twotower.core.arrays import pad_rows
from twotower.core.mesh import (
    REPLICATED,
    SHARDED,
    AnyMesh,
    device_group,
    put,
    shard_map_if_needed,
    shardings,
)
from twotower.features.inputs import SIDES
from twotower.kernels.loss_inputs import Loss
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.heads import init_heads
from twotower.objectives.negatives import init_queue
from twotower.towers.embeddings import blank_from, padded_rows
from twotower.training.optimizers import StepScalars
from twotower.training.state import Trainer, TrainState, state_specs


def init_state(trainer: Trainer, counts: Mapping[str, Any]) -> TrainState:
    """Returns a fresh state on one device; a pure function of arrays.

    Args:
        trainer: Model, loss and optimizers.
        counts: Training rows of each user ("user", float32 [U]), of each item ("item", [N]) and in
            all ("rows").
    """
    # Drawn from again in `_init_dense`: tables and towers fold different numbers in.
    key = jax.random.key(trainer.config.training.seed)
    return _state_around(trainer, key, trainer.model.init(key).tables, counts)


def init_on(mesh: Mesh, trainer: Trainer, counts: Mapping[str, np.ndarray]) -> TrainState:
    """Returns a fresh state on the devices of a mesh, with the values of `init_state`.

    Args:
        mesh: Devices of the run, each of which makes its own rows of the tables.
        trainer: Model, loss and optimizers.
        counts: Training rows; see `init_state`.
    """
    # An argument of both programs: every seed shares them.
    key_data = put(mesh, StepScalars.build(trainer.config.training).key, REPLICATED)
    # Tables come first, each sharded from its first number on.
    tables = jit_tables(trainer, mesh)(key_data)
    for name, shape in abstract_state(trainer, mesh).tables.items():
        rows = trainer.model.pretrained_rows(name)
        if rows is not None:
            tables[name] = put(mesh, pad_rows(rows, shape.shape[0]), SHARDED)
    return jit_around(trainer, mesh)(key_data, tables, put(mesh, dict(counts), REPLICATED))


def jit_tables(trainer: Trainer, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted program that draws fresh tables, of which each device makes its own rows.

    Args:
        trainer: The model; its tables alone are read.
        mesh: Devices of the run.

    Returns:
        Data of the key -> the tables that are not pretrained.
    """
    tables = {name: table for name, table in trainer.model.tables.items() if table.initial is None}
    group = device_group(mesh)

    def draw(key_data: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.wrap_key_data(key_data)
        drawn = {}
        for name, table in tables.items():
            count = padded_rows(table.rows, mesh.size) // mesh.size
            start = group.index() * count
            rows = trainer.model.init_rows(key, name, start=start, count=count)
            shared = padded_rows(table.rows)
            if count * mesh.size > shared:
                rows = blank_from(rows, shared, start=start)
            drawn[name] = rows
        return drawn

    # A row's values depend on the key and its number alone: equal on any number of devices. One
    # program for all tables, which takes a third of the time of one for each to compile.
    return jax.jit(
        shard_map_if_needed(mesh, draw, (REPLICATED,), SHARDED),
        out_shardings=shardings(mesh, SHARDED),
    )


def jit_around(trainer: Trainer, mesh: Mesh) -> Callable[..., TrainState]:
    """Returns the jitted program that makes the fresh state around its tables.

    Args:
        trainer: Model, loss and optimizers.
        mesh: Devices of the run.

    Returns:
        (data of the key, tables, counts) -> the state, with the tables donated.
    """

    def around(key_data: jax.Array, tables: dict[str, jax.Array], counts: Any) -> TrainState:
        return _state_around(trainer, jax.random.wrap_key_data(key_data), tables, counts)

    # The tables pass through as they are: an output that is a donated input costs nothing.
    return jax.jit(
        around,
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract_state(trainer, mesh)),
        donate_argnums=1,
    )


# A run asks for it four times, and each time all but the tables would be traced. One is kept:
# trainers hold vocabularies.
@functools.lru_cache(maxsize=1)
def abstract_state(trainer: Trainer, mesh: AnyMesh) -> TrainState:
    """Returns the shapes, types and shardings of a state, without allocating it."""
    shapes = {"user": (trainer.corpus.users,), "item": (trainer.corpus.items,), "rows": ()}
    counts = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    # Not by `init_state`: drawing the tables takes half of the time that tracing does, and their
    # shapes are known.
    tables = {
        name: jax.ShapeDtypeStruct((padded_rows(shape.rows, mesh.size), shape.width), "float32")
        for name, shape in trainer.model.tables.items()
    }
    # Its type alone: a key that holds a number takes a program to make.
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(functools.partial(_state_around, trainer), key, tables, counts)

    def with_sharding(x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, state, shardings(mesh, state_specs(state)))


def _state_around(
    trainer: Trainer, key: jax.Array, tables: dict[str, jax.Array], counts: Mapping[str, Any]
) -> TrainState:
    """Returns the fresh state that has these tables."""
    training = trainer.config.training
    objective = trainer.config.objective
    params, stats = _init_dense(trainer, key)
    accumulator = training.tables.initial_accumulator
    slots = {}
    for name, table in tables.items():
        slots[name] = trainer.optimizers.tables.init(table, accumulator)
        shared = padded_rows(trainer.model.tables[name].rows)
        if len(table) > shared:
            slots[name] = jax.tree.map(functools.partial(blank_from, rows=shared), slots[name])
    estimator = FREQUENCIES[trainer.sampling.config.frequency]
    # Users are candidates of the symmetric loss alone.
    sides = SIDES
    if not objective.symmetric:
        sides = ("item",)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        tables=tables,
        batch_stats=stats,
        opt_state=trainer.optimizers.init(params),
        table_slots=slots,
        frequency={side: estimator.init(counts[side], counts["rows"]) for side in sides},
        negatives=_init_negatives(trainer),
    )


def _init_dense(trainer: Trainer, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns fresh dense parameters and batch statistics of the towers, the heads and the
    loss."""
    objective = trainer.config.objective
    params, stats = trainer.model.init_dense(key)
    if objective.heads:
        # The towers have the keys below this one.
        heads_key = jax.random.fold_in(key, len(SIDES))
        params["heads"] = init_heads(objective.heads, trainer.model.dim, heads_key)
    if not isinstance(trainer.loss, Loss):
        # The odds of label 1 are not known before training; one to one.
        params["bias"] = jnp.float32(0)
    elif trainer.loss.biased:
        # The loss begins at the true odds, one positive to all candidates, instead of at one to
        # one.
        params["bias"] = -jnp.log(jnp.float32(trainer.sampling.candidates))
    return params, stats


def _init_negatives(trainer: Trainer) -> dict[str, Any]:
    """Returns an empty queue and empty pools of mined negatives, if they are used."""
    config = trainer.sampling.config
    empty: dict[str, Any] = {}
    if config.queue:
        empty["queue"] = init_queue(config.queue, trainer.model.dim)
    if config.mined:
        first, last = config.mined_ranks
        users = trainer.corpus.users
        empty["mined"] = {
            # Of the size of all later pools, so that a step is traced once.
            "items": jnp.full((users, last - first), -1, jnp.int32),
            "sizes": jnp.zeros(users, jnp.int32),
        }
    return empty
