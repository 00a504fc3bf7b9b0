"""Changes and events, written one after another by a thread of their own: the disk takes
milliseconds, in which the server answers others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from twotower.serving.answers import Answers
from twotower.serving.errors import RequestError
from twotower.serving.events import EventLog, StoredEvent

T = TypeVar("T")


class Writer:
    """The one writer of a process.

    Attributes:
        waiting: Number of requests that wait for the disk.
    """

    def __init__(self, answers: Answers, log: EventLog, limit: int):
        """Starts without work.

        Args:
            answers: Bundle whose items and histories change.
            log: Events on the disk.
            limit: Number of requests that may wait; more are refused.
        """
        self.waiting = 0
        self._answers = answers
        self._log = log
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: list[tuple[Sequence[StoredEvent], asyncio.Future[int]]] = []
        self._task: asyncio.Task[None] | None = None

    async def change(self, function: Callable[[], T]) -> T:
        """Returns what a function returns that changes the bundle.

        Raises:
            RequestError: Too many wait already.
        """
        with self._place():
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def add_events(self, events: Sequence[StoredEvent]) -> int:
        """Returns the number of new events, when all are on the disk and in the live histories.

        Raises:
            RequestError: Too many wait already.
            OSError: The disk refuses.
        """
        with self._place():
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._pending.append((events, future))
            if self._task is None:
                self._task = asyncio.create_task(self._write_pending())
            return await future

    async def follow(self) -> None:
        """Makes what other processes have changed and sent."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._answers.retriever.follow)
        events = await loop.run_in_executor(self._thread, self._log.read_new)
        self._answers.histories.add(events)

    async def close(self) -> None:
        """Waits for what was accepted, and closes the file of events."""
        if self._task is not None:
            await self._task
        await asyncio.get_running_loop().run_in_executor(self._thread, self._log.close)
        self._thread.shutdown()

    async def _write_pending(self) -> None:
        """Writes the events of all requests that wait, those that come meanwhile together."""
        loop = asyncio.get_running_loop()
        while self._pending:
            pending = self._pending
            self._pending = []
            batches = [events for events, _ in pending]
            try:
                counts, events = await loop.run_in_executor(self._thread, self._write, batches)
            except Exception as error:
                for _, future in pending:
                    future.set_exception(error)
                continue
            # Before they are acknowledged: the next request of a user sees them.
            self._answers.histories.add(events)
            for (_, future), count in zip(pending, counts):
                future.set_result(count)
        self._task = None

    def _write(
        self, batches: Sequence[Sequence[StoredEvent]]
    ) -> tuple[list[int], list[StoredEvent]]:
        """Writes events; returns how many of each batch are new, and all that came since."""
        return self._log.add(batches), self._log.read_new()

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Counts a request among those that wait.

        Raises:
            RequestError: Too many wait already.
        """
        if self.waiting >= self._limit:
            raise RequestError(
                429,
                "Too many changes are waiting for the disk.",
                cure="Send it again later, several of them in one request.",
                retry_after=1,
            )
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
