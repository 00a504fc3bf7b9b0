"""Answers to usual requests without a task, a scope and messages of ASGI for each of them.

A request is usual if it goes to an endpoint that waits for nothing, arrives in one piece, and
leaves the connection open. It is answered by a callback of the event loop, in its turn among all
that arrived, and together with those that wait beside it. Everything else goes uvicorn's way.
"""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

Headers = list[tuple[bytes, bytes]]
TURN_SECONDS = 0.01  # time after which the loop looks at what else has arrived


class Reply(NamedTuple):
    """An answer in the terms of HTTP.

    Attributes:
        status: Status.
        headers: Headers but for the length of the body.
        body: Body.
        version: Version of a bundle that answered; "" where it is of none, or of several.
    """

    status: int
    headers: Headers
    body: bytes
    version: str = ""


class WholeRequest(NamedTuple):
    """A request that has arrived.

    Attributes:
        headers: Headers, their names in small letters.
        body: Body.
        arrived: Time at which it was there, of `time.perf_counter`.
    """

    headers: Headers
    body: bytes
    arrived: float


# Makes the reply to a request, in a turn of its own.
MakeReply = Callable[[], Reply]


class DirectEndpoint(Protocol):
    """An endpoint that waits for nothing."""

    @property
    def gathers(self) -> bool:
        """Whether many requests are answered for less than each alone."""
        ...

    def reply_each(self, requests: Sequence[WholeRequest]) -> Sequence[Reply | MakeReply]:
        """Returns the reply to each request, or its refusal.

        Args:
            requests: Requests that wait at the same moment.

        Returns:
            The reply of each that is made together with others, and a function that makes the
            others, which take a turn of their own.
        """
        ...


class _Request(NamedTuple):
    """A request that is to be answered directly.

    Attributes:
        endpoint: Endpoint of its path.
        headers: Headers, their names in small letters.
        parts: Body, as far as it has arrived.
    """

    endpoint: DirectEndpoint
    headers: Headers
    parts: list[bytes]


