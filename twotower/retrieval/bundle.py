"""The bundle: everything that recommending needs, in one folder that proves what it is.

```
manifest.json    format, versions, metric, checkpoint step, hash of the weights, sha256 of every other file
config.json  encoder/  params.npz  tables/     the towers
item_vectors.npy  items.parquet                the corpus: vectors; ids and display columns, in the same order
users.parquet  seen_offsets.npy  seen_items.npy   raw features of known users, and their items, the latest last
index/                                         the index over the item vectors
```
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

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import twotower
from twotower.config import Config, from_dict
from twotower.data.encoder import Encoder
from twotower.data.folders import content_digest, digest
from twotower.retrieval.csr import Csr
from twotower.retrieval.scann import load_index, save_index
from twotower.retrieval.weights import load_weights, model_version, save_weights
from twotower.towers.two_tower import TwoTower, Weights

FORMAT, VERSION = "twotower-bundle", 1
PACKAGES = ("jax", "flax", "numpy", "pyarrow", "scann")


class BundleError(ValueError):
    """A bundle that is missing, changed, or made of parts that do not belong together."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        manifest: see the head of this file; {} before it is written.
        vectors: float32 [N, D].
        items: item_id and display columns, N rows.
        users: user_id and the raw columns of the user features, U rows.
        seen: for each user its items, distinct, the latest last.
        index: over `vectors`; see `twotower.retrieval.scann`.
    """

    config: Config
    encoder: Encoder
    model: TwoTower
    weights: Weights
    vectors: np.ndarray
    items: pa.Table
    users: pa.Table
    seen: Csr
    index: Any
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_bundle(bundle: Bundle, folder: Path, *, step: int) -> dict[str, Any]:
    """Writes `bundle` into the empty `folder`, and returns its manifest.

    Args:
        step: of the checkpoint that the weights come from.
    """
    (folder / "config.json").write_text(bundle.config.to_json(), encoding="utf-8")
    bundle.encoder.save(folder / "encoder")
    save_weights(bundle.weights, folder)
    np.save(folder / "item_vectors.npy", bundle.vectors, allow_pickle=False)
    pq.write_table(bundle.items, folder / "items.parquet")
    pq.write_table(bundle.users, folder / "users.parquet")
    np.save(folder / "seen_offsets.npy", bundle.seen.offsets, allow_pickle=False)
    np.save(folder / "seen_items.npy", bundle.seen.values, allow_pickle=False)
    # What the index was built from, so that it cannot be put beside other vectors or another user tower.
    version = model_version(bundle.weights)
    save_index(bundle.index, folder / "index", vectors=digest(folder / "item_vectors.npy"), model_version=version)
    manifest = {
        "format": FORMAT, "format_version": VERSION, "twotower": twotower.__version__, "packages": _packages(),
        "metric": "dot", "normalized": bundle.model.normalize, "dim": bundle.model.dim, "num_items": len(bundle.items),
        "step": step, "model_version": version,
        "files": {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()},
    }  # fmt: skip
    text = json.dumps(manifest | {"sha256": content_digest(manifest)}, indent=2, sort_keys=True)
    (folder / "manifest.json").write_text(text + "\n")
    return manifest


def load_bundle(folder: str | os.PathLike) -> Bundle:
    """Reads a bundle, after checking that every file is the one that was written.

    Raises:
        BundleError: the folder is no bundle, a file is missing or changed, or parts do not belong together.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _check_files(folder, manifest)
    weights = load_weights(folder)
    if model_version(weights) != manifest["model_version"]:
        raise BundleError(f"{folder} has weights of another model than its manifest says. Export again.")
    _check_index(folder, manifest)
    config = from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    encoder = Encoder.load(folder / "encoder")
    vectors = np.load(folder / "item_vectors.npy", allow_pickle=False)
    bundle = Bundle(
        config=config,
        encoder=encoder,
        model=TwoTower.build(config.model, encoder),
        weights=jax.device_put(weights),
        vectors=vectors,
        items=pq.read_table(folder / "items.parquet"),
        users=pq.read_table(folder / "users.parquet"),
        seen=Csr(*(np.load(folder / f"seen_{part}.npy", allow_pickle=False) for part in ("offsets", "items"))),
        index=load_index(folder / "index", vectors),
        manifest=manifest,
    )
    if not len(bundle.items) == len(vectors) == manifest["num_items"] or len(bundle.users) != len(bundle.seen):
        raise BundleError(f"{folder}: items.parquet, item_vectors.npy, users.parquet and seen_*.npy differ in length.")
    return bundle


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
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
    if manifest.pop("sha256", None) != content_digest(manifest):
        raise BundleError(f"{path} was changed after it was written.")
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, written in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle. Export again.")
        if digest(path) != written:
            raise BundleError(f"{path} was changed after the bundle was written: its sha256 is not the manifest's.")


def _check_index(folder: Path, manifest: Mapping[str, Any]) -> None:
    info = json.loads((folder / "index" / "index.json").read_text())
    if info["vectors"] != manifest["files"]["item_vectors.npy"]:
        raise BundleError(f"{folder}/index was built from other vectors than item_vectors.npy. Export again.")
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
