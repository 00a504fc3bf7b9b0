"""MovieLens through TensorFlow Datasets, without TensorFlow: prepared once, made columns once, then
read as Parquet.

The zip is looked for in `data_dir/downloads/manual`, `data_dir/downloads`, `data_dir` itself and
the folders of `$TWOTOWER_DATA`; where it is in none of them it is downloaded into the first. Its
checksum must be the one TFDS has.

TFDS is helped past three places where it would ask for TensorFlow: builders are found by importing
their module, archives are unpacked beforehand to where TFDS looks for unpacked ones, and its
parsers get Python's `open` as `GFile`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import types
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.errors import ConfigError, choose
from twotower.core.files import atomic

DATASETS = tuple(
    f"movielens/{size}-ratings" for size in ("100k", "latest-small", "1m", "20m", "25m")
)
_TABLES = ("interactions", "users", "items")
_BATCH = 20_000
# TFDS's name of a column -> ours. Of two that become age the exact one (100k) is preferred to the
# group's first year.
_INTERACTIONS = {
    "user_id": "user_id",
    "movie_id": "item_id",
    "user_rating": "rating",
    "timestamp": "timestamp",
}
_ITEMS = {"movie_id": "item_id", "movie_title": "title", "movie_genres": "genres"}
_USERS = {
    "user_id": "user_id",
    "user_gender": "gender",
    "bucketized_user_age": "age",
    "raw_user_age": "age",
    "user_occupation_text": "occupation",
    "user_zip_code": "zip",
}
_SCHEMAS = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
    "title": pa.string(),
    "genres": pa.list_(pa.string()),
    "gender": pa.string(),
    "age": pa.int64(),
    "occupation": pa.string(),
    "zip": pa.string(),
}


def read(dataset: str, *, data_dir: str = "") -> tuple[pa.Table, pa.Table, pa.Table]:
    """Interactions, users and items of one of `DATASETS`.

    The first time it takes some ten seconds for 100,000 ratings, and over an hour for 25 million;
    what came out is kept in `data_dir` beside TFDS's own files, and read from there in a fraction
    of a second.

    Args:
        data_dir: where TFDS keeps prepared data; empty means $TFDS_DATA_DIR or
            ~/tensorflow_datasets.

    Returns:
        interactions(user_id, item_id, rating, timestamp), users(user_id and, of 100k and 1m,
        gender, age, occupation, zip), items(item_id, title, genres: list of names), every movie of
        the zip among them.

    Raises:
        ConfigError: an unknown dataset, or its zip is nowhere and cannot be downloaded, or is not
            the one TFDS knows.
    """
    choose(dict.fromkeys(DATASETS), dataset, "config.data.dataset")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = Path(os.path.expanduser(os.path.expandvars(data_dir)))
    kept = sorted((root / dataset).glob("*/columns"))
    if not kept:
        kept = [_keep(_columns(dataset, root), dataset)]
    return tuple(pq.read_table(kept[-1] / f"{name}.parquet") for name in _TABLES)


def _keep(columns: tuple[Path, dict[str, pa.Table]], dataset: str) -> Path:
    """Writes the tables to a folder that is there whole or not at all."""
    prepared, tables = columns
    folder = prepared / "columns"
    temporary = Path(tempfile.mkdtemp(dir=prepared, prefix=".columns-"))
    for name, table in tables.items():
        pq.write_table(table, temporary / f"{name}.parquet")
    temporary.chmod(0o755)
    temporary.replace(folder)
    logging.info("%s: kept as columns in %s", dataset, folder)
    return folder


def _columns(dataset: str, root: Path) -> tuple[Path, dict[str, pa.Table]]:
    """The prepared dataset's folder and its tables, read through `tfds.data_source`."""
    logging.info("%s: preparing in %s (once)", dataset, root)
    interactions, users = [], {}
    source = _source(dataset, root)
    for batch in _batches(source):
        interactions.append(_table(batch, _INTERACTIONS, {}))
        users.update({example["user_id"]: example for example in batch})
    movies = _source(dataset.replace("-ratings", "-movies"), root)
    items = [example for batch in _batches(movies) for example in batch]
    genres = movies.dataset_info.features["movie_genres"].feature
    tables = {
        "interactions": pa.concat_tables(interactions),
        "users": _table(
            list(users.values()), _USERS, {"user_gender": lambda male: "M" if male else "F"}
        ),
        "items": _table(
            items, _ITEMS, {"movie_genres": lambda labels: [genres.int2str(int(n)) for n in labels]}
        ),
    }
    return Path(source.dataset_info.data_dir), tables


