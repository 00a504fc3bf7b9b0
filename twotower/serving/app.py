"""The server as an ASGI application: endpoints, who may use them, and when it is ready."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import functools
import gc
import inspect
import random
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from types import CoroutineType
from typing import Any, TypeVar

import msgspec
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from twotower.core.errors import ChangesError, echo
from twotower.core.ids import read_id
from twotower.serving import openapi, types
from twotower.serving.access import Access, Right
from twotower.serving.aliases import Aliases
from twotower.serving.answers import Answers
from twotower.serving.direct import DirectEndpoint, Headers, MakeReply, Reply, WholeRequest
from twotower.serving.errors import RequestError, explain
from twotower.serving.events import EventLog
from twotower.serving.impressions.log import ImpressionLog
from twotower.serving.limits import Limits, check_headers, check_size, read_body
from twotower.serving.lists.batches import HandleEach, Made, answer_each, answer_together
from twotower.serving.metrics import Metrics
from twotower.serving.monitoring.log import Count, RequestLog
from twotower.serving.monitoring.served import WAITING
from twotower.serving.page.files import PageFile, page_files
from twotower.serving.page.lookups import Lookups
from twotower.serving.processes.member import Member
from twotower.serving.processes.rates import Rates
from twotower.serving.shards.router import Router
from twotower.serving.versions import types as admin_types
from twotower.serving.versions.admin import Admin
from twotower.serving.versions.versions import Versions
from twotower.serving.writer import Change, Writer

Scope = MutableMapping[str, Any]
Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
# (request, id in the path) -> the answer, or a promise of it
Handle = Callable[[Any, str], Any]
# (version, request) -> its list
MakeAnswer = Callable[[Answers, Any], types.Answer]

_ANSWERING = ("ok", "stopping")  # statuses in which requests are answered
R = TypeVar("R")
MAX_THREADS = 64  # that wait for shards or a hook; more requests wait for one of them
LOOKS = 4  # of these between two looks at what was served
FOLLOW_SECONDS = 0.25  # between looks at what other processes have changed
ENCODER = msgspec.json.Encoder()
JSON = b"application/json"
PROBLEM = b"application/problem+json"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"
# No page may guess another type from a value in an answer, and nothing keeps what is personal.
COMMON = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
JSON_HEADERS = [(b"content-type", JSON), *COMMON]
TEXT_HEADERS = [(b"content-type", TEXT), *COMMON]


class Endpoint:
    """One method of one path: reads a request, asks for its answer and writes it.

    A plain ASGI application: it costs a third of the time that Starlette's request and response
    take.

    Attributes:
        name: Name in metrics and in the description.
        method: Method of HTTP.
        path: Path, with {item_id} where it holds an id.
        summary: Sentence on what it does.
        right: Right that its users need.
        request: Type of the body; None without one.
        answer: Type of the answer; None of text.
        changes: Whether it changes something that all processes share.
        waits: Whether it may wait for something, such as a disk, before it answers.
    """

    def __init__(
        self,
        app: Service,
        name: str,
        route: str,
        summary: str,
        handle: Handle,
        *,
        handle_each: HandleEach | None = None,
        right: Right = Right.READ,
        request: type[Any] | None = None,
        answer: type[Any] | None = None,
        always: bool = False,
        needs_token: bool = False,
        changes: bool = False,
        waits: bool = True,
    ):
        """Prepares the endpoint.

        Args:
            app: Application that it belongs to.
            name: Name in metrics and in the description.
            route: Method and path, such as "POST /v1/retrieve".
            summary: Sentence on what it does.
            handle: Function that answers.
            handle_each: Function that answers those that wait at the same moment; None to answer
                one after another.
            right: Right that its users need.
            request: Type of the body; None without one.
            answer: Type of the answer; None of text.
            always: Whether it answers before the server is ready.
            needs_token: Whether nobody has the right where no token is set for it.
            changes: Whether it changes something that all processes share.
            waits: Whether it may wait for something before it answers.
        """
        self.waits = waits
        self.name = name
        self.method, self.path = route.split()
        self.summary = summary
        self.right = right
        self.request = request
        self.answer = answer
        self._app = app
        self._handle = handle
        self._handle_each = handle_each
        self._respond = handle
        if changes and app.member is not None:
            self._respond = functools.partial(app.member.change, self)
        self._always = always
        self.changes = changes
        # Asked once: tokens do not change while the server runs.
        self._is_open = app.access.is_open(right) and not needs_token
        # Probes are not counted: a balancer that is refused takes the server for dead.
        is_bounded = app.rates is not None and right != Right.NONE
        self._is_guarded = is_bounded or not self._is_open
        self._decoder = None
        if request is not None:
            self._decoder = msgspec.json.Decoder(request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        app = self._app
        body = b""
        try:
            # Before the body is read: a stranger must not make the server take in a megabyte.
            self._check(scope["headers"])
            request = None
            if self._decoder is not None:
                body = await read_body(receive, app.limits)
                request = self._read(body)
            item_id = ""
            if "path_params" in scope:
                item_id = _item_id_of(scope)
            result = self._respond(request, item_id)
            # Only what waits, for a disk or another process, is a coroutine.
            if isinstance(result, CoroutineType):
                result = await result
            reply = self._reply(result)
        # The client has gone; nobody would read a refusal.
        except ConnectionError:
            return
        # The server goes on, whatever one request does.
        except Exception as error:
            reply = self._refuse(error, body)
        length = (b"content-length", b"%d" % len(reply.body))
        headers = [length, *reply.headers, *app.closing]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})
        # Refusals too: a rise of them is what alarms are set to.
        app.count_request(self.name, reply.status, reply.version, time.perf_counter() - start)

    def reply_each(self, requests: Sequence[WholeRequest]) -> Sequence[Reply | MakeReply]:
        """Returns the replies to several requests, of an endpoint that does not wait.

        Args:
            requests: Requests; the time that each waited for its turn is counted too.

        Returns:
            The reply of each that is made together with others, and a function that makes those of
            the others.
        """
        if self._handle_each is None or len(requests) == 1:
            return [functools.partial(self._reply_alone, request) for request in requests]
        read: dict[int, Any] = {}
        replies: dict[int, Reply | MakeReply] = {}
        for number, request in enumerate(requests):
            try:
                read[number] = self._read_whole(request)
            except Exception as error:
                replies[number] = self._reply_to(request, error)
        for number, result in self._handle_each(read).items():
            request = requests[number]
            if callable(result):
                replies[number] = functools.partial(self._reply_made, request, result)
            else:
                replies[number] = self._reply_to(request, result)
        return [replies[number] for number in range(len(requests))]

    @property
    def gathers(self) -> bool:
        """Whether many requests are answered for less than each alone."""
        return self._handle_each is not None

    def _reply_alone(self, request: WholeRequest) -> Reply:
        """Returns the reply to one request."""
        return self._reply_made(request, lambda: self._respond(self._read_whole(request), ""))

    def _reply_made(self, request: WholeRequest, make: Callable[[], Any]) -> Reply:
        """Returns the reply that tells what a function returns or raises."""
        try:
            result = make()
        # The server goes on, whatever one request does.
        except Exception as error:
            result = error
        return self._reply_to(request, result)

    def _read_whole(self, request: WholeRequest) -> Any:
        """Returns a request as the type of its body.

        Raises:
            RequestError, msgspec.ValidationError: It is refused.
        """
        self._check(request.headers)
        check_size(request.body, self._app.limits)
        return self._read(request.body)

    def _reply_to(self, request: WholeRequest, result: Any) -> Reply:
        """Returns the reply that tells a result, or what a request is refused by, and counts it."""
        reply = self._reply_or_refuse(result, request.body)
        seconds = time.perf_counter() - request.arrived
        self._app.count_request(self.name, reply.status, reply.version, seconds)
        return reply

    def _reply_or_refuse(self, result: Any, body: bytes) -> Reply:
        """Returns the reply that tells a result, or what a request is refused by."""
        if not isinstance(result, Exception):
            try:
                return self._reply(result)
            except Exception as error:
                result = error
        reply = self._refuse(result, body)
        # Its frames hold it, and the body: they would wait for the garbage collector.
        result.__traceback__ = None
        return reply

    def _check(self, headers: Headers) -> None:
        """Refuses a request by its headers, or because the server is not ready.

        Raises:
            RequestError: It is refused.
        """
        app = self._app
        if self._is_guarded:
            self._admit(headers)
        if not self._always and app.status not in _ANSWERING:
            raise app.not_ready()
        if self._decoder is not None:
            check_headers(headers, app.limits.body)

    def _reply(self, result: Any) -> Reply:
        """Returns the reply that tells a result."""
        version = getattr(result, "model_version", "")
        if self.answer is None:
            return Reply(200, TEXT_HEADERS, result, version)
        status = 200
        # Probes of Kubernetes and of balancers look at the status alone.
        if isinstance(result, types.Status) and result.status != "ok":
            status = 503
        return Reply(status, JSON_HEADERS, self._write(result), version)

    async def make(self, request: Any, item_id: str) -> Any:
        """Returns the answer of this process to a request that changes something."""
        return await self._handle(request, item_id)

    def _admit(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuses a client that may not ask this, or has asked too often.

        Raises:
            RequestError: It is refused.
        """
        app = self._app
        granted, client = app.access.identify(headers)
        # Also of those with a wrong token, which nobody shall find by trying.
        if app.rates is not None and not app.rates.take(client):
            app.metrics.limited.inc()
            raise RequestError(
                429,
                f"This client has sent {app.rates.rate} requests in a second.",
                cure="Send it again after a second.",
                retry_after=1,
            )
        if not self._is_open:
            app.access.check(self.right, granted)

    def _refuse(self, error: Exception, body: bytes) -> Reply:
        """Returns the reply that tells a refusal."""
        refusal = explain(error, self.request, body)
        return Reply(refusal.status, _headers_of(refusal), self._app.write_problem(refusal))

    def _read(self, body: bytes) -> Any:
        aliases = self._app.aliases
        # From bytes into the type of the request in one step; with other names a dict is made in
        # between.
        if aliases is None:
            assert self._decoder is not None
            return self._decoder.decode(body)
        return msgspec.convert(aliases.to_ours(msgspec.json.decode(body)), self.request)

    def _write(self, result: Any) -> bytes:
        # A dict is the description of the API, which has the names of the shop already.
        if self._app.aliases is None or isinstance(result, dict):
            return ENCODER.encode(result)
        return ENCODER.encode(self._app.aliases.to_theirs(msgspec.to_builtins(result)))


