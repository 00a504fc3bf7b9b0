r"""Measures a run: exact metrics beside baselines, and the index of its bundle where there is one.

    twotower evaluate --workdir=runs/quickstart --k=10,50,100 --baselines \
        [--split=validation] [--slices=country,item.category] [--dim=32] [--devices=N]

    twotower evaluate --workdir=runs/quickstart --test=july.csv [--targets=successive]

Each device scores and ranks its own part of the items. Prints a table and writes
WORKDIR/evaluation/metrics.json (metrics_validation.json for that split, metrics_july.json for
further rows in july.csv). In the place of --workdir
--mlflow_experiment=shop takes the latest run of an experiment in MLflow that was trained here.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import shutil
import sys
from typing import TYPE_CHECKING

from absl import flags

from twotower.commands import mlflow_flags

if TYPE_CHECKING:
    from twotower.evaluation.measure import Measured
    from twotower.training.run import Run

FLAGS = flags.FlagValues()
# The folder of the run: a bundle has neither held-out rows nor weights.
_RUN = mlflow_flags.define_run(FLAGS, "run")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "Weights: best, latest or a step.", flag_values=FLAGS
)
_K = flags.DEFINE_list(
    "k", [], "Lengths of the lists; by default those of the configuration.", flag_values=FLAGS
)
_BASELINES = flags.DEFINE_bool(
    "baselines",
    False,
    "Measure random, popularity and the like beside the model.",
    flag_values=FLAGS,
)
_WITHOUT_BASELINES = flags.DEFINE_list(
    "without_baselines",
    [],
    "Baselines to leave out, such as ease, which takes long over many items.",
    flag_values=FLAGS,
)
_POPULARITY_WINDOW = flags.DEFINE_string(
    "popularity_window",
    "",
    "Span before the end of training, such as 30d, whose popularity is a baseline more.",
    flag_values=FLAGS,
)
_QUANTILE_THRESHOLD = flags.DEFINE_float(
    "quantile_threshold",
    0.9,
    "Share of the items that are less popular than those that the baseline of the top quantile "
    "shuffles.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=FLAGS,
)
_QUERIES = flags.DEFINE_integer(
    "queries",
    0,
    "Greatest number of queries, evenly spaced; 0: all.",
    lower_bound=0,
    flag_values=FLAGS,
)
_POPULARITY_WEIGHTS = flags.DEFINE_list(
    "popularity_weights",
    [],
    "Measure lists with popularity weighed too: --popularity_weights=0,.05.",
    flag_values=FLAGS,
)
_SLICES = flags.DEFINE_list(
    "slices",
    [],
    "Columns whose values are measured apart: --slices=country,item.category.",
    flag_values=FLAGS,
)
_FURTHER_METRICS = flags.DEFINE_list(
    "further_metrics",
    [],
    "Metrics that take longer: --further_metrics=auc,diversity,distinct.brand.",
    flag_values=FLAGS,
)
_DIM = flags.DEFINE_integer(
    "dim",
    None,
    "Width to cut vectors to, in the place of config.retrieval.dim.",
    lower_bound=1,
    flag_values=FLAGS,
)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Devices to measure on; 0: all.", lower_bound=0, flag_values=FLAGS
)
_SPLIT = flags.DEFINE_enum(
    "split",
    "test",
    ["test", "validation", "train"],
    "The rows to find; of train a sample, each given the rows before it.",
    flag_values=FLAGS,
)
_TEST = flags.DEFINE_string(
    "test",
    None,
    "File of further test rows (or bq://PROJECT.DATASET.TABLE), in the form of the log.",
    flag_values=FLAGS,
)
_TEST_NAME = flags.DEFINE_string(
    "test_name",
    "",
    "Name that their figures are kept under; by default that of the file.",
    flag_values=FLAGS,
)
_TARGETS = flags.DEFINE_enum(
    "targets",
    "",
    ["", "last", "successive", "random", "all"],
    "Rows of each user that are to be found; by default as config.evaluation.query says.",
    flag_values=FLAGS,
)
_HISTORY = flags.DEFINE_string(
    "history",
    None,
    "Folder whose results table the figures are appended to; by default runs/history for a run "
    "from MLflow and with --bigquery, and none for others.",
    flag_values=FLAGS,
)
_RESULTS_TABLE = flags.DEFINE_string(
    "results_table",
    "results",
    "Table that the figures are appended to, in the history and in BigQuery.",
    flag_values=FLAGS,
)
_BIGQUERY = flags.DEFINE_string(
    "bigquery",
    None,
    "PROJECT.DATASET or DATASET: load the evaluations of the date into its results table too.",
    flag_values=FLAGS,
)
_SANITY = flags.DEFINE_bool(
    "sanity",
    False,
    "Ask too whether like titles lie close, and whether events of one category get that category.",
    flag_values=FLAGS,
)
_SANITY_TITLE = flags.DEFINE_string(
    "sanity_title", "", "Column of the items with titles; empty finds it.", flag_values=FLAGS
)
_SANITY_CATEGORY = flags.DEFINE_string(
    "sanity_category", "", "Column of the items with categories; empty finds it.", flag_values=FLAGS
)
_REPORT = flags.DEFINE_bool(
    "report",
    None,
    "Write a page to look at beside the figures; needs the extra plots. On by default for a run "
    "from MLflow, where that is installed.",
    flag_values=FLAGS,
)
_REPORT_COLUMNS = flags.DEFINE_list(
    "report_columns",
    [],
    "Columns of the items that the report colours them by: --report_columns=category,brand.",
    flag_values=FLAGS,
)

_REPORT_UMAP = flags.DEFINE_bool(
    "report_umap",
    False,
    "Show the items by UMAP too in the report; needs the extra umap.",
    flag_values=FLAGS,
)


def main() -> None:
    from twotower import api
    from twotower.evaluation.report.text import format_report, format_summary
    from twotower.evaluation.report.write import check_report
    from twotower.integrations.bigquery_tables import check_dataset
    from twotower.integrations.embedding_history import check_table_name

    # Before anything is loaded: what cannot be drawn, kept or read is refused at once.
    wants_report = _REPORT.value
    if wants_report is None:
        is_possible = importlib.util.find_spec("matplotlib") is not None
        wants_report = _RUN.is_of_mlflow and is_possible
    if wants_report:
        check_report(umap=_REPORT_UMAP.value)
    check_table_name(_RESULTS_TABLE.value, "--results_table")
    if _BIGQUERY.value:
        check_dataset(_BIGQUERY.value)
    ks = parse_ks(_K.value)
    weights = parse_weights(_POPULARITY_WEIGHTS.value)

    run = api.load_run(_RUN.folder(), checkpoint=_CHECKPOINT.value)
    # Before the vectors are made: a width that was not trained is refused at once.
    if _DIM.value:
        run = api.with_index_options(run, dim=_DIM.value)
    # Before the measuring, which takes minutes: rows that cannot be read are refused at once.
    if _TEST.value:
        run = api.with_test_set(run, _TEST.value, name=_TEST_NAME.value)
    ks = ks or run.config.evaluation.ks
    measured = api.evaluate(
        run,
        ks=ks,
        split=_SPLIT.value,
        targets=_TARGETS.value,
        baselines=_BASELINES.value,
        without_baselines=_WITHOUT_BASELINES.value,
        popularity_window=_POPULARITY_WINDOW.value,
        quantile_threshold=_QUANTILE_THRESHOLD.value,
        max_queries=_QUERIES.value,
        popularity_weights=weights,
        slices=_SLICES.value,
        further_metrics=_FURTHER_METRICS.value,
        sanity=_SANITY.value,
        sanity_columns=(_SANITY_TITLE.value, _SANITY_CATEGORY.value),
        devices=_DEVICES.value,
    )
    path = api.measured_path(run, measured)
    # Once more at the end, where somebody looks who will not read the tables.
    report = format_report(measured, ks, _terminal_width())
    print(f"{report}\n\n{format_summary(measured, ks)}\nFigures: {path}")
    if wants_report:
        page = api.write_report(
            run, measured, columns=_REPORT_COLUMNS.value, umap=_REPORT_UMAP.value
        )
        print(f"Report, to open in a browser: {page}")
    elif importlib.util.find_spec("matplotlib") is not None:
        print("A report to look at: the same command with --report.")
    history = _HISTORY.value
    # Who works with MLflow or BigQuery keeps figures from day to day; a folder by itself has
    # metrics.json.
    if history is None and (_RUN.is_of_mlflow or _BIGQUERY.value):
        history = "runs/history"
    if history:
        print(append(history, run, measured))


def _terminal_width() -> int:
    """Returns the characters of a line of the terminal; 0 for files and pipes."""
    return shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0


def append(history: str, run: Run, measured: Measured) -> str:
    """Appends the figures to the results table, and says so."""
    from twotower.data.sources.bigquery import make_client
    from twotower.integrations.results import append_results, date_of, load_results

    # UTC, so that machines in several places agree on the date.
    today = datetime.datetime.now(datetime.UTC).date()
    table = _RESULTS_TABLE.value
    path, is_new = append_results(history, run, measured, today, table=table)
    line = f"Results: {path}"
    # The same command given again adds nothing: a table of results has each evaluation once.
    if not is_new:
        line += " has this evaluation already."
    dataset = _BIGQUERY.value
    if dataset:
        client = make_client(dataset.rpartition(".")[0])
        # An evaluation that was kept before is loaded by the date that it is kept under.
        date = date_of(path)
        name, rows = load_results(client, dataset, history, date, table=table)
        line += f"\n{name}: {rows:,} rows of {date}."
    return line


def parse_ks(texts: list[str]) -> tuple[int, ...]:
    """Returns list lengths in rising order, each once."""
    from twotower.core.errors import ConfigError

    for text in texts:
        if not text.strip().isdigit() or int(text) < 1:
            raise ConfigError(
                f"--k={','.join(texts)}: {text!r} is not a list length. "
                "Give numbers, such as --k=10,50."
            )
    # The tables show the shortest lists first, and most metrics for these alone.
    return tuple(sorted({int(text) for text in texts}))


def parse_weights(texts: list[str]) -> tuple[float, ...]:
    """Returns weights of popularity, in the order of the flag."""
    from twotower.core.errors import ConfigError

    flag = f"--popularity_weights={','.join(texts)}"
    try:
        weights = tuple(float(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}. Give numbers, such as 0,.02,.05.") from None
    # Python reads "nan" and "inf" as numbers.
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"{flag} must be finite.")
    return weights
