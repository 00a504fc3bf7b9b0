"""A router and its shards: what they say to each other, and both as processes."""

import asyncio
import dataclasses
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from tests.retrieval.runs import make_run
from tests.serving.asking import ask, make_app, send
from tests.serving.conftest import FEATURES
from tests.serving.test_process import Server
from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError
from twotower.data.operators import Members
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.shards.remote import ShardQuery
from twotower.serving import types as types_of_api
from twotower.serving.answers import Answers
from twotower.serving.errors import TOO_MANY_CONNECTIONS, TOO_MANY_REQUESTS, RequestError
from twotower.serving.shards import types
from twotower.serving.shards.app import read_access
from twotower.serving.shards.router import Router


def sent(query, dim=3, size=10):
    """What arrives of a search."""
    message = msgspec.json.decode(types.encode(types.write_query("v", query)), type=types.Search)
    return types.read_query(message, dim, size)


def test_a_search_arrives_as_it_was_sent():
    rng = np.random.default_rng(0)
    where = (
        ("price", "<=", np.float32(2.5)),
        ("brand", "in", ("a", None, True, 3)),
        ("genres", "contains", Members(("x", "y"), "|")),
    )
    query = ShardQuery(
        rng.normal(size=(2, 3)).astype(np.float32),
        7,
        Ragged.from_pairs(np.array([1, 1]), np.array([9, 0]), num_rows=2),
        where,
        np.array([4, 2]),
        cosine=True,
    )
    found = sent(query)
    np.testing.assert_array_equal(found.queries, query.queries)
    np.testing.assert_array_equal(found.exclude.offsets, query.exclude.offsets)
    np.testing.assert_array_equal(found.exclude.values, query.exclude.values)
    assert found.only.tolist() == [4, 2] and found.cosine and found.k == 7
    assert found.where == where and hash(found.where)
    assert sent(dataclasses.replace(query, only=None, where=())).only is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queries", b"1234"),
        ("queries", b"12345"),
        ("offsets", np.array([0, 2], "<i8").tobytes()),
        ("offsets", np.array([1, 1], "<i8").tobytes()),
        ("exclude", np.array([10], "<i4").tobytes()),
        ("only", np.array([-1], "<i4").tobytes()),
    ],
)
def test_a_search_that_does_not_go_together_is_refused_by_its_field(field, value):
    query = ShardQuery(np.ones((1, 3), np.float32), 1, Ragged.empty(1))
    message = types.write_query("v", query)
    setattr(message, field, value)
    with pytest.raises(RequestError, match=f"^{field}") as refusal:
        types.read_query(message, 3, 10)
    assert refusal.value.status == 400 and refusal.value.field == field


def test_who_may_ask_a_shard():
    assert read_access("127.0.0.1", {}).clients == 1
    assert read_access("0.0.0.0", {"TWOTOWER_SHARD_TOKEN": 16 * "a"}).clients == 2
    with pytest.raises(ConfigError, match="--host=0.0.0.0 --shard: .*SHARD_TOKEN is not set"):
        read_access("0.0.0.0", {})
    with pytest.raises(ConfigError, match="^TWOTOWER_SHARD_TOKEN is shorter than 16"):
        read_access("127.0.0.1", {"TWOTOWER_SHARD_TOKEN": "a"})


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:80", "https://a", "http://a/b", "http://a:99999", "http://b:c@a", "http://a?b"],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="--shard_urls: '"):
        Router([url], seconds=1)


