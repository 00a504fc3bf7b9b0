"""Runs and bundles by the names that MLflow has for them."""

import shutil
from pathlib import Path

import pytest

import twotower as tt
from tests.experiments.commands import error_of, loaded, output_of
from twotower.__main__ import COMMANDS
from twotower.commands import mlflow_flags
from twotower.commands.pods.remote_folders import local_copies
from twotower.core.errors import BundleError, ConfigError
from twotower.integrations.embedding_history import EmbeddingHistory
from twotower.integrations.mlflow_model import Registration
from twotower.integrations.mlflow_runs import SHOWN, find_run, folder_of
from twotower.integrations.mlflow_store import Destination
from twotower.integrations.tracking import track

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracked(store, workdir, tmp_path_factory):
    """A run with a bundle, in the store and in its registry."""
    folder = tmp_path_factory.mktemp("tracked") / "a"
    shutil.copytree(workdir, folder, symlinks=True)
    destination = Destination(uri=store, experiment="shop", run_name="a")
    link = track(
        folder,
        destination,
        bundle=True,
        registration=Registration(name="shop_model", alias="champion"),
    )
    return folder, link.run_id


@pytest.fixture
def cache(tmp_path, monkeypatch, store):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return tmp_path / "cache"


@pytest.fixture
def elsewhere(tracked, tmp_path):
    """The folder of the run is on another machine."""
    folder = tracked[0]
    folder.rename(tmp_path / "away")
    yield
    (tmp_path / "away").rename(folder)


def lists(retriever):
    return [(item.item_id, item.score) for item in retriever.recommend("1", k=5)]


def test_a_bundle_is_loaded_by_each_of_its_names(tracked, retriever, cache):
    _, run_id = tracked
    names = ["models:/shop_model/1", "models:/shop_model@champion", "models:/shop_model/latest"]
    for name in [*names, f"runs:/{run_id}/bundle"]:
        assert lists(tt.load_retriever(name)) == lists(retriever)
    # All are the one bundle, which is downloaded once.
    assert len(list((cache / "twotower" / "bundles").iterdir())) == 1


@pytest.mark.parametrize(
    "address, message",
    [
        ("models:/shop_model", "names no bundle. Give models:/NAME/VERSION"),
        ("models:/shop_model/77", "refuses: .*77.* Is models:/shop_model/77 the right address"),
        ("models:/shop_model@loser", "refuses: .*loser"),
        ("runs:/" + "0" * 32 + "/bundle", "refuses: .*not found"),
    ],
)
def test_a_name_that_mlflow_does_not_have_is_said(tracked, cache, address, message):
    with pytest.raises(ConfigError, match=message):
        tt.load_retriever(address)


def test_a_bundle_that_was_changed_in_the_store_is_refused_and_not_kept(
    store, client, workdir, cache, tmp_path
):
    folder = tmp_path / "b"
    shutil.copytree(workdir, folder, symlinks=True)
    link = track(folder, Destination(uri=store, experiment="changed"), bundle=True)
    files = Path(client.get_run(link.run_id).info.artifact_uri.removeprefix("file://"))
    vectors = files / "bundle" / "item_vectors.npy"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"item_vectors.npy is corrupt.*Log it again"):
        tt.load_retriever(f"runs:/{link.run_id}/bundle")
    assert not list((cache / "twotower" / "bundles").iterdir())


def test_a_run_is_found_by_name_id_and_as_the_latest(store, client, tracked, cache):
    folder, run_id = tracked
    # Another library's, newer and more than a page: they are none of ours.
    experiment_id = client.get_experiment_by_name("shop").experiment_id
    for _ in range(SHOWN + 1):
        client.create_run(experiment_id, run_name="other")
    for name in ("latest", "a", run_id):
        found = find_run("shop", name)
        assert (found.workdir, found.link.run_name, found.is_here) == (folder, "a", True)
        assert folder_of(found, "run") == folder
    with pytest.raises(
        ConfigError, match="has no such run of this library; the latest are: .*other"
    ):
        find_run("shop", "nobody")
    with pytest.raises(ConfigError, match="has no such experiment; it has: .*shop"):
        find_run("shoe")


