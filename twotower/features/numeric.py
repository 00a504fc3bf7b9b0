"""Numbers: normalised with a flag for missing values, or a table row for each bucket."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import BadValue
from twotower.core.errors import ConfigError
from twotower.data.contract import LARGEST, NumberForm, Use
from twotower.features.base import Feature, Fitted, TrainingColumn
from twotower.features.inputs import Input, TableShape

# Rows of a table of buckets: 0 is padding, 1 is a missing value, then the buckets.
MISSING_ROW = 1
FIRST_BUCKET = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntFeature(Feature):
    """A whole number: an amount, which is normalised, or a code, which has a row for each bucket.

    An amount (stock, pages, days) means more the greater it is. It is best read as one number, and
    `embedding_size` is then the width of a dense layer that the tower sees in its place:

        {"type": "int", "normalize": true, "embedding_size": 8}

    A code (a shelf, an age, a postal district) means something of its own in each region. Buckets
    give each region a row that is trained:

        {"type": "int", "buckets": 16, "embedding_size": 8}

    An amount that spans orders of magnitude is a `float` feature with `log`; a code without any
    order is a `string`.

    Attributes:
        buckets: Number of buckets, with about as many training users or items (rows, for a context
            column) in each.
        boundaries: Boundaries of the buckets, instead of quantiles: a value v falls in the bucket
            after the last boundary <= v.
        normalize: Whether the feature is (v - mean) / standard deviation and a flag for missing,
            instead of buckets.
        embedding_size: Width of the table of buckets, 0 for 8; or of the dense layer that reads a
            normalised number and its flag, 0 for none.
    """

    embedding_size: int = 0
    buckets: int = 16
    boundaries: tuple[float, ...] = ()
    normalize: bool = False

    def __post_init__(self):
        # Before the checks of `Feature`, which ask a table for at least one column.
        # 0 means two things: a default width for a table, no dense layer for a number.
        if not self.normalize and self.embedding_size == 0:
            object.__setattr__(self, "embedding_size", 8)
        super().__post_init__()
        self._check_at_least(2, "buckets")
        # The infinities refuse themselves and NaN among the boundaries.
        bounds = (-math.inf, *self.boundaries, math.inf)
        rising = all(low < high for low, high in itertools.pairwise(bounds))
        self._check(rising, "boundaries", "finite and strictly increasing")
        both = self.normalize and self.boundaries
        self._check(not both, "boundaries", "empty when normalize is true")

    @property
    def use(self) -> Use:
        return Use("number", self.location)

    @property
    def has_table(self) -> bool:
        return not self.normalize

    def fit(self, column: TrainingColumn) -> Fitted:
        # All values are read first, so that an error names a row of the whole table.
        as_numbers(column.all_values, self.location)
        if self.boundaries:
            return Fitted(statistics={"boundaries": list(self.boundaries)})
        # A value counts once, however many training rows its user or item has.
        values = as_numbers(column.values, self.location)
        if self.normalize:
            return Fitted(statistics=_moments(values))
        return Fitted(statistics={"boundaries": quantiles(values, self.buckets)})

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        values = as_numbers(column, self.location)
        if self.normalize:
            return _normalise(values, fitted.statistics)
        # float64: JSON kept all digits, and a rounded boundary would move values to another bucket.
        boundaries = np.asarray(fitted.statistics["boundaries"], np.float64)
        buckets = FIRST_BUCKET + np.searchsorted(boundaries, values, side="right")
        return np.where(np.isnan(values), MISSING_ROW, buckets).astype(np.int32)

    def input(self, fitted: Fitted) -> Input:
        if self.normalize:
            return Input(width=2, projection=self.embedding_size)
        return Input(table=self.table)

    def table_shape(self, fitted: Fitted) -> TableShape | None:
        if self.normalize:
            return None
        # One bucket more than boundaries: below the first, between them, above the last.
        rows = FIRST_BUCKET + len(fitted.statistics["boundaries"]) + 1
        return TableShape(rows=rows, width=self.embedding_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatFeature(Feature):
    """A number, normalised, with a flag for missing; a missing value is the mean.

    Attributes:
        log: Whether to take sign(v) log(1 + |v|) first, for prices and counts.
        embedding_size: Width of the dense layer that reads the number and its flag; 0 for none.
    """

    embedding_size: int = 0
    log: bool = False

    @property
    def use(self) -> Use:
        return Use("number", self.location)

    @property
    def has_table(self) -> bool:
        return False

    def fit(self, column: TrainingColumn) -> Fitted:
        # All values are read first, so that an error names a row of the whole table.
        as_numbers(column.all_values, self.location)
        return Fitted(statistics=_moments(self._read(column.values)))

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        return _normalise(self._read(column), fitted.statistics)

    def input(self, fitted: Fitted) -> Input:
        return Input(width=2, projection=self.embedding_size)

    def _read(self, column: pa.ChunkedArray) -> np.ndarray:
        values = as_numbers(column, self.location)
        if self.log:
            # The sign outside: refunds are negative prices.
            return np.sign(values) * np.log1p(np.abs(values))
        return values


def as_numbers(column: pa.ChunkedArray, location: str) -> np.ndarray:
    """Reads a column as float64 [N], NaN where a value is missing or not finite.

    Args:
        column: Numbers, or text of numbers.
        location: Name of the feature in error messages.

    Raises:
        ConfigError: A value is not a number; the message names the feature, the row and the value.
    """
    try:
        numbers = NumberForm().column(column)
    except BadValue as error:
        row = (error.row or 0) + 1
        raise ConfigError(f"{location}: {error.value!r} in row {row} {error.problem}.") from None
    try:
        # Not safe: large integers may lose digits, which no feature needs.
        values = numbers.cast(pa.float64(), safe=False).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ConfigError(f"{location}: a column of type {column.type} holds no numbers.") from None
    is_large = np.isfinite(values) & (np.abs(values) > LARGEST)
    if is_large.any():
        row = int(is_large.argmax())
        raise ConfigError(
            f"{location}: {values[row]:g} in row {row + 1} is too large: at most {LARGEST:.3g}."
        )
    return np.where(np.isfinite(values), values, np.nan)


def quantiles(values: np.ndarray, buckets: int) -> list[float]:
    """Returns boundaries that divide values into at most `buckets` buckets, none of them empty."""
    values = values[~np.isnan(values)]
    above_minimum = values[values > values.min(initial=np.inf)]
    if not len(above_minimum):
        return []
    # Inner quantiles alone: the least and the greatest value bound nothing.
    shares = np.arange(1, buckets) / buckets
    # A quantile that is itself a value ("higher") gives whole-number boundaries; equal ones merge.
    quantiles = np.quantile(values, shares, method="higher")
    # Where the least value is so common that it is a quantile (90 % zeros), it is set apart from
    # the others.
    return np.unique(np.maximum(quantiles, above_minimum.min())).tolist()


def _moments(values: np.ndarray) -> dict[str, float]:
    # Sorted, so that the sums do not depend on the order of the rows.
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return {"mean": 0.0, "deviation": 1.0}
    # A column of one value has no deviation; divided by 1 it is 0, and the feature says nothing.
    return {"mean": float(values.mean()), "deviation": float(values.std()) or 1.0}


def _normalise(values: np.ndarray, statistics: Mapping[str, Any]) -> np.ndarray:
    """Returns normalised values and a flag for missing ones, float32 [N, 2]."""
    missing = np.isnan(values)
    scaled = (values - statistics["mean"]) / statistics["deviation"]
    return np.stack([np.where(missing, 0, scaled), missing], axis=1).astype(np.float32)