class DirectProtocol(HttpToolsProtocol):
    """A connection whose usual requests are answered directly.

    Attributes:
        direct: Endpoint by the path of its POST requests.
        queue: Connections whose requests wait for their turn.
        idle_seconds: Time after which a connection without a request is closed.
        wait_seconds: Time after which a request that waits for its turn is refused.
    """

    direct: Mapping[bytes, DirectEndpoint]
    queue: Queue
    idle_seconds: float
    wait_seconds: float = math.inf

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # The request whose body arrives, the one that waits, and what makes the reply to one that
        # waits for a turn of its own.
        self._arriving: _Request | None = None
        self._waiting: _Request | None = None
        self._make: MakeReply | None = None
        self._arrived = 0.0
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def is_free(self) -> bool:
        """Whether no request of the connection waits for its answer."""
        is_done = self.cycle is None or self.cycle.response_complete
        return is_done and self._waiting is None and self._make is None

    @property
    def closing(self) -> Headers:
        """Headers of answers after which the connection ends; none while it goes on."""
        return []

    @property
    def is_crowded(self) -> bool:
        """Whether so many requests wait that one which has waited for long is refused."""
        return True

    def refuse_late(self) -> None:
        """Refuses a request that has waited for `wait_seconds`."""
        raise NotImplementedError

    def on_direct_end(self) -> None:
        """Is called when a request that was to be answered directly is over."""

    def on_message_begin(self) -> None:
        # Without the scope of uvicorn's way, which is made by `_go_on_by_uvicorn` where it is read.
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        # By the URL as it was sent: one with a query, or written otherwise, goes uvicorn's way.
        endpoint = self.direct.get(self.url)
        if endpoint is None or not self._is_usual():
            self._go_on_by_uvicorn()
            return
        self._arriving = _Request(endpoint, self.headers, [])

    def _go_on_by_uvicorn(self) -> None:
        """Answers the request whose headers are here by a task, as uvicorn does."""
        # In the order of the requests: uvicorn knows nothing of one before it that still waits.
        self.queue.answer_now(self)
        url = self.url
        headers = self.headers
        expects = self.expect_100_continue
        super().on_message_begin()
        self.url = url
        # Into its list, which the scope holds too.
        self.headers += headers
        self.expect_100_continue = expects
        super().on_headers_complete()

    def _is_usual(self) -> bool:
        """Whether a request with these headers can be answered directly, once its body is here."""
        parser = self.parser
        # Requests that a client sends behind one another are answered in their order: uvicorn keeps
        # it.
        if parser is None or not self.is_free or self.expect_100_continue or self.closing:
            return False
        # A client that takes no answers is made to wait: those it goes on to ask for would pile up.
        if self.flow.write_paused:
            return False
        is_post = parser.get_method() == b"POST" and parser.get_http_version() == "1.1"
        return is_post and parser.should_keep_alive() and not parser.should_upgrade()

    def on_body(self, body: bytes) -> None:
        if self._arriving is None:
            super().on_body(body)
            return
        self._arriving.parts.append(body)

    def on_message_complete(self) -> None:
        if self._arriving is None:
            super().on_message_complete()
            return
        self._waiting = self._arriving
        self._arriving = None
        self._arrived = time.perf_counter()
        # Not at once: what has arrived on other connections is counted first, so that too many
        # requests are refused and not queued.
        self.queue.add(self, self.loop)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._arriving is not None and not self.transport.is_closing():
            # All that has arrived was parsed: what is missing comes later, or never, and uvicorn
            # bounds that.
            self._wait_for_body(self._arriving)

    def _wait_for_body(self, request: _Request) -> None:
        """Hands a request of which a part is missing over to uvicorn."""
        self._arriving = None
        self._go_on_by_uvicorn()
        for part in request.parts:
            super().on_body(part)

    @property
    def waits_for(self) -> DirectEndpoint | None:
        """The endpoint that a request waits for; None where none does."""
        # It may have been answered as the server stopped, or its client has gone.
        return None if self._waiting is None else self._waiting.endpoint

    def take(self) -> WholeRequest | None:
        """Returns the request that waits, to be answered now; None if that is too late."""
        request = self._waiting
        self._waiting = None
        if request is None or self._is_over():
            return None
        return WholeRequest(request.headers, b"".join(request.parts), self._arrived)

    def wait_for_turn(self, make: MakeReply) -> None:
        """Lets the request that was taken wait for a turn of its own."""
        self._make = make

    def take_turn(self) -> None:
        """Answers the request that has waited for its own turn, if there still is one."""
        make = self._make
        self._make = None
        if make is None or self._is_over():
            return
        try:
            reply = make()
        except BaseException:
            self.fail()
            raise
        self.send(reply)

    def _is_over(self) -> bool:
        """Whether a request needs no answer any more: its client has gone, or it is refused."""
        if self.transport.is_closing():
            self.on_direct_end()
            return True
        # Whoever waits behind it would wait even longer, until nobody was answered in time.
        if time.perf_counter() - self._arrived > self.wait_seconds and self.is_crowded:
            self.refuse_late()
            self._go_on(self.closing)
            return True
        return False

    def send(self, reply: Reply) -> None:
        """Writes the answer to the request that was taken."""
        # Once: a signal to stop may come at any moment.
        closing = self.closing
        head = _HEADS.find(self.server_state.default_headers, reply, closing)
        length = b"content-length: %d\r\n\r\n" % len(reply.body)
        # One write, of which the system makes one packet where it fits.
        self.transport.write(b"".join((head, length, reply.body)))
        self.server_state.total_requests += 1
        self._go_on(closing)

    def fail(self) -> None:
        """Ends the connection without an answer to the request that was taken, after a defect."""
        # Its client would wait for good.
        self.transport.close()
        self.on_direct_end()

    def _go_on(self, closing: Headers) -> None:
        """Begins to wait for the next request, unless the connection is to end."""
        self.on_direct_end()
        if closing:
            self.transport.close()
        else:
            self._rest()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        self.queue.answer_now(self)
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._arriving or self._waiting or self._make:
            self._arriving = None
            self._waiting = None
            self._make = None
            self.on_direct_end()
        super().connection_lost(exc)

    def _rest(self) -> None:
        """Begins to wait for the next request."""
        self._idle_since = self.loop.time()
        # One timer for all requests of a connection: one for each costs as much as its answer.
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.idle_seconds, self._end_idle)

    def _end_idle(self) -> None:
        """Closes the connection if it has been idle for long, or looks again later."""
        self._idle_timer = None
        if self.transport.is_closing():
            return
        # Requests since the timer was set have moved the end, and not the timer.
        left = self._idle_since + self.idle_seconds - self.loop.time()
        if left <= 0 and self.is_free and self._arriving is None:
            self.transport.close()
            return
        self._idle_timer = self.loop.call_later(max(left, 1.0), self._end_idle)


