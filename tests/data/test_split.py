"""Filters and splits against definitions written as plain loops over rows."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import DataConfig, SplitConfig
from twotower.core.errors import ConfigError
from twotower.data.dataset import Dataset, TruePreferences
from twotower.data.filters import filter_rows, k_core
from twotower.data.interactions import PARTS, codes, fingerprint
from twotower.data.split import split


def log_of(users, items, **columns) -> pa.Table:
    return pa.table(
        {"user_id": [str(u) for u in users], "item_id": [str(i) for i in items], **columns}
    )


def dataset_of(rows: pa.Table, truth: TruePreferences | None = None) -> Dataset:
    users, items = (pa.table({name: rows[name].unique()}) for name in ("user_id", "item_id"))
    return Dataset(interactions=rows, users=users, items=items, has_catalogue=False, truth=truth)


def random_log(
    seed: int, n: int = 400, users: int = 30, items: int = 25, times: int = 40
) -> pa.Table:
    rng = np.random.default_rng(seed)
    skewed = (rng.random((2, n)) ** 2 * [[users], [items]]).astype(int)
    table = log_of(*skewed, timestamp=rng.integers(times, size=n), row=np.arange(n))
    return pa.concat_tables(
        [table.slice(0, n // 3), table.slice(n // 3)]
    )  # columns of several chunks, as files give them


def kept_rows(rows: pa.Table, **config) -> list[int]:
    return filter_rows(dataset_of(rows), DataConfig(**config)).interactions["row"].to_pylist()


def numbered(rows: pa.Table) -> pa.Table:
    return rows.append_column("row", pa.array(range(rows.num_rows)))


def parts_of(rows: pa.Table, **config) -> dict[str, list[int]]:
    parts = split(rows, SplitConfig(**config))
    return {name: getattr(parts, name)["row"].to_pylist() for name in PARTS}


def test_codes_number_values_in_order_of_appearance_over_chunks():
    column = pa.chunked_array([["b", "a", None], ["a", "c", "b"], []])
    assert codes(column).tolist() == [0, 1, 2, 1, 3, 0]


# where


WHERE = {
    ("rating", "==", 4): [1],
    ("rating", "!=", 4): [0, 2, 3, 4],
    ("rating", "<", 4): [0],
    ("rating", "<=", 4): [0, 1],
    ("rating", ">", 4): [2, 4],
    ("rating", ">=", 4): [1, 2, 4],
    ("rating", ">=", 3.5): [1, 2, 4],
    ("rating", "in", (3, 4)): [0, 1],
    ("rating", "not in", (3, 4)): [2, 3, 4],
    ("rating", "==", None): [3],
    ("rating", "!=", None): [0, 1, 2, 4],
    ("event", "in", ("view", "buy")): [0, 1, 4],
    ("event", "starts with", "b"): [1, 4],
    ("event", "not starts with", "b"): [0, 2, 3],
    ("event", ">=", "c"): [0, 3],
    ("gift", "==", True): [0, 3],
    ("price", "<", 2): [0, 1],
    ("kind", "==", "x"): [0, 2],
}


@pytest.mark.parametrize("condition", WHERE, ids=str)
def test_where_keeps_what_its_operator_says_and_a_null_matches_only_negations(condition):
    rows = log_of(
        "uvwxy",
        "abcde",
        rating=[3, 4, 5, None, 5],
        event=["view", "buy", None, "cart", "buy"],
        gift=[True, False, None, True, False],
        price=[1.5, 1.0, None, 2.0, float("nan")],
        kind=pa.array(["x", "y", "x", None, "y"]).dictionary_encode(),
    )
    assert kept_rows(numbered(rows), where=(condition,)) == WHERE[condition]


def test_conditions_are_joined_and_rows_keep_their_order():
    rows = random_log(0)
    kept = kept_rows(rows, where=(("timestamp", ">=", 10), ("user_id", "!=", "3")))
    expected = [r["row"] for r in rows.to_pylist() if r["timestamp"] >= 10 and r["user_id"] != "3"]
    assert kept == expected and 0 < len(kept) < rows.num_rows


@pytest.mark.parametrize(
    "condition, words",
    [
        (("timestmp", ">=", 4), ("'timestmp'", "did you mean 'timestamp'", "where[0]")),
        (("timestamp", "=>", 4), ("'=>'", "Known", ">=", "operator")),
        (("timestamp", ">=", "4"), ("int64", "'4'", "str")),
        (("user_id", "==", 4), ("string", "4", "int")),
        (("user_id", "in", "4"), ("tuple", "('4',)")),
        (("user_id", "in", ("4", 5)), ("string", "5")),
        (("timestamp", "in", (1, 2.5)), ("int64", "2.5")),
        (("timestamp", ">=", None), ("None",)),
        (("timestamp", "starts with", "4"), ("prefix", "int64")),
        (("timestamp", ">="), ("(column, operator, value)",)),
    ],
    ids=str,
)
def test_a_wrong_condition_names_the_culprit_and_what_is_right(condition, words):
    with pytest.raises(ConfigError) as error:
        kept_rows(random_log(0), where=(condition,))
    assert all(word in str(error.value) for word in words), error.value


def test_no_row_left_counts_what_each_filter_removed():
    with pytest.raises(ConfigError) as error:
        kept_rows(
            random_log(0), where=(("timestamp", ">=", 20), ("user_id", "==", "nobody")), k_core=2
        )
    late = sum(t >= 20 for t in random_log(0)["timestamp"].to_pylist())
    assert "no training rows" in str(error.value)
    assert f"removed {400 - late} of 400" in str(
        error.value
    ) and f"removed {late} of {late}" in str(error.value)


# duplicates and k-core


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_one_row_a_pair_is_the_first_or_last_in_time_with_ties_by_file_order(keep, timed):
    rows = random_log(1) if timed else random_log(1).drop_columns("timestamp")
    order = sorted(rows.to_pylist(), key=lambda r: r.get("timestamp", 0))
    best = {}
    for row in order:
        pair = row["user_id"], row["item_id"]
        if keep == "last" or pair not in best:
            best[pair] = row["row"]
    kept = kept_rows(rows, duplicates=keep)
    assert kept == sorted(best.values()) and len(kept) < rows.num_rows


def peel(rows: list[dict], k: int) -> list[int]:
    """The k-core by its definition: take away one offending id after another."""
    while True:
        for side in ("user_id", "item_id"):
            few = [v for v, n in collections.Counter(r[side] for r in rows).items() if n < k]
            if few:
                rows = [r for r in rows if r[side] != few[0]]
                break
        else:
            return [r["row"] for r in rows]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_core_is_what_remains_after_peeling_one_id_at_a_time(k):
    rows = random_log(2, n=170, users=60, items=60)
    kept = kept_rows(rows, k_core=k)
    assert kept == peel(rows.to_pylist(), k) and 0 < len(kept) < rows.num_rows


def test_a_chain_falls_apart_one_link_a_round():
    # User u has items u and u + 1: only the ends have one row, and each round takes one more from
    # each end.
    n = 50
    users, items = np.repeat(np.arange(n), 2), np.arange(n).repeat(2) + np.tile([0, 1], n)
    assert not k_core(users, items, k=2).any()
    circle = items % n
    assert k_core(users, circle, k=2).all()


def test_a_core_restricts_users_items_and_truth_together_and_other_filters_do_not():
    rows = random_log(3, n=170, users=60, items=60)
    ids = {side: rows[f"{side}_id"].unique().to_pylist() for side in ("user", "item")}
    truth = TruePreferences(
        *(np.array(ids[side], np.float32)[:, None] for side in ("user", "item"))
    )
    cored = filter_rows(dataset_of(rows, truth), DataConfig(k_core=3))
    for side, table, factors in (
        ("user", cored.users, cored.truth.user_factors),
        ("item", cored.items, cored.truth.item_factors),
    ):
        left = table[f"{side}_id"].to_pylist()
        assert set(left) == set(cored.interactions[f"{side}_id"].to_pylist()) and len(left) < len(
            ids[side]
        )
        assert factors[:, 0].tolist() == [float(v) for v in left]
    plain = filter_rows(dataset_of(rows, truth), DataConfig(where=(("user_id", "==", "3"),)))
    assert plain.users.num_rows == len(ids["user"]) and plain.truth is truth


# splits


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


def test_a_random_split_has_exact_sizes_and_follows_its_seed():
    rows = log_of(range(1000), range(1000), row=range(1000))
    one, again, other = (
        parts_of(rows, kind="random", validation=0.0, test=0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert [len(rows) for rows in one.values()] == [800, 0, 200]
    assert (
        abs(np.mean(one["test"]) - 500) < 60
    )  # six standard errors would be 110: drawn from everywhere


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
    assert len(parts["validation"]) == 8 and parts["test"] == list(range(80, 100))
    assert (
        parts_of(drawn, kind="fixed", validation=0.1, seed=3)
        == parts
        != parts_of(drawn, kind="fixed", validation=0.1, seed=4)
    )
    assert parts_of(drawn, kind="fixed", validation=0.0)["validation"] == []


@pytest.mark.parametrize("timed", [True, False])
def test_a_fixed_split_may_hold_out_the_latest_rows_of_each_user(timed):
    rows = random_log(6, n=300, users=20, times=400)
    rows = (rows if timed else rows.drop_columns("timestamp")).append_column(
        "split", pa.repeat("train", 300)
    )
    parts = parts_of(rows, kind="fixed", held="latest", validation=0.2, test=0.0)
    history = collections.defaultdict(list)
    for row in sorted(rows.to_pylist(), key=lambda r: r.get("timestamp", 0)):
        history[row["user_id"]].append(row["row"])
    expected = [
        row for seen in history.values() for row in seen[len(seen) - round(len(seen) * 0.2) :]
    ]
    assert parts["validation"] == sorted(expected) and len(parts["train"]) == 300 - len(expected)
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
        (log_of(range(9), range(9)), {}, ("'timestamp'", "leave_last_out")),
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


def test_the_fingerprint_tells_rows_apart_and_not_their_storage():
    rows = random_log(7)
    same = [
        rows,
        rows.combine_chunks(),
        pa.concat_tables([rows.slice(0, 7), rows.slice(7, 90), rows.slice(97)]),
        rows.drop_columns("row"),
    ]
    assert len({fingerprint(table) for table in same}) == 1
    other = [
        rows.slice(1),
        rows.slice(0, 399),
        rows.drop_columns("timestamp"),
        rows.take(list(range(399, -1, -1))),
        log_of(["ab", "c"], "xy"),
        log_of(["a", "bc"], "xy"),
        log_of(["a", ""], "xy"),
        log_of(["a", ""], "xy").set_column(0, "user_id", pa.array(["a", None])),
    ]
    assert len({fingerprint(table) for table in [rows, *other]}) == 1 + len(other)
