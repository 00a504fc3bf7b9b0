"""Features of a vocabulary: one value, such as an id or a brand, or several, such as genres."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa

from twotower.core.arrow import is_list, pc, plain_text
from twotower.core.errors import ConfigError
from twotower.features.base import (
    Feature,
    Fitted,
    PlainValue,
    TrainingColumn,
    join_lists,
    pad_lists,
    prefix_errors,
)
from twotower.features.inputs import Input, TableShape
from twotower.features.vocabulary import Vocabulary, as_strings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringFeature(Feature):
    """One value of a vocabulary, such as an id or a brand.

    Attributes:
        min_count: Number of training rows that a value needs to get a table row of its own.
        oov_rows: Number of table rows that all other values are spread over, by hash.
        oov_rate: Share of the ids replaced by an out-of-vocabulary row in training, so that those
            rows are trained.
        initial_norm: Expected norm of the rows that training starts from; rows of rare values stay
            near them.
    """

    min_count: int = 1
    # Several rows, so that unknown values do not all have one vector.
    oov_rows: int = 8
    oov_rate: float = 0.01
    initial_norm: float = 1.0

    # One table has one width and one vocabulary, and its rows start from one distribution.
    shared_fields: ClassVar[tuple[str, ...]] = (
        "embedding_size",
        "min_count",
        "oov_rows",
        "initial_norm",
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "min_count", "oov_rows")
        self._check(0 < self.initial_norm < math.inf, "initial_norm", "above 0")
        self._check(0 <= self.oov_rate < 1, "oov_rate", "at least 0 and below 1")

    def split_values(self, column: pa.ChunkedArray) -> tuple[np.ndarray, pa.LargeStringArray]:
        """Returns the row of each value of a column, int64 [M], and the values [M]."""
        return np.arange(len(column)), as_strings(column)

    def fit_vocabulary(self, columns: Sequence[TrainingColumn]) -> Vocabulary:
        values = []
        weights = []
        for column in columns:
            feature = column.feature
            assert isinstance(feature, StringFeature), "FeatureSpec lets no other kind share"
            with prefix_errors(feature.location):
                rows, column_values = feature.split_values(column.values)
            values.append(column_values)
            # Each value counts as often as the user or item that it comes from.
            weights.append(column.weights[rows])
        # One vocabulary over all features of the table: a value has one row, whichever feature it
        # is in.
        return Vocabulary.fit(
            pa.chunked_array(values),
            np.concatenate(weights),
            min_count=self.min_count,
            oov_rows=self.oov_rows,
        )

    def fit(self, column: TrainingColumn) -> Fitted:
        # Fitted before, with the other features of the table.
        return Fitted(vocabulary=column.vocabulary)

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        return fitted.require_vocabulary().rows(column)

    def encode_value(self, fitted: Fitted, value: PlainValue) -> dict[str, np.ndarray] | None:
        # A kind of one's own may encode otherwise.
        if type(self) is not StringFeature or not isinstance(value, str):
            return None
        return {self.name: fitted.require_vocabulary().rows_of_texts([value])}

    def input(self, fitted: Fitted) -> Input:
        return Input(table=self.table, oov_rate=self.oov_rate, oov_rows=self.oov_rows)

    def table_shape(self, fitted: Fitted) -> TableShape:
        rows = fitted.require_vocabulary().size
        return TableShape(rows=rows, width=self.embedding_size, norm=self.initial_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringsFeature(StringFeature):
    """Several values of a vocabulary, such as genres: their rows are averaged.

    Attributes:
        separator: Text between the values of a text column; empty for a column of lists.
        max_length: Values L kept of a row, the first ones.
    """

    separator: str = ""
    # A fixed length, as compiled programs need; longer lists are cut at their end.
    max_length: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "max_length")

    def split_values(self, column: pa.ChunkedArray) -> tuple[np.ndarray, pa.LargeStringArray]:
        # Row numbers beside one flat array of values: Arrow's functions then work on all rows at
        # once.
        lists = self._as_lists(column)
        rows = pc.list_parent_indices(lists)
        values = pc.utf8_trim_whitespace(as_strings(pc.list_flatten(lists)))
        # Two separators in a row, or one at the end, leave empty values that mean nothing.
        is_kept = pc.fill_null(pc.not_equal(values, ""), False)
        rows = rows.filter(is_kept).to_numpy()
        return rows.astype(np.int64), values.filter(is_kept)

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        rows, values = self.split_values(column)
        # Duplicates within a row stay: they weigh more in the mean.
        ids = fitted.require_vocabulary().rows(values)
        return pad_lists(rows, ids, len(column), self.max_length)

    def input(self, fitted: Fitted) -> Input:
        return dataclasses.replace(super().input(fitted), length=self.max_length)

    def _as_lists(self, column: pa.ChunkedArray) -> pa.LargeListArray:
        # Parquet has lists, CSV has text with a separator; both may fill one column of a
        # specification.
        column = _read_written_lists(plain_text(column))
        kind = column.type
        if is_list(kind):
            return join_lists(column)
        if not self.separator and not pa.types.is_null(kind):
            raise ConfigError(
                f"{self.location}: column {self.column!r} holds {kind}, not lists; name the "
                "separator between its values, for example separator='|'."
            )
        # A column of nulls has no text that a separator could divide; any will do.
        lists = pc.split_pattern(as_strings(column), self.separator or "|")
        return lists.cast(pa.large_list(pa.large_string()))


def _read_written_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns text such as "['Drama', 'War']" as lists; other columns as they are.

    A frame's column of lists becomes such text in a CSV file.
    """
    if not pa.types.is_string(column.type):
        return column
    is_written = pc.match_substring_regex(column, r"^\s*\[.*\]\s*$")
    if not pc.any(is_written).as_py() or not pc.all(is_written).as_py():
        return column
    # Few lists come many times: each is read once.
    distinct = pc.unique(column)
    try:
        lists = [_written_list(text) for text in distinct.to_pylist()]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return column
    rows = pc.index_in(column, value_set=distinct, skip_nulls=False)
    return pa.chunked_array([pa.array(lists, pa.list_(pa.string())).take(rows.combine_chunks())])


def _written_list(text: str | None) -> list[str] | None:
    if text is None:
        return None
    members = ast.literal_eval(text.strip())
    return [str(member) for member in members if member is not None]
