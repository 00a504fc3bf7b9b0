"""Flags that name folders in buckets, or bundles in MLflow: commands work in copies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags

from twotower.core.remote.copies import fetch_bundle, keep_bundle
from twotower.core.remote.mirror import pull, push
from twotower.core.remote.objects import is_remote
from twotower.integrations.mlflow_store import is_address

# Flags of folders that a command works in.
FOLDERS = ("workdir", "append", "source", "history", "data")
# Those of bundles, which are only read.
BUNDLES = ("bundle",)


@contextlib.contextmanager
def local_copies(own: flags.FlagValues) -> Iterator[None]:
    """Puts local copies in the place of the addresses that flags name, while a command runs.

    Args:
        own: Flags of the command, parsed.
    """
    copies = []

    def to_copy(address: str) -> str:
        copies.append(pull(address, "--workdir"))
        return str(copies[-1])

    def to_bundle(address: str) -> str:
        if is_address(address):
            return str(fetch_tracked(address, own))
        # A server keeps things beside its bundle, and follows what is new in the bucket.
        take = keep_bundle if "follow" in own else fetch_bundle
        return str(take(address))

    for names, replace in ((FOLDERS, to_copy), (BUNDLES, to_bundle)):
        for name in names:
            if name in own:
                own[name].value = _replaced(own[name].value, replace)
    yield
    for copy in copies:
        push(copy)


def _replaced(value: object, replace: Callable[[str], str]) -> object:
    """Returns the value of a flag with a path for each address; NAME=ADDRESS keeps its name."""
    if isinstance(value, list):
        return [_replaced(each, replace) for each in value]
    if not isinstance(value, str):
        return value
    if is_remote(value):
        return replace(value)
    name, equals, address = value.partition("=")
    if not is_remote(address):
        return value
    return f"{name}{equals}{replace(address)}"


def fetch_tracked(address: str, own: flags.FlagValues) -> Path:
    """Returns the folder of a bundle in MLflow: models:/NAME/VERSION, models:/NAME@ALIAS."""
    # Not for a bundle in a bucket: it takes time to load.
    from twotower.integrations.mlflow_runs import fetch_bundle as fetch_of_mlflow

    uri = own["tracking_uri"].value if "tracking_uri" in own else None
    return fetch_of_mlflow(address, uri=uri or "")
