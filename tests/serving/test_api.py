"""The API: what it refuses and how, who may use it, and its description."""

import asyncio
import json

import jsonschema
import msgspec
import pytest

from tests.serving.asking import TOKENS, ask, make_app, post, refused
from twotower.core.errors import ConfigError
from twotower.core.times import TimeForm
from twotower.serving import types
from twotower.serving.access import Access, Right
from twotower.serving.aliases import Aliases
from twotower.serving.limits import Limits

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def app(retriever, tmp_path_factory):
    return make_app(retriever, tmp_path_factory.mktemp("events"))


@pytest.mark.parametrize(
    "name, body, field, words",
    [
        ("retrieve", {"user": "1"}, "user", "did you mean 'user_id'"),
        ("retrieve", {"k": 0}, "k", ">= 1"),
        ("retrieve", {"k": 1001}, "k", "<= 1000"),
        ("retrieve", {"k": "10"}, "k", "got str"),
        ("retrieve", {"k": 900, "offset": 101}, "offset", "1000"),
        ("retrieve", {"user_id": "1", "features": {"citty": 1}}, "features.citty", "'city'"),
        ("retrieve", {"user_id": "1", "where": [["prise", "<", 3]]}, "where", "'price'"),
        ("retrieve", {"user_id": "1", "where": {"price": {"a": 1}}}, "where", "price"),
        ("retrieve", {"history": [{"item": "P1"}]}, "history[0].item", "'item_id'"),
        ("retrieve", {"history": [{"event": "click"}]}, "history[0].item_id", "missing"),
        ("retrieve", {"user_id": "1", "deny": [1.5]}, "deny[0]", "got float"),
        ("retrieve", {"user_id": "1", "diversity": 2}, "diversity", "<= 1"),
        ("retrieve", {"user_id": "1", "columns": ["titel"]}, "columns[0]", "'title'"),
        ("retrieve", {"unlike": ["P1"]}, "unlike", "needs like"),
        ("retrieve", {"like": ["P1"], "user_id": "1"}, "user_id", "do not go together"),
        ("encode_user", {}, "", "Nothing is said"),
        ("latest", {"column": "prise"}, "column", "'price'"),
        ("match", {"pairs": []}, "pairs", ">= 1"),
        ("events", {"events": [{"user_id": "1", "item_id": "2"}]}, "events[0].event_id", "missing"),
        (
            "events",
            {"events": [{"event_id": "e", "user_id": "1", "item_id": "2", "timestamp": "soon"}]},
            "events[0].timestamp",
            "'soon'",
        ),
        (
            "events",
            {
                "events": [
                    {
                        "event_id": "e",
                        "user_id": "1",
                        "item_id": "2",
                        "timestamp": "9999-12-31T23:00:00-05:00",
                    }
                ]
            },
            "events[0].timestamp",
            "no date",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_field_value_and_cure(app, name, body, field, words):
    problem = refused(app, name, **body)
    assert problem.get("field", "") == field and words in problem["detail"], problem
    assert problem["cure"] and problem["status"] == 400
    assert "Traceback" not in json.dumps(problem) and ".py" not in json.dumps(problem)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"k": NaN}',
        b'{"k": 1e999}',
        b'{"k": ' + b"9" * 5_000 + b"}",
        b'{"user_id": "\\ud800"}',
        b'{"user_id": "\xff"}',
        b'{"user_id": "1", "where": ' + b"[" * 100_000,
        b'{"user_id": "1", "where": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"user_id": "1", "features": {"city": {"a": [1, {"b": null}]}}}',
        b'{"user_id": "1", "features": {"city": [1, "a", null]}}',
        b'{"user_id": "\\u0000"}',
    ],
)
def test_a_body_of_any_bytes_is_answered_or_refused(app, content):
    response = ask(app, "POST", "/v1/retrieve", content=content, headers=JSON)
    assert response.status_code in (200, 400), response.text
    # The server goes on.
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "where",
    [
        {"x" * 512: 1},
        [["x" * 100_000, "==", 1]],
        [["price", "x" * 100_000, 1]],
        [["price", "==", "x" * 100_000]],
        [["title", ">", ["x" * 100_000] * 9]],
        ["price == " + "x" * 100_000],
    ],
)
def test_a_refusal_is_short_whatever_it_refuses(app, where):
    problem = refused(app, "retrieve", user_id="1", where=where)
    assert problem["field"] == "where" and problem["cure"]
    assert len(json.dumps(problem)) < 3_000


