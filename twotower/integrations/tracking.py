"""Tracking of a run in MLflow: its configuration, data, metrics, evaluations and files.

Only the folder of the run is read, so that a run can be logged at any time, also while it trains,
and again: what the store has is not sent twice, and what it missed follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from twotower.core.errors import ConfigError
from twotower.core.files import current_version
from twotower.core.install import command
from twotower.data.report import DataReport
from twotower.evaluation.query_table import record_name
from twotower.integrations.mlflow_model import Registration, log_bundle, register
from twotower.integrations.mlflow_store import (
    LINK,
    LINK_TAG,
    PARENT_TAG,
    SWEEP_TAG,
    VERSION_TAG,
    WORKDIR_TAG,
    Destination,
    Link,
    artifact_folder,
    link_run,
    linked_destination,
    open_store,
    read_link,
    resolve_uri,
)
from twotower.plugins import load_config
from twotower.retrieval.bundle import BUNDLE
from twotower.training.metrics import read_lines

if TYPE_CHECKING:  # an extra, which is not always installed
    from mlflow import MlflowClient

# Limits of MLflow: for one request, and for the text of a parameter.
METRICS_PER_REQUEST = 1_000
PARAMS_PER_REQUEST = 100
MAX_PARAM_CHARACTERS = 6_000
# Figures of an evaluation that are no metrics of a run: there are thousands of them. They are in
# the file that is logged, and in the results table.
NO_METRICS = ("protocol", "options", "slices")


def track(
    workdir: Path | str,
    destination: Destination | None = None,
    *,
    bundle: bool = False,
    registration: Registration | None = None,
) -> Link:
    """Logs the run in `workdir` to an MLflow store.

    Args:
        workdir: Folder of the run.
        destination: Where to; by default where the run was logged before.
        bundle: Whether the bundle is logged too, beside the configuration and the evaluations.
        registration: Name in the registry of models that the bundle becomes a version of; None for
            none.

    Returns:
        The MLflow run, which a later call for this folder and destination goes on with.

    Raises:
        ConfigError: `workdir` is no run, or the store refuses.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    if destination is None:
        destination = linked_destination(workdir) or Destination()
    if registration is not None and not (workdir / BUNDLE).exists():
        line = command("export", f"--workdir={workdir}")
        raise ConfigError(f"--register={registration.name}: {workdir} has no bundle yet: {line}")
    recorder = Recorder(workdir, destination)
    with recorder.open() as client:
        link = recorder.link(client)
        recorder.log_training(client)
        recorder.log_results(client, bundle=bundle)
        # Steps in proportion to the data are counted by the training alone, so that only a bundle
        # shows that it has ended.
        training = config.training
        lines = read_lines(workdir)
        is_counted = not training.steps_for and not training.passes
        ended = lines and is_counted and lines[-1]["step"] >= training.steps
        if ended or (workdir / BUNDLE).exists():
            client.set_terminated(link.run_id)
        if registration is not None:
            version = register(client, link.run_id, workdir / BUNDLE, registration)
            logging.info("models:/%s/%s is the bundle of %s.", registration.name, version, workdir)
    return link


def log_linked(workdir: Path, *, bundle: bool = False) -> None:
    """Logs what is new in the folder of a run that is linked to MLflow; does nothing for others.

    A store that is away costs a warning: the work whose results these are is done.
    """
    destination = linked_destination(workdir)
    if destination is None:
        return
    recorder = Recorder(workdir, destination)
    try:
        with recorder.open() as client:
            recorder.log_training(client)
            recorder.log_results(client, bundle=bundle)
    except ConfigError as error:
        logging.warning("%s What is missed there follows with the next command.", error)


