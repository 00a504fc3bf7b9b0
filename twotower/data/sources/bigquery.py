"""Reader of BigQuery: a table, or the result of a query, as an Arrow table of our names and types.

Rows come page by page over REST. For logs beyond some ten million rows, let BigQuery write Parquet
(EXPORT DATA) and read that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
from absl import logging

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.core.install import extra
from twotower.data.tables import Origin

if TYPE_CHECKING:  # an extra, which is not always installed
    from google.cloud.bigquery import Client, Table
    from google.cloud.bigquery.table import RowIterator

SECONDS_BETWEEN_LOG_LINES = 30.0


def make_client(project: str = "", location: str = "") -> Client:
    """Returns a client of BigQuery.

    Where BIGQUERY_EMULATOR_HOST names an emulator, it needs no credentials.

    Args:
        project: Project that is billed for queries; empty means that of the credentials.
        location: Region that runs the queries; empty lets BigQuery choose it.

    Raises:
        ConfigError: The extra bigquery, credentials or a project are missing.
    """
    with extra("bigquery", "BigQuery"):
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import bigquery
    credentials = None
    if os.environ.get("BIGQUERY_EMULATOR_HOST"):
        # An emulator checks no credentials, but the client would look for some.
        credentials = AnonymousCredentials()
        project = project or "emulated"
    try:
        # Empty text would be taken for a name, so None stands for it.
        return bigquery.Client(project or None, credentials, location=location or None)
    except DefaultCredentialsError as error:
        raise ConfigError(
            f"BigQuery needs credentials: gcloud auth application-default login. ({error})"
        ) from error
    except OSError as error:  # raised where the credentials name no project
        raise ConfigError(
            f"config.data.project={project!r} must name a project: the credentials name none."
        ) from error


def read_raw(config: TableConfig, name: str, *, client: Client) -> tuple[pa.Table, Origin]:
    """Reads a table or the result of a query, with the names and types that BigQuery has.

    Put a time limit into a query over a growing table: rows read later must be those of before.

    Args:
        config: Table or query to read.
        name: Name of the table in the configuration, for messages.
        client: Client of BigQuery.

    Returns:
        The table, in an order that differs from time to time, and its origin.

    Raises:
        ConfigError: BigQuery refuses, or there are no rows.
    """
    source = f"the result of config.data.{name}.query"
    if config.path:
        source = f"table {config.path}"
    with report_errors(f"{name}: {source}"):
        # A list, so that errors of the last pages too are raised inside the block.
        batches = list(_read_batches(client, config, name))
    # A result without rows may still have a batch, which holds its schema.
    if not any(len(batch) for batch in batches):
        raise ConfigError(f"{name}: {source} has no rows.")
    origin = Origin(
        name=source,
        describe_row=lambda row: f"{source}, row {row + 1} as it came",
        is_typed=True,
        is_ordered=False,
    )
    return pa.Table.from_batches(batches), origin


def sort_rows(table: pa.Table, keys: tuple[str, ...]) -> pa.Table:
    """Returns rows sorted by time, ids, and the other columns.

    BigQuery's own order differs from time to time, while a later command must read the same rows as
    training did. Typed first and sorted then: an id that is a number sorts as the text that it is.
    """
    names = dict.fromkeys(["timestamp", *keys, *table.column_names])
    # By every column that Arrow can sort by: equal rows may change places unseen.
    order = []
    for name in names:
        if name in table.column_names and _has_order(table[name].type):
            order.append((name, "ascending"))
    return table.sort_by(order)


def _has_order(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_null(kind))


@contextlib.contextmanager
def report_errors(subject: str, error_type: type[ValueError] = ConfigError) -> Iterator[None]:
    """Turns an error of BigQuery's client into an `error_type` with a message of one line.

    Args:
        subject: Name of the table that was read or written, the beginning of the message.
        error_type: Type of the error to raise.
    """
    # Here, since the extra may be missing.
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        message = _messages(error)[0]
        # Further lines repeat the query, or name the job.
        reason = message.splitlines()[0].rstrip(".")
        raise error_type(f"{subject}: BigQuery refuses: {reason}.") from error


def _messages(error: Exception) -> list[str]:
    """Returns the reasons that BigQuery gives, or else the text of the error."""
    reasons = []
    # The text of the error itself begins with the address of the request.
    for detail in getattr(error, "errors", ()):
        if isinstance(detail, dict) and detail.get("message"):
            reasons.append(detail["message"])
    return reasons or [str(error)]


def _read_batches(client: Client, config: TableConfig, name: str) -> Iterator[pa.RecordBatch]:
    """Yields the rows page by page, and logs their number now and then."""
    return read_pages(_find_rows(client, config, name), name)


def read_pages(rows: RowIterator, name: str) -> Iterator[pa.RecordBatch]:
    """Yields rows page by page, and logs their number now and then.

    Args:
        rows: Rows as BigQuery's client lists them.
        name: Name of the table, for the log.
    """
    count = 0
    last_logged = time.monotonic()
    # Pages as Arrow tables, so that no row becomes a Python object.
    for batch in rows.to_arrow_iterable():
        yield batch
        count += len(batch)
        if time.monotonic() - last_logged > SECONDS_BETWEEN_LOG_LINES:
            last_logged = time.monotonic()
            logging.info("%s: %d of %d rows from BigQuery.", name, count, rows.total_rows)


def _find_rows(client: Client, config: TableConfig, name: str) -> RowIterator:
    """Returns the rows of the table or query, as an iterator of BigQuery's client."""
    if config.query:
        return client.query(config.query).result()
    table = find_table(client, config, name)
    # Listing rows costs nothing; a query is billed by the bytes that it reads.
    if table.table_type == "TABLE":
        return client.list_rows(table)
    # Rows of a view cannot be listed.
    return client.query(f"SELECT * FROM `{table.reference}`").result()


def find_table(client: Client, config: TableConfig, name: str) -> Table:
    """Returns the table or view that a configuration names by its path.

    Args:
        client: Client of BigQuery.
        config: Options of the table.
        name: Name of the table in the configuration, for messages.

    Raises:
        ConfigError: There is no path, or it is no name of a table.
    """
    if not config.path:
        raise ConfigError(
            f"config.data.{name}.path={config.path!r} must name a table, DATASET.TABLE, or else "
            "give a query."
        )
    try:
        return client.get_table(config.path)
    except ValueError as error:  # raised where the name has another form
        raise ConfigError(
            f"config.data.{name}.path={config.path!r} must be PROJECT.DATASET.TABLE or "
            "DATASET.TABLE."
        ) from error
