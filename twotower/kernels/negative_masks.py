"""Masks of the training loss: which candidates are no negatives of a query.

Everything is compared by id, never by position: an item that a query likes is masked wherever it
comes from, its own row, another row of the batch, another device, a queue or a sampler.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Int


def positives_among_candidates(
    ids: Int[Array, "n"],
    query_ids: Int[Array, "n"],
    candidates: Int[Array, "C"],
    candidate_query_ids: Int[Array, "C"],
) -> Bool[Array, "n C"]:
    """Returns a mask of the candidates that are no negatives of a query.

    Args:
        ids: Positive of each query.
        query_ids: User of each query; numbers below 0 that differ where other positives of the
            same user do count as negatives.
        candidates: Id of each candidate.
        candidate_query_ids: User whose positive each candidate is.
    """
    # An accidental hit: the query's own positive, at any place among the candidates.
    is_positive = candidates[None, :] == ids[:, None]
    # Another positive of the same user, which a sampled softmax would push away.
    is_same_user = candidate_query_ids[None, :] == query_ids[:, None]
    return is_positive | is_same_user


def allowed_hard_negatives(
    ids: Int[Array, "... H"], positives: Int[Array, "..."]
) -> Bool[Array, "... H"]:
    """Returns a mask of the hard negatives that count.

    Args:
        ids: Hard negatives of each query, -1 in empty places.
        positives: Positive of each query, which its pool may hold too.
    """
    return (ids >= 0) & (ids != positives[..., None])
