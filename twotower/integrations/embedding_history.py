"""The embedding history: the vectors of each run, in two tables partitioned by the date of the run.

```
HISTORY/item_embeddings/run_date=2026-11-25/run-shop.parquet
HISTORY/user_embeddings/run_date=2026-11-25/run-shop.parquet
```

It is a hive-partitioned Parquet dataset with the columns run_id, experiment_id, model_version,
entity_id and vector, which pyarrow, DuckDB, Spark and BigQuery read. Every run of a date has a file
of its own, which is there whole or not at all; a repeat replaces it. The tables may have other
names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from twotower.config import Config
from twotower.core.errors import HistoryError
from twotower.core.files import atomic, content_digest
from twotower.core.progress import progress
from twotower.core.remote.mirror import pull, push
from twotower.core.remote.objects import is_remote
from twotower.core.tables import format_table
from twotower.index.base import check_vectors
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.tower_programs import model_version

TABLES = {"user": "user_embeddings", "item": "item_embeddings"}
SCHEMA = pa.schema(
    {
        "run_id": pa.string(),
        "experiment_id": pa.string(),
        "model_version": pa.string(),
        "entity_id": pa.string(),
        "vector": pa.list_(pa.float32()),
    }
)
# The date is in the name of the folder, not in the files: a hive partition.
PARTITION = pa.schema({"run_date": pa.date32()})
BLOCK = 65_536  # rows written, and embedded, at once

Block = tuple[pa.Array, np.ndarray]  # ids [n] and vectors [n, D]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """Run and date that made some vectors.

    Attributes:
        run_date: Date of the partition; for scheduled work its logical date, so that a repeat
            replaces it.
        run_id: Name of the run, unique within its date.
        experiment_id: Name of the experiment, the same on every date.
        model_version: Hash of the weights, as in the bundle's manifest.
    """

    run_date: datetime.date
    run_id: str
    experiment_id: str
    model_version: str

    def __post_init__(self):
        # It becomes part of a file's name, and of DATE/RUN on the command line.
        if not re.fullmatch(r"[\w.-]{1,50}", self.run_id):
            raise HistoryError(
                f"run_id={self.run_id!r} must be of 1 to 50 letters, digits, '.', '_' and '-'."
            )

    @property
    def name(self) -> str:
        """Name that `EmbeddingHistory.find` takes: DATE/RUN."""
        return f"{self.run_date}/{self.run_id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorFile:
    """One file of the history: the vectors of one side and version.

    Attributes:
        version: Run and date.
        path: The Parquet file.
        rows: Number of vectors, N.
        width: Width of the vectors, D; 0 without rows.
    """

    version: Version
    path: Path
    rows: int
    width: int


class EmbeddingHistory:
    """The history in a folder, which need not exist yet.

    Args:
        folder: Folder of the history, or its address in a bucket.
        tables: Names of the tables of "user" and "item", in the folder and in BigQuery.
    """

    def __init__(self, folder: str | os.PathLike, tables: Mapping[str, str] = TABLES):
        # Sides in one table would replace each other's files.
        names = list(tables.values())
        for side, name in tables.items():
            check_table_name(name, f"the table of {side} vectors")
        if len(set(names)) < len(names):
            raise HistoryError(f"the tables of users and items must differ; both are {names[0]!r}.")
        # A bucket has no rename that replaces a whole file at once, which `atomic` needs.
        self.folder = pull(folder, "history") if is_remote(folder) else Path(folder)
        self.tables = tables

    def append(self, version: Version, sides: Mapping[str, Iterable[Block]]) -> None:
        """Writes the vectors of a run.

        Earlier ones of the same run and date are replaced when all are written.

        Args:
            version: Run and date.
            sides: Blocks of ids [n] and vectors, float [n, D], of "user" and "item".

        Raises:
            HistoryError: A block has no id for a vector, or another width than the first.
            QueryError: A vector is not finite.
        """
        # Both sides are written before the first of them replaces a file.
        with contextlib.ExitStack() as stack:
            for side, blocks in sides.items():
                path = self._partition(side, version.run_date) / f"run-{version.run_id}.parquet"
                # A process that was killed leaves its temporary file, which may be large.
                for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                    leftover.unlink(missing_ok=True)
                temporary = stack.enter_context(atomic(path))
                _write(temporary, version, blocks, what=f"{side} vectors of {version.name}")
        push(self.folder)

    def files(self, side: str, run_date: datetime.date | None = None) -> list[VectorFile]:
        """Lists the files of a side, of one date or of all, by date and then by run id."""
        # By the folder's name: of the other dates no file is opened.
        partition = f"run_date={run_date or '*'}"
        paths = (self.folder / self.tables[side]).glob(f"{partition}/run-*.parquet")
        files = [_read_file_info(path) for path in paths]
        # A glob follows the order of the disk.
        return sorted(files, key=lambda file: (file.version.run_date, file.version.run_id))

    def find(self, side: str, name: str) -> VectorFile:
        """Finds the vectors that DATE/RUN names.

        Raises:
            HistoryError: There are none; the message names the latest.
        """
        date, _, run_id = name.partition("/")
        for file in self.files(side, parse_date(date, "the date of DATE/RUN")):
            if file.version.run_id == run_id:
                return file
        latest_names = [file.version.name for file in self.files(side)[-10:]]
        latest = ", ".join(latest_names) or "none"
        raise HistoryError(
            f"{self.folder} has no {side} vectors of {name!r} (DATE/RUN); the latest are: {latest}."
        )

    def read(self, file: VectorFile) -> tuple[pa.ChunkedArray, np.ndarray]:
        """Reads the entity ids and their vectors, float32 [N, D]."""
        # Filled block by block: lists of a million vectors would take their memory twice.
        vectors = np.empty((file.rows, file.width), np.float32)
        ids = []
        start = 0
        with pq.ParquetFile(file.path) as reader:
            for batch in reader.iter_batches(BLOCK, columns=["entity_id", "vector"]):
                vectors[start : start + len(batch)] = _as_matrix(batch["vector"], file.width)
                ids.append(batch["entity_id"])
                start += len(batch)
        return pa.chunked_array(ids, pa.string()), vectors

    def dataset(self, side: str) -> pyarrow.dataset.Dataset:
        """Returns all vectors of a side, with run_date as a column, to be filtered and joined."""
        partitioning = pyarrow.dataset.partitioning(PARTITION, flavor="hive")
        schema = pa.schema([*SCHEMA, *PARTITION])
        folder = self.folder / self.tables[side]
        if not folder.is_dir():
            raise HistoryError(f"{self.folder} has no {side} vectors yet.")
        return pyarrow.dataset.dataset(
            folder, schema=schema, format="parquet", partitioning=partitioning
        )

    def _partition(self, side: str, date: datetime.date) -> Path:
        return self.folder / self.tables[side] / f"run_date={date.isoformat()}"


def vector_blocks(retriever: Retriever, *, block: int = BLOCK) -> dict[str, Iterator[Block]]:
    """Returns the vectors of a bundle's users and items, in the blocks that `append` takes.

    The vectors of users are the ones that recommendations are made with.
    """
    bundle = retriever.bundle

    # Generators: a side is embedded as it is written, and never held whole.
    def user_blocks() -> Iterator[Block]:
        for _, ids in _id_blocks(bundle.users["user_id"], block, "Keeping users"):
            yield ids, retriever.embed_users(ids.to_pylist())

    def item_blocks() -> Iterator[Block]:
        for start, ids in _id_blocks(bundle.items["item_id"], block, "Keeping items"):
            yield ids, bundle.vectors[start : start + block]

    return {"user": user_blocks(), "item": item_blocks()}


def _id_blocks(ids: pa.ChunkedArray, block: int, what: str) -> Iterator[tuple[int, pa.Array]]:
    """Yields the first row and the ids of each block, with a bar of progress named `what`."""
    starts = range(0, len(ids), block)
    for start in progress(starts, total=len(starts), what=what):
        yield start, ids.slice(start, block).combine_chunks()


def make_version(
    retriever: Retriever, *, run_date: datetime.date, run_id: str, experiment_id: str = ""
) -> Version:
    """Returns the version of a bundle's vectors.

    Args:
        retriever: The loaded bundle.
        run_date: Date of the run.
        run_id: Name of the run.
        experiment_id: Name of the experiment; by default a hash of `Config.identity` without the
            seed, which runs of one configuration share.
    """
    bundle = retriever.bundle
    if not experiment_id:
        # The identity leaves out options at their default, so that an option that a later version
        # adds does not give one experiment two ids.
        training = dataclasses.replace(bundle.config.training, seed=Config().training.seed)
        unseeded = dataclasses.replace(bundle.config, training=training)
        experiment_id = content_digest(unseeded.identity())[:12]
    # A bundle in memory, of a checkpoint, has no manifest.
    weights = bundle.manifest.get("model_version") or model_version(bundle.towers.weights)
    return Version(
        run_date=run_date, run_id=run_id, experiment_id=experiment_id, model_version=weights
    )


def append_bundle(
    history: EmbeddingHistory,
    retriever: Retriever,
    *,
    run_date: datetime.date,
    run_id: str,
    experiment_id: str = "",
) -> dict[str, VectorFile]:
    """Appends the vectors of a bundle to a history.

    Args:
        history: The history to append to.
        retriever: The loaded bundle.
        run_date: Date of the run.
        run_id: Name of the run.
        experiment_id: Name of the experiment; see `make_version`.

    Returns:
        The files of "user" and "item".
    """
    version = make_version(retriever, run_date=run_date, run_id=run_id, experiment_id=experiment_id)
    history.append(version, vector_blocks(retriever))
    return {side: history.find(side, version.name) for side in history.tables}


def format_versions(history: EmbeddingHistory) -> str:
    """Returns a table of the history's files, a row for each."""
    rows = []
    for side in history.tables:
        for file in history.files(side):
            version = file.version
            row = [side, version.name, version.experiment_id, version.model_version[:12]]
            rows.append([*row, f"{file.rows:,}", str(file.width)])
    header = ["", "run", "experiment", "model", "vectors", "width"]
    table = format_table(rows, header, align="llllrr")
    if not rows:
        table += f"\n  {history.folder} holds nothing yet."
    return table