def test_a_time_in_a_history_is_refused_by_the_name_of_the_request(app):
    history = [{"item_id": "P1", "timestamp": 1e300}]
    problem = refused(app, "retrieve", history=history)
    assert problem["field"] == "history" and problem["value"].startswith("[{'item_id'")
    assert problem["detail"].startswith("history: 1e+300") and "row" not in problem["detail"]


def test_what_is_no_time_is_found_by_its_first_values(app, monkeypatch):
    read = []
    whole = TimeForm.column

    def count(form, values):
        read.append(len(values))
        return whole(form, values)

    monkeypatch.setattr(TimeForm, "column", count)
    assert "neither times" in refused(app, "latest", column="title")["detail"]
    where = [["title", "latest", 3]]
    assert "neither times" in refused(app, "retrieve", user_id="1", where=where)["detail"]
    assert read and max(read) <= 8


ADMIN = {"x-api-key": TOKENS["admin"]}


@pytest.mark.parametrize("item", ["", "x" * 513, "%ff%FE", "a%80b", "%ED%A0%80"])
def test_a_path_names_an_item_or_is_refused(retriever, tmp_path, item):
    app = make_app(retriever, tmp_path, tokens=TOKENS)
    for method, body in (("DELETE", None), ("PUT", {"columns": {}})):
        response = ask(app, method, f"/v1/items/{item}", body, headers=ADMIN)
        assert response.status_code == 400 and response.json()["field"] == "item_id"
    # The letter that stands for what cannot be read is one itself.
    assert ask(app, "DELETE", "/v1/items/a%ef%BF%BD%2Fb", headers=ADMIN).status_code == 200


@pytest.mark.parametrize(
    ("columns", "field", "words"),
    [
        ({"titel": "x"}, "columns.titel", "'title'"),
        ({"price": "cheap"}, "columns.price", "not a number"),
        ({"item_id": "x"}, "columns.item_id", "not among its columns"),
    ],
)
def test_an_item_that_cannot_be_meant_is_refused_by_its_column(
    retriever, tmp_path, columns, field, words
):
    app = make_app(retriever, tmp_path, tokens=TOKENS)
    response = ask(app, "PUT", "/v1/items/x", {"columns": columns}, headers=ADMIN)
    problem = response.json()
    assert response.status_code == 400 and problem["field"] == field
    assert words in problem["detail"] and "row" not in problem["detail"]
    assert problem["value"] and "strict" not in json.dumps(problem)
    if field == "columns.price":
        items = [{"item_id": "y", "columns": {}}, {"item_id": "x", "columns": columns}]
        problem = ask(app, "PUT", "/v1/items", {"items": items}, headers=ADMIN).json()
        assert problem["field"] == f"items[1].{field}" and problem["value"] == "'cheap'"


def test_sizes_are_bounded(app):
    large = b'{"deny": [' + b" " * app.limits.body + b"]}"
    assert ask(app, "POST", "/v1/retrieve", content=large, headers=JSON).status_code == 413
    form = {"content-type": "text/plain"}
    assert ask(app, "POST", "/v1/retrieve", content=b"{}", headers=form).status_code == 415
    problem = refused(app, "retrieve", deny=["P1"] * (types.MAX_IDS + 1))
    assert problem["field"] == "deny"
    problem = refused(app, "retrieve/batch", requests=[{}] * (types.MAX_BATCH + 1))
    assert problem["field"] == "requests"
    with pytest.raises(ConfigError, match=r"limits\.waiting=0"):
        Limits(waiting=0)


