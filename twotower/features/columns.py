"""The training column of every feature: its table, and the weight of each value."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.codes import codes_and_values
from twotower.core.errors import ConfigError, did_you_mean
from twotower.features.base import Feature, Key, TrainingColumn, prefix_errors
from twotower.features.spec import FeatureSpec
from twotower.features.vocabulary import as_strings

# Columns of the interactions that no query knows before it is answered.
_ANSWERS = ("item_id", "label")


def training_columns(
    spec: FeatureSpec, train: pa.Table, *, users: pa.Table, items: pa.Table
) -> dict[Key, TrainingColumn]:
    """Returns the column of every feature but the history, which is made of the interactions.

    Args:
        spec: Features of both towers.
        train: Training interactions.
        users: Users, with a unique user_id.
        items: Items, with a unique item_id.

    Raises:
        ConfigError: No table of a feature's side has its column; the nearest is named.
        ValueError: Ids are repeated in `users` or `items`, or training rows have ids that these
            lack.
    """
    tables = {"user": users, "item": items}
    # Once for each side: all features of a tower share the counts.
    counts = {side: _count_training_rows(train, table, side) for side, table in tables.items()}
    # Of the training rows alone: a later moment would be known from held-out rows.
    newest = newest_timestamp(train)
    columns = {}
    for feature in spec:
        # It has no column in training; see `HistoryFeature.fit_to_items`.
        if feature.is_history:
            continue
        table = tables[feature.side]
        if _has_columns(table, feature):
            # Only users and items of training rows: those of held-out rows say nothing.
            occurs = counts[feature.side] > 0
            # `all_values` stays whole, so that errors name rows of the table and new ids have
            # vectors.
            all_values = _read(feature, table)
            values = all_values.filter(pa.array(occurs))
            weights = counts[feature.side][occurs]
            is_context = False
        elif feature.side == "user" and _has_columns(train, feature):
            _check_is_known_to_query(feature)
            # A column of the users' own comes first: it is known without an interaction.
            all_values = values = _read(feature, train)
            # Each interaction is a row of its own here.
            weights = np.ones(len(train), np.int64)
            is_context = True
        else:
            raise _missing_column(feature, table, train)
        columns[feature.key] = TrainingColumn(
            feature, values, weights, all_values, is_context, newest
        )
    return columns


def _has_columns(table: pa.Table, feature: Feature) -> bool:
    return set(feature.columns_read) <= set(table.column_names)


def _read(feature: Feature, table: pa.Table) -> pa.ChunkedArray:
    with prefix_errors(feature.location):
        return feature.read(table)


def newest_timestamp(train: pa.Table) -> int | None:
    """Returns the latest training timestamp in seconds; None in a log without times."""
    if "timestamp" not in train.column_names:
        return None
    return pc.max(train["timestamp"]).as_py()


def _count_training_rows(train: pa.Table, table: pa.Table, side: str) -> np.ndarray:
    """Returns the training rows of each user or item, int64 [len(table)]."""
    id_column = f"{side}_id"
    for rows, name in ((train, "The training rows"), (table, f"The {side}s table")):
        if id_column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise ValueError(f"{name} must have a column {id_column!r}; columns: {columns}.")
    ids = as_strings(table[id_column])
    # Twice the same id would give one user two rows, of which training reads the first.
    if len(pc.unique(ids)) < len(ids):
        numbers = pc.value_counts(ids)
        is_repeated = pc.greater(numbers.field("counts"), 1)
        repeated = numbers.filter(is_repeated).field("values")
        raise ValueError(
            f"The {side}s table has {len(repeated)} ids more than once, the first "
            f"{repeated[0].as_py()!r}; they must be unique."
        )
    codes, known = codes_and_values(train[id_column])
    # One more for null, whose code is -1.
    rows_of_code = np.bincount(codes + 1, minlength=len(known) + 1)
    row_of_table = np.asarray(pc.fill_null(pc.index_in(as_strings(known), value_set=ids), -1))
    row_of_table = np.append(np.int32(-1), row_of_table)
    # A training row whose user or item is absent would train nothing, and be counted nowhere.
    is_counted = rows_of_code > 0
    absent = np.flatnonzero(is_counted & (row_of_table < 0))
    if len(absent):
        row = int(np.isin(codes + 1, absent).argmax())
        unknown = train[id_column][row].as_py()
        raise ValueError(
            f"Training rows have a {id_column} that the {side}s table lacks, the first {unknown!r}."
        )
    counts = np.zeros(len(table), np.int64)
    counts[row_of_table[is_counted]] = rows_of_code[is_counted]
    return counts


def _check_is_known_to_query(feature: Feature) -> None:
    for column in feature.columns_read:
        if column in _ANSWERS:
            raise ConfigError(
                f"{feature.location} reads column {column!r} of the interactions, which the model "
                "is to predict; a query does not know it."
            )


def _missing_column(feature: Feature, table: pa.Table, train: pa.Table) -> ConfigError:
    known = list(table.column_names)
    # An item's column is not looked for in the interactions: items do not depend on a query.
    if feature.side == "user":
        known += [name for name in train.column_names if name not in known]
    unknown = [name for name in feature.columns_read if name not in known]
    if not unknown:
        listed = ", ".join(feature.columns_read)
        return ConfigError(
            f"{feature.location} reads the columns {listed}, some of which are of the users table "
            "and some of the interactions; they must be of one table."
        )
    column = unknown[0]
    return ConfigError(
        f"{feature.location} reads column {column!r}; the {feature.side}s table has no "
        f"field {column!r}{did_you_mean(column, known)} Known: {', '.join(known)}."
    )
