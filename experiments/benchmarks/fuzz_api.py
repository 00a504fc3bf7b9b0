"""Random and hostile requests against the API of a server in this process, and its memory.

    python -m experiments.benchmarks.fuzz_api [--cases=10000] [--hostile=20000] \
        [--requests=200000] [--quick] [--json=FILE]

Cases are drawn by schemathesis from the API's own description, right and wrong ones. Hostile bodies
are right ones that were spoilt: nested, cut off, with huge numbers, NaN, halves of characters or
values of other types. No answer may have a status of 500 or above but 503, name a file, a library
or a line of code, or differ from its description; and without a token nothing may change. Then the
memory of the process is measured over many requests of all kinds.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
from absl import app as absl_app
from absl import flags

from experiments.benchmarks import harness

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever
    from twotower.serving.app import App

_CASES = flags.DEFINE_integer("cases", 10_000, "Cases of schemathesis.")
_HOSTILE = flags.DEFINE_integer("hostile", 20_000, "Hostile bodies.")
_REQUESTS = flags.DEFINE_integer("requests", 200_000, "Requests over which memory is measured.")
TOKEN = "a token for everything"
# What an answer may not tell of the server.
LEAKS = re.compile(
    r"Traceback|File \"|line \d+, in|\.py\b|site-packages|/(?:proc|tmp|home|root)/|sqlite|"
    r"\b(?:msgspec|numpy|pyarrow|starlette|uvicorn|httptools|jaxlib|absl)\b"
)
TOGETHER = 16  # requests that are answered together
MAX_GROWTH = 24 << 20  # bytes of memory that many requests may add


class Response(NamedTuple):
    """An answer of the server.

    Attributes:
        status: Status of HTTP.
        headers: Headers, their names in small letters.
        body: Body.
    """

    status: int
    headers: dict[str, str]
    body: bytes


class InProcess:
    """A server that is asked without a network: in this process, and without a client's work."""

    def __init__(self, app: App):
        """Prepares a loop for the server.

        Args:
            app: Server.
        """
        self.app = app
        self._loop = asyncio.new_event_loop()

    def send(
        self, method: str, path: str, body: bytes | None = None, *, token: str = ""
    ) -> Response:
        """Returns the answer to a request.

        Args:
            method: Method of HTTP.
            path: Path, whose query is left out.
            body: Body; None without one.
            token: Token; "" without one.
        """
        return self._loop.run_until_complete(self.ask(method, path, body, token=token))

    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, token: str = ""
    ) -> Response:
        """Returns the answer to a request; see `send`."""
        headers = [(b"content-type", b"application/json")]
        if token:
            headers.append((b"x-api-key", token.encode()))
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": quote(path).encode(),
            "query_string": b"",
            "headers": headers,
            "root_path": "",
        }
        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body or b""}

        async def keep(message: Any) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        start, *rest = messages
        names = {key.decode(): value.decode() for key, value in start["headers"]}
        return Response(start["status"], names, b"".join(part.get("body", b"") for part in rest))

    def send_together(self, path: str, bodies: Sequence[bytes]) -> list[Response]:
        """Returns the answers to requests that wait at the same moment, without a token.

        Args:
            path: Path of an endpoint that waits for nothing.
            bodies: Bodies.
        """
        from twotower.serving.direct import Reply, WholeRequest

        headers = [(b"content-type", b"application/json")]
        now = time.perf_counter()
        asked = [WholeRequest(headers, body, now) for body in bodies]
        responses = []
        for made in self.app.direct[path.encode()].reply_each(asked):
            reply = made if isinstance(made, Reply) else made()
            names = {key.decode(): value.decode() for key, value in reply.headers}
            responses.append(Response(reply.status, names, reply.body))
        return responses

    def close(self) -> None:
        """Ends the loop."""
        self._loop.run_until_complete(self.app.writer.close())
        self._loop.close()


class Case(NamedTuple):
    """A request.

    Attributes:
        method: Method of HTTP.
        path: Path.
        template: Path of the description, with names in the place of values.
        body: Body; None without one.
    """

    method: str
    path: str
    template: str
    body: bytes | None


