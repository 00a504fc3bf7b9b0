"""What the page asks for beside lists: search, histories, columns, the map, and its files."""

import asyncio
import base64
import gc
import weakref

import numpy as np
import pyarrow as pa
import pytest

from tests.serving.asking import TOKENS, ask, make_app, post, refused
from twotower.retrieval.live.conditions import LATEST
from twotower.serving.aliases import Aliases
from twotower.serving.answers import Answers
from twotower.serving.page import lookups
from twotower.serving.page.files import POLICY
from twotower.serving.page.search import Prefixes, Texts, fold

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def app(retriever, tmp_path_factory):
    return make_app(retriever, tmp_path_factory.mktemp("events"))


def test_a_search_finds_what_a_look_at_every_text_finds_and_prefers_beginnings():
    words = ["silver", "ring", "rings", "oak", "Shelf", "crème", "سوار", "فضة", "no", "7"]
    texts = [" ".join(RNG.choice(words, 4)) for _ in range(300)]
    index = Texts(texts)
    for wanted in ("ring", "ri", "silver oak", "creme", "سوار", "ilve", "nothing", "7 no"):
        parts = fold(wanted).split()
        holds = [all(part in fold(text) for part in parts) for text in texts]
        found = index.find(wanted, len(texts))
        assert sorted(found) == np.flatnonzero(holds).tolist(), wanted
        starts = [fold(texts[row]).startswith(fold(wanted)) for row in found]
        assert starts == sorted(starts, reverse=True), wanted
    assert index.find("", 3) == [0, 1, 2] and index.find("ring", 2) == index.find("ring", 99)[:2]
    assert Texts([]).find("a", 3) == Texts([]).find("", 3) == []


def test_letters_that_people_write_one_for_the_other_are_one():
    assert fold("أحذيةٌ إلى") == fold("احذيه الي")
    assert fold("رقم ١٢") == fold("رقم 12") == fold("رقم ۱۲")
    assert fold("  CRÈME\tbrûlée ") == "creme brulee"


def test_users_are_found_by_the_beginning_of_their_id():
    users = Prefixes(["b", "a2", "a1", "c"], np.array([1, 9, 2, 5]))
    assert users.find("a", 9) == ["a1", "a2"] and users.find("a", 1) == ["a1"]
    assert users.find("", 2) == ["a2", "c"] and users.find("d", 3) == []


def test_items_are_found_by_title_and_by_id_even_where_they_came_later(copied, tmp_path):
    from twotower.retrieval.retriever import Retriever

    own = Retriever.load(copied)
    app = make_app(own, tmp_path)
    first = own.items().slice(0, 1).to_pylist()[0]
    (by_title, *_) = post(app, "search_items", text=first["title"].upper())["items"]
    assert by_title["item_id"] == first["item_id"]
    assert by_title["display"]["title"] == first["title"]
    assert post(app, "search_items", text=first["item_id"], k=1)["items"] == [by_title]
    # The most popular ones, where nothing was typed yet.
    popular = [item["item_id"] for item in post(app, "popular", k=5)["items"]]
    assert [item["item_id"] for item in post(app, "search_items", k=5)["items"]] == popular
    own.upsert([{"item_id": "brand-new", "price": 3.0, "title": "Zzyzx"}])
    own.delete([first["item_id"]])
    assert post(app, "search_items", text="brand-new")["items"][0]["display"]["title"] == "Zzyzx"
    assert by_title not in post(app, "search_items", text=first["title"])["items"]
    made = lookups.make(app.answers)
    assert made.catalogue.items == len(own) and made.titles.find("zzyzx", 1)
    refused(app, "search_items", text="x" * 201)
    refused(app, "search_items", k=51)


def test_a_user_has_features_and_a_history_with_the_latest_event_first(app, retriever):
    user = "1"
    profile = post(app, "user", user_id=user)
    past = retriever.latest_items(user, 200)
    assert [item["item_id"] for item in profile["history"]] == [item.item_id for item in past]
    assert profile["known"] and set(profile["features"]) == {"city"}
    item = retriever.items()["item_id"][0].as_py()
    event = {"event_id": "e1", "user_id": user, "item_id": item, "event": "view"}
    post(app, "events", events=[event])
    newest = post(app, "user", user_id=user)["history"][0]
    assert newest["item_id"] == item and newest["event"] == "view" and newest["timestamp"] > 1.7e9
    unknown = post(app, "user", user_id="nobody")
    assert not unknown["known"] and unknown["history"] == [] and unknown["features"] == {}
    # What the page sends back is what the server has: the list is the same.
    events = post(app, "user", user_id="2")["events"]
    assert len(events) == 8  # as many as the model reads
    assert post(app, "user", user_id=user)["events"][-1]["item_id"] == item
    for name in ("2", user):
        events = post(app, "user", user_id=name)["events"]
        brought = post(app, "retrieve", user_id=name, history=events)["items"]
        answered = post(app, "retrieve", user_id=name)["items"]
        assert [one["item_id"] for one in brought] == [one["item_id"] for one in answered]
    (found,) = post(app, "search_users", text=user, k=1)["users"]
    assert found == {"user_id": user, "events": len(past)}


