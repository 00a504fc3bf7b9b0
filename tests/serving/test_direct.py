"""Requests that are answered without a task: whatever way they arrive, answers keep their order."""

import asyncio
import contextlib
import functools

import pytest
import uvicorn
from uvicorn.server import ServerState

from twotower.serving import direct
from twotower.serving.direct import DirectProtocol, Queue, Reply

PATH = b"/direct"


class Endpoint:
    """Tells the bodies that it was sent, those of one call together."""

    gathers = True

    def __init__(self):
        self.calls = []

    def reply_each(self, requests):
        self.calls.append([request.body for request in requests])
        headers = [(b"content-type", b"text/plain")]
        return [Reply(200, headers, b"direct " + request.body) for request in requests]


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
    """Fails in ways that no endpoint foresees."""

    gathers = True

    def reply_each(self, requests):
        if any(request.body == b"all" for request in requests):
            raise ValueError("a defect of all")
        return [functools.partial(self.reply, request) for request in requests]

    def reply(self, request):
        if request.body == b"broken":
            raise ValueError("a defect")
        return Reply(200, [], b"sound " + request.body)


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


class Slow:
    """Makes its answers one by one; tells when."""

    gathers = False

    def __init__(self):
        self.made = []

    def reply_each(self, requests):
        return [functools.partial(self.reply, request) for request in requests]

    def reply(self, request):
        self.made.append(request.body)
        return Reply(200, [], b"slow " + request.body)


class Connection(DirectProtocol):
    direct = {PATH: Endpoint(), b"/broken": Broken(), b"/slow": Slow()}
    queue = Queue(4)
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


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Connection, "queue", Queue(4))
    monkeypatch.setattr(Connection, "direct", {**Connection.direct, PATH: Endpoint()})
    Connection.direct[b"/slow"].made.clear()


@contextlib.contextmanager
def connected(loop):
    config = uvicorn.Config(usual, log_config=None, access_log=False)
    config.load()
    protocol = Connection(config=config, server_state=ServerState(), app_state={}, _loop=loop)
    transport = Transport()
    protocol.connection_made(transport)
    yield protocol, transport
    protocol.connection_lost(None)


