"""The processes of one server among themselves, over Unix sockets in a folder of their own.

One process, the writer, makes whatever changes something: items, events, and the versions that
answer. The others hand such requests to it. When it has made a change it tells them, and they take
it from the log before the change is acknowledged: the next request sees it, whichever process
answers it. A process that does not hear of it, or is slow, follows the logs four times a second
anyway.

The writer is whoever holds a lock of the kernel, which ends with its process: another one takes its
place then, and the requests that were handed to the dead one and not answered are made once more.
All of them can be: an event counts once, by its id, and an item is replaced by itself. What was
acknowledged is in the logs, on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from absl import logging

from twotower.core.files import atomic
from twotower.serving.errors import RequestError
from twotower.serving.types import Problem
from twotower.serving.versions.routing import State

TELL_SECONDS = 1.0  # that an acknowledgement waits for a process that does not hear
LOAD_SECONDS = 600.0  # in which all processes load a version
HAND_OVER_SECONDS = 20.0  # in which another process takes the place of a writer that died
CALL_SECONDS = 900.0  # for a handed request: it may load a version
RETRY_SECONDS = 0.05
LENGTH = 4  # bytes before each message that say how long it is
MAX_IDLE = 64  # connections that are kept to another process


class Handed(msgspec.Struct, tag=True):
    """A request that is handed to the writer.

    Attributes:
        endpoint: Name of its endpoint.
        item_id: Id in its path.
        body: Its body, as JSON with our names; b"" without one.
    """

    endpoint: str
    item_id: str
    body: bytes


class News(msgspec.Struct, tag=True):
    """Something has changed.

    Attributes:
        state: Versions now; None where items or events have changed.
    """

    state: State | None


class Reply(msgspec.Struct):
    """An answer.

    Attributes:
        body: Answer as JSON.
        problem: Refusal in its place.
        retry_after: See `RequestError`.
        is_elsewhere: Whether another process is the writer.
    """

    body: bytes = b""
    problem: Problem | None = None
    retry_after: int = 0
    is_elsewhere: bool = False


# Answers a request of another process.
Answer = Callable[[Handed | News], Awaitable[Reply]]
_DECODER = msgspec.msgpack.Decoder(Handed | News)
_REPLIES = msgspec.msgpack.Decoder(Reply)


class Links:
    """The links of one process to the others."""

    def __init__(self, folder: Path, index: int):
        """Opens nothing yet.

        Args:
            folder: Folder of the server's processes, which nobody else may enter.
            index: Number of this process.
        """
        self._folder = folder
        self._index = index
        self._path = folder / f"{index}.socket"
        self._lock: int | None = None
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: dict[Path, list[_Connection]] = {}

    async def start(self, answer: Answer) -> None:
        """Answers the other processes from now on."""

        # asyncio keeps no reference to the tasks of its own server, by which they could be ended.
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await _serve(reader, writer, answer)
            finally:
                self._tasks.discard(task)

        # The socket that a process with this number has left when it died.
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(serve, str(self._path))

    async def close(self) -> None:
        """Ends the links, and lets another process be the writer."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        self._path.unlink(missing_ok=True)
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def claim(self) -> bool:
        """Takes the place of the writer, if it is free; whether it is this process's now.

        The caller makes up for what the writer before has changed.
        """
        # Opened once: a lock of the kernel belongs to its descriptor, and closing it gives the lock
        # away.
        if self._lock is None:
            self._lock = os.open(self._folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # The name of its socket, for those who hand changes to it.
        with atomic(self._folder / "writer") as temporary:
            temporary.write_text(self._path.name)
        return True

    def write_state(self, state: State) -> None:
        """Keeps the versions for processes that start later."""
        with atomic(self._folder / "state.json") as temporary:
            temporary.write_bytes(msgspec.json.encode(state))

    async def hand(self, message: Handed) -> Reply | None:
        """Returns the writer's answer to a request; None where there is none now."""
        name = ""
        with contextlib.suppress(FileNotFoundError):
            name = (self._folder / "writer").read_text()
        # Its own name is one that its predecessor has left: nobody is the writer now.
        if not name or name == self._path.name:
            return None
        try:
            reply = await self._call(self._folder / name, message, CALL_SECONDS)
        except ConnectionError:
            return None
        return None if reply.is_elsewhere else reply

    async def tell(self, state: State | None = None) -> None:
        """Tells all other processes that something has changed, and waits until they have it.

        Args:
            state: Versions, where those have changed.
        """
        # All that have a socket, also those that are being started: they must not be behind when
        # they join.
        others = [path for path in self._folder.glob("*.socket") if path != self._path]
        if not others:
            return
        seconds = TELL_SECONDS if state is None else LOAD_SECONDS
        calls = [self._call(path, News(state), seconds) for path in others]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        for path, reply in zip(others, replies):
            problem = reply.problem if isinstance(reply, Reply) else reply
            # A process that starts, or has just died, reads all of it from the logs later.
            if problem is not None and not isinstance(problem, ConnectionError):
                logging.warning("Process %s is behind: %r", path.stem, problem)

    async def _call(self, path: Path, message: Handed | News, seconds: float) -> Reply:
        """Returns the answer of another process.

        Raises:
            ConnectionError: It has died, or does not answer in time.
        """
        idle = self._idle.setdefault(path, [])
        # One request at a time on each: a change that takes long must not keep another one waiting.
        connection = idle.pop() if idle else None
        if connection is not None and connection.is_closed:
            connection = None
        try:
            async with asyncio.timeout(seconds):
                if connection is None:
                    connection = await _Connection.open(path)
                content = await connection.call(msgspec.msgpack.encode(message))
        except (OSError, EOFError, TimeoutError) as error:
            if connection is not None:
                connection.close()
            raise ConnectionError(f"Process {path.stem} does not answer.") from error
        if len(idle) < MAX_IDLE:
            idle.append(connection)
        else:
            connection.close()
        return _REPLIES.decode(content)


class _Connection:
    """A connection to another process, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: Path) -> _Connection:
        return cls(*await asyncio.open_unix_connection(str(path)))

    @property
    def is_closed(self) -> bool:
        return self._writer.is_closing() or self._reader.at_eof()

    async def call(self, content: bytes) -> bytes:
        _write(self._writer, content)
        await self._writer.drain()
        return await _read(self._reader)

    def close(self) -> None:
        self._writer.close()


def read_state(folder: Path) -> State | None:
    """Returns the versions that the processes in a folder answer by; None at their start."""
    try:
        return msgspec.json.decode((folder / "state.json").read_bytes(), type=State)
    except FileNotFoundError:
        return None


def reply_of(refusal: RequestError) -> Reply:
    """Returns a refusal in the form that it is handed back in."""
    return Reply(problem=refusal.to_problem(), retry_after=refusal.retry_after)


def refusal_of(reply: Reply) -> RequestError | None:
    """Returns the refusal in a reply; None where it is none."""
    problem = reply.problem
    if problem is None:
        return None
    return RequestError(
        problem.status,
        problem.detail,
        field=problem.field,
        value=problem.value,
        cure=problem.cure,
        retry_after=reply.retry_after,
    )


async def _serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer
) -> None:
    """Answers another process until it has gone."""
    with contextlib.suppress(EOFError, ConnectionError, asyncio.CancelledError):
        while True:
            message: Any = _DECODER.decode(await _read(reader))
            _write(writer, msgspec.msgpack.encode(await answer(message)))
            await writer.drain()
    writer.close()


def _write(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(len(content).to_bytes(LENGTH) + content)


async def _read(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(LENGTH))
    return await reader.readexactly(size)