def parse_date(text: str, field: str) -> datetime.date:
    """Reads a date written YYYY-MM-DD.

    Args:
        text: Date as it was written.
        field: Name of the date in the message.

    Raises:
        HistoryError: It is no such date.
    """
    with contextlib.suppress(ValueError):
        # Python also reads 20261125 and 2026-W48-3, which name no folder of the history.
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return datetime.date.fromisoformat(text)
    raise HistoryError(f"{field}={text!r} must be a date, written YYYY-MM-DD.")


def check_table_name(name: str, what: str) -> None:
    """Refuses a name that no table of BigQuery, and perhaps no folder, can have.

    Args:
        name: Name of the table.
        what: Name of the table in the message.
    """
    if not re.fullmatch(r"\w{1,200}", name, re.ASCII):
        raise HistoryError(
            f"{name!r} cannot be {what}: give letters, digits and '_', such as "
            "two_tower_user_embedding."
        )


def _write(path: Path, version: Version, blocks: Iterable[Block], *, what: str) -> None:
    """Writes the vectors of one side; `what` names them in messages."""
    constants = {
        "run_id": version.run_id,
        "experiment_id": version.experiment_id,
        "model_version": version.model_version,
    }
    # Vectors and ids hardly repeat: a dictionary of them would cost time and save nothing.
    options = {
        "compression": "zstd",
        "use_dictionary": list(constants),
        "write_statistics": ["run_id", "entity_id"],
    }
    rows = 0
    width = 0  # known from the first block on
    with pq.ParquetWriter(path, SCHEMA, **options) as writer:
        for ids, vectors in blocks:
            vectors = check_vectors(vectors, what=what)
            if len(ids) != len(vectors) or ids.null_count:
                raise HistoryError(
                    f"{what}: {len(ids) - ids.null_count} ids for {len(vectors)} vectors; "
                    "give one each."
                )
            if width not in (0, vectors.shape[1]):
                raise HistoryError(
                    f"{what} are {vectors.shape[1]} wide after others that are {width} wide."
                )
            rows += len(ids)
            width = vectors.shape[1]
            columns = {name: pa.repeat(value, len(ids)) for name, value in constants.items()}
            columns |= {"entity_id": ids, "vector": _as_lists(vectors)}
            table = pa.table(columns, schema=SCHEMA)
            writer.write_table(table, row_group_size=BLOCK)
        # In the footer, so that a listing reads no column.
        info = constants | {"run_date": str(version.run_date), "rows": rows, "width": width}
        writer.add_key_value_metadata({"twotower": json.dumps(info)})


