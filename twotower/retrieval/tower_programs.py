"""The towers as StableHLO programs, which embed users and items without the model's code or Flax,
and their weights as files.

A program is exported for CPU, CUDA and TPU at once, with the batch size left open. The weights are
its arguments, so that a program is a few kilobytes and the weights are kept once: one .npz of dense
parameters, one .npy a table, and no pickle.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import quote, unquote

import numpy as np

from twotower.core.arrays import next_power_of_two, pad_rows
from twotower.core.errors import BundleError
from twotower.core.fork import check_fork
from twotower.core.progress import progress

# Loaded where a tower is run or exported: the vectors of known users are stored, and JAX takes
# longer to load than their lists to make.
if TYPE_CHECKING:
    import jax

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = 4_096  # rows embedded at once; the batches of `twotower.retrieval.embed` are as long

# The fields of `twotower.towers.two_tower.Weights` as a mapping, {"params", "tables",
# "batch_stats"}: the class itself cannot be imported without Flax, which servers need not have.
WeightArrays = Mapping[str, Mapping[str, Any]]
# Dense parameters that `embedding_weights` keeps. Heads and the bias of a loss are read by training
# alone.
EMBEDDING_PARAMS = ("user", "item", "log_temperature")
# (arrays of the weights, encoded features [B, ...]) -> vectors [B, D]
Embed = Callable[[Any, Any], "jax.Array"]


def export_tower(embed: Embed, weights: WeightArrays, example: Mapping[str, np.ndarray]) -> bytes:
    """Returns the program of one tower.

    Args:
        embed: Function of the weights and the features that JAX can trace.
        weights: Arrays of the weights; only their shapes and types are used.
        example: Encoded features of any number of rows, likewise.
    """
    import jax
    import jax.export

    # The batch size stays a symbol: one program embeds one user, and a batch of thousands.
    (batch,) = jax.export.symbolic_shape("b")
    features = {
        name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in example.items()
    }
    arrays = jax.tree.map(_shape_of, dict(weights))
    export = jax.export.export(jax.jit(embed), platforms=PLATFORMS)
    program = export(arrays, features)
    return bytes(program.serialize())


class LoadedTowers(NamedTuple):
    """Programs and weights on the default device.

    Attributes:
        calls: Side -> the function of weights and features.
        arrays: Weights.
        dim: Width of the vectors, D.
    """

    calls: Mapping[str, Callable[[Any, Any], jax.Array]]
    arrays: Any
    dim: int


class TowerPrograms:
    """Both programs and their weights, on the device from the first use on.

    Attributes:
        programs: {"user": ..., "item": ...}, as `export_tower` returns them.
        weights: Weights as NumPy arrays.
    """

    def __init__(
        self, programs: Mapping[str, bytes], weights: WeightArrays, *, folder: Path | None = None
    ):
        """Keeps the programs and the weights; `load` reads them.

        Args:
            programs: {"user": ..., "item": ...}, as `export_tower` returns them.
            weights: Weights that the programs take, as NumPy arrays.
            folder: Folder that they come from, for messages.
        """
        # As they came: writing the bundle again must not change a byte.
        self.programs = programs
        self.weights = weights
        self._folder = folder
        self._loaded: LoadedTowers | None = None

    @property
    def dim(self) -> int:
        """Width of the vectors, D."""
        return self.load().dim

    def load(self) -> LoadedTowers:
        """Reads the programs and puts the weights on the default device, where that is not done.

        Raises:
            BundleError: This JAX cannot read a program.
            ForkError: The process was forked from one that had used JAX.
        """
        check_fork()
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> LoadedTowers:
        import jax

        try:
            read = {side: _read_program(bytes(x)) for side, x in self.programs.items()}
        # JAX raises many kinds for a program of a version that it does not read; the cause is kept.
        except Exception as error:
            raise BundleError(
                f"{self._folder or 'Bundle'}: the towers (*.stablehlo) cannot be read by this JAX: "
                f"{error}. Export again."
            ) from error
        calls = {side: call for side, (call, _) in read.items()}
        # Once: passing NumPy arrays would copy the tables to the device for every call.
        return LoadedTowers(calls, jax.device_put(dict(self.weights)), read["user"][1])

    def embed(
        self, side: str, features: Mapping[str, np.ndarray], *, batch: int = BATCH
    ) -> np.ndarray:
        """Returns the vectors of encoded features, float32 [N, D].

        Args:
            side: "user" or "item".
            features: Encoded features, [N, ...] each.
            batch: Rows embedded at once. A last part is padded to a power of two, so that few
                shapes are compiled.
        """
        loaded = self.load()
        count = len(next(iter(features.values())))
        # A request of one user needs no blocks.
        if count == 1:
            return np.array(loaded.calls[side](loaded.arrays, dict(features)))
        vectors = np.zeros((count, loaded.dim), np.float32)
        starts = range(0, count, batch)
        for start in progress(starts, total=len(starts), what=f"Embedding {side}s"):
            rows = min(batch, count - start)
            size = min(batch, next_power_of_two(rows))
            stop = start + rows
            part = {name: values[start:stop] for name, values in features.items()}
            # Padding by nothing would still copy: of one user that costs more than the tower.
            if rows < size:
                part = {name: pad_rows(values, size) for name, values in part.items()}
            embedded = loaded.calls[side](loaded.arrays, part)
            vectors[start : start + rows] = np.asarray(embedded)[:rows]
        return vectors

    def warm(self, side: str, features: Mapping[str, np.ndarray], *, up_to: int) -> list[int]:
        """Compiles the program of a tower for each size that `embed` pads to.

        Args:
            side: "user" or "item".
            features: Encoded features of one row, [1, ...] each.
            up_to: Greatest number of rows.

        Returns:
            The sizes, powers of two.
        """
        sizes = [1]
        while sizes[-1] < min(up_to, BATCH):
            sizes.append(2 * sizes[-1])
        for size in sizes:
            self.embed(side, {name: np.repeat(x, size, axis=0) for name, x in features.items()})
        return sizes


# A new version of a bundle mostly has the programs of the one before and other weights: they are
# neither read nor compiled again. The oldest go, since a process may load bundles without end.
@functools.lru_cache(maxsize=16)
def _read_program(program: bytes) -> tuple[Callable[[Any, Any], jax.Array], int]:
    """Returns the function of weights and features that a program is, and the width of its
    vectors."""
    import jax
    import jax.export

    exported = jax.export.deserialize(bytearray(program))
    # Compiled once a shape; without `jit` each call would be prepared anew.
    return jax.jit(exported.call), exported.out_avals[0].shape[-1]


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


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    import jax

    return jax.ShapeDtypeStruct(np.shape(array), np.asarray(array).dtype)


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
