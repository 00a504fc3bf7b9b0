"""Splits against definitions written as plain loops over rows."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from tests.data.logs import log_of, random_log
from twotower.config import SplitConfig
from twotower.core.errors import ConfigError
from twotower.data.interactions import PARTS
from twotower.data.split import split


def parts_of(rows: pa.Table, **config) -> dict[str, list[int]]:
    parts = split(rows, SplitConfig(**config))
    return {name: getattr(parts, name)["row"].to_pylist() for name in PARTS}


@pytest.mark.parametrize(
    "kind, config",
    [
        ("time", {}),
        ("leave_last_out", {}),
        ("random", {}),
        ("time", {"validation": 0.0}),
        ("random", {"test": 0.0}),
        ("leave_last_out", {"validation": 0.0}),
        ("leave_last_out", {"test": 0.0}),
    ],
)
def test_every_row_lands_in_exactly_one_part_in_file_order(kind, config):
    parts = parts_of(random_log(4), kind=kind, **config)
    assert sorted(sum(parts.values(), [])) == list(range(400))
    assert all(rows == sorted(rows) for rows in parts.values())
    assert [bool(rows) for rows in parts.values()] == [
        True,
        config.get("validation", 1) > 0,
        config.get("test", 1) > 0,
    ]


@pytest.mark.parametrize("times", [5, 40, 10**6])
def test_a_time_split_divides_no_second_and_keeps_the_shares(times):
    rows = random_log(5, times=times)
    parts = split(rows, SplitConfig(validation=0.2, test=0.25))
    train, validation, test = (np.asarray(getattr(parts, name)["timestamp"]) for name in PARTS)
    assert train.max() < validation.min() and validation.max() < test.min()
    if times == 10**6:
        assert (len(validation), len(test)) == (80, 100)
    else:  # a tied second goes to the later side
        assert 100 <= len(test) < 100 + 400 / times * 2


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("validation, test", [(0.1, 0.1), (0.0, 0.1), (0.1, 0.0)])
def test_leave_last_out_takes_the_last_rows_of_each_user_with_ties_by_file_order(
    timed, validation, test
):
    rows = random_log(6, n=150, users=60, times=4)
    rows = rows if timed else rows.drop_columns("timestamp")
    history = collections.defaultdict(list)
    for row in sorted(rows.to_pylist(), key=lambda r: r.get("timestamp", 0)):
        history[row["user_id"]].append(row["row"])
    expected = {"train": [], "validation": [], "test": []}
    for seen in history.values():
        seen = list(seen)
        if len(seen) >= 3:
            for name, share in (("test", test), ("validation", validation)):
                if share:
                    expected[name].append(seen.pop())
        expected["train"] += seen
    assert parts_of(rows, kind="leave_last_out", validation=validation, test=test) == {
        name: sorted(r) for name, r in expected.items()
    }
    assert min(map(len, history.values())) < 3


def test_ties_of_a_users_last_rows_are_drawn_or_held_out_together():
    """Ann's last three rows share a time; ben has three rows of two moments, and keeps them all."""
    rows = log_of("aaaaabbb", range(8), timestamp=[0, 1, 2, 2, 2, 0, 1, 1], row=range(8))
    drawn = [parts_of(rows, kind="leave_last_out", ties="drawn", seed=seed) for seed in range(40)]
    # Each of the tied rows is held out by some seed, and none that is earlier.
    assert {tuple(parts["test"]) for parts in drawn} == {
        (row, other) for row in (2, 3, 4) for other in (6, 7)
    }
    assert drawn[0] == parts_of(rows, kind="leave_last_out", ties="drawn", seed=0)
    together = parts_of(rows, kind="leave_last_out", ties="together")
    assert together == {"train": [0, 5, 6, 7], "validation": [1], "test": [2, 3, 4]}
    untied = rows.drop_columns("timestamp")
    expected = parts_of(untied, kind="leave_last_out")
    for ties in ("drawn", "together"):
        assert parts_of(untied, kind="leave_last_out", ties=ties) == expected


@pytest.mark.parametrize("ties", ["file", "together"])
def test_leave_last_out_may_hold_out_several_rows_of_each_user(ties):
    users = "aaaaaaabbbbbcccc"
    rows = log_of(users, range(16), timestamp=range(16), row=range(16))
    parts = parts_of(rows, kind="leave_last_out", held_out=2, ties=ties)
    # Cat has four rows, which two parts of two would take all of.
    assert parts["test"] == [5, 6, 10, 11] and parts["validation"] == [3, 4, 8, 9]
    assert (
        parts_of(rows, kind="leave_last_out", held_out=2, validation=0.0)["test"] == parts["test"]
    )
    with pytest.raises(ConfigError, match="held_out"):
        SplitConfig(held_out=0)


