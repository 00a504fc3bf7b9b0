"""Which version answers whom: the split between versions, and the steps from one to the next.

A user's version is drawn by a hash, so that it stays: the first eight bytes of the SHA-256 of the
salt and the id, as a number from 0 to 1, fall into one of the shares, which lie side by side in the
order in which they were given. Where a share grows at the cost of its neighbour, those alone change
that the border passes. Who sends no id is drawn by the id of the session; without one, each request
is drawn anew.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from twotower.core.errors import did_you_mean, echo
from twotower.serving.errors import RequestError

MAX_VERSIONS = 8  # in memory at once


class Location(msgspec.Struct, frozen=True):
    """Where a version lies.

    Attributes:
        name: Name of the bundle, which requests may use in the place of the version.
        folder: Folder of the bundle.
        files: Folder of the version's files, inside `folder` or `folder` itself.
    """

    name: str
    folder: str
    files: str


class Routing(msgspec.Struct, frozen=True):
    """Which version answers whom.

    Attributes:
        main: Version that answers where nothing else is said.
        weights: Share of the users by version, 1 in all; {} where the main version has all.
        overrides: Version by user id, whatever the shares are.
        salt: Words that draw other users into the same shares.
        shadow: Version that answers after the real one, for the comparison alone; "" for none.
        share: Share of the requests that the shadow answers.
    """

    main: str
    weights: dict[str, float] = msgspec.field(default_factory=dict)
    overrides: dict[str, str] = msgspec.field(default_factory=dict)
    salt: str = ""
    shadow: str = ""
    share: float = 0.0

    def choose(self, user: Any, session: Any) -> str:
        """Returns the version that answers a user.

        Args:
            user: Id of the user; None where nobody is named.
            session: Id of the session; None without one.
        """
        if user is not None:
            name = str(user)
            if name in self.overrides:
                return self.overrides[name]
        if not self.weights:
            return self.main
        key = session if user is None else user
        # Not for secrets: who sends neither is anybody.
        point = random.random() if key is None else point_of(str(key), self.salt)
        version = self.main
        for version, weight in self.weights.items():
            # The shares side by side: what is left of the number when a share is taken off falls
            # into it below 0.
            point -= weight
            if point < 0:
                return version
        # The shares may sum to a little less than 1.
        return version

    @property
    def versions(self) -> set[str]:
        """The versions that are used."""
        used = {self.main, *self.weights, *self.overrides.values()}
        if self.shadow:
            used.add(self.shadow)
        return used


class State(msgspec.Struct, frozen=True):
    """The versions of a server, and which of them answers whom.

    Attributes:
        number: Number of changes to it; the greater one is the newer.
        locations: Location of each version, in the order in which they came.
        routing: Which version answers whom.
        previous: Routing before the last change of it, to go back to.
    """

    number: int
    locations: dict[str, Location]
    routing: Routing
    previous: Routing | None = None

    def find(self, name: str, field: str = "version") -> str:
        """Returns the version that a name means: its own, or the newest one of a bundle.

        Args:
            name: Version, or name of a bundle.
            field: Field of the request, for the refusal.

        Raises:
            RequestError: There is none.
        """
        if name in self.locations:
            return name
        # The newest one of the name, which came last.
        for version, location in reversed(self.locations.items()):
            if location.name == name:
                return version
        known = [*self.locations, *(location.name for location in self.locations.values())]
        raise RequestError(
            404,
            f"{field}={echo(name)} is no version that is loaded{did_you_mean(name, known)}",
            field=field,
            value=echo(name),
            cure=f"Write one of {', '.join(dict.fromkeys(known))}.",
        )


def point_of(key: str, salt: str = "") -> float:
    """Returns the number from 0 to 1 that an id is drawn by."""
    # Half a character, which a request can hold, has no form in UTF-8.
    digest = hashlib.sha256(f"{salt}{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def add(state: State, version: str, location: Location) -> State:
    """Returns a state with one more version, which nobody is answered by yet.

    Raises:
        RequestError: There are too many.
    """
    if version in state.locations:
        return state
    if len(state.locations) >= MAX_VERSIONS:
        raise RequestError(
            409,
            f"{len(state.locations)} versions are loaded, which is the most.",
            cure="Unload one of them first.",
        )
    return _next(state, locations={**state.locations, version: location})


def remove(state: State, name: str) -> State:
    """Returns a state without a version.

    Raises:
        RequestError: It is used, or could be gone back to.
    """
    version = state.find(name)
    used = set(state.routing.versions)
    if state.previous is not None:
        used |= state.previous.versions
    if version in used:
        raise RequestError(
            409,
            f"version={echo(name)} is in use, or is the one to go back to.",
            field="version",
            value=echo(name),
            cure="Swap to another one, or end the split or the shadow, first.",
        )
    locations = {key: location for key, location in state.locations.items() if key != version}
    return _next(state, locations=locations)


def swap(state: State, name: str) -> State:
    """Returns a state in which one version answers everybody."""
    version = state.find(name)
    now = state.routing
    # A shadow of itself tells nothing.
    if now.shadow == version:
        return _route(state, Routing(version))
    return _route(state, Routing(version, shadow=now.shadow, share=now.share))


def roll_back(state: State) -> State:
    """Returns a state with the routing before the last change of it; the one now takes its place.

    Raises:
        RequestError: There was no other one.
    """
    if state.previous is None:
        raise RequestError(
            409, "There is nothing to go back to.", cure="Swap to the version that is to answer."
        )
    # As one more change, so that going back twice is going forward again.
    return _route(state, state.previous)


def split(
    state: State, weights: Mapping[str, float], overrides: Mapping[str, str], salt: str
) -> State:
    """Returns a state in which several versions share the users.

    Args:
        state: State now.
        weights: Weight of each version, of any sum; {} for all to the main version.
        overrides: Version by user id.
        salt: See `Routing`.

    Raises:
        RequestError: A version is unknown or stands there twice, or no weight is above 0.
    """
    shares: dict[str, float] = {}
    total = sum(weights.values())
    for name, weight in weights.items():
        field = f"weights.{name}"
        version = state.find(name, field)
        if version in shares or total <= 0:
            problem = "names a version twice" if version in shares else "leaves no weight above 0"
            raise RequestError(
                400,
                f"{field}={weight:g} {problem}.",
                field=field,
                value=echo(weight),
                cure="Give each version one weight, and one of them more than 0.",
            )
        shares[version] = weight / total
    found = {user: state.find(name, f"overrides.{user}") for user, name in overrides.items()}
    return _route(state, replace(state.routing, weights=shares, overrides=found, salt=salt))


def shadow(state: State, name: str | None, share: float) -> State:
    """Returns a state in which a version answers after the real one; None ends that."""
    if name is None:
        return _route(state, replace(state.routing, shadow="", share=0.0))
    return _route(state, replace(state.routing, shadow=state.find(name), share=share))


def supersede(state: State, old: str, new: str, location: Location) -> State:
    """Returns a state in which a newer version of a bundle stands wherever the older one stood.

    Versions that are neither used then nor the ones to go back to are dropped.
    """
    now = state.routing

    def newer(version: str) -> str:
        return new if version == old else version

    shares: dict[str, float] = {}
    for version, weight in now.weights.items():
        # Both may have a share: an export that was loaded by hand stands beside the one before it.
        shares[newer(version)] = shares.get(newer(version), 0.0) + weight
    routing = replace(
        now,
        main=newer(now.main),
        weights=shares,
        overrides={user: newer(version) for user, version in now.overrides.items()},
        shadow=newer(now.shadow),
    )
    # The version before stays the one to go back to.
    after = _route(state, routing) if routing != now else state
    kept = set(after.routing.versions)
    if after.previous is not None:
        kept |= after.previous.versions
    locations = {}
    for version, other in after.locations.items():
        # Else each export would leave one more version in memory.
        is_older = other.folder == location.folder and version not in kept
        if not is_older:
            locations[version] = other
    return _next(after, locations={**locations, new: location})


def _route(state: State, routing: Routing) -> State:
    # The same routing again must not make the one to go back to forgotten.
    if routing == state.routing:
        return state
    return _next(state, routing=routing, previous=state.routing)


def _next(state: State, **changes: Any) -> State:
    # A change may come to a process by a message and by the file: the number says which is newer.
    return replace(state, number=state.number + 1, **changes)
