"""Scores of pairs of a user and an item, from stored vectors alone.

Nothing here loads JAX, an index or the features: a few modules of the package's ground floor are
enough to match.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from twotower.core.arrow import as_matrix
from twotower.core.errors import BundleError, ConfigError, UnknownIdError, choose
from twotower.core.files import (
    check_files,
    content_digest,
    current_version,
    read_folder,
    read_json,
    write_folder,
)
from twotower.core.ids import IdForm, read_id, read_ids

KIND = "match"
SIDES = ("user", "item")


@runtime_checkable
class StoredVectors(Protocol):
    """The ids and vectors of a `Bundle`.

    Attributes:
        users: Column user_id, U rows.
        user_vectors: float32 [U, D].
        items: Column item_id, N rows.
        vectors: Item vectors [N, D], float32 or read as such.
        probability: {"scale": ..., "offset": ...} of a logit, or None; see `to_probability`.
    """

    users: pa.Table
    user_vectors: np.ndarray
    items: pa.Table
    vectors: Any
    probability: Mapping[str, float] | None


def to_probability(scores: np.ndarray, probability: Mapping[str, float] | None) -> np.ndarray:
    """Returns the probability that the label of each pair is 1: sigma(scale x score + offset).

    Args:
        scores: Scores of pairs, float32 [B]; NaN stays NaN.
        probability: {"scale": ..., "offset": ...} of a model that was trained on labels.

    Returns:
        float32 [B].

    Raises:
        ConfigError: The model was not, and its scores rank items alone.
    """
    if probability is None:
        raise ConfigError(
            "The scores of this model rank items and are no probabilities: its loss learned from "
            "no label. Train with config.objective.loss='binary_cross_entropy' and "
            "config.objective.label, without config.retrieval.dim."
        )
    logits = probability["scale"] * np.asarray(scores, np.float64) + probability["offset"]
    # 1 / (1 + exp(-x)) would overflow for a very negative logit.
    return np.exp(-np.logaddexp(0, -logits)).astype(np.float32)


class MatchModel:
    """Vectors of users and items by their ids, which score pairs of these.

    >>> ids = {"user": ["u"], "item": ["a", "b"]}
    >>> model = MatchModel(ids, {"user": np.ones((1, 2)), "item": np.eye(2)})
    >>> model(["u", "u"], ["a", "b"]).tolist()
    [1.0, 1.0]
    >>> model.set_embeddings("item", ["b", "c"], [[2, 0], [0, 3]])
    >>> model(["u", "u", "u"], ["a", "b", "c"]).tolist()
    [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        ids: Mapping[str, Sequence[str]],
        vectors: Mapping[str, ArrayLike],
        probability: Mapping[str, float] | None = None,
    ):
        """Checks that ids and vectors go together, and keeps them.

        Args:
            ids: {"user": U ids, "item": N ids}, distinct.
            vectors: {"user": float [U, D], "item": float [N, D]}, in the same order.
            probability: {"scale": ..., "offset": ...} of the logit, of a model that was trained on
                labels.

        Raises:
            ConfigError: They do not.
        """
        self._probability = probability
        self._vectors = {side: _read_vectors(side, vectors[side]) for side in SIDES}
        names = {side: _names(ids[side]) for side in SIDES}
        # As a log would have found the form, of which these are the ids.
        self._forms = {side: IdForm.find(_id_column(names[side])) for side in SIDES}
        self._rows = {side: _row_by_id(names[side]) for side in SIDES}
        # A repeated id would silently take the vector of its last row.
        for side in SIDES:
            distinct = len(self._rows[side])
            if not len(names[side]) == distinct == len(self._vectors[side]):
                raise ConfigError(
                    f"{len(names[side])} {side} ids, {distinct} of them distinct, do not go with "
                    f"{len(self._vectors[side])} vectors."
                )
        widths = [array.shape[1:] for array in self._vectors.values()]
        if widths[0] != widths[1]:
            raise ConfigError(f"user and item vectors differ in width: {widths}.")

    @classmethod
    def from_bundle(cls, bundle: StoredVectors) -> MatchModel:
        """Returns the model of the known users and the items of a bundle."""
        ids = {
            "user": bundle.users["user_id"].to_pylist(),
            "item": bundle.items["item_id"].to_pylist(),
        }
        vectors = {"user": bundle.user_vectors, "item": bundle.vectors}
        return cls(ids, vectors, bundle.probability)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> MatchModel:
        """Loads the model that `save` wrote, or that of a bundle.

        Args:
            folder: Folder of either; only the ids and vectors of a bundle are read.

        Raises:
            FolderError: The folder holds neither, or a file of it was changed.
            BundleError: The manifest of the bundle was changed.
        """
        files = current_version(folder)
        # A manifest is a bundle's; what `save` writes has none.
        if (files / "manifest.json").exists():
            return cls(*_read_bundle(files))
        state, arrays = read_folder(folder, KIND)
        ids = {side: _strings(arrays[f"{side}_bytes"], arrays[f"{side}_offsets"]) for side in SIDES}
        vectors = {side: arrays[f"{side}_vectors"] for side in SIDES}
        return cls(ids, vectors, state.get("probability"))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ids and vectors, whole or not at all."""
        # Ids as bytes and offsets: an array of Python texts could only be pickled.
        arrays = {}
        for side in SIDES:
            arrays[f"{side}_bytes"], arrays[f"{side}_offsets"] = _flat(list(self._rows[side]))
            arrays[f"{side}_vectors"] = self._vectors[side]
        state = {"dim": self.dim, "probability": self._probability}
        write_folder(folder, KIND, state, arrays)

    @property
    def dim(self) -> int:
        """Width of the vectors, D."""
        return self._vectors["item"].shape[1]

    def __call__(
        self,
        user_ids: Sequence[Any] | np.ndarray,
        item_ids: Sequence[Any] | np.ndarray,
        *,
        unknown: Literal["error", "nan"] = "error",
    ) -> np.ndarray:
        """Returns the score of each pair; see `match`."""
        return self.match(user_ids, item_ids, unknown=unknown)

    def set_embeddings(self, side: str, ids: Sequence[Any], vectors: ArrayLike) -> None:
        """Sets the vectors of users or items: known ids get new ones, other ids are added.

        The change is in memory; `save` keeps it. Each call copies the vectors of the side, so that
        many are set together. A call in another thread scores before the change or after it.

        Args:
            side: "user" or "item".
            ids: M ids, distinct.
            vectors: float [M, D], finite, in the order of `ids`. Where the model normalises its
                vectors, these must have length 1 as well.

        Raises:
            ConfigError: The side is unknown, an id is repeated, or the vectors are of another
                number or width or not finite; the model stays as it was.
        """
        # Everything is checked before anything is changed.
        old = choose(self._vectors, side, "side")
        names = self._read_ids(side, ids)
        new = _read_vectors(side, vectors)
        self._check_embeddings(side, names, new)
        known = self._rows[side]
        # New ids go to the end: rows that another thread has looked up stay right.
        added = [name for name in names if name not in known]
        rows = known | {name: len(known) + number for number, name in enumerate(added)}
        padding = np.zeros((len(added), self.dim), np.float32)
        # A copy, since the vectors of a bundle are mapped for reading.
        changed = np.concatenate([old, padding])
        changed[[rows[name] for name in names]] = new
        # Vectors first: no id may be found before it has one.
        self._vectors = self._vectors | {side: changed}
        self._rows = self._rows | {side: rows}

    def _check_embeddings(self, side: str, names: list[str], vectors: np.ndarray) -> None:
        expected = (len(names), self.dim)
        if vectors.shape != expected:
            raise ConfigError(
                f"vectors of shape {vectors.shape} do not go with {len(names)} {side} ids of "
                f"vectors {self.dim} wide: they must be of shape {expected}."
            )
        counts = Counter(names)
        repeated = [name for name, count in counts.items() if count > 1]
        # Which of them would count is for the caller to say.
        if repeated:
            raise ConfigError(
                f"{len(repeated)} {side} ids are given more than once, the first {repeated[0]!r}; "
                "each may have one vector."
            )
        # A NaN makes every score of that id one, and compares with nothing.
        is_bad = ~np.isfinite(vectors).all(axis=1)
        if is_bad.any():
            first = names[int(is_bad.argmax())]
            raise ConfigError(
                f"the vector of {side} {first!r} is not finite ({int(is_bad.sum())} of "
                f"{len(names)} are not)."
            )

    def match(
        self,
        user_ids: Sequence[Any] | np.ndarray,
        item_ids: Sequence[Any] | np.ndarray,
        *,
        unknown: Literal["error", "nan"] = "error",
    ) -> np.ndarray:
        """Returns the score of each pair, the dot product of their vectors, float32 [B].

        Args:
            user_ids: B user ids.
            item_ids: B item ids.
            unknown: Answer to an id without a vector: an error, or the score NaN.

        Raises:
            UnknownIdError: An id has no vector, and `unknown` is "error".
            ConfigError: The lists differ in length.
        """
        if unknown not in ("error", "nan"):
            raise ConfigError(f"unknown={unknown!r} must be 'error' or 'nan'.")
        # In the form of the log: 3 and "3" are one user where ids are numbers.
        users = self._read_ids("user", user_ids)
        items = self._read_ids("item", item_ids)
        if len(users) != len(items):
            raise ConfigError(
                f"match takes pairs: {len(users)} user ids do not go with {len(items)} item ids."
            )
        user_rows = self._find("user", users, unknown)
        item_rows = self._find("item", items, unknown)
        # With "error" all of them are.
        known = (user_rows >= 0) & (item_rows >= 0)
        user_vectors = self._vectors["user"][user_rows[known]]
        item_vectors = self._vectors["item"][item_rows[known]]
        scores = np.full(len(known), np.nan, np.float32)
        # Pair by pair: a product of matrices would score every user with every item.
        scores[known] = np.einsum("bd,bd->b", user_vectors, item_vectors)
        return scores

    def probability(
        self,
        user_ids: Sequence[Any] | np.ndarray,
        item_ids: Sequence[Any] | np.ndarray,
        *,
        unknown: Literal["error", "nan"] = "error",
    ) -> np.ndarray:
        """Returns the probability that the label of each pair is 1, float32 [B].

        It is there for a model that was trained on labels, by the loss binary_cross_entropy.

        Args:
            user_ids: B user ids.
            item_ids: B item ids.
            unknown: Answer to an id without a vector: an error, or NaN.

        Raises:
            ConfigError: The model was trained by another loss, or the lists differ in length.
            UnknownIdError: An id has no vector, and `unknown` is "error".
        """
        scores = self.match(user_ids, item_ids, unknown=unknown)
        return to_probability(scores, self._probability)

    def _read_ids(self, side: str, ids: Any) -> list[str]:
        return read_ids(ids, self._forms[side], f"{side} ids", self._rows[side])

    def _find(self, side: str, names: Sequence[str], unknown: str) -> np.ndarray:
        """Returns the row of each id, int64 [B]; -1 without one."""
        rows = np.array([self._rows[side].get(name, -1) for name in names], np.int64)
        missing = rows < 0
        if unknown == "error" and missing.any():
            first = names[int(missing.argmax())]
            raise UnknownIdError(
                f"{side} {first!r} has no vector ({int(missing.sum())} of {len(rows)} have none)."
            )
        return rows


def _read_bundle(
    folder: Path,
) -> tuple[dict[str, list[str]], dict[str, np.ndarray], Mapping[str, float] | None]:
    """Returns ids and vectors of both sides, and the scale of probabilities if there is one, after
    checking their files against the manifest."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    # Before any hash is believed: the manifest has one of itself.
    if "files" not in manifest or manifest.get("sha256") != content_digest(manifest):
        raise BundleError(f"{path} was changed after it was written. Export again.")
    digests = manifest["files"]
    # Only these are hashed and read: a bundle holds much more.
    read = {"user_vectors.npy", "users.parquet", "item_vectors.npy", "items.parquet"}
    # Only beside vectors that are stored as int8: multiples of their row's scale.
    read.add("item_scales.npy")
    names = [name for name in digests if PurePosixPath(name).name in read]
    check_files(folder, {name: digests[name] for name in names})
    ids = {}
    vectors = {}
    for side in SIDES:
        # Pairs are looked up by their ids: the items of shards need not be in their first order.
        homes = sorted(PurePosixPath(x).parent for x in names if x.endswith(f"{side}s.parquet"))
        parts = [_read_side(folder / home, side) for home in homes]
        ids[side] = [name for part_ids, _ in parts for name in part_ids]
        vectors[side] = np.concatenate([part for _, part in parts])
    return ids, vectors, manifest.get("probability")


