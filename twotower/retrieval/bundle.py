"""The bundle: everything that recommending needs, in one folder whose files can be verified.

```
manifest.json    format, versions, date, metric, checkpoint step and its figures, rows and times of
                 the data, columns about persons, hash of the weights, kind of index, sentence
                 encoders, sha256 of every other file
README.md        the model card: the same in words, see `twotower.retrieval.card`
plugins.json     plugins and kinds of one's own, by name and hash; no code
config.json  encoder/  params.npz  tables/
                 configuration, features, and the weights of the towers
user_tower.stablehlo  item_tower.stablehlo
                 the towers as programs that need neither Flax nor the model's code
item_vectors.npy  items.parquet  item_counts.npy
                 the corpus in one order: vectors; ids and display columns; training rows
item_scales.npy  beside vectors stored as int8: see `twotower.index.vectors`
user_vectors.npy  users.parquet  seen_offsets.npy  seen_items.npy  seen_events.arrow
                 known users: vectors; raw features; items, the latest last
index/           the index over the item vectors
golden.json      requests with the answers that a server must reproduce
```

A divided bundle has its corpus in shards (see `twotower.retrieval.shards.assign`), and the manifest
their number. Each has the files of the corpus, of its own items alone, and their rows in the whole:

```
shards/0/        item_vectors.npy  item_scales.npy  items.parquet  item_counts.npy  item_rows.npy
                 index/
shards/1/ ...
```

An exported bundle keeps these in a version, `v-1/` and so on, and names the current one in the file
`current`: see `twotower.core.files`. A folder that holds them itself is a bundle too. Vectors are
mapped into memory, not read. Changes made to a loaded bundle are kept beside its version: see
`twotower.retrieval.live.log`.

The hashes say that the files are those that the manifest names, and not who wrote it: somebody may
have made both by hand. What is read is therefore looked at before it is believed, and a size before
it is allocated.

Of the index alone a bundle can do without: where a file of it is missing, or its library, answers
come from exact search over the vectors. A file that was changed is refused, whichever it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

import twotower
from twotower.config import Config, from_dict
from twotower.core.arrays import Ragged
from twotower.core.errors import BundleError, ConfigError, FolderError, TwotowerError
from twotower.core.files import (
    POINTER,
    check_files,
    content_digest,
    current_version,
    digest,
    read_json,
)
from twotower.core.install import command
from twotower.core.kinds import note_origins, read_record, write_record
from twotower.features.encoder import Encoder
from twotower.features.inputs import SIDES
from twotower.index.base import Index, ShardedIndex
from twotower.index.build import load_index, save_index
from twotower.index.exact import ExactIndex
from twotower.index.vectors import Int8Vectors, Vectors, append_coordinate, popularity_coordinate
from twotower.retrieval.live.log import check_unchanged
from twotower.retrieval.tower_programs import (
    TowerPrograms,
    WeightArrays,
    load_weights,
    model_version,
    save_weights,
)

if TYPE_CHECKING:  # of routers alone
    from twotower.retrieval.shards.remote import Shards

FORMAT = "twotower-bundle"
VERSION = 2
PACKAGES = ("jax", "numpy", "pyarrow", "scann")  # packages whose versions the manifest records
BUNDLE = "bundle"  # folder of the bundle in that of its run
INDEX = "index"  # folder of the index
ROWS_AT_ONCE = 65_536  # rows of vectors that are looked at together
EVENTS = "seen_events.arrow"
GOLDEN = "golden.json"
# Settings of the index that the manifest records; those of a graph where it is one.
INDEX_SETTINGS = ("kind", "target_recall", "hnsw_m", "hnsw_ef_construction")
# Entries of the manifest that were measured on the run, at its export.
OF_THE_RUN = ("against_full", "baseline", "data", "figures", "intervals", "refit", "run")
INDEXED = ("vectors", "scales")  # item_*.npy that the index was built from


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The items of a bundle, or of one of its shards.

    Attributes:
        vectors: Item vectors, float32 [N, D], or int8 that is read as such.
        items: item_id and display columns, N rows.
        counts: Training rows of each item, int64 [N].
        index: Index over `vectors`.
    """

    vectors: Vectors
    items: pa.Table
    counts: np.ndarray
    index: Index


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory.

    Attributes:
        config: Configuration of the run.
        encoder: Encoder of raw features.
        towers: Both towers and their weights.
        vectors: Item vectors, float32 [N, D], or int8 that is read as such; those of shards
            elsewhere are asked for by rows.
        items: item_id and display columns, N rows.
        counts: Training rows of each item, int64 [N].
        user_vectors: Vectors of the known users, float32 [U, D].
        users: user_id and the raw columns of the user features, U rows.
        seen: Items of each user, distinct, the latest last.
        seen_events: Columns timestamp (seconds since the epoch) and event of the latest row of
            each user with each item of `seen`, as far as the log has them; None where it has
            neither, and of a bundle of an earlier version.
        index: Index over `vectors`, with one more coordinate if `config.retrieval.popularity` is
            set.
        kinds: Plugins of the run and the kinds that they had; see `twotower.plugins.make_record`.
        probability: Factor and offset, by name, that make a score the logit of its label's
            probability; None of a loss that learns no label.
        manifest: Content of manifest.json; {} before it is written.
        folder: Folder that it was loaded from; None of a bundle in memory.
        version: Folder of its files, inside `folder` or `folder` itself.
    """

    config: Config
    encoder: Encoder
    towers: TowerPrograms
    vectors: Vectors
    items: pa.Table
    counts: np.ndarray
    user_vectors: np.ndarray
    users: pa.Table
    seen: Ragged
    index: Index
    seen_events: pa.Table | None = None
    kinds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    probability: Mapping[str, float] | None = None
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    version: Path | None = None

    def __repr__(self) -> str:
        # Without the arrays, which a notebook would print.
        folder = "in memory"
        if self.folder is not None:
            folder = repr(str(self.folder))
        items = f"{len(self.items):,} items"
        return f"Bundle({folder}: {items}, {len(self.users):,} users, {self.index.kind} index)"

    @property
    def normalized(self) -> bool:
        """Whether vectors have length 1."""
        return self.config.model.normalize

    def read_golden(self) -> dict[str, Any] | None:
        """Returns the golden requests with their answers; None of a bundle that has none."""
        if self.version is None or GOLDEN not in self.manifest.get("files", ()):
            return None
        return read_json(self.version / GOLDEN)


def write_bundle(
    bundle: Bundle,
    folder: Path,
    *,
    step: int,
    golden: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Writes a bundle into an empty folder, and returns its manifest.

    Args:
        bundle: Bundle to write.
        folder: Empty folder.
        step: Step of the checkpoint that the weights come from.
        golden: Requests with their answers, see `twotower.retrieval.golden`.
        **more: Further entries of the manifest.
    """
    # The manifest comes last: a folder without one is no bundle, whatever else lies there.
    (folder / "config.json").write_text(bundle.config.to_json(), encoding="utf-8")
    write_record(folder, bundle.kinds)
    bundle.encoder.save(folder / "encoder")
    save_weights(bundle.towers.weights, folder)
    for side in SIDES:
        (folder / f"{side}_tower.stablehlo").write_bytes(bundle.towers.programs[side])
    for name, array in _arrays(bundle).items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    if bundle.seen_events is not None:
        with pa.OSFile(str(folder / EVENTS), "wb") as file:
            with pa.ipc.new_file(file, bundle.seen_events.schema) as writer:
                writer.write_table(bundle.seen_events)
    pq.write_table(bundle.users, folder / "users.parquet")
    if golden is not None:
        text = json.dumps(golden, ensure_ascii=False)
        (folder / GOLDEN).write_text(text, encoding="utf-8")
    version = model_version(bundle.towers.weights)
    corpus = Corpus(bundle.vectors, bundle.items, bundle.counts, bundle.index)
    if isinstance(bundle.index, ShardedIndex):
        more["shards"] = len(bundle.index.parts)
        settings = [
            _write_shard(corpus, bundle.index, number, folder, version)
            for number in range(len(bundle.index.parts))
        ]
        index = settings[0] | {"kind": bundle.index.kind}
    else:
        index = _write_corpus(corpus, folder, version)
    manifest = {
        "format": FORMAT,
        "format_version": VERSION,
        "twotower": twotower.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": _package_versions(),
        # Cosines are dot products of normalised vectors, so that there is one metric.
        "metric": "dot",
        "normalized": bundle.normalized,
        "dim": bundle.towers.dim,
        "num_items": len(bundle.items),
        "num_users": len(bundle.users),
        "personal": personal_columns(bundle),
        "step": step,
        "probability": bundle.probability,
        "model_version": version,
        # What a reader asks for first; all settings stand beside the index.
        "index": {name: index[name] for name in INDEX_SETTINGS if name in index},
        "sentence_models": _sentence_models(bundle.encoder),
        **more,
    }
    # Here: who reads bundles needs no words for them.
    from twotower.retrieval.card import CARD, format_card

    (folder / CARD).write_text(format_card(manifest), encoding="utf-8")
    # Every file, also those of the index, whose names depend on its kind.
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest["files"] = {str(path.relative_to(folder)): digest(path) for path in paths}
    # Over all other entries, the hashes of the files among them: it names the bundle.
    manifest["sha256"] = content_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def _write_shard(
    corpus: Corpus, index: ShardedIndex, number: int, folder: Path, version: str
) -> dict[str, Any]:
    """Writes the items of one shard, and returns the settings of its index."""
    rows = index.rows[number]
    vectors = corpus.vectors[rows]
    if isinstance(corpus.vectors, Int8Vectors):
        # As they are: quantised once more, the scales would differ by rounding.
        vectors = Int8Vectors(corpus.vectors.codes[rows], corpus.vectors.scales[rows])
    shard = folder / shard_name(number)
    shard.mkdir(parents=True)
    np.save(shard / "item_rows.npy", rows, allow_pickle=False)
    items = corpus.items.take(pa.array(rows))
    part = Corpus(vectors, items, corpus.counts[rows], index.parts[number])
    return _write_corpus(part, shard, version)


