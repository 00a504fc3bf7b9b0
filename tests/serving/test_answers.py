"""Answers of the API: what `Retriever` answers, whatever is asked and however."""

import asyncio
import functools
import json
import time
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks.fuzz_api import InProcess
from tests.serving.asking import ask, make_app, post, refused, reply_together, watch_tower
from twotower.core.errors import QueryError
from twotower.serving import types
from twotower.serving.answers import Answers
from twotower.serving.errors import RequestError
from twotower.serving.events import MAX_EVENTS_OF_USER, EventLog, LiveHistories, StoredEvent
from twotower.serving.writer import Writer

REQUESTS = 1_000


@pytest.fixture(scope="module")
def app(retriever, tmp_path_factory):
    return make_app(retriever, tmp_path_factory.mktemp("events"))


WHERES = [
    {"category": "heels"},
    [["price", "<=", 90]],
    {"brand": ["Zahra", "Mirsal"]},
    [["title", "starts with", "Z"], ["created", "latest", 60]],
]


class Draw:
    """Requests of any kind: the endpoint, the body, and the call that answers the same."""

    kinds = ("known", "history", "row", "features", "like", "similar", "popular", "latest")
    lengths = (1, 30)  # of a list, the second one excluded

    def __init__(self, retriever):
        self.retriever = retriever
        self.rng = np.random.default_rng(0)
        self.users = retriever.bundle.users["user_id"].to_pylist()
        self.items = retriever.bundle.items["item_id"].to_pylist()

    def __call__(self, number):
        name, body, call, filters, offset = getattr(self, self.kinds[number % len(self.kinds)])()
        k = int(self.rng.integers(*self.lengths))
        if "diversity" in body and offset:
            # A page is of the order of one window, the retriever's of one for each length.
            body["window"] = 5 * (k + offset)
        return name, body | filters | {"k": k, "offset": offset}, lambda: call(k + offset)

    def some(self, count):
        return self.rng.choice(self.items, count, replace=False).tolist()

    def filters(self):
        drawn = {"deny": self.some(5), "allow": self.some(40)}
        drawn["where"] = WHERES[self.rng.integers(len(WHERES))]
        return {name: value for name, value in drawn.items() if self.rng.random() < 0.3}

    def listed(self, name, body, function):
        filters = self.filters()
        offset = int(self.rng.choice([0, 0, 3]))
        return name, body, lambda k: function(k=k, **filters), filters, offset

    def recommended(self, body, user=None, rows=None):
        options: dict[str, Any] = {"exclude_seen": bool(self.rng.random() < 0.8)}
        if self.rng.random() < 0.3:
            options["popularity_weight"] = float(self.rng.normal())
        rerank = {}
        if self.rng.random() < 0.2:
            rerank["diversity"] = 0.4
        rerank_of_call = "mmr:diversity=0.4" if rerank else None
        recommend = functools.partial(
            self.retriever.recommend, user, rows=rows, rerank=rerank_of_call, **options
        )
        return self.listed("retrieve", body | options | rerank, recommend)

    def known(self):
        user = str(self.rng.choice(self.users))
        return self.recommended({"user_id": user}, user)

    def history(self):
        history = [{"item_id": item, "event": "purchase"} for item in self.some(4)]
        return self.recommended({"history": history}, rows=[{"history": history}])

    def row(self):
        user = str(self.rng.choice(self.users))
        history = self.some(4)
        rows = [{"city": "Cairo", "history": history}]
        body = {"user_id": user, "features": {"city": "Cairo"}, "history": history}
        return self.recommended(body, user, rows)

    def features(self):
        user = str(self.rng.choice(self.users))
        stored = self.retriever.user_rows.take([user])["history"][0].as_py()
        rows = [{"city": "Cairo", "history": stored}]
        return self.recommended({"user_id": user, "features": {"city": "Cairo"}}, user, rows)

    def like(self):
        liked = self.some(2)
        unlike = self.some(1)
        call = functools.partial(self.retriever.items_like, liked, unlike=unlike)
        return self.listed("retrieve", {"like": liked, "unlike": unlike}, call)

    def similar(self):
        (item,) = self.some(1)
        call = functools.partial(self.retriever.similar_items, item)
        return self.listed("similar_items", {"item_id": item}, call)

    def popular(self):
        return self.listed("popular", {}, self.retriever.popular_items)

    def latest(self):
        return self.listed("latest", {}, self.retriever.newest_items)


