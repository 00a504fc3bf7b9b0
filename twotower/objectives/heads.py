"""Heads: the probability that a row's label is 1, from the vectors of its user and item; trained
beside retrieval or alone.

A head is a logit of the two vectors; its loss is the binary cross-entropy over the rows whose label
is known.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twotower.config import HeadConfig, TowerConfig
from twotower.objectives.losses import binary_cross_entropy
from twotower.towers.layers import MLP, l2_normalize

Heads = Mapping[str, HeadConfig]
# Name of a head -> the loss of each row [B], and whether the row has a label.
HeadLosses = dict[str, tuple[Float[Array, "B"], Bool[Array, "B"]]]

COMBINE: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "concatenate": lambda user, item: jnp.concatenate([user, item], -1),
    "multiply": lambda user, item: user * item,
}


class Head(nn.Module):
    """Dense layers over the two vectors.

    Without hidden layers "multiply" is a weighted dot product, and "concatenate" a sum of a term of
    the user and one of the item, which orders items alike for all users.
    """

    config: HeadConfig

    @nn.compact
    def __call__(self, users: Float[Array, "B D"], items: Float[Array, "B D"]) -> Float[Array, "B"]:
        # Coordinates of mean square 1, for which dense layers are initialised; those of unit
        # vectors are smaller by sqrt(D), and their products by D.
        users = math.sqrt(users.shape[-1]) * l2_normalize(users)
        items = math.sqrt(items.shape[-1]) * l2_normalize(items)
        combined = COMBINE[self.config.combine](users, items)
        layers = TowerConfig(layers=(*self.config.layers, 1))
        return MLP(layers, name="mlp")(combined)[:, 0]


def init_heads(heads: Heads, dim: int, key: jax.Array) -> dict[str, Any]:
    """Makes fresh parameters of each head over vectors [B, dim].

    The key of a head depends on its name alone: adding one leaves the others as they were.
    """
    zeros = jnp.zeros((1, dim))

    def init(name: str) -> Any:
        # Not Python's `hash`, which is salted: it differs in every process.
        head_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return Head(heads[name]).init(head_key, zeros, zeros)["params"]

    return {name: init(name) for name in heads}


def head_logits(
    heads: Heads, params: Mapping[str, Any], users: Float[Array, "B D"], items: Float[Array, "B D"]
) -> dict[str, Float[Array, "B"]]:
    """Returns the logit of each head; its sigmoid is the probability that the label is 1, where
    `pos_weight` is 1.

    Args:
        heads: Name -> options of the head.
        params: Name -> parameters of the head, see `init_heads`.
        users: Vectors of the rows' users.
        items: Vectors of the rows' items.
    """
    logits: dict[str, Any] = {}
    for name, head in heads.items():
        logits[name] = Head(head).apply({"params": params[name]}, users, items)
    return logits


def head_losses(
    heads: Heads,
    params: Mapping[str, Any],
    users: Float[Array, "B D"],
    items: Float[Array, "B D"],
    labels: Mapping[str, Float[Array, "B"]],
) -> HeadLosses:
    """Returns the loss of each row for each head, 0 for a missing label, and whether the row has a
    label.

    Args:
        heads: Name -> options of the head.
        params: Name -> parameters of the head.
        users: Vectors of the rows' users.
        items: Vectors of the rows' items.
        labels: Column -> 1, 0, or NaN where missing.
    """
    losses: HeadLosses = {}
    for name, logits in head_logits(heads, params, users, items).items():
        label = labels[heads[name].label]
        known = ~jnp.isnan(label)
        # Masked before the loss and after it: where a label is missing, the gradient must not be
        # NaN either.
        targets = jnp.where(known, label, 0.0)
        loss = binary_cross_entropy(logits, targets, pos_weight=heads[name].pos_weight)
        losses[name] = jnp.where(known, loss, 0.0), known
    return losses