def drawn_cases(document: Mapping[str, Any], count: int, seed: int = 0) -> Iterator[list[Case]]:
    """Yields the cases that schemathesis draws for each endpoint, right and wrong ones.

    Args:
        document: Description of the API.
        count: Number of cases in all, or a few less.
        seed: Seed of the cases.
    """
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.core.result import Ok

    # Of formats that it has no strategy for.
    warnings.simplefilter("ignore")
    schema = schemathesis.openapi.from_dict(dict(document))
    operations = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operations.append(result.ok())
    weights: dict[tuple[Any, GenerationMode], float] = {}
    for operation in operations:
        has_body = bool(operation.body)
        # Batches are drawn slowly, and hold what others draw; some paths have one request alone.
        weight = 0.2 if operation.path.endswith("/batch") else 1.0
        if not has_body and "{" not in operation.path:
            weight = 0.0
        weights[operation, GenerationMode.POSITIVE] = weight
        if has_body:
            weights[operation, GenerationMode.NEGATIVE] = weight
    each = count / sum(weights.values())
    for (operation, mode), weight in weights.items():
        strategy = operation.as_strategy(generation_mode=mode)
        yield _draw(strategy, max(1, round(each * weight)), seed)


def _draw(strategy: Any, count: int, seed: int) -> list[Case]:
    """Returns cases of a strategy of hypothesis."""
    import hypothesis

    health = hypothesis.HealthCheck
    cases: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[health.too_slow, health.filter_too_much, health.data_too_large],
    )
    @hypothesis.given(case=strategy)
    def keep(case: Any) -> None:
        cases.append(_as_case(case))

    keep()
    return cases


def _as_case(case: Any) -> Case:
    sent = case.as_transport_kwargs(base_url="http://shop")
    body = None
    if "json" in sent:
        # Halves of characters are written as escapes.
        body = json.dumps(sent["json"]).encode()
    elif sent.get("data") is not None:
        data = sent["data"]
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
    path = urlsplit(sent["url"]).path
    return Case(case.method.upper(), path, case.path, body)


def valid_bodies(retriever: Retriever) -> dict[str, Any]:
    """Returns a right body for each endpoint that reads or changes something."""
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    items = retriever.bundle.items["item_id"].to_pylist()[:6]
    columns = [name for name in retriever.bundle.items.column_names if name != "item_id"]
    history = [items[0], {"item_id": items[1], "event": "click", "timestamp": 1_700_000_000}]
    where = [[columns[0], "!=", None]]
    whole = {
        "user_id": users[0],
        "features": {},
        "history": history,
        "k": 5,
        "offset": 1,
        "where": where,
        "allow": items,
        "deny": items[:1],
        "columns": columns[:1],
        "popularity_weight": 0.5,
        "diversity": 0.2,
        "boosts": [{"where": where, "factor": 2.0}, {"where": where, "add": -1.0}],
        "promotions": [{"where": where, "percent": 20}],
        "max_per": {columns[0]: 2},
        "explore": 0.1,
        "seed": 3,
        "reasons": True,
    }
    event = {"event_id": "e", "user_id": users[0], "item_id": items[0], "event": "click"}
    return {
        "/v1/retrieve": whole,
        "/v1/retrieve/batch": {"requests": [{"user_id": users[1]}, {"like": items[:2]}]},
        "/v1/similar_items": {"item_id": items[2], "k": 3},
        "/v1/popular": {"k": 3, "where": where},
        "/v1/latest": {"k": 3},
        "/v1/encode_user": {"user_id": users[0], "history": history},
        "/v1/match": {"pairs": [{"user_id": users[0], "item_id": items[0]}]},
        "/v1/events": {"events": [{**event, "timestamp": 1_700_000_000}]},
        "/v1/items": {"items": [{"item_id": "new", "columns": {columns[0]: "a"}}]},
    }


HOSTILE_VALUES = (
    *(None, True, "", " ", "\x00", "\ud800", "a" * 600, "../../etc/passwd", "%s%n", "'; DROP--"),
    *(0, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.1, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, "a"]),
    *(["x", "in", [1, None]], [["x", "==", {}]], "2020-13-45", "1e999", "NaN", [["x"] * 3] * 70),
)