def _write_corpus(corpus: Corpus, folder: Path, version: str) -> dict[str, Any]:
    """Writes items with their index into a folder, and returns the settings of the index.

    Args:
        corpus: Items.
        folder: Folder to write into.
        version: Version of the model.
    """
    vectors = corpus.vectors
    arrays = {"item_counts": corpus.counts}
    if isinstance(vectors, Int8Vectors):
        arrays |= {"item_vectors": vectors.codes, "item_scales": vectors.scales}
    else:
        arrays |= {"item_vectors": vectors}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    pq.write_table(corpus.items, folder / "items.parquet")
    # The index says what it was built from, so that it cannot be put beside other vectors or
    # another user tower.
    indexed = [name for name in INDEXED if f"item_{name}" in arrays]
    built_from = {name: digest(folder / f"item_{name}.npy") for name in indexed}
    return save_index(corpus.index, folder / INDEX, model_version=version, **built_from)


def shard_name(number: int) -> str:
    """Returns the folder of a shard in that of its bundle."""
    return f"shards/{number}"


def load_bundle(
    folder: str | os.PathLike, *, load_towers: bool = True, shards: Shards | None = None
) -> Bundle:
    """Reads a bundle, after checking that every file is the one that was written.

    Where files of the index are missing, the search is exact, and a warning says so.

    Args:
        folder: Folder that `export` or `write_bundle` wrote.
        load_towers: Whether to read the programs of the towers now, so that a damaged one is told
            here. Otherwise they are read with the first user or item that is to be embedded, and
            JAX is loaded then.
        shards: Processes that hold the shards of a divided bundle, for a router: it reads neither
            item vectors nor indices then.

    Raises:
        BundleError: The folder is no bundle, a file is changed, one that is not of the index is
            missing, or parts do not belong together.
        ConfigError: Shards are named, and the bundle is not divided, or has been changed since its
            export.
    """
    # Absolute: changes are written beside it later, from wherever the process is then.
    home = Path(folder).absolute()
    with bundle_errors(home):
        files = current_version(home)
        manifest = read_manifest(files)
        # Before hashes are compared: files of the index are the only ones that may be missing.
        lost = lost_index_files(files, manifest)
        digests = dict(manifest["files"])
        if shards is not None:
            _check_router(home, files, manifest)
            lost = [name for name in digests if _is_of_shards_alone(name)]
        check_files(files, {name: digests[name] for name in digests if name not in lost})
        weights = load_weights(files)
        # Whole files are not enough: vectors of one model beside towers of another rank at random.
        if model_version(weights) != manifest["model_version"]:
            raise BundleError(
                f"{files} has weights of another model than its manifest says. Export again."
            )
        config = from_dict(json.loads((files / "config.json").read_text(encoding="utf-8")))
        # Nothing is imported; a feature of a kind that is not here is told with the module that had
        # it.
        kinds = read_record(files)
        note_origins(kinds)
        if shards is None:
            corpus = _read_corpus(files, manifest, config, lost)
        else:
            corpus = _read_remote_corpus(files, manifest, shards)
        user_vectors = _map_array(files, "user_vectors")
        _check_vectors(files / "user_vectors.npy", user_vectors)
        bundle = Bundle(
            config=config,
            encoder=Encoder.load(files / "encoder"),
            towers=_read_towers(files, weights),
            vectors=corpus.vectors,
            items=corpus.items,
            counts=corpus.counts,
            user_vectors=user_vectors,
            users=_read_rows(files / "users.parquet", len(user_vectors)),
            seen=Ragged(_map_array(files, "seen_offsets"), _map_array(files, "seen_items")),
            index=corpus.index,
            seen_events=_map_events(files),
            kinds=kinds,
            probability=manifest.get("probability"),
            manifest=manifest,
            folder=home,
            version=files,
        )
        _check_lengths(bundle, files)
        if load_towers:
            _check_towers(bundle, files)
        # Ids twice would be found under one row, and the other item never again.
        _check_ids(files / "items.parquet", bundle.items, "item_id")
        _check_ids(files / "users.parquet", bundle.users, "user_id")
        _check_lists(files, bundle.seen, len(bundle.items))
        _check_events(files / EVENTS, bundle.seen_events)
    # Known texts are served from their stored vectors, so this is no error yet.
    for feature in bundle.encoder.spec:
        feature.warn_of_missing_extra()
    return bundle


