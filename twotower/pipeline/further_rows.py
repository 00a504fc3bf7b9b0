"""Further test rows in the place of those of a log: encoded by what training had fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import pyarrow as pa

from twotower.core.arrays import pair_keys
from twotower.core.arrow import pc, plain_text
from twotower.core.codes import distinct, encode_columns, positions
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.core.times import format_time
from twotower.data.contract import KEYS
from twotower.data.interactions import Split
from twotower.data.report import format_share
from twotower.features.encoder import Encoder
from twotower.pipeline.batches import Features, InteractionRows
from twotower.pipeline.labels import check_label_values, label_columns
from twotower.pipeline.prepare import (
    FurtherRows,
    PreparedData,
    columns_of_users,
    encode_rows,
    with_histories,
)


def with_test_rows(
    prepared: PreparedData, rows: pa.Table, *, name: str, source: str, notes: tuple[str, ...] = ()
) -> PreparedData:
    """Returns the data of a run with other test rows, as if its log had held these out.

    Users have the training and validation rows of the log as their past; the test rows of the log
    are left out, and no further row is another's past. Nothing is fitted again.

    Args:
        prepared: Data of the run.
        rows: Further rows, with our names and types of columns and ids in the form of the log.
        name: Name of the set.
        source: Name of the file or table.
        notes: Sentences on how it was read.

    Raises:
        ConfigError: A label is missing, or a column has another type than in the log.
    """
    said = list(notes)
    encoder = prepared.encoder
    labels = label_columns(prepared.config.objective)
    for column, field in labels.items():
        check_fields({column: field}, rows.column_names, f"{field}={column!r}: {source}")
        # Labels are what is measured: a column without them would measure nothing in silence.
        check_label_values(rows, column, field)
    rows = _with_times(rows, prepared, said)
    read = _columns_read(encoder)
    missing = [column for column in read if column not in rows.column_names]
    if missing:
        # A feature that misses its column is measured as it would be served, and said.
        said.append(f"It lacks columns that features read: {', '.join(missing)} count as missing.")
    needed = {*KEYS, "timestamp", "event", "weight", *labels, *read}
    rows = encode_columns(_like(rows, prepared.raw.train, needed, source, said), KEYS)
    # Behind the known ones, so that rows of the users table keep their numbers.
    users = _with_new_users(prepared.users, rows["user_id"])
    user = positions(rows["user_id"], users["user_id"])
    item = positions(rows["item_id"], prepared.items["item_id"])
    test = encode_rows(rows, user, item, encoder, labels, prepared.config.data.weight_by_event())
    _say_known(test, prepared, said)
    raw = _with_test(prepared.raw, rows)
    parts = (prepared.train, prepared.validation, test)
    # Built anew over all parts: the test rows' past is the log, and not the test rows of the log.
    histories, (train, validation, test) = with_histories(encoder, raw, parts, len(users))
    num_new = len(users) - len(prepared.users)
    further = FurtherRows(
        name=name,
        source=source,
        rows=len(rows),
        unknown_users=num_new,
        rows_of_unknown_items=int((item < 0).sum()),
        notes=tuple(said),
    )
    return dataclasses.replace(
        prepared,
        users=users,
        train=train,
        validation=validation,
        test=test,
        features=_with_new_features(prepared, users),
        # The factors of a generated shop are those of its users alone.
        truth=None if num_new else prepared.truth,
        raw=raw,
        histories=histories,
        further=further,
    )


def _with_times(rows: pa.Table, prepared: PreparedData, said: list[str]) -> pa.Table:
    """Returns the rows with times where the log has some, and without where it has none."""
    times = prepared.train.timestamp
    has_times = "timestamp" in rows.column_names and rows["timestamp"].null_count < len(rows)
    # Rows with times beside rows without have no common order.
    if times is None:
        if not has_times:
            return rows
        said.append("Its times are not read, as the log has none.")
        return rows.drop_columns(["timestamp"])
    if has_times:
        missing = rows["timestamp"].null_count
        if missing:
            said.append(f"{missing:,} of {len(rows):,} rows have no time: left out.")
            rows = rows.filter(pc.is_valid(rows["timestamp"]))
        return rows
    known = [part.timestamp for part in (prepared.train, prepared.validation) if len(part)]
    # One second after everything: all of the log is then their past.
    later = max(int(part.max()) for part in known if part is not None) + 1
    said.append(
        f"It has no times: its rows are taken to follow all rows of training and validation, at "
        f"{format_time(later)}."
    )
    if "timestamp" in rows.column_names:
        rows = rows.drop_columns(["timestamp"])
    return rows.append_column("timestamp", pa.repeat(later, len(rows)))


def _columns_read(encoder: Encoder) -> list[str]:
    """Returns the columns of a row that features read."""
    columns: dict[str, None] = {}
    # Features of users and items come from their tables, and histories from the events.
    for name in encoder.context:
        columns |= dict.fromkeys(encoder.spec.user[name].columns_read)
    return list(columns)


def _like(
    rows: pa.Table, log: pa.Table, needed: Collection[str], source: str, said: list[str]
) -> pa.Table:
    """Returns rows with the columns and types of the log; what they lack is null.

    Args:
        rows: Further rows.
        log: Rows of the log.
        needed: Columns that must have the type of the log; others of another type are left out.
        source: Name of the further rows.
        said: Notes, to which what is left out is added.
    """
    columns = {}
    for field in log.schema:
        kind = field.type
        # The codes of the log's ids; further rows get codes of their own.
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if field.name not in rows.column_names:
            columns[field.name] = pa.nulls(len(rows), kind)
            continue
        values = plain_text(rows[field.name])
        try:
            columns[field.name] = values.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            # Nothing reads it: a log may bring any columns, and a further file others.
            if field.name not in needed:
                said.append(
                    f"Its column {field.name!r} is of another type than the log's: left out."
                )
                columns[field.name] = pa.nulls(len(rows), kind)
                continue
            reason = " ".join(map(str, error.args))
            raise ConfigError(
                f"{source}: the column {field.name!r} has another type than in the log ({reason})."
            ) from None
    return pa.table(columns)


def _with_new_users(users: pa.Table, ids: pa.ChunkedArray) -> pa.Table:
    """Returns the table of users with those behind it that it does not have."""
    known = users["user_id"]
    values = distinct(ids)
    new = values.filter(pc.invert(pc.is_in(values, value_set=known.combine_chunks())))
    if not len(new):
        return users
    # Nothing is known of them but the id.
    added = pa.table({"user_id": new.cast(known.type)})
    return pa.concat_tables([users, added], promote_options="default")


def _with_new_features(prepared: PreparedData, users: pa.Table) -> Features:
    """Returns the encoded tables, with the users behind those that were encoded before."""
    new = users.slice(len(prepared.users))
    if not len(new):
        return prepared.features
    encoder = prepared.encoder
    # The new ones alone: a hundred users are not worth encoding a million again.
    encoded = encoder.encode("user", new, columns_of_users(encoder))
    by_name = {}
    for name, values in prepared.features["user"].items():
        by_name[name] = np.concatenate([values, encoded[name]])
    return {**prepared.features, "user": by_name}


def _with_test(raw: Split, rows: pa.Table) -> Split:
    """Returns the parts of a log with other test rows, which follow all others."""
    file_positions = raw.file_positions
    # After all others in the file too, which is the order of rows of one time.
    if file_positions is not None:
        last = max(int(part.max(initial=-1)) for part in file_positions[:2])
        file_positions = (*file_positions[:2], last + 1 + np.arange(len(rows)))
    return Split(raw.train, raw.validation, rows, file_positions=file_positions)


def _say_known(test: InteractionRows, prepared: PreparedData, said: list[str]) -> None:
    """Says how many rows training knows, or may know of."""
    train = prepared.train
    total = len(test)
    keys = pair_keys(test.user, test.item)
    trained = pair_keys(train.user, train.item)
    # -1 stands for many items, which are not one another.
    is_known = np.isin(keys, trained) & (test.item >= 0)
    words = "user and item"
    if test.timestamp is not None and train.timestamp is not None:
        words = "user, item and time"
        # Of the pairs that are in both alone: the log may have many more.
        is_shared = np.isin(trained, keys[is_known])
        moments = set(zip(trained[is_shared].tolist(), train.timestamp[is_shared].tolist()))
        # Few by now: rows whose pair training has.
        for row in np.flatnonzero(is_known):
            is_known[row] = (int(keys[row]), int(test.timestamp[row])) in moments
        end = int(train.timestamp.max())
        early = int((test.timestamp <= end).sum())
        if early:
            said.append(
                f"{format_share(early, total)} of its rows ({early:,}) are not later than the last "
                f"training row ({format_time(end)}): training knew the time that is tested."
            )
    repeated = int(is_known.sum())
    if repeated:
        said.append(
            f"{format_share(repeated, total)} of its rows ({repeated:,}) are training rows too "
            f"({words}): the answer to them is remembered."
        )
