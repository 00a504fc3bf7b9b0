"""Logs that tests read, filter and divide."""

import datetime

import numpy as np
import pyarrow as pa

NOON = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.UTC)


def log_of(users, items, **columns) -> pa.Table:
    return pa.table(
        {"user_id": [str(u) for u in users], "item_id": [str(i) for i in items], **columns}
    )


def random_log(
    seed: int, n: int = 400, users: int = 30, items: int = 25, times: int = 40
) -> pa.Table:
    rng = np.random.default_rng(seed)
    skewed = (rng.random((2, n)) ** 2 * [[users], [items]]).astype(int)
    table = log_of(*skewed, timestamp=rng.integers(times, size=n), row=np.arange(n))
    return pa.concat_tables(
        [table.slice(0, n // 3), table.slice(n // 3)]
    )  # columns of several chunks, as files give them


def typed_log(rows=50) -> pa.Table:
    """A log whose columns have the types that BigQuery has, lists and missing values too."""
    return pa.table(
        {
            "user_id": pa.array([n % 7 for n in range(rows)], pa.int64()),
            "item_id": [f"i{n % 5}" for n in range(rows)],
            "timestamp": pa.array(
                [NOON + datetime.timedelta(minutes=n // 2) for n in range(rows)],
                pa.timestamp("us", "UTC"),
            ),
            "rating": [None if n % 9 == 0 else n / 2 for n in range(rows)],
            "event": ["view" if n % 3 else "buy" for n in range(rows)],
            "tags": pa.array([["a", "b"][: n % 3] for n in range(rows)], pa.list_(pa.string())),
        }
    )
