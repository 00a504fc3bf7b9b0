"""Filters against definitions written as plain loops over rows."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from tests.data.logs import log_of, random_log
from twotower.config import DataConfig
from twotower.core.errors import ConfigError
from twotower.data.dataset import Dataset, TruePreferences
from twotower.data.filters import filter_rows, k_core


def dataset_of(rows: pa.Table, truth: TruePreferences | None = None) -> Dataset:
    users, items = (pa.table({name: rows[name].unique()}) for name in ("user_id", "item_id"))
    return Dataset(interactions=rows, users=users, items=items, has_catalogue=False, truth=truth)


def kept_rows(rows: pa.Table, **config) -> list[int]:
    return filter_rows(dataset_of(rows), DataConfig(**config)).interactions["row"].to_pylist()


def numbered(rows: pa.Table) -> pa.Table:
    return rows.append_column("row", pa.array(range(rows.num_rows)))


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
        (("user_id", "==", True), ("string", "True", "bool")),
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
    message = str(error.value)
    assert "no training rows" in message
    assert f"removed {400 - late} of 400" in message
    assert f"removed {late} of {late}" in message


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
    ids = {key: rows[key].unique().to_pylist() for key in ("user_id", "item_id")}
    # The factor of an entity is its id.
    user_factors, item_factors = (np.array(x, np.float32)[:, None] for x in ids.values())
    truth = TruePreferences(user_factors, item_factors)
    core = filter_rows(dataset_of(rows, truth), DataConfig(k_core=3))
    for key, table, factors in (
        ("user_id", core.users, core.truth.user_factors),
        ("item_id", core.items, core.truth.item_factors),
    ):
        left = table[key].to_pylist()
        assert set(left) == set(core.interactions[key].to_pylist())
        assert len(left) < len(ids[key])
        assert factors[:, 0].tolist() == [float(value) for value in left]
    config = DataConfig(where=(("user_id", "==", "3"),))
    filtered = filter_rows(dataset_of(rows, truth), config)
    assert filtered.users.num_rows == len(ids["user_id"])
    assert filtered.truth is truth


def test_a_list_in_a_text_is_asked_for_members_and_never_compared_as_a_whole():
    genres = ["Action|Drama", "Drama", None, "Melodrama", "Comedy | Drama"]
    rows = log_of(range(5), range(5), genres=genres, row=range(5))
    condition = ("genres", "contains", "Drama")
    config = DataConfig(where=(condition,))
    kept = filter_rows(dataset_of(rows), config, separators={"genres": "|"})
    assert kept.interactions["row"].to_pylist() == [0, 1, 4]
    whole = DataConfig(where=(("genres", "==", "Drama"),))
    assert filter_rows(dataset_of(rows), whole).interactions["row"].to_pylist() == [1]
    with pytest.raises(ConfigError, match=r"write \('genres', 'contains', 'Drama'\)"):
        filter_rows(dataset_of(rows), whole, separators={"genres": "|"})
