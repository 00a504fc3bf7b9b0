"""The calls of administration: versions come and go, and share the users, without a lost request.

A version is loaded, warmed and proved by its golden answers in a thread, while the others answer;
it is used by a swap or a split only after that. Each answer is made by one version from its
beginning to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable

from absl import logging

from twotower.core.errors import FolderError, TwotowerError
from twotower.core.files import current_version
from twotower.serving.answers import Answers
from twotower.serving.errors import RequestError
from twotower.serving.lists.options import MakeAnswers
from twotower.serving.versions import routing, types
from twotower.serving.versions.routing import Location, State
from twotower.serving.versions.versions import Versions, find_bundle, load, prove, version_at
from twotower.serving.writer import Writer

LOOK_SECONDS = 10.0  # between two looks into a bucket, each of which is paid for


class Admin:
    """The administration of the versions of a server.

    Attributes:
        versions: Versions of the server.
        look: Function that copies what is new in the bucket of a bundle, by its folder; of those
            that lie in one.
        tell: Function that gives other processes a state, and returns when they have it.
    """

    def __init__(
        self, versions: Versions, writer: Writer, *, bundles: str = "", follow: bool = False
    ):
        """Begins with the versions that are loaded.

        Args:
            versions: Versions of the server.
            writer: Writer of changes and events.
            bundles: Folder that bundles are loaded from; "" for none.
            follow: Whether a new version of a bundle takes the place of the one that is served.
        """
        self.versions = versions
        self.look: dict[str, Callable[[], object]] = {}
        self.tell: Callable[[State], Awaitable[None]] = _tell_nobody
        self._looking: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._writer = writer
        writer.follows = follow
        self._bundles = bundles
        # One after another: each begins with the state that the one before has left.
        self._lock = asyncio.Lock()
        # Folders of new versions that were tried: one that could not be used is not tried again.
        self._tried: set[str] = set()
        # The number of the last state that could not be taken up.
        self._failed = -1

    async def load(self, request: types.LoadBundle, _: str) -> types.VersionList:
        """Loads one more bundle."""
        location = find_bundle(self._bundles, request.bundle)
        async with self._lock:
            # Read from the manifest, before anything is loaded: the same bundle again costs
            # nothing.
            version = _version_at(location)
            if version not in self.versions:
                # Refused before the work.
                state = routing.add(self.versions.state, version, location)
                await self._load(location)
                await self._publish(state)
        return self.versions.list()

    async def unload(self, request: types.NamedVersion, _: str) -> types.VersionList:
        """Drops a version that is not used."""
        async with self._lock:
            await self._publish(routing.remove(self.versions.state, request.version))
        return self.versions.list()

    async def swap(self, request: types.NamedVersion, _: str) -> types.VersionList:
        """Answers everybody by one version."""
        async with self._lock:
            await self._publish(routing.swap(self.versions.state, request.version))
        return self.versions.list()

    async def roll_back(self, *_: object) -> types.VersionList:
        """Answers as before the last swap, split or shadow."""
        async with self._lock:
            await self._publish(routing.roll_back(self.versions.state))
        return self.versions.list()

    async def split(self, request: types.Split, _: str) -> types.VersionList:
        """Shares the users among versions."""
        async with self._lock:
            state = routing.split(
                self.versions.state, request.weights, request.overrides, request.salt
            )
            await self._publish(state)
        return self.versions.list()

    async def shadow(self, request: types.Shadow, _: str) -> types.VersionList:
        """Compares a version with the real ones, or ends that."""
        async with self._lock:
            state = routing.shadow(self.versions.state, request.version, request.share)
            await self._publish(state)
        return self.versions.list()

    async def reconcile(self, state: State) -> None:
        """Takes up the versions that the writer of several processes has set.

        Raises:
            RequestError: One of them cannot be loaded here.
        """
        async with self._lock:
            now = self.versions.state
            # An older state may arrive late, by a message that a newer one has overtaken.
            if state == now or state.number < now.number or state.number == self._failed:
                return
            try:
                for version, location in state.locations.items():
                    if version not in self.versions:
                        await self._load(location)
            # Errors of any kind, such as too little memory: another try follows with the next state
            # alone.
            except Exception as error:
                self._failed = state.number
                logging.error("The versions of the other processes are not here: %s", error)
                raise
            await self._apply(state)

    def list(self, *_: object) -> types.VersionList:
        """Returns what is loaded."""
        return self.versions.list()

    async def follow(self) -> None:
        """Takes up new versions of the bundles that are served: exports, and compactions."""
        # Not behind a load that goes on: this is called four times a second, and would queue up.
        if not self._writer.follows or self._lock.locked():
            return
        self._begin_to_look()
        async with self._lock:
            # The last one of a folder stands: versions before it are there to go back to.
            newest = {location.folder: version for version, location in self._locations().items()}
            for folder, version in newest.items():
                await self._follow_folder(folder, version)

    def _begin_to_look(self) -> None:
        """Begins to look for new versions in buckets, now and then, while others are followed."""
        now = asyncio.get_running_loop().time()
        is_looking = self._looking is not None and not self._looking.done()
        if not self.look or is_looking or now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        # A task, since a copy of gigabytes takes minutes.
        self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        for folder, look in self.look.items():
            try:
                await asyncio.to_thread(look)
            # A bucket that is away for a moment, or an export that is half there.
            except (TwotowerError, OSError) as error:
                logging.warning("The bucket of %s: %s", folder, error)

    async def _follow_folder(self, folder: str, version: str) -> None:
        """Takes up the new version in a folder, if there is one."""
        location = self._locations()[version]
        try:
            files = str(current_version(folder))
        # An export that is copied over it may be half there: the next look sees it whole.
        except FolderError:
            files = location.files
        if files == location.files or files in self._tried:
            return
        newer = Location(location.name, folder, files)
        # Before the attempt: one that fails would be loaded again four times a second.
        self._tried.add(files)
        # Changes wait for it.
        self._writer.stuck.discard(version)
        try:
            found = _version_at(newer)
            if found not in self.versions:
                await self._load(newer)
            await self._publish(routing.supersede(self.versions.state, version, found, newer))
        except RequestError as error:
            self._writer.stuck.add(version)
            logging.error("The new version of %s is not used: %s", location.name, error)

    def _locations(self) -> dict[str, Location]:
        return self.versions.state.locations

    async def _load(self, location: Location) -> None:
        """Loads, warms and proves a version while the others answer.

        Raises:
            RequestError: It cannot be used.
        """
        loop = asyncio.get_running_loop()
        # Begun before the version is read: a change during that is in its log or in this list, or
        # in both, which does no harm.
        with self._writer.remember() as missed:
            answers = await loop.run_in_executor(
                None, _load_and_prove, location, self.versions.make
            )
            await self._writer.adopt(answers, missed)
        # The version lives as long as the server may: it is no garbage.
        gc.freeze()

    async def _apply(self, state: State) -> None:
        self.versions.apply(state)
        await self._writer.drop()
        await self.detach_replaced()

    async def detach_replaced(self) -> None:
        """Keeps the changes of versions that were replaced apart from their bundles."""
        for answers in list(self.versions):
            location = self._locations()[answers.version]
            # A pointer that cannot be read says nothing of a newer version.
            with contextlib.suppress(FolderError):
                if str(current_version(location.folder)) != location.files:
                    await self._writer.detach(answers)

    async def _publish(self, state: State) -> None:
        """Makes a state the one that counts."""
        before = self.versions.state
        await self._apply(state)
        # Here first: whoever reads the answer and asks this process again finds it so.
        await self.tell(state)
        if state.routing != before.routing:
            logging.info("Version %s is the main one.", state.routing.main)


def _load_and_prove(location: Location, make: MakeAnswers) -> Answers:
    """Returns a version that is ready to answer.

    Raises:
        RequestError: It is not whole, or its golden answers differ.
    """
    try:
        answers = load(location, make)
    except (TwotowerError, OSError) as error:
        # Its message names files of the server.
        logging.error("%s", error)
        raise _unusable(location) from error
    prove(answers)
    return answers


def _version_at(location: Location) -> str:
    try:
        return version_at(location)
    except (OSError, ValueError, KeyError) as error:
        logging.error("%s", error)
        raise _unusable(location) from error


def _unusable(location: Location) -> RequestError:
    return RequestError(
        409,
        f"Bundle {location.name!r} cannot be loaded; the server's log says why.",
        field="bundle",
        value=location.name,
        cure="Export it again.",
    )


async def _tell_nobody(state: State) -> None:
    """A server of one process has nobody to tell."""
    del state
