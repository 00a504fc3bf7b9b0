"""The towers as StableHLO programs, which embed users and items without the model's code or Flax.

A program is exported for CPU, CUDA and TPU at once, with the batch size left open. The weights are
its arguments, so that a program is a few kilobytes and the weights are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from twotower.core.arrays import next_power_of_two, pad_rows
from twotower.core.mesh import check_fork
from twotower.core.progress import progress
from twotower.retrieval.weights import WeightArrays

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = 4_096  # rows embedded at once; the batches of `twotower.retrieval.embed` are as long

# (arrays of the weights, encoded features [B, ...]) -> vectors [B, D]
Embed = Callable[[Any, Any], jax.Array]


def export_tower(embed: Embed, weights: WeightArrays, example: Mapping[str, np.ndarray]) -> bytes:
    """Returns the program of one tower.

    Args:
        embed: Function of the weights and the features that JAX can trace.
        weights: Arrays of the weights; only their shapes and types are used.
        example: Encoded features of any number of rows, likewise.
    """
    # The batch size stays a symbol: one program embeds one user, and a batch of thousands.
    (batch,) = jax.export.symbolic_shape("b")
    features = {
        name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in example.items()
    }
    arrays = jax.tree.map(_shape_of, dict(weights))
    export = jax.export.export(jax.jit(embed), platforms=PLATFORMS)
    program = export(arrays, features)
    return bytes(program.serialize())


class TowerPrograms:
    """Both programs and their weights, on the device.

    Attributes:
        programs: {"user": ..., "item": ...}, as `export_tower` returns them.
        weights: Weights as NumPy arrays.
        dim: Width of the vectors, D.
    """

    def __init__(self, programs: Mapping[str, bytes], weights: WeightArrays):
        """Reads the programs and puts the weights on the default device.

        Args:
            programs: {"user": ..., "item": ...}, as `export_tower` returns them.
            weights: Weights that the programs take, as NumPy arrays.
        """
        check_fork()
        # Both are kept as they came too: writing the bundle again must not change a byte.
        self.programs = programs
        self.weights = weights
        exported = {
            side: jax.export.deserialize(bytearray(program)) for side, program in programs.items()
        }
        self.dim = exported["user"].out_avals[0].shape[-1]
        # Compiled once a shape; without `jit` each call would be prepared anew.
        self._calls = {side: jax.jit(program.call) for side, program in exported.items()}
        # Once: passing NumPy arrays would copy the tables to the device for every call.
        self._arrays = jax.device_put(dict(weights))

    def embed(
        self, side: str, features: Mapping[str, np.ndarray], *, batch: int = BATCH
    ) -> np.ndarray:
        """Returns the vectors of encoded features, float32 [N, D].

        Args:
            side: "user" or "item".
            features: Encoded features, [N, ...] each.
            batch: Rows embedded at once. A last part is padded to a power of two, so that few
                shapes are compiled.
        """
        check_fork()
        count = len(next(iter(features.values())))
        vectors = np.zeros((count, self.dim), np.float32)
        starts = range(0, count, batch)
        for start in progress(starts, total=len(starts), what=f"Embedding {side}s"):
            rows = min(batch, count - start)
            size = min(batch, next_power_of_two(rows))
            stop = start + rows
            part = {name: values[start:stop] for name, values in features.items()}
            # Padding by nothing would still copy: of one user that costs more than the tower.
            if rows < size:
                part = {name: pad_rows(values, size) for name, values in part.items()}
            embedded = self._calls[side](self._arrays, part)
            vectors[start : start + rows] = np.asarray(embedded)[:rows]
        return vectors


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(array), np.asarray(array).dtype)
