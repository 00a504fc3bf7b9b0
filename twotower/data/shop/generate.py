"""A generated shop whose true preferences are known.

Every shopper has a mixture theta over T tastes, every taste a distribution phi over the items, and
what a shopper looks at next is drawn from

    p(item | user) = sum_t theta[user, t] * phi[t, item],

renormalised over the items that exist at that moment. Preference is therefore exactly a dot
product, `TruePreferences.user_factors` with `TruePreferences.item_factors`, which no model can beat on average: the
ceiling the quick start reports.

Of some rows it is known whether the shopper `liked` the item (1 or 0, else missing), of all whether
he `shared` it: drawn with probabilities that `label_probabilities` tells, higher where the item
suits him more than others.

A taste likes some categories, brands and materials and a price level, so the columns of the items
tell about items never sold; it likes items of its own beyond that, and popular ones (Zipf) more.
Who shares gender and age shares likings.
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
from twotower.data.shop import words
from twotower.data.shop.log import DAYS, EVENTS, START, Log, draw_log

TASTES = 32
DAY = 86_400
PERIOD = DAYS * DAY
# Shares of shoppers who join and of items that appear within the period.
LATE_USERS, LATE_ITEMS = 0.12, 0.12
# What a taste's log-preference is made of. Popularity is kept mild and tastes sharp: with these, at
# 100,000 rows, ranking by the truth finds ten times what popularity finds, and a truncated SVD
# three quarters of that.
SHELF, CATEGORY_SPREAD, BRAND_SPREAD, MATERIAL_SPREAD = 6.0, 0.5, 0.8, 0.5
PRICE_LEVEL_WIDTH = 0.45
ITEM_NOISE = 0.8
ZIPF = 0.5
# Sum of the Dirichlet's parameters (below 1 most shoppers have one or two tastes), and how far
# segments differ.
CONCENTRATION, SEGMENT_SPREAD = 0.6, 0.6
# Label -> slope and offset of its logit, see `label_probabilities`, and the share of rows where it
# is known.
LABELS = {"liked": (2.0, -5.4, 0.6), "shared": (1.0, -5.0, 1.0)}
_CHUNK = 500_000


def generate(num_interactions: int = 100_000, *, seed: int = 0, num_items: int = 0) -> Dataset:
    """The shop's log with exactly `num_interactions` rows in order of time, its shoppers, its items
    and the truth.

    One shopper per 25 rows or so, and a number of items that grows more slowly (2,500 at 100,000
    rows, 100,000 at ten million) unless `num_items` is given. The same numbers give the same bytes
    on the same versions of NumPy and Arrow.
    """
    users, items = _sizes(num_interactions, num_items)
    rng = [np.random.default_rng([seed, num_interactions, part]) for part in range(4)]
    catalogue = _items(rng[0], items)
    phi = _phi(rng[1], catalogue)
    shoppers = _users(rng[2], users)
    log = draw_log(
        rng[3],
        num_interactions,
        theta=shoppers.theta,
        phi=phi,
        joined=shoppers.joined,
        created=catalogue.created,
        activity=shoppers.activity,
    )
    user_table, item_table = _user_table(shoppers), _item_table(catalogue)
    truth = TruePreferences(user_factors=shoppers.theta, item_factors=np.ascontiguousarray(phi.T))
    labels = _labels(np.random.default_rng([seed, num_interactions, len(rng)]), truth, log)
    return Dataset(
        interactions=_log_table(log, user_table["user_id"], item_table["item_id"], labels),
        users=user_table,
        items=item_table,
        has_catalogue=True,
        truth=truth,
    )


def label_probabilities(
    truth: TruePreferences, user: np.ndarray, item: np.ndarray
) -> dict[str, np.ndarray]:
    """Label -> the true probability of 1, float32 [N], for rows (user, item) of the tables:

    sigma(slope log(p(item | user) / mean over users of p(item | user)) + offset)

    No head can have a lower log loss on average than these.
    """
    usual = truth.item_factors @ truth.user_factors.mean(axis=0)
    lift = np.empty(len(user), np.float32)
    for start in range(0, len(user), _CHUNK):
        part = slice(start, start + _CHUNK)
        own = np.einsum("nt,nt->n", truth.user_factors[user[part]], truth.item_factors[item[part]])
        lift[part] = np.log(own / usual[item[part]])
    return {
        name: 1 / (1 + np.exp(-slope * lift - offset))
        for name, (slope, offset, _) in LABELS.items()
    }


def write(dataset: Dataset, folder: str | os.PathLike) -> None:
    """Writes interactions, users and items as Parquet and the truth as .npy; the same dataset gives
    the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("interactions", "users", "items"):
        with atomic(folder / f"{name}.parquet") as temporary:
            pq.write_table(getattr(dataset, name), temporary, compression="zstd")
    for name in ("user_factors", "item_factors") if dataset.truth else ():
        with atomic(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, getattr(dataset.truth, name), allow_pickle=False)


