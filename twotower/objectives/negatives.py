"""Where candidates come from. Each source states how often it is expected to yield each candidate."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Positives(NamedTuple):
    """The answer of each query.

    Attributes:
        vectors: of the answers.
        ids: what they are; a candidate of the same id is no negative.
        log_expected_count: log of the expected number of times the sources of this step yield the answer's id.
    """

    vectors: Float[Array, "B D"]
    ids: Int[Array, "B"]
    log_expected_count: Float[Array, "B"]


class Candidates(NamedTuple):
    """The C things that every query is compared with.

    Attributes:
        ids: what each candidate is; two candidates of one id are the same thing. Negative: padding, never compared.
        owners: the query identity (its user) that each candidate is a positive of; negative where there is none.
        log_expected_count: log of the expected number of times the sources of this step yield the candidate's id.
    """

    ids: Int[Array, "C"]
    owners: Int[Array, "C"]
    log_expected_count: Float[Array, "C"]


class Hard(NamedTuple):
    """Further negatives of each query alone; attributes as above, id negative where there is none."""

    vectors: Float[Array, "B H D"]
    ids: Int[Array, "B H"]
    log_expected_count: Float[Array, "B H"]


def in_batch(
    ids: Int[Array, "B"], owners: Int[Array, "B"], log_expected_count: Float[Array, "B"] | None
) -> Candidates:
    """The positives of the other queries of the batch. Without counts nothing is corrected."""
    if log_expected_count is None:
        log_expected_count = jnp.zeros(ids.shape)
    return Candidates(ids, owners, log_expected_count)
