"""Four kinds of logs that default options are measured on: a shop, films, news and a sparse log.

Each function writes Parquet files to a folder and returns a `Log`. The shop, the news and the
sparse log are generated; the films are MovieLens latest-small from the folder in TWOTOWER_DATA.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from twotower.data.dataset import Dataset
from twotower.data.shop.generate import generate

HOUR = 3600  # seconds
DAY = 24 * HOUR
NEWS_START = 1_735_689_600  # 2025-01-01 00:00 UTC
NEWS_DAYS = 20
# Hours in which the reads of an article fall to 1/e of their first rate.
NEWS_LIFE = 24
NEWS_CATEGORIES = (
    "politics",
    "sport",
    "business",
    "science",
    "culture",
    "travel",
    "health",
    "local",
    "weather",
    "opinion",
)


@dataclasses.dataclass(frozen=True)
class Log:
    """The files of a log, and what a person would say of its columns.

    Attributes:
        interactions: Parquet file of the events, with user_id, item_id and timestamp.
        items: Parquet file of the items.
        users: Parquet file of the users; None where nothing but their ids is known.
        user_features: Feature lines of users, besides those of `my_log.py`.
        item_features: Feature lines of items, besides the id.
        options: Other lines that `my_log.py` names for such a log, namely what the history reads
            and those for new users and items; dotted name -> value.
    """

    interactions: Path
    items: Path
    users: Path | None = None
    user_features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    item_features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_READS = "features.user.history.reads"
# Where much of what is asked or found tomorrow is new.
_FOR_NEW_ONES = {
    "features.item.item_id.oov_rate": 0.3,
    "model.history.empty_rate": 0.3,
}
# Where most users of tomorrow are new.
_FOR_NEW_USERS = _FOR_NEW_ONES | {
    "features.user.user_id.oov_rate": 0.6,
    "features.item.item_id.oov_rate": 0.1,
    "model.user.layers": (64,),
    "model.item.layers": (64,),
    "model.item.dropout": 0.2,
    "model.history.recency": True,
    "model.normalize": True,
    "model.temperature": 0.07,
    "model.learn_temperature": True,
    "objective.negatives.uniform": -1,
    "training.steps": 800,
    "training.optimizer.learning_rate": 2e-3,
    "training.tables.learning_rate": 0.05,
}
# The line of `my_log.py` for texts.
_WORDS = {"type": "text", "characters": (), "max_length": 12, "embedding_size": 32}
_SHOP_USERS = {
    "city": {"type": "string", "embedding_size": 8},
    "gender": {"type": "string", "embedding_size": 8},
}
_SHOP_ITEMS = {
    "title": _WORDS,
    "category": {"type": "string", "embedding_size": 16},
    "brand": {"type": "string", "embedding_size": 16},
    "price": {"type": "float"},
}


def shop_log(folder: Path, rows: int) -> Log:
    """Writes the generated shop: 25 rows a user, a catalogue with few new items."""
    dataset = generate(rows)
    return _write_shop(folder, dataset, dataset.interactions)


def sparse_log(folder: Path, rows: int) -> Log:
    """Writes every sixteenth row, drawn by chance, of a shop: two rows of a user at the median."""
    dataset = generate(16 * rows, num_items=8 * rows // 100)
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(16 * rows, rows, replace=False))
    log = _write_shop(folder, dataset, dataset.interactions.take(pa.array(kept)))
    return dataclasses.replace(log, options={**_FOR_NEW_ONES, **log.options})


def film_log(folder: Path, rows: int) -> Log:
    """Writes the first `rows` ratings of MovieLens latest-small by time: nearly all users of the
    test rows are new."""
    path = Path(os.environ["TWOTOWER_DATA"]) / "movielens-latest-small" / "ml-latest-small.zip"
    with zipfile.ZipFile(path) as archive:
        ratings = _read_member(archive, "ml-latest-small/ratings.csv")
        films = _read_member(archive, "ml-latest-small/movies.csv")
    interactions = ratings.rename_columns(["user_id", "item_id", "rating", "timestamp"])
    interactions = interactions.sort_by("timestamp").slice(0, rows)
    items = films.rename_columns(["item_id", "title", "genres"])
    features = {
        "title": _WORDS,
        "genres": {"type": "strings", "separator": "|", "embedding_size": 16},
    }
    return Log(
        interactions=_write(folder, "interactions", interactions),
        items=_write(folder, "items", items),
        item_features=features,
        options=_FOR_NEW_USERS | {_READS: ("item_id", "genres")},
    )


def news_log(folder: Path, rows: int) -> Log:
    """Writes a generated news site, whose articles live for some days.

    A user reads category by category to their taste, of a category what is fresh and popular. Most
    articles of the test rows are published after the last training row.
    """
    rng = np.random.default_rng(0)
    num_users = max(20, rows // 25)
    num_items = max(60, rows * 3 // 100)
    categories = len(NEWS_CATEGORIES)
    category = rng.integers(0, categories, num_items)
    published = rng.integers(-2 * DAY, NEWS_DAYS * DAY, num_items)
    appeal = rng.lognormal(0, 1, num_items)
    tastes = rng.dirichlet(np.full(categories, 0.3), num_users)
    activity = rng.lognormal(0, 1, num_users)

    user = rng.choice(num_users, rows, p=activity / activity.sum())
    time = np.sort(rng.integers(0, NEWS_DAYS * DAY, rows))
    item = np.empty(rows, np.int64)
    # Hour by hour: the articles that exist, and their ages, are the same for all reads of an hour.
    for hour in range(NEWS_DAYS * 24):
        first, end = np.searchsorted(time, (hour * HOUR, (hour + 1) * HOUR))
        alive = np.flatnonzero(published <= hour * HOUR)
        age = (hour * HOUR - published[alive]) / HOUR
        interest = appeal[alive] * np.exp(-age / NEWS_LIFE)
        shares = np.cumsum(tastes[user[first:end]][:, category[alive]] * interest, axis=1)
        draws = rng.random(end - first) * shares[:, -1]
        column = (shares < draws[:, None]).sum(axis=1)
        item[first:end] = alive[np.minimum(column, len(alive) - 1)]

    interactions = pa.table(
        {
            "user_id": [f"reader-{number}" for number in user],
            "item_id": [f"article-{number}" for number in item],
            "timestamp": NEWS_START + time,
        }
    )
    items = pa.table(
        {
            "item_id": [f"article-{number}" for number in range(num_items)],
            "title": [_draw_title(rng, NEWS_CATEGORIES[number]) for number in category],
            "category": [NEWS_CATEGORIES[number] for number in category],
            "published": pa.array(NEWS_START + published),
        }
    )
    features = {
        "title": _WORDS,
        "category": {"type": "string", "embedding_size": 16},
        "published": {"type": "timestamp", "parts": ("period",), "embedding_size": 16},
    }
    return Log(
        interactions=_write(folder, "interactions", interactions),
        items=_write(folder, "items", items),
        item_features=features,
        options=_FOR_NEW_ONES | {_READS: ("item_id", "category")},
    )


# Name -> writer of the log; the arguments are a folder and the number of rows.
LOGS: Mapping[str, Callable[[Path, int], Log]] = {
    "shop": shop_log,
    "films": film_log,
    "news": news_log,
    "sparse": sparse_log,
}


def _draw_title(rng: np.random.Generator, category: str) -> str:
    """Draws five words, of which some are of the category and some of all news."""
    numbers = rng.integers(0, 30, 5)
    is_topical = rng.random(5) < 0.6
    words = []
    for number, topical in zip(numbers, is_topical):
        subject = category if topical else "word"
        words.append(f"{subject}{number}")
    return " ".join(words)


def _write_shop(folder: Path, dataset: Dataset, interactions: pa.Table) -> Log:
    return Log(
        interactions=_write(folder, "interactions", interactions),
        items=_write(folder, "items", dataset.items),
        users=_write(folder, "users", dataset.users),
        user_features=_SHOP_USERS,
        item_features=_SHOP_ITEMS,
        options={_READS: ("item_id", "category", "brand")},
    )


def _read_member(archive: zipfile.ZipFile, name: str) -> pa.Table:
    return csv.read_csv(io.BytesIO(archive.read(name)))


def _write(folder: Path, name: str, table: pa.Table) -> Path:
    path = folder / f"{name}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path
