"""Objects in buckets, by Arrow's own file systems: gs:// of Google Cloud, s3:// of anything that
speaks S3, and file://.

An object appears whole or not at all. Credentials are found as the clouds' own tools find them, and
the addresses of other servers in AWS_ENDPOINT_URL and CLOUD_STORAGE_EMULATOR_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs

from twotower.core.errors import ConfigError

_ADDRESS = re.compile(r"([a-z][a-z0-9+]*):/(?!$)")
_SCHEMES = ("gs", "s3", "file")
_BLOCK = 2**20


class Object(NamedTuple):
    """An object in a bucket.

    Attributes:
        name: Its path below the address that was listed.
        size: Its bytes.
        modified: Nanoseconds since the epoch of its last change.
    """

    name: str
    size: int
    modified: int


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is an address such as gs://BUCKET/FOLDER.

    >>> is_remote("gs://bucket/runs"), is_remote("runs/mine"), is_remote("dataset:shop/x")
    (True, False, False)
    """
    # A `Path` of "gs://bucket" is written "gs:/bucket".
    return _ADDRESS.match(str(path)) is not None


class Bucket:
    """All objects below an address.

    Args:
        address: Address such as gs://BUCKET/FOLDER.
        flag: Name of what holds it, for a refusal.

    Raises:
        ConfigError: The address is of no kind that is known.
    """

    def __init__(self, address: str | os.PathLike[str], flag: str) -> None:
        scheme, _, rest = str(address).partition(":")
        _refuse_credentials(scheme, rest, flag)
        slashes = "///" if scheme == "file" else "//"
        text = f"{scheme}:{slashes}{rest.strip('/')}"
        if scheme not in _SCHEMES:
            raise ConfigError(
                f"{flag}={address}: addresses begin with gs:// or s3://. Mount what lies elsewhere "
                "into this machine, and name the folder."
            )
        self.address = text
        try:
            self._system, self._root = fs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{flag}={address} cannot be used: {error}") from None
        self._is_local = scheme == "file"
        # Whether the address is that of one object.
        self.is_object = self._system.get_file_info(self._root).type == fs.FileType.File

    def list(self) -> list[Object]:
        """Returns the objects, by name.

        Raises:
            ConfigError: One has a name that would be that of a file elsewhere.
        """
        if self.is_object:
            info = self._system.get_file_info(self._root)
            return [self._object(info, self._root.rpartition("/")[2])]
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = []
        for info in self._system.get_file_info(selector):
            if info.type == fs.FileType.File:
                name = info.path[len(self._root) :].removeprefix("/")
                # Names come from whoever may write to the bucket, and copies are made by them.
                if not {"", ".", ".."}.isdisjoint(name.split("/")):
                    raise ConfigError(
                        f"{self.address} holds an object {name!r}, which no file below a folder "
                        "can be: delete it, or name the objects that are meant."
                    )
                found.append(self._object(info, name))
        return sorted(found)

    def _object(self, info: fs.FileInfo, name: str) -> Object:
        return Object(name, info.size, info.mtime_ns or 0)

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object; None where there is none."""
        path = self._path(name)
        if self._system.get_file_info(path).type != fs.FileType.File:
            return None
        with self._system.open_input_stream(path) as stream:
            return stream.read()

    def download(self, name: str, target: Path) -> str:
        """Copies an object into a file, and returns its SHA-256.

        Args:
            name: Name of the object.
            target: File to write, which appears when it is whole.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with self._system.open_input_stream(self._path(name)) as stream:
                with temporary.open("wb") as file:
                    sha256, _ = _copy(stream, file)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return sha256

    def upload(self, source: Path, name: str) -> tuple[int, str]:
        """Copies a file into an object, and returns its size and SHA-256 as they were copied.

        Args:
            source: File, which may grow meanwhile.
            name: Name of the object.
        """
        with source.open("rb") as file:
            return self._write(name, file)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        self._write(name, io.BytesIO(content))

    def _write(self, name: str, content: io.BufferedIOBase) -> tuple[int, str]:
        path = self._path(name)
        if not self._is_local:
            with self._system.open_output_stream(path) as stream:
                sha256, size = _copy(content, stream)
            return size, sha256
        # A file of this machine is seen before it is whole.
        self._system.create_dir(path.rpartition("/")[0])
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        with self._system.open_output_stream(temporary) as stream:
            sha256, size = _copy(content, stream)
        self._system.move(temporary, path)
        return size, sha256

    def delete(self, name: str) -> None:
        """Deletes an object."""
        self._system.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return self._root if self.is_object else f"{self._root}/{name}"


def _refuse_credentials(scheme: str, rest: str, flag: str) -> None:
    """Refuses an address with a password, which logs, records and messages would repeat."""
    user, is_named, _ = rest.strip("/").partition("/")[0].rpartition("@")
    if scheme != "file" and ((is_named and ":" in user) or "_key=" in rest):
        raise ConfigError(
            f"{flag}: the address holds credentials, which would stand in logs and files of the "
            "run. Leave them out, and give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )


def _copy(
    source: io.BufferedIOBase | fs.NativeFile, target: io.BufferedIOBase | fs.NativeFile
) -> tuple[str, int]:
    """Copies a stream, and returns its SHA-256 and size."""
    sha256 = hashlib.sha256()
    size = 0
    for block in _blocks(source):
        target.write(block)
        sha256.update(block)
        size += len(block)
    return sha256.hexdigest(), size


def _blocks(source: io.BufferedIOBase | fs.NativeFile) -> Iterator[bytes]:
    while block := source.read(_BLOCK):
        yield block


def cache_folder() -> Path:
    """Returns the folder of copies, that of TWOTOWER_CACHE or of the user's cache."""
    folder = os.environ.get("TWOTOWER_CACHE", "~/.cache/twotower")
    return Path(folder).expanduser() / "remote"


def copy_name(address: str) -> str:
    """Returns the name of the folder of an address's copy: readable, and of that address alone."""
    name = re.sub(r"\W+", "-", address.rpartition("/")[2]) or "bucket"
    return f"{name}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
