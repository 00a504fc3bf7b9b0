"""Folders of runs in buckets: worked on in a copy on this machine, and sent back.

Work needs files: arrays that are mapped into memory, locks, renames. A folder in a bucket has
therefore a copy in the user's cache. `pull` brings the copy up to date, `push` sends what has
changed, and `mirrored` does so while a training saves.

A push sends files in the order of their changes, so that the bucket passes through states that the
folder was in, and last a manifest with the size and hash of each. A pull takes the checkpoints of
the manifest alone, and compares the hashes: half a push is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from twotower.core.errors import BusyError, FolderError
from twotower.core.files import LOCK, atomic, content_digest, exclusive, read_json
from twotower.core.remote.objects import Bucket, Object, cache_folder, copy_name

MANIFEST = "twotower-files.json"
PERIOD = 5.0  # seconds between two looks at the checkpoints of a training
_STEP = re.compile(r"checkpoints/(\d+)/")
# What lies in a checkpoint folder until a save is whole, and in other folders for a moment.
_UNFINISHED = re.compile(r"checkpoints/(?!\d+/)|\.tmp$|orbax-checkpoint-tmp")

Files = dict[str, dict[str, Any]]


def pull(address: str | os.PathLike[str], flag: str) -> Path:
    """Brings the copy of a folder up to date, and returns it.

    The bucket counts: where it was changed elsewhere since the copy was last sent, it replaces the
    copy. Otherwise the copy stays as it is, with what a killed process could not send. A folder
    that is not there yet begins as an empty copy.

    Args:
        address: Address of the folder.
        flag: Name of the flag that holds it.

    Raises:
        FolderError: An object is not what was sent.
    """
    bucket = Bucket(address, flag)
    copy = cache_folder() / "folders" / copy_name(bucket.address)
    with _turn(copy):
        # Somebody on this machine who works in the copy has the latest.
        with contextlib.suppress(BusyError), exclusive(copy, "pull"):
            _bring(bucket, copy)
    return copy


def _turn(copy: Path) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which no other process of this machine pulls or pushes a copy."""
    # Two pushes at once would leave the manifest of one and the record of the other, and then every
    # further push would take the bucket for changed by somebody else.
    return exclusive(copy.with_name(f"{copy.name}.turn"), "copy", wait=True)


def _bring(bucket: Bucket, copy: Path) -> None:
    """Replaces a copy by what is in the bucket, unless it has that already."""
    record = _read_record(copy)
    manifest = _read_manifest(bucket)
    objects = [found for found in bucket.list() if found.name != MANIFEST]
    state = _state_of(manifest, objects)
    if record.get("state") == state:
        _write_record(copy, record | {"address": bucket.address})
        return
    logging.info("Copying what is new in %s to %s.", bucket.address, copy)
    wanted = [found for found in objects if _is_whole(found.name, manifest)]
    if len(wanted) < len(objects):
        logging.warning("%s: checkpoints that were not sent in full are left out.", bucket.address)
    lost = set(manifest["files"]) - {found.name for found in objects}
    if lost:
        raise FolderError(
            f"{bucket.address}/{min(lost)} is missing, though it was sent. Restore it, or begin in "
            "another folder."
        )
    # From here to the end the copy is of no state: a pull that is killed is done again.
    _write_record(copy, record | {"address": bucket.address, "state": None})
    known: Files = {}
    for found in wanted:
        known[found.name] = _bring_one(bucket, found, copy, record["files"], manifest)
    for name in _scan(copy):
        if name not in known:
            _delete(copy / name)
    _write_record(copy, {"address": bucket.address, "state": state, "files": known})


def _delete(path: Path) -> None:
    """Deletes a file, and the folders that it leaves empty: they could pass for a checkpoint."""
    path.unlink()
    for folder in path.parents:
        try:
            folder.rmdir()
        except OSError:
            return


