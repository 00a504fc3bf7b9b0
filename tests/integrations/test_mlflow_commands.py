"""The three commands of the MLflow guide as they are written there, in their order."""

import json

import pyarrow.dataset as ds
import pytest
from absl import logging

from tests.extras import extra
from tests.pages import run_command
from twotower import api
from twotower.core.errors import BundleError
from twotower.integrations.embedding_history import EmbeddingHistory
from twotower.integrations.mlflow_runs import find_run

pytestmark = pytest.mark.slow

extra("matplotlib", "plots")
CONFIG = """
from twotower.config import defaults


def get_config():
    config = defaults()
    config.data.source = "shop"
    config.data.num_interactions = 1000
    config.features.user = {"user_id": {"type": "string", "embedding_size": 8}}
    config.features.item = {"item_id": {"type": "string", "embedding_size": 8}}
    config.training.batch_size = 64
    config.training.steps = 4
    config.training.validate_every = 4
    config.training.log_every = 2
    return config
"""
TRAIN = "--experiment_name=guide --run_name=a --config=tiny.py"
EVALUATE = (
    "--mlflow_experiment=guide --k=10,50,100,250,1000 --baselines --quantile_threshold=.99 "
    "--queries=20"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, store):
    """A working folder after the training."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "tiny.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.chdir(folder)
        run_command(["twotower", "train", *TRAIN.split()])
        yield folder


def logged_files(client, run_id, path=""):
    return {file.path.rpartition("/")[2] for file in client.list_artifacts(run_id, path)}


def test_a_training_ends_with_its_bundle_its_figures_and_its_pictures(folder, client):
    run_id = find_run("guide").link.run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {"manifest.json", "MLmodel"} <= logged_files(client, run_id, "bundle")
    files = logged_files(client, run_id, "evaluation")
    assert {"metrics_validation.json", "report_validation.html"} <= files
    assert len([name for name in files if name.endswith(".png")]) == 2
    assert "validation.model.recall_at_10" in run.data.metrics
    # The test rows are for whoever asks for them.
    assert "metrics.json" not in files


def test_evaluate_and_history_take_the_run_from_the_experiment(folder, client):
    said = run_command(["twotower", "evaluate", *EVALUATE.split()])
    assert "Run 'a' of the experiment 'guide'" in said
    measured = json.loads((folder / "runs/guide/a/evaluation/metrics.json").read_text())
    choice = measured["baseline_choices"]["popularity_top_quantile"]
    assert choice["setting"] == "the top 0.01 of the items"
    files = logged_files(client, find_run("guide").link.run_id, "evaluation")
    assert {"metrics.json", "report.html"} <= files
    rows = ds.dataset("runs/history/results", partitioning="hive").to_table().to_pylist()
    assert {(row["experiment_id"], row["run_id"]) for row in rows} == {("guide", "a")}
    assert {10, 50, 100, 250, 1000} <= {row["k"] for row in rows}
    run_command(["twotower", "history", "--append", "--mlflow_experiment=guide"])
    [file] = EmbeddingHistory("runs/history").files("item")
    assert (file.version.run_id, file.version.experiment_id) == ("a", "guide")


def test_a_bundle_of_the_checkpoint_stays_and_one_that_is_refused_is_a_warning(folder, monkeypatch):
    warnings = []

    def warn(text, *args):
        # Others' too: checkpoints warn of what they are opened for.
        if text.startswith("The training is whole"):
            warnings.append(text % args)

    monkeypatch.setattr(logging, "warning", warn)

    def refuse(*_, **__):
        raise BundleError("it does not score as the trainer did.")

    monkeypatch.setattr(api, "export", refuse)
    monkeypatch.setattr(api, "evaluate", refuse)
    printed = run_command(["twotower", "train", *TRAIN.split()])
    assert not warnings and "export" not in printed
    bundle = folder / "runs/guide/a/bundle"
    bundle.rename(folder / "away")
    printed = run_command(["twotower", "train", *TRAIN.split()])
    [warning] = warnings
    assert "it does not score as" in warning and "export --workdir=runs/guide/a" in warning
    assert "export" in printed
    (folder / "away").rename(bundle)
