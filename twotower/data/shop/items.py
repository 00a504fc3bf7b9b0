"""The items of the generated shop, and the distribution of each taste over them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from twotower.data.shop import words
from twotower.data.shop.log import draw_arrivals

TASTES = 32  # T
# Share of the items that appear within the period of the log.
LATE_ITEMS = 0.12
# The parts of a taste's log-preference. Popularity is kept mild and tastes sharp: with these, at
# 100,000 rows, ranking by the truth finds ten times what popularity finds, and a truncated SVD
# three quarters of that.
CATEGORY_BONUS = 6.0  # of the two categories of each taste
CATEGORY_SPREAD = 0.5
BRAND_SPREAD = 0.8
MATERIAL_SPREAD = 0.5
PRICE_LEVEL_WIDTH = 0.45
ITEM_NOISE = 0.8
ZIPF_EXPONENT = 0.5


@dataclasses.dataclass(frozen=True)
class Items:
    """Columns of the items, int or float [I] each.

    Attributes:
        category: Number in `words.CATEGORIES`.
        noun: Number among the nouns of the category.
        material: Number among the materials of the category.
        brand: Number in `words.BRANDS`.
        style: Number in `words.STYLES`.
        model: Model number, from 1.
        level: Price level within the category, 0 to 1.
        price: Price.
        created: Seconds since the epoch at which the item appeared.
        log_popularity: Minus the log of the popularity rank, which is random.
    """

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


def draw_items(rng: np.random.Generator, count: int) -> Items:
    """Draws the items of the shop.

    The order of the draws must not change: a seed would give another shop.
    """
    num_categories = len(words.CATEGORIES)
    num_brands = len(words.BRANDS)
    # Sizes fall slowly with the rank, which is shuffled below: no category is all of the shop.
    sizes = np.array([1.0 / (rank + 8) for rank in range(num_categories)])
    category = rng.choice(num_categories, count, p=rng.permutation(sizes / sizes.sum()))
    num_nouns = np.array([len(c.nouns) for c in words.CATEGORIES])[category]
    num_materials = np.array([len(c.materials) for c in words.CATEGORIES])[category]
    # A brand lives in a few categories: each category has its own order of brands.
    brand_orders = np.stack([rng.permutation(num_brands) for _ in words.CATEGORIES])
    # The first brand of a category has a fifth of its items, and each further one a fifth less.
    brand_rank = np.minimum(rng.geometric(0.2, count) - 1, num_brands - 1)
    material = rng.integers(num_materials)
    # The first materials of a category are the dear ones.
    dearness = 0.25 * (0.5 - material / num_materials)
    level = np.clip(rng.beta(2, 2, count) + dearness, 0, 1)
    base_price = np.array([c.price for c in words.CATEGORIES])[category]
    popularity_rank = rng.permutation(count) + 1
    return Items(
        category=category,
        noun=rng.integers(num_nouns),
        material=material,
        brand=brand_orders[category, brand_rank],
        style=rng.integers(len(words.STYLES), size=count),
        model=rng.integers(1, 100, count),
        level=level,
        # The dearest item of a category costs eight times the cheapest.
        price=np.round(base_price * 8**level, 2),
        created=draw_arrivals(rng, count, LATE_ITEMS),
        log_popularity=-np.log(popularity_rank),
    )


def draw_tastes(rng: np.random.Generator, items: Items) -> np.ndarray:
    """Draws the distribution of each taste over the items, float32 [T, I]; rows sum to 1."""
    num_categories = len(words.CATEGORIES)
    num_materials = max(len(c.materials) for c in words.CATEGORIES)
    by_category = rng.normal(0, CATEGORY_SPREAD, (TASTES, num_categories))
    # Each taste has two categories of its own, spread so that every category is somebody's.
    for offset in (0, 1):
        favourite = (rng.permutation(TASTES) + offset * TASTES) % num_categories
        # The second round counts on from TASTES: it reaches the categories that the first one left
        # out.
        by_category[np.arange(TASTES), favourite] += CATEGORY_BONUS
    by_brand = rng.normal(0, BRAND_SPREAD, (TASTES, len(words.BRANDS)))
    by_material = rng.normal(0, MATERIAL_SPREAD, (TASTES, num_categories, num_materials))
    liked_level = rng.uniform(0, 1, (TASTES, 1))
    logits = (
        by_category[:, items.category]
        + by_brand[:, items.brand]
        + by_material[:, items.category, items.material]
    )
    # A bell over the price level: a taste likes one level, and those beside it less.
    logits -= ((items.level - liked_level) / PRICE_LEVEL_WIDTH) ** 2 / 2
    noise = ITEM_NOISE * rng.normal(size=logits.shape)
    logits += noise + ZIPF_EXPONENT * items.log_popularity
    # Less the maximum, so that no exponential overflows.
    tastes = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (tastes / tastes.sum(axis=1, keepdims=True)).astype(np.float32)


def item_table(items: Items) -> pa.Table:
    """Returns the items as a table, with titles in English and Arabic."""
    nouns = [list(c.nouns.items()) for c in words.CATEGORIES]
    materials = [list(c.materials.items()) for c in words.CATEGORIES]
    brands = list(words.BRANDS.items())
    styles = list(words.STYLES.items())
    titles = []
    arabic_titles = []
    material_names = []
    columns = (items.category, items.noun, items.material, items.brand, items.style, items.model)
    for category, noun, material, brand, style, model in zip(*columns, strict=True):
        noun_en, noun_ar = nouns[category][noun]
        material_en, material_ar = materials[category][material]
        brand_en, brand_ar = brands[brand]
        style_en, style_ar = styles[style]
        titles.append(f"{brand_en} {material_en} {noun_en}, {style_en} edition, no. {model}")
        arabic_titles.append(f"{noun_ar} {material_ar} {brand_ar} إصدار {style_ar} رقم {model}")
        material_names.append(material_en)
    categories = pa.array([c.name for c in words.CATEGORIES])
    brand_names = pa.array(list(words.BRANDS))
    return pa.table(
        {
            "item_id": [f"P{number}" for number in range(1, len(titles) + 1)],
            "title": titles,
            "title_ar": arabic_titles,
            "category": categories.take(pa.array(items.category)),
            "brand": brand_names.take(pa.array(items.brand)),
            "material": material_names,
            "price": items.price,
            "created": items.created,
        }
    )
