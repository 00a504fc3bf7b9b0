"""Inputs of the retrieval losses: vectors with their ids, the recipe of logits from scores, and
masks of the candidates that are no negatives of a query.

`twotower.kernels.streaming_softmax` and its plain reference take the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int


class Positives(NamedTuple):
    """The positive of each query.

    Attributes:
        vectors: Vectors of the positives.
        ids: Ids of the positives; a candidate of the same id is no negative.
        log_expected_count: Log of the expected number of times the sources of negatives of this
            step yield the positive's id.
    """

    vectors: Float[Array, "*B D"]
    ids: Int[Array, "*B"]
    log_expected_count: Float[Array, "*B"]


class Candidates(NamedTuple):
    """The C items that every query is compared with (users, where items are the queries).

    Attributes:
        vectors: Vectors of the candidates.
        ids: Ids of the candidates, equal for equal items; negative for padding, which is never
            compared.
        query_ids: Identity (user) of the query that each candidate is a positive of; negative for
            a positive of nobody.
        log_expected_count: Log of the expected number of times the sources of negatives of this
            step yield the candidate's id.
    """

    vectors: Float[Array, "C D"]
    ids: Int[Array, "C"]
    # Ids instead of positions: candidates of a queue or of other devices have no row in the batch.
    query_ids: Int[Array, "C"]
    log_expected_count: Float[Array, "C"]


class HardNegatives(NamedTuple):
    """Further negatives of each query alone.

    Attributes:
        vectors: Vectors of the negatives.
        ids: Ids of the negatives; negative for padding.
        log_expected_count: As in `Candidates`.
    """

    vectors: Float[Array, "*B H D"]
    # No query ids: a hard negative is compared with its own query alone.
    ids: Int[Array, "*B H"]
    log_expected_count: Float[Array, "*B H"]


class LossInputs(NamedTuple):
    """The arrays of a retrieval loss.

    Attributes:
        queries: Vectors of B queries, [B, D], or of B rows of L queries, [B, L, D]; positives,
            weights and hard negatives have the same leading axes.
        query_ids: Identity (user) of each query, or of each row of queries; negative: nobody.
        weights: Weight of each query in the sum of losses.
        positives: Positive of each query.
        candidates: Candidates for negatives of all queries.
        scale: Factor of the scores, 1 / temperature.
        bias: Number added to every logit, for losses with `Loss.biased`; None is 0.
        hard: Further negatives of each query.
    """

    queries: Float[Array, "*B D"]
    # One id for a row of L queries where all of them are the same user's.
    query_ids: Int[Array, "..."]
    # Rows that only fill up a batch have weight 0: they cost nothing and move nothing.
    weights: Float[Array, "*B"]
    positives: Positives
    candidates: Candidates
    scale: float | Float[Array, ""] = 1.0
    bias: Float[Array, ""] | None = None
    # Beside the candidates, not instead of them.
    hard: HardNegatives | None = None

    def map_vectors(self, function: Callable[[jax.Array], jax.Array]) -> LossInputs:
        """Returns the same inputs with `function` applied to all vectors."""
        # Scale, bias and ids do not depend on the width of the vectors.
        hard = self.hard
        if hard is not None:
            hard = hard._replace(vectors=function(hard.vectors))
        return self._replace(
            queries=function(self.queries),
            positives=self.positives._replace(vectors=function(self.positives.vectors)),
            candidates=self.candidates._replace(vectors=function(self.candidates.vectors)),
            hard=hard,
        )


class Loss(NamedTuple):
    """A retrieval loss: a function of the logits of each query, and the recipe of these logits.

    Attributes:
        per_query: (positive [B], negatives [B, C], *, where [B, C], **constants) -> [B]; 0, with a
            zero gradient, for a query without any allowed negative.
        by_logit_margin: The loss [B] as a function of its logit margin [B], which is the log of the
            negatives' summed exponentials, less the positive's logit; None for losses that are no
            function of it.
        corrects: Whether log expected counts are taken off the negatives' logits.
        corrects_positive: Whether they are taken off the positive's too.
        scaled: Whether scores are divided by the temperature.
        biased: Whether a learnable bias is added to every logit.
        bilateral: Whether the positive may have a temperature of its own.
        constants: Names of the other keyword arguments of `per_query`: options of the objective,
            "num_items", or "options" for those of a loss of one's own.
    """

    # Its constants are Python numbers of the configuration: static under `jit`.
    per_query: Callable[..., jax.Array]
    # Its gradient by a negative's logit is one number a query times the exponential.
    by_logit_margin: Callable[[jax.Array], jax.Array] | None = None
    corrects: bool = False
    corrects_positive: bool = False
    scaled: bool = True
    biased: bool = False
    bilateral: bool = False
    constants: tuple[str, ...] = ()

    @property
    def takes_margin(self) -> bool:
        """Whether the margin is a constant of the loss, instead of subtracted from the positive's
        score."""
        return "margin" in self.constants


class LossOptions(NamedTuple):
    """The static options of a retrieval loss.

    Attributes:
        loss: The loss, with its constants bound.
        margin: Additive margin, in units of scores; not used where `Loss.takes_margin`.
        positive_temperature: Temperature of the positive, where `Loss.bilateral`; 0 takes that of
            the negatives.
        mask_same_user: Whether other positives of a query's user are not its negatives.
    """

    loss: Loss
    margin: float = 0.0
    positive_temperature: float = 0.0
    mask_same_user: bool = True


# Everything is compared by id, never by position: an item that a query likes is masked wherever it
# comes from, its own row, another row of the batch, another device, a queue or a sampler.


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
