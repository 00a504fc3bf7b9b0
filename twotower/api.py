"""The functions that a user of the library starts from: fit, train, load, evaluate, export.

The layers below are kept apart on purpose: training knows nothing of evaluation, an index nothing
of training. Here alone they are put together, for commands, notebooks and services.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from absl import logging

from twotower import fitting, refitting
from twotower.config import Config, RetrievalConfig
from twotower.core.errors import BundleError, ConfigError
from twotower.core.fields import build
from twotower.core.files import current_version, read_json
from twotower.core.install import command
from twotower.core.remote.copies import fetch_bundle as fetch_remote_bundle
from twotower.core.remote.mirror import is_copy, mirrored, push
from twotower.core.remote.objects import is_remote
from twotower.data.dataset import Dataset
from twotower.data.facts import LogFacts
from twotower.data.report import DataReport, log_report, print_report
from twotower.data.sources.frames import TableLike
from twotower.data.split import SPLITS
from twotower.evaluation import measure
from twotower.evaluation.audits.sanity import check_sanity
from twotower.evaluation.baselines.as_run import export_baseline
from twotower.evaluation.baselines.cheap import find_rival
from twotower.evaluation.baselines.make import BaselineOptions, parse_window
from twotower.evaluation.comparison.compare import Comparison, compare_records
from twotower.evaluation.comparison.gate import (
    Judgement,
    default_thresholds,
    load_thresholds,
    undertrained_by_curve,
)
from twotower.evaluation.comparison.gate import judge as judge_records
from twotower.evaluation.comparison.records import read_record
from twotower.evaluation.comparison.text import format_comparison, format_judgement
from twotower.evaluation.evaluate import (
    check_metric_name,
    make_validate,
    model_scores,
    validation_queries,
)
from twotower.evaluation.query_table import record_name
from twotower.evaluation.repeat import given_options
from twotower.evaluation.report.comparison import write_comparison
from twotower.evaluation.report.text import format_report
from twotower.evaluation.report.write import check_report
from twotower.evaluation.report.write import write_report as write_page
from twotower.evaluation.tuned import describe_tuning, read_tuning, write_tuning
from twotower.integrations.live_tracking import follow
from twotower.integrations.mlflow_model import Registration
from twotower.integrations.mlflow_runs import fetch_bundle
from twotower.integrations.mlflow_store import Destination, is_address
from twotower.integrations.sweep_tracking import SweepTracking
from twotower.integrations.tracking import log_linked, track
from twotower.pipeline import folder as data_folder
from twotower.pipeline.engines.engine import prepare_folder
from twotower.plugins import import_plugins, load_config, run_of
from twotower.recommended import SHARE_OF_NEWS
from twotower.retrieval.bundle import BUNDLE, Bundle
from twotower.retrieval.embed import shard_weights
from twotower.retrieval.export import export as export_bundle
from twotower.retrieval.export import make_bundle
from twotower.retrieval.mining import make_miner
from twotower.retrieval.requests import as_table
from twotower.retrieval.rerank import resolve_rerank
from twotower.retrieval.retriever import Recommendations, Retriever
from twotower.sweeps.best import write_best
from twotower.sweeps.page import write_page as write_sweep_page
from twotower.sweeps.space import describe_space, read_space
from twotower.sweeps.study import Sweep, check_sweep, run_trials, validations
from twotower.sweeps.text import format_sweep
from twotower.training import run as run_folder
from twotower.training.grow import grow as make_grown
from twotower.training.loop import OnValidation
from twotower.training.metrics import read_lines
from twotower.training.monitoring.monitor import NOT_ASKED, Monitoring
from twotower.training.processes import is_one_of_several

FEW_ROWS = 5_000  # training rows below which towers hardly learn more than what is popular


class Run(run_folder.Run):
    """A trained run, loaded at one of its checkpoints.

    `fit`, `train` and `load_run` return one. Its folder holds all that it needs: the log that it
    was trained on may have grown, moved or gone.

    >>> run = tt.load_run("runs/mine")
    >>> run
    Run('runs/mine', step 4: 30 users, 50 items)
    >>> len(run.recommend("user-1", k=3))
    3

    Attributes:
        workdir: Folder of the run.
        config: Configuration of its training.
        prepared: Encoded data of the run.
        model: Pair of towers.
        weights: Weights of the towers at `step`.
        step: Step of the checkpoint that was loaded.
        validated: Validation metrics at `step`; {} without validation rows.
    """

    def __repr__(self) -> str:
        users = len(self.prepared.users)
        items = len(self.prepared.items)
        return f"Run({str(self.workdir)!r}, step {self.step}: {users:,} users, {items:,} items)"

    def evaluate(
        self,
        *,
        ks: Sequence[int] = (),
        split: str = "test",
        test: TableLike | None = None,
        test_name: str = "",
        targets: str = "",
        baselines: bool = False,
        max_queries: int = 0,
        slices: Sequence[str] = (),
        further_metrics: Sequence[str] = (),
        sanity: bool = False,
        report: bool = False,
        report_columns: Sequence[str] = (),
        report_umap: bool = False,
        **options: Any,
    ) -> measure.Measured:
        """Measures the run over the whole corpus: prints, keeps and returns the figures.

        They are kept in the folder `evaluation` of the run.

        >>> run = tt.load_run("runs/mine")
        >>> figures = run.evaluate(ks=(10,))  # doctest: +ELLIPSIS
        WARNING: ...
        >>> 0 <= figures["model"]["recall@10"] <= 1
        True

        Args:
            ks: Lengths of the lists; by default those of the configuration.
            split: Rows to find: "test", "validation" or "train".
            test: Further test rows in the place of those of the log: a table of any kind, the path
                of one, or "bq://PROJECT.DATASET.TABLE".
            test_name: Name of the further rows, which their figures are kept under; "" takes that
                of the file.
            targets: Rows of each user that are to be found: "last", "successive", "random" or
                "all"; "" follows the configuration.
            baselines: Whether popularity, item-kNN, EASE and the like are measured beside the
                model.
            max_queries: Greatest number of queries, evenly spaced; 0 takes all.
            slices: Columns of users, items or rows whose values are measured apart, such as
                "country" or "item.category".
            further_metrics: Metrics that take longer: "auc", "diversity", and "distinct.COLUMN" of
                a column of items, such as "distinct.brand".
            sanity: Whether to ask too if items with like titles lie close, and if somebody with
                events of one category gets that category.
            report: Whether a page to look at is written beside the figures, which needs the extra
                "plots".
            report_columns: Columns of the items that it colours them by; () chooses.
            report_umap: Whether it shows the items by UMAP too, which needs the extra "umap".
            **options: Further arguments of `twotower.api.evaluate`: `without_baselines`,
                `popularity_window`, `quantile_threshold`, `popularity_weights`, `sanity_columns`
                and `devices`.

        Returns:
            The figures by name, as `twotower.evaluation.measure.measure_run` returns them.
        """
        # Before the measuring, which takes minutes: an extra that is missing is told at once.
        if report:
            check_report(umap=report_umap)
        # Rising, as the tables show the shortest lists first.
        ks = tuple(sorted(set(ks))) or self.config.evaluation.ks
        run: Run = self
        # Further rows are read by the contract of the run, so that nothing fitted sees them.
        if test is not None:
            run = with_test_set(self, test, name=test_name)
        measured = evaluate(
            run,
            ks=ks,
            split=split,
            targets=targets,
            baselines=baselines,
            max_queries=max_queries,
            slices=slices,
            further_metrics=further_metrics,
            sanity=sanity,
            **options,
        )
        print(format_report(measured, ks))
        if report:
            page = write_report(run, measured, columns=report_columns, umap=report_umap)
            print(f"\nReport: {page}")
        return measured

    def export(self, **index_options: Any) -> Bundle:
        """Embeds the corpus, builds the index and writes the bundle, the folder to serve from.

        >>> run = tt.load_run("runs/mine")
        >>> bundle = run.export(k=5)
        >>> len(bundle.items)
        50

        Args:
            **index_options: Options of `config.retrieval` that replace those of the run, such as
                `target_recall=0.95`, `k=100`, `dim=32` or `vectors="int8"`; and those of
                `twotower.api.export`: `changes`, `with_users`, `shards`, and `baseline`, such as
                "item_knn", which exports a baseline in the place of the towers.

        Returns:
            The bundle that was written to `workdir / "bundle"`, or "bundle_item_knn" beside it.

        Raises:
            BundleError: The bundle, loaded again, does not score as the trainer did.
            ConfigError: An option is unknown or out of range.
        """
        bundle = export(self, **index_options)
        # From now on the run answers from its new bundle.
        self.__dict__.pop("retriever", None)
        return bundle

    @functools.cached_property
    def retriever(self) -> Retriever:
        """The retriever of the run, loaded when it is first used.

        It is that of the bundle where one was exported from this checkpoint, with the changes made
        to it since; else a bundle is made in memory.
        """
        folder = self.workdir / BUNDLE
        if folder.exists():
            retriever = Retriever.load(folder)
            # A bundle of another checkpoint would answer with other weights than those of the run.
            if retriever.bundle.manifest.get("step") == self.step:
                return retriever
        # In memory: nothing is written that somebody could take for an export.
        return Retriever(make_bundle(self))

    def recommend(self, user: Any = None, k: int = 10, **options: Any) -> Recommendations:
        """Returns the best `k` items of a user, best first, without those that the user has seen.

        >>> run = tt.load_run("runs/mine")
        >>> len(run.recommend("user-1", k=5, deny=["item-3"]))
        5

        Args:
            user: Id of the user, as text or number. An unknown one is answered too, by what holds
                for users that are new.
            k: Length of the list.
            **options: Further arguments of `Retriever.recommend`: `rows`, `exclude_seen`, `where`,
                `allow`, `deny`, `popularity_weight`, `rerank`, `names` and `strict`.
        """
        return self.retriever.recommend(user, k=k, **options)

    def similar_items(self, item: Any, k: int = 10, **options: Any) -> Recommendations:
        """Returns the `k` items of greatest cosine to an item, which is left out.

        >>> run = tt.load_run("runs/mine")
        >>> len(run.similar_items("item-3", k=5))
        5

        Args:
            item: Id of the item, as text or number.
            k: Length of the list.
            **options: Further arguments of `Retriever.similar_items`: `where`, `allow` and `deny`.

        Raises:
            UnknownItemError: The item is not in the corpus; the message names the nearest ids.
        """
        return self.retriever.similar_items(item, k=k, **options)

    @property
    def history(self) -> pa.Table:
        """The metrics of training: an Arrow table with a row for each step that was logged.

        Columns are the step, the loss, and further metrics by name; those of a validation begin
        with "validation/" and are null elsewhere. `history.to_pandas()` and
        `polars.from_arrow(history)` make frames of it.

        >>> tt.load_run("runs/mine").history["step"].to_pylist()
        [2, 4]
        """
        return read_history(self.workdir)


def fit(
    interactions: TableLike,
    *,
    items: TableLike | None = None,
    users: TableLike | None = None,
    config: fitting.Options = None,
    workdir: Path | str | None = None,
    user: str = "",
    item: str = "",
    time: str | None = None,
    devices: int = 0,
) -> Run:
    """Trains on tables as they are: finds their columns, a split and options that suit them.

    It prints what it took, validates as it trains, stops when that no longer improves and keeps the
    best checkpoint. The rows are kept in the folder of the run, which is all that later commands
    need. Columns of `items` and `users` become features; columns of the log do not.

    >>> options = {"features.user": {}, "features.item": {}, "training.steps": 4}  # ids alone
    >>> run = tt.fit("events.csv", workdir="runs/fitted", config=options)  # doctest: +ELLIPSIS
    interactions: 400 rows; user = 'user_id', item = 'item_id', time = 'timestamp' ...
    >>> len(run.recommend("user-1", k=3))
    3

    Args:
        interactions: The log, a row for each event: a frame of pandas or polars, an Arrow table, a
            relation of DuckDB, or the path of a CSV or Parquet file (or a folder or glob of such).
        items: Table of items, which is then the corpus; None takes the items of the log.
        users: Table of users.
        config: Options in the place of those recommended for the log, such as
            {"training.steps": 500, "model.normalize": True}; or a whole configuration, or the name
            or path of an experiment, of which all but the source of the data is taken.
        workdir: Folder of the run. None makes runs/DATE-1, or the next number that is free.
        user: Column of the user's id; empty to find it by name and content.
        item: Column of the item's id, likewise.
        time: Column of the time; None to find it, "" for a log without times.
        devices: Number of devices to train on; 0 takes all.

    Returns:
        The run at its best checkpoint.

    Raises:
        ConfigError: A column cannot be told (the message lists all, with the keyword to give), the
            log is too small, or an option cannot be used.
    """
    columns = fitting.Columns(user, item, time)
    log = fitting.read_log(interactions, items=items, users=users, columns=columns, config=config)
    # Before the training: somebody who sees the wrong column taken can stop it.
    print("\n".join(log.said))
    whole = fitting.make_config(log, config)
    folder = fitting.begin(workdir, log, whole)
    print(f"run: {folder}", flush=True)
    train_in_folder(whole, folder, devices=devices, tell=print_report)
    # The best checkpoint, from the folder: the weights in memory were the last ones.
    run = load_run(folder)
    print(_comparison(run, log.facts))
    return run


def _comparison(run: Run, facts: LogFacts) -> str:
    """Returns lines on the model beside the best cheap baseline, on the validation rows."""
    validate = make_validate(run.prepared, run.model)
    metric = run.config.training.metric
    value = validate(run.weights)[metric]
    line = f"validation: {metric} {value:.4f} at step {run.step}"
    # The metric of a head is none of a ranking.
    if "@" not in metric:
        return f"{line}."
    # The queries of the validation itself: else the two figures would not compare.
    queries = validation_queries(run.prepared)
    scores = model_scores(run.prepared, run.model, run.weights, queries)
    rival = find_rival(run.prepared, scores, queries, metric, run.workdir)
    name = rival.name.replace("_", " ")
    line += f"; {name}, the best of {rival.tried} baselines, {rival.value:.4f}."
    ends = f"{rival.low:+.4f} to {rival.high:+.4f} over the same users"
    if rival.low > 0:
        line += f" The model is ahead ({ends})."
    elif rival.high < 0:
        line += f" The model is BEHIND it ({ends}): {baseline_cure(facts)}"
    else:
        line += f" They cannot be told apart ({ends})."
    dear = "; ".join(f"{one} ({reason})" for one, reason in rival.left_out.items())
    return f"Left to run.evaluate(baselines=True), as they take longer: {dear}.\n{line}"


def baseline_cure(facts: LogFacts) -> str:
    """Returns what to do about a model that is behind a baseline, as the end of a sentence."""
    # In the order of what explains most: no training helps items that it never sees.
    if facts.share_new_items > SHARE_OF_NEWS and not facts.items:
        return (
            f"{facts.share_new_items:.0%} of the held-out rows are of items that training never "
            "saw. Give their columns (title, category, time of publication) as items=."
        )
    if facts.num_training_rows < FEW_ROWS:
        return (
            f"{facts.num_training_rows:,} rows to train with are few. Give more rows, or columns "
            "of the items as items=."
        )
    return "try config={'training.passes': 30}, or give columns of the items as items=."


def prepare(
    config: Config,
    folder: Path | str,
    *,
    engine: str = "memory",
    memory: str = "4GB",
    max_bad_rows: int | None = None,
    tables: str = "",
    export: str = "",
    beam_options: str = "",
    beam_temp: str = "",
) -> DataReport | None:
    """Prepares a log into a folder, from which any number of runs train: `train(..., data=folder)`.

    >>> options = tt.config.defaults()
    >>> options.data.source = "csv"
    >>> options.data.path = "events.csv"
    >>> tt.prepare(tt.config.from_dict(options), "prepared").parts
    {'train': 320, 'validation': 40, 'test': 40}

    Args:
        config: Configuration whose data, split, features and labels are prepared.
        folder: Folder to write to. One that is whole already is left as it is; one that was left
            half-way is gone on with by "duckdb", where nothing has changed.
        engine: "memory", which reads the whole log; "duckdb", for one that is larger; "beam", whose
            log workers of Apache Beam read; "bigquery", for one that lies there. All leave the same
            folder, byte for byte.
        memory: Memory that all engines but "memory" keep to.
        max_bad_rows: Number of rows of text files with other fields than the header that may be
            left out; None for what `bad_rows` of the tables says.
        tables: DATASET.NAME, where the engine "bigquery" leaves NAME_rows and other tables.
        export: gs://BUCKET/FOLDER, by way of which "bigquery" hands its rows over as Parquet; empty
            for pages of its own interface.
        beam_options: Options of the pipelines of the engine "beam", such as "--runner=FlinkRunner".
        beam_temp: Folder or address that all its workers see, for what they hand to each other; by
            default one below `folder`.

    Returns:
        Facts about the data that a person should know before training.

    Raises:
        ConfigError: The data or an option cannot be used, or the folder holds the data of another
            configuration.
    """
    folder = run_folder.local_folder(folder, "--data")
    import_plugins(config.plugins, folder)
    return prepare_folder(
        config,
        folder,
        engine=engine,
        memory=memory,
        max_bad_rows=max_bad_rows,
        tables=tables,
        export=export,
        beam_options=beam_options,
        beam_temp=beam_temp,
    )


def train(
    config: Config,
    workdir: Path | str,
    *,
    devices: int = 0,
    data: Path | str | None = None,
    experiment_name: str = "",
    run_name: str = "",
    tracking_uri: str = "",
) -> Run:
    """Trains a configuration in a folder, or goes on with what the folder holds of it.

    Validation runs where the split has validation rows, and hard negatives are mined where the
    configuration says so.

    >>> options = tt.config.defaults()
    >>> options.data.source = "csv"
    >>> options.data.path = "events.csv"
    >>> options.training.batch_size = 64
    >>> options.training.steps = 4
    >>> tt.train(tt.config.from_dict(options), "runs/new")
    Run('runs/new', step 4: 30 users, 50 items)

    Args:
        config: Configuration of the experiment.
        workdir: Folder of the run, new or begun with the same configuration.
        devices: Number of devices to train on; 0 takes all.
        data: Folder of prepared data to share with other runs of the same data, split, features
            and labels, which the first of them writes; None keeps it in the folder of the run.
        experiment_name: Experiment of MLflow that the run is logged to while it trains, and at its
            end the bundle, which is exported then, and figures of the validation rows; "" logs none
            that was not logged before.
        run_name: Name of the run in MLflow; by default that of its folder.
        tracking_uri: Address of the store of MLflow; by default MLFLOW_TRACKING_URI, or mlflow.db
            in the working folder.

    Returns:
        The run at its best checkpoint.

    Raises:
        ConfigError: The folder holds a run of another configuration, or a field or the data cannot
            be used.
        TrainingError: The loss or a score is no longer finite.
    """
    tracking = _destination(experiment_name, run_name, tracking_uri)
    train_in_folder(config, workdir, devices=devices, data=data, tracking=tracking, conclude=True)
    # Loaded anew: the weights that training ends with are the last ones, not the best.
    return load_run(workdir)


def _destination(experiment_name: str, run_name: str, tracking_uri: str) -> Destination | None:
    """Returns where a run is logged to; None without the name of an experiment."""
    if not experiment_name:
        return None
    return Destination(uri=tracking_uri, experiment=experiment_name, run_name=run_name)


def train_in_folder(
    config: Config,
    workdir: Path | str,
    *,
    devices: int = 0,
    data: Path | str | None = None,
    dataset: Dataset | None = None,
    tell: Callable[[DataReport], None] = log_report,
    tracking: Destination | None = None,
    conclude: bool = False,
    on_validation: OnValidation | None = None,
    monitoring: Monitoring = NOT_ASKED,
) -> None:
    """Trains as `train` does, and leaves the run in its folder without loading it.

    This is the form for one of several processes, and for work that goes on in another process.

    Args:
        config: Configuration of the experiment.
        workdir: Folder of the run.
        devices: Number of devices to train on; 0 takes all.
        data: Folder of prepared data to share with other runs.
        dataset: The log itself, in the place of the one that the configuration names.
        tell: Function that shows the report of the data before the first step.
        tracking: Experiment of MLflow that the run is logged to while it trains; by default the one
            that it was logged to before, if any.
        conclude: Whether a run that is logged there ends with its bundle and an evaluation.
        on_validation: Function that is told of each validation; see `twotower.training.loop.fit`.
        monitoring: What is watched while it trains.
    """
    workdir = run_folder.local_folder(workdir)
    if is_copy(workdir) and is_one_of_several():
        raise ConfigError(
            "--workdir: several processes need one folder that all of them see. Mount the bucket "
            "on each machine, and name the folder there."
        )
    check_names(config, workdir)
    # Entered before the training, so that a run that fails is marked as failed there; begun only
    # when the data was found right.
    ending = functools.partial(_conclude_run, workdir) if conclude else None
    with mirrored(workdir), follow(workdir, tracking, conclude=ending) as start_log:

        def begin(report: DataReport) -> None:
            tell(report)
            start_log()

        # Validation and mining are made later, of prepared data: training itself imports neither.
        run_folder.train(
            config,
            workdir,
            make_validate=make_validate,
            make_miner=make_miner,
            devices=devices,
            data=data,
            dataset=dataset,
            tell=begin,
            on_validation=on_validation,
            monitoring=monitoring,
        )


def _conclude_run(workdir: Path) -> None:
    """Makes what a training that is logged to MLflow ends with: its bundle, and figures and a
    report of the validation rows. Whatever fails is told as a warning: the training is done."""
    to_export = command("export", f"--workdir={workdir}")
    to_evaluate = command("evaluate", f"--workdir={workdir}", "--split=validation", "--report")
    if is_one_of_several():
        # The others end now, and an export on their devices would wait for them.
        logging.info("For the bundle and figures, by one process: %s; %s", to_export, to_evaluate)
        return
    with _warned(to_export):
        run = load_run(workdir)
        with _warned(to_export):
            _export_at_end(run)
        with _warned(to_evaluate):
            _evaluate_at_end(run)


@contextlib.contextmanager
def _warned(line: str) -> Iterator[None]:
    """Turns an error in a block into a warning, with the command that does the work again."""
    try:
        yield
    except Exception as error:
        logging.warning(
            "The training is whole, but not what it ends with: %s: %s Do that by: %s",
            type(error).__name__,
            error,
            line,
        )


def _export_at_end(run: Run) -> None:
    """Exports a run, unless its bundle is of this checkpoint already."""
    manifest = current_version(run.workdir / BUNDLE) / "manifest.json"
    if manifest.exists() and read_json(manifest).get("step") == run.step:
        return
    export(run, log=False)


def _evaluate_at_end(run: Run) -> None:
    """Measures a run by its validation rows, and writes the report, unless they are there."""
    # The test rows are left to whoever asks for them: they are looked at once, by intent.
    if not len(run.prepared.positives("validation")):
        logging.info("%s has no validation rows, and is not measured.", run.workdir)
        return
    path = metrics_path(run.workdir, "validation")
    measured = read_json(path) if path.exists() else {}
    if measured.get("protocol", {}).get("step") != run.step:
        measured = evaluate(run, split="validation", log=False)
    elif path.with_name("report_validation.html").exists():
        return
    try:
        check_report()
    except ConfigError as error:
        logging.info("No report and no pictures: %s", error)
        return
    logging.info("Report: %s", write_report(run, measured, log=False))


def refit(run: Run | Path | str, *, on_top: bool = False, devices: int = 0) -> Run:
    """Trains a validated run on all its rows, the held-out ones too: the model to serve.

    It takes as many passes over all rows as the best checkpoint had over the training rows, and
    needs nothing but the folder of the run. The figures stay those of the validated run: there is
    nothing left to measure the refit by. A schedule of kind "plateau" stays at its first rate.

    >>> served = tt.refit("runs/mine")  # doctest: +ELLIPSIS
    refit: 400 rows, ... passes from fresh weights. Validated with 320 of them at step 4: ...
    >>> served
    Run('runs/mine/refit', step 5: 30 users, 50 items)

    Args:
        run: Trained run, or its folder.
        on_top: Whether the best checkpoint is trained further, in the place of fresh weights.
        devices: Number of devices to train on; 0 takes all.

    Returns:
        The run in the folder "refit" of the run, to be exported like any other.

    Raises:
        ConfigError: The folder is no run, or holds a refit of other options.
        CheckpointError: The run has no checkpoint yet.
    """
    workdir = run.workdir if isinstance(run, Run) else run
    return load_run(refit_in_folder(workdir, on_top=on_top, devices=devices))


def refit_in_folder(workdir: Path | str, *, on_top: bool = False, devices: int = 0) -> Path:
    """Trains as `refit` does, and returns the folder of the refit without loading it."""
    begun = refitting.begin_refit(workdir, on_top=on_top)
    train_in_folder(begun.config, begun.folder, devices=devices, dataset=begun.dataset)
    push(begun.folder)
    # After the training: a refit that was stopped has no record, and says nothing of itself.
    refitting.write_record(begun)
    print(refitting.format_record(begun.record))
    return begun.folder


def grow(
    run: Run | Path | str,
    interactions: TableLike,
    *,
    workdir: Path | str,
    items: TableLike | None = None,
    users: TableLike | None = None,
    user: str = "",
    item: str = "",
    time: str | None = None,
    new_rows: str = "oov",
    passes: float = 1.0,
    devices: int = 0,
) -> Run:
    """Takes a run on to further rows of its log: known users and items keep what was learned.

    The new run holds all rows, those of the old one and the new ones, divided anew; the old run is
    left as it is, and its source is not read.

    >>> run = tt.grow("runs/mine", "next_day.csv", workdir="runs/grown")  # doctest: +ELLIPSIS
    interactions: 40 rows; ...
    >>> run
    Run('runs/grown', step 8: 31 users, 50 items)

    Args:
        run: Trained run, or its folder; its best checkpoint is gone on from.
        interactions: Further rows, in the form of the run's log.
        workdir: Folder of the new run, new or empty.
        items: Table of new or changed items.
        users: Table of new or changed users.
        user: Column of the user's id; empty to find it by name and content.
        item: Column of the item's id, likewise.
        time: Column of the time; None to find it.
        new_rows: First value of the rows of new ids: "oov", "mean" or "content"; see
            `twotower.training.grow`.
        passes: Further passes over all training rows.
        devices: Number of devices to train on; 0 takes all.

    Returns:
        The new run at its best checkpoint.

    Raises:
        ConfigError: A table cannot be used, or `workdir` is not empty.
    """
    old = run if isinstance(run, Run) else load_run(run)
    begin_grown(
        old,
        interactions,
        workdir=workdir,
        items=items,
        users=users,
        columns=fitting.Columns(user, item, time),
        new_rows=new_rows,
        passes=passes,
    )
    # From the folder that was just made, as a later process would: what it lacks is found now.
    return train(load_config(workdir), workdir, devices=devices)


def begin_grown(
    run: Run,
    interactions: TableLike,
    *,
    workdir: Path | str,
    items: TableLike | None = None,
    users: TableLike | None = None,
    columns: fitting.Columns | None = None,
    new_rows: str = "oov",
    passes: float = 1.0,
) -> None:
    """Makes the run that `grow` trains, with the arguments of that."""
    columns = columns or fitting.Columns()
    dataset, said = refitting.read_further_rows(
        run.prepared, interactions, items=items, users=users, columns=columns
    )
    print("\n".join(said))
    make_grown(
        run.config,
        run.workdir,
        workdir,
        new_rows=new_rows,
        # The step that was loaded: a training that goes on elsewhere may have saved a better one
        # since.
        checkpoint=str(run.step),
        dataset=dataset,
        passes=passes,
    )


def check_names(config: Config, workdir: Path | str) -> None:
    """Refuses a name that training itself does not know, before the data is read.

    Args:
        config: Configuration of the experiment.
        workdir: Folder of the run, in which no plugin may lie.

    Raises:
        ConfigError: A plugin, the kind of split, the validation metric or the re-ranker is not
            known.
    """
    import_plugins(config.plugins, Path(workdir))
    SPLITS.choose(config.split.kind, "config.split.kind")
    check_metric_name(config)
    # The re-ranker is used after the training alone, and would be refused only then.
    resolve_rerank(None, config.retrieval.rerank)


def load_run(workdir: Path | str, *, checkpoint: str = "best") -> Run:
    """Loads a trained run from its folder.

    >>> tt.load_run("runs/mine", checkpoint="latest")
    Run('runs/mine', step 4: 30 users, 50 items)

    Args:
        workdir: Folder that `train` left.
        checkpoint: "best", "latest" or the number of a step.

    Raises:
        ConfigError: The folder is no run.
        CheckpointError: The run has no such checkpoint, or a damaged one.
    """
    run = run_folder.load_run(workdir, checkpoint=checkpoint)
    # The same fields, with the methods of this layer.
    return Run(**vars(run))


def read_history(workdir: Path) -> pa.Table:
    """Returns the metrics that training logged, as `Run.history` describes them."""
    by_step: dict[int, dict[str, float]] = {}
    for values in read_lines(workdir):
        # Losses and validations of one step are lines of their own.
        by_step.setdefault(values["step"], {}).update(values)
    # A run that was copied without its log has none.
    if not by_step:
        return pa.table({"step": pa.array([], pa.int64())})
    return as_table([by_step[step] for step in sorted(by_step)])


def export(
    run: Run,
    *,
    changes: Literal["carry", "drop"] = "carry",
    with_users: bool = True,
    registration: Registration | None = None,
    baseline: str = "",
    baseline_dim: int = 256,
    shards: int = 1,
    log: bool = True,
    **index_options: Any,
) -> Bundle:
    """Embeds the corpus, builds the index and writes the run's bundle folder.

    Args:
        run: Loaded run.
        changes: Whether changes made to the items of the bundle before are carried over to this
            one, or forgotten.
        with_users: Whether the bundle holds the known users: their vectors, what they had, and
            their raw features. Without them, known users are answered as new ones are.
        registration: Name in MLflow's registry of models that the bundle becomes a version of.
        baseline: Baseline that is exported in the place of the towers, such as "item_knn", to
            `run.workdir / "bundle_item_knn"`; see `twotower.evaluation.baselines.factors`.
        baseline_dim: Greatest width of its vectors; a wider model is approximated.
        shards: Number of shards that the items are divided into, by a hash of their ids.
        log: Whether the bundle is logged to MLflow, if the run was; a training logs all that it
            ends with at once.
        **index_options: Options of `config.retrieval` that replace those of the run, such as
            `target_recall=0.95`, `k=100`, `dim=32` or `vectors="int8"`.

    Returns:
        The bundle that was written to `run.workdir / "bundle"`.

    Raises:
        BundleError: The bundle, loaded again, does not score as the trainer did.
        BusyError: Another process makes a version of the bundle.
        ChangesError: A change cannot be carried over.
        ConfigError: An option is out of range, or vectors cannot be cut to this width.
    """
    # Before any work: a misspelt option would else be told after the corpus was embedded.
    run = with_index_options(run, **index_options)
    if baseline:
        # The model that is logged has the towers in it, which a baseline has not.
        if registration is not None:
            raise ConfigError(
                "A version in MLflow is of the run's own towers: leave out --baseline."
            )
        if shards > 1:
            raise ConfigError(
                f"--shards={shards} are of the run's own towers: leave out --baseline."
            )
        folder = baseline_path(run, baseline)
        return export_baseline(
            run, baseline, folder, dim=baseline_dim, changes=changes, with_users=with_users
        )
    bundle = export_bundle(
        run,
        run.workdir / BUNDLE,
        changes=changes,
        with_users=with_users,
        figures=_figures(run),
        shards=shards,
    )
    if registration is not None:
        track(run.workdir, bundle=True, registration=registration)
    elif log:
        # Where the run was logged before, and nowhere else.
        log_linked(run.workdir, bundle=True)
    push(run.workdir)
    return bundle


def baseline_path(run: Run, name: str) -> Path:
    """Returns the folder of the bundle of a baseline."""
    return run.workdir / f"{BUNDLE}_{name}"


def _figures(run: Run) -> dict[str, Any]:
    """Returns what was measured of a checkpoint, for the manifest of its bundle."""
    figures: dict[str, Any] = {"validation": dict(run.validated)}
    intervals: dict[str, Any] = {}
    path = metrics_path(run.workdir, "test")
    if path.exists():
        measured = read_json(path)
        # Figures of another checkpoint say nothing of this one.
        if measured["protocol"]["step"] == run.step:
            figures["test"] = measured["model"]
            intervals["test"] = measured.get("model_intervals", {})
    entries: dict[str, Any] = {
        # Of the folder its own name alone: where it lies is nobody's business.
        "run": run.workdir.resolve().name,
        "figures": {part: values for part, values in figures.items() if values},
        "intervals": {part: values for part, values in intervals.items() if values},
    }
    record = refitting.read_record(run.workdir)
    if record is not None:
        entries["refit"] = record
    tuning = read_tuning(run.workdir)
    if tuning is not None:
        entries["tuned"] = describe_tuning(tuning)
    return entries


def with_index_options(run: Run, **index_options: Any) -> Run:
    """Returns the run with some options of `config.retrieval` replaced.

    Raises:
        ConfigError: An option is unknown, or its value is of a wrong type or out of range.
    """
    # These options touch no weight, so that a trained run may take others.
    options = dataclasses.asdict(run.config.retrieval) | index_options
    # Checked like options of a file: the same names, types and refusals.
    retrieval = build(RetrievalConfig, options, "config.retrieval")
    config = dataclasses.replace(run.config, retrieval=retrieval)
    return dataclasses.replace(run, config=config)


def evaluate(
    run: Run,
    *,
    ks: Sequence[int] = (),
    split: str = "test",
    targets: str = "",
    baselines: bool = False,
    without_baselines: Sequence[str] = (),
    popularity_window: str = "",
    quantile_threshold: float = 0.9,
    max_queries: int = 0,
    popularity_weights: Sequence[float] = (),
    slices: Sequence[str] = (),
    further_metrics: Sequence[str] = (),
    sanity: bool = False,
    sanity_columns: tuple[str, str] = ("", ""),
    devices: int = 0,
    log: bool = True,
) -> measure.Measured:
    """Measures a run over the whole corpus, and the index of its bundle where there is one.

    The figures are also written to `run.workdir / "evaluation"`, and those of every query beside
    them, from which runs are compared.

    Args:
        run: Loaded run.
        ks: Lengths of the lists; by default those of the configuration.
        split: Rows to find: "test", "validation" or "train".
        targets: Rows of each user that are to be found: "last", "successive", "random" or "all";
            "" follows the configuration.
        baselines: Whether popularity, item-kNN, EASE and the like are measured beside the model.
        without_baselines: Names of baselines to leave out, such as "ease" of a large corpus.
        popularity_window: Span before the end of training, such as "30d", whose popularity is a
            baseline more.
        quantile_threshold: Share of the items that are less popular than those that the baseline
            of the top quantile shuffles.
        max_queries: Greatest number of queries, evenly spaced; 0 takes all.
        popularity_weights: Weights of popularity to measure lists with.
        slices: Columns of users, items or rows whose values are measured apart, such as "country"
            or "item.category".
        further_metrics: Metrics that take longer: "auc", "diversity", "distinct.COLUMN".
        sanity: Whether to ask too if like titles lie close and if somebody with events of one
            category gets it, see `twotower.evaluation.audits.sanity`.
        sanity_columns: Columns of the items with their titles and with their categories; "" finds
            it by the features.
        devices: Number of devices that share the items; 0 takes all.
        log: Whether the figures are logged to MLflow, if the run was.

    Returns:
        The figures by name, as `twotower.evaluation.measure.measure_run` returns them.
    """
    # First: there is nothing yet but the arguments.
    options = given_options(evaluate, locals())
    ks = tuple(ks) or run.config.evaluation.ks
    # Loaded before the long part: a damaged bundle is refused at once.
    folder = run.workdir / BUNDLE
    retriever = None
    if folder.exists():
        # Its index alone is measured.
        retriever = Retriever.load(folder, load_towers=False)
    run = dataclasses.replace(run, weights=shard_weights(run.weights, devices))
    rivals = BaselineOptions(
        tuple(without_baselines), parse_window(popularity_window), quantile_threshold
    )
    measured = measure.measure_run(
        run,
        ks=ks,
        split=split,
        targets=targets,
        baselines=baselines,
        baseline_options=rivals,
        max_queries=max_queries,
        popularity_weights=popularity_weights,
        slices=slices,
        further_metrics=further_metrics,
        keep_queries=True,
    )
    if retriever is not None:
        measured |= _index_figures(retriever, run, split)
    if sanity:
        # A bundle of this checkpoint: the one in the folder may be of another.
        title, category = sanity_columns
        asked = Retriever(make_bundle(run))
        measured["sanity"] = check_sanity(run, asked, title=title, category=category)
    tuning = read_tuning(run.workdir)
    if tuning is not None:
        measured["tuning"] = tuning
    # The report shows the command that repeats the figures.
    measured["options"] = options
    measure.write_metrics(measured, measured_path(run, measured))
    if log:
        log_linked(run.workdir)
    push(run.workdir)
    return measured


def _index_figures(retriever: Retriever, run: Run, split: str) -> dict[str, Any]:
    """Returns {"index": figures} of the index of a bundle; {} where it has no user to ask for."""
    # One query a user, whatever the protocol: the index is searched with users' vectors.
    users = np.unique(run.prepared.positives(split).user)
    # A bundle without users has none to search for, and none that the log does not have.
    users = users[users < len(retriever.bundle.users)]
    if not len(users):
        return {}
    return {"index": measure.measure_index(retriever, users)}


def with_test_set(run: Run, rows: TableLike, *, name: str = "") -> Run:
    """Returns the run with further test rows in the place of those of its log.

    They are read by the contract of the log, and nothing is fitted again.

    Args:
        run: Loaded run.
        rows: Table of any kind, the path of one, or "bq://PROJECT.DATASET.TABLE".
        name: Name that figures are kept under; "" takes that of the file.

    Raises:
        ConfigError: The rows cannot be read, or nothing is left of them.
    """
    prepared = refitting.read_test_rows(run.prepared, rows, name=name)
    return dataclasses.replace(run, prepared=prepared)


def write_report(
    run: Run,
    measured: measure.Measured | None = None,
    *,
    columns: Sequence[str] = (),
    umap: bool = False,
    log: bool = True,
) -> Path:
    """Writes the report of an evaluation: one page of HTML beside the figures.

    It opens in any browser and fetches nothing; images of the items lie beside it.

    Args:
        run: Loaded run.
        measured: Figures that `evaluate` returned; None reads those that it wrote of the test rows.
        columns: Columns of the items to colour them by; () takes the first two texts of few values.
        umap: Whether it shows the items by UMAP too, which needs the extra "umap".
        log: Whether it is logged to MLflow, if the run was.

    Returns:
        The file.

    Raises:
        ConfigError: The extra "plots" or "umap" is not installed, nothing was measured yet, or a
            column is unknown.
    """
    if measured is None:
        path = metrics_path(run.workdir, "test")
        if not path.exists():
            line = command("evaluate", f"--workdir={run.workdir}", "--baselines", "--report")
            raise ConfigError(f"{path} is missing: nothing was measured yet. {line}")
        measured = read_json(path)
    figures = measured_path(run, measured)
    # Named as the figures are, so that the pages of two splits lie beside each other.
    page = figures.with_name(figures.name.replace("metrics", "report")).with_suffix(".html")
    # Of the index only what was measured is shown, where there is one.
    index = None
    if (run.workdir / BUNDLE).exists():
        index = Retriever.load(run.workdir / BUNDLE).bundle.index
    write_page(run, measured, page, index=index, columns=columns, umap=umap)
    if log:
        log_linked(run.workdir)
    return page


def metrics_path(workdir: Path, name: str) -> Path:
    """Returns the file that `evaluate` writes the figures of a split, or of further rows, to."""
    file = "metrics.json"
    # Figures of validation must not replace those of the test.
    if name != "test":
        file = f"metrics_{name}.json"
    return workdir / "evaluation" / file


def measured_path(run: Run, measured: measure.Measured) -> Path:
    """Returns the file of figures that `evaluate` returned."""
    return metrics_path(run.workdir, record_name(measured["protocol"]))


def repeat(
    config: Config,
    workdir: Path | str,
    *,
    seeds: int = 3,
    split: str = "test",
    baselines: bool = False,
) -> list[measure.Measured]:
    """Trains and measures a configuration with one seed after another.

    The run of a seed is `workdir / "seed-N"`. A training that was stopped goes on, and one that had
    ended is only measured. The figures are also written to `repeat_path(workdir, split)`.

    Args:
        config: Configuration of the experiment; its own seed is not used.
        workdir: Folder of the runs.
        seeds: Number of trainings, with `training.seed` = 0, 1, ...
        split: Rows to find: "test" or "validation".
        baselines: Whether popularity and the like are measured, with the first seed alone.

    Returns:
        The figures of each seed, as `twotower.evaluation.measure.measure_run` returns them.
    """
    measured = []
    for seed in range(seeds):
        training = dataclasses.replace(config.training, seed=seed)
        config_of_seed = dataclasses.replace(config, training=training)
        # A seed of the training changes nothing of its data.
        run = train(config_of_seed, Path(workdir) / f"seed-{seed}", data=Path(workdir) / "data")
        # Baselines depend on the data alone: once is enough.
        with_baselines = baselines and seed == 0
        figures = measure.measure_run(
            run,
            ks=config.evaluation.ks,
            split=split,
            baselines=with_baselines,
            keep_queries=True,
        )
        measured.append(figures)
    by_seed = {f"seed-{seed}": figures for seed, figures in enumerate(measured)}
    measure.write_metrics(by_seed, repeat_path(workdir, split))
    return measured


def repeat_path(workdir: Path | str, split: str) -> Path:
    """Returns the file that `repeat` writes the figures of a split to."""
    name = "repeat.json"
    if split != "test":
        name = f"repeat_{split}.json"
    return Path(workdir) / name


def sweep(
    config: Config | Run,
    space: Path | str | Mapping[str, Any],
    workdir: Path | str,
    *,
    trials: int = 20,
    seeds: int = 1,
    prune: bool = True,
    seed: int = 0,
    devices: int = 0,
    report: bool = False,
    experiment_name: str = "",
    run_name: str = "",
    tracking_uri: str = "",
) -> Sweep:
    """Tries many configurations, prints a table, and keeps the best by its validation rows.

    The best is measured on the test rows, once, and is written to `workdir / "best.py"`, which
    `load_config` reads. A sweep that was stopped goes on, and one that had ended takes on further
    trials. Needs the extra "sweep".

    >>> run = tt.load_run("runs/mine")
    >>> space = {"training.tables.learning_rate": [0.05, 0.2]}
    >>> found = tt.sweep(run, space, "runs/sweep", trials=2)  # doctest: +ELLIPSIS
    2 configurations tried, ...
    >>> found.best.number in (0, 1)
    True

    Args:
        config: Configuration of which the space replaces options; or a run, for its own, whose
            prepared data is then used.
        space: Dotted name of an option -> the values that it may take: a list, or a range such as
            {"low": 1e-3, "high": 0.3, "log": True}; or a JSON or Python file with such.
        workdir: Folder of the sweep.
        trials: Number of trials, with those that the folder holds.
        seeds: Number of trainings of a configuration, whose mean is compared.
        prune: Whether a training ends early whose best validation is below the median of those
            before it at the same one.
        seed: Number that the drawing of configurations depends on.
        devices: Number of devices to train on; 0 takes all.
        report: Whether a page to look at is written too, which needs the extra "plots".
        experiment_name: Experiment of MLflow that the sweep is logged to as it goes, a run for it
            and nested ones for its trainings; "" logs none that was not logged before.
        run_name: Name of the sweep's run in MLflow; by default that of its folder.
        tracking_uri: Address of the store of MLflow; see `train`.

    Raises:
        ConfigError: An option or value cannot be used, the folder holds another sweep, or no trial
            went well.
    """
    # The extra is needed before the first trial, and the plots only after the last.
    check_sweep()
    # As in `Run.evaluate`: before trials of hours.
    if report:
        check_report()
    prepared = None
    if isinstance(config, Run):
        prepared = run_folder.data_path(config.workdir)
        config = config.config
    digest = data_folder.digest_of(config)
    values = read_space(space, config)
    destination = _destination(experiment_name, run_name, tracking_uri)
    log = SweepTracking(Path(workdir), destination)
    metric = config.training.metric
    tell = _tell_once()

    def train_trial(
        config: Config, workdir: Path, data: Path, on_validation: OnValidation | None
    ) -> None:
        # A space may change features or the split, for which the data of the run is none.
        if prepared is not None and data_folder.digest_of(config) == digest:
            data = prepared
        try:
            train_in_folder(
                config,
                workdir,
                devices=devices,
                data=data,
                tell=tell,
                tracking=log.of_training(workdir),
                on_validation=on_validation,
            )
        finally:
            log.log_best(workdir, metric, validations(workdir, metric))

    found = run_trials(
        config,
        values,
        Path(workdir),
        train_trial,
        trials=trials,
        seeds=seeds,
        prune=prune,
        seed=seed,
    )
    found, files = _conclude(found, report=report)
    facts = {"space": describe_space(values), "seeds": seeds, "prune": prune, "seed": seed}
    figures = {"best": {metric: found.best.value}, "tried": len(found.trials)}
    log.finish(facts | {"metric": metric}, figures, files, found.runs)
    return found


def _conclude(found: Sweep, *, report: bool) -> tuple[Sweep, list[Path]]:
    """Measures the best trial on the test rows, tells and writes what was found.

    Args:
        found: Trials of a sweep.
        report: Whether a page to look at is written too.

    Returns:
        The sweep with its figures on test rows, and the files that were written.
    """
    if found.config.split.test:
        # The runs of the best trial alone: a figure of the test rows for each trial would be chosen
        # by, sooner or later.
        tests = [_measure_on_test(folder, found) for folder in found.runs]
        found = dataclasses.replace(found, test=tests)
    data = data_folder.resolve(run_folder.data_path(found.runs[0]))
    files = [write_best(found)]
    print(format_sweep(found, files[0], data))
    if report:
        files.append(write_sweep_page(found))
        print(f"Report: {files[-1]}")
    return found, files


def _tell_once() -> Callable[[DataReport], None]:
    """Returns a function that logs a report of data, which many trials share, the first time."""
    told: list[DataReport] = []

    def tell(data: DataReport) -> None:
        if data not in told:
            log_report(data)
            told.append(data)

    return tell


def _measure_on_test(workdir: Path, found: Sweep) -> Mapping[str, float]:
    """Returns the figures of a run of the best trial on the test rows, measured once."""
    tuning = {
        "tried": len(found.trials),
        "metric": found.metric,
        "value": found.best.value,
        "sweep": str(found.workdir),
    }
    write_tuning(workdir, tuning)
    path = metrics_path(workdir, "test")
    if not path.exists():
        return evaluate(load_run(workdir))["model"]
    # Measured before: asking again must not look at the test rows again, but the number of trials
    # has grown.
    measured = read_json(path) | {"tuning": tuning}
    measure.write_metrics(measured, path)
    return measured["model"]


def compare(
    runs: Sequence[Run | Path | str], *, split: str = "test", report: Path | str | None = None
) -> Comparison:
    """Compares evaluated runs over the same queries: prints and returns their figures.

    >>> run = tt.load_run("runs/mine")
    >>> figures = run.evaluate(ks=(10,), baselines=True)  # doctest: +ELLIPSIS
    WARNING: ...
    >>> compared = tt.compare([run, "runs/mine:popularity"])  # doctest: +ELLIPSIS
    Measured alike: ...
    >>> compared.rows[0].metric
    'recall@10'

    Args:
        runs: Evaluated runs or their folders; "runs/a:ease" is a baseline that was measured beside
            one, and the folder of `repeat` the mean of its seeds. The others are compared with the
            first.
        split: Rows that were found: "test" or "validation".
        report: File of a page to look at, which needs the extra "plots"; None writes none.

    Raises:
        ConfigError: A run was not evaluated, or they were not measured alike.
    """
    if report is not None:
        check_report()
    comparison = compare_records([read_record(_folder_of(run), split) for run in runs])
    # Whoever was chosen among many has a figure that is too good by chance: it is said beside it.
    comparison = dataclasses.replace(comparison, notes=(*comparison.notes, *_tuning_notes(runs)))
    print(format_comparison(comparison))
    if report is not None:
        write_comparison(comparison, Path(report))
        print(f"\nReport: {report}")
    return comparison


def _tuning_notes(runs: Sequence[Run | Path | str]) -> Iterator[str]:
    """Yields a sentence on each run that was chosen from others."""
    for run in runs:
        folder = _folder_of(run)
        tuning = read_tuning(Path(folder))
        if tuning is not None:
            yield f"{folder}: {describe_tuning(tuning)}"


def judge(
    standing: Run | Path | str,
    candidate: Run | Path | str,
    *,
    thresholds: Path | str | None = None,
    undertrained: Run | Path | str | None = None,
    split: str = "test",
) -> Judgement:
    """Judges whether a run may take the place of another: prints and returns the verdict.

    It fails where the whole interval of a loss lies beyond what is put up with, and passes where
    none of it does. Shuffled scores, a collapsed model and a tenth of the training are judged
    first: if one of these comes through, nothing can be told of the candidate.

    >>> run = tt.load_run("runs/mine")
    >>> figures = run.evaluate(ks=(10,))  # doctest: +ELLIPSIS
    WARNING: ...
    >>> judged = tt.judge(run, "runs/mine")  # doctest: +ELLIPSIS
    Preflight...
    >>> judged.verdict, judged.exit_code  # of 30 users nothing can be told
    ('undecided', 2)

    Args:
        standing: Run that stands, evaluated; as in `compare`.
        candidate: Run that would take its place.
        thresholds: JSON file of the losses that are put up with; by default a twentieth of recall
            and NDCG.
        undertrained: A run of a tenth of the training, which must fail; by default one is made of
            the validations of `standing`.
        split: Rows that were found: "test", "validation", or the name of a further test set.

    Returns:
        The judgement: "passes", "fails" or "undecided" as its `verdict`, with every check in it.

    Raises:
        ConfigError: A run was not evaluated, the two were not measured alike, or the thresholds
            name a metric or a slice that there is not.
    """
    records = [read_record(_folder_of(run), split) for run in (standing, candidate)]
    # Relative to the run that stands, whose figures say what a loss is a part of.
    limits = default_thresholds(records[0])
    if thresholds is not None:
        limits = load_thresholds(Path(thresholds), records[0])
    if undertrained is not None:
        name = f"{_folder_of(undertrained)}, given as a tenth of the training,"
        known = (name, read_record(_folder_of(undertrained), split))
    else:
        folder = Path(_folder_of(standing))
        known = None
        # Neither a baseline nor the mean of several seeds has a curve of its own.
        if run_of(folder) is not None:
            metric = load_config(folder).training.metric
            known = undertrained_by_curve(records[0], read_lines(folder), metric)
    judgement = judge_records(records[0], records[1], limits, undertrained=known)
    print(format_judgement(judgement))
    return judgement


def _folder_of(run: Run | Path | str) -> str:
    """Returns the name of a run in a comparison, which is its folder."""
    return str(run.workdir) if isinstance(run, Run) else str(run)


def load_retriever(folder: Path | str) -> Retriever:
    """Loads the retriever of a bundle, of a run, of one of its checkpoints, or of MLflow.

    A run is answered from its bundle, with the changes made to it. Where it has none, and for a
    checkpoint, a bundle is made in memory; that of a run comes from the best checkpoint.

    >>> len(tt.load_retriever("runs/mine/checkpoints/4"))
    50

    Args:
        folder: Such a folder: runs/mine/bundle, runs/mine, or runs/mine/checkpoints/1000; or a
            bundle in MLflow: models:/NAME/VERSION, models:/NAME@ALIAS or runs:/RUN_ID/bundle. Also
            the address of a bundle or a run in a bucket: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.

    Raises:
        BundleError: The folder is none of these, or the bundle is not whole.
        ChangesError: The log of changes to the bundle is damaged.
    """
    if is_address(folder):
        folder = fetch_bundle(str(folder))
        # The plugins of its run are imported first, as of a run here.
        load_config(folder.parent)
    folder = _local_bundle_or_run(folder)
    workdir = run_of(folder)
    if workdir is None:
        return Retriever.load(folder)
    # Its plugins are imported first: the encoder of the bundle may need them.
    load_config(workdir)
    if workdir != folder:
        return Retriever(make_bundle(load_run(workdir, checkpoint=folder.name)))
    # The bundle before the checkpoint: it has the index, and the changes made to its items.
    if (workdir / BUNDLE).exists():
        return Retriever.load(workdir / BUNDLE)
    return Retriever(make_bundle(load_run(workdir)))


def _local_bundle_or_run(folder: Path | str) -> Path:
    """Returns a folder, that of an address as its copy on this machine."""
    if not is_remote(folder):
        return Path(folder)
    try:
        return fetch_remote_bundle(folder)
    except BundleError:
        # A run, perhaps; its own loading says what is missing.
        return run_folder.local_folder(folder)
