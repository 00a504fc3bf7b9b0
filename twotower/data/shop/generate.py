"""A generated shop whose true preferences are known.

Every shopper has a mixture theta over T tastes, every taste a distribution phi over the items, and
the next item that a shopper looks at is drawn from

    p(item | user) = sum_t theta[user, t] * phi[t, item],

renormalised over the items that exist at that moment. Preference is therefore exactly a dot
product, `TruePreferences.user_factors` with `TruePreferences.item_factors`, which no model can beat
on average: the ceiling that the quick start reports.

Some rows hold the label `liked` (1 or 0, else missing), all rows the label `shared`. Both are drawn
with the probabilities of `label_probabilities`, which are higher if the item suits the shopper
better than it suits others.

A taste prefers some categories, brands and materials and a price level, so the columns of the items
tell about items never sold; beyond that it prefers single items, and popular ones (Zipf). Shoppers
of one gender and age group have similar mixtures.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.files import atomic
from twotower.data.dataset import Dataset, TruePreferences
from twotower.data.shop.items import draw_items, draw_tastes, item_table
from twotower.data.shop.log import BLOCK, EVENTS, Log, draw_log
from twotower.data.shop.shoppers import draw_shoppers, shopper_table


@dataclasses.dataclass(frozen=True)
class Label:
    """The parameters of a label, see `label_probabilities`.

    Attributes:
        slope: Slope of its logit.
        offset: Offset of its logit.
        known_share: Share of the rows in which it is not missing.
    """

    slope: float
    offset: float
    known_share: float


# One label with missing values, as ratings have, and one that every row has.
LABELS = {
    "liked": Label(slope=2.0, offset=-5.4, known_share=0.6),
    "shared": Label(slope=1.0, offset=-5.0, known_share=1.0),
}


def generate(num_interactions: int = 100_000, *, seed: int = 0, num_items: int = 0) -> Dataset:
    """Generates a log in order of time, its shoppers, its items and the truth.

    Equal arguments give equal bytes on the same versions of NumPy and Arrow. There is about one
    shopper for 25 rows.

    Args:
        num_interactions: Number of rows of the log.
        seed: Random seed of all draws.
        num_items: Number of items of the shop; 0 lets it grow more slowly than the log (2,500 at
            100,000 rows, 100,000 at ten million).
    """
    num_shoppers = count_shoppers(num_interactions)
    num_items = num_items or count_items(num_interactions)
    # One stream of random numbers a part: another number of items draws the same shoppers.
    streams = [np.random.default_rng([seed, num_interactions, part]) for part in range(5)]
    # Streams belong to their parts by number: 0 items, 1 tastes, 2 shoppers, 3 log, 4 labels.
    items = draw_items(streams[0], num_items)
    tastes = draw_tastes(streams[1], items)
    shoppers = draw_shoppers(streams[2], num_shoppers)
    log = draw_log(
        streams[3],
        num_interactions,
        mixture=shoppers.mixture,
        tastes=tastes,
        joined=shoppers.joined,
        created=items.created,
        activity=shoppers.activity,
    )
    truth = TruePreferences(
        # Rows of items must be contiguous: both are written and multiplied row by row.
        user_factors=shoppers.mixture,
        item_factors=np.ascontiguousarray(tastes.T),
    )
    labels = _draw_labels(streams[4], truth, log)
    users_table = shopper_table(shoppers)
    items_table = item_table(items)
    return Dataset(
        interactions=_log_table(log, users_table["user_id"], items_table["item_id"], labels),
        users=users_table,
        items=items_table,
        has_catalogue=True,
        truth=truth,
    )


def label_probabilities(
    truth: TruePreferences, user: np.ndarray, item: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the true probability of each label, float32 [N] each:

    sigma(slope log(p(item | user) / mean over users of p(item | user)) + offset)

    No head can have a lower log loss on average than these.

    Args:
        truth: Preferences behind the log.
        user: int [N], row of the users table of each row of the log.
        item: int [N], row of the items table.
    """
    # Mean over the users first: linear, so it costs one user instead of all.
    mean_preference = truth.item_factors @ truth.user_factors.mean(axis=0)
    log_lift = np.empty(len(user), np.float32)
    # In blocks: the factors of ten million rows would take gigabytes.
    for start in range(0, len(user), BLOCK):
        block = slice(start, start + BLOCK)
        users = truth.user_factors[user[block]]
        items = truth.item_factors[item[block]]
        preference = np.einsum("nt,nt->n", users, items)
        # Lift over the mean shopper: without it popular items would simply be liked more.
        log_lift[block] = np.log(preference / mean_preference[item[block]])
    probabilities = {}
    for name, label in LABELS.items():
        probabilities[name] = 1 / (1 + np.exp(-label.slope * log_lift - label.offset))
    return probabilities


def write(dataset: Dataset, folder: str | os.PathLike) -> None:
    """Writes interactions, users and items as Parquet and the truth as .npy.

    The same dataset gives the same bytes.
    """
    folder = Path(folder)
    for name in ("interactions", "users", "items"):
        with atomic(folder / f"{name}.parquet") as path:
            pq.write_table(getattr(dataset, name), path, compression="zstd")
    if dataset.truth is None:
        return
    for name in ("user_factors", "item_factors"):
        with atomic(folder / f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, getattr(dataset.truth, name), allow_pickle=False)


def count_shoppers(num_interactions: int) -> int:
    """Returns the number of shoppers that suits the size of a log."""
    # At least 20, so that a small shop has users to split.
    return max(20, num_interactions // 25)


def count_items(num_interactions: int) -> int:
    """Returns the number of items that suits the size of a log."""
    # The exponent .8 takes the catalogue from 2,500 to 100,000 when the log grows a hundredfold.
    return max(50, round(2500 * (num_interactions / 100_000) ** 0.8))


def _draw_labels(rng: np.random.Generator, truth: TruePreferences, log: Log) -> dict[str, pa.Array]:
    labels = {}
    for name, probability in label_probabilities(truth, log.user, log.item).items():
        is_positive = rng.random(len(log.user)) < probability
        # Drawn for all rows even if all are known: the stream of random numbers stays the same.
        is_unknown = rng.random(len(log.user)) >= LABELS[name].known_share
        labels[name] = pa.array(is_positive.astype(np.int64), mask=is_unknown)
    return labels


def _log_table(
    log: Log, user_ids: pa.ChunkedArray, item_ids: pa.ChunkedArray, labels: dict[str, pa.Array]
) -> pa.Table:
    return pa.table(
        {
            # By code rather than by text, without a Python object for each row.
            "user_id": user_ids.combine_chunks().take(pa.array(log.user)),
            "item_id": item_ids.combine_chunks().take(pa.array(log.item)),
            "timestamp": log.time,
            "event": pa.array(EVENTS).take(pa.array(log.event)),
            **labels,
        }
    )
