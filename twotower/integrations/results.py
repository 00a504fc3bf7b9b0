"""The results table: a row for each figure of each evaluation, beside the embedding history, and in
BigQuery beside the embeddings.

```
HISTORY/results/run_date=2026-11-25/evaluation-0f3a….parquet
```

A file is named by the hash of its rows, without the date: the same evaluation is kept once, however
often it is appended. BigQuery has the table partitioned by run_date; a date is replaced whole, by
all evaluations that the folder holds of it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.errors import HistoryError
from twotower.core.files import atomic, content_digest, read_json
from twotower.evaluation.measure import SUFFIXES, Measured
from twotower.evaluation.query_table import record_name
from twotower.integrations.bigquery_tables import (
    TableForm,
    check_dataset,
    open_table,
    replace_date,
)
from twotower.integrations.embedding_history import check_table_name
from twotower.integrations.mlflow_store import read_link
from twotower.retrieval.tower_programs import embedding_weights, model_version
from twotower.training.run import Run

if TYPE_CHECKING:  # an extra, which is not always installed
    from google.cloud.bigquery import Client

TABLE = "results"
MODEL = "model"  # system that is no baseline
SCHEMA = pa.schema(
    {
        "experiment_id": pa.string(),
        "run_id": pa.string(),
        "model_version": pa.string(),
        "data": pa.string(),
        "split": pa.string(),
        "step": pa.int64(),
        "queries": pa.int64(),
        "tried": pa.int64(),
        "system": pa.string(),
        "mask_seen": pa.bool_(),
        "slice": pa.string(),
        "slice_value": pa.string(),
        "metric": pa.string(),
        "k": pa.int64(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
    }
)


_BIGQUERY_TYPES = {
    pa.string(): "STRING",
    pa.int64(): "INTEGER",
    pa.bool_(): "BOOLEAN",
    pa.float64(): "FLOAT",
}
FORM = TableForm(
    {
        "run_date": ("DATE", "NULLABLE"),
        **{field.name: (_BIGQUERY_TYPES[field.type], "NULLABLE") for field in SCHEMA},
    },
    clustering=("experiment_id", "run_id", "metric"),
)


def append_results(
    history: Path | str,
    run: Run,
    measured: Measured,
    run_date: datetime.date,
    *,
    table: str = TABLE,
) -> tuple[Path, bool]:
    """Appends an evaluation to the results of a history, unless it is there already.

    Args:
        history: Folder of the history.
        run: Loaded run that was measured.
        measured: Figures of the evaluation.
        run_date: Date of the evaluation.
        table: Name of the table.

    Returns:
        The file of the evaluation, and whether it was written now.
    """
    check_table_name(table, "the table of results")
    link = read_link(run.workdir)
    # The hash of the report stands for the data: runs of other rows cannot be compared.
    report = run.workdir / "data" / "report.json"
    whole = {
        "experiment_id": link.experiment if link else "",
        "run_id": link.run_name if link else run.workdir.resolve().name,
        "model_version": _version_of(run),
        "data": content_digest(read_json(report))[:16] if report.exists() else "",
    }
    # Of how many configurations the run is the best; its baselines are not.
    tried = measured.get("tuning", {}).get("tried")
    rows = []
    for row in figure_rows(measured):
        is_tuned = row["system"] == MODEL
        rows.append(whole | row | {"tried": tried if is_tuned else None})
    # By way of JSON, in which NumPy's numbers and Python's are written alike.
    digest = content_digest({"rows": json.loads(json.dumps(rows))})[:32]
    folder = Path(history) / table
    name = f"evaluation-{digest}.parquet"
    # On any date: an evaluation that is repeated a week later is no second one.
    for path in folder.glob(f"run_date=*/{name}"):
        return path, False
    path = folder / f"run_date={run_date.isoformat()}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    return path, True


def load_results(
    client: Client,
    dataset: str,
    history: Path | str,
    run_date: datetime.date,
    *,
    table: str = TABLE,
) -> tuple[str, int]:
    """Replaces the partition of a date in BigQuery by all evaluations of that date.

    Args:
        client: Client of BigQuery; see `twotower.data.sources.bigquery.make_client`.
        dataset: PROJECT.DATASET, or DATASET of the client's project; it must exist.
        history: Folder of the history.
        run_date: Date of the evaluations and of the partition.
        table: Name of the table, in the history and in the dataset.

    Returns:
        The whole name of the table, and the number of rows of the date.

    Raises:
        HistoryError: Nothing of that date is kept, the table has another form, or BigQuery refuses.
    """
    check_dataset(dataset)
    folder = Path(history) / table / f"run_date={run_date.isoformat()}"
    # The whole date, as a partition is replaced whole.
    files = sorted(folder.glob("evaluation-*.parquet"))
    if not files:
        raise HistoryError(f"{folder} holds no evaluations; evaluate with --history first.")
    # An older file has no column that came later.
    parts = [pq.read_table(file) for file in files]
    rows = pa.concat_tables(parts, promote_options="default").to_pylist()
    target = open_table(client, dataset, table, FORM, {})

    def write(file: IO[bytes]) -> None:
        dated = [row | {"run_date": run_date} for row in rows]
        schema = pa.schema([("run_date", pa.date32()), *SCHEMA])
        pq.write_table(pa.Table.from_pylist(dated, schema), file)

    return str(target.reference), replace_date(client, target, run_date, write)


def date_of(path: Path) -> datetime.date:
    """Returns the date of a file of the table, by the name of its folder."""
    return datetime.date.fromisoformat(path.parent.name.partition("=")[2])


def figure_rows(measured: Measured) -> Iterator[dict[str, Any]]:
    """Yields a row for each figure of the model, the baselines and the slices of an evaluation."""
    protocol = measured["protocol"]
    common = {
        "split": record_name(protocol),
        "step": protocol["step"],
        "slice": "",
        "slice_value": "",
    }
    common["queries"] = protocol.get("asked")
    # The main figures are those with seen items masked.
    for suffix in SUFFIXES:
        seen = common | {"mask_seen": not suffix}
        intervals = measured.get(f"model_intervals{suffix}", {})
        yield from _rows(seen | {"system": MODEL}, measured.get(f"model{suffix}", {}), intervals)
        # Evaluations of earlier versions have intervals of the model alone.
        others = measured.get(f"baseline_intervals{suffix}", {})
        for name, figures in measured.get(f"baselines{suffix}", {}).items():
            yield from _rows(seen | {"system": name}, figures, others.get(name, {}))
    for name, values in measured.get("slices", {}).items():
        for value, part in values.items():
            sliced = {"slice": name, "slice_value": str(value), "queries": part.get("queries")}
            row = common | sliced | {"mask_seen": True, "system": MODEL}
            yield from _rows(row, part.get("model", {}), part.get("intervals", {}))


def _rows(
    row: Mapping[str, Any], figures: Mapping[str, Any], intervals: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one system: recall@10 is the metric recall at k = 10."""
    is_unasked = not figures.get("queries", 1)
    for name, value in figures.items():
        # In a file they are null where nothing was asked; 0 would be a figure.
        if not isinstance(value, (int, float)) or (is_unasked and isinstance(value, float)):
            continue
        metric, _, k = name.partition("@")
        low, high = intervals.get(name) or (None, None)
        # "coverage" of lists has a length, "auc" has none.
        length = int(k) if k.isdigit() else None
        figure = {"metric": metric, "k": length, "value": float(value), "low": low, "high": high}
        yield {**row, **figure}


def _version_of(run: Run) -> str:
    """Returns the hash of the weights, as in the manifest of their bundle."""
    # Computed anew: a run that was measured need not have been exported.
    return model_version(jax.tree.map(np.asarray, embedding_weights(run.weights)))
