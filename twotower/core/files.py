"""Files and folders that change all at once, and are checked when they are read.

Three forms: a single file (`atomic`); a folder of arrays and one JSON file that names them
(`write_folder`); a folder of versions that never change and a pointer to the current one
(`new_version`, `publish_version`, `current_version`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from twotower.core.errors import FolderError

# Version of the format of `KIND.json`; a reader of another version refuses it.
_FORMAT_VERSION = 1
# The end of the name of an array's file; see `_free_path`.
_ARRAY_FILE = re.compile(r"(\.[0-9a-f]{8})?\.npy$")
# The file in a folder of versions that names the current one.
POINTER = "current"
_VERSION_NAME = re.compile(r"v-(\d{1,18})")


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
        # On the disk before the rename: after a power cut the new name must not show an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # Atomic within one file system, which is why the temporary file lies beside `path`.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def current_version(folder: epath.PathLike) -> Path:
    """Returns the folder that holds the content of `folder`: the version that its pointer names, or
    `folder` itself if it has no pointer.

    A reader of several files calls this once, so that all of them are of one version.

    Raises:
        FolderError: The pointer names no version that is there.
    """
    folder = Path(folder)
    pointer = folder / POINTER
    if not pointer.is_file():
        return folder
    # A corrupt pointer may hold any bytes: they are shown in the message rather than fail here.
    text = pointer.read_bytes().decode("utf-8", "replace")
    name = text.strip()
    # The form is checked too: a name such as "../x" would lead out of the folder.
    if not _VERSION_NAME.fullmatch(name) or not (folder / name).is_dir():
        raise FolderError(f"{pointer} is corrupt: it names {name!r}, which is not in {folder}.")
    return folder / name


def new_version(folder: epath.PathLike) -> Path:
    """Makes and returns an empty folder for the next version of the content of `folder`.

    Nobody reads it before `publish_version`; nothing in it may change afterwards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Above every number there is, also that of a version which a killed process left unfinished.
    number = 1 + max(map(_version_number, folder.iterdir()), default=0)
    while True:
        version = folder / f"v-{number}"
        try:
            version.mkdir()
        except FileExistsError:  # of another process that also makes one
            number += 1
        else:
            return version


def publish_version(version: Path) -> None:
    """Makes a finished version the current one, and deletes those that nobody needs any more.

    A process that is killed here leaves the old version current, or the new one. The version before
    is kept for those who are loading it now; files of it that are mapped into memory live on.
    """
    folder = version.parent
    try:
        # Read before the pointer moves: its readers may still be opening files.
        previous = current_version(folder)
    except FolderError:  # a corrupt pointer is replaced
        previous = None
    # First the files, then the pointer: it must never name a version that a power cut took.
    sync_files(version)
    with atomic(folder / POINTER) as temporary:
        temporary.write_text(f"{version.name}\n", encoding="utf-8")
    # The rename of the pointer itself; the old versions are deleted only after it.
    sync_folder(folder)
    for path in folder.iterdir():
        number = _version_number(path)
        older = path.is_dir() and 0 < number < _version_number(version)
        # Content that lay in the folder itself before it had versions is replaced too.
        unversioned = not number and not path.name.startswith((".", "v-", POINTER))
        if (older or unversioned) and path != previous:
            discard(path)


def discard(path: Path) -> None:
    """Deletes a file or a whole folder, and ignores errors."""
    if path.is_dir():
        # Deleting is housekeeping: the next version tries again to delete the rest.
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_files(folder: Path) -> None:
    """Waits until all files below `folder` are on the disk."""
    # Folders too: a new file's name is part of its folder.
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        else:
            _sync(path)


def sync_folder(folder: Path) -> None:
    """Waits until names in `folder` are on the disk, where folders can be synced."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version_number(path: Path) -> int:
    """Returns the number of a version's folder; 0 for everything else."""
    match = _VERSION_NAME.fullmatch(path.name)
    if not match:
        return 0
    return int(match[1])


