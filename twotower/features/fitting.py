"""What training rows say of each feature: its column, the weight of each value, and what is fitted
to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.features import numeric
from twotower.features.base import Feature
from twotower.features.encodings import Fitted, naming, strings_of
from twotower.features.kinds import (
    FloatFeature,
    HistoryFeature,
    IntFeature,
    PretrainedFeature,
    SentenceFeature,
    StringFeature,
    TimestampFeature,
)
from twotower.features.pretrained import check_missing, read_vectors
from twotower.features.sentence import fit_sentences
from twotower.features.spec import FeatureSpec
from twotower.features.vocabulary import Vocabulary, as_strings

Key = tuple[str, str]
# Columns of the interactions that no query knows before it is answered.
_ANSWERS = ("item_id", "label")


class Column(NamedTuple):
    """A feature and the values it is fitted to.

    Attributes:
        values: one for each user or item that occurs in training, or for each training row of a
            context feature.
        weights: int64 [N], training rows behind each value.
        every: the column with the users or items that do not occur in training.
        is_context: whether it is a column of the interactions.
    """

    feature: Feature
    values: pa.ChunkedArray
    weights: np.ndarray
    every: pa.ChunkedArray
    is_context: bool


def training_columns(
    spec: FeatureSpec, train: pa.Table, *, users: pa.Table, items: pa.Table
) -> dict[Key, Column]:
    """The column of every feature.

    Raises:
        ConfigError: no table of its side has the column; the nearest is named.
        ValueError: ids come twice in `users` or `items`, or training rows have ids that are not
            there.
    """
    tables = {"user": users, "item": items}
    counts = {side: _training_rows(train, table, side) for side, table in tables.items()}
    seen = {side: table.filter(pa.array(counts[side] > 0)) for side, table in tables.items()}
    columns = {}
    for feature in spec:
        if isinstance(feature, HistoryFeature):  # made of the interactions themselves
            continue
        side, name = feature.side, feature.column
        if name in tables[side].column_names:
            weights = counts[side][counts[side] > 0]
            column = Column(
                feature, seen[side][name], weights, tables[side][name], is_context=False
            )
        elif side == "user" and name in train.column_names:
            _check_context(feature)
            column = Column(
                feature, train[name], np.ones(len(train), np.int64), train[name], is_context=True
            )
        else:
            raise _missing_column(feature, tables[side], train)
        columns[side, feature.name] = column
    return columns


def newest_timestamp(train: pa.Table) -> int | None:
    """The latest training timestamp in seconds since the epoch; None where the log has none."""
    return pc.max(train["timestamp"]).as_py() if "timestamp" in train.column_names else None


def fit_history(
    spec: FeatureSpec, fitted: Mapping[Key, Fitted], newest: int | None
) -> dict[Key, Fitted]:
    """The history of a user, if it is a feature: the vocabulary of items, and the time that ages
    are counted from."""
    feature = spec.history
    if feature is None:
        return {}
    vocabulary = fitted["item", feature.reads[0]].vocabulary
    return {
        ("user", feature.name): Fitted(
            feature, vocabulary=vocabulary, numbers={"newest": newest or 0}
        )
    }


def fit_columns(columns: Mapping[Key, Column], newest: int | None) -> dict[Key, Fitted]:
    """Fits every feature; those that share a table share one vocabulary, over the values of all of
    them."""
    shared = _vocabularies(
        [column for column in columns.values() if isinstance(column.feature, StringFeature)]
    )
    fitted = {}
    for key, column in columns.items():
        with naming(column.feature):
            fitted[key] = _fit(column, shared, newest)
    return fitted


def _fit(column: Column, shared: Mapping[str, Vocabulary], newest: int | None) -> Fitted:
    feature, values = column.feature, column.values
    _check_values(column)
    match feature:
        case StringFeature():
            return Fitted(feature, vocabulary=shared[feature.table])
        case IntFeature():
            return Fitted(feature, numbers=numeric.fit_int(feature, values))
        case FloatFeature():
            return Fitted(feature, numbers=numeric.fit_float(feature, values))
        case TimestampFeature():
            return Fitted(feature, numbers=numeric.fit_timestamp(feature, values, newest))
        case PretrainedFeature():
            vocabulary, vectors = read_vectors(feature)
            check_missing(feature, vocabulary, column.every)
            return Fitted(feature, vocabulary=vocabulary, vectors=vectors)
        case SentenceFeature():
            vocabulary, vectors, sha256 = fit_sentences(feature, column.every)
            return Fitted(
                feature, vocabulary=vocabulary, vectors=vectors, numbers={"model": sha256}
            )
    return Fitted(feature)


def _check_values(column: Column) -> None:
    """Reads all values and not only those of training, so that the row in the message is a row of
    the table."""
    match column.feature:
        case IntFeature() | FloatFeature():
            numeric.as_numbers(column.every, column.feature.where)
        case TimestampFeature():
            numeric.as_seconds(column.every, column.feature.where, unit=column.feature.unit)


def _vocabularies(columns: list[Column]) -> dict[str, Vocabulary]:
    by_table: dict[str, list[Column]] = {}
    for column in columns:
        by_table.setdefault(column.feature.table, []).append(column)
    return {table: _vocabulary(sharing) for table, sharing in by_table.items()}


def _vocabulary(columns: list[Column]) -> Vocabulary:
    parts = []
    for column in columns:
        with naming(column.feature):
            rows, values = strings_of(column.feature, column.values)
        parts.append((values, column.weights[rows]))
    values, weights = zip(*parts, strict=True)
    feature = columns[0].feature
    return Vocabulary.fit(
        pa.chunked_array(values),
        np.concatenate(weights),
        min_count=feature.min_count,
        oov_rows=feature.oov_rows,
    )


def _training_rows(train: pa.Table, table: pa.Table, side: str) -> np.ndarray:
    """Training rows of each row of `table`, int64 [len(table)]."""
    name = f"{side}_id"
    for given, what in ((train, "The training rows"), (table, f"The {side}s table")):
        if name not in given.column_names:
            raise ValueError(
                f"{what} must have a column {name!r}; columns: {', '.join(given.column_names)}."
            )
    ids = as_strings(table[name])
    if pc.count_distinct(ids, mode="all").as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise ValueError(
            f"The {side}s table has {len(repeated)} ids more than once, the first {repeated[0].as_py()!r}; they must be unique."
        )
    places = pc.index_in(as_strings(train[name]), value_set=ids)
    if places.null_count:
        unknown = train[name].filter(places.is_null())[0].as_py()
        raise ValueError(
            f"{places.null_count} training rows have a {name} that the {side}s table lacks, the first {unknown!r}."
        )
    return np.bincount(places.to_numpy(), minlength=len(table))


def _check_context(feature: Feature) -> None:
    if feature.column in _ANSWERS:
        raise ConfigError(
            f"{feature.where} reads column {feature.column!r} of the interactions, which is what is to be "
            f"predicted; a query does not know it."
        )


def _missing_column(feature: Feature, table: pa.Table, train: pa.Table) -> ConfigError:
    known = dict.fromkeys(
        table.column_names + (train.column_names if feature.side == "user" else [])
    )
    where = f"{feature.where} reads column {feature.column!r}; the {feature.side}s table"
    try:
        check_fields({feature.column: None}, known, where)
    except ConfigError as error:
        return error
    return ConfigError(where)