class Recorder:
    """Log of a run's folder in a store, which remembers what the store has already.

    Args:
        workdir: Folder of the run.
        destination: Where it is logged to.
        is_of_sweep: Whether the folder is that of a sweep, or of a training of one.
    """

    def __init__(
        self, workdir: Path, destination: Destination, *, is_of_sweep: bool = False
    ) -> None:
        self._is_of_sweep = is_of_sweep or bool(destination.parent)
        self.workdir = workdir
        self.destination = destination
        self.uri = resolve_uri(destination.uri)
        self._link: Link | None = None
        self._has_params = False
        # Metric -> steps that the store has; read from it once, and anew after an error.
        self._logged: dict[str, set[int]] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[MlflowClient]:
        """Opens the store.

        Raises:
            ConfigError: The store does not answer, or refuses.
        """
        cure = ""
        # The run may have been deleted in MLflow since.
        if (self.workdir / LINK).exists():
            cure = f"To log to a new run of MLflow, delete {self.workdir / LINK}."
        try:
            with open_store(self.uri, cure) as client:
                yield client
        except BaseException:
            # A request may have been carried out though its answer was lost.
            self._logged = {}
            raise

    def link(self, client: MlflowClient) -> Link:
        """Returns the MLflow run of the folder, which is made where there is none."""
        if self._link is None:
            link = link_run(self.workdir, self.destination)
            if not link.run_id:
                run_id = self._find_or_make(client, link.token)
                link = dataclasses.replace(link, run_id=run_id)
                link.save(self.workdir)
            self._link = link
        return self._link

    def _find_or_make(self, client: MlflowClient, token: str) -> str:
        """Returns the id of the run that has the token of a link, or of a new one."""
        destination = self.destination
        existing = client.get_experiment_by_name(destination.experiment)
        if existing is None:
            location = destination.artifacts or artifact_folder(self.uri)
            experiment_id = client.create_experiment(
                destination.experiment, artifact_location=location or None
            )
        else:
            experiment_id = existing.experiment_id
            # Made by a request whose answer never came.
            found = client.search_runs([experiment_id], f"tags.`{LINK_TAG}` = '{token}'")
            if found:
                return found[0].info.run_id
        folder = self.workdir.resolve()
        # Most trainings of a sweep keep no checkpoint: only its best one becomes a run to take.
        folder_tag = SWEEP_TAG if self._is_of_sweep else WORKDIR_TAG
        tags = {folder_tag: str(folder), LINK_TAG: token}
        if destination.parent:
            tags[PARENT_TAG] = self._parent_id(client)
        name = destination.run_name or folder.name
        return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id

    def _parent_id(self, client: MlflowClient) -> str:
        """Returns the id of the sweep's run, which the first of its trainings makes."""
        folder = Path(self.destination.parent)
        sweep = read_link(folder)
        name = sweep.run_name if sweep else ""
        destination = dataclasses.replace(self.destination, parent="", run_name=name)
        return Recorder(folder, destination, is_of_sweep=True).link(client).run_id

    def log_training(self, client: MlflowClient) -> None:
        """Logs the configuration, facts about the data, and the metrics of steps."""
        run_id = self.link(client).run_id
        if not self._has_params:
            config = dataclasses.asdict(load_config(self.workdir))
            facts = describe_report(DataReport.load(self.workdir / "data"))
            log_params(client, run_id, {**config, "statistics": facts})
            client.log_artifact(run_id, str(self.workdir / "config.json"))
            self._has_params = True
        points: dict[str, dict[int, float]] = defaultdict(dict)
        for line in read_lines(self.workdir):
            step = line.pop("step")
            for name, value in _numbers(dict(flatten(line))).items():
                points[name][step] = value
        self._log_points(client, run_id, points)

    def _log_points(
        self, client: MlflowClient, run_id: str, points: Mapping[str, Mapping[int, float]]
    ) -> None:
        """Logs the metrics, by name and step, that the store does not have yet."""
        from mlflow.entities import Metric

        # The time of a step is made of its number and always the same, so that the store recognises
        # a metric that two processes send it.
        start_time = client.get_run(run_id).info.start_time
        metrics = []
        for name, by_step in points.items():
            if name not in self._logged:
                history = client.get_metric_history(run_id, name)
                self._logged[name] = {point.step for point in history}
            # A run that was killed repeats steps: their rates differ, and the first are kept.
            for step in by_step.keys() - self._logged[name]:
                metrics.append(Metric(name, by_step[step], start_time + step, step))
        # In order of time, as a chart that is looked at meanwhile shows them.
        metrics.sort(key=lambda metric: metric.step)
        _log_metrics(client, run_id, metrics)
        for metric in metrics:
            self._logged[metric.key].add(metric.step)

    def log_results(self, client: MlflowClient, *, bundle: bool) -> None:
        """Logs the figures and files of evaluations, and the bundle if `bundle`."""
        from mlflow.entities import Metric

        run_id = self.link(client).run_id
        known = client.get_run(run_id).data.metrics
        metrics = []
        for path in sorted((self.workdir / "evaluation").glob("metrics*.json")):
            measured = json.loads(path.read_text(encoding="utf-8"))
            protocol = measured["protocol"]
            figures = {name: x for name, x in measured.items() if name not in NO_METRICS}
            # The latest evaluation of a step is the one that MLflow shows.
            moment = int(path.stat().st_mtime * 1000)
            for name, x in _numbers(dict(flatten({record_name(protocol): figures}))).items():
                if known.get(name) != x:
                    metrics.append(Metric(name, x, moment, protocol["step"]))
        _log_metrics(client, run_id, metrics)
        _log_files(client, run_id, self.workdir, bundle=bundle)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings with their paths, in names that MLflow takes.

    >>> dict(flatten({"a": {"b": 1, "c": {}}, "recall@10": 2}))
    {'a.b': 1, 'recall_at_10': 2}
    """
    for key, value in tree.items():
        # MLflow takes letters, digits and _-./ and spaces; "recall_10" would read badly.
        readable = str(key).replace("@", "_at_")
        name = prefix + re.sub(r"[^\w.\- /]", "_", readable)
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def describe_report(report: DataReport | None) -> dict[str, Any]:
    """Returns facts about the data of a run as parameters; {} where there is no report."""
    if report is None:
        return {}
    facts: dict[str, Any] = {
        "rows": dict(report.parts),
        "users": report.users,
        "items": report.items,
        "corpus": report.corpus,
    }
    for name, seconds in (("from", report.first_time), ("to", report.last_time)):
        if seconds is not None:
            moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
            facts[name] = moment.isoformat(timespec="seconds")
    return facts


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Logs the parameters that are not logged yet."""
    # In the functions, since the extra may be missing.
    from mlflow.entities import Param

    # MLflow refuses another value for a parameter that it has.
    logged = client.get_run(run_id).data.params
    params = [
        Param(name, str(value)[:MAX_PARAM_CHARACTERS])
        for name, value in flatten(values)
        if name not in logged
    ]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])


def _log_metrics(client: MlflowClient, run_id: str, metrics: Iterable[Any]) -> None:
    """Logs metrics, as many at once as a request takes."""
    metrics = list(metrics)
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values that are numbers: MLflow has no other metrics."""
    return {name: float(x) for name, x in values.items() if isinstance(x, (int, float))}


def _log_files(client: MlflowClient, run_id: str, workdir: Path, *, bundle: bool) -> None:
    """Logs the files of evaluations, pictures and pages among them, and the bundle if `bundle`."""
    # Without the versions before: the one that is logged is a bundle of its own.
    bundle_folder = current_version(workdir / BUNDLE)
    if (workdir / "evaluation").exists():
        # Without the folder of fitted baselines, which may be larger than all else.
        for path in sorted((workdir / "evaluation").iterdir()):
            if path.is_file():
                client.log_artifact(run_id, str(path), "evaluation")
    if bundle and bundle_folder.exists():
        log_bundle(client, run_id, workdir / BUNDLE)
    # The tag is set also where the bundle itself is not logged: it says which one belongs here.
    manifest_file = bundle_folder / "manifest.json"
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_text())
        client.set_tag(run_id, VERSION_TAG, manifest["model_version"])
