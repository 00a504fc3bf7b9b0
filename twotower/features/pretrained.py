"""Vectors of another model, read from a column of the table or, by id, from a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.core.arrow import is_list, join_chunks, pc, plain_text
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.features.base import Feature, Fitted, TrainingColumn, column_of, join_lists
from twotower.features.inputs import Input, TableShape
from twotower.features.vocabulary import Vocabulary, as_strings

# Ids that an error message names.
_NAMED_IDS = 5
_NUMBER_LISTS = pa.large_list(pa.float32())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedFeature(Feature):
    """The vector in `column`, or the one that a file holds for the id in `column`.

    A column of vectors holds lists of numbers or, as in CSV files, text such as "[0.1, -2, 3e-4]".
    Items that come later bring their vectors with them.

    Attributes:
        path: File of the vectors [V, E]: a .npy file, or a Parquet file that has `vector_column`
            and `id_column`. Empty for vectors in `column` itself.
        ids: Text file with the ids of the rows of a .npy file, one a line.
        id_column: Column of ids of a Parquet file.
        vector_column: Column of lists of numbers of a Parquet file.
        frozen: Whether to leave the vectors as they are; otherwise they are the initial rows of a
            table that is trained.
        projection: Width of a dense layer between the vector and the tower; 0 for none.
        missing: Treatment of users or items without a vector: "error", or "zeros" (with a flag
            after a frozen vector).
        oov_rows: Number of rows of a trained table for ids without a vector.
        embedding_size: Width E; 0 for the width of the vectors there are.
    """

    path: str = ""
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
        if self.path:
            self._check_file()
        else:
            self._check_no_file()

    def _check_file(self) -> None:
        is_npy = self.path.endswith(".npy")
        is_parquet = self.path.endswith(".parquet")
        self._check(is_npy or is_parquet, "path", "a .npy or .parquet file")
        # A .npy file has no column for ids; in a Parquet file they lie beside the vectors.
        if is_npy:
            self._check(bool(self.ids), "ids", "the file with the id of each row")
        else:
            self._check(not self.ids, "ids", "empty for a .parquet file")

    def _check_no_file(self) -> None:
        for field in ("ids", "id_column", "vector_column"):
            default = getattr(type(self), field)
            is_left_out = getattr(self, field) == default
            self._check(is_left_out, field, "left out without a path: the column has the vectors")

    @property
    def columns_read(self) -> tuple[str, ...]:
        # A trained table needs to know whose vector a row is.
        if self._has_rows_of_column:
            return (f"{self.side}_id", self.column)
        return (self.column,)

    def read(self, rows: pa.Table) -> pa.ChunkedArray:
        if not self._has_rows_of_column:
            return super().read(rows)
        names = self.columns_read
        arrays = [join_chunks(column_of(rows, name)) for name in names]
        return pa.chunked_array([pa.StructArray.from_arrays(arrays, names)])

    @property
    def has_table(self) -> bool:
        # Frozen vectors are inputs like numbers; trained ones are rows to start from.
        return not self.frozen

    @property
    def _min_embedding_size(self) -> int:
        # 0 stands for the width of the file, which is not read yet.
        return 0

    @property
    def _has_rows_of_column(self) -> bool:
        """Whether a trained table begins with the vectors of a column."""
        return not self.path and not self.frozen

    @property
    def _has_missing_flag(self) -> bool:
        return self.missing == "zeros"

    def fit(self, column: TrainingColumn) -> Fitted:
        if not self.path:
            return self._fit_to_column(column.all_values)
        # All ids of the file are kept: an item that comes later may have a vector already.
        vocabulary, vectors = read_vectors(self)
        self._check_missing(vocabulary, column.all_values)
        return Fitted(vocabulary=vocabulary, vectors=vectors)

    def _fit_to_column(self, column: pa.ChunkedArray) -> Fitted:
        values = column
        ids = None
        if self._has_rows_of_column:
            ids, values = _fields(column)
        vectors, missing = parse_vectors(values, self.location, width=self.embedding_size)
        self._check_missing_rows(missing)
        if ids is None:
            # The vectors stay in the table: encoding reads them there.
            return Fitted(statistics={"width": vectors.shape[1]})
        known = as_strings(ids).filter(pa.array(~missing))
        _check_ids(known, len(known), f"{self.location}: column {self.column!r}")
        return Fitted(Vocabulary(known, oov_rows=self.oov_rows), vectors[~missing])

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        """Encodes ids as rows of the trained table, or as the frozen vectors.

        With missing="zeros" a frozen vector has one more number: 1 for an id without a vector.

        Raises:
            ConfigError: A vector of the column is of another width or not finite.
        """
        if not self.path and self.frozen:
            width = fitted.statistics["width"]
            vectors, missing = parse_vectors(column, self.location, width=width)
            return self._with_missing_flag(vectors, missing)
        if self._has_rows_of_column:
            column, _ = _fields(column)
        vocabulary = fitted.require_vocabulary()
        rows = vocabulary.rows(column)
        # A table is looked up inside the tower.
        if not self.frozen:
            return rows
        # Rows before the first known id are those of null and of unknown ids.
        known = rows - vocabulary.first
        missing = known < 0
        # The first vector stands in for those that are missing, and is replaced by zeros below.
        vectors = fitted.require_vectors()[np.maximum(known, 0)]
        vectors = np.where(missing[:, None], np.float32(0), vectors)
        return self._with_missing_flag(vectors, missing)

    def _with_missing_flag(self, vectors: np.ndarray, missing: np.ndarray) -> np.ndarray:
        if not self._has_missing_flag:
            return vectors
        return np.column_stack([vectors, missing.astype(np.float32)])

    def input(self, fitted: Fitted) -> Input:
        if not self.frozen:
            return Input(table=self.table, projection=self.projection, oov_rows=self.oov_rows)
        if self.path:
            width = fitted.require_vectors().shape[1]
        else:
            width = fitted.statistics["width"]
        # A bool counts as one number.
        return Input(width=width + self._has_missing_flag, projection=self.projection)

    def table_shape(self, fitted: Fitted) -> TableShape | None:
        if self.frozen:
            return None
        # Ids without a vector start at zero, as padding does.
        rows_without_vector = fitted.require_vocabulary().first
        initial = np.pad(fitted.require_vectors(), ((rows_without_vector, 0), (0, 0)))
        rows, width = initial.shape
        return TableShape(rows=rows, width=width, initial=initial)

    def _check_missing_rows(self, missing: np.ndarray) -> None:
        """Says how many rows of the column have no vector; refuses them unless `missing` is
        "zeros"."""
        count = int(missing.sum())
        if not count:
            return
        share = (
            f"{self.location}: column {self.column!r} has no vector in {count} of {len(missing)} "
            f"rows ({count / len(missing):.1%}), the first in row {missing.argmax() + 1}"
        )
        if count == len(missing):
            raise ConfigError(f"{share}; name the column that has them.")
        if self.missing == "error":
            raise ConfigError(f"{share}; add them, or set missing to 'zeros'.")
        logging.warning("%s; they have zeros.", share)

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


def parse_vectors(
    column: pa.ChunkedArray, location: str, *, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a column of vectors.

    Args:
        column: Lists of numbers, or text such as "[0.1, 0.2]"; null or empty where there is none.
        location: Name of the feature in error messages.
        width: Width E of the vectors; 0 for that of the first.

    Returns:
        The vectors float32 [N, E], zeros where one is missing, and a mask bool [N] of these.

    Raises:
        ConfigError: The column holds something else, or a vector is of another width or not finite;
            the message names the row.
    """
    lists = _as_number_lists(column, location)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    missing = lengths == 0
    rows = np.flatnonzero(~missing)
    if len(rows) and not width:
        width = int(lengths[rows[0]])
    different = rows[lengths[rows] != width]
    if len(different):
        row = different[0]
        raise ConfigError(
            f"{location}: the vector in row {row + 1} has width {lengths[row]}; all must be "
            f"{width} wide."
        )
    # A null among the numbers becomes NaN, and is refused as such.
    numbers = pc.list_flatten(lists).to_numpy(zero_copy_only=False)
    vectors = np.zeros((len(lists), width), np.float32)
    vectors[rows] = numbers.reshape(len(rows), width)
    not_finite = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(not_finite):
        raise ConfigError(
            f"{location}: NaN or infinity is in the vectors of {len(not_finite)} of {len(lists)} "
            f"rows, the first in row {not_finite[0] + 1}."
        )
    return vectors, missing