def test_a_body_that_comes_too_slowly_is_cut_off(app):
    sent = []

    async def receive():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/retrieve",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    "path, needed",
    [
        ("POST /v1/retrieve", "read"),
        ("GET /v1/info", "read"),
        ("GET /metrics", "read"),
        ("POST /v1/events", "change"),
        ("POST /v1/erase_user", "change"),
        ("DELETE /v1/items/no-item", "change"),
        ("GET /healthz", None),
        ("GET /readyz", None),
    ],
)
def test_each_endpoint_asks_for_its_right(retriever, tmp_path, path, needed):
    app = make_app(retriever, tmp_path, tokens=TOKENS)
    method, path = path.split()
    body = {} if method == "POST" else None
    names = [None, *TOKENS]
    for name in names:
        headers = {} if name is None else {"x-api-key": TOKENS[name]}
        status = ask(app, method, path, body, headers=headers).status_code
        if needed is not None and names.index(name) < names.index(needed):
            assert status == (401 if name is None else 403)
        else:
            # Somebody with the right is told what is wrong with the request itself.
            assert status in (200, 400)
    wrong = {"Authorization": "Bearer nonsense"}
    assert needed is None or ask(app, method, path, body, headers=wrong).status_code == 401


def test_nobody_changes_items_where_no_token_is_set(app):
    assert ask(app, "PUT", "/v1/items/x", {"columns": {}}).status_code == 401
    assert ask(app, "DELETE", "/v1/items/x").status_code == 401


@pytest.mark.parametrize(
    "tokens, words",
    [
        ({"rite": "x" * 20}, "'read'|'write'|no right"),
        ({"read": "short"}, "openssl"),
        ([], "object"),
        ({"read": []}, "has no token"),
    ],
)
def test_tokens_that_are_none_are_refused(tmp_path, tokens, words):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(tokens))
    with pytest.raises(ConfigError, match=words):
        Access.read(str(path), {})


def test_tokens_come_from_the_environment_too():
    access = Access.read("", {"TWOTOWER_READ_TOKEN": TOKENS["read"]})
    headers = [(b"authorization", f"Bearer {TOKENS['read']}".encode())]
    assert not access.is_open(Right.READ)
    assert access.identify(headers) == (Right.READ, 0)
    with pytest.raises(ConfigError, match="shorter"):
        Access.read("", {"TWOTOWER_READ_TOKEN": ""})


def test_a_path_that_there_is_not_is_a_problem_too(app):
    for method, path, status in [("GET", "/v2", 404), ("GET", "/v1/retrieve", 405)]:
        response = ask(app, method, path)
        assert response.status_code == status and response.json()["status"] == status
    assert "access-control-allow-origin" not in ask(app, "GET", "/healthz").headers


def test_a_server_that_is_not_ready_says_why_and_when_to_come_back(retriever, tmp_path):
    app = make_app(retriever, tmp_path)
    app.status = "starting"
    response = ask(app, "POST", "/v1/retrieve", {})
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert ask(app, "GET", "/readyz").status_code == 503
    assert ask(app, "GET", "/healthz").status_code == 200


def test_a_server_whose_golden_answers_differ_is_never_ready(retriever, tmp_path, monkeypatch):
    app = make_app(retriever, tmp_path)
    app.status = "starting"
    monkeypatch.setattr(app.answers, "warm", lambda: ["user '1': item 'a' is missing"])
    asyncio.run(app.prepare())
    answer = ask(app, "GET", "/readyz")
    assert answer.status_code == 503
    assert answer.json()["differences"] == ["user '1': item 'a' is missing"]
    assert ask(app, "POST", "/v1/retrieve", {}).status_code == 503


