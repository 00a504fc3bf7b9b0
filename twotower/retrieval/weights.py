"""The weights of the towers as files: one .npz of dense parameters, one .npy a table. No pickle."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote, unquote

import numpy as np

from twotower.core.errors import BundleError

# The fields of `twotower.towers.two_tower.Weights` as a mapping, {"params", "tables",
# "batch_stats"}: the class itself cannot be imported without Flax, which servers need not have.
WeightArrays = Mapping[str, Mapping[str, Any]]
# Dense parameters that `embedding_weights` keeps. Heads and the bias of a loss are read by training
# alone.
EMBEDDING_PARAMS = ("user", "item", "log_temperature")


@runtime_checkable
class Weights(Protocol):
    """The part of `twotower.towers.two_tower.Weights` that this module reads."""

    @property
    def params(self) -> Mapping[str, Any]: ...

    def _asdict(self) -> dict[str, Any]: ...


def embedding_weights(weights: Weights) -> WeightArrays:
    """Returns the weights without those that only training reads.

    Two models that embed alike then have one version, whatever losses they were trained by.
    """
    params = {name: x for name, x in weights.params.items() if name in EMBEDDING_PARAMS}
    return weights._asdict() | {"params": params}


def save_weights(weights: WeightArrays, folder: Path) -> None:
    """Writes params.npz and tables/NAME.npy."""
    dense: dict[str, Any] = dict(_flat({name: weights[name] for name in ("params", "batch_stats")}))
    np.savez(folder / "params.npz", **dense)
    tables = folder / "tables"
    tables.mkdir()
    for name, table in weights["tables"].items():
        # Quoted: the name of a feature may hold a slash.
        path = tables / f"{quote(name, safe='')}.npy"
        np.save(path, np.asarray(table), allow_pickle=False)


def load_weights(folder: Path) -> WeightArrays:
    """Reads the weights that `save_weights` wrote, as NumPy arrays."""
    path = folder / "params.npz"
    with zipfile.ZipFile(path) as archive:
        # We compress nothing: a file that names more than it holds was made to fill the memory.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise BundleError(f"{path} is not as it was written. Export again.")
    with np.load(path, allow_pickle=False) as file:
        dense = _nested({name: file[name] for name in file.files})
    paths = sorted((folder / "tables").glob("*.npy"))
    tables = {unquote(path.stem): np.load(path, allow_pickle=False) for path in paths}
    return {
        "params": dense.get("params", {}),
        "tables": tables,
        "batch_stats": dense.get("batch_stats", {}),
    }


def model_version(weights: WeightArrays) -> str:
    """Returns a hash of every weight, its name, type and shape."""
    digest = hashlib.sha256()
    # Sorted: a version must not depend on the order in which a mapping was filled.
    for name, array in sorted(_flat(weights)):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # A memoryview without elements cannot be cast.
        if array.size:
            digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays of nested mappings by their paths, such as "params/user/dense/kernel"."""
    for name, value in tree.items():
        path = prefix + quote(name, safe="")
        if not isinstance(value, Mapping):
            yield path, np.asarray(value)
        elif value:
            yield from _flat(value, f"{path}/")
        else:
            # A tower without parameters is an empty mapping, which a file of arrays holds as a path
            # that ends in "/".
            yield f"{path}/", np.zeros(0)


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the nested mappings that `_flat` took apart."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = (unquote(part) for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        # A path without a last name only made the empty mapping: see `_flat`.
        if name:
            node[name] = array
    return tree
