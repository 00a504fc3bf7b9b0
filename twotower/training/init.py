"""Fresh states: shapes first, then each array where it will live, so that no table is ever whole on
one device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from twotower.core.mesh import (
    REPLICATED,
    SHARDED,
    device_group,
    put,
    shard_map_if_needed,
    shardings,
)
from twotower.features.base import SIDES
from twotower.objectives import POINTWISE
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.heads import init_heads
from twotower.objectives.negatives import init_queue
from twotower.towers.two_tower import Weights
from twotower.training.optimizers import init_plateau
from twotower.training.state import Trainer, TrainState, state_specs


def init_state(trainer: Trainer, counts: Mapping[str, Any]) -> TrainState:
    """A fresh state on one device; a pure function of arrays.

    Args:
        counts: {"user": float32 [U], "item": float32 [N], "rows": float32 scalar}, training rows of
            each and in all.
    """
    return _assembled(trainer, _init_tables(trainer), counts)


def init_on(mesh: Mesh, trainer: Trainer, counts: Mapping[str, np.ndarray]) -> TrainState:
    """A fresh state on the devices of `mesh`, with the values of `init_state`."""
    group, abstract = device_group(mesh), abstract_state(trainer, mesh)
    key = jax.random.key(trainer.config.training.seed)

    def rows(name: str) -> jax.Array:
        given = trainer.model.pretrained_rows(name)
        if given is not None:
            return put(mesh, given, SHARDED)
        count = abstract.tables[name].shape[0] // mesh.size
        drawn = lambda: trainer.model.init_rows(key, name, start=group.index() * count, count=count)  # noqa: E731
        return jax.jit(
            shard_map_if_needed(mesh, drawn, (), SHARDED),
            out_shardings=abstract.tables[name].sharding,
        )()

    tables = {name: rows(name) for name in abstract.tables}
    out = jax.tree.map(lambda x: x.sharding, abstract)
    # The tables pass through as they are: an output that is a donated input costs nothing.
    assemble = jax.jit(functools.partial(_assembled, trainer), out_shardings=out, donate_argnums=0)
    return assemble(tables, put(mesh, dict(counts), REPLICATED))


def abstract_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """The shapes, types and places of a state, without allocating it."""
    shapes = {"user": (trainer.corpus.users,), "item": (trainer.corpus.items,), "rows": ()}
    counts = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    state = jax.eval_shape(functools.partial(init_state, trainer), counts)
    places = shardings(mesh, state_specs(state))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def _init_tables(trainer: Trainer) -> dict[str, jax.Array]:
    return trainer.model.init(jax.random.key(trainer.config.training.seed)).tables


def _assembled(
    trainer: Trainer, tables: dict[str, jax.Array], counts: Mapping[str, Any]
) -> TrainState:
    """The state around its tables."""
    config, negatives = trainer.config, trainer.sampling.config
    key = jax.random.key(config.training.seed)
    params, stats = trainer.model.init_dense(key)
    if config.objective.heads:
        params["heads"] = init_heads(
            config.objective.heads, trainer.model.dim, jax.random.fold_in(key, len(SIDES))
        )
    if config.objective.loss in POINTWISE:
        params["bias"] = jnp.float32(0)
    elif trainer.loss.biased:
        # The loss begins at the odds that there are, of one positive to its candidates, instead of
        # at one to one.
        params["bias"] = -jnp.log(jnp.float32(trainer.sampling.candidates))
    weights = Weights(params, tables, stats)
    slots = {
        name: trainer.sparse.init(x, config.training.tables.initial_accumulator)
        for name, x in tables.items()
    }
    # Users are candidates of the symmetric loss alone.
    estimator, sides = (
        FREQUENCIES[negatives.frequency],
        SIDES if config.objective.symmetric else ("item",),
    )
    kept = {}
    if negatives.queue:
        kept["queue"] = init_queue(negatives.queue, trainer.model.dim)
    if negatives.mined:
        shape = (trainer.corpus.users, negatives.mined_ranks[1] - negatives.mined_ranks[0])
        kept["mined"] = {
            "items": jnp.full(shape, -1, jnp.int32),
            "sizes": jnp.zeros(shape[0], jnp.int32),
        }
    return TrainState(
        jnp.int32(0),
        *weights,
        {"dense": trainer.dense.init(params), "plateau": init_plateau()},
        slots,
        {side: estimator.init(counts[side], counts["rows"]) for side in sides},
        kept,
    )