def _sizes(num_interactions: int, num_items: int = 0) -> tuple[int, int]:
    return max(20, num_interactions // 25), num_items or max(
        50, round(2500 * (num_interactions / 100_000) ** 0.8)
    )


@dataclasses.dataclass(frozen=True)
class _Items:
    """Columns of the items: int or float [I] each. `level` is the price level within the category,
    0 to 1."""

    category: np.ndarray
    noun: np.ndarray
    material: np.ndarray
    brand: np.ndarray
    style: np.ndarray
    model: np.ndarray
    level: np.ndarray
    price: np.ndarray
    created: np.ndarray
    log_popularity: np.ndarray


def _items(rng: np.random.Generator, count: int) -> _Items:
    shelves = np.array([1.0 / (rank + 8) for rank in range(len(words.CATEGORIES))])
    category = rng.choice(len(shelves), count, p=rng.permutation(shelves / shelves.sum()))
    nouns = np.array([len(c.nouns) for c in words.CATEGORIES])[category]
    materials = np.array([len(c.materials) for c in words.CATEGORIES])[category]
    # A brand lives in a few categories: each category has its own order of brands.
    orders = np.stack([rng.permutation(len(words.BRANDS)) for _ in words.CATEGORIES])
    brand = orders[category, np.minimum(rng.geometric(0.2, count) - 1, len(words.BRANDS) - 1)]
    material = rng.integers(materials)
    level = np.clip(rng.beta(2, 2, count) + 0.25 * (0.5 - material / materials), 0, 1)
    base = np.array([c.price for c in words.CATEGORIES])[category]
    popularity_rank = rng.permutation(count) + 1
    return _Items(
        category=category,
        noun=rng.integers(nouns),
        material=material,
        brand=brand,
        style=rng.integers(len(words.STYLES), size=count),
        model=rng.integers(1, 100, count),
        level=level,
        price=np.round(base * 8**level, 2),
        created=_arrivals(rng, count, LATE_ITEMS),
        log_popularity=-np.log(popularity_rank),
    )


def _arrivals(rng: np.random.Generator, count: int, late: float) -> np.ndarray:
    """int64 [count] seconds: within the period for a share `late`, in the two years before it for
    the others."""
    before = START - rng.integers(1, 2 * 365 * DAY, count)
    within = START + rng.integers(1, int(0.97 * PERIOD), count)
    return np.where(rng.random(count) < late, within, before)


