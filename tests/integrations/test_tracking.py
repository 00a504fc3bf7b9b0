"""A run in a real MLflow store, an SQLite file: what was logged is there, once."""

import json
import re
import shutil
import sys
import time

import pytest
from absl import logging

from tests.extras import extra
from twotower.config import from_dict
from twotower.core.errors import ConfigError, PreemptedError
from twotower.core.install import install_line
from twotower.integrations import live_tracking, tracking
from twotower.integrations.live_tracking import follow
from twotower.integrations.mlflow_model import Registration
from twotower.integrations.mlflow_store import Destination, read_link
from twotower.integrations.tracking import log_linked
from twotower.integrations.tracking import track as track_run

pytestmark = pytest.mark.slow

mlflow = extra("mlflow", "mlflow")
extra("sqlalchemy", "mlflow")
extra("alembic", "mlflow")
MEASURED = {
    "protocol": {"split": "test", "step": 4, "query": "user"},
    "model": {"recall@10": 0.25},
    "baselines": {"popularity": {"recall@10": 0.1}},
    "index": {"kind": "exact", "recall@10": 1.0},
}


def track(shop, *, uri, experiment, **options):
    """The id of the MLflow run."""
    destination = Destination(uri=uri, experiment=experiment)
    return track_run(shop, destination, **options).run_id


