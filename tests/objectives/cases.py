"""Queries, candidates and hard negatives with every mask at work, for the tests of losses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower.config import ObjectiveConfig
from twotower.kernels.loss_inputs import (
    Candidates,
    HardNegatives,
    LossInputs,
    LossOptions,
    Positives,
)
from twotower.objectives.losses import LOSSES, bind_constants

OBJECTIVE = ObjectiveConfig(margin=0.2, calibration=0.6, negative_weight=1.5)
ITEMS = 40


def options_of(name: str, **changes: Any) -> LossOptions:
    """The options of a loss with a margin, a temperature of the positive and masked users."""
    loss = bind_constants(LOSSES[name], OBJECTIVE, ITEMS)
    options = LossOptions(loss, margin=OBJECTIVE.margin, positive_temperature=0.3)
    return options._replace(**changes)


@functools.cache
def inputs_of(
    dtype: Any = jnp.float32,
    *,
    size: int = 13,
    others: int = 9,
    width: int = 5,
    hard: int = 3,
) -> LossInputs:
    """`size` queries against their own items and `others`, two of which are padding, with
    accidental hits and users met twice.

    Query 1 is nobody's, query 2 weighs nothing, and some hard negatives are missing or the positive
    itself.
    """
    rng = np.random.default_rng(7)

    def real(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def whole(values):
        return jnp.asarray(values, jnp.int32)

    queries = real(size, width)
    vectors = real(size, width)
    further = real(others, width)
    ids = rng.integers(0, size // 2, size)
    users = rng.integers(0, size // 2, size)
    users[1] = -1
    padding = min(others, 2)
    other_ids = rng.integers(0, size // 2, others - padding)
    all_ids = np.concatenate([ids, other_ids, np.full(padding, -1)])
    weights = np.abs(rng.normal(size=size)) + 0.1
    weights[2] = 0.0
    hard_vectors = real(size, hard, width)
    hard_ids = whole(rng.integers(-1, size // 2, (size, hard)))
    hard_negatives = HardNegatives(hard_vectors, hard_ids, real(size, hard))
    candidates = Candidates(
        jnp.concatenate([vectors, further]),
        whole(all_ids),
        whole(np.concatenate([users, np.full(others, -1)])),
        real(size + others),
    )
    return LossInputs(
        queries,
        whole(users),
        jnp.asarray(weights, dtype),
        Positives(vectors, whole(ids), real(size)),
        candidates,
        scale=jnp.asarray(4.0, dtype),
        bias=jnp.asarray(-0.7, dtype),
        hard=hard_negatives,
    )


def arrays_of(inputs: LossInputs) -> dict[str, jax.Array]:
    """What a loss is differentiated by."""
    arrays = {
        "queries": inputs.queries,
        "positives": inputs.positives.vectors,
        "items": inputs.candidates.vectors,
        "scale": jnp.asarray(inputs.scale),
        "weights": inputs.weights,
    }
    if inputs.hard is not None:
        arrays["hard"] = inputs.hard.vectors
    if inputs.bias is not None:
        arrays["bias"] = inputs.bias
    return arrays


def with_arrays(inputs: LossInputs, arrays: dict[str, jax.Array]) -> LossInputs:
    """The inputs with other arrays in the place of those of `arrays_of`."""
    inputs = inputs._replace(
        queries=arrays["queries"],
        positives=inputs.positives._replace(vectors=arrays["positives"]),
        candidates=inputs.candidates._replace(vectors=arrays["items"]),
        scale=arrays["scale"],
        weights=arrays["weights"],
        bias=arrays.get("bias"),
    )
    if inputs.hard is None:
        return inputs
    return inputs._replace(hard=inputs.hard._replace(vectors=arrays["hard"]))


@functools.partial(jax.jit, static_argnums=(0, 2))
def value_and_gradients(form, inputs: LossInputs, options: LossOptions):
    """The loss and its gradients by `arrays_of`; `form` is compared by identity, so that a program
    is compiled once for each."""

    def loss(arrays):
        return form(with_arrays(inputs, arrays), options)

    return jax.value_and_grad(loss)(arrays_of(inputs))
