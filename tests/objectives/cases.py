"""Queries, candidates and hard negatives with every mask at work, for the tests of losses."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from twotower.config import ObjectiveConfig
from twotower.objectives import LOSSES
from twotower.objectives.negatives import Candidates, HardNegatives, Positives

OBJECTIVE = ObjectiveConfig(margin=0.2, calibration=0.6, negative_weight=1.5)
ITEMS = 40


class Case(NamedTuple):
    """The arrays of a loss; `options` are keywords of `streaming_loss` and `naive_loss`."""

    queries: Any
    positives: Positives
    items: Any
    candidates: Candidates
    options: dict[str, Any]


def case(
    name: str,
    dtype: Any = jnp.float32,
    *,
    size: int = 13,
    others: int = 9,
    width: int = 5,
    hard: int = 3,
) -> Case:
    """`size` queries against their own items and `others`, two of which are padding, with
    accidental hits and users met twice.

    Query 1 is nobody's, query 2 weighs nothing, and some hard negatives are missing or the positive
    itself.
    """
    rng = np.random.default_rng(7)
    real = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    whole = lambda values: jnp.asarray(values, jnp.int32)  # noqa: E731
    queries, vectors, further = real(size, width), real(size, width), real(others, width)
    ids, owners = rng.integers(0, size // 2, size), rng.integers(0, size // 2, size)
    owners[1] = -1
    padding = min(others, 2)
    all_ids = np.concatenate(
        [ids, rng.integers(0, size // 2, others - padding), np.full(padding, -1)]
    )
    weights = np.abs(rng.normal(size=size)) + 0.1
    weights[2] = 0.0
    loss = LOSSES[name]
    options = {
        "loss": loss,
        "weights": jnp.asarray(weights, dtype),
        "scale": jnp.asarray(4.0, dtype),
        "owners": whole(owners),
        "bias": jnp.asarray(-0.7, dtype),
        "hard": HardNegatives(
            real(size, hard, width),
            whole(rng.integers(-1, size // 2, (size, hard))),
            real(size, hard),
        ),
        "margin": OBJECTIVE.margin,
        "positive_temperature": 0.3,
        "mask_same_user": True,
        "constants": loss.constants(OBJECTIVE, ITEMS),
    }
    candidates = Candidates(
        whole(all_ids), whole(np.concatenate([owners, np.full(others, -1)])), real(size + others)
    )
    return Case(
        queries,
        Positives(vectors, whole(ids), real(size)),
        jnp.concatenate([vectors, further]),
        candidates,
        options,
    )
