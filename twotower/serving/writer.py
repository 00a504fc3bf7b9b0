"""Changes and events, written one after another by a thread of their own: the disk takes
milliseconds, in which the server answers others.

All versions that are loaded get them, so that none is behind when it comes to answer. One that is
being loaded gets what changed meanwhile before it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import logging

from twotower.core.errors import ChangesError, SupersededError, TwotowerError
from twotower.serving.answers import Answers
from twotower.serving.errors import RequestError
from twotower.serving.events import EventLog, StoredEvent
from twotower.serving.types import Changed
from twotower.serving.versions.versions import Versions

REPLACE_SECONDS = 60.0  # in which a new version of a bundle is loaded
# Changes the items of one version.
Change = Callable[[Answers], Changed]


class Writer:
    """The one writer of a process.

    Attributes:
        waiting: Number of requests that wait for the disk.
        follows: Whether new versions of the bundles are taken up.
        tell: Function that tells other processes of a change, and returns when they have it.
        stuck: Versions that were replaced in their folders by others that cannot be used.
        on_erasure: Function that is called when a user was erased, by a thread.
    """

    def __init__(self, versions: Versions, log: EventLog, limit: int, aside: Path | None = None):
        """Starts without work.

        Args:
            versions: Versions whose items and histories change.
            log: Events on the disk.
            limit: Number of requests that may wait; more are refused.
            aside: Folder for the changes of versions that were replaced, which the processes of a
                server share; by default one of this process.
        """
        self._aside = aside
        # Deleted when the process ends.
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self.waiting = 0
        self.follows = False
        self.tell: Callable[[], Awaitable[None]] = _tell_nobody
        self.stuck: set[str] = set()
        self.on_erasure: Callable[[], None] = _do_nothing
        self._versions = versions
        # Used by the thread alone; a version that is new there is new to the others after that.
        self._changing = list(versions)
        # What was changed while versions are loaded, one list for each of them.
        self._missed: list[list[Change]] = []
        self._log = log
        self._limit = limit
        # One, so that changes have an order, which all versions and the log share.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: list[tuple[Sequence[StoredEvent], asyncio.Future[int]]] = []
        self._task: asyncio.Task[None] | None = None

    async def change(self, change: Change) -> Changed:
        """Returns what the main version says of a change, when all versions have it.

        A change to a bundle that was just replaced waits for the new version to be loaded.

        Raises:
            RequestError: Too many wait already, or the new version of the bundle cannot be used.
            ChangesError: The bundle was replaced, and nobody takes up the new version.
        """
        with self.queued():
            loop = asyncio.get_running_loop()
            last = loop.time() + (REPLACE_SECONDS if self.follows else 0)
            while True:
                main = self._versions.main
                try:
                    changed = await loop.run_in_executor(self._thread, self._change, change)
                    await self.tell()
                    return changed
                except SupersededError:
                    if main.version in self.stuck:
                        raise _stuck() from None
                    if loop.time() > last:
                        raise
                # Until the new version is the main one, in which the change is tried again.
                while self._versions.main is main and loop.time() <= last:
                    if main.version in self.stuck:
                        break
                    await asyncio.sleep(0.05)

    @contextlib.contextmanager
    def remember(self) -> Iterator[list[Change]]:
        """Yields a list of the changes that are made meanwhile, for a version in the making."""
        missed: list[Change] = []
        self._missed.append(missed)
        try:
            yield missed
        finally:
            self._missed.remove(missed)

    async def adopt(self, answers: Answers, missed: list[Change]) -> None:
        """Gives a version the events and changes of all others, and adds it to them.

        Args:
            answers: Version that was loaded.
            missed: List of `remember`, which began before the version was loaded.
        """
        loop = asyncio.get_running_loop()
        reader = EventLog(self._log.path)
        # Nearly all of them, while others are written.
        await loop.run_in_executor(None, lambda: answers.histories.add(reader.read_new()))
        events, users = await loop.run_in_executor(
            self._thread, self._catch_up, answers, missed, reader
        )
        # In one step with the above: what the thread writes next is told after this.
        answers.histories.add(events)
        if users is not None:
            answers.keep_users(users)
        self._versions.add(answers)

    async def add_events(self, events: Sequence[StoredEvent]) -> int:
        """Returns the number of new events, when all are on the disk and in the live histories.

        Raises:
            RequestError: Too many wait already.
            OSError: The disk refuses.
        """
        with self.queued():
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._pending.append((events, future))
            # One writes for all: what comes while it writes goes into its next transaction, since
            # each costs milliseconds whatever it holds.
            if self._task is None:
                self._task = asyncio.create_task(self._write_pending())
            return await future

    async def erase(self, user_id: str) -> int:
        """Deletes the events of a user, and returns their number when all processes forgot them.

        Raises:
            RequestError: Too many wait already.
            OSError: The disk refuses.
        """
        with self.queued():
            loop = asyncio.get_running_loop()
            count = await loop.run_in_executor(self._thread, self._log.erase, user_id)
            await self.follow()
            await self.tell()
            return count

    async def detach(self, answers: Answers) -> None:
        """Keeps the changes of a version that was replaced apart from its bundle."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._detach, answers)

    async def drop(self) -> None:
        """Ends the changes of versions that were dropped."""
        kept = list(self._versions)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._forget, kept)

    async def follow(self) -> None:
        """Makes what other processes have changed and sent."""
        loop = asyncio.get_running_loop()
        events, users = await loop.run_in_executor(self._thread, self._follow)
        self._add_to_histories(events)
        if users is None:
            return
        for answers in self._versions:
            answers.keep_users(users)
        await loop.run_in_executor(None, self.on_erasure)

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
                    # Nobody waits for one that was cancelled; the others must still hear.
                    if not future.done():
                        future.set_exception(error)
                continue
            # Before they are acknowledged: the next request of a user sees them.
            self._add_to_histories(events)
            await self.tell()
            for (_, future), count in zip(pending, counts):
                if not future.done():
                    future.set_result(count)
        self._task = None

    def _add_to_histories(self, events: Sequence[StoredEvent]) -> None:
        for answers in self._versions:
            answers.histories.add(events)

    def _change(self, change: Change) -> Changed:
        """Makes a change to all versions; the first one may refuse it."""
        main = self._versions.main
        others = [answers for answers in self._changing if answers is not main]
        order = [main, *others]
        # First where it is durable, so that no answer shows what could be lost.
        order.sort(key=lambda answers: answers.retriever.is_detached)
        first = order[0]
        if first.retriever.is_detached:
            # No log would keep the change: what the server says of it would be lost with its
            # process.
            raise ChangesError("Only versions that were replaced are loaded.")
        changed = change(first)
        for answers in order[1:]:
            self._change_also(answers, change, changed)
        for missed in self._missed:
            missed.append(change)
        return changed

    def _change_also(self, answers: Answers, change: Change, changed: Changed) -> None:
        """Makes a change to a further version, which may have other columns."""
        try:
            try:
                change(answers)
            except SupersededError:
                # Its successor keeps what is changed; it is there to go back to.
                self._detach(answers)
                change(answers)
        except (TwotowerError, RequestError) as error:
            logging.error("Version %s did not make a change: %s", answers.version, error)
            changed.refused[answers.version] = str(error)
        except OSError as error:
            # The first one has it: a refusal of the whole would be wrong, and the rest go on.
            logging.error("Version %s did not make a change: %s", answers.version, error)
            changed.refused[answers.version] = "Its disk refused; the server's log says why."

    def _detach(self, answers: Answers) -> None:
        """Keeps the changes of a version that was replaced apart from its bundle."""
        if self._aside is None:
            self._own = tempfile.TemporaryDirectory(prefix="twotower-")
            self._aside = Path(self._own.name)
        answers.retriever.detach(self._aside / f"{answers.version}.changes")

    def _catch_up(
        self, answers: Answers, missed: list[Change], reader: EventLog
    ) -> tuple[list[StoredEvent], set[str] | None]:
        """Makes what was changed while a version was loaded, and returns what `_follow` does."""
        for change in missed:
            self._change_also(answers, change, Changed(answers.version, 0, 0))
        self._changing.append(answers)
        events = reader.read_new()
        users = reader.users_after_erasure()
        reader.close()
        return events, users

    def _forget(self, kept: Sequence[Answers]) -> None:
        self._changing = list(kept)

    def _follow(self) -> tuple[list[StoredEvent], set[str] | None]:
        """Returns the latest events, and the users with events where some were erased."""
        for answers in self._changing:
            answers.retriever.follow()
        events = self._log.read_new()
        return events, self._log.users_after_erasure()

    def _write(
        self, batches: Sequence[Sequence[StoredEvent]]
    ) -> tuple[list[int], list[StoredEvent]]:
        """Writes events; returns how many of each batch are new, and all that came since."""
        return self._log.add(batches), self._log.read_new()

    @contextlib.contextmanager
    def queued(self) -> Iterator[None]:
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


def _stuck() -> RequestError:
    """Returns the refusal of a change that no version can keep."""
    return RequestError(
        503,
        "The bundle was exported anew, and its new version cannot be used: items do not change.",
        cure="Export it again; the server's log says what is wrong with it.",
        retry_after=5,
    )


def _do_nothing() -> None:
    """A server without a log of impressions has nothing to write."""


async def _tell_nobody() -> None:
    """A server of one process has nobody to tell."""