def test_a_disk_that_refuses_is_told_without_its_path(retriever, tmp_path, monkeypatch):
    app = make_app(retriever, tmp_path)

    def refuse(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "events"))

    monkeypatch.setattr(app.writer._log, "add", refuse)
    event = {"event_id": "e", "user_id": "1", "item_id": "2"}
    problem = refused(app, "events", 503, events=[event])
    assert str(tmp_path) not in json.dumps(problem)


def test_requests_are_counted_with_their_sources(app):
    post(app, "popular", k=3)
    text = ask(app, "GET", "/metrics").text
    version = app.answers.version
    counted = f'{{endpoint="popular",status="200",version="{version}"}}'
    assert f"twotower_requests_total{counted}" in text
    counted = f'{{source="popular",version="{version}"}}'
    assert f"twotower_recommended_items_total{counted}" in text


def test_the_description_holds_all_endpoints_and_their_answers_are_as_described(app):
    described = ask(app, "GET", "/v1/openapi.json").json()
    assert described["openapi"] == "3.1.0" and "/v1/items/{item_id}" in described["paths"]
    for name, body in [("retrieve", {"user_id": "1"}), ("encode_user", {"user_id": "1"})]:
        operation = described["paths"][f"/v1/{name}"]["post"]
        schemas = {"components": described["components"]}
        asked = operation["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(body, asked | schemas)
        answered = operation["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(post(app, name, **body), answered | schemas)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"kk": 1}, asked | schemas)


def test_names_of_columns_users_and_versions_are_no_fields_of_the_api():
    aliases = Aliases({"kind": "event", "product": "item_id"}, types.field_names())
    put = {"items": [{"product": "1", "columns": {"kind": "chair", "product": "x"}}]}
    ours = aliases.to_ours(put)
    assert ours == {"items": [{"item_id": "1", "columns": put["items"][0]["columns"]}]}
    assert aliases.to_theirs(ours) == put
    for field in ("max_per", "weights", "overrides", "refused"):
        body = {field: {"kind": 1}}
        assert aliases.to_ours(body) == body
        assert aliases.to_theirs({field: {"event": 1}}) == {field: {"event": 1}}


def test_a_shop_keeps_the_names_of_its_own_api(retriever, tmp_path):
    names = {"buyer_id": "user_id", "recent_interactions": "history", "product_id": "item_id"}
    aliases = Aliases(names, {*types.field_names(), "city"})
    app = make_app(retriever, tmp_path, aliases=aliases)
    clicks = retriever.bundle.items["item_id"].to_pylist()[:3]
    history = [{"product_id": click} for click in clicks]
    answer = post(app, "retrieve", buyer_id="nobody", recent_interactions=history, k=2)
    expected = retriever.recommend(rows=[{"history": clicks}], k=2)
    assert [item["product_id"] for item in answer["items"]] == [item.item_id for item in expected]
    assert post(app, "similar_items", product_id=clicks[0], k=1)["items"]
    problem = refused(app, "retrieve", buyer_id=1.5)
    assert problem["field"] == "buyer_id"
    assert refused(app, "retrieve", buyer_id="1", user_id="2")["field"] == "buyer_id"
    described = ask(app, "GET", "/v1/openapi.json").json()
    assert "buyer_id" in described["components"]["schemas"]["Retrieve"]["properties"]


@pytest.mark.parametrize(
    "names, words",
    [({"buyer": "userid"}, "did you mean 'user_id'"), ({"item_id": "user_id"}, "a field already")],
)
def test_names_that_mean_nothing_are_refused(names, words):
    with pytest.raises(ConfigError, match=words):
        Aliases(names, types.field_names())


def test_types_can_be_written_and_read_again():
    request = types.Retrieve(user_id="1", history=["a", types.Event(item_id="b", event="click")])
    assert msgspec.json.decode(msgspec.json.encode(request), type=types.Retrieve) == request
