"""The embedding history in BigQuery: dates of the Parquet history, each loaded whole into its
partition.

A dataset has the tables of the history, by default user_embeddings and item_embeddings, partitioned
by run_date and clustered by run_id and entity_id. The vector is a REPEATED FLOAT of one width,
which VECTOR_SEARCH and CREATE VECTOR INDEX need.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.errors import HistoryError
from twotower.data.sources.bigquery import make_client
from twotower.integrations.bigquery_tables import (
    TableForm,
    check_dataset,
    open_table,
    replace_date,
)
from twotower.integrations.embedding_history import (
    BLOCK,
    SCHEMA,
    EmbeddingHistory,
    VectorFile,
)

if TYPE_CHECKING:  # an extra, which is not always installed
    from google.cloud.bigquery import Client, Table

# Most queries name a run, and then entities.
FORM = TableForm(
    {
        "run_date": ("DATE", "NULLABLE"),
        "run_id": ("STRING", "NULLABLE"),
        "experiment_id": ("STRING", "NULLABLE"),
        "model_version": ("STRING", "NULLABLE"),
        "entity_id": ("STRING", "NULLABLE"),
        "vector": ("FLOAT", "REPEATED"),
    },
    clustering=("run_id", "entity_id"),
)
# A label of the table: no index can be made over vectors of several widths, and a REPEATED column
# has no width of its own.
WIDTH_LABEL = "vector_width"


@dataclasses.dataclass(frozen=True)
class BigQueryHistory:
    """The embedding history in the tables of a dataset.

    Attributes:
        client: Client of BigQuery; see `twotower.data.sources.bigquery.make_client`.
        dataset: PROJECT.DATASET, or DATASET of the client's project; it must exist.
    """

    client: Client
    dataset: str

    def __post_init__(self):
        check_dataset(self.dataset)

    def load(self, history: EmbeddingHistory, run_date: datetime.date) -> dict[str, int]:
        """Replaces the partition of a date by all runs of that date.

        A repeat changes nothing. Both tables are made or checked before anything is loaded, and a
        load job loads all of its rows or none.

        Args:
            history: The history that holds the vectors.
            run_date: Date of the runs and of the partition.

        Returns:
            The number of rows loaded into each table, by its name.

        Raises:
            HistoryError: Nothing of that date is kept, a table has other columns, partitions or
                widths, or BigQuery refuses.
        """
        files: dict[str, list[VectorFile]] = {}
        for side in history.tables:
            files_of_side = history.files(side, run_date)
            if files_of_side:
                files[side] = files_of_side
        if not files:
            raise HistoryError(
                f"{history.folder} holds no vectors of {run_date}; append a run of that date first."
            )
        widths = {side: _width(side, files_of_side) for side, files_of_side in files.items()}
        # All tables first: a wrong one is refused before the other is changed.
        tables = {}
        for side, width in widths.items():
            tables[side] = self._table(history.tables[side], width)
        return {
            str(table.reference): self._load(table, files[side], run_date)
            for side, table in tables.items()
        }

    def _table(self, name: str, width: int) -> Table:
        """Returns the table, made where there is none, else checked."""
        labels = {}
        # A date without rows has no width: its table will take any.
        if width:
            labels[WIDTH_LABEL] = str(width)
        table = open_table(self.client, self.dataset, name, FORM, labels)
        _check_width(table, width)
        return table

    def _load(self, table: Table, files: Sequence[VectorFile], run_date: datetime.date) -> int:
        """Loads files into the partition of a date and returns the number of rows."""

        # One file and so one job for all runs of the date: the partition changes at once.
        def write(target: IO[bytes]) -> None:
            _write(target, files, run_date)

        return replace_date(self.client, table, run_date, write)


def open_dataset(dataset: str) -> BigQueryHistory:
    """Opens PROJECT.DATASET, or DATASET of the environment's project."""
    project = dataset.rpartition(".")[0]
    return BigQueryHistory(make_client(project), dataset)


def _check_width(table: Table, width: int) -> None:
    """Refuses a table that vectors of this width cannot be loaded into."""
    # Without the label the table was made by hand, or by a date without rows: any width will do.
    table_width = table.labels.get(WIDTH_LABEL, str(width))
    if width and table_width != str(width):
        raise HistoryError(
            f"table {table.reference} holds vectors that are {table_width} wide (its label "
            f"{WIDTH_LABEL}), these are {width} wide, and an index needs one width. Name another "
            "dataset or table."
        )


def _width(side: str, files: Sequence[VectorFile]) -> int:
    """Returns the one width of the vectors of a date; 0 where there are none."""
    # A file without rows has the width 0, and no part in this.
    widths = {file.version.name: file.width for file in files if file.rows}
    if len(set(widths.values())) > 1:
        raise HistoryError(
            f"{side} vectors of one date must have one width to be indexed together; "
            f"they have: {widths}."
        )
    return max(widths.values(), default=0)


def _write(target: IO[bytes], files: Sequence[VectorFile], run_date: datetime.date) -> None:
    """Writes all rows of a date as one Parquet file."""
    # The history has the date in the names of its folders, which a load job does not read.
    schema = pa.schema([("run_date", pa.date32()), *SCHEMA])
    repeated = schema.names[:4]  # all but ids and vectors, which hardly repeat
    with pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=repeated) as writer:
        for batch in _batches(files):
            dates = pa.array([run_date] * len(batch), pa.date32())
            writer.write_table(pa.Table.from_arrays([dates, *batch.columns], schema=schema))


def _batches(files: Sequence[VectorFile]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of several files, a block at a time."""
    for file in files:
        with pq.ParquetFile(file.path) as reader:
            yield from reader.iter_batches(BLOCK)
