"""Data sets by name: a path such as dataset:movielens-100k/u.data names a file of one of them.

The file is taken from the folder NAME of $TWOTOWER_DATA if it lies there. Otherwise it is
downloaded once, checked by its hash, and kept in $TWOTOWER_CACHE/NAME; without that variable, in
~/.cache/twotower/NAME.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from twotower.core.errors import ConfigError, choose, did_you_mean
from twotower.data.sources.download import (
    RemoteFile,
    data_folders,
    find_or_download,
    unpack_file,
)

PREFIX = "dataset:"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
# The commit is part of the address, so that the file cannot change.
_SASREC = (
    "https://raw.githubusercontent.com/kang205/SASRec/e3738967fddab206d6eeb4fda433e7a7034dd8b1"
)
_OF_LATEST = ("ratings.csv", "movies.csv", "tags.csv", "links.csv")
_OF_LARGE = (*_OF_LATEST, "genome-scores.csv", "genome-tags.csv")


@dataclasses.dataclass(frozen=True)
class Publication:
    """A published file that holds files of a data set.

    Attributes:
        remote: The file as it is published: a zip, or the only file itself.
        files: Names of the files that can be asked for.
        folder: Folder of these files inside the zip; empty if `remote` is no zip.
    """

    remote: RemoteFile
    files: tuple[str, ...]
    folder: str = ""


def _movielens(size: str, sha256: str, length: int, files: tuple[str, ...]) -> Publication:
    # The zips are named as their folders inside are.
    remote = RemoteFile(
        file_name=f"ml-{size}.zip",
        url=f"{_GROUPLENS}/ml-{size}.zip",
        sha256=sha256,
        size=length,
    )
    return Publication(remote, files, folder=f"ml-{size}")


# Name -> what is published of it. Hashes and lengths of the zips are those that TFDS has on record.
DATASETS: dict[str, tuple[Publication, ...]] = {
    "movielens-100k": (
        _movielens(
            "100k",
            "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
            4_924_029,
            ("u.data", "u.item", "u.user", "u.genre", "u.info", "u.occupation"),
        ),
    ),
    "movielens-latest-small": (
        _movielens(
            "latest-small",
            "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
            978_202,
            _OF_LATEST,
        ),
    ),
    "movielens-1m": (
        _movielens(
            "1m",
            "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
            5_917_549,
            ("ratings.dat", "movies.dat", "users.dat"),
        ),
        # The 5-core file of the SASRec paper, whose ids are its own.
        Publication(
            RemoteFile(
                file_name="ml-1m.txt",
                url=f"{_SASREC}/data/ml-1m.txt",
                sha256="b725f3acb3986fe3130bffd1e77a74d182a1f51799567a236dbd60270f95b0a2",
                size=9_053_831,
            ),
            files=("ml-1m.txt",),
        ),
    ),
    "movielens-20m": (
        _movielens(
            "20m",
            "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
            198_702_078,
            _OF_LARGE,
        ),
    ),
    "movielens-25m": (
        _movielens(
            "25m",
            "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
            261_978_986,
            _OF_LARGE,
        ),
    ),
}


def find_file(path: str, field: str) -> Path:
    """Returns the file of a path dataset:NAME/FILE, downloaded and unpacked if need be.

    Args:
        path: Path, which begins with `PREFIX`.
        field: Name of the option that holds it, for messages.

    Raises:
        ConfigError: An unknown data set or file; or it is not here and cannot be downloaded, or its
            hash is wrong.
    """
    name, _, file_name = path.removeprefix(PREFIX).partition("/")
    publications = choose(DATASETS, name, f"{field}: data set")
    publication = _choose_publication(publications, file_name, f"{field}={path!r}")
    # A file of one's own takes precedence and is not checked: it may be a part of the data set.
    cache = _cache_folder() / name
    folders = [folder for folder in data_folders() if folder.name == name]
    for folder in (*folders, cache):
        if (folder / file_name).is_file():
            return folder / file_name
    # The folders of the machine are searched for the zip too, which may lie there for other
    # programs.
    remote = find_or_download(publication.remote, [*data_folders(), cache], cache)
    if not publication.folder:
        return remote
    # One file alone: those of the genome are larger than the ratings.
    unpacked = cache / file_name
    unpack_file(remote, f"{publication.folder}/{file_name}", unpacked)
    return unpacked


def _choose_publication(
    publications: tuple[Publication, ...], file_name: str, field: str
) -> Publication:
    for publication in publications:
        if file_name in publication.files:
            return publication
    known = [file for publication in publications for file in publication.files]
    raise ConfigError(
        f"{field}: the data set has no file {file_name!r}{did_you_mean(file_name, known)} It has "
        f"{', '.join(known)}."
    )


def _cache_folder() -> Path:
    # "or": a variable that is set to nothing counts as not set.
    folder = os.environ.get("TWOTOWER_CACHE") or "~/.cache/twotower"
    return Path(os.path.expanduser(folder))
