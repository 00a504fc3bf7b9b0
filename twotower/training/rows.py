"""Table rows of a step: looked up for both towers at once, their gradients merged and applied where
the rows live."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from twotower.core.mesh import DeviceGroup, lookup_rows
from twotower.towers.two_tower import SIDES, TwoTower

# (side, feature) pairs that read one table, in a fixed order.
Uses = dict[str, list[tuple[str, str]]]


def table_uses(model: TwoTower) -> Uses:
    """Table name -> the features that read it, of either tower."""
    uses: Uses = {}
    for side in SIDES:
        for name, i in model.inputs[side].items():
            if i.table:
                uses.setdefault(i.table, []).append((side, name))
    return uses


def shared_ids(
    model: TwoTower, features: Mapping[str, Any], group: DeviceGroup
) -> dict[str, jax.Array]:
    """Table name -> the ids that all devices ask of it, device after device, as `lookup_all` and
    the update need them."""
    return {
        table: group.all_gather(
            jnp.concatenate([features[side][name].ravel() for side, name in uses])
        )
        for table, uses in table_uses(model).items()
    }


def lookup_all(
    model: TwoTower,
    tables: Mapping[str, jax.Array],
    features: Mapping[str, Any],
    asked: Mapping[str, jax.Array],
    group: DeviceGroup,
) -> dict[str, dict[str, jax.Array]]:
    """{"user": {feature: [..., E]}, "item": ...}: the rows of every feature that reads a table, one
    lookup a table.

    Args:
        asked: `shared_ids` of the same features.
    """
    rows: dict[str, dict[str, jax.Array]] = {side: {} for side in SIDES}
    for table, uses in table_uses(model).items():
        ids = [features[side][name] for side, name in uses]
        flat = jnp.concatenate([x.ravel() for x in ids])
        found = lookup_rows(tables[table], flat, asked[table], group)
        ends = list(itertools.accumulate(x.size for x in ids))
        for (side, name), x, part in zip(uses, ids, jnp.split(found, ends[:-1])):
            rows[side][name] = part.reshape(*x.shape, found.shape[-1])
    return rows


def shared_gradients(
    model: TwoTower, row_grads: Mapping[str, Any], group: DeviceGroup
) -> dict[str, jax.Array]:
    """Table name -> the gradient of each of its `shared_ids`."""

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    return {
        table: group.all_gather(
            jnp.concatenate([flat(row_grads[side][name]) for side, name in uses])
        )
        for table, uses in table_uses(model).items()
    }
