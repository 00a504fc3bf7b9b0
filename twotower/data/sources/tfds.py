"""Reader of MovieLens by TensorFlow Datasets, without TensorFlow.

TFDS knows the archives and their hashes. The newer sizes it prepares itself, and
`tfds.data_source` reads them; its parsers of the two older sizes need TensorFlow, and these are
read from the archive's files by `twotower.data.sources.movielens`.

The zip is searched in `data_dir/downloads/manual`, `data_dir/downloads`, `data_dir` itself and the
folders of `$TWOTOWER_DATA`; if none of them has it, it is downloaded into the first.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.errors import ConfigError, choose
from twotower.data.sources.download import (
    RemoteFile,
    data_folders,
    find_or_download,
    unpack,
)
from twotower.data.sources.movielens import READERS, Tables

SIZES = ("100k", "latest-small", "1m", "20m", "25m")
DATASETS = tuple(f"movielens/{size}-ratings" for size in SIZES)

# Examples that are read at once: fewer take longer, more take memory.
_BLOCK = 20_000
# TFDS's name of a column -> ours.
_INTERACTION_COLUMNS = {
    "user_id": "user_id",
    "movie_id": "item_id",
    "user_rating": "rating",
    "timestamp": "timestamp",
}
_ITEM_COLUMNS = {"movie_id": "item_id", "movie_title": "title", "movie_genres": "genres"}
_TYPES = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
    "title": pa.string(),
    "genres": pa.list_(pa.string()),
}


def read(dataset: str, *, data_dir: str = "") -> Tables:
    """Reads interactions, users and items of one of `DATASETS`, every movie among the items.

    Preparing takes some ten seconds for 100,000 ratings, and over an hour for 25 million. The
    tables are kept in `data_dir` beside TFDS's own files, and read from there in a fraction of a
    second.

    Args:
        dataset: TFDS's name of the data set.
        data_dir: Folder in which TFDS keeps prepared data; empty means $TFDS_DATA_DIR or
            ~/tensorflow_datasets.

    Raises:
        ConfigError: An unknown data set; or its zip is not here and cannot be downloaded, or its
            hash is not the one that TFDS has on record.
    """
    choose(dict.fromkeys(DATASETS), dataset, "config.data.dataset")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = Path(os.path.expanduser(os.path.expandvars(data_dir)))
    # TFDS's version of the data set is part of the path; the newest is last.
    # Before anything of TFDS is imported, which takes seconds.
    kept = sorted((root / dataset).glob("*/columns"))
    if kept:
        return _read_columns(kept[-1])
    size = dataset.removeprefix("movielens/").removesuffix("-ratings")
    if size in READERS:
        # The archives of both older sizes hold one folder, named by the size.
        unpacked = _unpack(find_archive(archive_of(dataset), root), root)
        return READERS[size](unpacked / f"ml-{size}")
    return _prepare(dataset, root)


def archive_of(dataset: str) -> RemoteFile:
    """Returns the archive of a data set, as TFDS has it on record."""
    _, movielens = _import_tfds(dataset)
    name = dataset.removeprefix("movielens/")
    configs = {config.name: config for config in movielens.Movielens.BUILDER_CONFIGS}
    url = configs[name].download_url
    record = movielens.Movielens.url_infos[url]
    return RemoteFile(
        file_name=record.filename, url=url, sha256=record.checksum, size=int(record.size)
    )


def find_archive(archive: RemoteFile, root: Path) -> Path:
    """Returns the path of an archive, downloaded if it is not on this machine.

    Args:
        archive: Name, address and hash of the archive.
        root: Folder in which TFDS keeps prepared data.
    """
    downloads = root / "downloads"
    folders = [downloads / "manual", downloads, root, *data_folders()]
    return find_or_download(archive, folders, downloads / "manual")


def _import_tfds(dataset: str) -> tuple[Any, Any]:
    """Returns the package and its module of MovieLens, whose import registers the builder."""
    try:
        # Here, because the import takes seconds, which users of their own logs should not wait for.
        import tensorflow_datasets
        from tensorflow_datasets.structured import movielens
    except ImportError as error:
        raise ImportError(
            f"reading {dataset} needs tensorflow-datasets, array-record and importlib_resources "
            f"({error}): pip install tensorflow-datasets array-record importlib_resources."
        ) from error
    return tensorflow_datasets, movielens


def _unpack(archive: Path, root: Path) -> Path:
    """Unpacks an archive into the folder in which TFDS expects it, and returns that folder.

    TFDS itself would need TensorFlow to unpack it.
    """
    folder = root / "downloads" / "extracted" / f"ZIP.{archive.name}"
    unpack(archive, folder)
    return folder


def _prepare(dataset: str, root: Path) -> Tables:
    """Lets TFDS prepare a data set, and keeps its columns as Parquet."""
    logging.info("%s: preparing in %s (once)", dataset, root)
    ratings = _open(dataset, root)
    # Ratings repeat the film of each; a film without ratings is in the other data set alone.
    movies = _open(dataset.replace("-ratings", "-movies"), root)
    labels = movies.dataset_info.features["movie_genres"].feature

    def read_genres(numbers: np.ndarray) -> list[str]:
        return [labels.int2str(int(number)) for number in numbers]

    # Tables block by block: Python objects of all examples at once would take gigabytes.
    interactions = [_to_table(block, _INTERACTION_COLUMNS) for block in _blocks(ratings)]
    items = [_to_table(block, _ITEM_COLUMNS, genres=read_genres) for block in _blocks(movies)]
    log = pa.concat_tables(interactions)
    tables = Tables(
        interactions=log,
        users=pa.table({"user_id": log["user_id"].unique()}),
        items=pa.concat_tables(items),
    )
    # Inside the folder of the version, so that a new version of TFDS is prepared anew.
    folder = Path(ratings.dataset_info.data_dir) / "columns"
    _write_columns(tables, folder)
    logging.info("%s: kept as columns in %s", dataset, folder)
    # From the files, so that the first run reads the same as later ones.
    return _read_columns(folder)


def _open(dataset: str, root: Path) -> Any:
    """Returns TFDS's random-access source of a data set, prepared first if need be."""
    tfds, _ = _import_tfds(dataset)
    tfds.disable_progress_bar()
    try:
        # This format has random access, and is read and written without TensorFlow.
        builder = tfds.builder(dataset, data_dir=root, file_format="array_record")
    except ValueError as error:  # prepared before, in a format that only TensorFlow reads
        raise ConfigError(
            f"{dataset} in {root} cannot be used: {error}. Set config.data.data_dir to another "
            "folder."
        ) from error
    if not Path(builder.data_dir).exists():
        archive = find_archive(archive_of(dataset), root)
        _unpack(archive, root)
        # TFDS looks for the archive in the manual folder before it would download it.
        builder.download_and_prepare(
            download_dir=root / "downloads",
            download_config=tfds.download.DownloadConfig(manual_dir=archive.parent),
        )
    # Ratings and films have one split, which TFDS calls train.
    return tfds.data_source(dataset, split="train", data_dir=root, download=False)


