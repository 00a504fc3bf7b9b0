"""The shards of a bundle as a router asks them: together, with a limit of time.

A shard that does not answer is left out, and the answer says so. It is asked again when a look at
it, once a second, finds it answering with the same version of the bundle: one that hangs costs the
router its limit once, and not with every request. One that refuses a request for the many that it
has is missing from that answer alone.

Threads ask, each for the answer that it makes.
"""

from __future__ import annotations

import contextlib
import contextvars
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np
from absl import logging

from twotower.core.errors import ConfigError
from twotower.retrieval.shards.remote import ShardQuery
from twotower.serving.errors import TOO_MANY_CONNECTIONS, TOO_MANY_REQUESTS, RequestError
from twotower.serving.shards import types
from twotower.serving.types import Problem

MAX_ANSWER = 1 << 28  # bytes of an answer
ROWS_AT_ONCE = 1_024  # rows whose vectors are asked for together, each time within the limit
PAUSE_SECONDS = 0.2  # between looks while a shard is missing that is needed
LONG_SECONDS = 10.0  # limit of an answer before the router is ready
LOOK_SECONDS = 2.0  # limit of a look at a shard, which no request waits for
MAX_IDLE = 64  # connections that are kept to a shard

Why = Literal["refused", "late", "version", "busy", "error"]
R = TypeVar("R")
# Shards that did not answer while one request was answered.
_missed: contextvars.ContextVar[set[int] | None] = contextvars.ContextVar("missed", default=None)


class _Failure(Exception):
    """A shard that did not answer.

    Attributes:
        why: Kind of the failure, for the counters.
    """

    def __init__(self, why: Why, reason: str):
        super().__init__(reason)
        self.why: Why = why


class _Sent(NamedTuple):
    """A request on its way.

    Attributes:
        connection: Connection that it was sent by.
        is_new: Whether the connection was opened for it.
    """

    connection: http.client.HTTPConnection
    is_new: bool


class _Shard:
    """One shard, and the connections to it.

    Attributes:
        number: Number of the shard.
        url: Its URL.
        reason: Why it is not asked; "" of one that is.
        items: Number of its items, as the last look found it.
    """

    def __init__(self, number: int, url: str, token: str):
        parts = urlsplit(url)
        # A password would stand in the log, and nothing would send it.
        rest = parts.path.strip("/") or parts.query or parts.fragment or parts.username
        if parts.scheme != "http" or not parts.hostname or rest:
            raise ConfigError(
                f"--shard_urls: {url!r} is no address of a shard; write http://HOST:PORT."
            )
        try:
            port = parts.port or 80
        except ValueError:
            raise ConfigError(f"--shard_urls: {url!r} has no port that there is.") from None
        self.number = number
        self.url = url
        # Missing until a look has found the right version: no answer is made of another one.
        self.reason = "it was not asked yet"
        self.items = 0
        self._address = parts.hostname, port
        self._headers = {"content-type": "application/json"}
        # Found here: the library's own refusal would show the token in the log.
        if not (token.isascii() and token.isprintable()) or token != token.strip():
            raise ConfigError(
                "TWOTOWER_SHARD_TOKEN has a line break, a space at an end or other letters that no "
                "header carries. Take them away."
            )
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._idle: list[http.client.HTTPConnection] = []

    def send(self, path: str, body: bytes | None, last: float) -> _Sent:
        """Sends a request, by a connection that is open if there is one.

        Args:
            path: Path.
            body: Body; None to get something.
            last: Time of `time.monotonic` by which it must be answered.

        Raises:
            _Failure: It cannot be reached.
        """
        # Threads share this list: an element is taken by one of them.
        with contextlib.suppress(IndexError):
            sent = _Sent(self._idle.pop(), False)
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._request(sent.connection, path, body, last)
                return sent
            sent.connection.close()
        return self._send_anew(path, body, last)

    def receive(self, sent: _Sent, path: str, body: bytes | None, last: float) -> bytes:
        """Returns the body of the answer to a request.

        Args:
            sent: What `send` returned.
            path: Path of the request.
            body: Its body.
            last: Time by which it must be answered.

        Raises:
            _Failure: It does not answer, or not in time.
            ConfigError: The request is wrong.
        """
        try:
            status, answer = self._answer(sent.connection, last)
            if status == 200:
                return answer
            problem = msgspec.json.decode(answer, type=Problem)
        except (ConnectionError, http.client.BadStatusLine) as error:
            sent.connection.close()
            # The shard has closed a connection that nobody used, or was started again.
            if not sent.is_new:
                return self.receive(self._send_anew(path, body, last), path, body, last)
            raise _Failure("refused", f"it closed the connection ({error})") from None
        except TimeoutError:
            sent.connection.close()
            raise _Failure("late", "it did not answer in time") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            sent.connection.close()
            raise _Failure("error", f"its answer cannot be read ({error})") from None
        # All shards say the same of a request that is wrong: the client must hear of it.
        if status == 400:
            raise ConfigError(problem.detail)
        if status == 429 or problem.detail in (TOO_MANY_REQUESTS, TOO_MANY_CONNECTIONS):
            raise _Failure("busy", "it has too many requests")
        why: Why = "version" if status == 409 else "error"
        raise _Failure(why, problem.detail)

    def _send_anew(self, path: str, body: bytes | None, last: float) -> _Sent:
        connection = http.client.HTTPConnection(*self._address)
        try:
            connection.timeout = _left(last)
            connection.connect()
            # A request is small and waited for: the system must not hold it back for more.
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._request(connection, path, body, last)
        except TimeoutError:
            connection.close()
            raise _Failure("late", "it did not accept a connection in time") from None
        except OSError as error:
            connection.close()
            raise _Failure("refused", f"{error.strerror or error}") from None
        return _Sent(connection, True)

    def _request(
        self, connection: http.client.HTTPConnection, path: str, body: bytes | None, last: float
    ) -> None:
        connection.sock.settimeout(_left(last))
        connection.request("GET" if body is None else "POST", path, body, self._headers)

    def _answer(self, connection: http.client.HTTPConnection, last: float) -> tuple[int, bytes]:
        """Returns the status and the body of the answer that comes by a connection."""
        sock = connection.sock
        sock.settimeout(_left(last))
        response = connection.getresponse()
        parts = []
        size = 0
        # The limit holds for the whole, and not for each part.
        while True:
            sock.settimeout(_left(last))
            part = response.read1(1 << 20)
            if not part:
                break
            size += len(part)
            if size > MAX_ANSWER:
                raise ValueError(f"it has more than {MAX_ANSWER:,} bytes")
            parts.append(part)
        # Bytes that were announced and did not come: half a list would be read as a whole one.
        if response.length:
            raise ConnectionError("its answer ends too early")
        # A connection takes no further request before its last answer is closed.
        response.close()
        if connection.sock is not None and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        return response.status, b"".join(parts)


