"""Logs that tests of filters and splits divide."""

import numpy as np
import pyarrow as pa


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
