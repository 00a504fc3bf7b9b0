"""The requests and answers of administration."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from twotower.serving.types import Request, Text

MAX_OVERRIDES = 10_000
Weight = Annotated[float, Meta(ge=0, le=1e6)]


class LoadBundle(Request):
    """A request to load one more bundle, which answers nobody before a swap or a split.

    Attributes:
        bundle: Name of a folder in that of --bundles.
    """

    bundle: Text


class NamedVersion(Request):
    """A request about one version.

    Attributes:
        version: Version, or name of a bundle.
    """

    version: Text


class Split(Request):
    """A request to share the users among versions.

    Attributes:
        weights: Weight of each version, of any sum, 0 for none; {} ends the split.
        overrides: Version of single users by their id, whatever the weights are.
        salt: Words that draw other users into the same shares; by default the same are drawn.
    """

    weights: Annotated[dict[Text, Weight], Meta(max_length=8)] = msgspec.field(default_factory=dict)
    overrides: Annotated[dict[Text, Text], Meta(max_length=MAX_OVERRIDES)] = msgspec.field(
        default_factory=dict
    )
    salt: Annotated[str, Meta(max_length=64)] = ""


class Shadow(Request):
    """A request to compare a version: it makes lists after the real one, which nobody gets.

    Attributes:
        version: Version, or name of a bundle; null ends the comparison.
        share: Share of the requests that it answers.
    """

    # Without a default: a body without a version must not end the comparison by mistake.
    version: Text | None
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0


class VersionInfo(Struct):
    """A version that is loaded.

    Attributes:
        model_version: Version.
        name: Name of its bundle.
        date: Date of its export.
        items: Number of items now.
        changes: Number of changes since the bundle was written.
        share: Share of the users that it answers.
        role: What it is for: "main", "split" (a share or single users), "shadow", "previous" (to go
            back to), or "" where it only waits.
    """

    model_version: str
    name: str
    date: str
    items: int
    changes: int
    share: float
    role: Literal["main", "split", "shadow", "previous", ""]


class VersionList(Struct):
    """The versions of a server.

    Attributes:
        main: Version that answers where nothing else is said.
        versions: All that are loaded.
        overrides: Number of users with a version of their own.
        shadow_share: Share of the requests that the shadow answers.
    """

    main: str
    versions: list[VersionInfo]
    overrides: int
    shadow_share: float