def _phi(rng: np.random.Generator, items: _Items) -> np.ndarray:
    """float32 [T, I]: what each taste looks at; rows sum to 1."""
    categories = len(words.CATEGORIES)
    by_category = rng.normal(0, CATEGORY_SPREAD, (TASTES, categories))
    # Each taste has two shelves of its own, spread so that every category is somebody's.
    for offset in (0, 1):
        by_category[
            np.arange(TASTES), (rng.permutation(TASTES) + offset * TASTES) % categories
        ] += SHELF
    by_brand = rng.normal(0, BRAND_SPREAD, (TASTES, len(words.BRANDS)))
    by_material = rng.normal(
        0, MATERIAL_SPREAD, (TASTES, categories, max(len(c.materials) for c in words.CATEGORIES))
    )
    liked_level = rng.uniform(0, 1, (TASTES, 1))
    logits = (
        by_category[:, items.category]
        + by_brand[:, items.brand]
        + by_material[:, items.category, items.material]
    )
    logits -= ((items.level - liked_level) / PRICE_LEVEL_WIDTH) ** 2 / 2
    logits += ITEM_NOISE * rng.normal(size=logits.shape) + ZIPF * items.log_popularity
    phi = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (phi / phi.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Users:
    """Columns of the shoppers [U] each, and theta float32 [U, T] whose rows sum to 1."""

    city: np.ndarray
    age: np.ndarray
    gender: np.ndarray
    joined: np.ndarray
    activity: np.ndarray
    theta: np.ndarray


def _users(rng: np.random.Generator, count: int) -> _Users:
    age = rng.choice(len(words.AGE_GROUPS), count, p=[0.22, 0.32, 0.22, 0.13, 0.07, 0.04])
    gender = rng.integers(len(words.GENDERS), size=count)
    cities = 1.0 / np.arange(2, len(words.CITIES) + 2)
    segments = np.exp(
        rng.normal(0, SEGMENT_SPREAD, (len(words.GENDERS), len(words.AGE_GROUPS), TASTES))
    )
    segments /= segments.sum(axis=2, keepdims=True)
    theta = np.empty((count, TASTES), np.float32)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        draws = rng.standard_gamma(CONCENTRATION * segments[gender[part], age[part]]) + 1e-30
        theta[part] = draws / draws.sum(axis=1, keepdims=True)
    return _Users(
        city=rng.choice(len(cities), count, p=cities / cities.sum()),
        age=age,
        gender=gender,
        joined=_arrivals(rng, count, LATE_USERS),
        activity=np.exp(rng.normal(0, 0.5, count)),
        theta=theta,
    )


def _ids(count: int, prefix: str) -> pa.Array:
    return pa.array([f"{prefix}{n}" for n in range(1, count + 1)])


def _pick(values: list[str] | tuple[str, ...], rows: np.ndarray) -> pa.Array:
    return pa.array(values, pa.string()).take(pa.array(rows))


def _user_table(users: _Users) -> pa.Table:
    city, country = zip(*words.CITIES)
    return pa.table(
        {
            "user_id": _ids(len(users.city), ""),
            "city": _pick(city, users.city),
            "country": _pick(country, users.city),
            "age_group": _pick(words.AGE_GROUPS, users.age),
            "gender": _pick(words.GENDERS, users.gender),
            "joined": users.joined,
        }
    )


def _item_table(items: _Items) -> pa.Table:
    titles, arabic, materials = [], [], []
    for category, noun, material, brand, style, model in zip(
        items.category,
        items.noun,
        items.material,
        items.brand,
        items.style,
        items.model,
        strict=True,
    ):
        shelf = words.CATEGORIES[category]
        (noun_en, noun_ar), (material_en, material_ar) = (
            shelf.nouns[noun],
            shelf.materials[material],
        )
        (brand_en, brand_ar), (style_en, style_ar) = words.BRANDS[brand], words.STYLES[style]
        titles.append(f"{brand_en} {material_en} {noun_en}, {style_en} edition, no. {model}")
        arabic.append(f"{noun_ar} {material_ar} {brand_ar} إصدار {style_ar} رقم {model}")
        materials.append(material_en)
    return pa.table(
        {
            "item_id": _ids(len(titles), "P"),
            "title": titles,
            "title_ar": arabic,
            "category": _pick([c.name for c in words.CATEGORIES], items.category),
            "brand": _pick([b for b, _ in words.BRANDS], items.brand),
            "material": materials,
            "price": items.price,
            "created": items.created,
        }
    )


def _labels(rng: np.random.Generator, truth: TruePreferences, log: Log) -> dict[str, pa.Array]:
    labels = {}
    for name, probability in label_probabilities(truth, log.user, log.item).items():
        drawn = rng.random(len(log.user)) < probability
        unknown = rng.random(len(log.user)) >= LABELS[name][-1]
        labels[name] = pa.array(drawn.astype(np.int64), mask=unknown)
    return labels


def _log_table(
    log: Log, user_ids: pa.ChunkedArray, item_ids: pa.ChunkedArray, labels: dict[str, pa.Array]
) -> pa.Table:
    return pa.table(
        {
            "user_id": user_ids.combine_chunks().take(pa.array(log.user)),
            "item_id": item_ids.combine_chunks().take(pa.array(log.item)),
            "timestamp": log.time,
            "event": _pick(EVENTS, log.event),
            **labels,
        }
    )
