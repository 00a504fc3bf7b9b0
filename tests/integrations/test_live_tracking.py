"""A training that logs to a real tracking server, which is killed and started again meanwhile."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from absl import logging

from tests.extras import extra
from twotower.integrations import live_tracking
from twotower.integrations.live_tracking import follow
from twotower.integrations.mlflow_store import Destination, read_link

pytestmark = pytest.mark.slow

mlflow = extra("mlflow", "mlflow")
extra("flask", "dev")  # MLflow's server, which the extra mlflow leaves out
STEPS = 40


class Server:
    """MLflow's own tracking server on one port, over one database."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", "--workers=1"]
        command += [f"--port={self.port}", f"--backend-store-uri=sqlite:///{self.folder}/server.db"]
        command += [f"--artifacts-destination={self.folder}/files"]
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Runs of jobs, which nobody asks for here, are processes that each import MLflow.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            log = (self.folder / "log").read_text()
            assert self.process.poll() is None and time.monotonic() < end, log
            time.sleep(0.2)

    def kill(self):
        """Without a word to anybody, its workers too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def folder(tmp_path, workdir):
    """The folder of a run that begins."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(workdir / "config.json", folder)
    return folder


def test_a_server_killed_and_started_again_costs_one_warning_and_no_metric(
    server, folder, monkeypatch
):
    monkeypatch.setattr(live_tracking, "PERIOD", 0.05)
    monkeypatch.setattr(live_tracking, "REST", 0)
    monkeypatch.setattr(live_tracking, "AWAY_PERIOD", 0.2)
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    with follow(folder, Destination(uri=server.uri, experiment="shop", run_name="a")) as start:
        start()
        for step in range(1, STEPS + 1):
            if step == 15:
                wait_for(lambda: is_linked(folder))
                server.kill()
            if step == 30:
                wait_for(lambda: warnings)
                server.start()
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step, "rate": step}) + "\n")
            time.sleep(0.02)
    assert len(warnings) == 1
    assert "The training goes on" in warnings[0]
    client = mlflow.MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)
    [run] = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    for name in ("loss", "rate"):
        points = client.get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in points) == list(range(1, STEPS + 1))
    assert run.data.params["training.batch_size"]


def is_linked(folder):
    """Whether the server has made the run."""
    link = read_link(folder)
    return link is not None and link.run_id


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "not within a minute"
        time.sleep(0.05)
