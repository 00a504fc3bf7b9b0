"""Jobs of BigQuery: the columns of a source, a script, and the rows of the tables it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from absl import logging
from pyarrow import parquet

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.core.progress import progress
from twotower.core.remote.objects import Bucket
from twotower.data.sources.bigquery import find_table, read_pages, report_errors
from twotower.pipeline.engines.database import BLOCK
from twotower.pipeline.engines.warehouse.columns import quote

if TYPE_CHECKING:  # an extra, which is not always installed
    from google.cloud.bigquery import Client


@dataclasses.dataclass(frozen=True)
class SourceTable:
    """A table or a query that has the rows of a log.

    Attributes:
        name: Name for messages.
        sql: Name of the table, or subquery.
        schema: Name -> type of each column; a repeated one is ARRAY.
        bytes: Bytes that reading all of it is billed.
    """

    name: str
    sql: str
    schema: dict[str, str]
    bytes: int


class Warehouse:
    """A project of BigQuery that runs a script.

    Args:
        client: Client of BigQuery.
    """

    def __init__(self, client: Client):
        self.client = client
        self.project: str = client.project

    def find_source(self, config: TableConfig) -> SourceTable:
        """Returns what is known of the rows of a log before they are read, which costs nothing.

        Raises:
            ConfigError: There is no such table, or the query is none.
        """
        from google.cloud import bigquery

        name = "the result of config.data.interactions.query"
        if not config.query:
            name = f"table {config.path}"
        with report_errors(f"interactions: {name}"):
            if config.query:
                # On lines of its own: its last one may be a comment.
                sql = f"(\n{config.query.strip().rstrip(';')}\n)"
            else:
                table = find_table(self.client, config, "interactions")
                sql = quote(str(table.reference))
            options = bigquery.QueryJobConfig(dry_run=True, use_query_cache=False)
            job = self.client.query(f"SELECT * FROM {sql}", job_config=options)
        schema = {}
        for field in job.schema or ():
            schema[field.name] = "ARRAY" if field.mode == "REPEATED" else field.field_type
        return SourceTable(name, sql, schema, job.total_bytes_processed or 0)

    def run(self, script: str) -> None:
        """Runs a script to its end.

        Raises:
            ConfigError: BigQuery refuses, or it fails.
        """
        with report_errors("the script of --engine=bigquery (see it by --dry_run)"):
            job = self.client.query(script)
            logging.info("BigQuery prepares the rows: job %s.", job.job_id)
            job.result()

    def read_table(self, name: str) -> pa.Table:
        """Returns the rows of a table that has few."""
        with report_errors(f"table {name}"):
            return self.client.list_rows(self.client.get_table(name)).to_arrow(
                create_bqstorage_client=False
            )

    def batches(self, name: str, kind: str, export: str, scratch: Path) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a table in batches, in any order.

        Args:
            name: Full name of the table.
            kind: Beginning of the names of its files.
            export: Address of the folder that they were written to; empty for pages of rows.
            scratch: Folder for one of the files at a time.

        Raises:
            ConfigError: BigQuery refuses, or there are no files.
        """
        if export:
            yield from _batches_of_files(export, kind, scratch)
            return
        with report_errors(f"table {name}"):
            rows = self.client.list_rows(self.client.get_table(name))
            yield from read_pages(rows, f"table {name}")


def _batches_of_files(address: str, kind: str, scratch: Path) -> Iterator[pa.RecordBatch]:
    bucket = Bucket(address, "--export")
    objects = [each for each in bucket.list() if each.name.startswith(f"{kind}-")]
    if not objects:
        raise ConfigError(f"--export={address}: BigQuery wrote no {kind}-*.parquet there.")
    for each in progress(objects, total=len(objects), what=f"reading {kind}", seconds=10.0):
        path = scratch / f"{kind}.parquet"
        bucket.download(each.name, path)
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(BLOCK)
        path.unlink()
