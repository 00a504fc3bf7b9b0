"""Copies of objects that are only read: tables of a log, and bundles."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from twotower.core.errors import BundleError, ConfigError
from twotower.core.files import (
    POINTER,
    atomic,
    discard,
    exclusive,
    next_version,
    publish_version,
    read_json,
)
from twotower.core.remote.objects import Bucket, Object, cache_folder, copy_name

_WILDCARD = re.compile(r"[*?\[]")
_VERSION = re.compile(r"(v-\d+)/")
# Copies of a bundle that are kept: processes may still begin to read the one before.
_KEPT = 2
_KEPT_FOLDER = "served"  # in the cache, of copies that servers follow


def fetch_tables(address: str, flag: str) -> str:
    """Copies the files of a table into the user's cache, and returns the path that stands for the
    address here: a file, a folder or a pattern.

    What was copied before and has not changed stays.

    Args:
        address: Address of a file, a folder, or a pattern of files.
        flag: Name of the option that holds it.

    Raises:
        ConfigError: There is no such object.
    """
    bucket, objects, pattern = _find(address, flag)
    folder = cache_folder() / "tables" / copy_name(bucket.address)
    # Processes that begin together want the same copy: the first makes it.
    with exclusive(folder, "copy", wait=True):
        _update(bucket, objects, folder, pattern)
    if bucket.is_object:
        return str(folder / objects[0].name)
    return str(folder / pattern) if pattern else str(folder)


def list_tables(address: str, flag: str) -> tuple[str, list[Object]]:
    """Returns the folder and the objects in it that `fetch_tables` would copy.

    Args:
        address: Address of a file, a folder, or a pattern of files.
        flag: Name of the option that holds it.

    Raises:
        ConfigError: There is no such object.
    """
    bucket, objects, _ = _find(address, flag)
    if bucket.is_object:
        folder, _, name = bucket.address.rpartition("/")
        return folder, [objects[0]._replace(name=name)]
    return bucket.address, objects


def _find(address: str, flag: str) -> tuple[Bucket, list[Object], str]:
    """Returns the bucket of an address, the objects that it names, and their pattern."""
    found = _WILDCARD.search(address)
    base = address
    pattern = ""
    if found:
        base = address[: found.start()].rpartition("/")[0]
        pattern = address[len(base) + 1 :]
    bucket = Bucket(base, flag)
    objects = [each for each in bucket.list() if _matches(each.name, pattern)]
    if not objects:
        raise ConfigError(f"{flag}={address!r}: there is no such object.")
    return bucket, objects, pattern


def _matches(name: str, pattern: str) -> bool:
    """Returns whether a name is one of a pattern, in which a star crosses no slash and two do."""
    if not pattern:
        return True
    if "**" in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))
    parts = name.split("/")
    patterns = pattern.split("/")
    if len(parts) != len(patterns):
        return False
    return all(fnmatch.fnmatchcase(*pair) for pair in zip(parts, patterns, strict=True))


def _update(bucket: Bucket, objects: Sequence[Object], folder: Path, pattern: str) -> None:
    """Copies objects that are new or changed, and deletes the copies of those that are gone."""
    names = {each.name for each in objects}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        is_copy = path.is_file() and not path.name.startswith(".")
        if is_copy and name not in names and _matches(name, pattern):
            path.unlink()
    new = [each for each in objects if not _is_same(folder / each.name, each)]
    if new:
        size = sum(each.size for each in new) / 1e6
        logging.info("Copying %d files (%.1f MB) of %s.", len(new), size, bucket.address)
    for each in new:
        target = folder / each.name
        bucket.download(each.name, target)
        # By its time a copy is known to be that of the object.
        os.utime(target, ns=(each.modified, each.modified))


def _is_same(path: Path, found: Object) -> bool:
    """Returns whether a file is the copy of an object."""
    if not path.is_file():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (found.size, found.modified)


def fetch_bundle(address: str | os.PathLike[str]) -> Path:
    """Copies the bundle at an address into the user's cache, once, and returns its folder.

    A copy is whole or not there; whether its files are those of the manifest is for the loader to
    say, as of any folder. Changes to its items are kept in the copy, and never sent to the bucket.

    Args:
        address: Address of a bundle.

    Raises:
        BundleError: There is no bundle.
    """
    bucket = Bucket(address, "bundle")
    version = _current(bucket)
    manifest = _manifest_of(version)
    objects = [each for each in bucket.list() if _is_of(each.name, version)]
    if manifest not in {each.name for each in objects}:
        raise _no_bundle(bucket, manifest)
    listing = json.dumps(objects)
    key = hashlib.sha256(listing.encode()).hexdigest()[:16]
    home = cache_folder() / "bundles" / copy_name(bucket.address)
    target = home / key
    with exclusive(home, "copy", wait=True):
        if not target.is_dir():
            _copy_whole(bucket, objects, target)
    return target


def keep_bundle(address: str | os.PathLike[str]) -> Path:
    """Brings the copy of a bundle up to date that a server follows, and returns its folder.

    The folder stays the same, and is one of versions: what is new in the bucket becomes the next of
    them, when it is there as a whole. Changes to items, and what a server keeps beside its bundle,
    stay in the copy, and are never sent to the bucket.

    Args:
        address: Address of a bundle.

    Raises:
        BundleError: There is no bundle.
        OSError: The bucket is away, or the disk full.
    """
    bucket = Bucket(address, "bundle")
    home = cache_folder() / _KEPT_FOLDER / copy_name(bucket.address)
    record = _record_of(home)
    # The lock of exports and compactions too, whose version would else be taken for the newest.
    with exclusive(home, "copy", wait=True):
        version = _current(bucket)
        name = _manifest_of(version)
        manifest = bucket.read(name)
        if manifest is None:
            raise _no_bundle(bucket, name)
        # By the manifest, which has the hashes of all files: they are not listed at each look.
        digest = hashlib.sha256(manifest).hexdigest()
        if record.is_file() and read_json(record).get("manifest") == digest:
            return home
        objects = [each for each in bucket.list() if _is_of(each.name, version)]
        size = sum(each.size for each in objects) / 1e6
        logging.info("Copying %s (%.1f MB) to %s.", bucket.address, size, home)
        with next_version(home) as copy:
            for each in objects:
                target = _path_in(copy, each.name, version)
                if target is not None:
                    bucket.download(each.name, target)
            publish_version(copy)
        with atomic(record) as temporary:
            text = json.dumps({"address": bucket.address, "manifest": digest})
            temporary.write_text(text, encoding="utf-8")
    return home


def source_of(folder: Path) -> str:
    """Returns the address of the bundle that a folder of `keep_bundle` is a copy of; "" of none."""
    is_here = folder.absolute().parent == (cache_folder() / _KEPT_FOLDER).absolute()
    record = _record_of(folder.absolute())
    if not is_here or not record.is_file():
        return ""
    return read_json(record).get("address", "")


def _record_of(home: Path) -> Path:
    # Beside the copy, in which there is what is in the bucket.
    return home.with_name(f"{home.name}.json")


def _path_in(copy: Path, name: str, version: str) -> Path | None:
    """Returns the file of an object in a version of a copy; None of one that it does without.

    Args:
        copy: Folder of the version.
        name: Name of the object.
        version: Name of the version in the bucket; "" of a bundle without versions.
    """
    if not version:
        return copy / name
    if name.startswith(f"{version}/"):
        return copy / name[len(version) + 1 :]
    # The log of its changes lies beside a version and has its name.
    if "/" not in name and name.startswith(f"{version}."):
        return copy.parent / f"{copy.name}{name[len(version) :]}"
    return None


def _current(bucket: Bucket) -> str:
    """Returns the name of the version of a bundle that counts; "" where it has none."""
    pointer = bucket.read(POINTER)
    return pointer.decode("utf-8", "replace").strip() if pointer else ""


def _manifest_of(version: str) -> str:
    return f"{version}/manifest.json" if version else "manifest.json"


def _no_bundle(bucket: Bucket, manifest: str) -> BundleError:
    return BundleError(f"{bucket.address} is no bundle: there is no {manifest} below it.")


def _is_of(name: str, version: str) -> bool:
    """Returns whether an object belongs to a version of a bundle, and not to another one's."""
    found = _VERSION.match(name)
    return found is None or found[1] == version


def _copy_whole(bucket: Bucket, objects: Sequence[Object], target: Path) -> None:
    """Copies objects into a folder, which appears when all are there."""
    size = sum(each.size for each in objects) / 1e6
    logging.info("Copying %s (%.1f MB) to %s.", bucket.address, size, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-") as scratch:
        whole = Path(scratch) / "whole"
        for each in objects:
            bucket.download(each.name, whole / each.name)
        os.replace(whole, target)
    copies = [path for path in target.parent.iterdir() if not path.name.startswith(".")]
    copies.sort(key=lambda path: path.stat().st_mtime)
    for old in copies[:-_KEPT]:
        discard(old)