def _read_corpus(
    files: Path, manifest: Mapping[str, Any], config: Config, lost: Sequence[str]
) -> Corpus:
    """Returns the items of a bundle; those of shards in the order of the whole, and in memory.

    Args:
        files: Folder of the files.
        manifest: Content of manifest.json.
        config: Configuration of the run.
        lost: Files of the index that are missing.
    """
    if not manifest.get("shards"):
        vectors, items, counts = read_items(files, config)
        indexed = indexed_vectors(config, vectors, counts)
        return Corpus(vectors, items, counts, load_part(files, "", manifest, lost, indexed))
    from twotower.index.shards.divided import DividedIndex

    rows = []
    parts = []
    for number in range(manifest["shards"]):
        folder = files / shard_name(number)
        rows.append(_map_array(folder, "item_rows"))
        parts.append(read_items(folder, config))
    _check_shard_rows(files, rows, [len(part[0]) for part in parts])
    vectors = _join_vectors([part[0] for part in parts], rows)
    order = np.argsort(np.concatenate(rows), kind="stable")
    items = pa.concat_tables([part[1] for part in parts]).take(pa.array(order))
    counts = np.concatenate([part[2] for part in parts])[order]
    # The coordinate of popularity is that of the whole.
    indexed = indexed_vectors(config, vectors, counts)
    indices = []
    for number, own in enumerate(rows):
        name = shard_name(number)
        indices.append(load_part(files, name, manifest, lost, indexed[own]))
    return Corpus(vectors, items, counts, DividedIndex(indices, rows))


