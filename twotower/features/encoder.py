"""The Encoder: a specification fitted on training rows alone, and all that is needed to encode a
user or an item."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from twotower.core.fields import check_fields
from twotower.core.files import read_folder, write_folder
from twotower.data.interactions import fingerprint
from twotower.features import fitting
from twotower.features.base import SIDES
from twotower.features.encodings import (
    Fitted,
    Input,
    TableShape,
    encode_column,
    inputs_of,
    shape_of,
)
from twotower.features.history import encode_histories, read_items
from twotower.features.kinds import SentenceFeature
from twotower.features.spec import FeatureSpec, from_mappings
from twotower.features.vocabulary import Vocabulary

__all__ = ["Encoder", "Input", "TableShape"]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Turns columns into ids and numbers.

    Attributes:
        spec: what was fitted.
        fitted: (side, feature name) -> its vocabulary, vectors or statistics.
        context: user features whose column is one of the interactions, not of the users.
        fitted_on: `fingerprint` of the training rows.
    """

    spec: FeatureSpec
    fitted: Mapping[tuple[str, str], Fitted]
    context: tuple[str, ...]
    fitted_on: str

    @classmethod
    def fit(
        cls, spec: FeatureSpec, train: pa.Table, *, users: pa.Table, items: pa.Table
    ) -> Encoder:
        """Fits vocabularies and statistics.

        Values of users and items count once for each training row of that user or item; those
        without a training row count for nothing. Statistics of numbers are over the users, items or
        (context) rows of training.

        Args:
            spec: the features.
            train: training interactions with user_id, item_id and the columns of context features.
            users: user_id, unique, and the columns of user features; holds every user of `train`.
            items: item_id, likewise.

        Raises:
            ConfigError: a column is missing (the nearest is named), or pretrained vectors do not
                fit.
            ValueError: ids come twice, or are missing in `users` or `items`; a value cannot be read
                as its feature's type.
        """
        columns = fitting.training_columns(spec, train, users=users, items=items)
        newest = fitting.newest_timestamp(train)
        fitted = fitting.fit_columns(columns, newest)
        fitted |= fitting.fit_history(spec, fitted, newest)
        context = tuple(
            name
            for name in spec.user
            if ("user", name) in columns and columns["user", name].is_context
        )
        return cls(spec=spec, fitted=fitted, context=context, fitted_on=fingerprint(train)).reading(
            items
        )

    def reading(self, items: pa.Table) -> Encoder:
        """With what a history reads of `items` beside their ids; itself where it reads nothing
        else, or there is none."""
        if self.spec.history is None or not self.spec.history.reads[1:]:
            return self
        key = ("user", self.spec.history.name)
        encoded = self.encode("item", items, self.spec.history.reads)
        return dataclasses.replace(
            self,
            fitted={**self.fitted, key: read_items(self.spec.history, self.fitted[key], encoded)},
        )

    def encode(
        self, side: str, rows: pa.Table, features: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The features (all of the side by default) of N rows: int32 [N] or [N, L], or float32 [N,
        width]; of a history several arrays, see `twotower.features.history`.

        A column that `rows` lacks is missing in every row: half-known users and items can be
        encoded.

        Raises:
            ConfigError: a feature is unknown (the nearest is named), or a value cannot be read as
                its feature's type.
        """
        known = self.spec.side(side)
        names = list(known) if features is None else list(features)
        check_fields(dict.fromkeys(names), known, f"The encoder of the {side} tower")
        arrays: dict[str, np.ndarray] = {}
        for name in names:
            arrays |= self._encode(side, name, rows)
        return arrays

    def _encode(self, side: str, name: str, rows: pa.Table) -> dict[str, np.ndarray]:
        fitted = self.fitted[side, name]
        present = fitted.feature.column in rows.column_names
        column = (
            rows[fitted.feature.column] if present else pa.chunked_array([pa.nulls(rows.num_rows)])
        )
        if fitted.feature is self.spec.history:
            asked = (
                rows["timestamp"]
                if self.spec.history.request_gap and "timestamp" in rows.column_names
                else None
            )
            return encode_histories(self.spec.history, fitted, column, asked)
        return {name: encode_column(fitted, column)}

    @functools.cached_property
    def inputs(self) -> dict[str, dict[str, Input]]:
        """side -> array of `encode` -> how a tower reads it; of a history, what is read at each
        event."""
        items = {name: self.fitted["item", name] for name in self.spec.item}
        inputs: dict[str, dict[str, Input]] = {side: {} for side in SIDES}
        for side in SIDES:
            for name in self.spec.side(side):
                inputs[side] |= inputs_of(name, self.fitted[side, name], items)
        return inputs

    @functools.cached_property
    def tables(self) -> dict[str, TableShape]:
        """The embedding tables by name."""
        return {
            fitted.feature.table: shape_of(fitted)
            for fitted in self.fitted.values()
            if fitted.feature.has_table
        }

    @property
    def sentences(self) -> list[Fitted]:
        """The features whose new texts need a model."""
        return [
            fitted for fitted in self.fitted.values() if isinstance(fitted.feature, SentenceFeature)
        ]

    def save(self, folder: epath.PathLike) -> None:
        """Writes JSON and .npy files, whole or not at all."""
        state: dict[str, Any] = {
            "spec": self.spec.to_dict(),
            "context": list(self.context),
            "fitted_on": self.fitted_on,
            "features": [],
        }
        arrays: dict[str, np.ndarray] = {}
        names: dict[int, str] = {}
        for (side, name), fitted in self.fitted.items():
            entry = {"side": side, "name": name, "numbers": dict(fitted.numbers)}
            if fitted.vocabulary is not None:
                entry["vocabulary"] = names.setdefault(
                    id(fitted.vocabulary), f"vocabulary_{len(names)}"
                )
                entry["oov_rows"] = fitted.vocabulary.oov_rows
                arrays |= {
                    f"{entry['vocabulary']}_{part}": array
                    for part, array in fitted.vocabulary.arrays().items()
                }
            if fitted.vectors is not None:
                entry["vectors"] = f"vectors_{len(state['features'])}"
                arrays[entry["vectors"]] = fitted.vectors
            entry["reads"] = {
                of: f"reads_{len(state['features'])}_{i}" for i, of in enumerate(fitted.reads)
            }
            arrays |= {key: fitted.reads[of] for of, key in entry["reads"].items()}
            state["features"].append(entry)
        write_folder(folder, "encoder", state, arrays)

    @classmethod
    def load(cls, folder: epath.PathLike) -> Encoder:
        """The encoder that `save` wrote.

        Raises:
            FolderError: the folder holds something else, or a file is missing or corrupt.
        """
        state, arrays = read_folder(folder, "encoder")
        spec = from_mappings(state["spec"])
        vocabularies: dict[str, Vocabulary] = {}
        fitted = {}
        for entry in state["features"]:
            key, name = (entry["side"], entry["name"]), entry.get("vocabulary")
            if name and name not in vocabularies:
                parts = {part: arrays[f"{name}_{part}"] for part in ("bytes", "offsets")}
                vocabularies[name] = Vocabulary.from_arrays(parts, oov_rows=entry["oov_rows"])
            fitted[key] = Fitted(
                spec.side(entry["side"])[entry["name"]],
                vocabulary=vocabularies.get(name),
                vectors=arrays.get(entry.get("vectors")),
                numbers=entry["numbers"],
                reads={of: arrays[key] for of, key in entry.get("reads", {}).items()},
            )
        return cls(
            spec=spec, fitted=fitted, context=tuple(state["context"]), fitted_on=state["fitted_on"]
        )
