"""Traps of dividing a log into parts."""

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import SplitConfig
from twotower.core.errors import LeakageError
from twotower.data.audit import FINDINGS, audit
from twotower.data.interactions import Split
from twotower.data.split import split


def _log(*rows):
    """Rows of (user, item, time)."""
    users, items, times = zip(*rows)
    return pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.int64())})


@pytest.mark.trap(22)
@pytest.mark.parametrize(
    "kind, parts",
    [
        ("random", ([("u", "a", 1), ("v", "a", 9)], [("u", "b", 5)])),
        ("leave_last_out", ([("u", "a", 1), ("v", "b", 9)], [("u", "b", 5)])),
        ("leave_last_out", ([("u", "a", 1), ("v", "b", 2)], [("u", "a", 5)])),
        ("fixed", ([("u", "a", 1), ("v", "b", 9)], [("u", "b", 9)])),
    ],
    ids=["at random", "what others did later", "the same pair", "the same moment"],
)
def test_a_split_that_leaks_fails_the_run_unless_accepted_by_name(kind, parts):
    """Numbers too good: random splits of timed rows, trends of other users and repeated pairs are
    refused."""
    train, test = (_log(*rows) for rows in parts)
    leaky = Split(train, test.slice(0, 0), test)
    with pytest.raises(LeakageError) as refused:
        audit(leaky, SplitConfig(kind=kind))
    offered = refused.value.args[0].split("accept_leakage=")[1]
    assert audit(
        leaky,
        SplitConfig(kind=kind, accept_leakage=tuple(name for name in FINDINGS if name in offered)),
    )


@pytest.mark.trap(35)
def test_of_equal_times_the_order_of_the_file_decides():
    """Tied timestamps sorted as it happens move up to a quarter of the targets: the last row in the
    file is the last."""
    rng = np.random.default_rng(0)
    users = np.repeat([f"u{n}" for n in range(40)], 5)
    items = [f"i{n}" for n in range(200)]
    order = rng.permutation(200)
    rows = pa.table(
        {
            "user_id": users[order],
            "item_id": items,
            "timestamp": pa.array(np.full(200, 7), pa.int64()),
        }
    )
    parts = split(rows, SplitConfig(kind="leave_last_out"))
    for name, place in (("test", -1), ("validation", -2)):
        expected = {u: [i for v, i in zip(users[order], items) if v == u][place] for u in users}
        part = getattr(parts, name)
        assert dict(zip(part["user_id"].to_pylist(), part["item_id"].to_pylist())) == expected
