"""Popularity at query time: score + weight x log count, by one more coordinate in the index.

An item's coordinate is a small multiple of its log count, a query's the weight divided by that
multiple; so one index serves every weight, 0 (the plain dot product) among them. Items without a
training row count as one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from twotower.index.int8 import Vectors


def log_counts(counts: np.ndarray) -> np.ndarray:
    """Returns the logs of counts as float32, of the same shape; 0 for a count of 0."""
    # An item that was never trained on counts as one row: its log is 0, not -inf.
    return np.log(np.maximum(np.asarray(counts, np.float64), 1.0)).astype(np.float32)


def popularity_coordinate(counts: np.ndarray, dim: int) -> tuple[np.ndarray, float]:
    """Returns the items' coordinate, float32 [N], and that of a query with weight 1.

    The greatest is as long as each of the others of a unit vector is on average: the partition of
    the index hardly minds it.

    Args:
        counts: int [N], training rows of each item.
        dim: Width of the vectors, D.
    """
    logs = log_counts(counts)
    # 1 / sqrt(D) is the size of a number in a unit vector. Below 1, as of a corpus without
    # repeated items, the logs are not stretched.
    scale = 1.0 / np.sqrt(dim) / max(float(logs.max(initial=0.0)), 1.0)
    return (scale * logs).astype(np.float32), float(1.0 / scale)


def append_coordinate(vectors: Vectors, values: ArrayLike) -> np.ndarray:
    """Returns vectors [N, D] as float32 [N, D + 1].

    Args:
        vectors: float [N, D].
        values: The last coordinate, one number or [N].
    """
    # Whole in memory and in float32, also of int8 vectors.
    column = np.broadcast_to(np.asarray(values, np.float32), len(vectors))
    return np.column_stack([vectors, column]).astype(np.float32)