def assert_equal_lists(body, written, call):
    expected = call()[body["offset"] :]
    found = json.loads(written)["items"]
    assert [item["item_id"] for item in found] == [item.item_id for item in expected], body
    np.testing.assert_allclose(
        [item["score"] for item in found], [item.score for item in expected], rtol=1e-5
    )
    assert [item["display"] for item in found] == [item.display for item in expected]


def test_answers_to_random_requests_are_those_of_the_retriever(app, retriever):
    draw = Draw(retriever)
    drawn = [draw(number) for number in range(REQUESTS)]

    server = InProcess(app)
    for name, body, call in drawn:
        response = server.send("POST", f"/v1/{name}", json.dumps(body).encode())
        assert response.status == 200, (body, response.body)
        assert_equal_lists(body, response.body, call)


def test_answers_that_are_made_together_are_those_of_the_retriever(retriever, tmp_path):
    draw = Draw(retriever)
    # Of fewer kinds and lengths, so that some of those beside one another ask alike.
    draw.kinds = ("known", "known", "history", "row", "like")
    draw.lengths = (8, 9)
    app = make_app(retriever, tmp_path)
    app.answers.max_together = 64
    for _ in range(8):
        drawn = [draw(number) for number in range(50)]
        replies, _ = reply_together(app, [body for _, body, _ in drawn])
        for (_, body, call), reply in zip(drawn, replies):
            assert reply.status == 200, (body, reply.body)
            assert_equal_lists(body, reply.body, call)


def test_a_cold_user_with_three_clicks_is_answered_by_those_alone(app, retriever):
    clicks = retriever.bundle.items["item_id"].to_pylist()[3:6]
    answer = post(app, "retrieve", user_id="nobody", history=clicks, k=5)
    expected = retriever.recommend("nobody", rows=[{"history": clicks}], k=5)
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in expected]
    assert {item["source"] for item in answer["items"]} == {"model"} and not answer["known"]
    other = retriever.bundle.items["item_id"].to_pylist()[9:12]
    assert answer["items"] != post(app, "retrieve", history=other, k=5)["items"]


@pytest.mark.parametrize("body", [{}, {"user_id": "nobody"}, {"history": ["no-item", "nor-this"]}])
def test_somebody_of_whom_nothing_is_known_gets_the_popular_items(app, retriever, body):
    answer = post(app, "retrieve", k=3, **body)
    expected = [item.item_id for item in retriever.popular_items(3)]
    assert [item["item_id"] for item in answer["items"]] == expected
    assert {item["source"] for item in answer["items"]} == {"popular"} and not answer["known"]


def test_events_are_used_by_the_next_request_and_count_once(retriever, tmp_path):
    app = make_app(retriever, tmp_path)
    user = retriever.bundle.users["user_id"][2].as_py()
    before = post(app, "retrieve", user_id=user, k=5)["items"]
    clicked = before[0]["item_id"]
    event = {"event_id": "e-1", "user_id": user, "item_id": clicked, "event": "purchase"}
    assert post(app, "events", events=[event, event]) == {"accepted": 1, "duplicates": 1}
    after = post(app, "retrieve", user_id=user, k=5)["items"]
    assert clicked not in [item["item_id"] for item in after]
    expected = retriever.recommend(user, events=[{"item_id": clicked}], k=5)
    assert [item["item_id"] for item in after] == [item.item_id for item in expected]
    assert post(app, "events", events=[event]) == {"accepted": 0, "duplicates": 1}
    vector = post(app, "encode_user", user_id=user)["vector"]
    np.testing.assert_allclose(
        vector, retriever.encode_user(user, events=[clicked]), rtol=1e-4, atol=1e-6
    )
    # Whoever opens the file next has them too.
    again = make_app(retriever, tmp_path)
    asyncio.run(again.writer.follow())
    assert post(again, "retrieve", user_id=user, k=5)["items"] == after