def _read_remote_corpus(files: Path, manifest: Mapping[str, Any], shards: Shards) -> Corpus:
    """Returns the items of a divided bundle whose vectors and indices other processes hold.

    Args:
        files: Folder of the files.
        manifest: Content of manifest.json.
        shards: Shards in other processes.
    """
    from twotower.retrieval.shards.remote import RemoteIndex, RemoteVectors

    folders = [files / shard_name(number) for number in range(manifest["shards"])]
    rows = [_map_array(folder, "item_rows") for folder in folders]
    counts = [_map_array(folder, "item_counts") for folder in folders]
    for folder, part in zip(folders, counts):
        _check_counts(folder / "item_counts.npy", part)
    _check_shard_rows(files, rows, list(map(len, counts)))
    tables = []
    for folder, own in zip(folders, rows):
        tables.append(_read_rows(folder / "items.parquet", len(own)))
    order = np.argsort(np.concatenate(rows), kind="stable")
    dim = manifest["dim"]
    index = RemoteIndex(shards, rows, dim, normalized=manifest["normalized"])
    # Read by rows as the others are; as a type of vectors it would be one of every index.
    vectors: Any = RemoteVectors(shards, rows, dim)
    items = pa.concat_tables(tables).take(pa.array(order))
    return Corpus(vectors, items, np.concatenate(counts)[order], index)


