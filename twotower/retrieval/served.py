"""The towers as StableHLO programs: they embed users and items without Flax and without the model's
code.

A program is exported for CPU, CUDA and TPU at once, with the batch size left open; the weights are
its arguments, so that it is a few kilobytes and the weights are kept once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from twotower.core.arrays import next_power_of_two, pad_rows
from twotower.core.progress import progress
from twotower.retrieval.weights import Arrays

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = 4_096  # rows embedded at once


def export_tower(
    model: Any, weights: Arrays, side: str, example: Mapping[str, np.ndarray]
) -> bytes:
    """The program (arrays of the weights, features) -> vectors [b, D] of one side.

    Args:
        model: a `TwoTower`.
        example: encoded features of any number of rows, which say the shapes and types.
    """
    from twotower.towers.two_tower import Weights

    def embed(arrays: Any, features: Any) -> jax.Array:
        return model.embed(side, Weights(**arrays), features)

    (batch,) = jax.export.symbolic_shape("b")
    features = {
        name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in example.items()
    }
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), dict(weights)
    )
    return bytes(
        jax.export.export(jax.jit(embed), platforms=PLATFORMS)(arrays, features).serialize()
    )


class Towers:
    """Both programs and their weights, on the device.

    Attributes:
        programs: {"user": ..., "item": ...}, as `export_tower` gives them.
        weights: NumPy arrays.
    """

    def __init__(self, programs: Mapping[str, bytes], weights: Arrays):
        self.programs, self.weights = programs, weights
        exported = {
            side: jax.export.deserialize(bytearray(program)) for side, program in programs.items()
        }
        self.dim = exported["user"].out_avals[0].shape[-1]
        # Compiled once a shape; without `jit` each call would be prepared anew.
        self._calls = {side: jax.jit(program.call) for side, program in exported.items()}
        self._arrays = jax.device_put(dict(weights))

    def embed(
        self, side: str, features: Mapping[str, np.ndarray], *, batch: int = BATCH
    ) -> np.ndarray:
        """float32 [N, D], the vectors of encoded `features`; padded to a power of two, so that few
        shapes are compiled."""
        count = len(next(iter(features.values())))
        vectors = np.zeros((count, self.dim), np.float32)
        starts = range(0, count, batch)
        for start in progress(starts, total=len(starts), what=f"Embedding {side}s"):
            rows = min(batch, count - start)
            size = min(batch, next_power_of_two(rows))
            part = {
                name: pad_rows(values[start : start + rows], size)
                for name, values in features.items()
            }
            vectors[start : start + rows] = np.asarray(self._calls[side](self._arrays, part))[:rows]
        return vectors