def hostile_bodies(bodies: Mapping[str, Any], count: int, seed: int = 0) -> Iterator[Case]:
    """Yields right requests that were spoilt.

    Args:
        bodies: Right body of each endpoint.
        count: Number of requests.
        seed: Seed of what is spoilt.
    """
    rng = np.random.default_rng(seed)
    paths = list(bodies)
    for _ in range(count):
        path = paths[int(rng.integers(len(paths)))]
        body = json.loads(json.dumps(bodies[path]))
        for _ in range(int(rng.integers(1, 4))):
            _spoil(body, rng)
        text = json.dumps(body).encode()
        kind = rng.random()
        if kind < 0.08:
            text = text[: int(rng.integers(len(text)))]
        elif kind < 0.16:
            text = _flip_bytes(text, rng)
        elif kind < 0.2:
            depth = int(rng.choice([50, 900, 5_000]))
            text = b'{"where": ' + b"[" * depth + b"]" * depth + b"}"
        method = "PUT" if path == "/v1/items" else "POST"
        yield Case(method, path, path, text)


def _spoil(body: Any, rng: np.random.Generator) -> None:
    """Puts a hostile value, or name, somewhere into a body."""
    node = body
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        break
    value = copy.deepcopy(HOSTILE_VALUES[int(rng.integers(len(HOSTILE_VALUES)))])
    if isinstance(node, dict) and rng.random() < 0.1:
        node[f"{key}x"] = value
    elif isinstance(node, list) and rng.random() < 0.2:
        node += [value] * int(rng.choice([1, 2_000]))
    else:
        node[key] = value


