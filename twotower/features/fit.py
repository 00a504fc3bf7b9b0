"""Fits an encoder: the training column of every feature, its values and the weight of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from twotower.core.arrow import fingerprint, pc
from twotower.core.codes import codes_and_values, count_codes
from twotower.core.errors import ConfigError, did_you_mean
from twotower.features.base import Feature, Key, TrainingColumn, prefix_errors
from twotower.features.encoder import Encoder
from twotower.features.spec import FeatureSpec
from twotower.features.vocabulary import Vocabulary, as_strings

# Columns of the interactions that no query knows before it is answered.
_ANSWERS = ("item_id", "label")


def fit_encoder(spec: FeatureSpec, train: pa.Table, *, users: pa.Table, items: pa.Table) -> Encoder:
    """Fits every feature to training rows, and returns the encoder.

    Values of users and items count once for each training row of that user or item, so those
    without a training row do not count. Statistics of numbers are over the users, items or
    (context) rows of training.

    Args:
        spec: Features of both towers.
        train: Training interactions with user_id, item_id and the columns of context features.
        users: Every user of `train`, with a unique user_id and the columns of user features.
        items: Every item of `train`, with a unique item_id and the columns of item features.

    Raises:
        ConfigError: A column is missing (the nearest is named), or pretrained vectors do not
            fit.
        ValueError: Ids are repeated or missing in `users` or `items`; a value cannot be read as
            its feature's type.
    """
    # Held-out rows are not among the arguments, so that nothing fitted here can know them.
    columns = training_columns(spec, train, users=users, items=items)
    # Before the features, which share them.
    vocabularies = _fit_vocabularies(columns.values())
    fitted = {}
    for key, column in columns.items():
        feature = column.feature
        vocabulary = vocabularies.get(feature.table)
        with prefix_errors(feature.location):
            fitted[key] = feature.fit(column._replace(vocabulary=vocabulary))
    if spec.history is not None:
        # Last, because a history reads the vocabulary of the items.
        item_ids = fitted["item", spec.history.reads[0]]
        fitted[spec.history.key] = spec.history.fit_to_items(item_ids, newest_timestamp(train))
    # Users are encoded once; context is encoded anew with each request.
    context = tuple(column.feature.name for column in columns.values() if column.is_context)
    # Fitted first and completed then: reading the items needs an encoder.
    encoder = Encoder(spec, fitted, context, fitted_on=fingerprint(train))
    return _with_items_of_history(encoder, items)


def extend_encoder(
    encoder: Encoder, spec: FeatureSpec, train: pa.Table, *, users: pa.Table, items: pa.Table
) -> Encoder:
    """Returns an encoder for a larger log that encodes all known values as another does.

    Every known value keeps its row and new ones come after them; statistics and the boundaries of
    buckets stay as they were. A new value gets a row when it has `min_count` training rows in the
    new log.

    Args:
        encoder: Encoder of the log before.
        spec: Features of both towers, the same as those of `encoder`.
        train: Training interactions of the larger log; see `fit_encoder`.
        users: Its users.
        items: Its items.

    Raises:
        ConfigError: The features are not those of `encoder`, or a sentence encoder is another.
    """
    # Compared as mappings, as it was saved.
    if spec.to_dict() != encoder.spec.to_dict():
        raise ConfigError(
            "config.features differs from that of the run to grow from, whose towers read "
            "other features."
        )
    # Fitted anew to learn which values are frequent enough; everything else is dropped.
    # The statistics of the larger log would move every number, hence are thrown away.
    new = fit_encoder(spec, train, users=users, items=items)
    extended: dict[int, Vocabulary] = {}
    fitted = {}
    for key, before in encoder.fitted.items():
        fitted[key] = before
        if before.vocabulary is not None:
            after = new.fitted[key]
            # By identity, so that features that share a vocabulary still do.
            identity = id(before.vocabulary)
            if identity not in extended:
                known = after.require_vocabulary()
                extended[identity] = _extend_vocabulary(before.vocabulary, known)
            side, name = key
            feature = encoder.spec.side(side)[name]
            fitted[key] = feature.extend(before, after, extended[identity])
    # From `new` come the context and the fingerprint of the larger log.
    return _with_items_of_history(dataclasses.replace(new, fitted=fitted), items)


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
    rows_of_code, known = count_codes(train[id_column])
    row_of_table = np.asarray(pc.fill_null(pc.index_in(as_strings(known), value_set=ids), -1))
    row_of_table = np.append(np.int32(-1), row_of_table)
    # A training row whose user or item is absent would train nothing, and be counted nowhere.
    is_counted = rows_of_code > 0
    absent = np.flatnonzero(is_counted & (row_of_table < 0))
    if len(absent):
        codes, _ = codes_and_values(train[id_column])
        row = int(np.isin(codes + 1, absent).argmax())
        unknown = train[id_column][row].as_py()
        raise ValueError(
            f"Training rows have a {id_column} that the {side}s table lacks, the first {unknown!r}."
        )
    counts = np.zeros(len(table), np.int64)
    # Added, since a dictionary may hold one value twice.
    np.add.at(counts, row_of_table[is_counted], rows_of_code[is_counted])
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


def _with_items_of_history(encoder: Encoder, items: pa.Table) -> Encoder:
    """Returns the encoder with the features of `items` that the history reads besides ids."""
    history = encoder.spec.history
    # The id is the vocabulary itself; further features are looked up by it.
    if history is None or len(history.reads) == 1:
        return encoder
    encoded = encoder.encode("item", items, history.reads)
    read = history.read_items(encoder.fitted[history.key], encoded)
    return dataclasses.replace(encoder, fitted={**encoder.fitted, history.key: read})


def _fit_vocabularies(columns: Iterable[TrainingColumn]) -> dict[str, Vocabulary | None]:
    """Fits one vocabulary for each table, over the values of all features that share it."""
    # In the order of the specification, so that the first feature of a table decides.
    by_table: dict[str, list[TrainingColumn]] = {}
    for column in columns:
        if column.feature.has_table:
            by_table.setdefault(column.feature.table, []).append(column)
    return {
        table: sharing[0].feature.fit_vocabulary(sharing) for table, sharing in by_table.items()
    }


def _extend_vocabulary(old: Vocabulary, new: Vocabulary) -> Vocabulary:
    # New values go to the end: rows of the table and of its optimizer keep their meaning.
    is_known = pc.is_in(new.values, value_set=old.values)
    added = new.values.filter(pc.invert(is_known))
    return Vocabulary(values=pa.concat_arrays([old.values, added]), oov_rows=old.oov_rows)