def test_events_of_another_process_are_followed(retriever, tmp_path):
    one = EventLog(tmp_path / "events")
    other = EventLog(tmp_path / "events")
    event = StoredEvent("e", "u", "i", None, 5)
    assert one.add([[event], [event, event._replace(event_id="f")]]) == [1, 1]
    assert [stored.event_id for stored in other.read_new()] == ["e", "f"]
    assert other.read_new() == [] and other.add([[event]]) == [0]


def test_an_event_that_comes_while_a_list_is_made_is_in_the_next(retriever, monkeypatch):
    """As where lists are made in threads."""
    answers = Answers(retriever)
    items = retriever.items()["item_id"].to_pylist()
    read = answers.histories.of
    moment = int(time.time())

    def add(number):
        answers.histories.add([StoredEvent(str(number), "u", items[number], None, moment)])

    def of(user):
        events = read(user)
        add(9)
        monkeypatch.undo()
        return events

    def listed():
        answer = answers.retrieve(types.Retrieve(user_id="u", k=5))
        return [item.item_id for item in answer.items]

    add(3)
    monkeypatch.setattr(answers.histories, "of", of)
    before = listed()
    expected = retriever.recommend("u", events=[items[3], items[9]], k=5)
    assert listed() == [item.item_id for item in expected] != before
    assert answers.cache.hits == 0 and listed() and answers.cache.hits == 1


def test_events_that_the_model_was_made_of_are_not_counted_again():
    histories = LiveHistories(since=100)
    histories.add([StoredEvent(str(time), "u", "i", None, time) for time in (99, 100, 101)])
    assert [event["timestamp"] for event in histories.of("u")] == [101] and len(histories) == 1


def test_the_events_of_a_user_are_bounded():
    histories = LiveHistories()
    many = [StoredEvent(str(n), "u", str(n), None, n) for n in range(1, 2 * MAX_EVENTS_OF_USER)]
    histories.add(many)
    items = [event["item_id"] for event in histories.of("u")]
    assert len(items) == len(histories) == MAX_EVENTS_OF_USER and items[-1] == many[-1].item_id


def test_more_changes_than_may_wait_are_refused_and_come_back_later(app, tmp_path):
    writer = Writer(app.versions, EventLog(tmp_path / "more"), limit=2)

    async def send_three():
        sent = [writer.add_events([StoredEvent(str(n), "u", "i", None, 1)]) for n in range(3)]
        return await asyncio.gather(*sent, return_exceptions=True)

    *answered, refusal = asyncio.run(send_three())
    assert answered == [1, 1] and isinstance(refusal, RequestError)
    assert refusal.status == 429 and refusal.retry_after > 0
    assert writer.waiting == 0


def test_a_request_that_is_cancelled_leaves_those_that_wait_with_it(app, tmp_path):
    writer = Writer(app.versions, EventLog(tmp_path / "more"), limit=9)

    async def cancel_the_first():
        events = [StoredEvent(str(number), "u", "i", None, 1) for number in range(2)]
        tasks = [asyncio.create_task(writer.add_events([event])) for event in events]
        await asyncio.sleep(0)
        tasks[0].cancel()
        accepted = await asyncio.wait_for(tasks[1], 0.5)
        await writer.close()
        return accepted

    assert asyncio.run(cancel_the_first()) == 1


def test_a_model_without_a_vector_for_strangers_gets_ready_all_the_same(retriever, monkeypatch):
    def refuse(*words, **options):
        raise QueryError("the query is zero")

    for name in ("recommend", "similar_items"):
        monkeypatch.setattr(retriever, name, refuse)
    assert Answers(retriever).warm() == []


