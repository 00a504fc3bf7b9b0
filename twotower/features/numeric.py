"""Numbers and times -> normalised values or buckets, with what is missing flagged."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.times import UNITS_PER_SECOND
from twotower.features.kinds import FloatFeature, IntFeature, TimestampFeature
from twotower.features.vocabulary import as_strings

# Rows of a bucketised table: 0 is padding, 1 is a missing value, then the buckets.
MISSING_ROW, FIRST_BUCKET = 1, 2
_PART_ROWS = {"hour": 24, "weekday": 7}


def as_numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """The column as float64 [N], NaN where a value is missing or not finite.

    Raises:
        ConfigError: a value is not a number; the message names the feature, the row and the value.
    """
    if _is_text(column.type):
        column = _parse(column, pa.float64(), where)
    try:
        values = column.cast(pa.float64(), safe=False).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ConfigError(f"{where}: a column of type {column.type} holds no numbers.") from None
    return np.where(np.isfinite(values), values, np.nan)


def as_seconds(
    column: pa.ChunkedArray, where: str, *, unit: str = "s"
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds since the epoch, UTC, int64 [N], and which are missing. Numbers are in `unit`, text
    in ISO 8601.

    Raises:
        ConfigError: a value is not a time; the message names the feature, the row and the value.
    """
    if _is_text(column.type):
        column = _parse(column, pa.timestamp("s"), where)
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        column, unit = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), "us"
    values = as_numbers(column, where) / UNITS_PER_SECOND[unit]
    missing = np.isnan(values)
    return np.where(missing, 0, np.floor(values)).astype(np.int64), missing


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    )


def _parse(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    texts = pc.utf8_trim_whitespace(as_strings(column))
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)
    try:
        return pa.chunked_array([texts.cast(kind)])
    except pa.ArrowInvalid:
        row = next(row for row, text in enumerate(texts) if not _parses(text, kind))
        what = "a time in ISO 8601" if pa.types.is_timestamp(kind) else "a number"
        raise ConfigError(
            f"{where}: {texts[row].as_py()!r} in row {row + 1} is not {what}."
        ) from None


def _parses(text: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        text.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def fit_int(feature: IntFeature, column: pa.ChunkedArray) -> dict[str, Any]:
    """Mean and deviation, or boundaries: those of the specification, else quantiles."""
    if feature.normalize:
        return _moments(as_numbers(column, feature.where))
    if feature.boundaries:
        return {"boundaries": list(feature.boundaries)}
    values = as_numbers(column, feature.where)
    values = values[~np.isnan(values)]
    above = values[values > values.min(initial=np.inf)]
    if not len(above):
        return {"boundaries": []}
    # A quantile that is itself a value ("higher") makes whole-number boundaries; equal ones merge.
    # Where the least value is so common that it is a quantile (90 % zeros), it is set apart from
    # the others.
    quantiles = np.quantile(
        values, np.arange(1, feature.buckets) / feature.buckets, method="higher"
    )
    return {"boundaries": np.unique(np.maximum(quantiles, above.min())).tolist()}


def fit_float(feature: FloatFeature, column: pa.ChunkedArray) -> dict[str, Any]:
    """Mean and deviation of the values (of their logarithms)."""
    return _moments(_log(feature, as_numbers(column, feature.where)))


def fit_timestamp(
    feature: TimestampFeature, column: pa.ChunkedArray, newest: int | None
) -> dict[str, Any]:
    """The newest training timestamp: that of the log where it has one, else of the column."""
    seconds, missing = as_seconds(column, feature.where, unit=feature.unit)
    return {"newest": newest if newest is not None else int(seconds[~missing].max(initial=0))}


def encode_int(feature: IntFeature, column: pa.ChunkedArray, numbers: dict[str, Any]) -> np.ndarray:
    """Rows int32 [N] (1 = missing), or float32 [N, 2] when normalised."""
    values = as_numbers(column, feature.where)
    if feature.normalize:
        return _normalised(values, numbers)
    buckets = FIRST_BUCKET + np.searchsorted(
        np.asarray(numbers["boundaries"], np.float64), values, side="right"
    )
    return np.where(np.isnan(values), MISSING_ROW, buckets).astype(np.int32)


def encode_float(
    feature: FloatFeature, column: pa.ChunkedArray, numbers: dict[str, Any]
) -> np.ndarray:
    """(normalised value, missing flag), float32 [N, 2]; a missing value is the mean."""
    return _normalised(_log(feature, as_numbers(column, feature.where)), numbers)


def encode_timestamp(
    feature: TimestampFeature, column: pa.ChunkedArray, numbers: dict[str, Any]
) -> np.ndarray:
    """A row for each part, int32 [N, parts]; a missing time is the missing row once, then
    padding."""
    seconds, missing = as_seconds(column, feature.where, unit=feature.unit)
    hours = np.maximum(numbers["newest"] - seconds, 0) / 3600
    values = {
        "hour": seconds // 3600 % 24,
        "weekday": (seconds // 86400 + datetime.date(1970, 1, 1).weekday()) % 7,
        "age": np.minimum(np.log2(1 + hours).astype(np.int64), feature.age_buckets - 1),
    }
    ids = np.zeros((len(seconds), len(feature.parts)), np.int32)
    first = FIRST_BUCKET
    for place, part in enumerate(feature.parts):
        ids[:, place] = first + values[part]
        first += _PART_ROWS.get(part, feature.age_buckets)
    ids[missing] = 0
    ids[missing, 0] = MISSING_ROW
    return ids


def timestamp_rows(feature: TimestampFeature) -> int:
    """Rows of the table: padding, missing, then those of each part."""
    return FIRST_BUCKET + sum(_PART_ROWS.get(part, feature.age_buckets) for part in feature.parts)


def _log(feature: FloatFeature, values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values)) if feature.log else values


def _moments(values: np.ndarray) -> dict[str, float]:
    # Sorted, so that the sums do not depend on the order of the rows.
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return {"mean": 0.0, "deviation": 1.0}
    return {"mean": float(values.mean()), "deviation": float(values.std()) or 1.0}


def _normalised(values: np.ndarray, numbers: dict[str, Any]) -> np.ndarray:
    missing = np.isnan(values)
    scaled = np.where(missing, 0, (values - numbers["mean"]) / numbers["deviation"])
    return np.stack([scaled, missing], axis=1).astype(np.float32)