@pytest.mark.parametrize("kind", ["time", "leave_last_out", "random"])
@pytest.mark.parametrize("by", ["time", "last", "user"])
def test_validation_rows_are_chosen_among_those_beside_the_test(kind, by):
    log = random_log(4)
    only_test = parts_of(log, kind=kind, validation=0.0)
    parts = parts_of(log, kind=kind, validation=0.2, validation_by=by)
    assert parts["test"] == only_test["test"]
    assert sorted(parts["train"] + parts["validation"]) == only_test["train"]
    user = np.array(log["user_id"])
    time = np.asarray(log["timestamp"])
    train, validation = (np.array(parts[name]) for name in ("train", "validation"))
    if by == "time":
        assert time[train].max() < time[validation].min()
        assert len(validation) >= 0.2 * len(only_test["train"]) - 1
    if by == "last":
        for one in set(user[validation]):
            of_user = train[user[train] == one]
            assert (user[validation] == one).sum() == 1 and len(of_user) >= 2
            assert time[of_user].max() <= time[validation[user[validation] == one]]
    if by == "user":
        held = set(user[validation])
        assert not held & set(user[train])
        assert len(held) == round(0.2 * len(set(user[only_test["train"]])))


def test_a_random_split_has_exact_sizes_and_follows_its_seed():
    rows = log_of(range(1000), range(1000), row=range(1000))
    one, again, other = (
        parts_of(rows, kind="random", validation=0.0, test=0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert [len(rows) for rows in one.values()] == [800, 0, 200]
    # Drawn from everywhere: six standard errors would be 110.
    assert abs(np.mean(one["test"]) - 500) < 60


def test_a_fixed_split_follows_its_column_and_draws_validation_from_train_only_if_none_is_given():
    given = ["train", "test", "validation", "train", "train", "test"]
    rows = log_of(range(6), range(6), split=given, row=range(6))
    assert parts_of(rows, kind="fixed", validation=0.9) == {
        "train": [0, 3, 4],
        "validation": [2],
        "test": [1, 5],
    }
    drawn = log_of(range(100), range(100), split=["train"] * 80 + ["test"] * 20, row=range(100))
    parts = parts_of(drawn, kind="fixed", validation=0.1, seed=3)
    assert len(parts["validation"]) == 8
    assert parts["test"] == list(range(80, 100))
    assert parts_of(drawn, kind="fixed", validation=0.1, seed=3) == parts
    assert parts_of(drawn, kind="fixed", validation=0.1, seed=4) != parts
    assert parts_of(drawn, kind="fixed", validation=0.0)["validation"] == []


@pytest.mark.parametrize("timed", [True, False])
def test_a_fixed_split_may_hold_out_the_latest_rows_of_each_user(timed):
    rows = random_log(6, n=300, users=20, times=400)
    rows = rows if timed else rows.drop_columns("timestamp")
    rows = rows.append_column("split", pa.repeat("train", 300))
    parts = parts_of(rows, kind="fixed", held="latest", validation=0.2, test=0.0)
    history = collections.defaultdict(list)
    for row in sorted(rows.to_pylist(), key=lambda r: r.get("timestamp", 0)):
        history[row["user_id"]].append(row["row"])
    expected = []
    for seen in history.values():
        count = round(len(seen) * 0.2)
        expected += seen[len(seen) - count :]
    assert parts["validation"] == sorted(expected)
    assert len(parts["train"]) == 300 - len(expected)
    with pytest.raises(ConfigError, match="config.split.held='newest' is not known"):
        parts_of(rows, kind="fixed", held="newest", validation=0.2, test=0.0)


@pytest.mark.parametrize(
    "rows, config, words",
    [
        (log_of([1] * 9, range(9), timestamp=[7] * 9), {}, ("no train rows", "'time'", "of 9")),
        (
            log_of([1] * 9, range(9), timestamp=range(9)),
            {"validation": 0.01},
            ("no validation rows", "0.01"),
        ),
        (
            log_of([1] * 9, range(9), timestamp=range(9)),
            {"validation": 0.6, "test": 0.4},
            ("validation=0.6", "test=0.4", "share for train"),
        ),
        (log_of(range(9), range(9)), {}, ("'timestamp'", "config.split.kind='random'")),
        (log_of([1] * 9, range(9)), {}, ("'timestamp'", "config.split.kind='leave_last_out'")),
        (
            log_of([7, 8, 9], "abc", timestamp=[1, None, 3]),
            {},
            ("1 of 3 rows", "row 2", "user_id='8'"),
        ),
        (log_of(range(9), range(9)), {"kind": "leave_last_out"}, ("at least three rows",)),
        (
            log_of(range(9), range(9)),
            {"kind": "leave-last-out"},
            ("did you mean 'leave_last_out'", "config.split.kind"),
        ),
        (log_of(range(9), range(9)), {"kind": "fixed"}, ("'split'",)),
        (
            log_of("uv", "ab", split=["train", "tset"]),
            {"kind": "fixed"},
            ("row 2", "'tset'", "train, validation, test"),
        ),
        (log_of("uv", "ab", split=["train", None]), {"kind": "fixed"}, ("row 2", "None")),
        (
            log_of("uv", "ab", split=["test", "test"]),
            {"kind": "fixed", "validation": 0.0},
            ("no train rows",),
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_split_that_cannot_be_is_refused_with_the_reason(rows, config, words):
    with pytest.raises(ConfigError) as error:
        split(rows, SplitConfig(**config))
    assert all(word in str(error.value) for word in words), error.value