@contextlib.contextmanager
def several(count):
    """Connections of the running loop."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connected(loop)) for _ in range(count)]


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


@pytest.mark.parametrize("path", [PATH, b"/slow"])
@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_answers_keep_the_order_of_requests_while_the_first_waits(path, seconds, monkeypatch):
    """For its turn behind others, or for more to come."""
    monkeypatch.setattr(direct, "TURN_SECONDS", -1.0)
    monkeypatch.setattr(Connection, "queue", Queue(4, seconds))

    async def ask():
        with several(3) as made:
            for protocol, _ in made:
                protocol.data_received(post(path, b"first"))
            await asyncio.sleep(0)
            protocol, transport = made[2]
            protocol.data_received(post(PATH, b"second") + post(path, b"third"))
            await turns()
            Connection.queue._first_at -= 60
            await turns()
            return [body.partition(b" ")[2] for body in bodies(transport.written)]

    assert asyncio.run(ask()) == [b"first", b"second", b"third"]


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
            protocol.data_received(post(b"/broken", b"broken"))
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


def ask_together(requests):
    """Returns what each of several connections is answered that ask at the same moment."""

    async def ask():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))
        with contextlib.ExitStack() as stack:
            made = [stack.enter_context(connected(loop)) for _ in requests]
            for (protocol, _), request in zip(made, requests):
                protocol.data_received(request)
            await turns()
            assert [protocol.ended for protocol, _ in made] == [1] * len(made)
            return [bodies(transport.written) for _, transport in made], [
                transport.is_closed for _, transport in made
            ]

    told = []
    return *asyncio.run(ask()), told


def test_requests_of_the_same_moment_are_answered_together_some_at_a_time():
    texts = [b"%d" % n for n in range(6)]
    found, _, _ = ask_together([post(PATH, text) for text in texts])
    assert found == [[b"direct " + text] for text in texts]
    # As many as the queue takes at once, and the others in the next turn.
    assert Connection.direct[PATH].calls == [texts[:4], texts[4:]]


@pytest.mark.parametrize("of_all", [False, True])
def test_a_defect_ends_the_connections_that_it_leaves_without_an_answer_and_no_others(
    of_all, monkeypatch
):
    monkeypatch.setattr(Connection, "queue", Queue(8))
    texts = [b"x", b"all" if of_all else b"broken", b"y"]
    requests = [post(b"/broken", text) for text in texts]
    around = [post(PATH, b"z"), post(b"/slow", b"z")]
    (*found, last), (*closed, is_closed), told = ask_together([around[0], *requests, around[1]])
    assert found[0] == [b"direct z"] and last == [b"slow z"] and not closed[0] and not is_closed
    if of_all:
        assert found[1:] == [[], [], []] and closed[1:] == [True] * 3
    else:
        assert found[1:] == [[b"sound x"], [], [b"sound y"]]
        assert closed[1:] == [False, True, False]
    assert told == ["a defect of all" if of_all else "a defect"]


def test_those_of_an_own_turn_come_on_however_long_the_others_take(monkeypatch):
    class Long(Endpoint):
        def reply_each(self, requests):
            clock[0] += 60.0
            return super().reply_each(requests)

    clock = [1_000.0]
    monkeypatch.setattr(direct.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Connection, "direct", {**Connection.direct, PATH: Long()})
    monkeypatch.setattr(Connection, "queue", Queue(8))
    slow = [post(b"/slow", b"%d" % number) for number in range(5)]

    async def ask():
        with several(6) as made:
            for (protocol, _), request in zip(made, [post(PATH, b"x"), *slow]):
                protocol.data_received(request)
            await asyncio.sleep(0)
            return list(Connection.direct[b"/slow"].made)

    assert len(asyncio.run(ask())) == 5


def test_requests_that_are_answered_one_by_one_leave_turns_to_those_that_arrive(monkeypatch):
    monkeypatch.setattr(direct, "TURN_SECONDS", -1.0)

    async def ask():
        with several(5) as made:
            for number in range(3):
                made[number][0].data_received(post(b"/slow", b"%d" % number))
            await asyncio.sleep(0)
            # One in its turn; then those that came meanwhile and are answered together first.
            early = list(Connection.direct[b"/slow"].made)
            made[3][0].data_received(post(b"/slow", b"3"))
            made[4][0].data_received(post(PATH, b"4"))
            await asyncio.sleep(0)
            between = list(Connection.direct[b"/slow"].made), bodies(made[4][1].written)
            await turns()
            return early, between, list(Connection.direct[b"/slow"].made)

    early, between, order = asyncio.run(ask())
    assert early == [b"0"] and between == ([b"0", b"1"], [b"direct 4"])
    assert order == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize("path", [PATH, b"/slow"])
def test_all_of_those_that_wait_are_answered_when_the_server_stops(path, monkeypatch):
    monkeypatch.setattr(direct, "TURN_SECONDS", -1.0)

    async def ask(turns_before):
        with several(3) as made:
            for number, (protocol, _) in enumerate(made):
                protocol.data_received(post(path, b"%d" % number))
            for _ in range(turns_before):
                await asyncio.sleep(0)
            for protocol, _ in made:
                protocol.shutdown()
            await turns()
            ended = [protocol.ended for protocol, _ in made]
            return [len(bodies(transport.written)) for _, transport in made], ended

    for turns_before in (0, 1, 2):
        monkeypatch.setattr(Connection, "queue", Queue(4))
        assert asyncio.run(ask(turns_before)) == ([1] * 3, [1] * 3)


def test_one_that_waits_for_its_own_turn_may_be_refused_and_its_client_may_go(monkeypatch):
    monkeypatch.setattr(direct, "TURN_SECONDS", -1.0)

    async def ask():
        with several(3) as made:
            for number, (protocol, _) in enumerate(made):
                protocol.data_received(post(b"/slow", b"%d" % number))
            await asyncio.sleep(0)
            # The first was answered in that turn.
            made[1][0].wait_seconds = -1.0
            made[2][0].connection_lost(None)
            assert made[2][0].ended == 1
            # No other request goes before the one that waits on its connection.
            assert not made[1][0].is_free
            await turns()
            ended = [protocol.ended for protocol, _ in made]
            return [bodies(transport.written) for _, transport in made[:2]], ended

    assert asyncio.run(ask()) == ([[b"slow 0"], [b"late"]], [1, 1, 1])
    assert Connection.direct[b"/slow"].made == [b"0"]


def test_requests_are_gathered_for_a_time_or_until_there_are_enough(monkeypatch):
    async def ask(count, path=PATH):
        with several(count) as made:
            for number, (protocol, _) in enumerate(made):
                protocol.data_received(post(path, b"%d" % number))
                await turns()
            early = [bool(transport.written) for _, transport in made]
            # As if that time had passed.
            Connection.queue._first_at -= 60
            await turns()
            return early, [bodies(transport.written) for _, transport in made]

    monkeypatch.setattr(Connection, "queue", Queue(4, 30.0))
    assert asyncio.run(ask(3)) == ([False] * 3, [[b"direct %d" % n] for n in range(3)])
    monkeypatch.setattr(Connection, "queue", Queue(4, 30.0))
    assert asyncio.run(ask(5))[0] == [True] * 4 + [False]
    # Those that gain nothing from it wait for nobody.
    monkeypatch.setattr(Connection, "queue", Queue(4, 30.0))
    assert asyncio.run(ask(2, b"/slow"))[0] == [True] * 2
    assert [len(call) for call in Connection.direct[PATH].calls] == [3, 4, 1]