def digest(path: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, as hexadecimal text."""
    sha256 = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        # In blocks of a mebibyte: arrays may be larger than the memory.
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


def content_digest(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of JSON, whatever the order of its keys.

    The key "sha256", under which content says its own, is left out.
    """
    # Sorted keys: JSON objects that are equal have one digest.
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_folder(
    folder: epath.PathLike, kind: str, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes one .npy file for each array, and `kind`.json, which names them.

    Readers see only the files that `kind`.json names, so a folder that holds another state already
    changes all at once, when `kind`.json does. New arrays get file names that are not in use, and
    the files of the old state are deleted at the end.

    Args:
        folder: Folder to write to; it is made if there is none.
        kind: Name of the JSON file, without ".json".
        state: JSON content.
        arrays: Name -> array.
    """
    folder = epath.Path(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    try:
        for name, array in arrays.items():
            path = _free_path(folder, name)
            # Noted before the file exists, so that an error while it is written removes it too.
            written[path.name] = ""
            with path.open("wb") as file:
                # Without pickle: an array of objects is refused here, not by the reader later.
                np.save(file, array, allow_pickle=False)
            # From the file rather than from the array, since readers check the file.
            written[path.name] = digest(path)
        content = {"version": _FORMAT_VERSION, "state": state, "files": written}
        content["sha256"] = content_digest(content)
        with atomic(folder / f"{kind}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False))
    # KeyboardInterrupt included: half of a state must not stay.
    except BaseException:
        for name in written:
            (folder / name).unlink(missing_ok=True)
        if not existed:
            folder.rmtree(missing_ok=True)
        raise
    # Only now: until `kind`.json named the new files, readers needed the old ones.
    for path in folder.glob("*.npy"):
        if path.name not in written:
            path.unlink(missing_ok=True)


def _free_path(folder: epath.Path, name: str) -> epath.Path:
    """Returns a path for an array that no file has yet."""
    path = folder / f"{name}.npy"
    if path.exists():
        return folder / f"{name}.{secrets.token_hex(4)}.npy"
    return path


def read_folder(folder: epath.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the state and the arrays that `write_folder` put there.

    Raises:
        FolderError: The folder is of another kind or lacks a file, or a file has changed since it
            was written.
    """
    folder = epath.Path(folder)
    content = _read_state(folder, kind)
    # All files are checked before the first is loaded, so nothing is half read.
    check_files(folder, content["files"])
    arrays = {}
    for name in content["files"]:
        with (folder / name).open("rb") as file:
            arrays[_ARRAY_FILE.sub("", name)] = np.load(file, allow_pickle=False)
    return content["state"], arrays


def check_files(folder: epath.PathLike, digests: Mapping[str, str]) -> None:
    """Refuses a file that is missing, or has changed since it was written.

    Args:
        folder: Folder of the files.
        digests: SHA-256 of each file, by its path inside the folder.

    Raises:
        FolderError: The message names the first such file.
    """
    # In the order in which they were written, so that a message is the same each time.
    for name, written in digests.items():
        path = epath.Path(folder) / name
        if not path.is_file():
            raise FolderError(f"{path} is missing.")
        if digest(path) != written:
            raise FolderError(f"{path} is corrupt: its content is not what was written.")


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FolderError: The file holds none.
    """
    try:
        content = json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise FolderError(f"{path} is corrupt: it is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise FolderError(f"{path} is corrupt: it holds no JSON object.")
    return content


def _read_state(folder: epath.Path, kind: str) -> dict[str, Any]:
    path = folder / f"{kind}.json"
    if not path.exists():
        raise FolderError(f"{folder} holds no {kind}: there is no {kind}.json in it.")
    content = read_json(path)
    # Before the digest is compared: a JSON file of another program has none.
    if not {"version", "state", "files", "sha256"} <= set(content):
        raise FolderError(
            f"{path} was not written by twotower: it lacks version, state, files or sha256."
        )
    if content["version"] != _FORMAT_VERSION:
        raise FolderError(
            f"{path} has version {content['version']!r}; this twotower reads version "
            f"{_FORMAT_VERSION}."
        )
    if content["sha256"] != content_digest(content):
        raise FolderError(f"{path} is corrupt: its sha256 does not match its content.")
    return content
