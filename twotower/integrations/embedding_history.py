"""The embedding history: the vectors of each run, in two tables partitioned by the date of the run.

```
HISTORY/item_embeddings/run_date=2026-11-25/run-shop.parquet
HISTORY/user_embeddings/run_date=2026-11-25/run-shop.parquet
```

It is a hive-partitioned Parquet dataset with the columns run_id, experiment_id, model_version,
entity_id and vector, as pyarrow, DuckDB, Spark and BigQuery read it. Every run of a date has a file
of its own, which is there whole or not at all; a repeat takes its place.
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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from twotower.config import Config
from twotower.core.errors import HistoryError
from twotower.core.files import atomic, content_digest
from twotower.core.progress import progress
from twotower.core.tables import format_table
from twotower.index.base import check_vectors
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.weights import model_version

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
PARTITION = pa.schema({"run_date": pa.date32()})
BLOCK = 65_536  # rows written, and embedded, at once

Block = tuple[pa.Array, np.ndarray]  # ids [n] and vectors [n, D]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """Run and date that vectors are of.

    Attributes:
        run_date: date of the partition; of scheduled work its logical date, so that a repeat finds
            it again.
        run_id: name of the run, one of its date.
        experiment_id: name of what was run, the same on every date.
        model_version: hash of the weights, as in the bundle's manifest.
    """

    run_date: datetime.date
    run_id: str
    experiment_id: str
    model_version: str

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]{1,50}", self.run_id):  # part of a file's name
            raise HistoryError(
                f"run_id={self.run_id!r} must be of 1 to 50 letters, digits, '.', '_' and '-'."
            )

    @property
    def name(self) -> str:
        return f"{self.run_date}/{self.run_id}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorFile:
    """One file of the history: the vectors of one side and version.

    Attributes:
        version: run and date.
        path: the Parquet file.
        rows: number of vectors, N.
        width: width of the vectors, D; 0 without rows.
    """

    version: Version
    path: Path
    rows: int
    width: int


class EmbeddingHistory:
    """The history in `folder`, which need not exist yet."""

    def __init__(self, folder: str | os.PathLike):
        if "://" in str(folder):
            raise HistoryError(
                f"history={folder} must be a folder of this machine (or one mounted into it)."
            )
        self.folder = Path(folder)

    def append(self, version: Version, sides: Mapping[str, Iterable[Block]]) -> None:
        """Keeps the vectors of a run.

        Those that it had before on that date are replaced when all are written.

        Args:
            version: run and date.
            sides: blocks of ids [n] and vectors, float [n, D], of "user" and "item".

        Raises:
            HistoryError: a block has no id for a vector, or another width than the first.
            QueryError: a vector is not finite.
        """
        # Both sides are written before the first is put in its place.
        with contextlib.ExitStack() as stack:
            for side, blocks in sides.items():
                path = self._partition(side, version.run_date) / f"run-{version.run_id}.parquet"
                for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                    left.unlink(missing_ok=True)
                temporary = stack.enter_context(atomic(path))
                _write(temporary, version, blocks, what=f"{side} vectors of {version.name}")

    def files(self, side: str, run_date: datetime.date | None = None) -> list[VectorFile]:
        """Lists the files of a side, of one date or of all, by date and then by run id."""
        partition = f"run_date={run_date or '*'}"
        paths = (self.folder / TABLES[side]).glob(f"{partition}/run-*.parquet")
        files = [_read_file_info(path) for path in paths]
        return sorted(files, key=lambda file: (file.version.run_date, file.version.run_id))

    def find(self, side: str, name: str) -> VectorFile:
        """Finds the vectors that DATE/RUN names.

        Raises:
            HistoryError: there are none; the message names the latest.
        """
        date, _, run_id = name.partition("/")
        for file in self.files(side, parse_date(date, "the date of DATE/RUN")):
            if file.version.run_id == run_id:
                return file
        latest = ", ".join(file.version.name for file in self.files(side)[-10:]) or "none"
        raise HistoryError(
            f"{self.folder} has no {side} vectors of {name!r} (DATE/RUN); the latest are: {latest}."
        )

    def read(self, stored: VectorFile) -> tuple[pa.ChunkedArray, np.ndarray]:
        """Reads the entity ids and their vectors, float32 [N, D]."""
        vectors = np.empty((stored.rows, stored.width), np.float32)
        ids = []
        start = 0
        with pq.ParquetFile(stored.path) as file:
            for batch in file.iter_batches(BLOCK, columns=["entity_id", "vector"]):
                vectors[start : start + len(batch)] = _as_matrix(batch["vector"], stored.width)
                ids.append(batch["entity_id"])
                start += len(batch)
        return pa.chunked_array(ids, pa.string()), vectors

    def dataset(self, side: str) -> pyarrow.dataset.Dataset:
        """Returns all vectors of a side, with run_date as a column, to be filtered and joined."""
        partitioning = pyarrow.dataset.partitioning(PARTITION, flavor="hive")
        schema = pa.schema([*SCHEMA, *PARTITION])
        folder = self.folder / TABLES[side]
        if not folder.is_dir():
            raise HistoryError(f"{self.folder} has no {side} vectors yet.")
        return pyarrow.dataset.dataset(
            folder, schema=schema, format="parquet", partitioning=partitioning
        )

    def _partition(self, side: str, date: datetime.date) -> Path:
        return self.folder / TABLES[side] / f"run_date={date.isoformat()}"


def vector_blocks(retriever: Retriever, *, block: int = BLOCK) -> dict[str, Iterator[Block]]:
    """Returns the vectors of a bundle's users and items, in the blocks that `append` takes.

    Those of users are the ones that recommendations are made with.
    """
    bundle = retriever.bundle

    def rows(ids: pa.ChunkedArray, embed: Any, what: str) -> Iterator[Block]:
        starts = range(0, len(ids), block)
        for start in progress(starts, total=len(starts), what=what):
            some = ids.slice(start, block).combine_chunks()
            yield some, embed(some, slice(start, start + block))

    return {
        "user": rows(
            bundle.users["user_id"],
            lambda ids, _: retriever.embed_users(ids.to_pylist()),
            "Keeping users",
        ),
        "item": rows(
            bundle.items["item_id"], lambda _, part: bundle.vectors[part], "Keeping items"
        ),
    }


def make_version(
    retriever: Retriever, *, run_date: datetime.date, run_id: str, experiment_id: str = ""
) -> Version:
    """Returns the version of a bundle's vectors.

    Args:
        retriever: the loaded bundle.
        run_date: date of the run.
        run_id: name of the run.
        experiment_id: name of what was run; by default a hash of `Config.identity` but for the
            seed, which runs of one configuration share.
    """
    bundle, config = retriever.bundle, retriever.bundle.config
    unseeded = dataclasses.replace(
        config, training=dataclasses.replace(config.training, seed=Config().training.seed)
    )
    experiment_id = experiment_id or content_digest(unseeded.identity())[:12]
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
    """Keeps the vectors of a bundle.

    Args:
        history: the history to append to.
        retriever: the loaded bundle.
        run_date: date of the run.
        run_id: name of the run.
        experiment_id: name of the experiment; see `make_version`.

    Returns:
        The files of "user" and "item".
    """
    version = make_version(retriever, run_date=run_date, run_id=run_id, experiment_id=experiment_id)
    history.append(version, vector_blocks(retriever))
    return {side: history.find(side, version.name) for side in TABLES}


def format_versions(history: EmbeddingHistory) -> str:
    """Returns a table of what is kept, a row for each file."""
    rows = []
    for side in TABLES:
        for stored in history.files(side):
            version = stored.version
            rows.append(
                [
                    side,
                    version.name,
                    version.experiment_id,
                    version.model_version[:12],
                    f"{stored.rows:,}",
                    str(stored.width),
                ]
            )
    header = ["", "run", "experiment", "model", "vectors", "width"]
    table = format_table(rows, header, align="llllrr")
    if not rows:
        table += f"\n  {history.folder} holds nothing yet."
    return table


def parse_date(text: str, field: str) -> datetime.date:
    """Reads a date written YYYY-MM-DD."""
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return datetime.date.fromisoformat(text)
    raise HistoryError(f"{field}={text!r} must be a date, written YYYY-MM-DD.")


def _write(path: Path, version: Version, blocks: Iterable[Block], *, what: str) -> None:
    constant = {
        name: getattr(version, name) for name in ("run_id", "experiment_id", "model_version")
    }
    # Vectors and ids hardly repeat: a dictionary of them would cost time and save nothing.
    options = {
        "compression": "zstd",
        "use_dictionary": list(constant),
        "write_statistics": ["run_id", "entity_id"],
    }
    rows = 0
    width = 0
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
            same = {name: pa.repeat(value, len(ids)) for name, value in constant.items()}
            table = pa.table(
                {**same, "entity_id": ids, "vector": _as_lists(vectors)}, schema=SCHEMA
            )
            writer.write_table(table, row_group_size=BLOCK)
        about = constant | {"run_date": str(version.run_date), "rows": rows, "width": width}
        writer.add_key_value_metadata(
            {"twotower": json.dumps(about)}
        )  # so that a listing reads no column


def _read_file_info(path: Path) -> VectorFile:
    """Reads what a file says of itself, without a column of it."""
    try:
        about = json.loads(pq.read_metadata(path).metadata[b"twotower"])
        rows, width = about.pop("rows"), about.pop("width")
        version = Version(**about | {"run_date": datetime.date.fromisoformat(about["run_date"])})
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise HistoryError(
            f"{path} is no file of the history, or is damaged ({error}). Append that run again."
        ) from None
    if (path.parent.name, path.name) != (
        f"run_date={version.run_date}",
        f"run-{version.run_id}.parquet",
    ):
        raise HistoryError(f"{path} was moved or renamed: it holds the vectors of {version.name}.")
    return VectorFile(version=version, path=path, rows=rows, width=width)


def _as_lists(vectors: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.ravel()))


def _as_matrix(lists: pa.ListArray, width: int) -> np.ndarray:
    return lists.flatten().to_numpy().reshape(len(lists), width)
