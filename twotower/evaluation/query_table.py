"""The figures of every query as a table, from which runs are compared without ranking again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.arrow import plain_text
from twotower.core.files import atomic
from twotower.evaluation.evaluate import Evaluation
from twotower.evaluation.metrics import RANKING_METRICS
from twotower.evaluation.queries import Queries

PROTOCOL_KEY = b"twotower"  # of the metadata of the schema
SLICE = "slice/"  # start of the names of columns that divide the queries


def query_table(
    user_ids: pa.ChunkedArray,
    queries: Queries,
    evaluations: Mapping[str, Evaluation],
    protocol: Mapping[str, Any],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> pa.Table:
    """Returns the figures of every query, a row for each, in the order of the queries.

    Args:
        user_ids: Ids of all users, U.
        queries: Queries that were measured.
        evaluations: What was measured of each ranking, by its name.
        protocol: How it was measured; kept as JSON in the metadata of the schema.
        labels: Value of each query by the name of a slice, see `twotower.evaluation.slices`; "" of
            one that is in none.

    Returns:
        Columns "user", the id as text; "query", the number of the query; "answered", whether it has
        a right answer, so that it counts in the means; "relevant", the number of right answers; one
        for each ranking and metric, such as "model/recall@10", null where nothing was asked; and
        one for each slice, such as "slice/users".
    """
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "user": plain_text(user_ids.take(pa.array(queries.user))),
        "query": pa.array(np.arange(len(queries), dtype=np.int64)),
    }
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
    file = "queries.parquet"
    # Beside the figures of the split, which are named alike.
    if name != "test":
        file = f"queries_{name}.parquet"
    return workdir / "evaluation" / file