def _read_file_info(path: Path) -> VectorFile:
    """Reads the version and size in the footer of a file, and none of its columns."""
    try:
        info = json.loads(pq.read_metadata(path).metadata[b"twotower"])
        rows = info.pop("rows")
        width = info.pop("width")
        info["run_date"] = datetime.date.fromisoformat(info["run_date"])
        version = Version(**info)
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise HistoryError(
            f"{path} is no file of the history, or is damaged ({error}). Append that run again."
        ) from None
    # Readers of the dataset take the date from the folder, this module from the footer.
    if path.parts[-2:] != (f"run_date={version.run_date}", f"run-{version.run_id}.parquet"):
        raise HistoryError(f"{path} was moved or renamed: it holds the vectors of {version.name}.")
    return VectorFile(version=version, path=path, rows=rows, width=width)


def _as_lists(vectors: np.ndarray) -> pa.ListArray:
    """Returns vectors [n, D] as n lists over one flat array, without a loop over rows."""
    # int32 is enough for a block, as Arrow's lists have it.
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.ravel()))


def _as_matrix(lists: pa.ListArray, width: int) -> np.ndarray:
    """Returns n lists of one width as a matrix [n, width]."""
    values = lists.flatten().to_numpy()
    return values.reshape(len(lists), width)