@pytest.fixture
def shop(tmp_path):
    """A folder as `train` and `evaluate` leave it."""
    folder = tmp_path / "shop"
    (folder / "evaluation").mkdir(parents=True)
    features = {"user": {"user_id": {"type": "string"}}, "item": {"title & more": {"type": "text"}}}
    config = from_dict({"training": {"steps": 4, "validate_every": 2}, "features": features})
    (folder / "config.json").write_text(config.to_json())
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(MEASURED))
    lines = [{"step": 2, "loss": 3.5, "recall@10": 0.1}, {"step": 4, "loss": 3.0, "recall@10": 0.2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_logged_with_its_configuration_metrics_and_files(store, client, shop):
    run_id = track(shop, uri=store, experiment="all")
    run = client.get_run(run_id)
    assert (
        run.data.params["training.steps"] == "4"
        and run.data.params["features.item.title _ more.type"] == "text"
    )
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(2, 3.5), (4, 3.0)]
    wanted = {
        "recall_at_10": 0.2,
        "test.model.recall_at_10": 0.25,
        "test.baselines.popularity.recall_at_10": 0.1,
        "test.index.recall_at_10": 1.0,
    }
    assert wanted.items() <= run.data.metrics.items()
    assert (run.info.run_name, run.info.status) == ("shop", "FINISHED")
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.json", "evaluation"}
    kept = mlflow.artifacts.download_artifacts(
        f"{run.info.artifact_uri}/config.json", dst_path=str(shop / "down")
    )
    assert open(kept).read() == (shop / "config.json").read_text()


def test_files_lie_beside_the_store_whatever_folder_the_command_was_started_in(
    store, client, shop, monkeypatch
):
    monkeypatch.chdir(shop.parent)
    run = client.get_run(track(shop, uri=store, experiment="files"))
    assert run.info.artifact_uri.startswith(
        f"file://{store.removeprefix('sqlite:///').rpartition('/')[0]}/mlartifacts/"
    )
    assert [path.name for path in shop.parent.iterdir()] == ["shop"]


def test_a_repeat_logs_what_is_new_and_nothing_twice(store, client, shop):
    whole = (shop / "metrics.jsonl").read_text()
    (shop / "metrics.jsonl").write_text(
        whole.splitlines(keepends=True)[0] + '{"step": 4, "lo'
    )  # in the middle of a line
    shutil.rmtree(shop / "evaluation")
    first = track(shop, uri=store, experiment="again")
    assert client.get_run(first).info.status == "RUNNING"
    (shop / "metrics.jsonl").write_text(whole)
    for _ in range(2):
        assert track(shop, uri=store, experiment="again") == first
        assert [point.step for point in client.get_metric_history(first, "loss")] == [2, 4]
    assert client.get_run(first).info.status == "FINISHED"
    experiment = client.get_experiment_by_name("again").experiment_id
    assert len(client.search_runs([experiment])) == 1
    assert track(shop, uri=store, experiment="another") != first


def test_more_metrics_than_a_request_takes(store, client, shop):
    lines = [{"step": step, "loss": step / 7} for step in range(1, 1_203)]
    (shop / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_id = track(shop, uri=store, experiment="many")
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [
        line["loss"] for line in lines
    ]


def test_a_bundle_is_logged_and_registered_once(store, client, shop, retriever):
    """In the one folder: what the library loads as a bundle, and MLflow as a model."""
    shutil.copytree(retriever.bundle.folder, shop / "bundle", symlinks=True)
    registration = Registration(name="shop", alias="champion")
    destination = Destination(uri=store, experiment="bundle")
    run_id = track_run(shop, destination, bundle=True, registration=registration).run_id
    files = {file.path for file in client.list_artifacts(run_id, "bundle")}
    assert {"bundle/manifest.json", "bundle/MLmodel", "bundle/requirements.txt"} <= files
    manifest = json.loads(next((shop / "bundle").glob("v-*/manifest.json")).read_text())
    tags = client.get_run(run_id).data.tags
    assert tags["twotower.model_version"] == manifest["model_version"]
    again = Registration(name="shop", alias="challenger")
    track_run(shop, destination, registration=again)
    [version] = client.search_model_versions("name = 'shop'")
    for alias in ("challenger", "champion"):
        assert client.get_model_version_by_alias("shop", alias).version == version.version
    shutil.rmtree(shop / "bundle")
    with pytest.raises(ConfigError, match="has no bundle yet"):
        track_run(shop, destination, registration=again)


def test_what_cannot_be_logged_is_said(store, shop, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is no run"):
        track(tmp_path / "nothing", uri=store, experiment="none")
    with pytest.raises(ConfigError, match="MLflow at foo://host/x refuses"):
        track(shop, uri="foo://me:secret@host/x", experiment="none")
    gone = {"uri": store, "experiment": "none", "run_id": "0" * 32}
    (shop / "mlflow.json").write_text(json.dumps(gone))
    with pytest.raises(
        ConfigError,
        match=rf"not found\. To log to a new run of MLflow, delete {shop}/mlflow\.json\.",
    ):
        track(shop, uri=store, experiment="none")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ConfigError,
        match=r"tracking needs the extra 'mlflow' .*" + re.escape(install_line("mlflow")),
    ):
        track(shop, uri=store, experiment="none")


def append(shop, *lines):
    with (shop / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def steps_of(client, run_id, name="loss"):
    """The steps that the store has of a metric, each as often as it has it."""
    return sorted(point.step for point in client.get_metric_history(run_id, name))


def wait_for(condition):
    """Waits until another thread or process has done something, for at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "not within a minute"
        time.sleep(0.05)


@pytest.fixture
def fast(monkeypatch):
    """A log that looks often and asks again soon."""
    monkeypatch.setattr(live_tracking, "PERIOD", 0.05)
    monkeypatch.setattr(live_tracking, "REST", 0)
    monkeypatch.setattr(live_tracking, "AWAY_PERIOD", 0.2)


def test_a_training_is_logged_while_it_goes_on_and_again_when_it_was_killed(
    store, client, shop, fast
):
    destination = Destination(uri=store, experiment="live", run_name="a")
    with pytest.raises(KeyboardInterrupt), follow(shop, destination) as start:
        start()
        wait_for(lambda: read_link(shop) and read_link(shop).run_id)
        run_id = read_link(shop).run_id
        wait_for(lambda: steps_of(client, run_id) == [2, 4])
        append(shop, {"step": 6, "loss": 2.5, "examples_per_second": 10.0})
        wait_for(lambda: steps_of(client, run_id) == [2, 4, 6])
        assert client.get_run(run_id).info.status == "RUNNING"
        raise KeyboardInterrupt
    assert client.get_run(run_id).info.status == "KILLED"
    # Steps after the last checkpoint are repeated, at another rate.
    append(shop, {"step": 6, "loss": 2.5, "examples_per_second": 11.0}, {"step": 8, "loss": 2.0})
    # Without a destination: the folder knows where it was logged to.
    with follow(shop, None) as start:
        start()
    assert steps_of(client, run_id) == [2, 4, 6, 8]
    assert steps_of(client, run_id, "examples_per_second") == [6]
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a")
    experiment = client.get_experiment_by_name("live").experiment_id
    assert len(client.search_runs([experiment])) == 1


def test_a_store_that_refuses_what_a_training_ends_with_costs_one_warning(
    store, client, shop, monkeypatch
):
    def refuse(*_, **__):
        raise OSError("no room")

    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(tracking.Recorder, "log_results", refuse)
    made = []
    destination = Destination(uri=store, experiment="ends")
    with follow(shop, destination, conclude=lambda: made.append(1)) as start:
        start()
    [warning] = warnings
    assert "no room" in warning and f"track --workdir={shop} --bundle" in warning
    assert client.get_run(read_link(shop).run_id).info.status == "FINISHED"
    # Stopped, to go on later: it has not come to its end.
    with pytest.raises(PreemptedError):
        with follow(shop, destination, conclude=lambda: made.append(2)) as start:
            start()
            raise PreemptedError("stopped")
    # Away to the end, which was said when the training began: what it makes is made.
    (shop / "mlflow.json").unlink()
    monkeypatch.setattr(tracking.Recorder, "link", refuse)
    with follow(shop, destination, conclude=lambda: made.append(3)) as start:
        start()
    assert made == [1, 3] and len(warnings) == 2
    assert "The training goes on" in warnings[1]
    # The folder does not know where it was to be logged.
    assert warnings[1].endswith(f"--bundle --tracking_uri={store} --experiment_name=ends")


def test_a_training_that_was_never_logged_is_not_logged(shop):
    with follow(shop, None, conclude=lambda: pytest.fail("it is concluded")) as start:
        start()
    log_linked(shop)
    assert not (shop / "mlflow.json").exists()


def test_an_address_that_cannot_be_right_is_refused_before_the_training(tmp_path):
    destination = Destination(uri=f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    with pytest.raises(ConfigError, match="there is no folder"):
        with follow(tmp_path / "run", destination):
            raise AssertionError("the training began")
