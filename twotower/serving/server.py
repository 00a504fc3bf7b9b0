"""The process that serves: its socket, its connections, its start and its end.

Connections are bounded before a request is read: a head that is too long or too slow, a client that
takes no answer, and requests beyond those that can be answered in time end here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import socket
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from absl import logging as absl_logging

from twotower.core.errors import ConfigError
from twotower.core.remote.copies import keep_bundle, source_of
from twotower.serving import types
from twotower.serving.access import Access, Hosts
from twotower.serving.aliases import Aliases
from twotower.serving.answers import FindVector
from twotower.serving.app import COMMON, ENCODER, PROBLEM, App, Receive, Scope, Send, Service
from twotower.serving.direct import DirectProtocol, Headers, Queue
from twotower.serving.errors import TOO_MANY_CONNECTIONS, TOO_MANY_REQUESTS, RequestError
from twotower.serving.events import EventLog
from twotower.serving.impressions.log import ImpressionLog
from twotower.serving.limits import Limits
from twotower.serving.lists.options import ListOptions
from twotower.serving.monitoring.log import use_json
from twotower.serving.processes.member import Member
from twotower.serving.processes.signals import signals_to
from twotower.serving.shards.router import Router
from twotower.serving.versions.versions import load_all, load_router, restore

# Written once, here: it is sent when there is no time to write anything.
_OVERLOAD = ENCODER.encode(
    RequestError(
        503,
        TOO_MANY_REQUESTS,
        cure="Send it again later, or to another server.",
    ).to_problem()
)
_SHED_HEADERS = [
    (b"content-type", PROBLEM),
    (b"content-length", b"%d" % len(_OVERLOAD)),
    (b"retry-after", b"1"),
]
_SHED = b"".join(
    [
        b"HTTP/1.1 503 Service Unavailable\r\n",
        *(b"%s: %s\r\n" % header for header in [*_SHED_HEADERS, *COMMON]),
        b"\r\n",
        _OVERLOAD,
    ]
)
_OFFER = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
# Files whose warnings are on single requests: a stranger could fill the log with them.
_OF_REQUESTS = ("retriever.py", "httptools_impl.py")
MAX_TOGETHER = 64  # requests that wait at the same moment and are answered together
CROWD = 0.1  # share of the requests that may wait, from which on late ones are refused
BACKLOG = 2_048  # connections that the system holds until they are accepted
DRAIN_SECONDS = 1.0  # between a signal to stop and the last request that is accepted
GRACE_SECONDS = 0.2  # in which a connection that was accepted last sends its request
# For refusals before there is a request, which no framework has an answer for.
_STATUS_LINES = {
    408: b"HTTP/1.1 408 Request Timeout\r\n",
    431: b"HTTP/1.1 431 Request Header Fields Too Large\r\n",
    503: b"HTTP/1.1 503 Service Unavailable\r\n",
    400: b"HTTP/1.1 400 Bad Request\r\n",
    421: b"HTTP/1.1 421 Misdirected Request\r\n",
    501: b"HTTP/1.1 501 Not Implemented\r\n",
}

_PROBLEMS = {
    400: "This is no request of HTTP.",
    408: "The request did not arrive in time.",
    431: "The headers of the request are too long.",
    421: "This server does not answer to the name in the header Host. --allowed_hosts adds names.",
    501: "This server speaks HTTP/1.1 alone. Send the request without the header Upgrade.",
    503: TOO_MANY_CONNECTIONS,
}


def make_app(
    folders: Mapping[str, Path],
    *,
    events: str = "",
    tokens: str = "",
    aliases: str = "",
    bundles: str = "",
    follow: bool = False,
    limits: Limits,
    lists: ListOptions | None = None,
    impressions: str = "",
    log_share: float | None = None,
    find_vector: FindVector | None = None,
    member: Member | None = None,
    router: Router | None = None,
) -> App:
    """Loads bundles, and returns their server.

    Args:
        folders: Folder of each bundle by its name; the first one answers until another one is told
            to.
        events: File of the events; "" for one beside the first bundle.
        tokens: File of the tokens; "" for none.
        aliases: File of the names of fields; "" for ours.
        bundles: Folder that further bundles are loaded from; "" for none.
        follow: Whether a new version of a bundle takes the place of the one that is served.
        limits: Bounds.
        lists: Options of the lists; by default those of `ListOptions`.
        impressions: Folder for what is shown; "" for none.
        log_share: Share of the requests that are logged beside those that fail, as JSON; None for
            a log of text, without requests.
        find_vector: Function that finds vectors of users who are not in the bundle.
        member: This process among several that serve; None of one that serves alone.
        router: Processes that hold the shards of the one bundle; None where this one has all.

    Raises:
        TwotowerError: A bundle, or one of the files, cannot be read.
    """
    if log_share is not None:
        use_json()
    access = Access.read(tokens)
    first = next(iter(folders.values())).absolute()
    # Before the bundles, which take seconds: a wrong --rerank or --fallback is told at once.
    options = lists or ListOptions()
    prepared = options.prepare(first)
    # Lists that wait, for shards or for a hook, are made in threads, each for itself.
    most = MAX_TOGETHER if router is None and not options.rerank else 1
    make = functools.partial(prepared, find_vector=find_vector, max_together=most)
    state = None
    if member is not None:
        state = member.read_state()
    if router is not None:
        versions = load_router(folders, make, router)
    else:
        # A process that takes the place of a dead one answers by the versions of the others.
        versions = load_all(folders, make) if state is None else restore(state, make)
    # Beside the bundle and not in it: the next export replaces the folder.
    path = Path(events or first.parent / f"{first.name}.events")
    names = None
    if aliases:
        # The features of requests have names too, which a shop may call otherwise.
        columns = versions.main.user_columns
        names = Aliases.read(aliases, {*types.field_names(), *columns})
    app = App(
        versions,
        EventLog(path),
        access=access,
        limits=limits,
        aliases=names,
        bundles=bundles,
        follow=follow,
        impressions=ImpressionLog(impressions) if impressions else None,
        router=router,
        member=member,
        log_share=log_share,
    )
    for folder in folders.values():
        address = source_of(folder)
        if address:
            app.admin.look[str(folder)] = functools.partial(keep_bundle, address)
    return app


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address, and not open for connections yet.

    Args:
        host: Name or address of this machine.
        port: Port; 0 for a free one.

    Raises:
        ConfigError: The address is not this machine's, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        # A server that is started again need not wait for the connections of the one before to time
        # out.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port} cannot be served at: {error.strerror or error}. Name a "
            "free port of this machine; --port=0 finds one."
        ) from None
    return bound


def serve(app: Service, bound: socket.socket) -> None:
    """Answers requests until a signal ends it: SIGTERM or Ctrl-C.

    What was accepted is answered first.

    Args:
        app: Server of a bundle.
        bound: Socket of `bind`.
    """
    limits = app.limits

    # uvicorn takes a class and makes its connections itself: a class of its own carries the server
    # to them.
    class Protocol(_Protocol):
        """Connections of this server."""

    Protocol.served = app
    Protocol.direct = app.direct
    Protocol.queue = Queue(MAX_TOGETHER, (limits.batch_us or 0) / 1e6)
    Protocol.idle_seconds = limits.idle
    Protocol.wait_seconds = limits.wait
    Protocol.hosts = Hosts.at(bound.getsockname()[0], app.limits.hosts)
    absl_logging.get_absl_handler().addFilter(_is_of_the_server)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        # On, not "auto", which would take an error of the start for a missing life.
        lifespan="on",
        interface="asgi3",
        # The log is absl's, as in all commands.
        log_config=None,
        access_log=False,
        server_header=False,
        # Nothing reads the address of a client, and headers that name one can be forged.
        proxy_headers=False,
        backlog=BACKLOG,
        # Whole seconds, of which 0 would close each connection at once.
        timeout_keep_alive=max(1, round(limits.idle)),
        timeout_graceful_shutdown=max(1, round(limits.seconds)) + 5,
    )
    _Server(config, app).run(sockets=[bound])


def _is_of_the_server(record: logging.LogRecord) -> bool:
    """Whether a line of the log says nothing of a single request: those are answered in full."""
    return record.levelno >= logging.ERROR or not record.pathname.endswith(_OF_REQUESTS)


async def _shed(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses a request that could not be answered in time."""
    del scope, receive
    headers = [*_SHED_HEADERS, *COMMON]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _OVERLOAD})


