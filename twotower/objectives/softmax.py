"""Sampled softmax over candidates, corrected for how they were sampled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from twotower.objectives.negatives import Candidates


def softmax(
    queries: Float[Array, "B D"],
    items: Float[Array, "C D"],
    *,
    inverse_temperature: Float[Array, ""],
    owners: Int[Array, "B"],
    positives: Int[Array, "B"],
    candidates: Candidates,
    mask_same_user: bool = True,
) -> Float[Array, "B"]:
    r"""Cross-entropy of each query's positive among the candidates.

    .. math:: \ell_b = -\log \frac{e^{s_{b,p}}}{\sum_{c \in A_b} e^{s_{b,c}}},
              \quad s_{b,c} = \frac{q_b \cdot v_c}{T} - \log E_c

    E_c is the expected count of candidate c (the logQ correction of Bengio and Senecal 2008 as used by Yi et al., RecSys
    2019), subtracted after the division by the temperature. A_b leaves out accidental hits (other candidates with the
    positive's id), other positives of the same user, and padding.

    Args:
        queries: query vectors.
        items: candidate vectors.
        inverse_temperature: 1 / T.
        owners: the identity of each query, to be compared with `candidates.owners`.
        positives: the candidate that is each query's answer.
        candidates: what the columns are.
        mask_same_user: leave out other positives of the query's owner.

    Returns:
        One loss a query, in nats.
    """
    at_least_float32 = jnp.promote_types(queries.dtype, jnp.float32)
    scores = jnp.einsum("bd,cd->bc", queries * inverse_temperature, items, preferred_element_type=at_least_float32)
    logits = scores - candidates.log_expected_count[None, :]
    allowed = _allowed(owners, positives, candidates, mask_same_user)
    positive = jnp.take_along_axis(logits, positives[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1, where=allowed) - positive


def _allowed(
    owners: Int[Array, "B"], positives: Int[Array, "B"], candidates: Candidates, mask_same_user: bool
) -> Bool[Array, "B C"]:
    is_positive = positives[:, None] == jnp.arange(candidates.ids.size)[None, :]
    excluded = candidates.ids[None, :] == candidates.ids[positives][:, None]
    if mask_same_user:
        excluded |= (candidates.owners[None, :] == owners[:, None]) & (owners[:, None] >= 0)
    return is_positive | ~(excluded | (candidates.ids < 0)[None, :])