class Router:
    """The shards of a bundle, asked together.

    Attributes:
        report: Function that counts a failure of a shard.
    """

    def __init__(self, urls: Sequence[str], *, seconds: float, token: str = ""):
        """Asks nobody yet.

        Args:
            urls: URL of each shard, in the order of their numbers.
            seconds: Time in which a shard must answer.
            token: Token that is sent to them; "" for none.

        Raises:
            ConfigError: A URL is none.
        """
        self.report: Callable[[int, Why], None] = lambda number, why: None
        self._seconds = seconds
        self._version = ""
        self._shards = [_Shard(number, url, token) for number, url in enumerate(urls)]
        self._looking = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not asked now."""
        return [shard.number for shard in self._shards if shard.reason]

    def expect(self, version: str, shards: int) -> None:
        """Takes note of the bundle whose shards these must be.

        Args:
            version: Version of the bundle.
            shards: Number of its shards.

        Raises:
            ConfigError: It has another number of shards.
        """
        if shards != len(self):
            raise ConfigError(
                f"--shard_urls names {len(self)} shards, and the bundle has {shards}. Name one URL "
                "for each, in the order of their numbers."
            )
        self._version = version

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[int]]:
        """Yields the shards that did not answer what is asked within the block."""
        missed: set[int] = set()
        token = _missed.set(missed)
        try:
            yield missed
        finally:
            _missed.reset(token)

    def complete(self, call: Callable[[], R]) -> R:
        """Returns what a call returns, made until all shards have a part in it.

        Args:
            call: Function that asks shards.
        """
        seconds = self._seconds
        # Nobody is answered before it returns, and so nobody waits.
        self._seconds = max(seconds, LONG_SECONDS)
        try:
            while True:
                if not self.look():
                    with self.watch() as missed, contextlib.suppress(RequestError):
                        result = call()
                        if not missed:
                            return result
                time.sleep(PAUSE_SECONDS)
        finally:
            self._seconds = seconds

    def search(
        self, queries: Sequence[ShardQuery]
    ) -> Sequence[tuple[np.ndarray, np.ndarray] | None]:
        """Returns what each shard finds; see `twotower.retrieval.shards.remote.Shards`.

        Raises:
            RequestError: None of them answers.
        """
        bodies = []
        for query in queries:
            bodies.append(types.encode(types.write_query(self._version, query), query.where))
        count = len(queries[0].queries)
        found = self._ask(
            "/v1/shard/search",
            bodies,
            lambda answer, shard: types.read_lists(answer, count, shard.items),
        )
        # One that answers is enough: a list of most of the items is better than none, and says so.
        if all(answer is None for answer in found):
            raise self._refusal(self._shards)
        return found

    def vectors(self, rows: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Returns the vectors of rows of each shard; see `Shards`.

        Raises:
            RequestError: A shard that has some of them does not answer.
        """
        parts: list[list[np.ndarray]] = [[] for _ in self._shards]
        for start in range(0, max(map(len, rows)), ROWS_AT_ONCE):
            asked = [own[start : start + ROWS_AT_ONCE] for own in rows]
            bodies = []
            for own in asked:
                sent = types.GetVectors(version=self._version, rows=own.astype(types.ROW).tobytes())
                bodies.append(types.encode(sent) if len(own) else None)
            counts = list(map(len, asked))
            found = self._ask(
                "/v1/shard/vectors",
                bodies,
                lambda answer, shard, counts=counts: types.read_vectors(
                    answer, counts[shard.number]
                ),
            )
            silent = []
            for shard, own, answer in zip(self._shards, asked, found, strict=True):
                if not len(own):
                    continue
                if answer is None:
                    silent.append(shard)
                    continue
                parts[shard.number].append(answer)
            # Zeros in their place would be an answer that is wrong.
            if silent:
                raise self._refusal(silent)
        return [np.concatenate(part) if part else np.zeros((0, 1)) for part in parts]

    def look(self) -> list[int]:
        """Asks all shards what they are, and returns the numbers of those that cannot be asked.

        Threads may call it; one of them looks.
        """
        with self._looking:
            for shard in self._shards:
                reason = self._reason(shard)
                if reason and reason != shard.reason:
                    logging.warning(
                        "Shard %d (%s) is missing: %s.", shard.number, shard.url, reason
                    )
                elif shard.reason and not reason:
                    logging.info("Shard %d (%s) answers.", shard.number, shard.url)
                shard.reason = reason
        return self.missing

    def _reason(self, shard: _Shard) -> str:
        """Returns why a shard cannot be asked; "" where it can."""
        last = time.monotonic() + LOOK_SECONDS
        try:
            sent = shard.send("/v1/shard/info", None, last)
            answer = shard.receive(sent, "/v1/shard/info", None, last)
            info = msgspec.json.decode(answer, type=types.ShardInfo)
        except (_Failure, ConfigError, msgspec.DecodeError) as error:
            # One that refuses for its many requests lives, and is as the look before found it.
            if isinstance(error, _Failure) and error.why == "busy":
                return shard.reason
            return str(error).rstrip(".")
        if info.version != self._version:
            return f"it has version {info.version} of the bundle, and not {self._version}"
        # URLs in another order would give the rows of one shard to another one, whose items have
        # them too.
        if (info.shard, info.shards) != (shard.number, len(self)):
            return f"it is shard {info.shard} of {info.shards}, counted from 0"
        shard.items = info.items
        return ""

    def _ask(
        self,
        path: str,
        bodies: Sequence[bytes | None],
        read: Callable[[bytes, _Shard], R],
    ) -> list[R | None]:
        """Returns the answers of the shards that are asked and answer in time.

        Args:
            path: Path.
            bodies: Body for each shard; None for one that is not asked.
            read: Function that reads the answer of a shard, or raises ValueError.
        """
        # One limit for all shards together, since they work at the same time.
        last = time.monotonic() + self._seconds
        sent: dict[int, _Sent] = {}
        # All of them work while the first one is waited for.
        for shard, body in zip(self._shards, bodies, strict=True):
            if body is None:
                continue
            if shard.reason:
                _miss(shard)
                continue
            with self._noting(shard):
                sent[shard.number] = shard.send(path, body, last)
        answers: list[R | None] = [None] * len(self)
        for number, request in sent.items():
            shard = self._shards[number]
            with self._noting(shard):
                received = shard.receive(request, path, bodies[number], last)
                answers[number] = read(received, shard)
        return answers

    @contextlib.contextmanager
    def _noting(self, shard: _Shard) -> Iterator[None]:
        """Notes that a shard is missing where the block cannot ask it."""
        try:
            yield
        # What is wrong with a request says nothing of the shard; the class is a ValueError too.
        except ConfigError:
            raise
        except (_Failure, ValueError) as error:
            if isinstance(error, _Failure) and error.why == "busy":
                # This list is without it, and says so; the next one may well be with it.
                _miss(shard)
                self.report(shard.number, "busy")
                return
            # Left out from now on, until a look finds it again: the limit is paid once.
            shard.reason = str(error).rstrip(".")
            _miss(shard)
            self.report(shard.number, error.why if isinstance(error, _Failure) else "error")
            logging.warning("Shard %d (%s) is missing: %s.", shard.number, shard.url, shard.reason)

    def _refusal(self, shards: Sequence[_Shard]) -> RequestError:
        numbers = ", ".join(str(shard.number) for shard in shards)
        return RequestError(
            503,
            f"Shards that the answer needs are missing: {numbers}.",
            cure="Send the request again.",
            retry_after=1,
        )


def _miss(shard: _Shard) -> None:
    """Notes that a shard has no part in the answer that is being made."""
    missed = _missed.get()
    if missed is not None:
        missed.add(shard.number)


def _left(last: float) -> float:
    """Returns the seconds until a time.

    Raises:
        TimeoutError: There are none.
    """
    seconds = last - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
