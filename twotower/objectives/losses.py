"""Losses of logits and of scores, per query or per row; reduction happens in the training step.

A retrieval loss takes the logits of a query's positive and of its negatives: all negatives together
(softmax and its kin), each by itself (gbce, sigmoid), or against the positive (bpr, hinge, triplet,
cosine_contrastive). `LOSSES` has them by name, with the recipe of their logits; see
`twotower.kernels.loss_inputs.Loss`. The pointwise loss takes the score of a row and its label.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twotower.config import ObjectiveConfig
from twotower.core.kinds import Kinds
from twotower.kernels.loss_inputs import Loss


def softmax(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""Cross-entropy of the positive among itself and its negatives.

    .. math:: \ell = \log\Bigl(e^{s_+} + \sum_{c} e^{s_c}\Bigr) - s_+

    With s = (q . v) / T - log E for positive and negatives alike it is the sampled softmax with the
    classic logQ correction (Bengio and Senecal 2008; Yi et al., RecSys 2019).

    >>> softmax(jnp.zeros(1), jnp.zeros((1, 3)), where=jnp.ones((1, 3), bool))  # one among four
    Array([1.3862944], dtype=float32)
    """
    return _of_logit_margin(softmax_by_logit_margin, positive, negatives, where)


def corrected_softmax(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""The softmax whose positive is known not to have been sampled.

    .. math:: \ell = \mathrm{sg}(1 - p) \Bigl(\log \sum_{c} e^{s_c} - s_+\Bigr),
              \quad p = \frac{e^{s_+}}{e^{s_+} + \sum_c e^{s_c}}

    The positive stands in every sum, with probability 1, so only the negatives are corrected: s_c =
    (q . v_c) / T - log E_c, s_+ = (q . v_+) / T. Its gradient is the full softmax's with the
    negatives' part estimated by importance sampling (Khrylchenko et al., RecSys 2025, arXiv
    2507.09331). There negatives are drawn from Q(c) / (1 - Q(+)), a fixed number of them; here hits
    of the positive are masked and E counts the draws before masking, which estimates the same sum.
    """
    return _of_logit_margin(corrected_softmax_by_logit_margin, positive, negatives, where)


def bsl(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""Bilateral softmax loss: the positive outside the sum, with a temperature of its own.

    .. math:: \ell = \log \sum_c e^{s_c} - s_+, \quad s_c = \frac{q \cdot v_c}{T} - \log E_c, \quad
    s_+ = \frac{q \cdot v_+}{T_+}

    Wu et al., ICDE 2024, arXiv 2312.12882. With one positive a row the aggregation over positives
    falls away and the two temperatures remain, as in the authors' code, where the sum is raised to
    the power T_+ / T (1.06 to 1.32 in their experiments); this is that loss divided by the power.
    """
    return _of_logit_margin(bsl_by_logit_margin, positive, negatives, where)


def softmax_by_logit_margin(margin: Float[Array, "B"]) -> Float[Array, "B"]:
    """The softmax as a function of log sum exp(negatives) - positive."""
    # log(e^s + sum) - s = log(1 + e^margin), without an overflow for any margin.
    return jax.nn.softplus(margin)


def corrected_softmax_by_logit_margin(margin: Float[Array, "B"]) -> Float[Array, "B"]:
    """The corrected softmax as a function of log sum exp(negatives) - positive."""
    # sigmoid(margin) is 1 - p.
    return jax.lax.stop_gradient(jax.nn.sigmoid(margin)) * margin


def bsl_by_logit_margin(margin: Float[Array, "B"]) -> Float[Array, "B"]:
    """The bilateral softmax loss as a function of log sum exp(negatives) - positive: the
    identity."""
    return margin


def gbce(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    calibration: float,
    num_items: int,
) -> Float[Array, "B"]:
    r"""Generalised binary cross-entropy, which counters the overconfidence that sampling negatives
    brings.

    .. math:: \ell = -\frac{1}{n + 1} \Bigl(\beta \log \sigma(s_+) + \sum_c \log(1 -
    \sigma(s_c))\Bigr),
              \quad \beta = 1 - t (1 - \alpha), \quad \alpha = \min\Bigl(1, \frac{n}{N - 1}\Bigr)

    with n allowed negatives. Petrov and Macdonald, RecSys 2023, arXiv 2308.07192 (there beta =
    alpha (t (1 - 1/alpha) + 1/alpha), which is the same).

    Args:
        calibration: t, from 0 (binary cross-entropy) to 1 (probabilities as if nothing were
            sampled).
        num_items: N, items in the corpus.
    """
    count = where.sum(axis=1).astype(positive.dtype)
    # N - 1 items can be a negative; a corpus of one item has none.
    beta = 1.0 - calibration * (1.0 - jnp.minimum(count / max(num_items - 1, 1), 1.0))
    total = beta * jax.nn.softplus(-positive) + _sum(jax.nn.softplus(negatives), where)
    return jnp.where(count > 0, total / (count + 1.0), 0.0)


