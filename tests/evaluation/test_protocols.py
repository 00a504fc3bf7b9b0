"""Which rows are to be found, and what is known before them, against lists made by hand."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from tests.extras import extra
from tests.pipeline.history_log import LENGTH, prepare_log, write_log
from twotower.core.errors import ConfigError
from twotower.evaluation.queries import TARGETS, make_queries
from twotower.pipeline.batches import SPANS
from twotower.refitting import read_test_rows

TIMES = {"moments": 40, "none": None}
PARTS = ("train", "validation", "test")
KNOWN = {"train": ("train",), "validation": PARTS[:2], "test": PARTS}


@pytest.fixture(scope="module", params=TIMES)
def prepared(request, tmp_path_factory):
    path = write_log(tmp_path_factory.mktemp("log") / "log.csv", times=TIMES[request.param])
    kind = "time" if TIMES[request.param] else "leave_last_out"
    return prepare_log(path, {"kind": kind, "validation": 0.3, "test": 0.3})


def rows_of(prepared, part):
    """[(user, item, time)] of a part by name, in the order of the log."""
    table = getattr(prepared.raw, part)
    columns = [table[name].to_pylist() for name in ("user_id", "item_id")]
    if "timestamp" in table.column_names:
        columns.append(table["timestamp"].to_pylist())
    else:
        # Parts of each user follow each other.
        columns.append([1e6 * PARTS.index(part) + row for row in range(len(table))])
    return list(zip(*columns))


def before(prepared, part, row):
    """Items of the rows of a user before one of them, those of its own part too."""
    user, _, time = rows_of(prepared, part)[row]
    earlier = [one for known in KNOWN[part] for one in rows_of(prepared, known)]
    earlier = sorted((one for one in earlier if one[0] == user), key=lambda one: one[2])
    return [item for _, item, moment in earlier if moment < time]


@pytest.mark.parametrize("targets", [name for name in TARGETS if name != "all"])
@pytest.mark.parametrize("part", ["validation", "test", "train"])
def test_a_row_is_found_given_all_rows_of_its_user_before_it(prepared, part, targets):
    queries = make_queries(prepared, part, "user", targets=targets)
    rows = rows_of(prepared, part)
    assert len(queries) == (len(rows) if targets == "successive" else len({u for u, *_ in rows}))
    corpus = prepared.items["item_id"].to_pylist()
    seen = queries.seen_lists(slice(0, len(queries)))
    histories = prepared.histories.take(queries.context[SPANS])
    times = prepared.positives(part).timestamp
    for query, row in enumerate(queries.row):
        user, item, time = rows[row]
        assert prepared.users["user_id"][int(queries.user[query])].as_py() == user
        assert [corpus[i] for i in queries.relevant[query]] == ([item] if item in corpus else [])
        if targets == "last":
            assert time == max(moment for other, _, moment in rows if other == user)
        expected = before(prepared, part, row)
        distinct = list(dict.fromkeys(expected[::-1]))[::-1]
        assert [corpus[i] for i in seen[query]] == [one for one in distinct if one in corpus]
        assert histories["history/item_id"][query].astype(bool).sum() == min(LENGTH, len(expected))
        assert times is None or times[row] == time


def test_the_target_of_a_training_row_is_never_masked(prepared):
    queries = make_queries(prepared, "train", "user", max_queries=30)
    assert len(queries) == 30
    seen = queries.seen_lists(slice(0, 30))
    rows = rows_of(prepared, "train")
    for query, row in enumerate(queries.row):
        had = before(prepared, "train", row)
        is_seen = bool(np.isin(queries.relevant[query], seen[query]).all())
        assert is_seen == (rows[row][1] in had)


def test_a_draw_is_the_same_each_time_and_all_rows_are_one_set(prepared):
    one, other = (make_queries(prepared, "test", "interaction", targets="random") for _ in "ab")
    np.testing.assert_array_equal(one.row, other.row)
    users = make_queries(prepared, "test", "user")
    sets = make_queries(prepared, "test", "interaction", targets="all")
    np.testing.assert_array_equal(sets.relevant.values, users.relevant.values)
    with pytest.raises(ConfigError, match="targets.*'lats'.*did you mean 'last'"):
        make_queries(prepared, "test", "user", targets="lats")


def test_the_test_rows_of_the_log_given_as_a_further_set_are_these_rows(prepared):
    again = read_test_rows(prepared, prepared.raw.test, name="again")
    assert again.further.rows == len(prepared.test) and not again.further.unknown_users
    has_times = prepared.train.timestamp is not None
    assert has_times != bool(again.further.notes)  # pairs alone come back, times do not
    for targets in ("", *TARGETS):
        one, other = (
            make_queries(data, "test", "user", targets=targets) for data in (prepared, again)
        )
        np.testing.assert_array_equal(one.user, other.user)
        np.testing.assert_array_equal(one.relevant.values, other.relevant.values)
        lists = [queries.seen_lists(slice(0, len(one))) for queries in (one, other)]
        np.testing.assert_array_equal(lists[0].values, lists[1].values)
        features = [
            data.user_features(queries.user, queries.context)
            for data, queries in ((prepared, one), (again, other))
        ]
        for name, values in features[0].items():
            np.testing.assert_array_equal(values, features[1][name], err_msg=name)
    # What was trained on is as it was.
    for name, values in prepared.histories.take(prepared.train.context[SPANS]).items():
        changed = again.histories.take(again.train.context[SPANS])
        np.testing.assert_array_equal(values, changed[name])


def test_users_and_items_that_the_log_does_not_have_are_counted_and_said(prepared, tmp_path):
    rows = rows_of(prepared, "train")
    has_times = prepared.train.timestamp is not None
    file = tmp_path / "july.csv"
    known = rows[-1]
    lines = [f"{known[0]},{known[1]}", f"new,{known[1]}", "new,unheard", f"{known[0]},{known[1]}"]
    file.write_text("\n".join(["user_id,item_id", *lines]) + "\n")
    data = read_test_rows(prepared, str(file))
    further = data.further
    assert further.name == "july" and further.source == str(file)
    assert (further.rows, further.unknown_users, further.rows_of_unknown_items) == (4, 1, 1)
    assert has_times == any("has no times" in note for note in further.notes)
    assert has_times != any("are training rows too" in note for note in further.notes)
    queries = make_queries(data, "test", "user")
    names = data.users["user_id"].take(queries.user).to_pylist()
    assert sorted(names) == sorted([known[0], "new"])
    new = names.index("new")
    assert queries.missing[new] == 1 and len(queries.relevant[new]) == 1
    assert not len(queries.seen_lists(slice(new, new + 1)).values)
    # Only rows before the split are a user's past, or those of the set where they are asked for.
    last = make_queries(data, "test", "user", targets="last")
    number = data.users["user_id"].take(last.user).to_pylist().index("new")
    past = [queries.context[SPANS][new], last.context[SPANS][number]]
    assert [int(span[1] - span[0]) for span in past] == [0, 0 if has_times else 1]


def test_rows_of_the_time_of_training_are_said(tmp_path):
    prepared = prepare_log(write_log(tmp_path / "log.csv", times=40), {"kind": "time"})
    early = prepared.raw.train.slice(0, 5)
    notes = read_test_rows(prepared, early).further.notes
    assert any("100.0% of its rows (5) are not later" in note for note in notes)
    assert any("100.0% of its rows (5) are training rows too" in note for note in notes)
    with pytest.raises(ConfigError, match="test has no columns 'user_id' and 'item_id'"):
        read_test_rows(prepared, pa.table({"who": [1], "what": [2]}))


def test_a_column_of_another_type_is_left_out_unless_it_is_read(tmp_path):
    path = write_log(tmp_path / "log.csv", times=40)
    prepared = prepare_log(path, {"kind": "time"})
    raw = prepared.raw
    numbers = [pa.array(np.arange(len(part))) for part in raw.tables]
    parts = [part.append_column("price", values) for part, values in zip(raw.tables, numbers)]
    priced = dataclasses.replace(prepared, raw=dataclasses.replace(raw, **dict(zip(PARTS, parts))))
    worded = raw.test.append_column("price", pa.repeat("cheap", len(raw.test)))
    notes = read_test_rows(priced, worded).further.notes
    assert "Its column 'price' is of another type than the log's: left out." in notes


def test_a_missing_label_is_refused(prepared):
    objective = dataclasses.replace(prepared.config.objective, label="liked")
    config = dataclasses.replace(prepared.config, objective=objective)
    labelled = dataclasses.replace(prepared, config=config)
    with pytest.raises(ConfigError, match="config.objective.label='liked': the test set has no"):
        read_test_rows(labelled, prepared.raw.test)


def test_users_held_out_for_validation_are_found_by_the_rows_before_their_last(tmp_path):
    path = write_log(tmp_path / "log.csv", times=10**6)
    prepared = prepare_log(path, {"kind": "time", "validation_by": "user"})
    assert not set(prepared.validation.user) & set(prepared.train.user)
    queries = make_queries(prepared, "validation", "user")
    rows = rows_of(prepared, "validation")
    assert sorted(rows[row][0] for row in queries.row) == sorted({user for user, *_ in rows})
    spans = queries.context[SPANS]
    had = [len(before(prepared, "validation", row)) for row in queries.row]
    assert (spans[:, 1] - spans[:, 0]).tolist() == [min(LENGTH, count) for count in had]
    assert max(had) > 0
    # Users of the test whom training never saw are known by their validation rows.
    test = make_queries(prepared, "test", "user")
    new = np.isin(test.user, prepared.validation.user)
    assert new.any() and (test.context[SPANS][new, 1] > test.context[SPANS][new, 0]).all()


def test_a_test_set_is_read_from_bigquery_and_a_missing_file_is_told(prepared, bigquery_server):
    extra("google.cloud.bigquery", "bigquery")
    rows = pa.table({"user_id": ["0", "new"], "item_id": ["1", "2"]})
    bigquery_server.put("shop.july", rows)
    further = read_test_rows(prepared, "bq://shop.july").further
    assert (further.name, further.rows, further.unknown_users) == ("shop_july", 2, 1)
    with pytest.raises(ConfigError, match="--test='july.csv': there is no such file"):
        read_test_rows(prepared, "july.csv")
