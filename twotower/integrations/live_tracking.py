"""Logging of a run to MLflow while it trains, by a thread that the steps never wait for.

The training writes `metrics.jsonl` as ever, and this reads it: what a store that is away misses is
sent when it answers again, by this training or by the next command for its run.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from twotower.core.errors import ConfigError, PreemptedError
from twotower.core.install import command
from twotower.integrations.mlflow_store import (
    Destination,
    check_address,
    hide_password,
    linked_destination,
    read_link,
    require_mlflow,
    resolve_uri,
)
from twotower.integrations.tracking import Recorder
from twotower.training.loop import EndedEarly
from twotower.training.metrics import METRICS

PERIOD = 2.0  # seconds between two looks at the file
REST = 20  # seconds of rest for each second of logging, which takes the interpreter from the steps
AWAY_PERIOD = 10.0  # seconds before a store that is away is asked again
CLOSING_SECONDS = 60.0  # wait at the end for a store that answers slowly
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@contextlib.contextmanager
def follow(
    workdir: Path, destination: Destination | None, *, conclude: Callable[[], None] | None = None
) -> Iterator[Callable[[], None]]:
    """Logs the training in a block, and gives the function to call when its folder is made.

    Args:
        workdir: Folder of the run, which need not exist yet.
        destination: Where it is logged to; by default where it was logged before, and a training
            that never was is not logged.
        conclude: Function that makes the bundle and the evaluation of a training that is logged
            and has come to its end; they are logged after it. None makes none.

    Raises:
        ConfigError: The extra is missing, or the address of the store cannot be right. A server
            that does not answer is no error.
    """
    if destination is not None:
        require_mlflow()
        check_address(resolve_uri(destination.uri))
    else:
        destination = linked_destination(workdir)
    if destination is None:
        yield _log_nothing
        return
    live = LiveTracking(workdir, destination)
    # The thread itself tries again: MLflow would do so for minutes, with a warning each time.
    before = os.environ.get(RETRIES)
    os.environ.setdefault(RETRIES, "0")
    # Unless the block says otherwise: every error that is none of those below is a failure.
    status = "FAILED"
    try:
        yield live.start
        status = "FINISHED"
    except (PreemptedError, KeyboardInterrupt, EndedEarly):
        status = "KILLED"
        raise
    finally:
        live.close(status)
        # After the training is told as finished, which it is whatever comes of the rest.
        try:
            if status == "FINISHED" and conclude is not None and live.has_begun:
                conclude()
                live.log_results()
        finally:
            if before is None:
                os.environ.pop(RETRIES, None)


def _log_nothing() -> None:
    """Stands for the start of a log where there is none."""


class LiveTracking:
    """Thread that logs a run as it trains.

    Args:
        workdir: Folder of the run, which need not exist yet.
        destination: Where it is logged to.
    """

    def __init__(self, workdir: Path, destination: Destination) -> None:
        self._recorder = Recorder(workdir, destination)
        self._metrics = workdir / METRICS
        self._over = threading.Event()
        # Status that MLflow shows, once training is over: FINISHED, KILLED or FAILED.
        self._status = ""
        self._is_running = False
        # Whether the store took all that there was at the end of the training.
        self._has_all = False
        self._has_warned = False
        # A daemon: a store that hangs must not keep the process from its end.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def has_begun(self) -> bool:
        """Whether there was something to log: of several processes one logs."""
        return self._thread.ident is not None

    def start(self) -> None:
        """Begins to log: the folder holds the run."""
        self._thread.start()

    def close(self, status: str) -> None:
        """Logs what is left, and waits for that, but not for ever.

        Args:
            status: Status that MLflow shows: FINISHED, KILLED or FAILED.
        """
        self._status = status
        self._over.set()
        # Not even begun: the configuration or the data was refused.
        if not self.has_begun:
            return
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            self._warn(f"the store has not answered within {CLOSING_SECONDS:.0f} seconds")

    def log_results(self) -> None:
        """Logs the evaluations and the bundle of a training that is over and logged."""
        # Said already; and a thread that waits for the store may still use the recorder.
        if not self._has_all:
            return
        try:
            with self._recorder.open() as client:
                self._recorder.log_results(client, bundle=True)
        # As of the training itself: what was made is in the folder.
        except Exception as error:
            logging.warning(
                "MLflow: %s. The bundle and the figures are in %s; to log them: %s",
                _reason(error),
                self._recorder.workdir,
                self._cure(),
            )

    def _work(self) -> None:
        """Logs whenever there are new lines, and once more when training is over."""
        seen: tuple[int, int] | None = None
        while not self._over.is_set():
            began = time.monotonic()
            found = self._stamp()
            pause = PERIOD
            if found != seen or not self._is_running:
                if self._log(""):
                    seen = found
                    pause = max(PERIOD, REST * (time.monotonic() - began))
                else:
                    pause = AWAY_PERIOD
            self._over.wait(pause)
        # Outside of the loop: the last lines are written after the last look.
        self._has_all = self._log(self._status)

    def _stamp(self) -> tuple[int, int] | None:
        """Returns what changes with the file of metrics; None before there is one."""
        with contextlib.suppress(FileNotFoundError):
            status = self._metrics.stat()
            return status.st_mtime_ns, status.st_size
        return None

    def _log(self, status: str) -> bool:
        """Logs what is new, and returns whether the store took it.

        Args:
            status: Status of a training that is over, else "".
        """
        recorder = self._recorder
        try:
            with recorder.open() as client:
                run_id = recorder.link(client).run_id
                # It may have ended before, and go on now.
                if not self._is_running:
                    client.update_run(run_id, status="RUNNING")
                    self._is_running = True
                recorder.log_training(client)
                if status:
                    client.set_terminated(run_id, status)
        # Whatever is wrong with the log of a training, the training goes on.
        except Exception as error:
            self._warn(_reason(error))
        else:
            return True
        return False

    def _warn(self, reason: str) -> None:
        """Says once that the store is away, and how what it misses gets there."""
        if self._has_warned:
            return
        self._has_warned = True
        logging.warning(
            "MLflow: %s. The training goes on; what is missed follows when the store answers, or "
            "afterwards by: %s",
            reason,
            self._cure(),
        )

    def _cure(self) -> str:
        """Returns the command that logs what was missed."""
        recorder = self._recorder
        arguments = [f"--workdir={recorder.workdir}", "--bundle"]
        # Until the store has answered once, the folder does not say where it is logged to.
        if read_link(recorder.workdir) is None:
            destination = recorder.destination
            arguments.append(f"--tracking_uri={hide_password(recorder.uri)}")
            arguments.append(f"--experiment_name={destination.experiment}")
            if destination.run_name:
                arguments.append(f"--run_name={destination.run_name}")
        return command("track", *arguments)


def _reason(error: Exception) -> str:
    """Returns what a warning says of an error."""
    if isinstance(error, ConfigError):
        return str(error).rstrip(".")
    return f"{type(error).__name__}: {error}"
