"""The embedding history in BigQuery: dates of the Parquet history, each loaded whole into its
partition.

Tables user_embeddings and item_embeddings of a dataset, partitioned by run_date and clustered by
run_id and entity_id; the vector is a REPEATED FLOAT of one width, as VECTOR_SEARCH and CREATE
VECTOR INDEX ask for.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.errors import HistoryError
from twotower.data.sources.bigquery import report_errors
from twotower.integrations.embedding_history import BLOCK, SCHEMA, TABLES, EmbeddingHistory, Stored

COLUMNS = {
    "run_date": ("DATE", "NULLABLE"),
    "run_id": ("STRING", "NULLABLE"),
    "experiment_id": ("STRING", "NULLABLE"),
    "model_version": ("STRING", "NULLABLE"),
    "entity_id": ("STRING", "NULLABLE"),
    "vector": ("FLOAT", "REPEATED"),
}
WIDTH = (
    "vector_width"  # a label of the table: an index over vectors of several widths cannot be made
)
_ALIASES = {"FLOAT64": "FLOAT"}


@dataclasses.dataclass(frozen=True)
class BigQueryHistory:
    """The tables of a dataset.

    Attributes:
        client: a `google.cloud.bigquery.Client`; see `twotower.data.sources.bigquery.make_client`.
        dataset: PROJECT.DATASET, or DATASET of the client's project; it must exist.
    """

    client: Any
    dataset: str

    def __post_init__(self):
        if not re.fullmatch(
            r"(([\w.-]+:)?[\w-]+\.)?\w+", self.dataset
        ):  # a project may begin with a domain and a colon
            raise HistoryError(f"{self.dataset!r} must be PROJECT.DATASET or DATASET.")

    def load(self, history: EmbeddingHistory, run_date: datetime.date) -> dict[str, int]:
        """Loads a date of `history`, all runs of it, in the place of what the partition held: a
        repeat changes nothing.

        Both tables are made or checked before anything is loaded. A load job loads all of its rows
        or none.

        Returns:
            The name of each table loaded into, and how many rows.

        Raises:
            HistoryError: nothing of that date is kept, a table has other columns, partitions or
                widths, or BigQuery refuses.
        """
        of_date = {side: found for side in TABLES if (found := history.stored(side, run_date))}
        if not of_date:
            raise HistoryError(
                f"{history.folder} holds no vectors of {run_date}; append a run of that date first."
            )
        widths = {side: _width(side, found) for side, found in of_date.items()}
        tables = {side: self._table(TABLES[side], width) for side, width in widths.items()}
        return {
            str(table.reference): self._load(table, of_date[side], run_date)
            for side, table in tables.items()
        }

    def _table(self, name: str, width: int) -> Any:
        """The table, made or else checked."""
        from google.api_core.exceptions import NotFound
        from google.cloud import bigquery

        full = ".".join(
            [*([] if "." in self.dataset else [self.client.project]), self.dataset, name]
        )
        with report_errors(f"table {full}", HistoryError):
            new = bigquery.Table(
                full, [bigquery.SchemaField(n, *kind) for n, kind in COLUMNS.items()]
            )
            new.time_partitioning = bigquery.TimePartitioning(field="run_date")
            new.clustering_fields = ["run_id", "entity_id"]
            new.labels = {WIDTH: str(width)} if width else {}
            try:
                table = self.client.get_table(full)
            except NotFound:
                table = self.client.create_table(new, exists_ok=True)
        _check(full, table, width)
        return table

    def _load(self, table: Any, stored: Sequence[Stored], run_date: datetime.date) -> int:
        from google.cloud import bigquery

        lists = bigquery.ParquetOptions()
        lists.enable_list_inference = True  # else a list would be a record of records
        config = bigquery.LoadJobConfig(
            source_format="PARQUET",
            parquet_options=lists,
            create_disposition="CREATE_NEVER",
            write_disposition="WRITE_TRUNCATE",
        )
        partition = f"{table.reference}${run_date:%Y%m%d}"
        with tempfile.TemporaryFile() as file, report_errors(f"table {partition}", HistoryError):
            _write(file, stored, run_date)
            job = self.client.load_table_from_file(
                file, partition, rewind=True, location=table.location, job_config=config
            )
            return job.result().output_rows


def _check(name: str, table: Any, width: int) -> None:
    found = {
        field.name: (_ALIASES.get(field.field_type, field.field_type), field.mode)
        for field in table.schema
    }
    for column in {**COLUMNS, **found}:
        if found.get(column) != COLUMNS.get(column):
            have, want = (" ".join(kinds.get(column, ("nothing",))) for kinds in (found, COLUMNS))
            raise HistoryError(
                f"table {name}: column {column!r} is {have} and must be {want}. Name another dataset."
            )
    by = table.time_partitioning
    if by is None or (by.field, by.type_) != ("run_date", "DAY"):
        raise HistoryError(
            f"table {name} must be partitioned by the DAY of run_date, not by {by}. Name another dataset."
        )
    had = table.labels.get(WIDTH, str(width))
    if width and had != str(width):
        raise HistoryError(
            f"table {name} holds vectors that are {had} wide (its label {WIDTH}), these are {width} wide, and an index needs "
            "one width. Name another dataset."
        )


def _width(side: str, stored: Sequence[Stored]) -> int:
    widths: Mapping[str, int] = {one.version.name: one.width for one in stored if one.rows}
    if len(set(widths.values())) > 1:
        raise HistoryError(
            f"{side} vectors of one date must have one width to be indexed together; they have: {widths}."
        )
    return max(widths.values(), default=0)


def _write(file: IO[bytes], stored: Sequence[Stored], run_date: datetime.date) -> None:
    """All rows of a date as one Parquet file."""
    schema = pa.schema([("run_date", pa.date32()), *SCHEMA])
    with pq.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=schema.names[:4]
    ) as writer:
        for batch in _batches(stored):
            dates = pa.array([run_date] * len(batch), pa.date32())
            writer.write_table(pa.Table.from_arrays([dates, *batch.columns], schema=schema))


def _batches(stored: Sequence[Stored]) -> Iterator[pa.RecordBatch]:
    for one in stored:
        with pq.ParquetFile(one.path) as file:
            yield from file.iter_batches(BLOCK)