class Stub(BaseHTTPRequestHandler):
    """A shard that says what its server holds, and may be silent."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.tokens.add(self.headers.get("authorization"))
        if self.path == "/v1/shard/search":
            self.server.silence.wait(20)
        status, body = self.server.answers[self.path]
        content = msgspec.json.encode(body)
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    server.tokens = set()
    server.silence = threading.Event()
    server.silence.set()
    lists = types.FoundItems(np.float32([2, 1]).tobytes(), np.int32([3, 0]).tobytes())
    server.answers = {
        "/v1/shard/info": (200, types.ShardInfo("v", 0, 1, 4)),
        "/v1/shard/search": (200, lists),
    }
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()
    thread.join()


def search(router):
    with router.watch() as missed:
        found = router.search([ShardQuery(np.ones((1, 3), np.float32), 2, Ragged.empty(1))])
    assert not missed
    return [list(map(np.ndarray.tolist, lists)) for lists in found]


def test_a_shard_that_is_silent_wrong_or_gone_is_missing_until_it_is_found_again(stub):
    url = f"http://127.0.0.1:{stub.server_port}"
    router = Router([url], seconds=0.2, token="a token of shards")
    told = []
    router.report = lambda number, why: told.append(why)
    router.expect("v", 1)
    assert router.missing == [0] and router.look() == []
    for _ in range(2):
        assert search(router) == [[[[2.0, 1.0]], [[3, 0]]]]
    assert stub.tokens == {"Bearer a token of shards"}

    stub.silence.clear()
    for _ in range(2):  # the second time it is not asked
        with pytest.raises(RequestError, match="missing: 0"):
            search(router)
    assert told == ["late"] and router.missing == [0]
    stub.silence.set()
    assert router.look() == [] and len(search(router)) == 1

    problem = {"title": "", "status": 409, "detail": "Another version."}
    right = stub.answers["/v1/shard/search"]
    stub.answers["/v1/shard/search"] = 409, problem
    with pytest.raises(RequestError):
        search(router)
    assert told == ["late", "version"]
    stub.answers["/v1/shard/search"] = 400, problem | {"detail": "where: no column."}
    router.look()
    with pytest.raises(ConfigError, match="where: no column"):
        search(router)
    # What is wrong with a request says nothing of the shard.
    assert router.missing == []
    stub.answers["/v1/shard/search"] = right
    stub.answers["/v1/shard/info"] = 200, types.ShardInfo("w", 0, 1, 4)
    assert router.look() == [0]
    with pytest.raises(ConfigError, match="names 1 shards, and the bundle has 2"):
        router.expect("v", 2)
    router = Router([url, "http://127.0.0.1:9"], seconds=5)
    router.expect("w", 2)
    assert router.look() == [0, 1]


@pytest.mark.parametrize(
    ("status", "detail"),
    [(503, TOO_MANY_REQUESTS), (503, TOO_MANY_CONNECTIONS), (429, "Too many.")],
)
def test_a_shard_with_too_many_requests_is_missing_from_one_answer_alone(stub, status, detail):
    url = f"http://127.0.0.1:{stub.server_port}"
    router = Router([url], seconds=5)
    router.expect("v", 1)
    told = []
    router.report = lambda number, why: told.append(why)
    router.look()
    right = dict(stub.answers)
    for path in right:
        stub.answers[path] = status, {"title": "", "status": status, "detail": detail}
    with pytest.raises(RequestError, match="missing: 0") as refusal:
        search(router)
    assert refusal.value.status == 503 and refusal.value.retry_after == 1
    # A look that is refused so says nothing new either.
    assert told == ["busy"] and router.look() == []
    with router.watch() as missed, pytest.raises(RequestError):
        router.search([ShardQuery(np.ones((1, 3), np.float32), 2, Ragged.empty(1))])
    assert missed == {0}
    stub.answers.update(right)
    assert len(search(router)) == 1
    stub.answers["/v1/shard/info"] = 503, {"title": "", "status": 503, "detail": "Not ready."}
    assert router.look() == [0]


@pytest.mark.parametrize("batch", ["", "/batch"])
def test_a_router_answers_others_while_it_waits_for_shards(retriever, tmp_path, monkeypatch, batch):
    # Each waits until the other one waits too.
    together = threading.Barrier(2)

    def waiting(answers, request):
        together.wait(10)
        return types_of_api.Answer("", answers.version, [])

    monkeypatch.setattr(Answers, "retrieve", waiting)
    app = make_app(retriever, tmp_path, router=Router(["http://127.0.0.1:9"], seconds=1))
    body = {"requests": [{}]} if batch else {}

    async def both():
        requests = [send(app, "POST", f"/v1/retrieve{batch}", body) for _ in range(2)]
        return await asyncio.gather(*requests)

    assert [response.status_code for response in asyncio.run(both())] == [200, 200]


@pytest.mark.parametrize(
    ("scores", "rows"),
    [
        (b"12345", b"1"),
        (np.float32([2, 1]), np.int32([3])),
        (np.float32([2, np.nan]), np.int32([3, 0])),
        (np.float32([2, 1]), np.int32([4, 0])),
        (np.float32([2, 1]), np.int32([-2, 0])),
    ],
    ids=["bytes", "lengths", "nan", "beyond", "negative"],
)
def test_a_shard_whose_lists_are_none_is_left_out(stub, scores, rows):
    router = Router([f"http://127.0.0.1:{stub.server_port}"], seconds=5)
    router.expect("v", 1)
    router.look()
    stub.answers["/v1/shard/search"] = 200, types.FoundItems(bytes(scores), bytes(rows))
    with pytest.raises(RequestError, match="missing: 0"):
        search(router)
    assert router.missing == [0]


def test_vectors_that_are_not_those_asked_for_are_no_answer(stub):
    router = Router([f"http://127.0.0.1:{stub.server_port}"], seconds=5)
    router.expect("v", 1)
    router.look()
    sent = np.ones((2, 2), np.float32)
    stub.answers["/v1/shard/vectors"] = 200, types.FoundVectors(sent.tobytes())
    np.testing.assert_array_equal(router.vectors([np.array([0, 3])])[0], sent)
    with pytest.raises(RequestError, match="missing: 0"):
        router.vectors([np.array([0, 1, 3])])


@pytest.mark.parametrize("token", ["a secret of shards\n", "ein Schlüssel hier"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token):
    with pytest.raises(ConfigError, match="^TWOTOWER_SHARD_TOKEN has") as refusal:
        Router(["http://127.0.0.1:9"], seconds=1, token=token)
    assert token.strip() not in str(refusal.value)


def test_an_answer_that_comes_when_the_time_is_up_is_late(stub):
    router = Router([f"http://127.0.0.1:{stub.server_port}"], seconds=1e-9)
    router.expect("v", 1)
    told = []
    router.report = lambda number, why: told.append(why)
    assert router.look() == []
    with pytest.raises(RequestError, match="missing: 0"):
        search(router)
    assert told == ["late"]
    # Before it is ready, a router waits for longer.
    assert router.complete(lambda: search(router)) == [[[[2.0, 1.0]], [[3, 0]]]]


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("divided"), features=FEATURES)
    export(run, run.workdir / "bundle", shards=2)
    return run.workdir / "bundle"


@pytest.fixture
def serve(divided):
    """Starts `twotower serve` with flags; what still runs at the end is killed."""
    servers = []

    def start(*flags, **options):
        servers.append(Server(divided, *flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.mark.slow
def test_two_processes_with_a_shard_each_answer_as_one_index_does(
    divided, serve, tmp_path, monkeypatch
):
    token = "a token for shards"
    monkeypatch.setenv("TWOTOWER_SHARD_TOKEN", token)
    shards = [serve(f"--shard={number}", token=token) for number in (0, 1)]
    urls = ",".join(f"http://127.0.0.1:{shard.port}" for shard in shards)
    server = serve(f"--shard_urls={urls}", "--shard_ms=30000")
    retriever = Retriever.load(divided)
    whole = make_app(retriever, tmp_path)
    users = retriever.bundle.users["user_id"][:30].to_pylist()
    item, category = (retriever.items()[name][5].as_py() for name in ("item_id", "category"))

    def answer(path, **body):
        status, answer = server.request("POST", f"/v1/{path}", body)
        assert status == 200, answer
        return answer

    boosts = [{"where": {"category": category}, "factor": 1.5}]
    requests = [("retrieve", {"user_id": user, "k": 9}) for user in users]
    requests += [
        ("retrieve", {"user_id": users[0], "diversity": 0.4, "boosts": boosts}),
        ("retrieve", {"user_id": users[1], "deny": [item], "columns": ["category"]}),
        ("similar_items", {"item_id": item}),
        ("popular", {"k": 5}),
    ]
    for path, body in requests:
        found = answer(path, **body)
        expected = ask(whole, "POST", f"/v1/{path}", body).json()
        assert found["items"] == expected["items"] and "missing_shards" not in found
    # A mistake of a request is told in the same words; a change is refused by name.
    wrong = {"user_id": users[0], "where": {"colour": 1}}
    status, problem = server.request("POST", "/v1/retrieve", wrong)
    assert status == 400 and problem["field"] == "where"
    status, problem = server.request("PUT", f"/v1/items/{item}", {"columns": {}})
    assert status == 501 and "compact the bundle" in problem["cure"]
    # Whoever has no token is not answered by a shard.
    shards[0].token = "another token 123"
    assert shards[0].request("GET", "/v1/shard/info")[0] == 401

    assert shards[1].end() == 0
    found = answer("retrieve", user_id=users[0], k=9)
    assert found["missing_shards"] == [1]
    of_others = retriever.bundle.items["item_id"].take(pa.array(retriever.bundle.index.rows[1]))
    others = retriever.recommend(users[0], k=9, deny=of_others.to_pylist())
    assert [each["item_id"] for each in found["items"]] == [each.item_id for each in others]
    assert server.request("GET", "/readyz") == (200, {"status": "ok", "missing_shards": [1]})
    counters = server.request("GET", "/metrics")[1].decode()
    assert 'twotower_shard_up{shard="1"} 0.0' in counters
    assert shards[0].end() == 0 and server.end() == 0