def test_scores_of_pairs_are_products_of_their_vectors(app, retriever):
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    items = retriever.bundle.items["item_id"].to_pylist()[:3]
    pairs = [{"user_id": user, "item_id": item} for user, item in zip(users, items)]
    expected = (retriever.embed_users(users) * retriever.item_vectors(items)).sum(axis=1)
    np.testing.assert_allclose(post(app, "match", pairs=pairs)["scores"], expected, rtol=1e-5)
    problem = refused(app, "match", 404, pairs=[*pairs, {"user_id": "x", "item_id": items[0]}])
    assert problem["field"] == "pairs[3].user_id"


def assert_alike(answers, alone):
    assert len(answers) == len(alone)
    for answer, items in zip(answers, alone):
        scores = [item["score"] for item in items]
        # The last bits are those of a product of matrices.
        assert [item["score"] for item in answer["items"]] == pytest.approx(scores, rel=1e-6)
        same = [item | {"score": score} for item, score in zip(answer["items"], scores)]
        assert same == items


def test_a_batch_answers_each_of_its_requests_or_none(app, retriever):
    users = retriever.bundle.users["user_id"].to_pylist()[:2]
    requests = [{"user_id": user, "k": 3} for user in users]
    answers = post(app, "retrieve/batch", requests=requests)["answers"]
    alone = [post(app, "retrieve", **request)["items"] for request in requests]
    assert_alike(answers, alone)
    ids = {answer["recommendation_id"] for answer in answers}
    assert len(ids) == 2
    problem = refused(app, "retrieve/batch", requests=[*requests, {"columns": ["pricee"]}])
    assert problem["field"] == "requests[2].columns[0]" and "'price'" in problem["detail"]
    # More than are made together, the first that is refused far behind.
    many = [requests[number % 2] for number in range(40)]
    answers = post(app, "retrieve/batch", requests=many)["answers"]
    assert_alike(answers, 20 * alone)
    wrong = {**requests[0], "columns": ["pricee"]}
    problem = refused(app, "retrieve/batch", requests=[*many[:35], wrong, wrong])
    assert problem["field"] == "requests[35].columns[0]"


def test_the_tower_encodes_those_of_a_batch_who_ask_alike_together(
    retriever, tmp_path, monkeypatch
):
    sizes = watch_tower(retriever, monkeypatch)
    app = make_app(retriever, tmp_path)
    app.answers.max_together = 64
    items = retriever.bundle.items["item_id"].to_pylist()
    requests = [{"history": items[first : first + 3]} for first in range(20)]
    assert len(post(app, "retrieve/batch", requests=requests)["answers"]) == 20
    assert sizes == [16, 4]


def test_items_are_changed_with_a_token_and_shown_by_the_next_answer(copied, tmp_path):
    from twotower.retrieval.retriever import Retriever

    retriever = Retriever.load(copied)
    app = make_app(retriever, tmp_path, tokens={"change": "a token for changes"})
    headers = {"Authorization": "Bearer a token for changes"}
    best = retriever.items()["item_id"][0].as_py()
    item = "a lamp/новая"
    path = "/v1/items/a%20lamp%2F%D0%BD%D0%BE%D0%B2%D0%B0%D1%8F"
    body = {"columns": {"title": "A lamp", "price": 3.5}}
    assert ask(app, "PUT", path, body).status_code == 401
    changed = ask(app, "PUT", path, body, headers=headers).json()
    assert changed["changed"] == 1 and changed["items"] == len(retriever) == 152
    assert retriever.item(item).display["price"] == 3.5
    similar = post(app, "similar_items", item_id=item, k=1, columns=["price"])
    assert similar["items"][0]["source"] == "similar"
    assert ask(app, "DELETE", f"/v1/items/{best}", headers=headers).json()["changed"] == 1
    assert ask(app, "DELETE", f"/v1/items/{best}", headers=headers).json()["changed"] == 0
    problem = refused(app, "similar_items", 404, item_id=best)
    assert problem["field"] == "item_id" and problem["value"] == repr(best)
    many = {"items": [{"item_id": "n1"}, {"item_id": "n2", "columns": {"price": "dear"}}]}
    response = ask(app, "PUT", "/v1/items", many, headers=headers)
    assert response.status_code == 400 and "price" in response.json()["detail"]
    assert not retriever.has_item("n1")
