"""The versions of a server in memory: they are loaded, warmed and proved before they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from twotower.core.errors import ConfigError, FolderError
from twotower.core.files import current_version
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.retriever import Retriever
from twotower.serving.answers import Answers
from twotower.serving.errors import RequestError
from twotower.serving.lists.options import MakeAnswers
from twotower.serving.shards.router import Router
from twotower.serving.versions import routing
from twotower.serving.versions.routing import Location, Routing, State
from twotower.serving.versions.types import VersionInfo, VersionList


class Versions:
    """The versions that are loaded, and which of them answers whom.

    All of it is used by the thread that answers.

    Attributes:
        make: Function that makes a version of the retriever of a bundle.
        main: Version that answers where nothing else is said.
        shadow: Version that answers after the real one; None without one.
        state: What is loaded, and which version answers whom.
    """

    def __init__(
        self, first: Answers, location: Location | None = None, *, make: MakeAnswers = Answers
    ):
        """Starts with one version, which answers everybody.

        Args:
            first: Version that answers.
            location: Where it lies; by default the place that its bundle was loaded from.
            make: Function that makes a version of the retriever of a bundle.
        """
        self.make = make
        if location is None:
            location = location_of(first.retriever)
        self.state = State(0, {first.version: location}, Routing(first.version))
        self._loaded = {first.version: first}
        self.main = first
        self.shadow: Answers | None = None

    def __iter__(self) -> Iterator[Answers]:
        """Yields the versions, the main one first."""
        yield self.main
        for answers in self._loaded.values():
            if answers is not self.main:
                yield answers

    def __contains__(self, version: str) -> bool:
        return version in self._loaded

    def choose(self, user: Any = None, session: Any = None, version: str | None = None) -> Answers:
        """Returns the version that answers a request.

        Args:
            user: Id of the user; None where nobody is named.
            session: Id of the session; None without one.
            version: Version that the request asks for; None where it is chosen by the split.

        Raises:
            RequestError: There is no such version.
        """
        if version is not None:
            # By the state, not by what is loaded: a version that was just loaded answers nobody
            # yet.
            return self._loaded[self.state.find(version, "model_version")]
        routing = self.state.routing
        # Most servers have one version.
        if not routing.weights and not routing.overrides:
            return self.main
        return self._loaded[routing.choose(user, session)]

    def add(self, answers: Answers) -> None:
        """Adds a version that was proved; it answers nobody before a state says so."""
        self._loaded[answers.version] = answers

    def apply(self, state: State) -> None:
        """Makes a state the one that counts, and drops the versions that are not in it.

        Args:
            state: State, whose versions were all added.
        """
        self.state = state
        self.main = self._loaded[state.routing.main]
        self.shadow = self._loaded[state.routing.shadow] if state.routing.shadow else None
        # Versions that are left out are freed when the last request that they answer has ended.
        self._loaded = {version: self._loaded[version] for version in state.locations}

    def list(self) -> VersionList:
        """Returns what is loaded."""
        state = self.state
        # A version that was just added is in no state yet.
        infos = [self._describe(self._loaded[version]) for version in state.locations]
        return VersionList(
            state.routing.main, infos, len(state.routing.overrides), state.routing.share
        )

    def _describe(self, answers: Answers) -> VersionInfo:
        version = answers.version
        routing = self.state.routing
        # Overrides are not counted: they are single users.
        share = routing.weights.get(version, 0.0)
        if not routing.weights:
            share = float(version == routing.main)
        role = ""
        # The first that fits: a version may be several of these.
        if version == routing.main:
            role = "main"
        elif version in routing.weights or version in routing.overrides.values():
            role = "split"
        elif version == routing.shadow:
            role = "shadow"
        elif self.state.previous is not None and version in self.state.previous.versions:
            role = "previous"
        return VersionInfo(
            version,
            self.state.locations[version].name,
            answers.retriever.bundle.manifest["date"],
            len(answers.retriever),
            answers.retriever.changes,
            share,
            role,
        )


def location_of(retriever: Retriever, name: str = "") -> Location:
    """Returns where the bundle of a retriever lies.

    Args:
        retriever: Retriever of a bundle that was loaded from a folder.
        name: Name of the bundle; by default that of its folder.
    """
    bundle = retriever.bundle
    # A bundle in memory has no log of changes, and no place for another process to load it from.
    if bundle.folder is None or bundle.version is None:
        raise ConfigError("Only a bundle that was loaded from a folder is served.")
    return Location(name or bundle.folder.name, str(bundle.folder), str(bundle.version))


def load(location: Location, make: MakeAnswers) -> Answers:
    """Returns a version, with the changes that were made to it.

    Args:
        location: Where it lies.
        make: Function that makes a version of its retriever.

    Raises:
        TwotowerError: The bundle is not whole.
    """
    bundle = load_bundle(location.files)
    # Found by the folder above, whose pointer says when it is no longer the current one.
    return make(Retriever(dataclasses.replace(bundle, folder=Path(location.folder))))


def load_all(folders: Mapping[str, Path], make: MakeAnswers) -> Versions:
    """Returns the versions of a server that starts.

    Args:
        folders: Folder of each bundle by its name; the first one is the main one.
        make: Function that makes a version of the retriever of a bundle.

    Raises:
        TwotowerError: A bundle is not whole.
        ConfigError: Two names mean one version.
    """
    versions = None
    for name, folder in folders.items():
        retriever = Retriever.load(folder)
        answers = make(retriever)
        location = location_of(retriever, name)
        if versions is None:
            versions = Versions(answers, location, make=make)
            continue
        # The versions of two names are one entry: a split between them would be none.
        if answers.version in versions:
            raise ConfigError(
                f"--bundle={name}={folder} is the same bundle as another one. Name it once."
            )
        versions.add(answers)
        versions.apply(routing.add(versions.state, answers.version, location))
    if versions is None:
        raise ConfigError("--bundle: no bundle is named.")
    return versions


def load_router(folders: Mapping[str, Path], make: MakeAnswers, router: Router) -> Versions:
    """Returns the one version of a router, whose items are with the shards.

    Args:
        folders: Folder of the bundle by its name.
        make: Function that makes a version of the retriever of a bundle.
        router: The shards.

    Raises:
        TwotowerError: The bundle is not whole, or not divided into these shards.
        ConfigError: There are several bundles.
    """
    if len(folders) > 1:
        raise ConfigError("--shard_urls are of one bundle. Name one by --bundle.")
    ((name, folder),) = folders.items()
    retriever = Retriever(load_bundle(folder, shards=router))
    manifest = retriever.bundle.manifest
    router.expect(Answers.version_of(manifest), manifest["shards"])
    return Versions(make(retriever), location_of(retriever, name), make=make)


def restore(state: State, make: MakeAnswers) -> Versions:
    """Returns the versions that other processes of a server answer by.

    Args:
        state: Versions of the others.
        make: Function that makes a version of the retriever of a bundle.

    Raises:
        TwotowerError: One of them is not whole any more.
    """
    # By the files of each, not by the pointer of its folder, which may have moved on.
    loaded = [load(location, make) for location in state.locations.values()]
    # Any of them: the state says which is the main one.
    versions = Versions(loaded[0], make=make)
    for answers in loaded[1:]:
        versions.add(answers)
    versions.apply(state)
    return versions


def prove(answers: Answers) -> None:
    """Makes a version ready to answer, and refuses one that answers otherwise than at its export.

    Raises:
        RequestError: Golden answers differ; the message says which.
    """
    differences = answers.warm()
    if differences:
        raise RequestError(
            409,
            f"{len(differences)} golden answers of {answers.version} differ from those of the "
            f"export. The first: {differences[0]}.",
            cure="Export the bundle again, with the libraries of this server.",
        )


def find_bundle(bundles: str, name: str) -> Location:
    """Returns the place of the current version of a bundle.

    Args:
        bundles: Folder that bundles are loaded from; "" for none.
        name: Name of a folder in it.

    Raises:
        RequestError: There is no such bundle, or none may be loaded.
    """
    if not bundles:
        raise RequestError(
            409,
            "No folder of bundles is named.",
            field="bundle",
            value=name,
            cure="Start the server with --bundles=FOLDER.",
        )
    folder = Path(bundles).absolute()
    # A name in the folder, and never a path out of it.
    known = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if name not in known or name.startswith("."):
        raise RequestError(
            404,
            f"bundle={name!r} is not there.",
            field="bundle",
            value=name,
            cure=f"Name one of {', '.join(known) or 'none'}.",
        )
    try:
        files = current_version(folder / name)
    except FolderError:
        raise RequestError(
            409, f"bundle={name!r} is damaged.", field="bundle", value=name, cure="Export it again."
        ) from None
    return Location(name, str(folder / name), str(files))


def version_at(location: Location) -> str:
    """Returns the version in a place, which is not loaded for that.

    Raises:
        OSError, ValueError: It has no manifest.
    """
    manifest = msgspec.json.decode((Path(location.files) / "manifest.json").read_bytes())
    return Answers.version_of(manifest)
