"""The bundle: everything that recommending needs, in one folder that proves what it is.

```
manifest.json    format, versions, metric, checkpoint step, hash of the weights, sentence encoders, sha256 of every other file
config.json  encoder/  params.npz  tables/     what the towers read, and their weights
user_tower.stablehlo  item_tower.stablehlo     the towers, as programs that need neither Flax nor the model's code
item_vectors.npy  items.parquet  item_counts.npy   the corpus in one order: vectors; ids and display columns; training rows
item_scales.npy                                beside vectors stored as int8: see `twotower.index.int8`
user_vectors.npy  users.parquet  seen_offsets.npy  seen_items.npy   known users: vectors; raw features; items, the latest last
index/                                         the index over the item vectors
```
Vectors are mapped into memory, not read. Changes made to a loaded bundle are kept beside it: see
`twotower.retrieval.live.log`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import twotower
from twotower.config import Config, from_dict
from twotower.core.errors import BundleError, FolderError
from twotower.core.files import POINTER, content_digest, current_version, digest
from twotower.core.ragged import Ragged
from twotower.features.base import SIDES
from twotower.features.encoder import Encoder
from twotower.features.sentence import SentenceFeature, warn_of_missing_extra
from twotower.index.build import load_index, save_index
from twotower.index.int8 import Int8Vectors, Vectors
from twotower.index.popularity import append_coordinate, popularity_coordinate
from twotower.retrieval.served import Towers
from twotower.retrieval.weights import load_weights, model_version, save_weights

FORMAT, VERSION = "twotower-bundle", 2
PACKAGES = ("jax", "numpy", "pyarrow", "scann")
INDEXED = ("vectors", "scales")  # item_*.npy that the index was built from


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory.

    Attributes:
        vectors: float32 [N, D], or int8 that is read as such.
        items: item_id and display columns, N rows.
        counts: int64 [N], training rows of each item.
        user_vectors: float32 [U, D].
        users: user_id and the raw columns of the user features, U rows.
        seen: for each user its items, distinct, the latest last.
        index: over `vectors`, with one more popularity_coordinate where `config.retrieval.popularity` says so;
            see `retrieval.scann`.
        manifest: see the head of this file, with its own "sha256"; {} before it is written.
        folder: where it was loaded from; None where it only is in memory.
        version: the folder of its files: inside `folder`, or `folder` itself.
    """

    config: Config
    encoder: Encoder
    towers: Towers
    vectors: Vectors
    items: pa.Table
    counts: np.ndarray
    user_vectors: np.ndarray
    users: pa.Table
    seen: Ragged
    index: Any
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    version: Path | None = None

    @property
    def normalized(self) -> bool:
        """Whether vectors have length 1."""
        return self.config.model.normalize


def write_bundle(bundle: Bundle, folder: Path, *, step: int, **more: Any) -> dict[str, Any]:
    """Writes `bundle` into the empty `folder`, and returns its manifest.

    Args:
        step: of the checkpoint that the weights come from.
        more: what else the manifest is to say.
    """
    (folder / "config.json").write_text(bundle.config.to_json(), encoding="utf-8")
    bundle.encoder.save(folder / "encoder")
    save_weights(bundle.towers.weights, folder)
    for side in SIDES:
        (folder / f"{side}_tower.stablehlo").write_bytes(bundle.towers.programs[side])
    arrays = {
        "item_counts": bundle.counts,
        "user_vectors": bundle.user_vectors,
        "seen_offsets": bundle.seen.offsets,
        "seen_items": bundle.seen.values,
    }
    if isinstance(bundle.vectors, Int8Vectors):
        arrays |= {"item_vectors": bundle.vectors.codes, "item_scales": bundle.vectors.scales}
    else:
        arrays |= {"item_vectors": bundle.vectors}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    pq.write_table(bundle.items, folder / "items.parquet")
    pq.write_table(bundle.users, folder / "users.parquet")
    # What the index was built from, so that it cannot be put beside other vectors or another user
    # tower.
    version = model_version(bundle.towers.weights)
    built_from = {
        name: digest(folder / f"item_{name}.npy") for name in INDEXED if f"item_{name}" in arrays
    }
    save_index(bundle.index, folder / "index", model_version=version, **built_from)
    manifest = {
        "format": FORMAT,
        "format_version": VERSION,
        "twotower": twotower.__version__,
        "packages": _packages(),
        "metric": "dot",
        "normalized": bundle.normalized,
        "dim": bundle.towers.dim,
        "num_items": len(bundle.items),
        "step": step,
        "model_version": version,
        "sentence_models": _sentence_models(bundle.encoder),
        **more,
        "files": {
            str(path.relative_to(folder)): digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    manifest["sha256"] = content_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def _sentence_models(encoder: Encoder) -> dict[str, dict[str, str]]:
    """What a server must have to embed texts that are new: feature -> the name of its model, and
    the SHA-256 of its files."""
    models = {}
    for feature in encoder.spec:
        if isinstance(feature, SentenceFeature):
            sha256 = encoder.fitted[feature.key].statistics["model"]
            models[feature.location] = {"model": feature.model, "sha256": sha256}
    return models


def load_bundle(folder: str | os.PathLike) -> Bundle:
    """Reads a bundle, after checking that every file is the one that was written.

    Raises:
        BundleError: the folder is no bundle, a file is missing or changed, or parts do not belong
            together.
    """
    home = Path(folder).absolute()
    try:
        folder = current_version(home)
    except FolderError as error:
        raise BundleError(f"{error} Export again.") from error
    manifest = _read_manifest(folder)
    _check_files(folder, manifest)
    weights = load_weights(folder)
    if model_version(weights) != manifest["model_version"]:
        raise BundleError(
            f"{folder} has weights of another model than its manifest says. Export again."
        )
    _check_index(folder, manifest)
    arrays = {
        name: _mapped(folder, name)
        for name in ("item_counts", "user_vectors", "seen_offsets", "seen_items")
    }
    config = from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    vectors = _stored_vectors(folder, config.retrieval.vectors)
    bundle = Bundle(
        config=config,
        encoder=Encoder.load(folder / "encoder"),
        towers=_load_towers(folder, weights),
        vectors=vectors,
        items=pq.read_table(folder / "items.parquet"),
        counts=arrays["item_counts"],
        user_vectors=arrays["user_vectors"],
        users=pq.read_table(folder / "users.parquet"),
        seen=Ragged(arrays["seen_offsets"], arrays["seen_items"]),
        index=load_index(folder / "index", _indexed(config, vectors, arrays["item_counts"])),
        manifest=manifest,
        folder=home,
        version=folder,
    )
    _check_lengths(bundle, manifest)
    for feature in bundle.encoder.spec:
        if isinstance(feature, SentenceFeature):
            warn_of_missing_extra(feature)
    return bundle


def _mapped(folder: Path, name: str) -> np.ndarray:
    # A plain array over the mapped file: indexing a `np.memmap` is slower by ten microseconds.
    return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))


