"""Keeps the vectors of each run by date, and compares those of two runs.

python -m experiments.history --history=runs/history --append=runs/quickstart
[--run_date=2026-11-25] python -m experiments.history --history=runs/history --list python -m
experiments.history --history=runs/history --bigquery=PROJECT.DATASET --run_date=2026-11-25  # or
beside --append python -m experiments.history --history=runs/history
--drift=2026-11-24/quickstart,2026-11-25/quickstart [--plot=drift.png]

The history is a Parquet dataset (see `twotower.integrations.embedding_history`). A repeat of
--append replaces what that run left on that date, one of --bigquery the partition of the date: give
the logical date where a scheduler may repeat it on another.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from absl import flags

from experiments import launch

_HISTORY = flags.DEFINE_string("history", None, "The folder of the history.")
_APPEND = flags.DEFINE_string(
    "append", None, "The folder of a run with a bundle, whose vectors to keep."
)
_RUN_DATE = flags.DEFINE_string("run_date", None, "YYYY-MM-DD of the run; by default today, UTC.")
_RUN_ID = flags.DEFINE_string("run_id", None, "What the run is called; by default as its folder.")
_EXPERIMENT_ID = flags.DEFINE_string(
    "experiment_id", "", "What was run; by default a hash of the configuration."
)
_BIGQUERY = flags.DEFINE_string(
    "bigquery", None, "PROJECT.DATASET or DATASET: load all runs of the date into its tables."
)
_DRIFT = flags.DEFINE_list(
    "drift", None, "OLD,NEW: two versions of --list, each DATE/RUN, to compare."
)
_SIDE = flags.DEFINE_enum("side", "item", ["item", "user"], "Whose vectors --drift compares.")
_K = flags.DEFINE_integer("k", 10, "Nearest neighbours that --drift compares.", lower_bound=1)
_PLOT = flags.DEFINE_string("plot", None, "Where --drift writes a plot, such as drift.png.")
_LIST = flags.DEFINE_bool("list", False, "Print what is kept.")


def main() -> None:
    from twotower.core.errors import ConfigError
    from twotower.integrations.embedding_history import EmbeddingHistory, parse_date

    keeps = _APPEND.value is not None or _BIGQUERY.value is not None
    if sum([keeps, _LIST.value, _DRIFT.value is not None]) != 1:
        raise ConfigError(
            "Give one of --append=RUN (and --bigquery), --bigquery=PROJECT.DATASET, --list and --drift=OLD,NEW."
        )
    history = EmbeddingHistory(_HISTORY.value)
    today = datetime.datetime.now(datetime.UTC).date()
    date = parse_date(_RUN_DATE.value, "--run_date") if _RUN_DATE.value else today
    if _APPEND.value is not None:
        append(history, Path(_APPEND.value), date)
    if _BIGQUERY.value is not None:
        load(history, _BIGQUERY.value, date)
    if _LIST.value:
        print_versions(history)
    if _DRIFT.value is not None:
        print_drift(history, _DRIFT.value)


def append(history, workdir: Path, date: datetime.date) -> None:
    """Keeps the vectors of the bundle of `workdir`."""
    from twotower.integrations.embedding_history import blocks_of, version_of
    from twotower.retrieval.retriever import Retriever
    from twotower.training.run import load_config

    load_config(workdir)  # says what to do where the folder is no run
    retriever = Retriever.load(workdir / "bundle")
    run_id = _RUN_ID.value or workdir.resolve().name
    version = version_of(
        retriever, run_date=date, run_id=run_id, experiment_id=_EXPERIMENT_ID.value
    )
    history.append(version, blocks_of(retriever))
    for side in ("user", "item"):
        stored = history.find(side, version.name)
        print(f"{stored.path}: {stored.rows:,} {side} vectors, {stored.width} wide.")


def load(history, dataset: str, date: datetime.date) -> None:
    """Loads a date into BigQuery."""
    from twotower.data.sources.bigquery import make_client
    from twotower.integrations.bigquery_history import BigQueryHistory

    project = dataset.rpartition(".")[0]
    for table, rows in BigQueryHistory(make_client(project), dataset).load(history, date).items():
        print(f"{table}: {rows:,} rows of {date}.")


def print_versions(history) -> None:
    """A line for each file."""
    lines = [("", "run", "experiment", "model", "vectors", "width")]
    for side in ("user", "item"):
        for one in history.stored(side):
            v = one.version
            lines.append(
                (
                    side,
                    v.name,
                    v.experiment_id,
                    v.model_version[:12],
                    f"{one.rows:,}",
                    str(one.width),
                )
            )
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if len(lines) == 1:
        print(f"  {history.folder} holds nothing yet.")


def print_drift(history, names: list[str]) -> None:
    """How far the vectors have moved, and a plot where one is asked for."""
    from twotower.core.errors import ConfigError
    from twotower.integrations import drift

    if len(names) != 2:
        raise ConfigError(
            f"--drift={','.join(names)} must name two versions, OLD,NEW, each DATE/RUN as --list prints them."
        )
    old, new = (history.read(history.find(_SIDE.value, name)) for name in names)
    found = drift.compare(old, new, k=_K.value)
    print(f"{_SIDE.value} vectors, {names[0]} -> {names[1]}\n{drift.format_drift(found)}")
    if _PLOT.value:
        drift.plot(found, _PLOT.value, title=f"{_SIDE.value} vectors: {names[0]} to {names[1]}")
        print(f"Plotted to {_PLOT.value}.")


if __name__ == "__main__":
    launch.run(main, required=["history"])