def _batches(source: Any) -> Iterator[list[dict]]:
    for start in range(0, len(source), _BATCH):
        yield source.__getitems__(list(range(start, min(start + _BATCH, len(source)))))


def _table(examples: list[dict], names: dict[str, str], convert: dict) -> pa.Table:
    """Columns of TFDS's examples under our names; those that the examples lack are left out."""
    columns = {}
    for theirs, ours in names.items():
        if examples and theirs in examples[0]:
            values = (_python(example[theirs]) for example in examples)
            change = convert.get(theirs, int if ours == "age" else lambda value: value)
            columns[ours] = pa.array([change(value) for value in values], _SCHEMAS[ours])
    return pa.table(columns)


def _python(value: Any) -> Any:
    return (
        value.decode()
        if isinstance(value, bytes)
        else value.item()
        if getattr(value, "ndim", 1) == 0
        else value
    )


def _source(dataset: str, root: Path) -> Any:
    """A random-access source of the dataset, prepared if it is not yet."""
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.structured import (
            movielens,
            movielens_parsing,
        )  # registers the builder
    except ImportError as error:
        raise ImportError(
            f"reading {dataset} needs tensorflow-datasets, array-record and importlib_resources ({error}): "
            f"install the extra, as in pip install 'twotower[tfds]'."
        ) from error
    del movielens
    tfds.disable_progress_bar()
    try:
        builder = tfds.builder(dataset, data_dir=root, file_format="array_record")
    except (
        ValueError
    ) as error:  # prepared before, in a format that cannot be read without TensorFlow
        raise ConfigError(
            f"{dataset} in {root} cannot be used: {error}. Set config.data.data_dir to another folder."
        ) from error
    if not Path(builder.data_dir).exists():
        archive = _archive(builder, root / "downloads")
        _unpack(archive, root / "downloads" / "extracted" / f"ZIP.{archive.name}")
        config = tfds.download.DownloadConfig(manual_dir=archive.parent)
        with _plain_files(movielens_parsing):
            builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    return builder.as_data_source(split="train")


@contextlib.contextmanager
def _plain_files(parsing: types.ModuleType) -> Iterator[None]:
    """The parsers of 100k and 1m open their files by `tf.io.gfile.GFile`; `open` serves as well."""
    before = parsing.tf
    parsing.tf = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open))
    )
    try:
        yield
    finally:
        parsing.tf = before


def _archive(builder: Any, downloads: Path) -> Path:
    """The dataset's zip: found, or else downloaded; its sha256 is the one TFDS has on record."""
    url = builder.builder_config.download_url
    known = builder.url_infos[url]
    manual = downloads / "manual"
    folders = [manual, downloads, downloads.parent]
    if os.environ.get("TWOTOWER_DATA"):
        data = Path(os.environ["TWOTOWER_DATA"]).resolve()
        folders += [data, *sorted(path for path in data.glob("*") if path.is_dir())]
    for folder in folders:
        if (folder / known.filename).is_file():
            return _verified(folder / known.filename, known)
    try:
        return _download(url, manual / known.filename, known)
    except OSError as error:
        raise ConfigError(
            f"{builder.name}/{builder.builder_config.name}: {known.filename} is in none of "
            f"{', '.join(map(str, folders))}, and {url} cannot be downloaded ({error}). Put the zip into {manual} "
            f"(config.data.data_dir={str(downloads.parent)!r})."
        ) from error


def _download(url: str, path: Path, known: Any) -> Path:
    logging.info("downloading %s to %s", url, path)
    with atomic(path) as part:
        with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
        _verified(part, known)
    return path


def _verified(path: Path, known: Any) -> Path:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known.checksum:
        raise ConfigError(
            f"{path}: its sha256 is {found}, but TFDS knows {known.filename} by {known.checksum}; "
            f"the file is damaged or of another version. Remove it to have it downloaded again."
        )
    return path


def _unpack(archive: Path, folder: Path) -> None:
    """To where TFDS looks for an archive already unpacked; there whole or not at all."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".zip-"))
    with zipfile.ZipFile(archive) as file:
        file.extractall(temporary)
    temporary.replace(folder)
