"""Logging of a sweep to MLflow: a run for the sweep, and nested in it one for each training.

Trainings are logged as they go by `twotower.integrations.live_tracking`; here is what makes them
comparable. The folders remember their runs, so that a sweep that goes on makes none twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from twotower.core.errors import ConfigError
from twotower.integrations.mlflow_store import (
    PARENT_TAG,
    WORKDIR_TAG,
    Destination,
    check_address,
    link_run,
    linked_destination,
    read_link,
    require_mlflow,
    resolve_uri,
)
from twotower.integrations.tracking import Recorder, flatten, log_params

if TYPE_CHECKING:  # an extra, which is not always installed
    from mlflow import MlflowClient


class SweepTracking:
    """Log of a sweep in MLflow; of one that is not logged it does nothing.

    Args:
        workdir: Folder of the sweep.
        destination: Where it is logged to; by default where it was logged before, if it was.

    Raises:
        ConfigError: The extra is missing, or the address of the store cannot be right. A server
            that does not answer is no error.
    """

    def __init__(self, workdir: Path, destination: Destination | None) -> None:
        self._workdir = workdir.resolve()
        self._destination = destination or linked_destination(workdir)
        if self._destination is not None:
            require_mlflow()
            check_address(resolve_uri(self._destination.uri))

    def of_training(self, folder: Path) -> Destination | None:
        """Returns where a training is logged to.

        Args:
            folder: Its folder, trials/NUMBER/seed-SEED of the sweep.
        """
        if self._destination is None:
            return None
        # Written before any training: it names the run of the sweep for all of them.
        link_run(self._workdir, self._destination)
        name = f"trial-{folder.parent.name} {folder.name}"
        return dataclasses.replace(self._destination, run_name=name, parent=str(self._workdir))

    def log_best(self, folder: Path, metric: str, values: Sequence[float]) -> None:
        """Logs the best validation of a training, by which MLflow's table sorts the runs.

        Args:
            folder: Folder of the training.
            metric: Metric that the sweep compares.
            values: Its value at each validation.
        """
        destination = self.of_training(folder)
        # No values: it was refused, or killed before its first validation.
        if destination is None or not values:
            return
        recorder = Recorder(folder, destination)
        with _outlive_the_store(), recorder.open() as client:
            run_id = recorder.link(client).run_id
            _log_figures(client, run_id, {"best": {metric: max(values)}})

    def finish(
        self,
        params: Mapping[str, Any],
        figures: Mapping[str, Any],
        files: Sequence[Path],
        best: Sequence[Path],
    ) -> None:
        """Logs what came of the sweep, ends its run, and makes the best trainings runs to take.

        Args:
            params: What was swept, and how.
            figures: Figures of the best configuration.
            files: Files of the sweep.
            best: Folders of the best trainings, which alone keep their checkpoints.
        """
        if self._destination is None:
            return
        recorder = Recorder(self._workdir, self._destination, is_of_sweep=True)
        with _outlive_the_store(), recorder.open() as client:
            run_id = recorder.link(client).run_id
            log_params(client, run_id, params)
            _log_figures(client, run_id, figures)
            for path in files:
                client.log_artifact(run_id, str(path))
            _tag_best(client, run_id, best)
            client.set_terminated(run_id)


@contextlib.contextmanager
def _outlive_the_store() -> Iterator[None]:
    """Makes a warning of a store that is away: the trainings are done all the same."""
    try:
        yield
    except ConfigError as error:
        logging.warning("%s The same sweep, given again, logs what is missed.", error)


def _log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, Any]) -> None:
    """Logs the figures that the run does not show yet."""
    shown = client.get_run(run_id).data.metrics
    for name, value in flatten(figures):
        if shown.get(name) != value:
            client.log_metric(run_id, name, value)


def _tag_best(client: MlflowClient, run_id: str, folders: Sequence[Path]) -> None:
    """Gives the best trainings of a sweep the tag by which commands take a run of MLflow."""
    best = {}
    for folder in folders:
        link = read_link(folder)
        if link is not None and link.run_id:
            best[link.run_id] = str(folder.resolve())
    experiment = client.get_run(run_id).info.experiment_id
    condition = f"tags.`{PARENT_TAG}` = '{run_id}' and tags.`{WORKDIR_TAG}` LIKE '%'"
    # Best before the sweep took on further trials.
    for run in client.search_runs([experiment], condition):
        if run.info.run_id not in best:
            client.delete_tag(run.info.run_id, WORKDIR_TAG)
    for best_id, folder in best.items():
        client.set_tag(best_id, WORKDIR_TAG, folder)
