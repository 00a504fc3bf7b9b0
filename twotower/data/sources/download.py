"""Files of data sets: found on this machine or downloaded, and checked by their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from absl import logging

from twotower.core.errors import ConfigError
from twotower.core.files import atomic
from twotower.core.progress import progress

_MEBIBYTE = 2**20
# Seconds that one read may take; a whole download may take longer.
_TIMEOUT = 60


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file that is published somewhere.

    Attributes:
        file_name: Name of the file, without a folder.
        url: Address to download it from.
        sha256: SHA-256 of its content, in hexadecimal.
        size: Length of its content in bytes.
    """

    file_name: str
    url: str
    sha256: str
    size: int


def data_folders() -> list[Path]:
    """Returns the folder in $TWOTOWER_DATA and the folders in it; none if it is not set."""
    if not os.environ.get("TWOTOWER_DATA"):
        return []
    data = Path(os.path.expanduser(os.environ["TWOTOWER_DATA"])).resolve()
    # Sorted, so that of two copies the same one is taken everywhere.
    return [data, *sorted(path for path in data.glob("*") if path.is_dir())]


def find_or_download(remote: RemoteFile, folders: Sequence[Path], download_folder: Path) -> Path:
    """Returns the path of a file whose content has been checked.

    Args:
        remote: Name, address, hash and length of the file.
        folders: Folders to search.
        download_folder: Folder to download it into if none of them has it.

    Raises:
        ConfigError: The file is not here and cannot be downloaded, or its hash is wrong.
    """
    # The first hit is checked too: a file of that name may be damaged or older.
    for folder in folders:
        path = folder / remote.file_name
        if path.is_file():
            return _verify(path, remote)
    try:
        return _download(remote, download_folder)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"{remote.file_name} is in none of {', '.join(map(str, folders))}, and {remote.url} "
            f"cannot be downloaded ({error}). Download it by hand, on another machine if need be, "
            f"and put it into {download_folder}; or set the environment variable TWOTOWER_DATA to "
            "the folder in which it lies, or to the folder above."
        ) from error


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks an archive into a folder, which then exists completely or not at all."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its target, since a rename works within one file system alone.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".zip-"))
    with zipfile.ZipFile(archive) as file:
        file.extractall(temporary)
    temporary.replace(folder)


def unpack_file(archive: Path, member: str, path: Path) -> None:
    """Unpacks one file of an archive to a path, which then exists completely or not at all.

    Args:
        archive: Zip file.
        member: Name of the file inside it.
        path: Path of the unpacked file, whatever the archive says.

    Raises:
        ConfigError: The archive cannot be read, or does not hold the file.
    """
    try:
        # The end of the member is read too, where zipfile compares its checksum.
        with zipfile.ZipFile(archive) as file, file.open(member) as source, atomic(path) as part:
            with part.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(
            f"{archive}: {member} cannot be unpacked ({error}). Remove the zip to have it "
            "downloaded again."
        ) from error


def _download(remote: RemoteFile, folder: Path) -> Path:
    path = folder / remote.file_name
    logging.info("Downloading %s to %s", remote.url, path)
    # The file gets its name only once its hash has been checked: a killed download begins anew.
    with atomic(path) as part:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
            with part.open("wb") as file:
                _copy(response, file, remote)
        # Told apart from a wrong hash: trying again helps here.
        if part.stat().st_size < remote.size:
            raise OSError(f"it ended after {part.stat().st_size:,} of {remote.size:,} bytes")
        _verify(part, remote)
    return path


def _copy(source: IO[bytes], target: IO[bytes], remote: RemoteFile) -> None:
    blocks = iter(lambda: source.read(_MEBIBYTE), b"")
    total = -(-remote.size // _MEBIBYTE)
    for block in progress(blocks, total=total, what=remote.file_name, unit="MiB"):
        target.write(block)


def _verify(path: Path, remote: RemoteFile) -> Path:
    with path.open("rb") as file:
        # Read in blocks: archives may be larger than the memory.
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != remote.sha256:
        raise ConfigError(
            f"{path}: its sha256 is {sha256}, but that of {remote.file_name} is {remote.sha256}; "
            "the file is damaged or of another version. Remove it to have it downloaded again."
        )
    return path
