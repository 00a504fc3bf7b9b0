"""The figures of every query as a table, from which runs are compared without ranking again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.arrow import plain_text
from twotower.core.files import atomic
from twotower.evaluation.evaluate import Evaluation
from twotower.evaluation.metrics import RANKING_METRICS
from twotower.evaluation.queries import Queries

if TYPE_CHECKING:  # who compares tables needs none of what makes slices
    from twotower.evaluation.slices import Cells

PROTOCOL_KEY = b"twotower"  # of the metadata of the schema
SLICE = "slice/"  # start of the names of columns that divide the queries


def query_table(
    user_ids: pa.ChunkedArray,
    queries: Queries,
    evaluations: Mapping[str, Evaluation],
    protocol: Mapping[str, Any],
    labels: Mapping[str, Sequence[str]] | None = None,
    item_ids: pa.ChunkedArray | None = None,
) -> pa.Table:
    """Returns the figures of every query, a row for each, in the order of the queries.

    Args:
        user_ids: Ids of all users, U.
        queries: Queries that were measured.
        evaluations: What was measured of each ranking, by its name.
        protocol: How it was measured; kept as JSON in the metadata of the schema.
        labels: Value of each query by the name of a slice, see `twotower.evaluation.slices`; "" of
            one that is in none.
        item_ids: Ids of the corpus, N; None leaves out the hash of the answers.

    Returns:
        Columns "user", the id as text; "query", the number of the query; "answered", whether it has
        a right answer, so that it counts in the means; "relevant", the number of right answers;
        "answers", a hash of the ids of those in the corpus, in any order; one for each ranking and
        metric, such as "model/recall@10", null where nothing was asked; and one for each slice,
        such as "slice/users".
    """
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "user": plain_text(user_ids.take(pa.array(queries.user))),
        "query": pa.array(np.arange(len(queries), dtype=np.int64)),
    }
    if item_ids is not None:
        columns["answers"] = pa.array(_answer_hashes(item_ids, queries))
    for ranking, evaluation in evaluations.items():
        columns["answered"] = pa.array(evaluation.is_averaged)
        columns["relevant"] = pa.array(evaluation.num_relevant)
        for name, values in evaluation.values.items():
            # Of the metrics of accuracy alone: the others say nothing of a single query.
            if name.partition("@")[0] in RANKING_METRICS:
                is_missing = ~evaluation.is_averaged
                columns[f"{ranking}/{name}"] = pa.array(values, pa.float64(), mask=is_missing)
    for name, values in (labels or {}).items():
        columns[f"{SLICE}{name}"] = pa.array(values, pa.string())
    # In the file itself, as tables of two protocols must not be compared.
    metadata = {PROTOCOL_KEY: json.dumps(protocol).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def _answer_hashes(item_ids: pa.ChunkedArray, queries: Queries) -> np.ndarray:
    """Returns a hash of the right answers of each query that are in the corpus, uint64 [Q]."""
    # Those that users had seen are no answers of masked lists.
    relevant = queries.without_seen().relevant
    items, number = np.unique(relevant.values, return_inverse=True)
    # By ids and not by rows: another run may have its items in another order.
    texts = plain_text(item_ids.take(pa.array(items))).to_pylist()
    digests = [hashlib.blake2b(str(text).encode(), digest_size=8).digest() for text in texts]
    hashes = np.frombuffer(b"".join(digests), np.uint64)
    # Sums, which wrap around and know no order.
    totals = np.append(np.uint64(0), np.cumsum(hashes[number], dtype=np.uint64))
    return totals[relevant.offsets[1:]] - totals[relevant.offsets[:-1]]


def item_slice_table(
    user_ids: pa.ChunkedArray, queries: Queries, name: str, cells: Cells
) -> pa.Table:
    """Returns the figures of a slice of items, a row for each query and value that it asks for.

    Args:
        user_ids: Ids of all users, U.
        queries: Queries that were measured.
        name: Name of the slice, such as "items".
        cells: Its cells.

    Returns:
        Columns "user", "query" and "relevant" as in `query_table`; "slice" and "value"; and one for
        each ranking and metric.
    """
    rows = np.flatnonzero(cells.num_relevant > 0)
    query = cells.query[rows]
    values = np.array(cells.slice.values, object)[cells.group[rows]]
    columns: dict[str, Any] = {
        "user": plain_text(user_ids.take(pa.array(queries.user[query]))),
        "query": pa.array(query.astype(np.int64)),
        "slice": pa.array([name] * len(rows), pa.string()),
        "value": pa.array(values, pa.string()),
        "relevant": pa.array(cells.num_relevant[rows].astype(np.int32)),
    }
    for ranking, figures in cells.values.items():
        for metric, column in figures.items():
            columns[f"{ranking}/{metric}"] = pa.array(column[rows], pa.float64())
    return pa.table(columns)


def write_query_table(table: pa.Table, path: Path) -> None:
    """Writes such a table as Parquet, whole or not at all."""
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def record_name(protocol: Mapping[str, Any]) -> str:
    """Returns the name that the figures of an evaluation are kept under: "test", "test_last".

    It is that of the split or of a further test set, with the targets where any were named.
    """
    name = protocol.get("test_set", protocol["split"])
    if "targets" in protocol:
        name = f"{name}_{protocol['targets']}"
    return name


def query_table_path(workdir: Path, name: str) -> Path:
    """Returns the file in the folder of a run that has the figures of every query.

    Args:
        workdir: Folder of the run.
        name: Name that `record_name` gives, such as "validation".
    """
    return _path(workdir, "queries", name)


def item_slice_path(workdir: Path, name: str) -> Path:
    """Returns the file beside it that has those of slices of items, see `item_slice_table`."""
    return _path(workdir, "item_slices", name)


def _path(workdir: Path, kind: str, name: str) -> Path:
    # Beside the figures of the split, which are named alike.
    file = f"{kind}.parquet" if name == "test" else f"{kind}_{name}.parquet"
    return workdir / "evaluation" / file