def test_columns_say_what_conditions_may_ask_and_each_is_understood(app, retriever):
    catalogue = ask(app, "GET", "/v1/catalogue").json()
    assert catalogue["title"] == "title" and catalogue["has_popularity"]
    assert catalogue["reads_history"] and catalogue["users"] == len(retriever.user_rows.row_by_id)
    assert catalogue["versions"][0]["model_version"] == catalogue["model_version"]
    kinds = {column["name"]: column["kind"] for column in catalogue["columns"]}
    assert kinds["price"] == "number" and kinds["category"] == "text"
    for column in catalogue["columns"]:
        value = column["high"] if column["kind"] == "number" else column["values"][0]
        for operator in column["operators"]:
            where = [[column["name"], operator, value]]
            assert post(app, "popular", where=where)["items"] or operator == "!="


def test_columns_of_lists_times_and_flags_have_operators_of_their_own(retriever):
    columns = {
        "genres": (["list"], [["War", "Drama"], ["Drama"], []]),
        "released": (["time"], [1, 2, 3]),
        "sold": (["flag"], [True, False, True]),
    }
    for name, (kind, values) in columns.items():
        array = pa.array(values)
        if name == "released":
            array = array.cast(pa.timestamp("s"))
        column = lookups.describe_column(name, pa.chunked_array([array]), retriever.forms)
        assert [column.kind] == kind
    genres = lookups.describe_column(
        "genres", pa.chunked_array([columns["genres"][1]]), retriever.forms
    )
    assert genres.values == ["Drama", "War"] and LATEST in lookups.OPERATORS["time"]


def test_the_map_places_every_item_with_its_title(app, retriever):
    drawn = ask(app, "GET", "/v1/map").json()
    assert sorted(drawn["item_ids"]) == sorted(retriever.items()["item_id"].to_pylist())
    places = np.frombuffer(base64.b64decode(drawn["places"]), "<u2")
    assert len(places) == 2 * len(drawn["item_ids"]) and len(drawn["titles"]) == len(places) // 2
    nearest = np.frombuffer(base64.b64decode(drawn["nearest"]), "<u2").reshape(-1, drawn["count"])
    item = drawn["item_ids"][5]
    similar = retriever.similar_items(item, drawn["count"])
    assert {drawn["item_ids"][row] for row in nearest[5]} == {near.item_id for near in similar}


def test_titles_are_indexed_once_for_many_requests_and_again_for_another_bundle(
    retriever, tmp_path, monkeypatch
):
    app = make_app(retriever, tmp_path)
    calls = []
    real = lookups.make

    def make(answers):
        calls.append(answers)
        return real(answers)

    monkeypatch.setattr(lookups, "make", make)

    async def several():
        found = [app._lookups._latest() for _ in range(5)]
        await asyncio.gather(*found)

    asyncio.run(several())
    assert len(calls) == 1
    app.versions.main = type(app.answers)(retriever)
    asyncio.run(several())
    assert calls[1:] == [app.versions.main]


def test_what_was_made_of_a_version_does_not_keep_it_in_memory(retriever):
    answers = Answers(retriever)
    dropped = weakref.ref(answers)
    made = lookups.make(answers)
    del answers
    gc.collect()
    assert dropped() is None and made.catalogue.items == len(retriever)


def test_the_files_of_the_page_need_no_token_and_forbid_all_that_is_not_theirs(retriever, tmp_path):
    app = make_app(retriever, tmp_path, tokens=TOKENS)
    page = ask(app, "GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    paths = ["/"]
    for link in page.text.split('src="')[1:] + page.text.split('href="')[1:]:
        name = link.partition('"')[0]
        if not name.startswith("#"):
            paths.append(f"/{name}")
    assert len(paths) >= 6
    for path in paths:
        response = ask(app, "GET", path)
        assert response.status_code == 200, path
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "innerHTML" not in response.text and "://" not in response.text.replace(
            "http://www.w3.org/2000/svg", ""
        )
    assert "unsafe" not in POLICY and "'none'" in POLICY
    # What they show needs one.
    for path in ("/v1/map", "/v1/catalogue"):
        assert ask(app, "GET", path).status_code == 401
    assert ask(app, "POST", "/v1/user", {"user_id": "1"}).status_code == 401


def test_the_page_learns_the_names_of_a_shop(retriever, tmp_path):
    aliases = Aliases({"product_id": "item_id"}, ["item_id", "user_id"])
    app = make_app(retriever, tmp_path, aliases=aliases)
    assert ask(app, "GET", "/page/names.json").json() == {"item_id": "product_id"}
    assert "product_id" in post(app, "search_items", k=1)["items"][0]
