"""The vectors of many users or items, computed in padded batches of few shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from twotower.core.arrays import next_power_of_two, pad_rows, round_up
from twotower.core.mesh import REPLICATED, SHARDED, compiler_options, make_mesh, put
from twotower.core.progress import progress
from twotower.towers.embeddings import padded_rows
from twotower.towers.two_tower import TwoTower, Weights

BATCH = 4_096  # rows embedded at once
MAX_BATCH_EVENTS = 2**16  # events in the histories of a batch: a Transformer keeps much of each


def embed_rows(
    model: TwoTower,
    weights: Weights,
    side: Literal["user", "item"],
    features: Mapping[str, np.ndarray],
    *,
    batch: int = BATCH,
    like: int = 0,
) -> np.ndarray:
    """Returns the vectors of all rows of `features`, float32 [N, D].

    Args:
        model: The two towers.
        weights: Their arrays. Where these are divided over a mesh, so is the work, and all
            processes must take part.
        side: Tower to apply.
        features: Encoded features, [N, ...] each.
        batch: Rows embedded at once; fewer are padded to a power of two, so that few shapes are
            compiled.
        like: Number of rows that were embedded before: fewer are padded to the shape that is
            compiled already.
    """
    # Memory grows with the events of a batch, not with its users.
    if side == "user" and model.history_length:
        batch = min(batch, next_power_of_two(MAX_BATCH_EVENTS // model.history_length))
    count = len(next(iter(features.values())))
    mesh = find_mesh(weights)
    # A batch is divided over the devices, so that each needs a row.
    devices = mesh.size if mesh else 1
    batch = round_up(batch, devices)
    embed = _compiled_embed(mesh)
    # On the host: the vectors of a large corpus may not fit beside the tables.
    vectors = np.zeros((count, model.dim), np.float32)
    starts = range(0, count, batch)
    for start in progress(starts, total=len(starts), what=f"Embedding {side}s"):
        rows = min(batch, count - start)
        size = min(batch, round_up(next_power_of_two(max(rows, like)), devices))
        padded = {
            name: pad_rows(values[start : start + rows], size) for name, values in features.items()
        }
        if mesh:
            padded = put(mesh, padded, SHARDED)
        # Cut on the host: on a device it would be one more program, for each number of rows.
        vectors[start : start + rows] = np.asarray(embed(model, side, weights, padded))[:rows]
    return vectors


def find_mesh(arrays: Any) -> Mesh | None:
    """Returns the mesh of several devices that a tree of arrays lies on, or None."""
    # Weights that were read from a checkpoint may be NumPy arrays, which lie on none.
    for array in jax.tree.leaves(arrays):
        if not isinstance(array, jax.Array) or not isinstance(array.sharding, NamedSharding):
            continue
        mesh = array.sharding.mesh
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None


def shard_weights(weights: Weights, devices: int) -> Weights:
    """Puts weights on a mesh: tables divided by rows, all else on every device.

    Args:
        weights: Weights of both towers.
        devices: Number of devices; 0 takes all. On one the weights are left as they are.
    """
    mesh = make_mesh(devices)
    if mesh.size == 1:
        return weights
    host = jax.tree.map(np.asarray, weights)
    # More rows where the devices do not divide those of the checkpoint.
    tables = {
        name: pad_rows(table, padded_rows(len(table), mesh.size))
        for name, table in host.tables.items()
    }
    return host._replace(
        params=put(mesh, host.params, REPLICATED),
        tables=put(mesh, tables, SHARDED),
        batch_stats=put(mesh, host.batch_stats, REPLICATED),
    )


@functools.cache
def _compiled_embed(mesh: Mesh | None) -> Callable[..., jax.Array]:
    """Returns `TwoTower.embed` compiled for `mesh`; one function a mesh, so that it is cached."""

    def embed(
        model: TwoTower, side: str, weights: Weights, features: Mapping[str, Any]
    ) -> jax.Array:
        return model.embed(side, weights, features)

    # Every process reads all vectors, so each must hold them.
    replicated = None
    if mesh:
        replicated = NamedSharding(mesh, REPLICATED)
    return jax.jit(
        embed,
        static_argnames=("model", "side"),
        out_shardings=replicated,
        compiler_options=compiler_options(mesh),
    )
