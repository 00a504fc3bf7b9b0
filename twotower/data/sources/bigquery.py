"""Tables of BigQuery, and results of its queries -> one Arrow table with our column names and
types.

Rows come page by page over REST. Of logs beyond some ten million rows, let BigQuery write Parquet
(EXPORT DATA) and read that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from absl import logging

from twotower.config import TableConfig
from twotower.core.errors import ConfigError, extra
from twotower.data.sources import files as tables

_SECONDS = 30.0  # between log lines


def make_client(project: str = "", location: str = "") -> Any:
    """A `google.cloud.bigquery.Client`. Where BIGQUERY_EMULATOR_HOST names an emulator, it needs no
    credentials.

    Raises:
        ConfigError: the extra bigquery, credentials or a project are missing.
    """
    with extra("bigquery", "BigQuery"):
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import bigquery
    emulated = bool(os.environ.get("BIGQUERY_EMULATOR_HOST"))
    credentials = AnonymousCredentials() if emulated else None
    try:
        return bigquery.Client(
            project or ("emulated" if emulated else None), credentials, location=location or None
        )
    except DefaultCredentialsError as error:
        raise ConfigError(
            f"BigQuery needs credentials: gcloud auth application-default login. ({error})"
        ) from error
    except OSError as error:  # the client could not find out the project
        raise ConfigError(
            f"config.data.project={project!r} must name a project: the credentials name none."
        ) from error


def read(config: TableConfig, name: str, *, keys: tuple[str, ...], client: Any) -> pa.Table:
    """The table or query that `config` names, in an order of its own: by time, then by ids, then by
    the other columns.

    BigQuery's own order differs from time to time, while a later command must find the rows that
    training found. For the same reason a query over a table that grows needs a condition on time.

    Args:
        name: of the table in the configuration, for messages.
        keys: the columns it must have; they become strings.

    Returns:
        What `tables.read` returns of Parquet.

    Raises:
        ConfigError: BigQuery refuses, or there are no rows, or a column is missing or of the wrong
            type.
    """
    origin = f"table {config.path}" if config.path else f"the result of config.data.{name}.query"
    with refusals(f"{name}: {origin}"):
        batches = list(_batches(client, config, name))
    if not any(len(batch) for batch in batches):
        raise ConfigError(f"{name}: {origin} has no rows.")
    table = tables.shaped(
        pa.Table.from_batches(batches),
        config,
        name,
        keys=keys,
        origin=origin,
        place=lambda row: f"{origin}, row {row + 1} as it came",
        typed=True,
    )
    order = dict.fromkeys(["timestamp", *keys, *table.column_names])
    sortable = [
        column
        for column in order
        if column in table.column_names and not pa.types.is_nested(table[column].type)
    ]
    return table.sort_by([(column, "ascending") for column in sortable])


@contextlib.contextmanager
def refusals(what: str, error_type: type[ValueError] = ConfigError) -> Iterator[None]:
    """Turns what BigQuery says no to into an `error_type` of one line."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        told = [
            one["message"]
            for one in getattr(error, "errors", ())
            if isinstance(one, dict) and one.get("message")
        ]
        reason = (told or [str(error)])[0].splitlines()[0].rstrip(".")
        raise error_type(f"{what}: BigQuery refuses: {reason}.") from error


def _batches(client: Any, config: TableConfig, name: str) -> Iterator[pa.RecordBatch]:
    """The rows, page by page."""
    rows = _rows(client, config, name)
    done, logged = 0, time.monotonic()
    for batch in rows.to_arrow_iterable():
        yield batch
        done += len(batch)
        if time.monotonic() - logged > _SECONDS:
            logged = time.monotonic()
            logging.info("%s: %d of %d rows from BigQuery.", name, done, rows.total_rows)


def _rows(client: Any, config: TableConfig, name: str) -> Any:
    if config.query:
        return client.query(config.query).result()
    if not config.path:
        raise ConfigError(
            f"config.data.{name}.path={config.path!r} must name a table, DATASET.TABLE, or else give a query."
        )
    try:
        table = client.get_table(config.path)
    except ValueError as error:  # of the client, about the form of the name
        raise ConfigError(
            f"config.data.{name}.path={config.path!r} must be PROJECT.DATASET.TABLE or DATASET.TABLE."
        ) from error
    if table.table_type == "TABLE":
        return client.list_rows(table)
    return client.query(f"SELECT * FROM `{table.reference}`").result()  # of a view
