"""The items of each user in order of time."""

import numpy as np

from twotower.pipeline.batches import InteractionRows
from twotower.retrieval.user_items import (
    items_of_users,
    latest_rows,
    rows_of_items,
    time_order,
)


def rows(user, item, timestamp):
    count = len(user)
    return InteractionRows(
        np.array(user, np.int32),
        np.array(item, np.int32),
        np.ones(count, np.float32),
        np.array(timestamp),
        {},
    )


def test_of_equal_times_the_order_of_the_log_is_kept():
    """A thousand rows of two times: few enough rows of one time are in order even when the sort is
    not stable."""
    times = np.arange(1_000) % 2
    parts = [
        rows(np.zeros(500), np.arange(500), times[:500]),
        rows(np.zeros(500), np.arange(500, 1_000), times[500:]),
    ]
    expected = [*range(0, 1_000, 2), *range(1, 1_000, 2)]
    assert time_order(parts).tolist() == expected
    assert items_of_users(parts, num_users=1)[0].tolist() == expected
    assert latest_rows(parts, num_users=2).tolist() == [999, -1]


def test_a_part_without_rows_takes_no_times_from_the_others():
    part = rows([0, 0], [1, 2], [20, 10])
    empty = InteractionRows(
        np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), None, {}
    )
    for parts in ([part], [empty, part], [part, empty]):
        assert time_order(parts).tolist() == [1, 0]
        assert items_of_users(parts, num_users=1)[0].tolist() == [2, 1]
        assert latest_rows(parts, num_users=1).tolist() == [0]
    assert time_order([empty]).tolist() == []


def test_each_item_of_a_user_has_its_latest_row():
    rng = np.random.default_rng(0)
    parts = [
        rows(rng.integers(0, 5, 40), rng.integers(-1, 9, 40), rng.integers(0, 20, 40))
        for _ in range(2)
    ]
    items = items_of_users(parts, num_users=6)
    user = np.concatenate([part.user for part in parts])
    item = np.concatenate([part.item for part in parts])
    expected = {}
    for row in time_order(parts):
        expected[user[row], item[row]] = row  # a later one replaces it
    found = rows_of_items(parts, items)
    pairs = zip(items.rows.tolist(), items.values.tolist())
    assert [expected[pair] for pair in pairs] == found.tolist()
