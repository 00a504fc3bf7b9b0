"""Tables to draw from any distribution over N ids in constant time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twotower.core.errors import ConfigError

# Number of values of a coin of 32 random bits.
COINS = 2**32


class AliasTable(NamedTuple):
    """N cells of equal width, each divided between two ids (Walker 1977): a draw is a fair cell,
    then one biased coin.

    The coin is 32 random bits against an integer, so the rarest of 10^8 ids is still drawn as often
    as `log_probability` says; the inverse of a cumulative distribution in float32 is too coarse.

    Attributes:
        threshold: Number of the 2^32 coins for which cell i yields i itself, uint32 [N].
        alias: Id that cell i yields otherwise, int32 [N].
        log_probability: Log of the probability of each id, summed over the cells, float32 [N];
            -inf for an id that is never drawn.
    """

    threshold: np.ndarray | jax.Array
    alias: np.ndarray | jax.Array
    log_probability: np.ndarray | jax.Array

    def draw(self, key: jax.Array, num: int) -> Int[Array, "S"]:
        """Draws `num` ids, with replacement."""
        # Keys of their own: cell and coin must be independent.
        cell_key, coin_key = jax.random.split(key)
        cell = jax.random.randint(cell_key, (num,), 0, len(self.alias))
        coin = jax.random.bits(coin_key, (num,), jnp.uint32)
        # `asarray`, because a table is of NumPy until it is put on the devices.
        own = coin < jnp.asarray(self.threshold)[cell]
        return jnp.where(own, cell, jnp.asarray(self.alias)[cell]).astype(jnp.int32)

    def log_expected_count(self, ids: Int[Array, "*S"], num: int) -> Float[Array, "*S"]:
        """Returns the log of the expected number of times that each id is among `num` draws."""
        # Of the table as it draws, rounded thresholds included, not of the weights that it was made
        # from.
        return jnp.asarray(self.log_probability)[ids] + jnp.log(float(num))


def popularity_table(counts: np.ndarray, alpha: float) -> AliasTable:
    """Makes a table that draws ids in proportion to their training rows to the power `alpha`.

    Args:
        counts: Training rows of each id, in any order.
        alpha: 1 draws as rows do, 0 draws all ids that have rows alike; an id without rows is never
            drawn.

    Raises:
        ConfigError: A count is negative or not finite, all are zero, or `alpha` is negative.
    """
    if not (np.isfinite(alpha) and alpha >= 0):
        raise ConfigError(
            f"config.objective.negatives.alpha={alpha} must be at least 0: 0 draws all items "
            "alike, 1 as training rows do."
        )
    # In float64, on the host: counts span many orders of magnitude.
    counts = np.asarray(counts, np.float64)
    _check(counts, "training rows of item")
    # 0 to the power 0 is 1: without the mask `alpha` = 0 would draw items that have no row.
    powers = np.power(np.maximum(counts, 1e-300), alpha)
    return alias_table(np.where(counts > 0, powers, 0.0))


def alias_table(weights: np.ndarray) -> AliasTable:
    """Makes a table that draws ids in proportion to `weights`, float [N].

    Raises:
        ConfigError: A weight is negative or not finite, or all are zero.
    """
    weights = np.asarray(weights, np.float64)
    _check(weights, "weight of id")
    # Scaled to a mean of 1, the width of a cell.
    share, alias = _divide(weights * (len(weights) / weights.sum()))
    # An id of positive weight keeps at least one chance in 2^32 of its cell; where that rounds, the
    # probabilities below say so.
    threshold = np.clip(np.rint(share * COINS), weights > 0, COINS - 1)
    # A full cell keeps its last coin too, which a threshold of 32 bits cannot say.
    alias = np.where(share >= 1, np.arange(len(weights)), alias)
    coins = threshold + np.bincount(alias, COINS - threshold, len(weights))
    probability = coins / (COINS * len(weights))
    with np.errstate(divide="ignore"):
        log_probability = np.log(probability)
    return AliasTable(
        threshold.astype(np.uint32), alias.astype(np.int32), log_probability.astype(np.float32)
    )


def _divide(mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divides cells between ids whose masses average 1: Vose's (1991) queue as cumulative sums.

    Light cells are filled up by the heavy ones in turn; a heavy one that has lost more than its
    excess is itself filled up by the next. With deficits D and excesses E summed along these two
    lines, the heavy cell that fills light cell i is the first with E > D[i - 1], and it is spent at
    the first i with D[i] >= E, when it lacks D[i] - E.

    Returns:
        The share of each cell that its own id has, and the id that has the rest.
    """
    light = np.flatnonzero(mass < 1)
    heavy = np.flatnonzero(mass >= 1)
    share = np.minimum(mass, 1.0)
    alias = np.arange(len(mass))
    # All masses are 1, up to rounding.
    if not len(light):
        return np.ones(len(mass)), alias
    if not len(heavy):
        return share, alias
    # Sums instead of a queue: NumPy divides 10^8 cells without a loop in Python.
    deficit = np.cumsum(1 - mass[light])
    excess = np.cumsum(mass[heavy] - 1)
    filler = np.searchsorted(excess, np.append(0.0, deficit[:-1]), side="right")
    # Rounding may leave the last light cell a little short; the last heavy one fills it.
    alias[light] = heavy[np.minimum(filler, len(heavy) - 1)]
    spent = np.searchsorted(deficit, excess, side="left")
    # The last heavy cell has none after it, and lacks nothing but rounding.
    lacking = np.append(spent[:-1] < len(light), False)
    spent = np.minimum(spent, len(light) - 1)
    share[heavy[lacking]] = np.clip(1 + (excess - deficit[spent])[lacking], 0.0, 1.0)
    alias[heavy[lacking]] = heavy[np.flatnonzero(lacking) + 1]
    return share, alias


def _check(weights: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise ConfigError(
            f"The {name} {bad[0]} is {weights[bad[0]]}: it must be finite and at least 0."
        )
    if not weights.any():
        raise ConfigError(
            f"The {name} 0, and of all {len(weights)}, is 0: nothing can be drawn. One at least "
            "must be above 0."
        )
