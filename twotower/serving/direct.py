"""Answers to usual requests without a task, a scope and messages of ASGI for each of them.

A request is usual if it goes to an endpoint that waits for nothing, arrives in one piece, and
leaves the connection open. It is answered by a callback of the event loop, in its turn among all
that arrived. Everything else goes uvicorn's way.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

Headers = list[tuple[bytes, bytes]]


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


class DirectEndpoint(Protocol):
    """An endpoint that waits for nothing."""

    def reply(self, headers: Headers, body: bytes, arrived: float) -> Reply:
        """Returns the answer to a whole request, or its refusal.

        Args:
            headers: Headers of the request, their names in small letters.
            body: Body of the request.
            arrived: Time at which the request was there, of `time.perf_counter`.
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
        idle_seconds: Time after which a connection without a request is closed.
        wait_seconds: Time after which a request that waits for its turn is refused.
    """

    direct: Mapping[bytes, DirectEndpoint]
    idle_seconds: float
    wait_seconds: float = math.inf

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # The request whose body arrives, and the one that waits for its turn.
        self._arriving: _Request | None = None
        self._waiting: _Request | None = None
        self._arrived = 0.0
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def is_free(self) -> bool:
        """Whether no request of the connection waits for its answer."""
        is_done = self.cycle is None or self.cycle.response_complete
        return is_done and self._waiting is None

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
        self.loop.call_soon(self._answer_waiting)

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

    def _answer_waiting(self) -> None:
        request = self._waiting
        # It may have been answered as the server stopped, or its client has gone.
        if request is None:
            return
        self._waiting = None
        try:
            if self.transport.is_closing():
                return
            # Whoever waits behind it would wait even longer, until nobody was answered in time.
            if time.perf_counter() - self._arrived > self.wait_seconds and self.is_crowded:
                self.refuse_late()
                if self.closing:
                    self.transport.close()
                else:
                    self._rest()
                return
            body = b"".join(request.parts)
            reply = request.endpoint.reply(request.headers, body, self._arrived)
            closing = self.closing
            head = _HEADS.find(self.server_state.default_headers, reply, closing)
            length = b"content-length: %d\r\n\r\n" % len(reply.body)
            # One write, of which the system makes one packet where it fits.
            self.transport.write(b"".join((head, length, reply.body)))
            self.server_state.total_requests += 1
            if closing:
                self.transport.close()
                return
            self._rest()
        except BaseException:
            # Without an answer its client would wait for good. The loop logs the error.
            self.transport.close()
            raise
        finally:
            self.on_direct_end()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        self._answer_waiting()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._arriving is not None or self._waiting is not None:
            self._arriving = None
            self._waiting = None
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
