"""Tables of BigQuery that are partitioned by the date of a run, and replaced a date at a time.

A load job takes the place of one partition whole, or changes nothing: a command that is repeated
leaves the same rows.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from twotower.core.errors import HistoryError
from twotower.data.sources.bigquery import report_errors

if TYPE_CHECKING:  # an extra, which is not always installed
    from google.cloud.bigquery import Client, Table

# Tables that were made by SQL may say their types so.
_TYPE_ALIASES = {"FLOAT64": "FLOAT", "INT64": "INTEGER", "BOOL": "BOOLEAN"}
# A project may begin with a domain and a colon.
_DATASET = re.compile(r"(([\w.-]+:)?[\w-]+\.)?\w+")


@dataclasses.dataclass(frozen=True)
class TableForm:
    """The form of a table, partitioned by the day of its column run_date.

    Attributes:
        columns: Type and mode of each column, in the order of the Parquet files; run_date first.
        clustering: Columns that most queries name, the first one first.
    """

    columns: Mapping[str, tuple[str, str]]
    clustering: Sequence[str]


def check_dataset(dataset: str) -> None:
    """Refuses what is no name of a dataset."""
    if not _DATASET.fullmatch(dataset):
        raise HistoryError(f"{dataset!r} must be PROJECT.DATASET or DATASET.")


def open_table(
    client: Client, dataset: str, name: str, form: TableForm, labels: Mapping[str, str]
) -> Table:
    """Returns a table, made where there is none, else checked.

    Args:
        client: Client of BigQuery; see `twotower.data.sources.bigquery.make_client`.
        dataset: PROJECT.DATASET, or DATASET of the client's project; it must exist.
        name: Name of the table in it.
        form: Columns, and what they are clustered by.
        labels: Labels of a table that is made.

    Raises:
        HistoryError: The table has another form, or BigQuery refuses.
    """
    # In the functions, since the extra may be missing.
    from google.api_core.exceptions import NotFound
    from google.cloud import bigquery

    full_name = f"{dataset}.{name}"
    if "." not in dataset:
        full_name = f"{client.project}.{full_name}"
    with report_errors(f"table {full_name}", HistoryError):
        fields = [bigquery.SchemaField(column, *kind) for column, kind in form.columns.items()]
        new_table = bigquery.Table(full_name, fields)
        new_table.time_partitioning = bigquery.TimePartitioning(field="run_date")
        new_table.clustering_fields = list(form.clustering)
        if labels:
            new_table.labels = dict(labels)
        try:
            table = client.get_table(full_name)
        except NotFound:
            # Another process may have made it in between.
            table = client.create_table(new_table, exists_ok=True)
    _check_form(full_name, table, form)
    return table


def replace_date(
    client: Client, table: Table, run_date: datetime.date, write: Callable[[IO[bytes]], None]
) -> int:
    """Replaces the partition of a date by the rows of one Parquet file.

    Args:
        client: Client of BigQuery.
        table: Table that `open_table` returned.
        run_date: Date of the partition, and of all rows.
        write: Function that writes the file, with the columns of the table.

    Returns:
        The number of rows.

    Raises:
        HistoryError: BigQuery refuses; the partition is as it was.
    """
    from google.cloud import bigquery

    parquet_options = bigquery.ParquetOptions()
    parquet_options.enable_list_inference = True  # else a list would be a record of records
    # The table was made and checked before; truncation is of the partition that is named alone.
    config = bigquery.LoadJobConfig(
        source_format="PARQUET",
        parquet_options=parquet_options,
        create_disposition="CREATE_NEVER",
        write_disposition="WRITE_TRUNCATE",
    )
    partition = f"{table.reference}${run_date:%Y%m%d}"
    with tempfile.TemporaryFile() as file, report_errors(f"table {partition}", HistoryError):
        write(file)
        job = client.load_table_from_file(
            file, partition, rewind=True, location=table.location, job_config=config
        )
        job.result()
        return job.output_rows or 0


def _check_form(name: str, table: Table, form: TableForm) -> None:
    """Refuses a table of other columns or partitions."""
    columns = {}
    for field in table.schema:
        field_type = _TYPE_ALIASES.get(field.field_type, field.field_type)
        columns[field.name] = (field_type, field.mode)
    # Columns that are missing, and columns that are too many.
    for column in {**form.columns, **columns}:
        if columns.get(column) != form.columns.get(column):
            raise HistoryError(
                f"table {name}: column {column!r} is {_describe(columns, column)} and must be "
                f"{_describe(form.columns, column)}. Name another dataset or table."
            )
    partitioning = table.time_partitioning
    if partitioning is None or (partitioning.field, partitioning.type_) != ("run_date", "DAY"):
        raise HistoryError(
            f"table {name} must be partitioned by the DAY of run_date, not by {partitioning}. "
            "Name another dataset or table."
        )


def _describe(columns: Mapping[str, tuple[Any, Any]], column: str) -> str:
    """Returns a column's type and mode for a message, "nothing" where it is missing."""
    return " ".join(map(str, columns.get(column, ("nothing",))))
