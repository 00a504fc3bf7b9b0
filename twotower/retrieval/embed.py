"""Vectors of many users or items, in padded batches of few shapes; or of some of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from twotower.core.arrays import next_power_of_two, pad_rows
from twotower.core.mesh import REPLICATED, SHARDED, compiler_options, put
from twotower.core.progress import progress

BATCH = 4_096
EVENTS = 2**16  # of the histories of a batch, at most


def embed_rows(
    model: Any, weights: Any, side: str, features: Mapping[str, np.ndarray], *, batch: int = BATCH
) -> np.ndarray:
    """float32 [N, D], the vectors of all rows of `features`.

    Args:
        model: a `TwoTower`.
        weights: its `Weights`; where they are divided over a mesh, so is the work, and all
            processes must take part.
        side: "user" or "item".
        features: encoded, [N, ...] each.
        batch: rows embedded at once; fewer are padded to a power of two, so that few shapes are
            compiled.
    """
    if side == "user" and model.history_length:
        batch = min(batch, next_power_of_two(EVENTS // model.history_length))
    count, mesh = len(next(iter(features.values()))), mesh_of_tables(weights)
    fewest = mesh.size if mesh else 1
    batch = max(batch, fewest)
    vectors = np.zeros((count, model.dim), np.float32)
    starts = range(0, count, batch)
    for start in progress(starts, total=len(starts), what=f"Embedding {side}s"):
        part = {name: values[start : start + batch] for name, values in features.items()}
        rows = min(batch, count - start)
        size = max(fewest, min(batch, next_power_of_two(rows)))
        padded = {name: pad_rows(values, size) for name, values in part.items()}
        padded = put(mesh, padded, SHARDED) if mesh else padded
        vectors[start : start + rows] = _embed(mesh)(model, side, weights, padded)[:rows]
    return vectors


def mesh_of_tables(arrays: Any) -> Mesh | None:
    """The mesh of several devices that `arrays` are divided over."""
    places = [x.sharding for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    meshes = [
        place.mesh for place in places if isinstance(place, NamedSharding) and place.mesh.size > 1
    ]
    return meshes[0] if meshes else None


@functools.cache
def _embed(mesh: Mesh | None) -> Any:
    def embed(model: Any, side: str, weights: Any, features: Mapping[str, Any]) -> jax.Array:
        return model.embed(side, weights, features)

    # Every process reads all vectors, so each must hold them.
    out = NamedSharding(mesh, REPLICATED) if mesh else None
    return jax.jit(
        embed,
        static_argnames=("model", "side"),
        out_shardings=out,
        compiler_options=compiler_options(mesh),
    )
