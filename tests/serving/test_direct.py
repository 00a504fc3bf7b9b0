"""Requests that are answered without a task: whatever way they arrive, answers keep their order."""

import asyncio
import contextlib

import pytest
import uvicorn
from uvicorn.server import ServerState

from twotower.serving.direct import DirectProtocol, Reply

PATH = b"/direct"


class Endpoint:
    """Tells the body that it was sent."""

    def reply(self, headers, body, arrived):
        return Reply(200, [(b"content-type", b"text/plain")], b"direct " + body)


async def usual(scope, receive, send):
    """Answers as `Endpoint` does, by messages, after a turn of the loop."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await asyncio.sleep(0)
    text = b"usual " + body
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


class Broken:
    """Fails in a way that no endpoint foresees."""

    def reply(self, headers, body, arrived):
        raise ValueError("a defect")


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data):
        assert not self.is_closed
        self.written += bytes(data)

    def close(self):
        self.is_closed = True

    def is_closing(self):
        return self.is_closed

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


class Connection(DirectProtocol):
    direct = {PATH: Endpoint(), b"/broken": Broken()}
    idle_seconds = 60.0
    is_crowded = True
    ended = 0
    end = []

    @property
    def closing(self):
        return self.end

    def on_direct_end(self):
        self.ended += 1

    def refuse_late(self):
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate")


@contextlib.contextmanager
def connected(loop):
    config = uvicorn.Config(usual, log_config=None, access_log=False)
    config.load()
    protocol = Connection(config=config, server_state=ServerState(), app_state={}, _loop=loop)
    transport = Transport()
    protocol.connection_made(transport)
    yield protocol, transport
    protocol.connection_lost(None)


def post(path, body, *more):
    lines = [b"POST %s HTTP/1.1" % path, b"host: x", b"content-length: %d" % len(body), *more]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def bodies(written):
    """Returns the bodies of answers that stand one after another."""
    found = []
    written = written.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        found.append(rest[:length])
        written = rest[length:]
    return found


async def turns():
    for _ in range(12):
        await asyncio.sleep(0)


TEXTS = [b"one", b"", b"three", b"four"]
PATHS = [PATH, PATH, b"/usual", PATH]
REQUESTS = b"".join(map(post, PATHS, TEXTS))


def test_answers_keep_the_order_of_requests_wherever_these_are_cut():
    async def ask(cuts):
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            for first, last in zip([0, *cuts], [*cuts, len(REQUESTS)]):
                protocol.data_received(REQUESTS[first:last])
                await turns()
            await turns()
        return transport.written, protocol.ended

    for cut in range(1, len(REQUESTS), 3):
        written, ended = asyncio.run(ask([cut]))
        texts = [body.partition(b" ")[2] for body in bodies(written)]
        assert texts == TEXTS, cut
    written, ended = asyncio.run(ask([]))
    # Those that arrive behind one that waits stand in its line.
    assert bodies(written)[0] == b"direct one" and ended == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(PATH, b"x", b"connection: close"),
        post(PATH, b"x").replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(PATH, b"x", b"expect: 100-continue"),
        post(PATH, b"x").replace(b"POST", b"PUT"),
        post(PATH + b"?a=1", b"x"),
    ],
    ids=["close", "old", "continue", "put", "query"],
)
def test_requests_that_are_not_usual_go_the_usual_way(request_bytes):
    async def ask():
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            protocol.data_received(request_bytes)
            await turns()
        return transport.written

    assert bodies(asyncio.run(ask()))[-1].startswith(b"usual")


def test_a_request_is_over_once_whether_it_is_answered_or_its_client_goes():
    async def ask(leave):
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            protocol.data_received(post(PATH, b"x"))
            if leave == "gone":
                transport.close()
            elif leave == "stop":
                protocol.shutdown()
            else:
                await turns()
        await turns()
        return transport.written, protocol.ended

    written, ended = asyncio.run(ask("gone"))
    assert not written and ended == 1
    for leave in ("stop", "stay"):
        written, ended = asyncio.run(ask(leave))
        assert bodies(written) == [b"direct x"] and ended == 1


def test_a_request_that_has_waited_too_long_is_refused_and_the_next_one_answered():
    async def ask(end):
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            # Longer than nothing, whatever the clock says.
            protocol.wait_seconds = -1.0
            protocol.data_received(post(PATH, b"x"))
            protocol.end = end
            await turns()
            # Few wait: one that waited is answered.
            protocol.is_crowded = False
            if not end:
                protocol.data_received(post(PATH, b"y"))
                await turns()
            return bodies(transport.written), protocol.ended, transport.is_closed

    assert asyncio.run(ask([])) == ([b"late", b"direct y"], 2, False)
    # A server that stops keeps no connection open.
    assert asyncio.run(ask([(b"connection", b"close")])) == ([b"late"], 1, True)


def test_a_connection_ends_with_its_answer_while_the_server_stops():
    async def ask():
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            protocol.data_received(post(PATH, b"x"))
            protocol.end = [(b"connection", b"close")]
            await turns()
            return transport.written, transport.is_closed

    written, is_closed = asyncio.run(ask())
    assert bodies(written) == [b"direct x"] and is_closed
    assert b"connection: close\r\n" in written


def test_a_connection_without_a_request_is_closed_after_its_time():
    async def ask():
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            protocol.data_received(post(PATH, b"x"))
            await turns()
            # A request that came since gives it its whole time again.
            protocol._end_idle()
            early = transport.is_closed
            protocol._idle_since -= 61
            protocol._end_idle()
            return early, transport.is_closed

    assert asyncio.run(ask()) == (False, True)


def test_a_defect_ends_the_connection_whose_client_would_wait_for_good():
    async def ask():
        loop = asyncio.get_running_loop()
        told = []
        loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))
        with connected(loop) as (protocol, transport):
            protocol.data_received(post(b"/broken", b"x"))
            await turns()
            return told, transport.is_closed, protocol.ended

    assert asyncio.run(ask()) == (["a defect"], True, 1)


def test_a_client_that_takes_no_answers_gets_no_more_of_them():
    async def ask():
        with connected(asyncio.get_running_loop()) as (protocol, transport):
            protocol.pause_writing()
            for _ in range(3):
                protocol.data_received(post(PATH, b"x"))
                await turns()
            before = transport.written
            protocol.resume_writing()
            await turns()
            return before, bodies(transport.written)

    assert asyncio.run(ask()) == (b"", [b"usual x"] * 3)