def _bring_one(
    bucket: Bucket, found: Object, copy: Path, had: Files, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Copies an object, unless the copy has it, and returns its entry in the record."""
    path = copy / found.name
    expected = manifest["files"].get(found.name)
    entry = had.get(found.name)
    if entry and expected and entry["sha256"] == expected["sha256"] and _is_unchanged(path, entry):
        return entry
    sha256 = bucket.download(found.name, path)
    # A later push, which was killed before its manifest, may have replaced what is no checkpoint.
    may_differ = not _STEP.match(found.name) and found.modified >= manifest["modified"]
    if expected and sha256 != expected["sha256"] and not may_differ:
        raise FolderError(
            f"{bucket.address}/{found.name} is damaged: it is not what was sent. Restore it, or "
            "begin in another folder."
        )
    return _entry(path, sha256)


def is_copy(folder: Path) -> bool:
    """Returns whether a folder is the copy of one in a bucket."""
    is_here = folder.absolute().parent == (cache_folder() / "folders").absolute()
    return is_here and _record_path(folder).exists()


def push(folder: Path) -> None:
    """Sends what has changed in the copy of a folder; does nothing where there is no copy.

    Args:
        folder: Copy that `pull` returned, or a folder in it.

    Raises:
        BusyError: The folder in the bucket has been changed elsewhere meanwhile.
    """
    for copy in (folder, *folder.parents):
        if is_copy(copy):
            with _turn(copy):
                _push(copy)


def _push(copy: Path) -> None:
    record = _read_record(copy)
    bucket = Bucket(record["address"], "--workdir")
    files = _scan(copy)
    had = record["files"]
    changed = [name for name in files if not _is_unchanged(copy / name, had.get(name))]
    gone = [name for name in had if name not in files]
    if not changed and not gone:
        return
    objects = [found for found in bucket.list() if found.name != MANIFEST]
    if _state_of(_read_manifest(bucket), objects) != record["state"]:
        raise BusyError(
            f"{bucket.address} has been changed by somebody else since it was read: one process at "
            f"a time may work in it. What was done here is in {copy}."
        )
    entries = {name: had[name] for name in files if name in had}
    for name in changed:
        # A checkpoint may be deleted while it is sent.
        with contextlib.suppress(FileNotFoundError):
            stat = (copy / name).stat()
            size, sha256 = bucket.upload(copy / name, name)
            entries[name] = {"size": size, "sha256": sha256, "modified": stat.st_mtime_ns}
    entries = _without_deleted(entries, copy)
    content: dict[str, Any] = {"format": 1, "files": {}}
    for name, entry in sorted(entries.items()):
        content["files"][name] = {"size": entry["size"], "sha256": entry["sha256"]}
    content["sha256"] = content_digest(content)
    bucket.write(MANIFEST, json.dumps(content, indent=1).encode())
    _write_record(copy, {"address": bucket.address, "state": content["sha256"], "files": entries})
    # Only now: until then the manifest before may name them.
    for found in objects:
        if found.name not in entries:
            # No pull reads it any more; the next push tries again.
            with contextlib.suppress(OSError):
                bucket.delete(found.name)


@contextlib.contextmanager
def mirrored(copy: Path) -> Iterator[None]:
    """Sends the copy of a folder after each checkpoint of the block, and at its end.

    Args:
        copy: Copy that `pull` returned; any other folder is left alone.

    Raises:
        OSError: What was done could not be sent at the end; it is in the copy.
    """
    if not is_copy(copy):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(copy, over), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _stop(thread, over)
        # The error itself is what the caller is to see.
        _try_to_push(copy)
        raise
    _stop(thread, over)
    push(copy)


def _stop(thread: threading.Thread, over: threading.Event) -> None:
    over.set()
    thread.join()


def _follow(copy: Path, over: threading.Event) -> None:
    """Sends a copy whenever it has other checkpoints than before."""
    # What a process that was killed could not send goes first.
    sent: set[str] = set()
    while not over.wait(PERIOD):
        steps = _steps(copy)
        if steps == sent:
            continue
        if _try_to_push(copy):
            sent = steps


def _try_to_push(copy: Path) -> bool:
    """Returns whether a push came to its end; a bucket that is away is asked again later."""
    try:
        push(copy)
    except (BusyError, FolderError, OSError) as error:
        logging.warning("What is in %s was not sent: %s", copy, error)
        return False
    return True


def _steps(copy: Path) -> set[str]:
    return {path.name for path in (copy / "checkpoints").glob("*") if path.name.isdigit()}


def _scan(copy: Path) -> list[str]:
    """Returns the names of the files to send, those changed longest ago first."""
    found = []
    for path in copy.rglob("*"):
        name = str(path.relative_to(copy))
        if path.name == LOCK or _UNFINISHED.search(name):
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found.append((path.stat().st_mtime_ns, name))
    return [name for _, name in sorted(found)]


def _without_deleted(entries: Files, copy: Path) -> Files:
    """Returns the entries without those of checkpoints that are being deleted."""
    steps = _steps(copy)
    kept = {}
    for name, entry in entries.items():
        found = _STEP.match(name)
        if found is None or found[1] in steps:
            kept[name] = entry
    return kept


def _entry(path: Path, sha256: str) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "sha256": sha256, "modified": stat.st_mtime_ns}


def _is_unchanged(path: Path, entry: dict[str, Any] | None) -> bool:
    """Returns whether a file is as its entry says."""
    if entry is None or not path.is_file():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["modified"])


def _read_manifest(bucket: Bucket) -> dict[str, Any]:
    """Returns the manifest of a folder, with its time; an empty one of a folder without."""
    content = bucket.read(MANIFEST)
    if content is None:
        return {"files": {}, "sha256": "", "modified": 0}
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(content)
        is_sound = manifest["sha256"] == content_digest(manifest)
    # Half of it is no JSON, and other JSON has no hash.
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise FolderError(
            f"{bucket.address}/{MANIFEST} is corrupt: its sha256 does not match. Restore it, or "
            "begin in another folder."
        )
    modified = [found.modified for found in bucket.list() if found.name == MANIFEST]
    return manifest | {"modified": max(modified, default=0)}


def _state_of(manifest: dict[str, Any], objects: list[Object]) -> str:
    """Returns the name of what is in a bucket; "" where there is nothing."""
    if manifest["sha256"] or not objects:
        return manifest["sha256"]
    # Copied there by another tool: known by all objects.
    return content_digest({"objects": objects})


def _is_whole(name: str, manifest: dict[str, Any]) -> bool:
    """Returns whether an object is no part of a checkpoint that was not sent in full."""
    found = _STEP.match(name)
    if found is None or not manifest["sha256"]:
        return True
    return name in manifest["files"]


def _read_record(copy: Path) -> dict[str, Any]:
    path = _record_path(copy)
    if not path.exists():
        return {"files": {}, "state": ""}
    return read_json(path)


def _record_path(copy: Path) -> Path:
    # Beside the copy: in it there is what is in the bucket, and nothing else.
    return copy.with_name(f"{copy.name}.json")


def _write_record(copy: Path, record: dict[str, Any]) -> None:
    with atomic(_record_path(copy)) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
