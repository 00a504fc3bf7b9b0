"""Lists that need no known user: of events, of examples, the most popular and the newest items; and
changes that another process made."""

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.errors import ConfigError, UnknownItemError
from twotower.retrieval.retriever import Retriever


@pytest.fixture
def changing(copied):
    """Two retrievers of one bundle, as two processes have them."""
    return [Retriever.load(copied) for _ in range(2)]


def pairs(items):
    return [(item.item_id, item.score) for item in items]


def ids(items):
    return [item.item_id for item in items]


def test_events_follow_the_stored_history_and_count_as_seen(retriever):
    user = retriever.bundle.users["user_id"][0].as_py()
    stored = retriever.user_rows.take([user]).to_pylist()[0]
    events = [retriever.bundle.items["item_id"][3].as_py(), {"item_id": "i-new"}]
    whole = {"city": stored["city"], "history": [*stored["history"], events[0], "i-new"]}
    expected = retriever.recommend(user, rows=[whole], k=20)
    found = retriever.recommend(user, events=events, k=20)
    assert ids(found) == ids(expected) and events[0] not in ids(found)
    np.testing.assert_allclose(
        [item.score for item in found], [item.score for item in expected], rtol=1e-5
    )
    vector = retriever.encode_user(user, events=events)
    np.testing.assert_allclose(vector, retriever.encode_users([whole])[0], rtol=1e-4, atol=1e-6)


def test_without_events_a_known_user_is_answered_by_the_stored_vector(retriever):
    user = retriever.bundle.users["user_id"][1].as_py()
    assert pairs(retriever.recommend(user, events=[])) == pairs(retriever.recommend(user))
    stored = retriever.bundle.user_vectors[1]
    np.testing.assert_array_equal(retriever.encode_user(user), stored)


def test_what_a_request_says_of_a_known_user_stands_beside_what_is_stored(retriever):
    user = retriever.bundle.users["user_id"][1].as_py()
    history = retriever.user_rows.take([user])["history"][0].as_py()
    row = {"city": "Cairo", "history": history}
    expected = retriever.recommend(user, rows=[row])
    found = retriever.recommend(user, rows=[{"city": "Cairo"}], events=[])
    assert ids(found) == ids(expected)


@pytest.mark.parametrize("events", [["ok", 1.5], [{"event": "click"}]])
def test_events_that_cannot_be_meant_are_refused(retriever, events):
    with pytest.raises(ConfigError, match="events"):
        retriever.recommend("1", events=events)


def test_items_like_several_are_nearest_to_the_mean_of_their_directions(retriever):
    items = retriever.items()["item_id"].to_pylist()
    vectors = retriever.item_vectors(items)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    direction = units[[2, 7]].mean(axis=0) - units[9]
    cosines = units @ (direction / np.linalg.norm(direction))
    cosines[[2, 7, 9]] = -np.inf
    order = np.argsort(-cosines, kind="stable")[:6]
    found = retriever.items_like([items[2], items[7]], k=6, unlike=[items[9]])
    assert ids(found) == [items[row] for row in order]
    np.testing.assert_allclose([item.score for item in found], cosines[order], atol=1e-5)


def test_examples_that_say_nothing_are_refused(retriever):
    item = retriever.items()["item_id"][0].as_py()
    with pytest.raises(ConfigError, match="at least one item"):
        retriever.items_like([])
    with pytest.raises(ConfigError, match="cancels"):
        retriever.items_like([item], unlike=[item])
    with pytest.raises(UnknownItemError):
        retriever.items_like(["no-item"])


def test_popular_items_are_those_of_the_most_training_rows(changing):
    retriever, _ = changing
    items = retriever.bundle.items
    counts = retriever.bundle.counts
    order = np.argsort(-counts, kind="stable")
    expected = [(items["item_id"][row].as_py(), float(counts[row])) for row in order.tolist()]
    assert pairs(retriever.popular_items(7)) == expected[:7]
    assert pairs(retriever.popular_items(3, deny=[expected[0][0]])) == expected[1:4]
    allowed = [expected[5][0], expected[2][0]]
    assert pairs(retriever.popular_items(allow=allowed)) == [expected[2], expected[5]]
    # A replaced item keeps its rows, a deleted one is gone, and a new one is the last.
    retriever.upsert([{"item_id": expected[1][0]}, {"item_id": "i-new"}])
    retriever.delete([expected[0][0]])
    assert sorted(pairs(retriever.popular_items(3))) == sorted(expected[1:4])
    assert ids(retriever.popular_items(len(items) + 1)).count("i-new") == 1


def test_popular_items_satisfy_conditions(retriever):
    where = [("price", "<=", 40)]
    counts = dict(zip(retriever.bundle.items["item_id"].to_pylist(), retriever.bundle.counts))
    found = retriever.popular_items(len(retriever), where=where)
    rows = retriever.items().to_pylist()
    assert set(ids(found)) == {row["item_id"] for row in rows if row["price"] <= 40}
    values = [counts[item] for item in ids(found)]
    assert values == sorted(values, reverse=True)


def test_the_newest_items_have_the_greatest_values_of_a_column(changing):
    retriever, _ = changing
    rows = {row["item_id"]: row["price"] for row in retriever.items().to_pylist()}
    greatest = max(rows.values())
    retriever.upsert([{"item_id": "i-last", "price": greatest + 1}, {"item_id": "i-none"}])
    found = retriever.newest_items(5, column="price")
    assert found[0].item_id == "i-last" and found[0].score == pytest.approx(greatest + 1)
    assert [item.score for item in found[1:]] == sorted(rows.values(), reverse=True)[:4]
    # An item without the value is none of the newest.
    assert "i-none" not in ids(retriever.newest_items(len(retriever), column="price"))


def test_the_newest_items_are_those_of_the_latest_time(retriever):
    created = sorted(retriever.items()["created"].to_pylist(), reverse=True)
    assert [item.score for item in retriever.newest_items(4)] == created[:4]


def test_a_column_that_tells_no_time_is_refused(retriever):
    with pytest.raises(ConfigError, match="did you mean 'price'"):
        retriever.newest_items(column="prise")
    with pytest.raises(ConfigError, match="neither times nor numbers"):
        retriever.newest_items(column="title")


def test_changes_of_another_process_are_followed(changing):
    writer, reader = changing
    assert reader.follow() == 0
    writer.upsert([{"item_id": "i-new", "price": 3.0}])
    gone = writer.items()["item_id"][0].as_py()
    writer.delete([gone])
    assert reader.follow() == 2 and reader.follow() == 0
    assert reader.item("i-new").display["price"] == 3.0
    assert gone not in reader.items()["item_id"].to_pylist() and len(reader) == len(writer)
    assert pa.Table.equals(reader.items().sort_by("item_id"), writer.items().sort_by("item_id"))