def _check_router(home: Path, files: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a bundle that no router can answer from."""
    if not manifest.get("shards"):
        raise ConfigError(
            f"--shard_urls: {home} has no shards. `twotower export --shards=S` divides a bundle."
        )
    check_unchanged(files, manifest)


def _is_of_shards_alone(name: str) -> bool:
    """Whether a file of the manifest is read by shards, and not by a router."""
    path = PurePosixPath(name)
    return path.parent.name == INDEX or path.name in ("item_vectors.npy", "item_scales.npy")


def read_items(folder: Path, config: Config) -> tuple[Vectors, pa.Table, np.ndarray]:
    """Returns the vectors, the display columns and the training rows of the items in a folder.

    Args:
        folder: Folder of a bundle's files, or of one of its shards.
        config: Configuration of the run.
    """
    counts = _map_array(folder, "item_counts")
    vectors = _stored_vectors(folder, config.retrieval.vectors)
    _check_vectors(folder / "item_vectors.npy", vectors)
    _check_counts(folder / "item_counts.npy", counts)
    if len(counts) != len(vectors):
        raise BundleError(
            f"{folder}: item_vectors.npy and item_counts.npy differ in length ({len(vectors)}, "
            f"{len(counts)}). Export again."
        )
    return vectors, _read_rows(folder / "items.parquet", len(vectors)), counts


def _join_vectors(parts: Sequence[Vectors], rows: Sequence[np.ndarray]) -> Vectors:
    """Returns the vectors of all shards in the order of the whole."""
    first = parts[0]
    if isinstance(first, Int8Vectors):
        int8 = [part for part in parts if isinstance(part, Int8Vectors)]
        codes = _join_arrays([part.codes for part in int8], rows)
        return Int8Vectors(codes, _join_arrays([part.scales for part in int8], rows))
    return _join_arrays([part for part in parts if isinstance(part, np.ndarray)], rows)


def _join_arrays(parts: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    # One shard after another: all of them beside the whole would take twice its memory.
    total = sum(map(len, rows))
    joined = np.empty((total, *parts[0].shape[1:]), parts[0].dtype)
    for part, own in zip(parts, rows, strict=True):
        joined[own] = part
    return joined


def _check_shard_rows(folder: Path, rows: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
    """Refuses shards whose rows are not all rows of the whole, each once and rising."""
    joined = np.concatenate(rows)
    is_whole = joined.dtype == np.int64 and joined.ndim == 1
    is_whole = is_whole and [len(own) for own in rows] == list(lengths)
    if is_whole:
        is_rising = all((np.diff(own) > 0).all() for own in rows)
        is_whole = is_rising and (np.sort(joined) == np.arange(len(joined))).all()
    if not is_whole:
        raise BundleError(
            f"{folder}/shards: the files item_rows.npy do not divide one corpus. Export again."
        )


def _arrays(bundle: Bundle) -> dict[str, np.ndarray]:
    """Returns the arrays of the users that are written as .npy, by name."""
    return {
        "user_vectors": bundle.user_vectors,
        "seen_offsets": bundle.seen.offsets,
        "seen_items": bundle.seen.values,
    }


def personal_columns(bundle: Bundle) -> dict[str, list[str]]:
    """Returns what a bundle holds about persons, for its manifest.

    Returns:
        File -> columns of it. Of the encoder these are user features that know each user by id.
    """
    by_id = []
    for name, feature in bundle.encoder.spec.user.items():
        fitted = bundle.encoder.fitted[feature.key]
        # A vocabulary holds the ids themselves, and not only what was learned of them.
        if "user_id" in feature.columns_read and fitted.vocabulary is not None:
            by_id.append(name)
    columns = {"encoder": by_id}
    if len(bundle.users):
        columns["users.parquet"] = bundle.users.column_names
        # Golden requests are made of known users.
        columns[GOLDEN] = ["user_id"]
        columns["user_vectors.npy"] = ["user_id"]
        columns["seen_items.npy"] = ["item_id"]
        if bundle.seen_events is not None:
            columns[EVENTS] = bundle.seen_events.column_names
    return {file: names for file, names in columns.items() if names}


def _sentence_models(encoder: Encoder) -> dict[str, dict[str, str]]:
    """Returns name and hash of each sentence model, by feature: new texts are embedded by it."""
    models = {}
    for feature in encoder.spec:
        model = feature.serving_model(encoder.fitted[feature.key])
        if model is not None:
            models[feature.location] = model
    return models


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        # ScaNN is missing on some platforms.
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@contextlib.contextmanager
def bundle_errors(folder: Path) -> Iterator[None]:
    """Turns all errors that damaged files end in into those of a bundle, with the cure."""
    try:
        yield
    except FolderError as error:
        raise BundleError(f"{error} Export again.") from error
    # Packages that are missing, and files that this user may not read, are other complaints.
    except (TwotowerError, ImportError, PermissionError):
        raise
    # Whole files, with hashes made anew, may hold anything: every library has its own errors for
    # that.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise BundleError(
            f"{folder} holds what no export writes ({type(error).__name__}: {reason}). Export "
            "again."
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        # Versions without a pointer: killed at the very first export, or half copied.
        if any(folder.glob("v-*/")):
            raise BundleError(
                f"{folder} has no file {POINTER!r} that names one of its versions: the first "
                "export has not finished, or the file is missing. Export again."
            )
        raise BundleError(
            f"{folder} is no bundle: it has no manifest.json. "
            f"Make one: {command('export', f'--workdir={folder.parent}')}"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a twotower bundle.")
    if manifest.get("format_version") != VERSION:
        raise BundleError(
            f"{path} has format version {manifest.get('format_version')!r}; "
            f"this twotower reads {VERSION}."
        )
    if manifest.get("sha256") != content_digest(manifest):
        raise BundleError(f"{path} was changed after it was written. Export again.")
    _check_names(path, manifest.get("files"))
    return manifest


def lost_index_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Returns the files of the index that are missing from a bundle."""
    names = [name for name in manifest["files"] if PurePosixPath(name).parent.name == INDEX]
    return [name for name in names if not (folder / name).exists()]


def load_part(
    files: Path, part: str, manifest: Mapping[str, Any], lost: Sequence[str], vectors: Vectors
) -> Index:
    """Returns an index of a bundle, or exact search where a file of it is lost.

    Args:
        files: Folder of the bundle's files.
        part: Folder of a shard in it; "" for the whole.
        manifest: Content of manifest.json.
        lost: Files of indices that are missing.
        vectors: Vectors that the index was built from.
    """
    folder = files / part
    lost = [name for name in lost if PurePosixPath(name).parent.parent == PurePosixPath(part)]
    if not lost:
        _check_index(folder, part, manifest)
        return load_index(folder / INDEX, vectors)
    # Slower, and the same items or better ones: no reason to refuse answers.
    logging.warning(
        "%s/%s has lost %d of its files (%s): the search is exact, and slower. Export again for "
        "an index.",
        folder,
        INDEX,
        len(lost),
        Path(lost[0]).name,
    )
    return ExactIndex(vectors, normalized=manifest["normalized"])


def _check_index(folder: Path, part: str, manifest: Mapping[str, Any]) -> None:
    """Refuses an index over other vectors, or over items of another model."""
    known = manifest["files"]
    info = json.loads((folder / INDEX / "index.json").read_text())
    # No scales on either side where vectors are float32.
    for name in INDEXED:
        if info.get(name) != known.get(str(PurePosixPath(part) / f"item_{name}.npy")):
            raise BundleError(
                f"{folder}/{INDEX} was built from other {name} than item_{name}.npy. Export again."
            )
    if info["model_version"] != manifest["model_version"]:
        raise BundleError(
            f"{folder}/{INDEX} holds items of model {info['model_version'][:12]}, but the user "
            f"tower is of model {manifest['model_version'][:12]}. Export again."
        )


def _check_names(manifest_file: Path, files: object) -> None:
    """Refuses a list of files that is none, or that names files outside the bundle."""
    if not isinstance(files, dict):
        raise BundleError(f"{manifest_file} lists no files. Export again.")
    for name, sha256 in files.items():
        path = PurePosixPath(name)
        # A manifest that somebody else wrote must not make us read other files of this machine.
        if path.is_absolute() or ".." in path.parts or not isinstance(sha256, str):
            raise BundleError(
                f"{manifest_file} names {name!r}, which is no file of the bundle. Do not use it."
            )


def _read_rows(path: Path, rows: int) -> pa.Table:
    """Reads a Parquet file of a known number of rows."""
    # `read_table` would load the datasets of Arrow, and pandas with them where it is installed.
    with pq.ParquetFile(path) as file:
        found = file.metadata.num_rows
        if found != rows:
            raise BundleError(
                f"{path} differs in length from its vectors ({found}, {rows}). Export again."
            )
        return file.read()


def _check_ids(path: Path, table: pa.Table, column: str) -> None:
    """Refuses a table whose ids are no texts, are missing, or come twice."""
    if table.column_names.count(column) != 1 or len(set(table.column_names)) != table.num_columns:
        raise BundleError(f"{path} needs each of its columns once, {column!r} too. Export again.")
    ids = table[column]
    if ids.type != pa.string() or ids.null_count:
        raise BundleError(f"{path}: {column!r} must hold a text in each row. Export again.")
    if len(ids.unique()) != len(ids):
        raise BundleError(f"{path}: {column!r} holds an id twice. Export again.")


def _check_vectors(path: Path, vectors: Vectors) -> None:
    """Refuses vectors that are not float32, or not finite."""
    if isinstance(vectors, Int8Vectors):
        _check_vectors(path.with_name("item_scales.npy"), vectors.scales[:, None])
        return
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise BundleError(f"{path} must hold float32 in two dimensions. Export again.")
    # By blocks: they are mapped into memory, not read.
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        if not np.isfinite(vectors[start : start + ROWS_AT_ONCE]).all():
            raise BundleError(f"{path} holds numbers that are not finite. Export again.")


def _check_counts(path: Path, counts: np.ndarray) -> None:
    """Refuses counts that are no whole numbers, or negative."""
    if counts.dtype != np.int64 or counts.ndim != 1 or counts.min(initial=0) < 0:
        raise BundleError(f"{path} must hold a count for each item. Export again.")


def _check_lists(folder: Path, seen: Ragged, num_items: int) -> None:
    """Refuses lists of items that do not lie one after the other, or name items there are not."""
    offsets = seen.offsets
    values = seen.values
    is_whole = offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
    if not is_whole or values.dtype != np.int32 or values.ndim != 1:
        raise BundleError(
            f"{folder}: seen_offsets.npy and seen_items.npy hold no lists. Export again."
        )
    # Offsets that do not rise would read the items of another user, or outside of the file.
    is_rising = offsets[0] == 0 and offsets[-1] == len(values) and (np.diff(offsets) >= 0).all()
    if not is_rising:
        raise BundleError(
            f"{folder}: seen_offsets.npy does not divide seen_items.npy. Export again."
        )
    if len(values) and not 0 <= values.min() <= values.max() < num_items:
        raise BundleError(f"{folder}: seen_items.npy names items that there are not. Export again.")


def _check_events(path: Path, events: pa.Table | None) -> None:
    """Refuses events whose columns are not those of an export."""
    if events is None:
        return
    # An index of a dictionary, or an offset of a text, may lead out of the file.
    events.validate(full=True)
    for field in events.schema:
        kind = field.type
        is_text = pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)
        wanted = {"timestamp": kind == pa.int64(), "event": is_text or pa.types.is_string(kind)}
        if not wanted.get(field.name, False):
            raise BundleError(
                f"{path}: column {field.name!r} of {kind} is no event's. Export again."
            )


