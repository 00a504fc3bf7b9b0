"""Scores of pairs of a user and an item from stored vectors alone: no towers, no index, no
features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import UnknownIdError
from twotower.core.files import read_folder, write_folder
from twotower.retrieval.bundle import Bundle, load_bundle

KIND = "match"
SIDES = ("user", "item")


class MatchModel:
    """User id and item id to score.

    >>> model = MatchModel({"user": ["u"], "item": ["a", "b"]}, {"user": np.ones((1, 2)), "item": np.eye(2)})
    >>> model.match(["u", "u"], ["a", "b"]).tolist()
    [1.0, 1.0]
    """

    def __init__(self, ids: dict[str, Sequence[str]], vectors: dict[str, np.ndarray]):
        """Args:
        ids: {"user": U ids, "item": N ids}, distinct.
        vectors: {"user": [U, D], "item": [N, D]}, in the same order.
        """
        self._vectors = {side: np.asarray(vectors[side], np.float32) for side in SIDES}
        self._rows = {side: {name: row for row, name in enumerate(ids[side])} for side in SIDES}
        for side in SIDES:
            if not len(ids[side]) == len(self._rows[side]) == len(self._vectors[side]):
                raise ValueError(
                    f"{len(ids[side])} {side} ids, {len(self._rows[side])} of them distinct, do not go with "
                    f"{len(self._vectors[side])} vectors."
                )
        if self._vectors["user"].shape[1:] != self._vectors["item"].shape[1:]:
            raise ValueError(
                f"user and item vectors differ in width: {[x.shape[1] for x in self._vectors.values()]}."
            )

    @classmethod
    def of(cls, bundle: Bundle) -> MatchModel:
        """Of the known users and the items of a bundle."""
        ids = {
            "user": bundle.users["user_id"].to_pylist(),
            "item": bundle.items["item_id"].to_pylist(),
        }
        return cls(ids, {"user": bundle.user_vectors, "item": bundle.vectors})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> MatchModel:
        """What `save` wrote; or of the bundle in `folder`.

        Raises:
            FolderError, BundleError: the folder holds neither, or something of it was changed.
        """
        if (Path(folder) / "manifest.json").exists():
            return cls.of(load_bundle(folder))
        _, arrays = read_folder(folder, KIND)
        ids = {side: _strings(arrays[f"{side}_bytes"], arrays[f"{side}_offsets"]) for side in SIDES}
        return cls(ids, {side: arrays[f"{side}_vectors"] for side in SIDES})

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ids and vectors, whole or not at all."""
        arrays = {}
        for side in SIDES:
            arrays[f"{side}_bytes"], arrays[f"{side}_offsets"] = _flat(list(self._rows[side]))
            arrays[f"{side}_vectors"] = self._vectors[side]
        write_folder(folder, KIND, {"dim": self.dim}, arrays)

    @property
    def dim(self) -> int:
        return self._vectors["item"].shape[1]

    def match(
        self,
        user_ids: Sequence[Any] | np.ndarray,
        item_ids: Sequence[Any] | np.ndarray,
        *,
        unknown: str = "error",
    ) -> np.ndarray:
        """float32 [Q], the score of each pair.

        Args:
            unknown: what an id without a vector gives: "error", or "nan" as its score.

        Raises:
            UnknownIdError: an id has no vector, and `unknown` is "error".
            ValueError: the lists differ in length.
        """
        if unknown not in ("error", "nan"):
            raise ValueError(f"unknown={unknown!r} must be 'error' or 'nan'.")
        if len(user_ids) != len(item_ids):
            raise ValueError(
                f"match takes pairs: {len(user_ids)} user ids do not go with {len(item_ids)} item ids."
            )
        rows = {
            side: self._find(side, ids, unknown)
            for side, ids in (("user", user_ids), ("item", item_ids))
        }
        known = (rows["user"] >= 0) & (rows["item"] >= 0)
        scores = np.full(len(known), np.nan, np.float32)
        users, items = (self._vectors[side][rows[side][known]] for side in SIDES)
        scores[known] = np.einsum("qd,qd->q", users, items)
        return scores

    def _find(self, side: str, ids: Sequence[Any] | np.ndarray, unknown: str) -> np.ndarray:
        names = [str(name) for name in ids]
        rows = np.array([self._rows[side].get(name, -1) for name in names], np.int64)
        if unknown == "error" and (rows < 0).any():
            first, count = names[int((rows < 0).argmax())], int((rows < 0).sum())
            raise UnknownIdError(
                f"{side} {first!r} has no vector ({count} of {len(rows)} have none)."
            )
        return rows


def _flat(ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all ids, uint8, and where each begins, int64."""
    encoded = [name.encode() for name in ids]
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in encoded])]).astype(np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _strings(data: np.ndarray, offsets: np.ndarray) -> list[str]:
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data.tobytes())]
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, buffers[1], buffers[2]).to_pylist()