def sigmoid(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""Sigmoid loss, in which every pair is a binary question of its own.

    .. math:: \ell = -\log \sigma(s_+) - \sum_c \log \sigma(-s_c), \quad s = \frac{q \cdot v}{T} + b

    Zhai et al., ICCV 2023, arXiv 2303.15343 (SigLIP), where T starts at 1/10 and the learnable bias
    b at -10, so that the many negatives do not dominate the first steps.
    """
    # softplus(-s) = -log sigmoid(s), without the log of a number near 0.
    losses = jax.nn.softplus(-positive) + _sum(jax.nn.softplus(negatives), where)
    return jnp.where(where.any(axis=1), losses, 0.0)


def bpr(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""Bayesian personalised ranking, the mean over negatives of -log sigma(s_+ - s_c).

    Rendle et al., UAI 2009, arXiv 1205.2618.
    """
    return _mean(jax.nn.softplus(negatives - positive[:, None]), where)


def hinge(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    margin: float,
) -> Float[Array, "B"]:
    """Margin ranking, the mean over negatives of max(0, margin - (s_+ - s_c)).

    Weston et al., ECML 2010, without its ranks.

    >>> both = jnp.ones((1, 2), bool)
    >>> hinge(jnp.array([1.0]), jnp.array([[0.75, 0.0]]), where=both, margin=0.5)  # 0.25 and 0
    Array([0.125], dtype=float32)
    """
    return _mean(jax.nn.relu(margin - positive[:, None] + negatives), where)


def triplet(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    margin: float,
) -> Float[Array, "B"]:
    """Triplet loss on the hardest negative of the batch, max(0, margin - s_+ + max_c s_c).

    Hermans et al. 2017, arXiv 1703.07737, on similarities. Between unit vectors the squared
    distance is 2 - 2 s: half the margin of squared distances gives half of their loss.
    """
    has_negatives = where.any(axis=1)
    allowed = jnp.where(where, negatives, -jnp.inf)
    hardest = jnp.max(allowed, axis=1, initial=-jnp.inf)
    # Masked before the loss and after it: without negatives the gradient must not be NaN.
    hardest = jnp.where(has_negatives, hardest, 0.0)
    losses = jax.nn.relu(margin - positive + hardest)
    return jnp.where(has_negatives, losses, 0.0)


def cosine_contrastive(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    margin: float,
    negative_weight: float,
) -> Float[Array, "B"]:
    r"""Cosine contrastive loss of SimpleX.

    .. math:: \ell = (1 - s_+) + \frac{w}{n} \sum_c \max(0, s_c - m)

    with s the cosine and n allowed negatives. Mao et al., CIKM 2021, arXiv 2109.12613.

    Args:
        margin: m, the similarity below which a negative is left alone.
        negative_weight: W.
    """
    # The term of the positive alone would move a query without negatives.
    losses = 1.0 - positive + negative_weight * _mean(jax.nn.relu(negatives - margin), where)
    return jnp.where(where.any(axis=1), losses, 0.0)


def binary_cross_entropy(
    scores: Float[Array, "B"],
    labels: Float[Array, "B"],
    *,
    pos_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B"]:
    r"""Cross-entropy of labels in [0, 1] with the probabilities sigma(s).

    .. math:: \ell = -w_+ \, y \log \sigma(s) - (1 - y) \log(1 - \sigma(s))

    Args:
        scores: Logits s.
        labels: Y.
        pos_weight: w_+, how many times a row with label 1 counts.

    >>> binary_cross_entropy(jnp.zeros(2), jnp.array([1.0, 0.0]), pos_weight=2.0)
    Array([1.3862944, 0.6931472], dtype=float32)
    """
    return pos_weight * labels * jax.nn.softplus(-scores) + (1.0 - labels) * jax.nn.softplus(scores)


def _of_logit_margin(
    by_logit_margin: Callable[[jax.Array], jax.Array],
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    where: Bool[Array, "B C"],
) -> Float[Array, "B"]:
    """Returns a loss of the logit margin; 0 for a query without negatives."""
    has_negatives = where.any(axis=1)
    # A query without negatives sums zeros, and is masked afterwards: its gradient must not be NaN,
    # nor that of a masked entry, whatever its value.
    logits = jnp.where(where, negatives, 0.0)
    summed = where | ~has_negatives[:, None]
    log_sum = jax.nn.logsumexp(logits, axis=1, where=summed)
    return jnp.where(has_negatives, by_logit_margin(log_sum - positive), 0.0)


def _sum(values: Float[Array, "B C"], where: Bool[Array, "B C"]) -> Float[Array, "B"]:
    return jnp.sum(values, axis=1, where=where)


def _mean(values: Float[Array, "B C"], where: Bool[Array, "B C"]) -> Float[Array, "B"]:
    # Of the allowed negatives alone, so that masking equals leaving out.
    count = where.sum(axis=1).astype(values.dtype)
    return _sum(values, where) / jnp.maximum(count, 1.0)


# Losses of a positive and its negatives. Those of the softmax kind estimate a sum over all items,
# for which log expected counts are subtracted.
LOSSES: Kinds[Loss] = Kinds(
    "loss",
    {
        "softmax": Loss(softmax, softmax_by_logit_margin, corrects=True, corrects_positive=True),
        "corrected_softmax": Loss(
            corrected_softmax, corrected_softmax_by_logit_margin, corrects=True
        ),
        "bsl": Loss(bsl, bsl_by_logit_margin, corrects=True, bilateral=True),
        "gbce": Loss(gbce, constants=("calibration", "num_items")),
        "sigmoid": Loss(sigmoid, biased=True),
        "bpr": Loss(bpr),
        "hinge": Loss(hinge, scaled=False, constants=("margin",)),
        "triplet": Loss(triplet, scaled=False, constants=("margin",)),
        "cosine_contrastive": Loss(
            cosine_contrastive, scaled=False, constants=("margin", "negative_weight")
        ),
    },
    synonyms={
        # The names of papers and of other libraries.
        "infonce": "softmax",
        "nt_xent": "softmax",
        "sampled_softmax": "softmax",
        "in_batch": "softmax",
        "in_batch_softmax": "softmax",
        "cross_entropy": "softmax",
        "categorical_cross_entropy": "softmax",
        "multiple_negatives_ranking": "softmax",
        "logq": "softmax",
        "bilateral": "bsl",
        "bce": "binary_cross_entropy",
        "log_loss": "binary_cross_entropy",
        "logistic": "binary_cross_entropy",
        "siglip": "sigmoid",
        "gsasrec": "gbce",
        "warp": "hinge",
        "margin": "hinge",
        "max_margin": "hinge",
        "pairwise": "bpr",
        "ranking": "bpr",
        "ccl": "cosine_contrastive",
        "contrastive": "cosine_contrastive",
        "simplex": "cosine_contrastive",
    },
)
# (scores [B], labels [B], *, pos_weight) -> [B].
PointwiseLoss = Callable[..., jax.Array]
# Name of the loss of a score and its label, `binary_cross_entropy`.
POINTWISE_LOSS = "binary_cross_entropy"


def loss_options(objective: ObjectiveConfig) -> Any:
    """Returns the options of a loss of one's own, as it was registered; None of other losses.

    Raises:
        ConfigError: An option is unknown, missing, of a wrong type or out of range.
    """
    return LOSSES.build_options(objective.loss, objective.options, "config.objective.options")


def bind_constants(loss: Loss, objective: ObjectiveConfig, num_items: int) -> Loss:
    """Returns the loss with its constants bound as arguments of `per_query`.

    Args:
        loss: One of `LOSSES`.
        objective: Options, of which `loss.constants` names some.
        num_items: N, number of items (or users) that a candidate may be.
    """
    # The one constant that is no option: it depends on the data.
    values = {**vars(objective), "num_items": num_items}
    # The dataclass that a loss of one's own was registered with, in the place of the mapping.
    values["options"] = loss_options(objective)
    constants = {name: values[name] for name in loss.constants}
    return loss._replace(per_query=functools.partial(loss.per_query, **constants))
