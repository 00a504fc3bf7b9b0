"""The shoppers of the generated shop: their attributes, and their mixtures of tastes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from twotower.data.shop import words
from twotower.data.shop.items import TASTES
from twotower.data.shop.log import BLOCK, draw_arrivals

# Share of the shoppers who join within the period of the log.
LATE_SHOPPERS = 0.12
# Sum of the Dirichlet's parameters: below 1 most shoppers have one or two tastes.
CONCENTRATION = 0.6
# Spread of the log-preferences of segments, the shoppers of one gender and age group.
SEGMENT_SPREAD = 0.6
AGE_SHARES = (0.22, 0.32, 0.22, 0.13, 0.07, 0.04)


@dataclasses.dataclass(frozen=True)
class Shoppers:
    """Columns of the shoppers, [U] each.

    Attributes:
        city: Number in `words.CITIES`.
        age: Number in `words.AGE_GROUPS`.
        gender: Number in `words.GENDERS`.
        joined: Time of the first possible visit, in seconds since the epoch.
        activity: Number of sessions of the shopper relative to others.
        mixture: Share of each taste, float32 [U, T]; rows sum to 1.
    """

    city: np.ndarray
    age: np.ndarray
    gender: np.ndarray
    joined: np.ndarray
    activity: np.ndarray
    mixture: np.ndarray


def draw_shoppers(rng: np.random.Generator, count: int) -> Shoppers:
    """Draws the shoppers; those of one gender and age group have similar mixtures.

    The order of the draws must not change: a seed would give other shoppers.
    """
    num_ages = len(words.AGE_GROUPS)
    num_genders = len(words.GENDERS)
    age = rng.choice(num_ages, count, p=AGE_SHARES)
    gender = rng.integers(num_genders, size=count)
    # From 2: the largest city is to have half as many again as the second, not twice as many.
    city_sizes = 1.0 / np.arange(2, len(words.CITIES) + 2)
    segments = np.exp(rng.normal(0, SEGMENT_SPREAD, (num_genders, num_ages, TASTES)))
    segments /= segments.sum(axis=2, keepdims=True)
    mixture = np.empty((count, TASTES), np.float32)
    # In blocks: gammas are float64, and a million shoppers of 32 tastes would take 256 MB.
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        # Gammas divided by their sum are a Dirichlet; all of them may round to 0.
        draws = rng.standard_gamma(CONCENTRATION * segments[gender[block], age[block]]) + 1e-30
        mixture[block] = draws / draws.sum(axis=1, keepdims=True)
    return Shoppers(
        city=rng.choice(len(city_sizes), count, p=city_sizes / city_sizes.sum()),
        age=age,
        gender=gender,
        joined=draw_arrivals(rng, count, LATE_SHOPPERS),
        activity=np.exp(rng.normal(0, 0.5, count)),
        mixture=mixture,
    )


def shopper_table(shoppers: Shoppers) -> pa.Table:
    """Returns the shoppers as a table of users."""
    cities = pa.array(list(words.CITIES))
    countries = pa.array(list(words.CITIES.values()))
    city = pa.array(shoppers.city)
    return pa.table(
        {
            "user_id": [str(number) for number in range(1, len(shoppers.city) + 1)],
            "city": cities.take(city),
            "country": countries.take(city),
            "age_group": pa.array(words.AGE_GROUPS).take(pa.array(shoppers.age)),
            "gender": pa.array(words.GENDERS).take(pa.array(shoppers.gender)),
            "joined": shoppers.joined,
        }
    )
