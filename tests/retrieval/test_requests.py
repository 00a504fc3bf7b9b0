"""Requests in every form that callers have: one meaning each, or a refusal by name."""

import datetime
import decimal
import tracemalloc

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from tests.retrieval.runs import make_run, write
from twotower.core.errors import ConfigError, QueryError, TwotowerError
from twotower.index.base import check_k
from twotower.index.exact import ExactIndex
from twotower.index.search import search_filtered
from twotower.retrieval.live.conditions import parse_condition
from twotower.retrieval.retriever import Retriever

USERS, ITEMS, ROWS = 12, 20, 240
HISTORY = {"type": "history", "max_length": 10, "weights": {"buy": 5.0}, "half_life": 2.0}
FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8},
        "Country": {"type": "string", "embedding_size": 8},
        "when": {"type": "timestamp", "column": "timestamp", "embedding_size": 8},
        "history": HISTORY,
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 8},
        "genres": {"type": "strings", "separator": "|", "embedding_size": 8},
        "price": {"type": "float"},
        "released": {"type": "timestamp", "embedding_size": 8},
    },
}
# A moment in milliseconds, the unit of the log, and all forms of it.
MOMENT = 1_701_430_000_000
AT = datetime.datetime(2023, 12, 1, 11, 26, 40, tzinfo=datetime.UTC)
MOMENTS = [
    MOMENT,
    float(MOMENT),
    np.int64(MOMENT),
    str(MOMENT),
    AT,
    AT.replace(tzinfo=None),
    AT.astimezone(datetime.timezone(datetime.timedelta(hours=5))),
    "2023-12-01T11:26:40Z",
    "2023-12-01 11:26:40",
    "2023-12-01T12:26:40.123+01:00",
    pd.Timestamp(AT),
    np.datetime64("2023-12-01T11:26:40"),
]
DAY = datetime.date(2023, 11, 5)


