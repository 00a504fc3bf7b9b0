"""A folder of one JSON file and arrays: written whole or not at all, checked when read, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

_VERSION = 1


class FolderError(ValueError):
    """A folder that holds something else, or is not what was written."""


def write_folder(folder: epath.PathLike, kind: str, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `kind`.json and one .npy an array into a temporary folder, then puts it in the place of `folder`."""
    folder = epath.Path(folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    if temporary.exists():
        temporary.rmtree()
    temporary.mkdir(parents=True)
    try:
        _write(temporary, kind, state, arrays)
        _replace(temporary, folder)
    except BaseException:
        if temporary.exists():
            temporary.rmtree()
        raise


def read_folder(folder: epath.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The state and the arrays that `write_folder` put there.

    Raises:
        FolderError: the folder holds something else, lacks a file, or a file is not what was written.
    """
    folder = epath.Path(folder)
    content = _read_json(folder, kind)
    arrays = {}
    for name, digest in content["files"].items():
        path = folder / name
        if not path.exists():
            raise FolderError(f"{folder} is not a whole {kind}: it lacks {name}.")
        if _digest(path) != digest:
            raise FolderError(f"{path} is corrupt: its content is not what was written with {kind}.json.")
        with path.open("rb") as file:
            arrays[name.removesuffix(".npy")] = np.load(file, allow_pickle=False)
    return content["state"], arrays


def _read_json(folder: epath.Path, kind: str) -> dict[str, Any]:
    path = folder / f"{kind}.json"
    if not path.exists():
        raise FolderError(f"{folder} holds no {kind}: there is no {kind}.json in it.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise FolderError(f"{path} is corrupt: it is not JSON ({error}).") from None
    if not isinstance(content, dict) or not {"version", "state", "files", "sha256"} <= set(content):
        raise FolderError(f"{path} was not written by twotower: it lacks version, state, files or sha256.")
    if content["version"] != _VERSION:
        raise FolderError(f"{path} has version {content['version']!r}; this twotower reads version {_VERSION}.")
    if content["sha256"] != _content_digest(content):
        raise FolderError(f"{path} is corrupt: its sha256 does not match its content.")
    return content


def _write(folder: epath.Path, kind: str, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
    files = {f"{name}.npy": _digest(folder / f"{name}.npy") for name in arrays}
    content = {"version": _VERSION, "state": state, "files": files}
    content["sha256"] = _content_digest(content)
    (folder / f"{kind}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))


def _replace(temporary: epath.Path, folder: epath.Path) -> None:
    old = folder.parent / f".{folder.name}.{os.getpid()}.old"
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    if old.exists():
        old.rmtree()


def _content_digest(content: Mapping[str, Any]) -> str:
    rest = {key: content[key] for key in ("version", "state", "files")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
