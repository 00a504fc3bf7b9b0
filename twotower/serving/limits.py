"""The bounds of a server: the size and pace of requests, and how many may wait."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from twotower.core.errors import ConfigError
from twotower.serving.access import check_hosts
from twotower.serving.errors import RequestError

Receive = Callable[[], Awaitable[Any]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        body: Bytes of a body.
        head: Bytes of a request's first line and headers.
        seconds: Time in which a head, or a body, must arrive, and an answer be taken.
        idle: Seconds after which a connection without a request is closed.
        connections: Connections at once.
        waiting: Requests that are read and not answered; more are refused at once, so that those
            accepted are answered in time.
        wait: Seconds that a request may wait for its turn; one that has waited longer is refused
            while many wait.
        writes: Changes and events that wait for the disk; more are refused at once.
        rate: Requests a second of each token, and of all clients without one together; None for
            any number.
        batch_us: Microseconds in which requests are collected after the first one, to be answered
            together; None to collect those alone that wait at the same moment.
        hosts: Names that requests may be sent to, besides those of the address that the server
            listens at; see `twotower.serving.access.Hosts`.
    """

    body: int = 1 << 20
    head: int = 16 << 10
    seconds: float = 10.0
    idle: float = 60.0
    connections: int = 2_000
    waiting: int = 100
    wait: float = 0.5
    writes: int = 64
    rate: int | None = None
    batch_us: int | None = None
    hosts: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "hosts":
                check_hosts(value)
            elif value is not None and value <= 0:
                raise ConfigError(f"limits.{field.name}={value} must be above 0.")


def check_headers(headers: Iterable[tuple[bytes, bytes]], limit: int) -> None:
    """Refuses a body by what its headers say of it.

    Args:
        headers: Headers of the request, their names in small letters.
        limit: Bytes that a body may have.

    Raises:
        RequestError: It is no JSON, or too long.
    """
    # A body without a type is refused too: pages of other sites may leave it out.
    is_json = False
    for name, value in headers:
        if name == b"content-type":
            # As most clients write it.
            if value == b"application/json":
                is_json = True
                continue
            # A page of another site could send text without asking first; JSON it cannot.
            kind = value.partition(b";")[0]
            is_json = kind.strip().lower() == b"application/json"
        elif name == b"content-length" and int(value) > limit:
            raise _too_large(limit)
    if not is_json:
        raise RequestError(
            415,
            "The body is not declared as JSON.",
            field="content-type",
            cure="Send the header Content-Type: application/json.",
        )


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """Returns the body of a request.

    Raises:
        RequestError: It is too long, or does not arrive in time.
        ConnectionError: The client has gone.
    """
    message = await receive()
    # Most bodies came with their head.
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        check_size(body, limits)
        return body
    parts: list[bytes] = []
    size = 0
    try:
        # One bound for all parts: a client that sends a byte now and then would never end
        # otherwise.
        async with asyncio.timeout(limits.seconds):
            while True:
                if message["type"] == "http.disconnect":
                    raise ConnectionError("the client has gone")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                # Counted as they come: the length in the headers may be missing, or wrong.
                if size > limits.body:
                    raise _too_large(limits.body)
                if not message.get("more_body"):
                    return b"".join(parts)
                message = await receive()
    except TimeoutError:
        raise RequestError(
            408,
            f"The body did not arrive within {limits.seconds:g} seconds.",
            cure="Send it faster.",
        ) from None


def check_size(body: bytes, limits: Limits) -> None:
    """Refuses a body that is too long.

    Raises:
        RequestError: It is.
    """
    if len(body) > limits.body:
        raise _too_large(limits.body)


def _too_large(limit: int) -> RequestError:
    return RequestError(
        413,
        f"The body has more than {limit:,} bytes.",
        cure="Send less, or in several requests.",
    )
