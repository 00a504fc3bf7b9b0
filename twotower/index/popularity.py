"""The popularity knob: score + weight x log count, by one more coordinate of the vectors that are
indexed.

An item's coordinate is a small multiple of its log count, a query's the weight divided by that
multiple; so one index serves every weight, 0 (the plain dot product) among them. Items without a
training row count as one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from twotower.config import Config
from twotower.core.arrays import evenly_spaced
from twotower.index.int8 import Vectors
from twotower.index.scann import build_index
from twotower.index.tuning import TUNING_QUERIES


def log_counts(counts: np.ndarray) -> np.ndarray:
    """float32, of the shape of `counts`."""
    return np.log(np.maximum(np.asarray(counts, np.float64), 1.0)).astype(np.float32)


def coordinate(counts: np.ndarray, dim: int) -> tuple[np.ndarray, float]:
    """The items' coordinate, float32 [N], and that of a query with weight 1.

    The greatest is as long as each of the others of a unit vector is on average: the partition of
    the index hardly minds it.
    """
    logs = log_counts(counts)
    scale = 1.0 / np.sqrt(dim) / max(float(logs.max(initial=0.0)), 1.0)
    return (scale * logs).astype(np.float32), float(1.0 / scale)


def widened(vectors: Vectors, last: Any) -> np.ndarray:
    """float32 [N, D + 1], with one more coordinate."""
    return np.column_stack([vectors, np.broadcast_to(np.float32(last), len(vectors))]).astype(
        np.float32
    )


def index_items(config: Config, vectors: Vectors, counts: np.ndarray, users: np.ndarray) -> Any:
    """The index that a bundle of `config` has over item vectors [N, D], tuned on user vectors [U,
    D]."""
    queries = evenly_spaced(users, TUNING_QUERIES)
    if config.retrieval.popularity:
        vectors, queries = (
            widened(vectors, coordinate(counts, vectors.shape[1])[0]),
            widened(queries, 0.0),
        )
    return build_index(
        vectors,
        config.retrieval,
        normalized=config.model.normalize,
        queries=queries,
        popularity=counts,
    )
