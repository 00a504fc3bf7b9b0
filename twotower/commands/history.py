r"""Keeps the vectors of each run by date, and compares the vectors of two runs.

    twotower history --history=runs/history --append=runs/quickstart \
        [--run_date=2026-11-25]

    twotower history --append --mlflow_experiment=shop [--mlflow_run=a]

    twotower history --history=runs/history --list

    twotower history --history=runs/history --bigquery=PROJECT.DATASET \
        --run_date=2026-11-25    # or beside --append

    twotower history --history=runs/history \
        --drift=2026-11-24/quickstart,2026-11-25/quickstart [--plot=drift.png]

The history is a Parquet dataset (see `twotower.integrations.embedding_history`). A repeat of
--append replaces the vectors of that run and date, a repeat of --bigquery the partition of the
date. Under a scheduler, which may repeat a command on another day, give its logical date.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from absl import flags

from twotower.commands import launch, mlflow_flags

if TYPE_CHECKING:
    from twotower.integrations.embedding_history import EmbeddingHistory

FLAGS = flags.FlagValues()
_HISTORY = flags.DEFINE_string(
    "history", "runs/history", "The folder of the history.", flag_values=FLAGS
)
# Without a value beside --mlflow_experiment.
_RUN = mlflow_flags.define_run(FLAGS, "bundle", "append", may_stand_alone=True)
_RUN_DATE = flags.DEFINE_string(
    "run_date", None, "YYYY-MM-DD of the run; by default today, UTC.", flag_values=FLAGS
)
_RUN_ID = flags.DEFINE_string(
    "run_id", None, "Name of the run; by default that of its folder.", flag_values=FLAGS
)
_EXPERIMENT_ID = flags.DEFINE_string(
    "experiment_id",
    "",
    "Name of the experiment; by default that in MLflow, or a hash of the configuration.",
    flag_values=FLAGS,
)
_BIGQUERY = flags.DEFINE_string(
    "bigquery",
    None,
    "PROJECT.DATASET or DATASET: load all runs of the date into its tables.",
    flag_values=FLAGS,
)
_USER_TABLE = flags.DEFINE_string(
    "user_table",
    "user_embeddings",
    "Table of the users' vectors, in the history and in BigQuery, such as "
    "two_tower_user_embedding.",
    flag_values=FLAGS,
)
_ITEM_TABLE = flags.DEFINE_string(
    "item_table", "item_embeddings", "Table of the items' vectors, likewise.", flag_values=FLAGS
)
_DRIFT = flags.DEFINE_list(
    "drift", None, "OLD,NEW: two versions of --list, each DATE/RUN, to compare.", flag_values=FLAGS
)
_SIDE = flags.DEFINE_enum(
    "side", "item", ["item", "user"], "Whose vectors --drift compares.", flag_values=FLAGS
)
_K = flags.DEFINE_integer(
    "k", 10, "Nearest neighbours that --drift compares.", lower_bound=1, flag_values=FLAGS
)
_PLOT = flags.DEFINE_string(
    "plot", None, "File for a plot of --drift, such as drift.png.", flag_values=FLAGS
)
_LIST = flags.DEFINE_bool("list", False, "Print the runs in the history.", flag_values=FLAGS)


def main() -> None:
    from twotower.core.errors import ConfigError
    from twotower.integrations.embedding_history import EmbeddingHistory, format_versions

    # Appending and loading into BigQuery go together; each of the others stands alone.
    writes = _RUN.workdir.value is not None or _BIGQUERY.value is not None
    if sum([writes, _LIST.value, _DRIFT.value is not None]) != 1:
        raise ConfigError(
            "Give one of --append=RUN (and --bigquery), --bigquery=PROJECT.DATASET, --list and "
            "--drift=OLD,NEW."
        )
    tables = {"user": _USER_TABLE.value, "item": _ITEM_TABLE.value}
    history = EmbeddingHistory(_HISTORY.value, tables)
    if writes:
        write(history)
    elif _LIST.value:
        print(format_versions(history))
    else:
        compare(history, _DRIFT.value or [])


def write(history: EmbeddingHistory) -> None:
    """Appends the vectors of a run, loads a date into BigQuery, or both."""
    from twotower.integrations.bigquery_history import open_dataset
    from twotower.integrations.embedding_history import append_bundle, parse_date
    from twotower.integrations.mlflow_store import read_link

    # UTC, so that machines in several places agree on the date.
    run_date = datetime.datetime.now(datetime.UTC).date()
    if _RUN_DATE.value:
        run_date = parse_date(_RUN_DATE.value, "--run_date")
    if _RUN.workdir.value is not None:
        workdir = _RUN.folder()
        # Resolved: of a link, such as "current", the name says nothing.
        run_id = _RUN_ID.value or workdir.resolve().name
        experiment_id = _EXPERIMENT_ID.value
        link = read_link(workdir)
        # A run from MLflow has its names there: the folder may be that of a download.
        if _RUN.is_of_mlflow and link is not None:
            run_id = _RUN_ID.value or link.run_name
            experiment_id = experiment_id or link.experiment
        # From the bundle, whose vectors are those that were served, and not from a checkpoint.
        retriever = launch.load_exported(workdir)
        files = append_bundle(
            history,
            retriever,
            run_date=run_date,
            run_id=run_id,
            experiment_id=experiment_id,
        )
        for side, file in files.items():
            print(f"{file.path}: {file.rows:,} {side} vectors, {file.width} wide.")
    # After --append, so that the date is loaded with the run that was just written.
    if _BIGQUERY.value is not None:
        dataset = open_dataset(_BIGQUERY.value)
        # All runs of the date, since BigQuery replaces a partition as a whole.
        rows_of_table = dataset.load(history, run_date)
        for table, rows in rows_of_table.items():
            print(f"{table}: {rows:,} rows of {run_date}.")


def compare(history: EmbeddingHistory, names: list[str]) -> None:
    """Prints how far the vectors have moved, and draws it into the file of --plot."""
    from twotower.core.errors import ConfigError
    from twotower.integrations import drift

    if len(names) != 2:
        raise ConfigError(
            f"--drift={','.join(names)} must name two versions, OLD,NEW, each DATE/RUN as --list "
            "prints them."
        )
    side = _SIDE.value
    old_name, new_name = names
    old = history.read(history.find(side, old_name))
    new = history.read(history.find(side, new_name))
    measured = drift.compare(old, new, k=_K.value)
    print(f"{side} vectors, {old_name} -> {new_name}\n{drift.format_drift(measured)}")
    if _PLOT.value:
        title = f"{side} vectors: {old_name} to {new_name}"
        drift.plot(measured, _PLOT.value, title=title)
        print(f"Plotted to {_PLOT.value}.")
