"""Listwise losses: how a query's positive fares among all its negatives together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twotower.objectives.loss import log_sum_exp

# Every loss here takes what `twotower.objectives.loss.Loss.of` says.


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
    return _of_gap(softmax_gap, positive, negatives, where)


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
    return _of_gap(corrected_softmax_gap, positive, negatives, where)


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
    return _of_gap(bsl_gap, positive, negatives, where)


def softmax_gap(gap: Float[Array, "B"]) -> Float[Array, "B"]:
    return jax.nn.softplus(gap)


def corrected_softmax_gap(gap: Float[Array, "B"]) -> Float[Array, "B"]:
    return jax.lax.stop_gradient(jax.nn.sigmoid(gap)) * gap


def bsl_gap(gap: Float[Array, "B"]) -> Float[Array, "B"]:
    return gap


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
    beta = 1.0 - calibration * (1.0 - jnp.minimum(count / max(num_items - 1, 1), 1.0))
    total = beta * jax.nn.softplus(-positive) + _sum(jax.nn.softplus(negatives), where)
    return jnp.where(count > 0, total / (count + 1.0), 0.0)


def sigmoid(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""Every pair is a binary question of its own.

    .. math:: \ell = -\log \sigma(s_+) - \sum_c \log \sigma(-s_c), \quad s = \frac{q \cdot v}{T} + b

    Zhai et al., ICCV 2023, arXiv 2303.15343 (SigLIP), where T starts at 1/10 and the learnable bias
    b at -10, so that the many negatives do not dominate the first steps.
    """
    losses = jax.nn.softplus(-positive) + _sum(jax.nn.softplus(negatives), where)
    return jnp.where(where.any(axis=1), losses, 0.0)


def _of_gap(
    of_gap, positive: Float[Array, "B"], negatives: Float[Array, "B C"], where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    log_sum, some = log_sum_exp(negatives, where)
    return jnp.where(some, of_gap(log_sum - positive), 0.0)


def _sum(values: Float[Array, "B C"], where: Bool[Array, "B C"]) -> Float[Array, "B"]:
    return jnp.sum(values, axis=1, where=where)
