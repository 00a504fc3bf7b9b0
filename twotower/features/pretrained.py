"""Vectors of another model, read by id from a .npy or a Parquet file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.arrow import is_list, pc
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.features.base import Feature, Fitted, Input, TableShape, TrainingColumn
from twotower.features.vocabulary import Vocabulary, as_strings

# Ids that an error message names.
_NAMED_IDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedFeature(Feature):
    """The vector that a file holds for the id in `column`.

    Attributes:
        path: File of the vectors [V, E]: a .npy file, or a Parquet file that has `vector_column`
            and `id_column`.
        ids: Text file with the ids of the rows of a .npy file, one a line.
        id_column: Column of ids of a Parquet file.
        vector_column: Column of lists of numbers of a Parquet file.
        frozen: Whether to leave the vectors as they are; otherwise they are the initial rows of a
            table that is trained.
        projection: Width of a dense layer between the vector and the tower; 0 for none.
        missing: Treatment of users or items without a vector: "error", or "zeros" (with a flag
            after a frozen vector).
        oov_rows: Number of rows of a trained table for ids without a vector.
        embedding_size: Width E; 0 for the width of the file.
    """

    path: str
    ids: str = ""
    id_column: str = "id"
    vector_column: str = "vector"
    frozen: bool = True
    projection: int = 0
    missing: Literal["error", "zeros"] = "error"
    oov_rows: int = 8
    embedding_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(0, "projection")
        self._check_at_least(1, "oov_rows")
        is_npy = self.path.endswith(".npy")
        is_parquet = self.path.endswith(".parquet")
        self._check(is_npy or is_parquet, "path", "a .npy or .parquet file")
        # A .npy file has no column for ids; in a Parquet file they lie beside the vectors.
        if is_npy:
            self._check(bool(self.ids), "ids", "the file with the id of each row")
        else:
            self._check(not self.ids, "ids", "empty for a .parquet file")

    @property
    def has_table(self) -> bool:
        # Frozen vectors are inputs like numbers; trained ones are rows to start from.
        return not self.frozen

    @property
    def _min_embedding_size(self) -> int:
        # 0 stands for the width of the file, which is not read yet.
        return 0

    @property
    def _has_missing_flag(self) -> bool:
        return self.missing == "zeros"

    def fit(self, column: TrainingColumn) -> Fitted:
        # All ids of the file are kept: an item that comes later may have a vector already.
        vocabulary, vectors = read_vectors(self)
        self._check_missing(vocabulary, column.all_values)
        return Fitted(vocabulary=vocabulary, vectors=vectors)

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        """Encodes ids as rows of the trained table, or as the frozen vectors.

        With missing="zeros" a frozen vector has one more number: 1 for an id without a vector.
        """
        vocabulary = fitted.require_vocabulary()
        rows = vocabulary.rows(column)
        # A table is looked up inside the tower.
        if not self.frozen:
            return rows
        # Rows before the first known id are those of null and of unknown ids.
        known = rows - vocabulary.first
        missing = known[:, None] < 0
        # The first vector stands in for those that are missing, and is replaced by zeros below.
        vectors = fitted.require_vectors()[np.maximum(known, 0)]
        vectors = np.where(missing, np.float32(0), vectors)
        if not self._has_missing_flag:
            return vectors
        return np.append(vectors, missing.astype(np.float32), axis=1)

    def input(self, fitted: Fitted) -> Input:
        if not self.frozen:
            return Input(table=self.table, projection=self.projection, oov_rows=self.oov_rows)
        # A bool counts as one number.
        width = fitted.require_vectors().shape[1] + self._has_missing_flag
        return Input(width=width, projection=self.projection)

    def table_shape(self, fitted: Fitted) -> TableShape | None:
        if self.frozen:
            return None
        # Ids without a vector start at zero, as padding does.
        rows_without_vector = fitted.require_vocabulary().first
        initial = np.pad(fitted.require_vectors(), ((rows_without_vector, 0), (0, 0)))
        rows, width = initial.shape
        return TableShape(rows=rows, width=width, initial=initial)

    def _check_missing(self, vocabulary: Vocabulary, column: pa.ChunkedArray) -> None:
        """Refuses users or items without a vector, null ids among them, unless `missing` is
        "zeros"."""
        if self.missing == "zeros":
            return
        values = as_strings(column)
        without_vector = values.filter(pa.array(vocabulary.rows(values) < vocabulary.first))
        if not len(without_vector):
            return
        distinct = pc.unique(without_vector)
        total = len(pc.unique(values))
        raise ConfigError(
            f"{self.location}: {self.path} has no vector for {len(distinct)} of {total} ids in "
            f"column {self.column!r}, the first {_name_ids(distinct.to_pylist())}; add them, or "
            "set missing to 'zeros'."
        )


def read_vectors(feature: PretrainedFeature) -> tuple[Vocabulary, np.ndarray]:
    """Reads the ids, in the order of the file, and their vectors float32 [V, E].

    Raises:
        ConfigError: The file cannot be read, its width is not `embedding_size`, an id is repeated,
            the numbers of ids and vectors differ, or a vector is not finite. The message names the
            feature and the file.
    """
    path = _expand(feature.path)
    location = f"{feature.location}: {path}"
    # The dataclass has checked that a .npy file, and no other, has a file of ids.
    read = _read_npy if feature.ids else _read_parquet
    try:
        ids, vectors = read(feature, path, location)
    # Already names the feature and the file; it is a ValueError, which is caught next.
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{location} cannot be read: {error}") from None
    _check_vectors(feature, vectors, location)
    _check_ids(ids, len(vectors), location)
    return Vocabulary(ids, oov_rows=feature.oov_rows), vectors.astype(np.float32)


def _expand(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _read_npy(
    feature: PretrainedFeature, path: Path, location: str
) -> tuple[pa.LargeStringArray, np.ndarray]:
    # Read as text: ids of digits keep their leading zeros.
    lines = _expand(feature.ids).read_text("utf-8").splitlines()
    ids = pa.array(lines, pa.large_string())
    # Without pickle: a file of vectors must not be able to run code.
    return ids, np.load(path, allow_pickle=False)


def _read_parquet(
    feature: PretrainedFeature, path: Path, location: str
) -> tuple[pa.LargeStringArray, np.ndarray]:
    columns = dict.fromkeys((feature.id_column, feature.vector_column))
    check_fields(columns, pq.read_schema(path).names, location)
    # Two columns alone: the file may hold much else.
    table = pq.read_table(path, columns=sorted(columns))
    ids = as_strings(table[feature.id_column])
    lists = table[feature.vector_column].combine_chunks()
    if not is_list(lists.type):
        raise ConfigError(
            f"{location}: column {feature.vector_column!r} is of type {lists.type}, not lists of "
            "numbers."
        )
    # Refused by `_check_vectors`, as an empty .npy file is.
    if not len(lists):
        return ids, np.zeros((0, 0), np.float32)
    lengths = pc.list_value_length(lists)
    # A null has no vector: as one of width 0 it is named by the check below.
    widths = lengths.fill_null(0).to_numpy()
    different = np.flatnonzero(widths != widths[0])
    if len(different):
        row = int(different[0])
        raise ConfigError(
            f"{location}: the vector in row {row} has width {widths[row]}, that in row 0 has "
            f"{widths[0]}."
        )
    # All widths are equal, so the flat numbers are a matrix.
    numbers = lists.flatten().to_numpy(zero_copy_only=False)
    return ids, numbers.reshape(len(lists), -1)


def _check_vectors(feature: PretrainedFeature, vectors: np.ndarray, location: str) -> None:
    # "fiu": floats and integers; booleans, text and objects are no vectors.
    if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind not in "fiu":
        raise ConfigError(
            f"{location} holds {vectors.dtype} of shape {vectors.shape}, not one row of numbers "
            "for each id."
        )
    width = vectors.shape[1]
    if feature.embedding_size not in (0, width):
        raise ConfigError(
            f"{location} holds vectors of width {width}, but "
            f"embedding_size={feature.embedding_size}; set it to {width} or 0, and projection for "
            "another width."
        )
    # One NaN would spread to every score of its item.
    not_finite = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(not_finite):
        raise ConfigError(
            f"{location} holds NaN or infinity in {len(not_finite)} vectors, the first in row "
            f"{not_finite[0]}."
        )


def _check_ids(ids: pa.LargeStringArray, rows: int, location: str) -> None:
    if len(ids) != rows:
        raise ConfigError(
            f"{location} holds {rows} vectors for {len(ids)} ids; there must be one id for each "
            "row."
        )
    if ids.null_count:
        raise ConfigError(f"{location} holds {ids.null_count} vectors without an id.")
    counts = pc.value_counts(ids)
    is_repeated = pc.greater(counts.field("counts"), 1)
    repeated_ids = counts.filter(is_repeated).field("values")
    if len(repeated_ids):
        repeated = repeated_ids.to_pylist()
        raise ConfigError(
            f"{location} holds {len(repeated)} ids more than once, the first {_name_ids(repeated)}."
        )


def _name_ids(ids: Sequence[str | None]) -> str:
    return ", ".join(repr(name) for name in ids[:_NAMED_IDS])