def released(item):
    return datetime.date(2023, 10, 1) + datetime.timedelta(days=7 * item)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundle of a log in milliseconds whose ids are numbers: not to be changed."""
    folder = tmp_path_factory.mktemp("requests")
    rng = np.random.default_rng(0)
    start = MOMENT - 3_600_000 * ROWS
    log = {
        "user_id": rng.permutation(np.arange(ROWS) % USERS),
        "item_id": rng.integers(0, ITEMS, ROWS),
        "timestamp": start + 3_600_000 * np.arange(ROWS),
        "event": np.where(rng.random(ROWS) < 0.5, "buy", "view"),
    }
    items = {
        "item_id": range(ITEMS),
        "genres": [("Home|Light", "Garden")[n % 2] for n in range(ITEMS)],
        "price": [n + 0.5 for n in range(ITEMS)],
        "released": [released(n) for n in range(ITEMS)],
    }
    users = {"user_id": range(USERS), "Country": [("FR", "DE")[n % 2] for n in range(USERS)]}
    for name, table in (("events", log), ("items", items), ("users", users)):
        pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)
    data = {
        "source": "csv",
        "interactions": {"path": str(folder / "events.csv"), "timestamp_unit": "ms"},
        "item_table": {"path": str(folder / "items.csv")},
        "user_table": {"path": str(folder / "users.csv")},
    }
    model = {
        "user": {"layers": (16,)},
        "item": {"layers": (16,)},
        "history": {"kind": "bag"},
    }
    return write(make_run(folder / "run", data=data, features=FEATURES, model=model))


@pytest.fixture(scope="module")
def retriever(folder):
    return Retriever.load(folder)


@pytest.fixture
def changing(retriever, tmp_path):
    """A retriever of its own, whose items a test may change."""
    import shutil

    shutil.copytree(retriever.bundle.folder, tmp_path / "bundle")
    return Retriever.load(tmp_path / "bundle")


def ids(found):
    return [item.item_id for item in found]


def refusal(call, *arguments, **options):
    """The message of a refusal, which is an error of the package."""
    with pytest.raises(TwotowerError) as refused:
        call(*arguments, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    "user",
    [3, 3.0, np.int64(3), np.float64(3), "3", "3.0", " 3", "3 ", decimal.Decimal(3), pa.scalar(3)],
    ids=repr,
)
def test_an_id_of_a_log_of_digits_is_one_in_every_form(retriever, user):
    expected = retriever.recommend("3", k=4)
    found = retriever.recommend(user, k=4)
    assert found == expected and found.known and retriever.knows(user)
    assert retriever.recommend(rows=[{"user_id": user}], k=4).known
    assert retriever.similar_items(user, 4) == retriever.similar_items("3", 4)
    assert retriever.item(user).item_id == "3"
    assert ids(retriever.latest_items(user)) == ids(retriever.latest_items("3"))
    denied = retriever.recommend("1", k=ITEMS, exclude_seen=False, deny=[user])
    assert "3" not in ids(denied) and len(denied) == ITEMS - 1
    assert ids(retriever.recommend("1", exclude_seen=False, allow=[user])) == ["3"]
    assert ids(retriever.recommend("1", exclude_seen=False, where={"item_id": user})) == ["3"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"3", "bytes"),
        (True, "bool"),
        (float("nan"), "missing"),
        ("", "missing"),
        ("3\x00", "NUL"),
        ("\ufeff3", "byte order mark"),
        ("\ud800", "half of a character"),
        (3.5, "no exact whole number"),
        (10**5_000, "digits"),
        (["3"], "list"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_id_is_refused_by_name(retriever, value, words):
    assert words in refusal(retriever.recommend, value)
    assert words in refusal(retriever.similar_items, value)
    assert words in refusal(retriever.recommend_many, ["3", value])
    assert "deny[1]: " in refusal(retriever.recommend, "3", deny=["3", value])


def test_text_where_a_list_is_due_deletes_nothing(changing):
    for call, name in (
        (changing.delete, "item_ids"),
        (changing.recommend_many, "user_ids"),
        (changing.embed_users, "user_ids"),
        (changing.item_vectors, "item_ids"),
        (lambda x: changing.recommend("3", deny=x), "deny"),
        (lambda x: changing.recommend("3", allow=x), "allow"),
    ):
        for value in ("12", b"12", 12, {"12": 1}):
            assert f"{name}={value!r} must be a list" in refusal(call, value)
    assert len(changing) == ITEMS
    assert changing.delete([12.0, "1"]) == 2 and len(changing) == ITEMS - 2


@pytest.mark.parametrize(
    "wrap",
    [
        tuple,
        iter,
        np.array,
        pa.array,
        pd.Series,
        pl.Series,
        dict.fromkeys,
        lambda x: pd.DataFrame({"user_id": x}),
        lambda x: pl.DataFrame({"user_id": x}),
        lambda x: pa.table({"user_id": x}),
        lambda x: [float(value) for value in x],
    ],
)
def test_lists_of_ids_of_any_library(retriever, wrap):
    values = wrap([3, 4])
    if isinstance(values, dict):
        values = values.keys()
    assert retriever.recommend_many(values, 2) == retriever.recommend_many(["3", "4"], 2)


ROW = {"user_id": 3, "Country": "DE", "timestamp": MOMENT}


@pytest.mark.parametrize(
    "rows",
    [
        ROW,
        [pd.Series(ROW)],
        pd.DataFrame([ROW]),
        pl.DataFrame([ROW]),
        pa.Table.from_pylist([ROW]),
        {name: [value] for name, value in ROW.items()},
        np.array([(3, "DE", MOMENT)], [("user_id", "i8"), ("Country", "U2"), ("timestamp", "i8")]),
        pd.DataFrame([ROW]).astype({"Country": "category", "user_id": float}),
        [{**ROW, "history": None}],
        [{**ROW, "history": float("nan")}],
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_any_library(retriever, rows):
    expected = retriever.encode_users([ROW])
    np.testing.assert_allclose(retriever.encode_users(rows), expected, atol=1e-6)
    assert retriever.recommend(rows=rows, k=3).known


def test_rows_of_mixed_ids_and_times(retriever):
    """The columns that a log has a form for are read value by value."""
    rows = [{"user_id": user, "timestamp": at} for user, at in ((3, MOMENT), ("3.0", AT))]
    first, second = retriever.encode_users(rows)
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("moment", MOMENTS, ids=repr)
def test_a_moment_is_one_in_rows_histories_conditions_and_upserts(retriever, changing, moment):
    expected = retriever.encode_users([ROW])
    found = retriever.encode_users([ROW | {"timestamp": moment}])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    events = [{"item_id": 1, "event": "buy", "timestamp": "2023-11-20T00:00:00Z"}]
    events += [{"item_id": 7, "event": "view", "timestamp": MOMENT}]
    by_history = retriever.encode_users([{"history": events}])
    late = [events[0], events[1] | {"timestamp": moment}]
    np.testing.assert_allclose(retriever.encode_users([{"history": late}]), by_history, atol=1e-6)
    # The times count: the age of an event weighs.
    other = [events[0], events[1] | {"timestamp": MOMENT - 86_400_000}]
    assert not np.allclose(retriever.encode_users([{"history": other}]), by_history, atol=1e-4)
    newer = {n for n in range(ITEMS) if released(n) > AT.date()}
    where = [("released", ">", moment)]
    listed = retriever.recommend("3", k=ITEMS, exclude_seen=False, where=where)
    assert {int(item) for item in ids(listed)} == newer
    if not isinstance(moment, (int, float, np.integer)):
        changing.upsert([{"item_id": 99, "released": moment if moment != str(MOMENT) else AT}])
        assert changing.item("99").display["released"] == AT.replace(tzinfo=None)


def test_a_number_in_another_unit_is_no_time(retriever):
    seconds = {"timestamp": MOMENT // 1000}
    assert "is a time in s, and times are in ms here" in refusal(
        retriever.encode_users, [ROW | seconds]
    )
    assert "in s" in refusal(retriever.encode_users, pa.Table.from_pylist([ROW | seconds]))
    event = {"item_id": 1} | seconds
    assert "in s" in refusal(retriever.encode_users, [{"history": [event]}])
    assert "'soon' is not a time" in refusal(retriever.encode_users, [ROW | {"timestamp": "soon"}])


def test_a_body_in_other_names_is_refused_or_mapped(retriever):
    body = {
        "buyer_id": "3",
        "recent_interactions": [{"product_id": "1", "event_type": "buy"}, {"product_id": "7"}],
    }
    message = refusal(retriever.recommend, rows=[body])
    assert "'buyer_id'; did you mean 'user_id'?" in message and "names={'buyer_id': ...}" in message
    names = {
        "buyer_id": "user_id",
        "recent_interactions": "history",
        "product_id": "item_id",
        "event_type": "event",
    }
    found = retriever.recommend(rows=[body], names=names, k=5)
    history = [{"item_id": "1", "event": "buy"}, {"item_id": "7"}]
    ours = [{"user_id": "3", "history": history}]
    assert found == retriever.recommend(rows=ours, k=5) and found.known
    # What is left out leaves nothing to answer.
    assert "says nothing of the user" in refusal(retriever.recommend, rows=[body], strict=False)
    extra = ours[0] | {"session": "x"}
    assert "nothing reads 'session'" in refusal(retriever.recommend, rows=[extra])
    assert retriever.recommend(rows=[extra], strict=False, k=5) == found
    # Case counts: the log has Country.
    assert "did you mean 'Country'?" in refusal(retriever.encode_users, [{"country": "DE"}])


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ("1", "column 'history' holds string"),
        ({"1", "7"}, "holds set"),
        ({"item_id": "1"}, "holds dict"),
        ([{"item": "1"}], "did you mean 'item_id'?"),
        ([{"event": "buy"}], "has no item_id"),
        ([b"1"], "bytes"),
        ([["1"]], "list"),
    ],
)
def test_what_is_no_history_is_refused(retriever, history, words):
    assert words in refusal(retriever.recommend, rows=[{"history": history}])
    # A set is a list for Arrow.
    if not isinstance(history, set):
        frame = pa.Table.from_pylist([{"history": history}])
        assert refusal(retriever.recommend, rows=frame)


def test_histories_of_any_library_are_one(retriever):
    expected = retriever.encode_users([{"history": ["1", "7"]}])
    for history in ([1, 7], (1.0, "7"), np.array([1, 7]), pa.array(["1", "7"]), pd.Series([1, 7])):
        found = retriever.encode_users([{"history": history}])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    for frame in (pa.table, pd.DataFrame, pl.DataFrame):
        found = retriever.encode_users(frame({"history": [[1, 7]]}))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    unknown = retriever.recommend(rows=[{"history": ["i1", "i7"]}], k=3)
    assert unknown.note.startswith("None of the 2 items of the history is known")
    assert retriever.recommend(rows=[{"history": ["i1", "7"]}], k=3).note == ""


def test_values_that_no_column_has_are_told_with_their_column(retriever):
    mixed = [{"Country": "FR"}, {"Country": 5}]
    message = refusal(retriever.encode_users, mixed)
    assert "column 'Country'" in message and "several types (int, str)" in message
    assert "more than 64 bits" in refusal(retriever.encode_users, [{"Country": 10**30}])
    assert "half of a character" in refusal(retriever.encode_users, [{"Country": "\ud800"}])
    wrong = ("user", 3, None, b"x", [3], ["user"], np.array(3), pl.LazyFrame({"user_id": [1]}))
    for rows in wrong:
        with pytest.raises(ConfigError, match="rows"):
            retriever.encode_users(rows)
    assert "rows holds 2" in refusal(retriever.recommend, rows=[ROW, ROW])
    for rows in ([{}], [{"user_id": None}]):
        assert "says nothing of the user" in refusal(retriever.recommend, rows=rows)
    assert len(retriever.recommend("3", rows=[{}], k=2)) == 2


@pytest.mark.parametrize(
    "k", [0, -1, True, "5", 5.0, float("nan"), None, 2.5, [3], np.bool_(True), "x" * 10**6]
)
def test_a_length_that_is_none_is_refused(retriever, k):
    for call in (
        lambda: retriever.recommend("3", k=k),
        lambda: retriever.recommend_many(["3"], k),
        lambda: retriever.similar_items("3", k),
        lambda: retriever.latest_items("3", k),
        lambda: check_k(k),
    ):
        message = refusal(call)
        assert message.startswith("k=") and len(message) < 200


@pytest.mark.parametrize(
    "k", [10**8, 2**63, 10**400, np.int64(10**9)], ids=["1e8", "2^63", "1e400", "numpy"]
)
def test_a_length_beyond_the_corpus_makes_room_for_the_corpus(retriever, k):
    items = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    index = ExactIndex(items)
    searches = {
        "recommend": lambda: len(retriever.recommend("3", k=k, exclude_seen=False)),
        "rerank": lambda: len(retriever.recommend("3", k=k, exclude_seen=False, rerank="mmr")),
        "many": lambda: len(retriever.recommend_many(["3", "x"], k, exclude_seen=False)) // 2,
        "index": lambda: index.search(items[:1], int(k))[1].shape[1],
        "filtered": lambda: search_filtered(index, items, items[:1], int(k))[1].shape[1],
    }
    for name, search in searches.items():
        search()  # compiles
        tracemalloc.start()
        found = search()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == (500 if name in ("index", "filtered") else ITEMS)
        assert peak < 2**23, name


def test_conditions_on_lists_and_their_refusals(retriever):
    def listed(*conditions):
        found = retriever.recommend("3", k=ITEMS, exclude_seen=False, where=list(conditions))
        return sorted(map(int, ids(found)))

    assert listed(("genres", "contains", "Light")) == list(range(0, ITEMS, 2))
    assert listed(("genres", "not contains", "Light")) == list(range(1, ITEMS, 2))
    assert listed(("genres", "contains", ("Light", "Garden"))) == list(range(ITEMS))
    assert listed(("genres", "contains", "Home|Light")) == []
    for where in ({"genres": "Light"}, [("genres", "in", ["Light"])], [("genres", "<", "Light")]):
        assert "by genres contains 'Light'." in refusal(retriever.recommend, "3", where=where)
    assert "asks for a member of a list" in refusal(
        retriever.recommend, "3", where=[("price", "contains", 3)]
    )
    assert listed(("price", "<=", np.float32(2.5))) == listed(("price", "<=", 2.5)) == [0, 1, 2]
    # A single condition is often written without the list around it.
    assert ids(retriever.recommend("3", where=("price", "<", 1), exclude_seen=False)) == ["0"]
    for value in ("2.5", True, float("nan"), 10**30, b"3", [[1]], {"a": 1}):
        assert "where" in refusal(retriever.recommend, "3", where=[("price", "<=", value)])
    for where in ("price<10", 3, b"x", ["price"], [("price", "<=")], [(3, "==", 3)]):
        assert "must be (column, operator, value)" in refusal(retriever.recommend, "3", where=where)
    assert "did you mean 'price'?" in refusal(retriever.recommend, "3", where={"prise": 3})
    nothing = retriever.recommend("3", where={"price": -1})
    assert nothing == [] and nothing.note == "No item satisfies price == -1."
    # As it was written, where the bundle compares numbers.
    late = retriever.recommend("3", where=[("released", ">", "2100-01-01")])
    assert late.note == "No item satisfies released > '2100-01-01'."
    assert retriever.similar_items("3", where={"price": -1}).note == nothing.note
    assert retriever.recommend("3", where={"price": 0.5}, deny=[0]).note == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("genres contains Light", range(0, ITEMS, 2)),
        ("genres not contains Light", range(1, ITEMS, 2)),
        ("genres contains Light, Garden", range(ITEMS)),
        ("released latest 3", range(17, ITEMS)),
        ("released >= 2024-01-01", range(14, ITEMS)),
        ("item_id = 3.0, 4", (3, 4)),
    ],
)
def test_a_written_condition_is_read_in_the_forms_of_the_log(retriever, text, expected):
    condition = parse_condition(text, retriever.items(), retriever.forms)
    found = retriever.recommend("3", k=ITEMS, exclude_seen=False, where=[condition])
    assert sorted(int(item) for item in ids(found)) == list(expected)


def test_a_written_condition_on_a_list_names_the_nearest_member(retriever):
    message = refusal(parse_condition, "genres contains Lihgt", retriever.items(), retriever.forms)
    assert "no item has 'Lihgt' in column 'genres'" in message and "are: Light" in message


def test_the_latest_items_follow_changes(changing):
    def newest(count):
        where = [("released", "latest", count)]
        found = changing.recommend("3", k=ITEMS, exclude_seen=False, where=where)
        return {int(item) for item in ids(found)}

    assert newest(3) == {17, 18, 19} and newest(100) == set(range(ITEMS))
    changing.upsert([{"item_id": 50, "released": "2030-01-01"}])
    assert newest(3) == {50, 19, 18}
    changing.delete([19])
    assert newest(3) == {50, 18, 17}
    assert "where 'released' latest" in refusal(
        changing.recommend, "3", where=[("released", "latest", 2.5)]
    )
    assert "neither times nor numbers" in refusal(
        changing.recommend, "3", where=[("genres", "latest", 3)]
    ) or "lists" in refusal(changing.recommend, "3", where=[("genres", "latest", 3)])


def test_upserts_take_what_a_table_of_items_has(changing):
    row = {"item_id": 50.0, "genres": ["Home", "Light"], "price": "12.5", "released": DAY}
    changing.upsert(row)
    moment = datetime.datetime(2023, 11, 5)
    expected = {"genres": "Home|Light", "price": 12.5, "released": moment}
    assert dict(changing.item(50).display) == expected
    vector = changing.item_vectors(["50"])
    text = {"item_id": "51", "genres": "Home|Light", "price": 12.5, "released": str(DAY)}
    changing.upsert(pd.DataFrame([text]))
    assert dict(changing.item("51").display) == expected
    # The same item but for its id, whose row is one of those for unknown ids.
    encoded = changing.encode_items([{**text, "item_id": "50"}])
    np.testing.assert_allclose(encoded, vector, atol=1e-6)
    for rows, words in (
        ([{"item_id": 52, "Price": 3}], "did you mean 'price'?"),
        ([{"item_id": None}], "missing"),
        ([{"item_id": ""}], "missing"),
        ([{"item_id": 52}, {"item_id": "52.0"}], "twice"),
        ([{"title": "x"}], "nothing reads 'title'"),
        ([{"price": 3}], "needs a column 'item_id'"),
        ("52", "are no rows"),
    ):
        assert words in refusal(changing.upsert, rows)
    assert len(changing) == ITEMS + 2
    assert changing.upsert([{"item_id": 52, "Price": 3}], strict=False) == ITEMS + 3
    assert changing.upsert([{"sku": 53}], names={"sku": "item_id"}) == ITEMS + 4


@pytest.mark.parametrize(
    "wrap",
    [
        np.array,
        pa.array,
        pl.Series,
        pd.DataFrame,
        lambda rows: pa.FixedSizeListArray.from_arrays(np.float32(rows).ravel(), len(rows[0])),
    ],
)
def test_vectors_of_any_library(changing, wrap):
    vector = [0.25] * 16
    assert changing.upsert([{"item_id": 60}], vectors=wrap([vector])) == ITEMS + 1
    np.testing.assert_allclose(changing.item_vectors([60]), [vector])


@pytest.mark.parametrize(
    "vectors",
    ["abc", [[1.0], [1.0, 2.0]], [["x"] * 16], 3, [[1j] * 16], [[10**400] * 16]],
    ids=["text", "ragged", "texts", "number", "complex", "huge"],
)
def test_what_is_no_vector_changes_nothing(changing, vectors):
    with pytest.raises(QueryError, match="item vectors"):
        changing.upsert([{"item_id": 60}], vectors=vectors)
    assert len(changing) == ITEMS