class _Server(uvicorn.Server):
    """A server that answers on for a moment after it was told to stop.

    Balancers and clients with open connections need that moment to turn to another one.
    """

    def __init__(self, config: uvicorn.Config, app: Service):
        super().__init__(config)
        self._app = app
        self._stop_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        member = self._app.member
        if member is not None and not member.has_joined:
            # The process has accepted nothing, and is in the midst of loading. It ends without an
            # exception, since Python would wait for the thread that compiles.
            os._exit(0)
        # A second signal does not wait.
        if self._stop_at:
            self.should_exit = True
            return
        self._app.drain()
        self._stop_at = time.monotonic() + DRAIN_SECONDS

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            # uvicorn does this too, but asks open connections to end in the same moment.
            server.close()
        # Connections that were just made have not sent their request yet.
        await asyncio.sleep(GRACE_SECONDS)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Takes signals while it serves; its own end by one of them is no failure."""
        # uvicorn would raise them once more after its end, and the status would be theirs.
        with signals_to(self.handle_exit):
            yield


class _Protocol(DirectProtocol):
    """A connection with bounds.

    Attributes:
        served: Server that it belongs to.
        hosts: Names that it answers to; None for any.
    """

    served: Service
    hosts: Hosts | None = None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Two counts, of the same head: what has arrived of it, and what was read of it.
        self._head_bytes = 0
        self._header_bytes = 0
        self._is_in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refusal = 400
        self._is_shed = False
        self._allowed_host = b""
        self.app = self._accept

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        limits = self.served.limits
        if len(self.connections) > limits.connections:
            self._refuse(503)
            return
        self._head_timer = self.loop.call_later(limits.seconds, self._refuse, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        self._cancel_write_timer()
        # Requests behind the one that is answered never begin.
        self.served.accepted -= sum(app == self._accept for _, app in self.pipeline)
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Java's client offers HTTP/2 with the first request of each connection, others WebSocket.
        # The offer may be left unanswered (RFC 9110, 7.8), but the parser takes what follows for
        # another protocol, and the body is lost. Of the same length, since a body has one that was
        # told before; in none that is JSON a line begins so.
        if b"grade:" in data:
            data = _OFFER.sub(b"\r\nignored:", data)
        super().data_received(data)
        # The bytes of bodies are bounded by `read_body`, and those of a whole head by `on_header`.
        if not self._is_in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        limits = self.served.limits
        # `on_header` is not told of a single header that never ends; of a head that came as a whole
        # nothing is left to count here.
        if self._head_bytes > limits.head:
            self._refuse(431)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(limits.seconds, self._refuse, 408)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        self._header_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self.served.limits.head:
            self._refusal = 431
            # The parser of httptools ends a connection by an exception; `send_400_response` then
            # sends the refusal.
            raise ValueError("the head is too long")
        # Fields behind a body in chunks are no headers: a proxy in front has not looked at them.
        if not self._is_in_head:
            return
        name = name.lower()
        # As uvicorn's own method does, whose call would cost as much as all of this one.
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        # Most requests of a connection name the same host.
        if name != b"host" or self.hosts is None or value == self._allowed_host:
            return
        if not self.hosts.allow(value):
            self._refusal = 421
            raise ValueError("the request is meant for another server")
        self._allowed_host = value

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._cancel_head_timer()
        served = self.served
        # An offer that arrived in two pieces, or in capitals; or CONNECT.
        if self.parser is not None and self.parser.should_upgrade():
            self._refusal = 501
            raise ValueError("another protocol is offered")
        # Requests that wait for the disk take no time of the others, and have a bound of their own.
        if served.accepted - served.waiting_for_disk < served.limits.waiting:
            served.accepted += 1
            super().on_headers_complete()
            return
        # Several requests of one connection are answered in their order: only where none is before
        # it is this one refused at once.
        if self.is_free:
            self._is_shed = True
            return
        self.app = _shed
        super().on_headers_complete()
        self.app = self._accept

    def on_body(self, body: bytes) -> None:
        if not self._is_shed:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_shed:
            super().on_message_complete()
            return
        # Without a task: refusing must cost less than answering, or nobody is answered any more.
        self._is_shed = False
        self.refuse_late()
        is_kept = self.parser is not None and self.parser.should_keep_alive()
        if self.served.closing or not is_kept:
            self.transport.close()
            return
        # As uvicorn does after an answer, of which it has seen none here.
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    async def _accept(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request that was accepted."""
        try:
            await self.served(scope, receive, send)
        finally:
            self.served.accepted -= 1

    @property
    def closing(self) -> Headers:
        return self.served.closing

    @property
    def is_crowded(self) -> bool:
        # A few that waited, while a version was loaded on a busy machine, cost no more to answer
        # than to refuse, and nobody has to ask again.
        return self.served.accepted > self.served.limits.waiting * CROWD

    def refuse_late(self) -> None:
        self.served.metrics.shed.inc()
        self.transport.write(_SHED)

    def on_direct_end(self) -> None:
        self.served.accepted -= 1

    def on_response_complete(self) -> None:
        # The rest of a body that nobody reads would be taken for the next request.
        if self.cycle.more_body:
            self.transport.close()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        # A client that takes no answers holds their memory.
        seconds = self.served.limits.seconds
        self._write_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _refuse(self, status: int) -> None:
        """Ends the connection with a refusal that needs no request."""
        self._head_timer = None
        if self.transport.is_closing():
            return
        body = self.served.write_problem(RequestError(status, _PROBLEMS[status]))
        head = b"content-type: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(_STATUS_LINES[status] + head % (PROBLEM, len(body)) + body)
        self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