class Queue:
    """Connections of one event loop whose requests wait, answered some at a time.

    Those that wait at the same moment are answered together, as far as their endpoint makes many
    answers for less than it makes each alone: all are made before the first is written, since the
    caches of a processor hold the one or the other. The others follow one by one.
    """

    def __init__(self, at_once: int, seconds: float = 0.0):
        """Starts with nobody.

        Args:
            at_once: Greatest number of requests that are answered together.
            seconds: Time in which requests are collected after the first one, unless there are
                as many; 0 to wait for nobody.
        """
        self._at_once = at_once
        self._seconds = seconds
        self._waiting: list[DirectProtocol] = []
        # Those whose requests each wait for a turn of their own.
        self._alone: collections.deque[DirectProtocol] = collections.deque()
        self._first_at = 0.0

    def add(self, connection: DirectProtocol, loop: asyncio.AbstractEventLoop) -> None:
        """Lets a connection wait whose request is whole."""
        if not self._waiting:
            self._first_at = time.perf_counter()
            # Those who wait for a turn of their own are in the loop already.
            if not self._alone:
                loop.call_soon(self._answer_some, loop)
        self._waiting.append(connection)

    def answer_now(self, connection: DirectProtocol) -> None:
        """Answers the request of a connection, if one waits, before all others."""
        if connection.waits_for is not None:
            self._answer(connection.waits_for, [connection])
        connection.take_turn()

    def _answer_some(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers those who wait when there are enough, or the first has waited for long enough."""
        # Turn by turn, in which others arrive: timers of the loop are a thousand times as coarse.
        if self._gathers and time.perf_counter() - self._first_at < self._seconds:
            loop.call_soon(self._answer_some, loop)
            return
        some = self._waiting[: self._at_once]
        del self._waiting[: self._at_once]
        by_endpoint: dict[DirectEndpoint, list[DirectProtocol]] = {}
        for connection in some:
            endpoint = connection.waits_for
            if endpoint is not None:
                by_endpoint.setdefault(endpoint, []).append(connection)
        try:
            for endpoint in list(by_endpoint):
                self._answer(endpoint, by_endpoint.pop(endpoint))
            # However long those took, or others would not come on while they keep coming.
            end = time.perf_counter() + TURN_SECONDS
            # Some take a thousand times as long as others, which arrive meanwhile.
            while self._alone:
                self._alone.popleft().take_turn()
                if time.perf_counter() > end:
                    break
        finally:
            # After a defect, which the loop logs: those of other endpoints wait on.
            for connections in by_endpoint.values():
                self._waiting += connections
            if self._waiting or self._alone:
                loop.call_soon(self._answer_some, loop)

    @property
    def _gathers(self) -> bool:
        """Whether more requests may come that those who wait gain from."""
        # Asked at each turn of the loop, and by default never more than this.
        if not self._seconds or self._alone or len(self._waiting) >= self._at_once:
            return False
        endpoints = {connection.waits_for for connection in self._waiting}
        return all(endpoint is None or endpoint.gathers for endpoint in endpoints)

    def _answer(self, endpoint: DirectEndpoint, connections: Sequence[DirectProtocol]) -> None:
        """Answers requests for one endpoint that are answered together."""
        taken: list[DirectProtocol] = []
        requests: list[WholeRequest] = []
        for connection in connections:
            request = connection.take()
            if request is not None:
                taken.append(connection)
                requests.append(request)
        if not requests:
            return
        try:
            replies = endpoint.reply_each(requests)
        except BaseException:
            for connection in taken:
                connection.fail()
            raise
        for connection, reply in zip(taken, replies):
            if isinstance(reply, Reply):
                connection.send(reply)
            else:
                connection.wait_for_turn(reply)
                self._alone.append(connection)


class _Heads:
    """The first lines of answers, kept for as long as the date in them is right."""

    def __init__(self):
        self._default: list[tuple[bytes, bytes]] = []
        self._headers: Headers = []
        self._head = b""

    def find(self, default: list[tuple[bytes, bytes]], reply: Reply, closing: Headers) -> bytes:
        """Returns the status line and the headers of an answer.

        Args:
            default: uvicorn's own headers, another list for each second.
            reply: Answer.
            closing: Further headers.
        """
        # Refusals are few, and have headers of their own.
        is_usual = reply.status == 200 and not closing
        # By identity, which compares nothing: both lists are kept by whoever made them.
        if is_usual and default is self._default and reply.headers is self._headers:
            return self._head
        lines = [STATUS_LINE[reply.status]]
        for name, value in [*default, *reply.headers, *closing]:
            lines += (name, b": ", value, b"\r\n")
        head = b"".join(lines)
        if is_usual:
            self._default = default
            self._headers = reply.headers
            self._head = head
        return head


_HEADS = _Heads()
