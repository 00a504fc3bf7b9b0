"""Files and folders that change all at once, and are checked when they are read.

Three forms: a single file (`atomic`); a folder of arrays and one JSON file that names them
(`write_folder`); a folder of versions that never change and a pointer to the current one
(`new_version`, `publish_version`, `current_version`). A folder that one process at a time may write
to has a lock (`exclusive`).
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from twotower.core.errors import BusyError, FolderError

# Version of the format of `KIND.json`; a reader of another version refuses it.
_FORMAT_VERSION = 1
# The end of the name of an array's file; see `_free_path`.
_ARRAY_FILE = re.compile(r"(\.[0-9a-f]{8})?\.npy$")
# Size of the files that are mapped: smaller ones cost less when they are read.
_MAPPED_BYTES = 2**20
# The file in a folder of versions that names the current one.
POINTER = "current"
_VERSION_NAME = re.compile(r"v-(\d{1,18})")
# The file in a folder that whoever writes to the folder holds locked; see `exclusive`.
LOCK = ".lock"
# Descriptors of the locks that this process holds.
_held: set[int] = set()
# Words of a full disk in errors that carry no number: those of Arrow, TensorStore, NumPy, SQLite.
_DISK_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|requested and \d+ written|disk is full"
)


@contextlib.contextmanager
def exclusive(folder: epath.PathLike, what: str, *, wait: bool = False) -> Iterator[None]:
    """Keeps all others from a folder while the block runs.

    The lock is the kernel's, on the file `.lock`, and ends with the process that holds it, however
    that ends. The file stays: what counts is whether it is locked, not whether it is there.

    Args:
        folder: Folder to write to; it is made if there is none, and goes again if the block leaves
            nothing in it.
        what: Name of the work, for the refusal of others, such as "train".
        wait: Whether to wait for another process that works in the folder.

    Raises:
        BusyError: Another process works in the folder; the message says which.
    """
    folder = Path(folder)
    descriptor = _lock(folder, wait)
    try:
        _write_holder(descriptor, what)
        yield
    finally:
        with contextlib.suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        _close_lock(descriptor)


def _lock(folder: Path, wait: bool) -> int:
    """Returns the descriptor of the lock of a folder, locked."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever just ended took the empty folder away
            continue
        _held.add(descriptor)
        try:
            _flock(descriptor, path, wait)
            # Of a file that was taken away meanwhile a lock keeps nobody out.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = _read_holder(descriptor)
            _close_lock(descriptor)
            raise BusyError(
                f"{folder} is in use{holder}: one process at a time may write to it. Wait until "
                "that has ended, or end it."
            ) from None
        _close_lock(descriptor)


def _flock(descriptor: int, path: Path, wait: bool) -> None:
    """Locks a file; only warns where its file system has no locks.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    operation = fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logging.warning(
            "%s cannot be locked here (%s): see to it that one process at a time writes to the "
            "folder.",
            path,
            error.strerror,
        )


def _close_lock(descriptor: int) -> None:
    # A child that was forked while the lock was held has closed its copy already.
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


def _write_holder(descriptor: int, what: str) -> None:
    """Says in the file of a lock who holds it."""
    now = datetime.datetime.now().astimezone()
    since = now.isoformat(sep=" ", timespec="seconds")
    holder = {"what": what, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    # For the message of a refusal alone: a full disk is no reason to stop here.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> str:
    """Returns the end of "... is in use": who holds a lock, as far as its file says so."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return " by `{what}` (process {pid} on {host}, since {since})".format(**holder)
    except (OSError, ValueError, KeyError, TypeError):
        return " by another process"


def _close_locks_of_parent() -> None:
    # A lock belongs to all copies of its descriptor: that of a forked child would outlive its
    # parent. To close the copy leaves the parent's as it is.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_locks_of_parent)


@contextlib.contextmanager
def explain_full_disk(folder: epath.PathLike, cure: str) -> Iterator[None]:
    """Turns the error of a full disk, whichever library met it, into one that says what to do.

    Args:
        folder: Folder that is written to.
        cure: Sentence on what to do once there is room.

    Raises:
        OSError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, f"the disk is full. Make room. {cure}", str(folder)) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _DISK_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


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


@contextlib.contextmanager
def next_version(folder: epath.PathLike) -> Iterator[Path]:
    """Yields an empty folder for the next version, and deletes it unless the block publishes it."""
    version = new_version(folder)
    try:
        yield version
    # Ctrl-C too: half of a version must not stay.
    except BaseException:
        if not is_current(version):
            discard(version)
        raise


def is_current(version: Path) -> bool:
    """Returns whether the pointer of a folder names this version of it."""
    with contextlib.suppress(FolderError):
        return current_version(version.parent) == version
    return False


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


def read_folder(
    folder: epath.PathLike, kind: str, mapped: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the state and the arrays that `write_folder` put there.

    Args:
        folder: Folder of the files.
        kind: Name of the JSON file, without ".json".
        mapped: Beginning of the names of arrays that are mapped into memory where they are large,
            for reading alone; None to read all of them.

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
        array = _ARRAY_FILE.sub("", name)
        path = Path(folder / name)
        # Files of this machine alone can be mapped.
        if mapped is not None and name.startswith(mapped) and _is_large(path):
            # Without the class `memmap`, which costs time at each indexing.
            arrays[array] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            continue
        with (folder / name).open("rb") as file:
            arrays[array] = np.load(file, allow_pickle=False)
    return content["state"], arrays


def _is_large(path: Path) -> bool:
    """Returns whether an array is worth a mapping of its own."""
    return path.is_file() and path.stat().st_size >= _MAPPED_BYTES


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
    except RecursionError:
        raise FolderError(f"{path} is corrupt: its values are nested too deeply.") from None
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