class Service:
    """A server of HTTP: its endpoints, who may use them, and whether it is ready.

    Attributes:
        member: This process among several that serve; None of one that serves alone.
        access: Tokens.
        limits: Bounds.
        aliases: Names of fields; None for ours.
        metrics: Counters.
        count_request: Function that counts a request, and may log it.
        rates: Requests a second of each client; None without a bound.
        status: "ok", or what the server waits for.
        accepted: Number of requests that were accepted and are not answered yet.
        closing: Header that ends connections, while the server stops.
        endpoints: Endpoints.
        direct: Endpoint that waits for nothing, by its path.
    """

    def __init__(
        self,
        *,
        access: Access | None = None,
        limits: Limits | None = None,
        aliases: Aliases | None = None,
        member: Member | None = None,
        log_share: float | None = None,
    ):
        """Prepares the server, without endpoints; see `App`."""
        self.member = member
        self.access = access or Access({})
        self.limits = limits or Limits()
        self.aliases = aliases
        self.metrics = Metrics()
        self.count_request: Count = self.metrics.count_request
        if log_share is not None:
            self.count_request = RequestLog(self.metrics.count_request, log_share)
        self.rates = None
        if self.limits.rate is not None and member is None:
            self.rates = Rates(self.limits.rate, self.access.clients)
        elif self.limits.rate is not None and member is not None:
            self.rates = member.share_rates(self.limits.rate, self.access.clients)
        self.status = "starting"
        self.accepted = 0
        self.closing: list[tuple[bytes, bytes]] = []
        self.set_endpoints([])

    def set_endpoints(self, endpoints: Sequence[Endpoint], files: Sequence[PageFile] = ()) -> None:
        """Answers at these paths from now on.

        Args:
            endpoints: Endpoints.
            files: Files of the page.
        """
        self.endpoints = endpoints
        # Name -> endpoint that changes something.
        self.changing = {each.name: each for each in self.endpoints if each.changes}
        self.direct: dict[bytes, DirectEndpoint] = {
            endpoint.path.encode(): endpoint for endpoint in self.endpoints if not endpoint.waits
        }
        # Looked up before Starlette, whose routes are tried one after another.
        self._fast: dict[tuple[str, str], Application] = {
            (endpoint.method, endpoint.path): endpoint
            for endpoint in self.endpoints
            if "{" not in endpoint.path
        }
        self._fast |= {("GET", file.path): file for file in files}
        routes = [
            # An id may hold a slash.
            Route(endpoint.path.replace("}", ":path}"), endpoint, methods=[endpoint.method])
            for endpoint in self.endpoints
        ]
        self._starlette = Starlette(
            routes=routes,
            exception_handlers={HTTPException: self._answer_unknown},
            lifespan=self.live,
        )
        # The address of a redirection would be that which the client names.
        self._starlette.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The start and the end of the server, and paths with an id in them, are left to Starlette.
        if scope["type"] == "http":
            endpoint = self._fast.get((scope["method"], scope["path"]))
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await self._starlette(scope, receive, send)

    @contextlib.asynccontextmanager
    async def live(self, app: Starlette) -> AsyncIterator[None]:
        """The life of the server between its start and its end."""
        del app
        yield

    @property
    def waiting_for_disk(self) -> int:
        """Number of accepted requests that wait for the disk alone."""
        return 0

    def readiness(self) -> types.Status:
        """Returns whether requests are answered."""
        return types.Status(self.status)

    def set_gauges(self) -> None:
        """Tells the counters what is so now."""
        self.metrics.tell()
        self.metrics.ready.set(self.status == "ok")
        self.metrics.waiting.set(self.accepted)
        has_joined = self.member is None or self.member.has_joined
        self.metrics.processes.set(has_joined and self.status == "ok")

    def make_probes(self) -> list[Endpoint]:
        """Returns the endpoints that say whether the server lives and answers, and its counters."""
        return [
            Endpoint(
                self,
                "healthz",
                "GET /healthz",
                "Whether the process lives.",
                lambda *_: types.Status("ok"),
                right=Right.NONE,
                answer=types.Status,
                always=True,
            ),
            Endpoint(
                self,
                "readyz",
                "GET /readyz",
                "Whether requests are answered.",
                lambda *_: self.readiness(),
                right=Right.NONE,
                answer=types.Status,
                always=True,
            ),
            Endpoint(
                self,
                "metrics",
                "GET /metrics",
                "Counters for Prometheus.",
                lambda *_: self._format_metrics(),
                always=True,
            ),
        ]

    def drain(self) -> None:
        """Says that the server is about to stop: it answers on, and ends each connection after.

        A signal calls it, amid whatever runs: it must take no lock, such as that of a counter.
        """
        # A server that was never ready goes on to refuse.
        self.status = "stopping" if self.status == "ok" else "stopping early"
        self.closing = [(b"connection", b"close")]

    def not_ready(self) -> RequestError:
        """Returns the refusal of a request that came too early or too late."""
        return RequestError(
            503,
            f"The server is not ready: {self.status}.",
            cure="Send the request again, or to another server.",
            retry_after=1,
        )

    def write_problem(self, refusal: RequestError) -> bytes:
        """Returns the body of a refusal."""
        problem = refusal.to_problem()
        if self.aliases is not None:
            problem.field = self.aliases.rename_field(problem.field)
        return ENCODER.encode(problem)

    async def _answer_unknown(self, request: Request, error: Exception) -> Response:
        """Answers a path that there is not, or another method of one that there is."""
        del request
        status = error.status_code if isinstance(error, HTTPException) else 500
        refusal = RequestError(
            status,
            "There is nothing at this path, by this method.",
            cure="See /v1/openapi.json for what there is.",
        )
        headers = {name.decode(): value.decode() for name, value in [*COMMON, *self.closing]}
        return Response(self.write_problem(refusal), status, headers, media_type=PROBLEM.decode())

    def _format_metrics(self) -> bytes:
        # Gauges are set when somebody looks, so that no request pays for them.
        self.set_gauges()
        return self.metrics.format()