def _check_lengths(bundle: Bundle, folder: Path) -> None:
    """Refuses parts that differ in length or width."""
    # Files of two bundles, each whole, with a manifest made anew would pass all other checks.
    manifest = bundle.manifest
    items = {len(bundle.items), len(bundle.vectors), len(bundle.counts), manifest["num_items"]}
    users = {len(bundle.users), len(bundle.user_vectors), len(bundle.seen)}
    item_width = bundle.vectors.shape[1]
    user_width = bundle.user_vectors.shape[1]
    pairs = {len(bundle.seen.values)}
    if bundle.seen_events is not None:
        pairs.add(len(bundle.seen_events))
    widths = {item_width, user_width, manifest["dim"]}
    for sizes, complaint in (
        (items, "items.parquet, item_vectors.npy and item_counts.npy differ in length"),
        (users, "users.parquet, user_vectors.npy and seen_*.npy differ in length"),
        (pairs, f"seen_items.npy and {EVENTS} differ in length"),
        (widths, "the vectors of users and items differ in width"),
    ):
        if len(sizes) > 1:
            listed = ", ".join(map(str, sorted(sizes)))
            raise BundleError(f"{folder}: {complaint} ({listed}). Export again.")


def _map_events(folder: Path) -> pa.Table | None:
    """Returns the events of the users' items, mapped into memory; None without any."""
    path = folder / EVENTS
    if not path.exists():
        return None
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _map_array(folder: Path, name: str) -> np.ndarray:
    """Returns an array that is mapped into memory, for reading."""
    path = folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an array without elements, of a bundle without users, cannot be mapped
        array = np.load(path, allow_pickle=False)
    # A plain array over the mapped file: indexing a `np.memmap` is slower by ten microseconds.
    return np.asarray(array)


