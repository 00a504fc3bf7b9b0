"""Archives of data sets: found on this machine or downloaded, and checked by their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from twotower.core.errors import ConfigError
from twotower.core.files import atomic


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip file that is published somewhere.

    Attributes:
        file_name: Name of the file, without a folder.
        url: Address to download it from.
        sha256: SHA-256 of its content, in hexadecimal.
    """

    file_name: str
    url: str
    sha256: str


def find_or_download(archive: Archive, folders: Sequence[Path], download_folder: Path) -> Path:
    """Returns the path of an archive whose content has been checked.

    Args:
        archive: Name, address and hash of the archive.
        folders: Folders to search.
        download_folder: Folder to download it into if none of them has it.

    Raises:
        ConfigError: The archive is not here and cannot be downloaded, or its hash is wrong.
    """
    # The first hit is checked too: a file of that name may be damaged or older.
    for folder in folders:
        path = folder / archive.file_name
        if path.is_file():
            return _verify(path, archive)
    try:
        return _download(archive, download_folder)
    except OSError as error:
        raise ConfigError(
            f"{archive.file_name} is in none of {', '.join(map(str, folders))}, and {archive.url} "
            f"cannot be downloaded ({error}). Put the zip into {download_folder}."
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


def _download(archive: Archive, folder: Path) -> Path:
    path = folder / archive.file_name
    logging.info("downloading %s to %s", archive.url, path)
    # The file gets its name only once its hash has been checked.
    with atomic(path) as part:
        # The time limit is that of one read, not of the whole download.
        with urllib.request.urlopen(archive.url, timeout=60) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
        _verify(part, archive)
    return path


def _verify(path: Path, archive: Archive) -> Path:
    with path.open("rb") as file:
        # Read in blocks: archives may be larger than the memory.
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != archive.sha256:
        raise ConfigError(
            f"{path}: its sha256 is {sha256}, but that of {archive.file_name} is {archive.sha256}; "
            "the file is damaged or of another version. Remove it to have it downloaded again."
        )
    return path
