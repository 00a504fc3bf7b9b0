"""Times as rows of a small table: hour, weekday and age."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from twotower.core.arrow import BadValue, pc
from twotower.core.errors import ConfigError, choose
from twotower.core.times import TimeForm
from twotower.data.contract import SECONDS, Use
from twotower.features.base import Feature, Fitted, TrainingColumn
from twotower.features.inputs import Input, TableShape
from twotower.features.numeric import (
    FIRST_BUCKET,
    MISSING_ROW,
    quantiles,
)

_PARTS = ("hour", "weekday", "age")
# Left out by default: most times are followed closely enough by the age.
_PERIOD = "period"
# Weekday of the day that Unix times count from, a Thursday.
_EPOCH_WEEKDAY = datetime.date(1970, 1, 1).weekday()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestampFeature(Feature):
    """A time (UTC) as rows of a small table: its hour, its weekday, its age before the newest
    training row, its period.

    Attributes:
        parts: Parts to read, among "hour", "weekday", "age" and "period".
        unit: Unit of a column of numbers: s, ms, us or ns since the epoch. Empty to find it, and
            the form of text, on the column: that of the log's own times is tried first.
        format: Strptime format of text, or of numbers such as 20231114; empty to find it.
        age_buckets: Number of buckets of the age; an age in hours falls in bucket
            floor(log2(1 + age)), at most the last.
        periods: Number of periods, with about as many training users or items (rows, for a context
            column) in each. A time after training falls in the last one, so that items which
            are published tomorrow are taken for the newest ones of training.
    """

    embedding_size: int = 8
    parts: tuple[str, ...] = _PARTS
    unit: Literal["", "s", "ms", "us", "ns"] = ""
    format: str = ""
    # The twentieth bucket begins at 2^19 - 1 hours, some sixty years.
    age_buckets: int = 20
    periods: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least(1, "age_buckets")
        self._check_at_least(2, "periods")
        distinct = len(set(self.parts)) == len(self.parts)
        self._check(bool(self.parts) and distinct, "parts", "one or more different parts")
        for part in self.parts:
            choose(dict.fromkeys((*_PARTS, _PERIOD)), part, f"{self.location}.parts")

    @property
    def form(self) -> TimeForm:
        """Form of times that are read without a contract."""
        return TimeForm(self.unit or "s", self.format)

    @property
    def use(self) -> Use:
        is_given = bool(self.unit or self.format)
        return Use("time", self.location, self.form if is_given else None)

    def fit(self, column: TrainingColumn) -> Fitted:
        # All values are read first, so that an error names a row of the whole table.
        as_seconds(column.all_values, self.location, self.form)
        seconds, missing = as_seconds(column.values, self.location, self.form)
        known = seconds[~missing]
        newest = column.newest
        # A log without times: the newest value of the column itself stands for now.
        if newest is None:
            newest = int(known.max(initial=0))
        statistics: dict[str, Any] = {"newest": newest}
        if _PERIOD in self.parts:
            statistics["periods"] = quantiles(known.astype(np.float64), self.periods)
        return Fitted(statistics=statistics)

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        seconds, missing = as_seconds(column, self.location, self.form)
        # Times after training, as those of all requests, have the age of the newest row.
        # Buckets grow with the age: an hour matters today, and not a year ago.
        hours = np.maximum(fitted.statistics["newest"] - seconds, 0) / 3600
        age = np.log2(1 + hours).astype(np.int64)
        values = {
            "hour": seconds // 3600 % 24,
            "weekday": (seconds // 86400 + _EPOCH_WEEKDAY) % 7,
            "age": np.minimum(age, self.age_buckets - 1),
        }
        if _PERIOD in self.parts:
            boundaries = np.asarray(fitted.statistics["periods"], np.float64)
            values[_PERIOD] = np.searchsorted(boundaries, seconds, side="right")
        ids = np.zeros((len(seconds), len(self.parts)), np.int32)
        # Each part has rows of its own, one part after the other.
        first = FIRST_BUCKET
        for position, part in enumerate(self.parts):
            ids[:, position] = first + values[part]
            first += self._part_rows(part)
        # A missing time is the missing row once, then padding, so that their mean is that row.
        ids[missing] = 0
        ids[missing, 0] = MISSING_ROW
        return ids

    def input(self, fitted: Fitted) -> Input:
        return Input(table=self.table, length=len(self.parts))

    def table_shape(self, fitted: Fitted) -> TableShape:
        rows = FIRST_BUCKET + sum(self._part_rows(part) for part in self.parts)
        # One small table for all parts, whose rows are averaged like those of a list.
        return TableShape(rows=rows, width=self.embedding_size)

    def _part_rows(self, part: str) -> int:
        return {"hour": 24, "weekday": 7, "age": self.age_buckets, _PERIOD: self.periods}[part]


def as_seconds(
    column: pa.ChunkedArray, location: str, form: TimeForm = SECONDS
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a column as seconds since the epoch (UTC).

    Args:
        column: Dates, timestamps, numbers, or text.
        location: Name of the feature in error messages.
        form: Form of numbers and text.

    Returns:
        The seconds int64 [N], 0 where missing, and a mask bool [N] of missing values.

    Raises:
        ConfigError: A value is not a time; the message names the feature, the row and the value.
    """
    try:
        seconds = form.column(column)
    except BadValue as error:
        found = "" if error.row is None else f"{error.value!r} in row {error.row + 1} "
        raise ConfigError(f"{location}: {found}{error.problem}.") from None
    missing = pc.is_null(seconds).to_numpy()
    return pc.fill_null(seconds, 0).to_numpy(), missing