def _read_side(folder: Path, side: str) -> tuple[list[str], np.ndarray]:
    """Returns the ids and the vectors of one side in a folder."""
    column = f"{side}_id"
    # One column: users may have many, and histories.
    with pq.ParquetFile(folder / f"{side}s.parquet") as file:
        ids = file.read(columns=[column])[column].to_pylist()
    vectors = np.load(folder / f"{side}_vectors.npy", allow_pickle=False)
    scales = folder / f"{side}_scales.npy"
    if scales.exists():
        # Whole float32 in memory: pairs are read at random, and int8 saves the disk alone here.
        vectors = vectors * np.load(scales, allow_pickle=False)[:, None]
    return ids, vectors


def _read_vectors(side: str, vectors: ArrayLike) -> np.ndarray:
    try:
        return as_matrix(vectors)
    except ValueError as error:
        raise ConfigError(f"{side} vectors must be rows of numbers: {error}.") from None


def _names(ids: Sequence[Any]) -> list[str]:
    """Returns the ids of a model as text; those that are text stay letter for letter."""
    # `str` of a text of NumPy makes it one of Python.
    return [str(x) if isinstance(x, str) else read_id(x, IdForm.TEXT, "id") for x in ids]


def _id_column(ids: Sequence[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(ids, pa.string())])


def _row_by_id(ids: Sequence[str]) -> dict[str, int]:
    return {name: row for row, name in enumerate(ids)}


def _flat(ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the UTF-8 of all ids, uint8, and the offset of each, int64: Arrow's layout."""
    encoded = [name.encode() for name in ids]
    lengths = [len(text) for text in encoded]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _strings(data: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Returns the ids whose text `_flat` joined."""
    array = pa.LargeStringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data.tobytes())
    )
    return array.to_pylist()
