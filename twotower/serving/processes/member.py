"""One process of several that serve together: when it may accept, and who makes its changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import msgspec

from twotower.serving.errors import RequestError, explain
from twotower.serving.processes.links import (
    HAND_OVER_SECONDS,
    RETRY_SECONDS,
    Handed,
    Links,
    News,
    Reply,
    read_state,
    refusal_of,
    reply_of,
)
from twotower.serving.processes.rates import Rates
from twotower.serving.versions.admin import Admin
from twotower.serving.versions.routing import State
from twotower.serving.writer import Writer

READY = "ready"  # of a child to its parent
ACCEPT = "accept"  # of the parent to a child
_ENCODER = msgspec.json.Encoder()


class Endpoint(Protocol):
    """An endpoint that changes something; see `twotower.serving.app.Endpoint`."""

    name: str
    request: type[Any] | None
    answer: type[Any] | None

    async def make(self, request: Any, item_id: str) -> Any: ...


class Served(Protocol):
    """The server of this process; see `twotower.serving.app.App`."""

    status: str
    writer: Writer
    admin: Admin

    @property
    def changing(self) -> Mapping[str, Any]: ...


class Member:
    """One process of several.

    Attributes:
        folder: Folder of the server's processes.
        has_joined: Whether it accepts requests.
        is_writer: Whether it makes the changes of all.
    """

    def __init__(
        self, folder: Path, number: int, count: int, parent: Connection, *, is_early: bool
    ):
        """Prepares the links to the others.

        Args:
            folder: Folder of the server's processes.
            number: Number of this process.
            count: Number of all processes.
            parent: Pipe to the process that started it.
            is_early: Whether it accepts requests before it is ready, so that somebody answers
                probes while the server starts.
        """
        self.has_joined = is_early
        self.is_writer = False
        self._links = Links(folder, number)
        self._number = number
        self._count = count
        self.folder = folder
        self._parent = parent
        self._claiming = asyncio.Lock()
        self._is_retired = False
        self._may_accept = asyncio.Event()
        if is_early:
            self._may_accept.set()

    def share_rates(self, rate: int, clients: int) -> Rates:
        """Returns the counts of the clients' requests, which all processes share.

        Args:
            rate: Requests a second of each client.
            clients: Number of clients.
        """
        path = self.folder / "rates"
        return Rates(rate, clients, path=path, process=self._number, count=self._count)

    def read_state(self) -> State | None:
        """Returns the versions of the processes that run already; None at the start of all."""
        return read_state(self.folder)

    async def start(self, served: Served) -> None:
        """Hears the parent and the others, and returns when requests may be accepted."""
        self._served = served
        served.writer.tell = self._links.tell
        served.admin.tell = self._publish
        # A pipe, which also tells of the parent's end.
        asyncio.get_running_loop().add_reader(self._parent.fileno(), self._hear)
        # Before it may accept: the writer must reach it from its first request on.
        await self._links.start(self._answer)
        await self._may_accept.wait()
        self.has_joined = True

    def say_ready(self) -> None:
        """Tells the parent that this process is ready."""
        with contextlib.suppress(OSError):
            self._parent.send(READY)

    async def catch_up(self) -> None:
        """Takes up the versions that the writer has set last, and its place where it is free."""
        if self.is_writer or await self._become_writer():
            return
        state = self.read_state()
        if state is not None:
            await self._served.admin.reconcile(state)

    async def change(self, endpoint: Endpoint, request: Any, item_id: str) -> Any:
        """Returns the answer to a request that changes something, by whoever is the writer.

        Raises:
            RequestError: It is refused, or nobody is the writer.
        """
        loop = asyncio.get_running_loop()
        last = loop.time() + HAND_OVER_SECONDS
        # As JSON of our names, whatever the shop's are: the writer checks it as it would a
        # client's.
        body = b"" if request is None else _ENCODER.encode(request)
        message = Handed(endpoint.name, item_id, body)
        while True:
            if self.is_writer or await self._become_writer():
                return await endpoint.make(request, item_id)
            # Counted here too: a thousand requests that are handed over wait as well.
            with self._served.writer.queued():
                reply = await self._links.hand(message)
            if reply is not None:
                refusal = refusal_of(reply)
                if refusal is not None:
                    raise refusal
                return msgspec.json.decode(reply.body, type=endpoint.answer)
            if loop.time() > last:
                raise RequestError(
                    503,
                    "No process of the server makes changes now.",
                    cure="Send the request again.",
                    retry_after=5,
                )
            # The kernel lets the lock go with its process; whoever asks next has it, and the loop
            # finds out who.
            await asyncio.sleep(RETRY_SECONDS)

    def retire(self) -> None:
        """Makes and follows no more changes: those that others hand over go to the next writer."""
        self._is_retired = True
        self.is_writer = False

    async def close(self) -> None:
        """Ends the links; another process makes the changes from now on."""
        self.is_writer = False
        await self._links.close()

    async def _publish(self, state: State) -> None:
        """Gives all others the versions that the writer has set."""
        self._links.write_state(state)
        await self._links.tell(state)

    async def _become_writer(self) -> bool:
        """Takes the place of the writer if it is free, and says whether it is this process's."""
        # Several requests at once would each take up the state of the writer before.
        async with self._claiming:
            served = self._served
            # Not before it has all versions, or when it is about to end.
            if not self.has_joined or served.status != "ok" or not self._links.claim():
                return self.is_writer
            # First the changes of the writer before this one: they came earlier.
            await served.writer.follow()
            state = self.read_state()
            if state is not None:
                await served.admin.reconcile(state)
            # For processes that start from now on, also where no version has changed yet.
            self._links.write_state(served.admin.versions.state)
            self.is_writer = True
            return True

    async def _answer(self, message: Handed | News) -> Reply:
        """Answers another process."""
        if self._is_retired:
            return Reply(is_elsewhere=True)
        if isinstance(message, News):
            try:
                if message.state is not None:
                    await self._served.admin.reconcile(message.state)
                await self._served.writer.follow()
            # The writer must hear of it, rather than take this process for a dead one.
            except Exception as error:
                return reply_of(explain(error, None, b""))
            return Reply()
        if not self.is_writer and not await self._become_writer():
            return Reply(is_elsewhere=True)
        # All processes run the same code: a name that is not there is a defect.
        endpoint = self._served.changing[message.endpoint]
        try:
            request = None
            if endpoint.request is not None:
                request = msgspec.json.decode(message.body, type=endpoint.request)
            return Reply(_ENCODER.encode(await endpoint.make(request, message.item_id)))
        except Exception as error:
            return reply_of(explain(error, endpoint.request, message.body))

    def _hear(self) -> None:
        try:
            if self._parent.recv() == ACCEPT:
                self._may_accept.set()
        except (EOFError, OSError):
            # Without its parent nobody starts it again, or tells it to end.
            asyncio.get_running_loop().remove_reader(self._parent.fileno())
            # By the signal, so that what was accepted is answered first.
            os.kill(os.getpid(), signal.SIGTERM)
