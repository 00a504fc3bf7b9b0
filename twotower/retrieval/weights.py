"""The weights of the towers as files: one .npz of dense parameters, one .npy a table. No pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

# The fields of `Weights`, which itself cannot be imported without Flax: {"params", "tables",
# "batch_stats"}.
Arrays = Mapping[str, Mapping[str, Any]]
KEPT = ("user", "item", "log_temperature")


def of_towers(weights: Any) -> Arrays:
    """The arrays of `Weights` without what only training reads: heads, and the bias of a loss. Two
    models that embed alike are one model."""
    return weights._asdict() | {
        "params": {name: x for name, x in weights.params.items() if name in KEPT}
    }


def save_weights(weights: Arrays, folder: Path) -> None:
    """Writes params.npz and tables/NAME.npy."""
    dense = dict(_flat({"params": weights["params"], "batch_stats": weights["batch_stats"]}))
    np.savez(folder / "params.npz", **dense)
    (folder / "tables").mkdir()
    for name, table in weights["tables"].items():
        np.save(
            folder / "tables" / f"{quote(name, safe='')}.npy", np.asarray(table), allow_pickle=False
        )


def load_weights(folder: Path) -> Arrays:
    """What `save_weights` wrote, as NumPy arrays."""
    with np.load(folder / "params.npz", allow_pickle=False) as file:
        dense = _nested({name: file[name] for name in file.files})
    paths = sorted((folder / "tables").glob("*.npy"))
    tables = {unquote(path.stem): np.load(path, allow_pickle=False) for path in paths}
    return {
        "params": dense.get("params", {}),
        "tables": tables,
        "batch_stats": dense.get("batch_stats", {}),
    }


def model_version(weights: Arrays) -> str:
    """A hash of every weight, its name, type and shape."""
    digest = hashlib.sha256()
    for name, array in sorted(_flat(weights)):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            path = f"{prefix}{quote(name, safe='')}/"
            # A tower without parameters is an empty mapping, which a file of arrays holds as a path
            # that ends in "/".
            yield from _flat(value, path) if value else [(path, np.zeros(0))]
        else:
            yield prefix + quote(name, safe=""), np.asarray(value)


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = (unquote(part) for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if name:
            node[name] = array
    return tree
