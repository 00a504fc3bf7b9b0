"""Features of a vocabulary: one value, such as an id or a brand, or several, such as genres."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.features.base import (
    Feature,
    Fitted,
    Input,
    TableShape,
    TrainingColumn,
    is_list,
    join_lists,
    pad_lists,
    prefix_errors,
)
from twotower.features.vocabulary import Vocabulary, as_strings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringFeature(Feature):
    """One value of a vocabulary, such as an id or a brand.

    Attributes:
        min_count: Training rows that a value needs to have a row of its own.
        oov_rows: Rows that all other values are spread over, by hash.
        oov_rate: Share of the ids replaced by an out-of-vocabulary row in training, so that those
            rows are trained.
        initial_norm: Expected norm of the rows that training starts from; what is seen rarely stays
            near them.
    """

    min_count: int = 1
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
        """Returns the row int64 [M] that each value of a column comes from, and the values [M]."""
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
        return Vocabulary.fit(
            pa.chunked_array(values),
            np.concatenate(weights),
            min_count=self.min_count,
            oov_rows=self.oov_rows,
        )

    def fit(self, column: TrainingColumn) -> Fitted:
        return Fitted(vocabulary=column.vocabulary)

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        return fitted.require_vocabulary().rows(column)

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
    max_length: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "max_length")

    def split_values(self, column: pa.ChunkedArray) -> tuple[np.ndarray, pa.LargeStringArray]:
        lists = self._as_lists(column)
        rows = pc.list_parent_indices(lists)
        values = pc.utf8_trim_whitespace(as_strings(pc.list_flatten(lists)))
        # Two separators in a row, or one at the end, leave empty values that mean nothing.
        kept = pc.fill_null(pc.not_equal(values, ""), False)
        return rows.filter(kept).to_numpy().astype(np.int64), values.filter(kept)

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        rows, values = self.split_values(column)
        ids = fitted.require_vocabulary().rows(values)
        return pad_lists(rows, ids, len(column), self.max_length)

    def input(self, fitted: Fitted) -> Input:
        return dataclasses.replace(super().input(fitted), length=self.max_length)

    def _as_lists(self, column: pa.ChunkedArray) -> pa.LargeListArray:
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
