"""A small log with many ties in time, and what is prepared of it with a history feature."""

import numpy as np

from twotower.config import from_dict
from twotower.pipeline.prepare import prepare

LENGTH = 4  # events that a history holds
# What the audit of splits would refuse; histories must be right in such splits too.
LEAKS = ("random_split", "repeated_pairs", "identical_rows", "future_rows")
ITEM_FEATURES = {
    "item_id": {"type": "string", "embedding_size": 8, "oov_rows": 3},
    "kind": {"type": "string", "column": "item_id"},
}


def write_log(path, *, rows=200, times=None, seed=0):
    """A log of 12 users and 20 items.

    Args:
        times: Moments that rows are spread over, ties where they are few; None for a log without
            times.
    """
    rng = np.random.default_rng(seed)
    columns = {"user_id": rng.integers(0, 12, rows), "item_id": rng.integers(0, 20, rows)}
    if times:
        columns["timestamp"] = rng.integers(0, times, rows) * 1000
        columns["event"] = rng.choice(["view", "buy"], rows)
    lines = [",".join(columns)]
    lines += [",".join(map(str, row)) for row in zip(*columns.values())]
    path.write_text("\n".join(lines) + "\n")
    return path


def read_log(path):
    """The fields of each row, as text."""
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


def prepare_log(path, split, **history):
    """What is prepared of a log with a split and a history of these fields."""
    config = {
        "data": {
            "source": "csv",
            "interactions": {"path": str(path)},
            "accept": ("old_times",),
        },
        "split": {"validation": 0.2, "test": 0.2, "accept_leakage": LEAKS} | split,
        "features": {
            "user": {"history": {"type": "history", "max_length": LENGTH} | history},
            "item": ITEM_FEATURES,
        },
    }
    return prepare(from_dict(config))
