"""The example of a pipeline: its Makefile, its gate and its Airflow DAG."""

import json
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.pages import ROOT, command_of, mistakes_raised, run_command
from twotower.commands import launch

PIPELINE = ROOT / "experiments" / "examples" / "pipeline"
NAMES = ["train", "evaluate", "gate", "export", "history"]
SMALL = (
    "--devices=1",
    "--config.data.num_interactions=1000",
    "--config.training.batch_size=64",
    "--config.training.steps=4",
    "--config.training.validate_every=4",
)


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "-s", "-f", str(PIPELINE / "Makefile"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def gate(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PIPELINE / "gate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def write_metrics(workdir: Path, model: float, popularity: float | None) -> None:
    measured = {"model": {"ndcg@10": model}}
    if popularity is not None:
        measured["baselines"] = {"popularity": {"ndcg@10": popularity}}
    path = workdir / "evaluation" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured))


@pytest.mark.slow
def test_the_makefile_takes_a_run_from_its_log_to_the_history(tmp_path, monkeypatch):
    """Its commands, in its order, in this process: five Pythons would take far longer."""
    monkeypatch.chdir(tmp_path)
    variables = ["RUN=run", "HISTORY=history", "DATE=2026-11-28", "LEAST=0"]
    printed = make("-n", *variables, f"FLAGS={' '.join(SMALL)}", f"PYTHON={sys.executable}")
    assert not printed.returncode, printed.stderr
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert len(commands) == len(NAMES)
    for command in commands:
        if command[0] == "twotower":
            run_command(command)
        else:
            done = subprocess.run(command, capture_output=True, text=True)
            assert "good enough." in done.stdout, done.stderr
    assert (tmp_path / "run" / "bundle" / "current").exists()
    assert list((tmp_path / "history").glob("item_embeddings/run_date=2026-11-28/*.parquet"))


@pytest.mark.parametrize("model", [0.11, 0.13])
def test_make_stops_at_a_model_that_is_not_good_enough(tmp_path, model):
    write_metrics(tmp_path / "run", model, 0.1)
    # "echo" in the place of the program: what make calls is printed.
    variables = (f"RUN={tmp_path / 'run'}", "TWOTOWER=echo", f"PYTHON={sys.executable}")
    done = make(*variables)
    called = [line.split()[0] for line in done.stdout.splitlines() if "--" in line]
    if model < 0.12:
        assert done.returncode and called == ["train", "evaluate"]
        assert "not good enough" in done.stderr
    else:
        assert not done.returncode and called == ["train", "evaluate", "export", "history"]


@pytest.mark.parametrize(
    ("model", "popularity", "flags", "status", "words"),
    [
        (0.2, 0.1, [], 0, "good enough"),
        (0.2, 0.1, ["--least=2.1"], 1, "not good enough"),
        (0.0, 0.0, [], 0, "good enough"),
        (0.2, None, [], 1, "has no baselines"),
    ],
)
def test_the_gate_compares_with_popularity(tmp_path, model, popularity, flags, status, words):
    write_metrics(tmp_path, model, popularity)
    done = gate(str(tmp_path), *flags)
    assert done.returncode == status and words in done.stdout + done.stderr


def test_the_gate_says_how_to_measure_a_run_that_was_not(tmp_path):
    done = gate(str(tmp_path))
    assert done.returncode == 1 and "twotower evaluate --workdir=" in done.stderr


class Dag:
    """A stand-in of Airflow's DAG, and the tasks that are made inside it."""

    tasks: list["BashOperator"] = []

    def __init__(self, **options):
        assert {"dag_id", "schedule", "start_date"} <= set(options)

    def __enter__(self):
        Dag.tasks = []

    def __exit__(self, *_):
        pass


class BashOperator:
    """A stand-in of Airflow's operator."""

    def __init__(self, *, task_id, bash_command, retries, retry_delay):
        self.task_id = task_id
        self.bash_command = bash_command
        self.retries = retries
        self.after = None
        Dag.tasks.append(self)

    def __rshift__(self, other):
        other.after = self


def test_the_dag_has_the_steps_of_the_makefile(monkeypatch):
    bash = types.ModuleType("airflow.providers.standard.operators.bash")
    bash.BashOperator = BashOperator
    sdk = types.ModuleType("airflow.sdk")
    sdk.DAG = Dag
    monkeypatch.setitem(sys.modules, bash.__name__, bash)
    monkeypatch.setitem(sys.modules, sdk.__name__, sdk)
    code = compile((PIPELINE / "dag.py").read_text(), "dag.py", "exec")
    exec(code, {"__name__": "dag"})
    assert [task.task_id for task in Dag.tasks] == NAMES
    assert [task.after and task.after.task_id for task in Dag.tasks] == [None, *NAMES[:-1]]
    for task in Dag.tasks:
        words = shlex.split(task.bash_command.replace("{{ ds }}", "2026-11-28"))
        assert "{" not in " ".join(words)
        if words[0] == "twotower":
            assert words[1] == task.task_id
            with command_of(words) as module, mistakes_raised():
                launch.parse(module, sys.argv)
