"""A client of the server, waiting or asynchronous, in the types of its API. It needs the extra
client.

    with Client("http://127.0.0.1:8000", token=TOKEN) as client:
        answer = client.retrieve(user_id="42", k=10)
        client.events(events=[{"event_id": "e-1", "user_id": "42", "item_id": "7"}])

    async with AsyncClient("http://127.0.0.1:8000") as client:
        answer = await client.retrieve(types.Retrieve(user_id="42", k=10))

A call that is refused raises `Refused` with the field, the value and the cure. A server that is
overloaded, not ready or not reachable is asked again, after pauses that double and are drawn, so
that clients do not come back together. That is safe: what a call changes is the same when it comes
twice, and events have ids. Going back to the version before is the exception, and sent once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, overload
from urllib.parse import quote

import httpx
import msgspec

from twotower.core.errors import ConfigError, TwotowerError
from twotower.serving import types
from twotower.serving.versions import types as version_types

Q = TypeVar("Q", bound=msgspec.Struct)
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
Q_contra = TypeVar("Q_contra", contravariant=True)

AGAIN = (429, 503)  # statuses after which the same call may be answered
MAX_PAUSE = 30.0  # seconds
# What came of sending a call.
Outcome = httpx.Response | httpx.TransportError


class Refused(TwotowerError):
    """A call that the server refused.

    Attributes:
        status: Status of HTTP.
        field: Field of the request that is wrong; "" where it is the whole.
        value: Value of the field, shortened.
        cure: Sentence on what to do.
    """

    def __init__(self, problem: types.Problem):
        sentences = [problem.detail]
        # Many a detail ends with it.
        if problem.cure and problem.cure not in problem.detail:
            sentences.append(problem.cure)
        super().__init__(" ".join(sentences))
        self.status = problem.status
        self.field = problem.field
        self.value = problem.value
        self.cure = problem.cure


class Unreachable(TwotowerError):
    """A server that did not answer, as often as it was asked."""


@dataclasses.dataclass(frozen=True)
class Retries:
    """How often, and when, a server is asked again.

    Attributes:
        count: Number of calls after the first one.
        pause: Greatest pause before the first of them, in seconds; later ones double.
    """

    count: int = 3
    pause: float = 0.1

    def pause_before(self, number: int, outcome: Outcome) -> float:
        """Returns the seconds before another call: drawn, and those that the server asked for.

        Args:
            number: Number of the calls before it.
            outcome: Outcome of the last of them.
        """
        drawn = random.random() * self.pause * 2 ** (number - 1)
        told = 0.0
        if isinstance(outcome, httpx.Response):
            header = outcome.headers.get("retry-after", "")
            # The header may also be a date (RFC 9110), which no server of ours sends.
            told = float(header) if header.isdigit() else 0.0
        # Drawn beyond what the server asked for, so that all those whom it sent away at once come
        # back one by one.
        return min(MAX_PAUSE, told + drawn)


ONCE = Retries(count=0)


@dataclasses.dataclass(frozen=True)
class Call(Generic[A]):
    """One call of the API.

    Attributes:
        method: Method of HTTP.
        path: Path.
        answer: Type of the answer.
        content: Body; None without one.
        is_once: Whether it must not be sent twice.
    """

    method: str
    path: str
    answer: type[A]
    content: bytes | None = None
    is_once: bool = False


class Ask(Protocol[Q_contra, A_co]):
    """A call of a client: by a request, or by its fields."""

    def __call__(self, request: Q_contra | None = None, /, **fields: Any) -> A_co: ...


class Endpoint(Generic[Q, A]):
    """A call of both clients: an attribute that each gives as a function of its own kind."""

    def __init__(self, route: str, request: type[Q], answer: type[A], *, is_once: bool = False):
        """Describes the call.

        Args:
            route: Method and path.
            request: Type of the request; `types.Request` without one.
            answer: Type of the answer.
            is_once: Whether it must not be sent twice.
        """
        self._method, self._path = route.split()
        self._request = request
        self._answer = answer
        self._is_once = is_once

    @overload
    def __get__(self, client: Client, owner: type[Client]) -> Ask[Q, A]: ...

    @overload
    def __get__(self, client: AsyncClient, owner: type[AsyncClient]) -> Ask[Q, Awaitable[A]]: ...

    @overload
    def __get__(self, client: None, owner: type[Any]) -> Self: ...

    def __get__(self, client: Client | AsyncClient | None, owner: type[Any]) -> Any:
        # Looked up at the class, as by `help`, it is the description itself.
        if client is None:
            return self

        def ask(request: Q | None = None, /, **fields: Any) -> Any:
            return client.call(self._make(request, fields))

        return ask

    def _make(self, request: Q | None, fields: dict[str, Any]) -> Call[A]:
        if request is None:
            try:
                # By the same types as in the server: a wrong field is refused without a call.
                request = msgspec.convert(fields, self._request)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{self._method} {self._path}: {error}.") from None
        content = None
        # Requests without fields of their own have no body.
        if self._request is not types.Request:
            content = msgspec.json.encode(request)
        return Call(self._method, self._path, self._answer, content, self._is_once)


class Endpoints:
    """The calls of both clients."""

    retrieve = Endpoint("POST /v1/retrieve", types.Retrieve, types.Answer)
    similar_items = Endpoint("POST /v1/similar_items", types.SimilarItems, types.Answer)
    popular = Endpoint("POST /v1/popular", types.Popular, types.Answer)
    latest = Endpoint("POST /v1/latest", types.Latest, types.Answer)
    encode_user = Endpoint("POST /v1/encode_user", types.EncodeUser, types.Vector)
    match = Endpoint("POST /v1/match", types.Match, types.Scores)
    retrieve_batch = Endpoint("POST /v1/retrieve/batch", types.RetrieveBatch, types.AnswerBatch)
    similar_items_batch = Endpoint(
        "POST /v1/similar_items/batch", types.SimilarItemsBatch, types.AnswerBatch
    )
    popular_batch = Endpoint("POST /v1/popular/batch", types.PopularBatch, types.AnswerBatch)
    latest_batch = Endpoint("POST /v1/latest/batch", types.LatestBatch, types.AnswerBatch)
    encode_user_batch = Endpoint(
        "POST /v1/encode_user/batch", types.EncodeUserBatch, types.VectorBatch
    )
    put_items = Endpoint("PUT /v1/items", types.PutItems, types.Changed)
    events = Endpoint("POST /v1/events", types.Events, types.Accepted)
    erase_user = Endpoint("POST /v1/erase_user", types.EraseUser, types.Erased)
    info = Endpoint("GET /v1/info", types.Request, types.Info)
    versions = Endpoint("GET /v1/admin/versions", types.Request, version_types.VersionList)
    load = Endpoint("POST /v1/admin/load", version_types.LoadBundle, version_types.VersionList)
    unload = Endpoint(
        "POST /v1/admin/unload", version_types.NamedVersion, version_types.VersionList
    )
    swap = Endpoint("POST /v1/admin/swap", version_types.NamedVersion, version_types.VersionList)
    roll_back = Endpoint(
        "POST /v1/admin/rollback",
        types.Request,
        version_types.VersionList,
        is_once=True,
    )
    split = Endpoint("PUT /v1/admin/split", version_types.Split, version_types.VersionList)
    shadow = Endpoint("PUT /v1/admin/shadow", version_types.Shadow, version_types.VersionList)


class Client(Endpoints):
    """A client that waits for each answer. Threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 5.0,
        retries: Retries | None = None,
        **options: Any,
    ):
        """Prepares the connections, which are made when they are needed.

        Args:
            url: Address of the server.
            token: Token of a right; "" where none is needed.
            timeout: Seconds for connecting, for sending and for each wait for the answer.
            retries: How often, and when, the server is asked again; `ONCE` for never.
            options: Further arguments of `httpx.Client`.
        """
        self._retries = retries or Retries()
        self._client = httpx.Client(**_arguments(url, token, timeout), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def delete_item(self, item_id: types.Id) -> types.Changed:
        """Deletes an item, if it is there."""
        return self.call(_deletion(item_id))

    def call(self, call: Call[A]) -> A:
        """Returns the answer to a call.

        Raises:
            Refused: The server refuses it.
            Unreachable: The server does not answer.
        """
        conversation = _converse(call, self._retries)
        pause = next(conversation)
        while True:
            time.sleep(pause)
            outcome: Outcome
            try:
                outcome = self._client.request(call.method, call.path, content=call.content)
            except httpx.TransportError as error:
                outcome = error
            try:
                pause = conversation.send(outcome)
            except StopIteration as end:
                return end.value


class AsyncClient(Endpoints):
    """A client for code that goes on while it waits."""

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        timeout: float = 5.0,
        retries: Retries | None = None,
        **options: Any,
    ):
        """Prepares the connections; see `Client`.

        Args:
            url: As of `Client`.
            token: As of `Client`.
            timeout: As of `Client`.
            retries: As of `Client`.
            options: Further arguments of `httpx.AsyncClient`.
        """
        self._retries = retries or Retries()
        self._client = httpx.AsyncClient(**_arguments(url, token, timeout), **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def delete_item(self, item_id: types.Id) -> types.Changed:
        """Deletes an item, if it is there."""
        return await self.call(_deletion(item_id))

    async def call(self, call: Call[A]) -> A:
        """Returns the answer to a call; see `Client.call`."""
        conversation = _converse(call, self._retries)
        pause = next(conversation)
        while True:
            await asyncio.sleep(pause)
            outcome: Outcome
            try:
                outcome = await self._client.request(call.method, call.path, content=call.content)
            except httpx.TransportError as error:
                outcome = error
            try:
                pause = conversation.send(outcome)
            except StopIteration as end:
                return end.value


def _converse(call: Call[A], retries: Retries) -> Generator[float, Outcome, A]:
    """Yields the pause before each time that a call is sent, and returns its answer.

    It is sent the outcome each time; whoever drives it waits and sends in their own way.
    """
    pause = 0.0
    number = 0
    while True:
        outcome = yield pause
        number += 1
        # Also where the connection broke: the server may have done it, and lost only the answer.
        is_last = call.is_once or number > retries.count
        if isinstance(outcome, httpx.TransportError):
            if is_last:
                raise Unreachable(
                    f"{call.method} {call.path} was not answered, asked {number} times: "
                    f"{type(outcome).__name__}: {outcome}. Is the server there?"
                ) from outcome
        elif is_last or outcome.status_code not in AGAIN:
            return _read(outcome, call.answer)
        pause = retries.pause_before(number, outcome)


def _read(response: httpx.Response, answer: type[A]) -> A:
    """Returns the answer in a response.

    Raises:
        Refused: It is a refusal.
    """
    if response.status_code == 200:
        return msgspec.json.decode(response.content, type=answer)
    try:
        problem = msgspec.json.decode(response.content, type=types.Problem)
    # Not in our form: a proxy before the server has answered.
    except (msgspec.MsgspecError, UnicodeDecodeError):
        problem = types.Problem(
            response.reason_phrase,
            response.status_code,
            f"The server answered {response.status_code} {response.reason_phrase}.",
        )
    raise Refused(problem)


def _deletion(item_id: types.Id) -> Call[types.Changed]:
    # An id may hold a slash, which would end the path of the item.
    return Call("DELETE", f"/v1/items/{quote(str(item_id), safe='')}", types.Changed)


def _arguments(url: str, token: str, timeout: float) -> dict[str, Any]:
    """Returns the arguments of a client of httpx."""
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    return {"base_url": url, "timeout": timeout, "headers": headers}
