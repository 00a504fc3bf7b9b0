"""A sweep in MLflow: a run for it, nested ones for its trainings, none twice, the best to take."""

import json
import shutil

import pytest

from twotower.integrations.live_tracking import follow
from twotower.integrations.mlflow_runs import find_run
from twotower.integrations.mlflow_store import WORKDIR_TAG, Destination, read_link
from twotower.integrations.sweep_tracking import SweepTracking
from twotower.training.loop import EndedEarly

METRIC = "recall@10"


def sweep(folder, store, config, *, best):
    """Logs two trainings, the second of which is pruned, and an outcome."""
    tracking = SweepTracking(folder, Destination(uri=store, experiment="swept", run_name="first"))
    for number, values in enumerate(([0.1, 0.3, 0.2], [0.05])):
        training = folder / "trials" / str(number) / "seed-0"
        training.mkdir(parents=True, exist_ok=True)
        shutil.copy(config, training)
        lines = []
        for step, value in enumerate(values):
            lines.append(json.dumps({"step": step, f"validation/{METRIC}": value}))
        (training / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        try:
            with follow(training, tracking.of_training(training)) as start:
                start()
                if number == 1:
                    raise EndedEarly
        except EndedEarly:
            pass
        tracking.log_best(training, METRIC, values)
    page = folder / "sweep.html"
    page.write_text("a page")
    runs = [folder / "trials" / str(best) / "seed-0"]
    tracking.finish({"space": {"a.b": "1 to 2"}}, {"best": {METRIC: 0.3}}, [page], runs)


@pytest.mark.slow
def test_a_sweep_that_is_given_again_makes_no_run_twice(tmp_path, store, client, workdir):
    config = workdir / "config.json"
    sweep(tmp_path, store, config, best=1)
    sweep(tmp_path, store, config, best=0)
    experiment = client.get_experiment_by_name("swept").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == ["first", "trial-0 seed-0", "trial-1 seed-0"]
    parent = runs["first"]
    assert parent.data.params["space.a.b"] == "1 to 2" and parent.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["sweep.html"]
    for name, best, status in (("trial-0", 0.3, "FINISHED"), ("trial-1", 0.05, "KILLED")):
        run = runs[f"{name} seed-0"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["best.recall_at_10"] == best and run.info.status == status
        assert run.data.params["training.batch_size"]
        points = client.get_metric_history(run.info.run_id, "best.recall_at_10")
        assert len(points) == 1
    # Others keep no checkpoints: a command that takes the latest run takes the best.
    assert [name for name in runs if WORKDIR_TAG in runs[name].data.tags] == ["trial-0 seed-0"]
    found = find_run("swept", uri=store)
    assert found.workdir == tmp_path / "trials" / "0" / "seed-0" and found.is_here


def test_a_store_that_is_away_costs_a_sweep_nothing(tmp_path, workdir, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = SweepTracking(tmp_path, Destination(uri="http://127.0.0.1:9", experiment="swept"))
    training = tmp_path / "trials" / "0" / "seed-0"
    training.mkdir(parents=True)
    tracking.log_best(training, METRIC, [0.1])
    tracking.finish({}, {}, [], [training])
    # The same sweep goes on in the run that the link will name.
    assert read_link(tmp_path).experiment == "swept"