def _blocks(source: Any) -> Iterator[Sequence[Mapping[str, Any]]]:
    for start in range(0, len(source), _BLOCK):
        stop = min(start + _BLOCK, len(source))
        yield source.__getitems__(list(range(start, stop)))


def _to_table(
    examples: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    **converters: Callable[[Any], Any],
) -> pa.Table:
    """Returns examples as columns with our names.

    Args:
        examples: Examples of TFDS: NumPy values, and bytes for text.
        names: TFDS's name of a column -> ours.
        **converters: Our name of a column -> function of its values.
    """
    columns = {}
    for theirs, ours in names.items():
        convert = converters.get(ours, _to_python)
        # Types are named, because Arrow would infer double for ratings.
        columns[ours] = pa.array([convert(example[theirs]) for example in examples], _TYPES[ours])
    return pa.table(columns)


def _to_python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (np.generic, np.ndarray)):
        return value.item()
    return value


def _write_columns(tables: Tables, folder: Path) -> None:
    """Writes the tables to a folder, which then exists completely or not at all."""
    # Beside its target: a rename works within one file system alone.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".columns-"))
    for name, table in tables._asdict().items():
        pq.write_table(table, temporary / f"{name}.parquet")
    temporary.chmod(0o755)  # mkdtemp lets nobody else read it
    temporary.replace(folder)


def _read_columns(folder: Path) -> Tables:
    return Tables(*(pq.read_table(folder / f"{name}.parquet") for name in Tables._fields))
