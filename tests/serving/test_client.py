"""The clients: what they send and give back, when they come again, and what they raise."""

import asyncio
import inspect
import json

import httpx
import pytest

from tests.serving.asking import TOKENS, make_app
from twotower.core.errors import ConfigError
from twotower.serving import types
from twotower.serving.client import (
    ONCE,
    AsyncClient,
    Client,
    Endpoint,
    Endpoints,
    Refused,
    Retries,
    Unreachable,
)

SOON = Retries(count=3, pause=0.0)


def served_by(answers, **options):
    """A client, and the requests that it sent to a server of these answers, one after another."""
    sent = []
    left = list(answers)

    def answer(request):
        sent.append(request)
        made = left.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    options.setdefault("retries", SOON)
    # Without certificates, which take longer to read than all answers.
    transport = httpx.MockTransport(answer)
    return Client("http://shop", transport=transport, verify=False, **options), sent


def accepted():
    return httpx.Response(200, json={"accepted": 1, "duplicates": 0})


def busy(status=503, **headers):
    problem = {"title": "Busy", "status": status, "detail": "Too many requests are waiting."}
    return httpx.Response(status, json=problem, headers=headers)


EVENT = {"event_id": "e", "user_id": "u", "item_id": "i"}


def test_calls_are_answered_by_the_server_in_its_types(retriever, tmp_path):
    app = make_app(retriever, tmp_path, tokens=TOKENS)
    transport = httpx.ASGITransport(app=app)

    async def ask_all():
        options = {"token": TOKENS["change"], "transport": transport, "verify": False}
        async with AsyncClient("http://shop", **options) as client:
            user = retriever.bundle.users["user_id"][0].as_py()
            one = await client.retrieve(types.Retrieve(user_id=user, k=3))
            same = await client.retrieve(user_id=user, k=3)
            batch = await client.popular_batch(requests=[{"k": 2}])
            vector = await client.encode_user(user_id=user)
            accepted = await client.events(events=[EVENT])
            gone = await client.delete_item("no/such item")
            info = await client.info()
            return one, same, batch, vector, accepted, gone, info

    one, same, batch, vector, accepted, gone, info = asyncio.run(ask_all())
    user = retriever.bundle.users["user_id"][0].as_py()
    expected = [(item.item_id, item.score) for item in retriever.recommend(user, k=3)]
    found = [(item.item_id, item.score) for item in one.items]
    assert [item for item, _ in found] == [item for item, _ in expected]
    assert [item.item_id for item in same.items] == [item for item, _ in expected]
    assert isinstance(one, types.Answer) and len(batch.answers[0].items) == 2
    assert len(vector.vector) == info.dim and info.items == len(retriever)
    assert accepted == types.Accepted(1, 0) and gone.changed == 0


def test_what_the_server_refuses_is_raised_with_field_value_and_cure(retriever, tmp_path):
    transport = httpx.ASGITransport(app=make_app(retriever, tmp_path))

    async def ask():
        async with AsyncClient("http://shop", transport=transport, verify=False) as client:
            await client.retrieve(user_id="1", where=[["prise", "<", 3]])

    with pytest.raises(Refused, match="did you mean 'price'") as raised:
        asyncio.run(ask())
    error = raised.value
    assert error.status == 400 and error.field == "where" and "prise" in error.value and error.cure


def test_what_is_no_request_is_refused_before_it_is_sent():
    client, sent = served_by([])
    with pytest.raises(ConfigError, match="POST /v1/retrieve: .*kk"):
        client.retrieve(kk=3)
    assert not sent


@pytest.mark.parametrize(
    "first", [busy(), busy(429), httpx.ConnectError("no"), httpx.ReadTimeout("slow")]
)
def test_a_server_that_may_answer_later_is_asked_again(first):
    client, sent = served_by([first, first, accepted()])
    assert client.events(events=[EVENT]).accepted == 1
    assert len(sent) == 3
    assert {request.content for request in sent} == {sent[0].content}
    assert json.loads(sent[0].content)["events"][0]["event_id"] == "e"


def test_a_server_is_not_asked_for_ever():
    client, sent = served_by([busy()] * 4)
    with pytest.raises(Refused, match="Too many requests") as raised:
        client.popular()
    assert raised.value.status == 503 and len(sent) == 4
    client, sent = served_by([httpx.ConnectError("refused")] * 4)
    with pytest.raises(Unreachable, match="asked 4 times: ConnectError: refused"):
        client.popular()
    client, sent = served_by([busy()], retries=ONCE)
    with pytest.raises(Refused):
        client.popular()
    assert len(sent) == 1


def test_a_refusal_and_a_step_back_are_sent_once():
    client, sent = served_by([busy(400)])
    with pytest.raises(Refused):
        client.popular()
    client, sent = served_by([busy()])
    with pytest.raises(Refused):
        client.roll_back()
    client, sent = served_by([httpx.ReadError("gone")])
    with pytest.raises(Unreachable):
        client.roll_back()
    assert len(sent) == 1


def test_pauses_double_and_wait_as_long_as_the_server_says():
    retries = Retries(pause=0.5)
    error = httpx.ConnectError("no")
    for number, longest in [(1, 0.5), (2, 1.0), (4, 4.0), (20, 30.0)]:
        pauses = [retries.pause_before(number, error) for _ in range(200)]
        assert 0 <= min(pauses) and longest / 2 < max(pauses) <= longest
    told = retries.pause_before(1, busy(**{"retry-after": "7"}))
    assert 7 <= told <= 7.5
    assert retries.pause_before(1, busy(**{"retry-after": "Wed, 21 Oct"})) <= 0.5


def test_what_a_proxy_answers_is_raised_too():
    client, _ = served_by([httpx.Response(502, text="<html>Bad Gateway</html>")])
    with pytest.raises(Refused, match="502 Bad Gateway") as raised:
        client.popular()
    assert raised.value.status == 502


def test_a_token_is_sent_and_every_endpoint_has_its_call(retriever, tmp_path):
    client, sent = served_by([accepted()], token="a token for changes")
    with client:
        client.events(events=[EVENT])
    assert sent[0].headers["authorization"] == "Bearer a token for changes"
    app = make_app(retriever, tmp_path)
    served = {(endpoint.method, endpoint.path): endpoint for endpoint in app.endpoints}
    calls = [call for _, call in inspect.getmembers(Endpoints) if isinstance(call, Endpoint)]
    reached = set()
    for call in calls:
        endpoint = served[call._method, call._path]
        assert endpoint.answer is call._answer
        assert (endpoint.request or types.Request) is call._request
        reached.add(call._path)
    # A deletion has a function of its own, and the page looks things up for people.
    apart = {"/v1/items/{item_id}", "/v1/openapi.json", "/v1/user", "/v1/map", "/v1/catalogue"}
    apart |= {"/v1/search_items", "/v1/search_users"}
    assert {path for _, path in served if path.startswith("/v1/")} - reached == apart
