"""Reading and answering a request in one step each, where uvicorn's way of messages is a detour.

The server puts the exchange of uvicorn into the scope of a request, under `EXCHANGE`. What is usual
goes by here: a body that has arrived, and an answer on a connection that goes on. For everything
else the functions return None or False, and the messages of ASGI do it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

EXCHANGE = "twotower.exchange"  # key of a scope


def take_body(exchange: Any) -> bytes | None:
    """Returns the body of a request, if all of it has arrived.

    Args:
        exchange: uvicorn's `RequestResponseCycle`.
    """
    if exchange.more_body or exchange.disconnected:
        return None
    # Left where it is: a body that is too long is read once more by messages, which refuse it.
    return bytes(exchange.body)


def write_answer(
    exchange: Any, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> bool:
    """Writes an answer, and returns whether that was possible.

    Args:
        exchange: uvicorn's `RequestResponseCycle`.
        status: Status of the answer.
        headers: Headers, which say the length of the body and leave the connection as it is.
        body: Body.
    """
    # A connection that is to end needs a header for that, and a client that reads slowly is waited
    # for: `send` of uvicorn does both.
    is_usual = exchange.keep_alive and not exchange.response_started
    if not is_usual or exchange.disconnected or exchange.flow.write_paused or exchange.more_body:
        return False
    parts = [STATUS_LINE[status]]
    for name, value in exchange.default_headers:
        parts += (name, b": ", value, b"\r\n")
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts += (b"\r\n", body)
    # As `send` leaves it: by these uvicorn sees that the request was answered.
    exchange.response_started = True
    exchange.response_complete = True
    exchange.transport.write(b"".join(parts))
    # Whoever still waits for a message of the client hears that there is none.
    exchange.message_event.set()
    # Begins the request that the client has sent behind this one.
    exchange.on_response()
    return True