def _stored_vectors(folder: Path, kind: str) -> Vectors:
    """The item vectors, stored as `config.retrieval.vectors` says."""
    vectors = _mapped(folder, "item_vectors")
    if vectors.dtype != kind:
        raise BundleError(
            f"{folder}: item_vectors.npy holds {vectors.dtype}, but config.retrieval.vectors={kind!r}. Export again."
        )
    if kind != "int8":
        return vectors
    try:
        return Int8Vectors(vectors, _mapped(folder, "item_scales"))
    except ValueError as error:
        raise BundleError(
            f"{folder}: item_vectors.npy and item_scales.npy do not go together: {error} Export again."
        ) from error


def _indexed(config: Config, vectors: Vectors, counts: np.ndarray) -> Vectors:
    """The vectors that the index was built from."""
    return (
        append_coordinate(vectors, popularity_coordinate(counts, vectors.shape[1])[0])
        if config.retrieval.popularity
        else vectors
    )


def _load_towers(folder: Path, weights: Any) -> Towers:
    programs = {side: (folder / f"{side}_tower.stablehlo").read_bytes() for side in SIDES}
    try:
        return Towers(programs, weights)
    except ImportError:
        raise
    # JAX raises many kinds for a program of a version that it does not read; the cause is kept.
    except Exception as error:
        raise BundleError(
            f"{folder}: the towers (*.stablehlo) cannot be read by this JAX: {error}. Export again."
        ) from error


def _check_lengths(bundle: Bundle, manifest: Mapping[str, Any]) -> None:
    items = {len(bundle.items), len(bundle.vectors), len(bundle.counts), manifest["num_items"]}
    users = {len(bundle.users), len(bundle.user_vectors), len(bundle.seen)}
    widths = {
        bundle.vectors.shape[1],
        bundle.user_vectors.shape[1],
        bundle.towers.dim,
        manifest["dim"],
    }
    for found, files in (
        (items, "items.parquet, item_vectors.npy and item_counts.npy differ in length"),
        (users, "users.parquet, user_vectors.npy and seen_*.npy differ in length"),
        (widths, "the vectors and the towers differ in width"),
    ):
        if len(found) > 1:
            raise BundleError(
                f"{bundle.folder}: {files} ({', '.join(map(str, sorted(found)))}). Export again."
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        if any(folder.glob("v-*/")):
            raise BundleError(
                f"{folder} has no file {POINTER!r} that names one of its versions: the first export "
                "has not finished, or the file is missing. Export again."
            )
        raise BundleError(
            f"{folder} is no bundle: it has no manifest.json. "
            f"Make one: python -m experiments.export --workdir={folder.parent}"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise BundleError(f"{path} is corrupt: it is not JSON ({error}).") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a twotower bundle.")
    if manifest.get("format_version") != VERSION:
        raise BundleError(
            f"{path} has format version {manifest.get('format_version')!r}; this twotower reads {VERSION}."
        )
    if manifest.get("sha256") != content_digest(manifest):
        raise BundleError(f"{path} was changed after it was written.")
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, written in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle. Export again.")
        if digest(path) != written:
            raise BundleError(
                f"{path} was changed after the bundle was written: its sha256 is not the manifest's."
            )


def _check_index(folder: Path, manifest: Mapping[str, Any]) -> None:
    info = json.loads((folder / "index" / "index.json").read_text())
    for name in INDEXED:
        if info.get(name) != manifest["files"].get(f"item_{name}.npy"):
            raise BundleError(
                f"{folder}/index was built from other {name} than item_{name}.npy. Export again."
            )
    if info["model_version"] != manifest["model_version"]:
        raise BundleError(
            f"{folder}/index holds items of model {info['model_version'][:12]}, but the user tower is of model "
            f"{manifest['model_version'][:12]}. Export again."
        )


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