def _flip_bytes(text: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(text)
    for position in rng.integers(len(changed), size=3).tolist():
        changed[position] = int(rng.integers(256))
    return bytes(changed)


def check(case: Case, response: Response, folder: str) -> None:
    """Refuses an answer that no request may have.

    Args:
        case: Request.
        response: Answer to it.
        folder: Folder of the bundle, whose path no answer names.

    Raises:
        AssertionError: It is one; the message shows the request.
    """
    shown = f"{case} -> {response.status} {response.body[:600]!r}"
    assert response.status < 500 or response.status == 503, shown
    if response.status >= 400:
        text = response.body.decode()
        assert response.headers["content-type"] == "application/problem+json", shown
        assert json.loads(text)["status"] == response.status, shown
        # What a request says itself is told back to it.
        sent = (case.body or b"").decode(errors="replace") + case.path
        for leak in LEAKS.findall(text):
            assert leak in sent, f"{shown} tells {leak!r}"
        assert folder not in text, shown


def fuzz(
    server: InProcess,
    folder: str,
    cases: int,
    draw: Callable[[Mapping[str, Any], int], Iterable[list[Case]]] = drawn_cases,
) -> Counter[str]:
    """Sends cases of schemathesis with a token for everything; returns the number of each outcome.

    Right answers are compared with their description.

    Args:
        server: Server.
        folder: Folder of the bundle, whose path no answer names.
        cases: Number of cases.
        draw: Draws the cases from the description of the API and their number.

    Raises:
        AssertionError: An answer is none that a request may have.
    """
    import jsonschema

    document = json.loads(server.send("GET", "/v1/openapi.json", token=TOKEN).body)
    validators: dict[tuple[str, str], Any] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for content in operation["responses"]["200"]["content"].values():
                schema = content["schema"] | {"components": document["components"]}
                validators[method.upper(), path] = jsonschema.Draft202012Validator(schema)
    outcomes: Counter[str] = Counter()
    for drawn in draw(document, cases):
        for case in drawn:
            response = server.send(case.method, case.path, case.body, token=TOKEN)
            check(case, response, folder)
            outcomes[str(response.status)] += 1
            operation = document["paths"][case.template][case.method.lower()]
            assert str(response.status) in operation["responses"], f"{case} -> {response.status}"
            validator = validators.get((case.method, case.template))
            is_json = response.headers["content-type"] == "application/json"
            if response.status == 200 and is_json and validator is not None:
                validator.validate(json.loads(response.body))
    return outcomes


def attack(server: InProcess, folder: str, count: int, seed: int = 0) -> Counter[str]:
    """Sends hostile bodies without a token; returns the number of each outcome.

    Those to `/v1/retrieve` are also sent beside right ones, to be answered together.

    Raises:
        AssertionError: An answer is none that a request may have, or another one among others, or
            something has changed.
    """
    retriever = server.app.answers.retriever
    bodies = valid_bodies(retriever)
    # Events need no token here: they are left to the cases.
    del bodies["/v1/events"]
    probe = {"user_id": bodies["/v1/retrieve"]["user_id"], "k": 50}
    before = _items(server, probe)
    changes = retriever.changes
    outcomes: Counter[str] = Counter()
    path = "/v1/retrieve"
    right = Case("POST", path, path, json.dumps(probe).encode())
    beside = [(right, 200)]
    for case in hostile_bodies(bodies, count, seed):
        response = server.send(case.method, case.path, case.body)
        check(case, response, folder)
        outcomes[str(response.status)] += 1
        if case.path == path:
            beside += [(case, response.status), (right, 200)]
        if len(beside) >= TOGETHER:
            together = server.send_together(path, [case.body or b"" for case, _ in beside])
            for (each, status), response in zip(beside, together):
                check(each, response, folder)
                assert response.status == status, f"{each} -> {response.status}, alone {status}"
            beside.clear()
    assert retriever.changes == changes and _items(server, probe) == before
    return outcomes


def _items(server: InProcess, body: Mapping[str, Any]) -> Any:
    response = server.send("POST", "/v1/retrieve", json.dumps(body).encode())
    assert response.status == 200, response
    return json.loads(response.body)["items"]


def resident() -> int:
    """Returns the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4_096


def measure_memory(server: InProcess, count: int) -> list[int]:
    """Returns the bytes in memory at five moments of many requests of all kinds.

    The first tenth fills caches that have bounds, and is not measured.
    """
    rng = np.random.default_rng(0)
    retriever = server.app.answers.retriever
    bodies = valid_bodies(retriever)
    users = retriever.bundle.users["user_id"].to_pylist()
    del bodies["/v1/items"]
    hostile = list(hostile_bodies(bodies, 500))
    paths = list(bodies)

    def one(number: int) -> None:
        if number % 10 == 0:
            case = hostile[int(rng.integers(len(hostile)))]
            server.send(case.method, case.path, case.body)
            return
        path = paths[number % len(paths)]
        if number % 3:
            path = "/v1/retrieve"
        body = dict(bodies[path])
        if path == "/v1/retrieve":
            body = {"user_id": users[int(rng.integers(len(users)))], "k": int(rng.integers(1, 60))}
            if number % 5 == 0:
                body["user_id"] = f"stranger-{number}"
        elif path == "/v1/events":
            # The same events again and again: new ones are kept, up to their own bound.
            event = {**body["events"][0], "event_id": f"e-{number % 50}"}
            body = {"events": [event]}
        server.send("POST", path, json.dumps(body).encode())

    measured = []
    tenth = count // 10
    for number in range(count):
        if number >= tenth and (number - tenth) % max(1, (count - tenth) // 4) == 0:
            measured.append(resident())
        one(number)
    measured.append(resident())
    return measured


def make_server(folder: Path) -> InProcess:
    """Returns the server of a bundle of the generated shop that was never trained."""
    from experiments.benchmarks.fuzz_requests import make_retriever
    from twotower.serving.access import Access
    from twotower.serving.answers import Answers
    from twotower.serving.app import App
    from twotower.serving.events import EventLog
    from twotower.serving.limits import Limits
    from twotower.serving.versions.versions import Versions

    retriever = make_retriever(folder / "bundle", "exact")
    # Whoever sends events needs no token here.
    access = Access({"admin": TOKEN})
    events = EventLog(folder / "events")
    made = App(
        Versions(Answers(retriever, max_together=TOGETHER)), events, access=access, limits=Limits()
    )
    server = InProcess(made)
    made.answers.warm()
    made.status = "ok"
    return server


def main(argv: list[str]) -> None:
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    is_quick = harness.QUICK.value
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        server = make_server(Path(name))
        start = time.perf_counter()
        outcomes = attack(server, name, 2_000 if is_quick else _HOSTILE.value)
        rows["hostile"] = dict(sorted(outcomes.items()))
        print(f"hostile bodies: {rows['hostile']}, {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        outcomes = fuzz(server, name, 500 if is_quick else _CASES.value)
        rows["schemathesis"] = dict(sorted(outcomes.items()))
        seconds = time.perf_counter() - start
        print(f"schemathesis: {rows['schemathesis']}, {seconds:.0f} s", flush=True)
        memory = measure_memory(server, 5_000 if is_quick else _REQUESTS.value)
        rows["memory_mib"] = [round(size / 2**20, 1) for size in memory]
        print(f"memory: {rows['memory_mib']} MiB", flush=True)
        assert is_quick or memory[-1] - memory[0] <= MAX_GROWTH, "memory grows"
        server.close()
    harness.write_json("fuzz_api", rows, unit="requests", base="")


if __name__ == "__main__":
    absl_app.run(main)