def test_a_run_that_is_elsewhere_gives_its_bundle_alone(tracked, elsewhere, cache, retriever):
    found = find_run("shop")
    assert not found.is_here
    with pytest.raises(
        ConfigError, match="'a' of the experiment 'shop' was trained in .* not here"
    ):
        folder_of(found, "run")
    folder = folder_of(found, "bundle")
    assert folder.is_relative_to(cache)
    assert lists(tt.Retriever.load(folder / "bundle")) == lists(retriever)


def test_commands_take_a_run_of_mlflow(tracked, elsewhere, cache, tmp_path):
    named = "--mlflow_experiment=shop"
    said = output_of("query", named, "--mlflow_run=a", "--user=1", "--k=3")
    assert "Run 'a' of the experiment 'shop'" in said
    output_of("history", f"--history={tmp_path}", "--append", named, "--run_date=2026-11-25")
    [file] = EmbeddingHistory(tmp_path).files("item")
    assert (file.version.name, file.version.experiment_id) == ("2026-11-25/a", "shop")
    assert "both name a run" in error_of("export", named, "--workdir=a")
    assert "is not here" in error_of("export", named)


class Found(Exception):
    """Ends a command that has found its folder."""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("query", ["--user=1"]),
        ("recommend_all", []),
        ("publish", ["--redis=redis://127.0.0.1:1"]),
        ("history", ["--append"]),
        ("serve", ["--port=0"]),
        ("evaluate", []),
        ("export", []),
        ("embed", []),
        ("grow", ["--rows=next.csv", "--workdir=grown"]),
        ("plan", ["--kind=h100"]),
        ("inspect", []),
    ],
)
def test_every_command_takes_its_run_from_mlflow(tracked, cache, command, arguments, monkeypatch):
    folder = mlflow_flags.RunFlags.folder

    def stop(self):
        raise Found(folder(self))

    monkeypatch.setattr(mlflow_flags.RunFlags, "folder", stop)
    with pytest.raises(Found) as found:
        output_of(command, "--mlflow_experiment=shop", "--mlflow_run=a", *arguments)
    assert found.value.args == (tracked[0],)


def test_runs_of_an_experiment_are_compared_by_their_names(tracked, cache):
    folder, run_id = tracked
    said = error_of("compare", "--mlflow_experiment=shop", f"{run_id}:ease", "a")
    assert f"{folder} has no evaluation/queries.parquet" in said
    said = error_of("compare", "--mlflow_experiment=shop", "--gate=nobody", "a")
    assert "has no such run of this library" in said
    gate = ("--mlflow_experiment=shop", "--gate=a", "--undertrained=nobody", "latest")
    assert "has no such run of this library" in error_of("compare", *gate)


def test_no_command_that_takes_a_run_is_without_that_door():
    """But for those that make a run, or log one there."""
    without = {"train", "repeat", "sweep", "track"}
    for command in COMMANDS.keys() - without:
        with loaded(command, []) as module:
            if {"workdir", "append", "source", "log", "runs"} & set(module.FLAGS):
                assert {"mlflow_experiment", "tracking_uri"} <= set(module.FLAGS), command


@pytest.mark.parametrize(
    ("command", "further"),
    [("serve", []), ("query", []), ("impressions", ["--impressions=shown", "--events=e.jsonl"])],
)
def test_a_bundle_of_the_registry_stands_where_the_folder_of_a_bundle_does(
    tracked, cache, retriever, command, further
):
    arguments = ["--bundle=models:/shop_model@champion", *further]
    with loaded(command, arguments) as module:
        module.FLAGS([command, *arguments])
        with local_copies(module.FLAGS):
            value = module.FLAGS["bundle"].value
            bundle = value[0] if isinstance(value, list) else value
            assert Path(bundle).is_relative_to(cache)
            assert lists(tt.Retriever.load(bundle)) == lists(retriever)