def _as_number_lists(column: pa.ChunkedArray, location: str) -> pa.LargeListArray:
    """Returns a column of vectors as lists of float32."""
    column = plain_text(column)
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), _NUMBER_LISTS)
    if is_list(kind):
        lists = join_lists(column)
    elif pa.types.is_string(kind):
        lists = _split_texts(as_strings(column))
    else:
        raise ConfigError(
            f"{location}: a column of type {kind} holds no vectors; name a column of lists of "
            "numbers, or by path a file that has the vectors of the ids in this one."
        )
    try:
        return lists.cast(_NUMBER_LISTS, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    # Searched on failure alone: Arrow's message names a number and not its row.
    row = next(row for row in range(len(lists)) if not _is_numbers(lists.take(pa.array([row]))))
    raise ConfigError(
        f"{location}: {column[row].as_py()!r} in row {row + 1} is not a list of numbers such as "
        "[0.1, 0.2]. If the column holds ids, name the file of their vectors by path."
    )


def _split_texts(texts: pa.LargeStringArray) -> pa.LargeListArray:
    """Returns the parts of lists written as JSON, as text; null for a blank text or an empty
    list."""
    is_blank = pc.match_substring_regex(texts, r"^\s*(\[\s*\]\s*)?$")
    texts = pc.if_else(is_blank, pa.scalar(None, texts.type), texts)
    # Without brackets an id of digits would pass for a vector one number wide.
    in_brackets = pc.match_substring_regex(texts, r"(?s)^\s*\[.*\]\s*$")
    texts = pc.if_else(in_brackets, texts, pa.scalar("no list", texts.type))
    inner = pc.replace_substring_regex(texts, r"^\s*\[\s*|\s*\]\s*$", "")
    parts = pc.split_pattern_regex(inner, r"\s*,\s*")
    return parts.cast(pa.large_list(pa.large_string()))


def _is_numbers(lists: pa.LargeListArray) -> bool:
    try:
        lists.cast(_NUMBER_LISTS, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _fields(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Returns the ids and the vectors of rows that `PretrainedFeature.read` joined."""
    ids, vectors = column.flatten()
    return ids, vectors


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
    column = table[feature.vector_column]
    if not is_list(column.type):
        raise ConfigError(
            f"{location}: column {feature.vector_column!r} is of type {column.type}, not lists of "
            "numbers."
        )
    lists = join_lists(column)
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
