"""The encoder: a specification fitted on training rows alone, which encodes users and items."""

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
from twotower.data.contract import Contract
from twotower.features.base import Fitted, Key
from twotower.features.inputs import Input, TableShape
from twotower.features.spec import FeatureSpec, from_mappings
from twotower.features.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Turns columns of users and items into ids and numbers.

    Attributes:
        spec: The features.
        fitted: (side, feature name) -> the state fitted for that feature.
        context: Names of user features whose column is in the interactions, not in the users table.
        fitted_on: `fingerprint` of the training rows.
        contract: Forms in which the log writes ids, times and numbers.
    """

    spec: FeatureSpec
    fitted: Mapping[Key, Fitted]
    context: tuple[str, ...]
    fitted_on: str
    contract: Contract = Contract()

    def encode(
        self, side: str, rows: pa.Table, features: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Encodes the features of N users or items.

        A column that `rows` lacks is missing in every row: half-known users and items can be
        encoded.

        Args:
            side: Tower that reads the features, "user" or "item".
            rows: Raw columns of N users or items.
            features: Names of the features to encode; all of the side by default.

        Returns:
            Array name -> ids int32 [N] or [N, L], or numbers float32 [N, width]. An array has the
            name of its feature, but for a history, which is several arrays; see
            `twotower.features.history`.

        Raises:
            ConfigError: A feature is unknown (the nearest is named), or a value cannot be read as
                its feature's type.
        """
        known = self.spec.side(side)
        if features is None:
            features = list(known)
        # A misspelt name is refused before the first column is read.
        check_fields(dict.fromkeys(features), known, f"The encoder of the {side} tower")
        arrays = {}
        for name in features:
            arrays |= known[name].encode_rows(self.fitted[side, name], rows)
        return arrays

    @property
    def inputs(self) -> dict[str, dict[str, Input]]:
        """Side -> array of `encode` -> how a tower reads it."""
        return self._inputs

    @property
    def tables(self) -> dict[str, TableShape]:
        """The embedding tables by name."""
        return self._tables

    @functools.cached_property
    def _inputs(self) -> dict[str, dict[str, Input]]:
        items: dict[str, Input] = {}
        for feature in self.spec.item.values():
            items |= feature.inputs(self.fitted[feature.key], {})
        # Users after items, whose inputs a history reads at each event.
        users: dict[str, Input] = {}
        for feature in self.spec.user.values():
            users |= feature.inputs(self.fitted[feature.key], items)
        return {"user": users, "item": items}

    @functools.cached_property
    def _tables(self) -> dict[str, TableShape]:
        tables = {}
        # Features that share a table agree on its shape; `FeatureSpec` has checked it.
        for feature in self.spec:
            shape = feature.table_shape(self.fitted[feature.key])
            if shape is not None:
                tables[feature.table] = shape
        return tables

    def save(self, folder: epath.PathLike) -> None:
        """Writes JSON and .npy files, whole or not at all."""
        entries = []
        arrays: dict[str, np.ndarray] = {}
        vocabulary_names: dict[int, str] = {}
        for number, ((side, name), fitted) in enumerate(self.fitted.items()):
            # Arrays go to .npy files, and the JSON names them.
            entry: dict[str, Any] = {
                "side": side,
                "name": name,
                "numbers": dict(fitted.statistics),  # the key that saved encoders have
            }
            vocabulary = fitted.vocabulary
            if vocabulary is not None:
                # A vocabulary that features share is written once.
                new_name = f"vocabulary_{len(vocabulary_names)}"
                # By identity: equal vocabularies of two tables are two tables all the same.
                vocabulary_name = vocabulary_names.setdefault(id(vocabulary), new_name)
                entry["vocabulary"] = vocabulary_name
                entry["oov_rows"] = vocabulary.oov_rows
                for part, array in vocabulary.arrays().items():
                    arrays[f"{vocabulary_name}_{part}"] = array
            if fitted.vectors is not None:
                entry["vectors"] = f"vectors_{number}"
                arrays[f"vectors_{number}"] = fitted.vectors
            entry["reads"] = {}
            for position, (read, array) in enumerate(fitted.reads.items()):
                entry["reads"][read] = f"reads_{number}_{position}"
                arrays[f"reads_{number}_{position}"] = array
            entries.append(entry)
        state = {
            "spec": self.spec.to_dict(),
            "context": list(self.context),
            "fitted_on": self.fitted_on,
            "features": entries,
            "contract": self.contract.to_dict(),
        }
        # One write for all: a killed process leaves the old encoder or the new one.
        write_folder(folder, "encoder", state, arrays)

    @classmethod
    def load(cls, folder: epath.PathLike) -> Encoder:
        """Reads the encoder that `save` wrote.

        Raises:
            FolderError: The folder holds something else, or a file is missing or corrupt.
        """
        # Mapped: those of hundreds of millions of ids would be most of a server's memory.
        state, arrays = read_folder(folder, "encoder", mapped="vocabulary_")
        vocabularies: dict[str, Vocabulary] = {}
        fitted = {}
        for entry in state["features"]:
            vocabulary = None
            name = entry.get("vocabulary")
            if name is not None:
                # Features that shared a vocabulary share it again after loading.
                if name not in vocabularies:
                    parts = {}
                    for part in ("bytes", "offsets", "hashes", "order"):
                        if f"{name}_{part}" in arrays:
                            parts[part] = arrays[f"{name}_{part}"]
                    vocabularies[name] = Vocabulary.from_arrays(parts, oov_rows=entry["oov_rows"])
                vocabulary = vocabularies[name]
            reads = entry.get("reads", {})  # encoders of before there were histories have none
            fitted[entry["side"], entry["name"]] = Fitted(
                vocabulary=vocabulary,
                vectors=arrays.get(entry.get("vectors")),
                statistics=entry["numbers"],
                reads={read: arrays[array] for read, array in reads.items()},
            )
        # All fields are in the file, so that a new default does not change an old encoder.
        spec = from_mappings(state["spec"])
        # Encoders of before there were contracts have none.
        contract = Contract.from_dict(state.get("contract", {}))
        return cls(spec, fitted, tuple(state["context"]), state["fitted_on"], contract)
