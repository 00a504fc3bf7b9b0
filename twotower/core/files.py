"""Folders that are written whole or not at all, and checked when read: any, and those of one JSON
file and arrays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from twotower.core.errors import FolderError

_VERSION = 1


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[Path]:
    """Yields a temporary file's path; the file takes the place of `path` when the block ends well.

    Whoever reads `path` finds the old content or the new, never a part. After an error nothing is
    left behind; a killed process leaves at most `.NAME.*.tmp`. Folders above are made.

    Args:
        path: A file of this machine (or mounted into it), which need not exist.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines, whose numbers may be equal, can write one file at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(folder: epath.PathLike) -> Iterator[epath.Path]:
    """A new empty folder that takes the place of `folder` when the block ends well, and is deleted
    when it does not.

    Wherever a process is killed, the old folder or the new one is left, at worst under the name
    that it has between two renames: the next call puts it back.
    """
    folder = epath.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    temporary = folder.parent / f"{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        _replace(temporary, folder)
    finally:
        temporary.rmtree(missing_ok=True)


def put_back(folder: epath.PathLike, *, patience: float = 2.0) -> None:
    """Where `folder` is missing because a process was killed while it replaced it, puts the old one
    back.

    Args:
        patience: seconds to wait for a process that is replacing it just now.
    """
    folder = epath.Path(folder)
    end = time.monotonic() + patience
    while not folder.exists() and folder.parent.exists():
        left = [
            path
            for path in folder.parent.iterdir()
            if re.fullmatch(rf"{re.escape(folder.name)}\.\d+\.old\.tmp", path.name)
        ]
        if not left:
            return
        if not _runs(int(left[0].name.split(".")[-3])) or time.monotonic() > end:
            left[0].rename(folder)
        else:
            time.sleep(0.01)


def _runs(process: int) -> bool:
    """Whether another process of this machine has that number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def digest(path: epath.PathLike) -> str:
    """SHA-256 of a file."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, whatever the order of its keys; that which it says itself, under "sha256",
    aside."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_folder(
    folder: epath.PathLike, kind: str, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes `kind`.json and one .npy an array into a temporary folder, then puts it in the place
    of `folder`."""
    with replacing(folder) as temporary:
        _write(temporary, kind, state, arrays)


def read_folder(folder: epath.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The state and the arrays that `write_folder` put there.

    Raises:
        FolderError: the folder holds something else, lacks a file, or a file is not what was
            written.
    """
    folder = epath.Path(folder)
    content = _read_json(folder, kind)
    arrays = {}
    for name, written in content["files"].items():
        path = folder / name
        if not path.exists():
            raise FolderError(f"{folder} is not a whole {kind}: it lacks {name}.")
        if digest(path) != written:
            raise FolderError(
                f"{path} is corrupt: its content is not what was written with {kind}.json."
            )
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
        raise FolderError(
            f"{path} was not written by twotower: it lacks version, state, files or sha256."
        )
    if content["version"] != _VERSION:
        raise FolderError(
            f"{path} has version {content['version']!r}; this twotower reads version {_VERSION}."
        )
    if content["sha256"] != content_digest(content):
        raise FolderError(f"{path} is corrupt: its sha256 does not match its content.")
    return content


def _write(
    folder: epath.Path, kind: str, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
    files = {f"{name}.npy": digest(folder / f"{name}.npy") for name in arrays}
    content = {"version": _VERSION, "state": state, "files": files}
    content["sha256"] = content_digest(content)
    (folder / f"{kind}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))


def _recover(folder: epath.Path) -> None:
    """Puts back what a killed process had moved aside, and deletes what else it left."""
    left = [
        path
        for path in folder.parent.iterdir()
        if re.fullmatch(rf"{re.escape(folder.name)}\.\d+(\.old)?\.tmp", path.name)
    ]
    for path in left:
        if path.name.endswith(".old.tmp") and not folder.exists():
            path.rename(folder)
        else:
            path.rmtree()


def _replace(temporary: epath.Path, folder: epath.Path) -> None:
    old = folder.parent / f"{folder.name}.{os.getpid()}.old.tmp"
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    with contextlib.suppress(
        OSError
    ):  # the new one is in its place; the next call deletes what is left
        old.rmtree(missing_ok=True)