def _stored_vectors(folder: Path, kind: str) -> Vectors:
    """Returns the item vectors in the type that `config.retrieval.vectors` names."""
    vectors = _map_array(folder, "item_vectors")
    # The configuration says how vectors are searched; others would be read as what they are not.
    if vectors.dtype != kind:
        raise BundleError(
            f"{folder}: item_vectors.npy holds {vectors.dtype}, but "
            f"config.retrieval.vectors={kind!r}. Export again."
        )
    if kind != "int8":
        return vectors
    try:
        return Int8Vectors(vectors, _map_array(folder, "item_scales"))
    except ValueError as error:
        raise BundleError(
            f"{folder}: item_vectors.npy and item_scales.npy do not go together: {error} "
            "Export again."
        ) from error


def indexed_vectors(config: Config, vectors: Vectors, counts: np.ndarray) -> Vectors:
    """Returns the vectors that the index was built from."""
    # The coordinate of popularity is computed anew from the counts, not stored.
    if not config.retrieval.popularity:
        return vectors
    coordinate, _ = popularity_coordinate(counts, vectors.shape[1])
    return append_coordinate(vectors, coordinate)


def _read_towers(folder: Path, weights: WeightArrays) -> TowerPrograms:
    """Returns the towers, of which nothing is on a device yet."""
    programs = {side: (folder / f"{side}_tower.stablehlo").read_bytes() for side in SIDES}
    return TowerPrograms(programs, weights, folder=folder)


def _check_towers(bundle: Bundle, folder: Path) -> None:
    """Loads the towers, and refuses those of another width than the vectors."""
    # The programs know their width only once they are loaded.
    width = bundle.towers.load().dim
    if width != bundle.manifest["dim"]:
        raise BundleError(
            f"{folder}: the vectors and the towers differ in width ({bundle.manifest['dim']}, "
            f"{width}). Export again."
        )