class App(Service):
    """The server of one bundle or several.

    Attributes:
        versions: Versions that answer.
        impressions: Log of what is shown; None for none.
        router: Processes that hold the items in shards; None where this one has them.
        writer: Writer of changes and events.
        admin: Administration of the versions.
    """

    def __init__(
        self,
        versions: Versions,
        events: EventLog,
        *,
        access: Access | None = None,
        limits: Limits | None = None,
        aliases: Aliases | None = None,
        bundles: str = "",
        follow: bool = False,
        impressions: ImpressionLog | None = None,
        member: Member | None = None,
        log_share: float | None = None,
        router: Router | None = None,
    ):
        """Prepares the server, which is ready some time after its start.

        Args:
            versions: Versions that answer.
            events: Events on the disk.
            access: Tokens; by default there are none.
            limits: Bounds; by default those of `Limits`.
            aliases: Names of fields in the place of ours.
            bundles: Folder that further bundles are loaded from; "" for none.
            follow: Whether a new version of a bundle takes the place of the one that is served.
            impressions: Log of what is shown; None for none.
            member: This process among several that serve; None of one that serves alone.
            log_share: Share of the requests that are logged beside those that fail; None logs none.
            router: Processes that hold the items in shards; None where this one has them.
        """
        super().__init__(
            access=access, limits=limits, aliases=aliases, member=member, log_share=log_share
        )
        self.versions = versions
        self.router = router
        if router is not None:
            router.report = self.metrics.count_shard_failure
        self.impressions = impressions
        # All versions share one hook: see `ListOptions`.
        hook = versions.main.hook
        if hook is not None:
            hook.report = self.metrics.count_rerank_failure
        # Answers that wait, for shards or for the hook, are made in threads: the loop goes on.
        self._threads = None
        if router is not None or hook is not None:
            workers = min(self.limits.waiting, MAX_THREADS)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="answer")
        self._tell_list = self._tell_lists(Answers.retrieve)
        self._shadows: set[asyncio.Task[None]] = set()
        aside = member.folder if member is not None else None
        self.writer = Writer(versions, events, self.limits.writes, aside)
        if impressions is not None:
            self.writer.on_erasure = impressions.flush
        self.admin = Admin(versions, self.writer, bundles=bundles, follow=follow)
        self._differences: list[str] = []
        # Dates of the versions that metrics tell of.
        self._told: dict[str, datetime.datetime] = {}
        self._lookups = Lookups(self.versions)
        names = {} if aliases is None else aliases.theirs
        self.set_endpoints(self._make_endpoints(), page_files(names))

    @property
    def answers(self) -> Answers:
        """The version that answers where nothing else is said."""
        return self.versions.main

    @property
    def waiting_for_disk(self) -> int:
        """Number of accepted requests that wait for the disk alone."""
        return self.writer.waiting

    def readiness(self) -> types.Status:
        """Returns whether requests are answered."""
        missing = [] if self.router is None else self.router.missing
        return types.Status(self.status, self._differences, missing)

    async def prepare(self) -> None:
        """Makes the server ready: it compiles, takes in the events, and makes the golden answers.

        Where golden answers differ it is never ready, and says which.
        """
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        # A process that is started again may load versions that were replaced meanwhile.
        if self.member is not None:
            await self.admin.detach_replaced()
        await self.writer.follow()
        # In a thread: probes are answered while the towers are compiled.
        for answers in self.versions:
            warm = answers.warm
            if self.router is not None:
                warm = functools.partial(self.router.complete, answers.warm)
            self._differences += await loop.run_in_executor(None, warm)
        # What lives as long as the server is no garbage: looking through it again and again takes
        # the time of requests and finds nothing.
        gc.collect()
        gc.freeze()
        if self._differences:
            self.status = "golden answers differ"
            logging.error(
                "Not ready: %d golden answers differ from those of the export. The first: %s. The "
                "bundle, or a library that it is read by, is not the one that was exported.",
                len(self._differences),
                self._differences[0],
            )
        # Told to stop while it was made ready, it stays out.
        elif self.status == "starting":
            if self.member is not None:
                await self.member.catch_up()
                self.member.say_ready()
            self.status = "ok"
            logging.info("Ready after %.1f s.", time.perf_counter() - start)

    @contextlib.asynccontextmanager
    async def live(self, app: Starlette) -> AsyncIterator[None]:
        """The life of the server between its start and its end."""
        del app
        task = asyncio.create_task(self._prepare_and_follow())
        if self.member is not None:
            await self.member.start(self)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # In this order: others hand this process no more changes, what it accepted is written,
            # and only then does the lock of the writer go to the next one.
            if self.member is not None:
                self.member.retire()
            await self.writer.close()
            if self.impressions is not None:
                await asyncio.to_thread(self.impressions.close)
            if self.member is not None:
                await self.member.close()

    async def _prepare_and_follow(self) -> None:
        try:
            await self.prepare()
        except Exception:
            logging.exception("The server could not be made ready.")
            self.status = "it could not be made ready; its log says why"
            return
        looks = 0
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.writer.follow()
                if self.member is not None:
                    await self.member.catch_up()
                # One process alone looks for new exports and tells the others, so that all change
                # together.
                if self.member is None or self.member.is_writer:
                    await self.admin.follow()
                self.set_gauges()
                # A part at each look: all that a second brought would keep requests waiting.
                for answers in self.versions:
                    if answers.served is not None:
                        answers.served.count(WAITING // LOOKS)
                looks += 1
                if looks % LOOKS == 0:
                    self._tell_figures()
                    if self.router is not None:
                        await asyncio.to_thread(self.router.look)
            # A disk or a file that is away for a moment: the next look may find it.
            except Exception:
                logging.exception("Changes of other processes could not be followed.")

    def _make_endpoints(self) -> list[Endpoint]:
        return [
            *self._make_lists(),
            *self._make_vectors(),
            *self._make_changes(),
            *self._make_administration(),
            *self._make_reports(),
            *self._make_lookups(),
        ]

    def _make_lists(self) -> list[Endpoint]:
        """Returns the endpoints of lists, each with that of its batches."""
        kinds: list[tuple[str, str, type[Any], type[Any], MakeAnswer]] = [
            (
                "retrieve",
                "Items that suit a user, known, new or anonymous.",
                types.Retrieve,
                types.RetrieveBatch,
                Answers.retrieve,
            ),
            (
                "similar_items",
                "Items that are like one.",
                types.SimilarItems,
                types.SimilarItemsBatch,
                Answers.similar_items,
            ),
            (
                "popular",
                "Items with the most training rows.",
                types.Popular,
                types.PopularBatch,
                Answers.popular,
            ),
            ("latest", "The newest items.", types.Latest, types.LatestBatch, Answers.latest),
        ]
        made = []
        for name, summary, request, batch, function in kinds:
            # The hook is for the model's lists; all others wait for shards alone.
            waits = self.router is not None or name == "retrieve"
            answer = self._count_lists(function, waits and self._threads is not None)
            # Lists of users, where nothing is waited for.
            each = self._retrieve_each if waits and self._threads is None else None
            made.append(self._make_single(name, summary, request, types.Answer, answer, each))
            if each is not None:
                each = functools.partial(each, counts_later=True)
            made.append(self._make_batch(name, batch, types.AnswerBatch, answer, each))
        return made

    def _make_vectors(self) -> list[Endpoint]:
        """Returns the endpoints of vectors and scores."""
        choose = self.versions.choose

        def encode_user(request: types.EncodeUser) -> types.Vector:
            answers = choose(request.user_id, request.session_id, request.model_version)
            return answers.encode_user(request)

        def match(request: types.Match) -> types.Scores:
            # Pairs name several users, who may belong to different versions; their scores must
            # compare.
            answers = self.versions.main
            if request.model_version is not None:
                answers = choose(version=request.model_version)
            return answers.match(request)

        async def match_in_thread(request: types.Match) -> types.Scores:
            # The vectors of the items are with the shards.
            return await self._in_thread(match, request)

        answer = match if self.router is None else match_in_thread
        summary = "The vector of a user."
        return [
            self._make_single("encode_user", summary, types.EncodeUser, types.Vector, encode_user),
            self._make_batch("encode_user", types.EncodeUserBatch, types.VectorBatch, encode_user),
            self._make_single(
                "match", "Scores of pairs of a user and an item.", types.Match, types.Scores, answer
            ),
        ]

    def _make_single(
        self,
        name: str,
        summary: str,
        request: type[Any],
        answer: type[Any],
        function: Callable[[Any], Any],
        each: HandleEach | None = None,
    ) -> Endpoint:
        """Returns the endpoint of one request at a time."""
        return Endpoint(
            self,
            name,
            f"POST /v1/{name}",
            summary,
            lambda asked, _: function(asked),
            handle_each=each,
            request=request,
            answer=answer,
            waits=inspect.iscoroutinefunction(function),
        )

    def _make_batch(
        self,
        name: str,
        request: type[Any],
        answer: type[Any],
        function: Callable[[Any], Any],
        each: HandleEach | None = None,
    ) -> Endpoint:
        """Returns the endpoint of several such requests in one."""

        async def handle(batch: Any, item_id: str) -> Any:
            del item_id
            if each is not None:
                return answer(await answer_together(each, batch.requests))
            return answer(await answer_each(function, batch.requests))

        return Endpoint(
            self,
            f"{name}_batch",
            f"POST /v1/{name}/batch",
            "Several of these in one request, all answered or none.",
            handle,
            request=request,
            answer=answer,
        )

    def _make_lookups(self) -> list[Endpoint]:
        """Returns the endpoints of the page."""
        made = []
        for lookup in self._lookups.endpoints():
            made.append(
                Endpoint(
                    self,
                    lookup.name,
                    lookup.route,
                    lookup.summary,
                    lookup.handle,
                    request=lookup.request,
                    answer=lookup.answer,
                )
            )
        return made

    def _make_changes(self) -> list[Endpoint]:
        """Returns the endpoints that change something."""
        change = self.writer.change
        if self.router is not None:
            # Of the whole bundle only: see the guide on shards.
            change = self._refuse_change
        return [
            Endpoint(
                self,
                "put_item",
                "PUT /v1/items/{item_id}",
                "Adds or replaces an item.",
                lambda put, item_id: change(
                    lambda answers: answers.put_items([(item_id, put.columns)])
                ),
                right=Right.CHANGE,
                request=types.PutItem,
                answer=types.Changed,
                needs_token=True,
                changes=True,
            ),
            Endpoint(
                self,
                "delete_item",
                "DELETE /v1/items/{item_id}",
                "Deletes an item.",
                lambda _, item_id: change(lambda answers: answers.delete_item(item_id)),
                right=Right.CHANGE,
                answer=types.Changed,
                needs_token=True,
                changes=True,
            ),
            Endpoint(
                self,
                "put_items",
                "PUT /v1/items",
                "Adds or replaces items, all or none of them.",
                lambda put, _: change(
                    lambda answers: answers.put_items(
                        [(item.item_id, item.columns) for item in put.items]
                    )
                ),
                right=Right.CHANGE,
                request=types.PutItems,
                answer=types.Changed,
                needs_token=True,
                changes=True,
            ),
            Endpoint(
                self,
                "events",
                "POST /v1/events",
                "Remembers what users did; their next requests are answered by it.",
                self._add_events,
                right=Right.CHANGE,
                request=types.Events,
                answer=types.Accepted,
                changes=True,
            ),
            Endpoint(
                self,
                "erase_user",
                "POST /v1/erase_user",
                "Deletes what was sent of a user, and what the user was shown, for good.",
                self._erase_user,
                right=Right.CHANGE,
                request=types.EraseUser,
                answer=types.Erased,
                needs_token=True,
                changes=True,
            ),
        ]

    def _make_administration(self) -> list[Endpoint]:
        """Returns the endpoints that change which version answers."""
        admin = self.admin
        calls: list[tuple[str, str, str, type[Any] | None, Handle]] = [
            (
                "load",
                "POST /v1/admin/load",
                "Loads one more bundle, which answers nobody yet.",
                admin_types.LoadBundle,
                admin.load,
            ),
            (
                "unload",
                "POST /v1/admin/unload",
                "Drops a version that is not used.",
                admin_types.NamedVersion,
                admin.unload,
            ),
            (
                "swap",
                "POST /v1/admin/swap",
                "Answers everybody by one version.",
                admin_types.NamedVersion,
                admin.swap,
            ),
            (
                "rollback",
                "POST /v1/admin/rollback",
                "Answers as before the last swap, split or shadow.",
                None,
                admin.roll_back,
            ),
            (
                "split",
                "PUT /v1/admin/split",
                "Shares the users among versions.",
                admin_types.Split,
                admin.split,
            ),
            (
                "shadow",
                "PUT /v1/admin/shadow",
                "Lets a version answer after the real one, for the comparison alone.",
                admin_types.Shadow,
                admin.shadow,
            ),
            (
                "versions",
                "GET /v1/admin/versions",
                "The versions that are loaded, and whom they answer.",
                None,
                admin.list,
            ),
        ]
        return [
            Endpoint(
                self,
                name,
                route,
                summary,
                handle,
                right=Right.ADMIN,
                request=request,
                answer=admin_types.VersionList,
                needs_token=True,
                changes=not route.startswith("GET"),
            )
            for name, route, summary, request, handle in calls
        ]

    def _make_reports(self) -> list[Endpoint]:
        """Returns the endpoints that say something of the server."""
        return [
            Endpoint(
                self,
                "info",
                "GET /v1/info",
                "Versions, figures of quality and the data of the model.",
                lambda *_: self.answers.info(),
                answer=types.Info,
            ),
            Endpoint(
                self,
                "openapi",
                "GET /v1/openapi.json",
                "This description.",
                lambda *_: self._describe(),
                answer=dict,
                always=True,
            ),
            *self.make_probes(),
        ]

    def _count_lists(self, function: MakeAnswer, in_thread: bool) -> Callable[[Any], Any]:
        """Returns a function that makes lists by the version of the user, and counts them.

        Args:
            function: Function that makes a list.
            in_thread: Whether it may wait, and is therefore called in a thread.
        """
        choose = self._choose
        tell = self._tell_lists(function)

        def answer(request: Any) -> types.Answer:
            answers = choose(request)
            made = function(answers, request)
            tell(answers, request, made)
            return made

        async def answer_in_thread(request: Any) -> types.Answer:
            answers = choose(request)
            made = await self._in_thread(self._make_list, function, answers, request)
            tell(answers, request, made)
            return made

        return answer_in_thread if in_thread else answer

    def _choose(self, request: Any) -> Answers:
        """Returns the version that answers a request for a list."""
        # With each request, since versions come and go.
        user = getattr(request, "user_id", None)
        session = getattr(request, "session_id", None)
        return self.versions.choose(user, session, request.model_version)

    def _retrieve_each(
        self, requests: Mapping[int, types.Retrieve], *, counts_later: bool = False
    ) -> Mapping[int, Made]:
        """Returns the lists that requests ask for, by their number; see `HandleEach`.

        Args:
            requests: Requests by their number.
            counts_later: Whether functions are returned for lists that are made as well, which
                count them: the lists of a batch of which one is refused are shown to nobody.
        """
        found: dict[int, Made] = {}
        if not requests:
            return found
        by_version: dict[Answers, dict[int, types.Retrieve]] = {}
        for number, request in requests.items():
            try:
                by_version.setdefault(self._choose(request), {})[number] = request
            except Exception as error:
                found[number] = error
        self.metrics.batches.observe(len(requests))
        for answers, asked in by_version.items():
            for number, made in answers.retrieve_each(asked).items():
                found[number] = self._counted(answers, asked[number], made, later=counts_later)
        return found

    def _counted(
        self, answers: Answers, request: types.Retrieve, made: Made, *, later: bool
    ) -> Made:
        """Returns what was made, and counts a list; one that is not made yet when it is."""
        if isinstance(made, Exception):
            return made
        if not isinstance(made, types.Answer):
            return lambda: self._tell(answers, request, made())
        if later:
            return functools.partial(self._tell, answers, request, made)
        try:
            return self._tell(answers, request, made)
        except Exception as error:
            return error

    def _tell(self, answers: Answers, request: types.Retrieve, made: types.Answer) -> types.Answer:
        """Returns a list that it counts."""
        self._tell_list(answers, request, made)
        return made

    def _tell_lists(self, function: MakeAnswer) -> Callable[[Answers, Any, types.Answer], None]:
        """Returns a function that counts lists, and keeps what was shown.

        Args:
            function: Function that makes the lists.
        """
        count = self.metrics.count_items
        impressions = self.impressions
        versions = self.versions

        def tell(answers: Answers, request: Any, made: types.Answer) -> None:
            items = made.items
            if items:
                # Most lists are of one source, and counting them costs as much as an item.
                if getattr(request, "promotions", ()) or getattr(request, "explore", 0):
                    sources: collections.Counter[types.Source] = collections.Counter()
                    sources.update(item.source for item in items)
                    for source, number in sources.items():
                        count(source, made.model_version, number)
                else:
                    count(items[0].source, made.model_version, len(items))
                if len(items) < request.k:
                    self.metrics.short.inc()
                if impressions is not None:
                    # The id is brought into the form of the log by the thread that writes: it costs
                    # as much as a short list.
                    user = getattr(request, "user_id", None)
                    read_user = answers.retriever.forms.user_id.one
                    impressions.add(user, read_user, request.offset, made)
                if answers.served is not None:
                    # Counted now and then, by whoever tells the figures: here it is kept alone.
                    answers.served.add(request, made)
            else:
                self.metrics.empty.inc()
            if versions.shadow is not None:
                self._call_shadow(function, request, made)

        return tell

    async def _in_thread(self, function: Callable[..., R], *values: Any) -> R:
        """Returns what a function returns that waits, in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *values)

    def _make_list(self, function: MakeAnswer, answers: Answers, request: Any) -> types.Answer:
        """Returns a list, which says what shards it is without."""
        if self.router is None:
            return function(answers, request)
        with self.router.watch() as missed:
            made = function(answers, request)
        made.missing_shards = sorted(missed)
        return made

    async def _refuse_change(self, change: Change) -> types.Changed:
        """Refuses a change of items that shards in other processes hold."""
        del change
        raise RequestError(
            501,
            "The items of shards in processes of their own are not changed by requests.",
            cure="Change and compact the bundle in one process, and start all of these again.",
        )

    def _call_shadow(self, function: MakeAnswer, request: Any, made: types.Answer) -> None:
        """Lets the shadow answer a request, if it is one of its share, after the real answer."""
        # A version that was asked for by name is somebody's own comparison.
        is_apart = request.model_version is not None
        if is_apart or random.random() >= self.versions.state.routing.share:
            return
        # Those who wait for an answer come first: with half of the queue full there is none for
        # nobody.
        if self.accepted > self.limits.waiting // 2:
            self.metrics.shadows_skipped.inc()
            return
        loop = asyncio.get_running_loop()
        if self._threads is None:
            loop.call_soon(self._answer_shadow, function, request, made)
            return
        # As the real answer was made. The loop itself holds tasks by weak references alone.
        task = loop.create_task(self._in_thread(self._answer_shadow, function, request, made))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    def _answer_shadow(self, function: MakeAnswer, request: Any, made: types.Answer) -> None:
        shadow = self.versions.shadow
        # The shadow may have been taken away, or have become the main version, since the request
        # was answered.
        if shadow is None or shadow.version == made.model_version:
            return
        try:
            others = function(shadow, request).items
        except Exception as error:
            self.metrics.shadows_failed.inc()
            logging.log_every_n_seconds(logging.WARNING, "The shadow failed: %s", 10, error)
            return
        ids = {item.item_id for item in made.items}
        shared = sum(item.item_id in ids for item in others)
        longest = max(len(ids), len(others), 1)
        self.metrics.count_shadow(shadow.version, shared / longest)

    async def _erase_user(self, request: types.EraseUser, item_id: str) -> types.Erased:
        del item_id
        user = read_id(request.user_id, self.answers.retriever.forms.user_id, "user_id")
        events = await self.writer.erase(user)
        rows = 0
        # After the events: all processes have then written what they had shown.
        if self.impressions is not None:
            try:
                rows = await asyncio.to_thread(self.impressions.erase, user)
            except ChangesError as error:
                logging.error("%s", error)
                raise RequestError(
                    503,
                    "Some files of impressions cannot be read; nothing of the user is elsewhere.",
                    cure="Delete or restore the files that the server's log names; send it again.",
                ) from None
        return types.Erased(events, rows)

    async def _add_events(self, request: types.Events, item_id: str) -> types.Accepted:
        del item_id
        events = self.answers.read_events(request.events)
        accepted = await self.writer.add_events(events)
        self.metrics.events.inc(accepted)
        return types.Accepted(accepted, len(events) - accepted)

    def _describe(self) -> Mapping[str, Any]:
        described = openapi.describe(self.endpoints)
        if self.aliases is None:
            return described
        return self.aliases.to_theirs(described)

    def _tell_figures(self) -> None:
        """Tells which versions there are, and what they have served lately."""
        now = time.time()
        told = {info.model_version: info for info in self.versions.list().versions}
        # Prometheus keeps the last value of a label: one that is gone must be told as such.
        for version in {*told, *self._told}:
            share = told[version].share if version in told else 0.0
            if version in told:
                self._told[version] = datetime.datetime.fromisoformat(told[version].date)
            self.metrics.set_version(version, share, now - self._told[version].timestamp())
        for answers in self.versions:
            cache = answers.cache
            self.metrics.count_cached(cache.hits, cache.misses)
            # The counters of the library only rise; the cache is asked for what has come since the
            # last look.
            cache.hits = 0
            cache.misses = 0
            if answers.served is not None:
                # What waits was counted before, a part at a time.
                figures = answers.served.look(len(answers.retriever), count=0)
                self.metrics.set_figures(answers.version, figures)

    def set_gauges(self) -> None:
        """Tells the counters what is so now."""
        super().set_gauges()
        self.metrics.items.set(len(self.answers.retriever))
        self.metrics.changes.set(self.answers.retriever.changes)
        if self.router is not None:
            self.metrics.set_shards(len(self.router), self.router.missing)
        if self.impressions is not None:
            self.metrics.impressions_lost.set(self.impressions.lost)


def _item_id_of(scope: Scope) -> str:
    """Returns the id in a path; "" where it has none.

    Raises:
        RequestError: It is none that a request could name.
    """
    params = scope["path_params"]
    if "item_id" not in params:
        return ""
    item_id: str = params["item_id"]
    # What stands for bytes that are no UTF-8: two such ids would be one.
    is_readable = "\ufffd" not in item_id or b"%EF%BF%BD" in scope["raw_path"].upper()
    if not is_readable or not 1 <= len(item_id) <= types.MAX_LETTERS:
        raise RequestError(
            400,
            f"item_id={echo(item_id)} is no id of 1 to {types.MAX_LETTERS} letters in UTF-8.",
            field="item_id",
            value=echo(item_id),
            cure="Write the id of the item at the end of the path, percent-encoded.",
        )
    return item_id


def _headers_of(refusal: RequestError) -> Headers:
    headers = [(b"content-type", PROBLEM), *COMMON]
    if refusal.retry_after:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers
