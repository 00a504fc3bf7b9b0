"""A small shop with a feature of every kind, for the tests of the encoder."""

import numpy as np
import pyarrow as pa

from twotower.features.base import TrainingColumn
from twotower.features.fit import fit_encoder
from twotower.features.spec import from_mappings

DAY = 86_400
SPEC = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8, "oov_rows": 3},
        "age": {"type": "int", "buckets": 4},
        "clock": {"type": "timestamp", "column": "timestamp", "embedding_size": 4},
        "page": {"type": "string", "min_count": 2},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 8, "oov_rate": 0.1},
        "genres": {"type": "strings", "separator": "|", "max_length": 3},
        "tags": {"type": "strings", "max_length": 2, "table": "tags"},
        "brand": {"type": "string", "table": "tags"},
        "stock": {"type": "int", "normalize": True},
        "price": {"type": "float", "log": True, "embedding_size": 5},
        "title": {"type": "text", "buckets": 500, "max_length": 12},
        "listed": {"type": "timestamp", "parts": ["age", "hour"]},
    },
}


def shop(seed=0, users=40, items=30, rows=600):
    """(training rows, users, items): the last users and items have no training row; every tenth
    value is missing."""
    rng = np.random.default_rng(seed)

    def holes(values):
        return [None if rng.random() < 0.1 else value for value in values]

    train = pa.table(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, users - 5, rows)],
            "item_id": [f"i{n}" for n in rng.zipf(1.5, rows) % (items - 5)],
            "timestamp": rng.integers(0, 400 * DAY, rows),
            "page": holes(rng.choice(["home", "search", "mail"], rows, p=[0.6, 0.3, 0.1]).tolist()),
        }
    )
    user_table = pa.table(
        {
            "user_id": [f"u{n}" for n in range(users)],
            "age": pa.array(holes(rng.integers(10, 80, users).tolist())),
        }
    )
    genres = ["action", "drama", "comedy", "war"]
    item_table = pa.table(
        {
            "item_id": [f"i{n}" for n in range(items)],
            "genres": holes(
                [
                    "|".join(rng.choice(genres, rng.integers(0, 5), replace=False))
                    for _ in range(items)
                ]
            ),
            "tags": holes(
                [
                    rng.choice(["new", "sale", "acme"], rng.integers(0, 3)).tolist()
                    for _ in range(items)
                ]
            ),
            "brand": holes(rng.choice(["acme", "umbrella"], items).tolist()),
            "stock": pa.array(holes(rng.integers(0, 9, items).tolist())),
            "price": pa.array(holes(rng.lognormal(3, 1, items).tolist())),
            "title": holes([f"Shoe number {n} حذاء" for n in range(items)]),
            "listed": pa.array(holes(rng.integers(0, 400 * DAY, items).tolist())),
        }
    )
    return train, user_table, item_table


def training_column(feature, values):
    """A column in which every value occurs once in training."""
    return TrainingColumn(feature, values, np.ones(len(values), int), values, is_context=False)


def fitted(spec=SPEC, tables=None):
    train, users, items = tables or shop()
    return fit_encoder(from_mappings(spec), train, users=users, items=items)


def encode_all(encoder, tables):
    train, users, items = tables
    own = [name for name in encoder.inputs["user"] if name not in encoder.context]
    return (
        encoder.encode("user", users, own)
        | encoder.encode("user", train, encoder.context)
        | encoder.encode("item", items)
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
