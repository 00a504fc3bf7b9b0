"""A run needs its folder alone: its source is deleted, grown or moved, and every command answers as
before."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import twotower as tt
from tests.experiments.commands import error_of, output_of
from twotower import api
from twotower.config import Config, from_dict
from twotower.core.errors import ConfigError, FolderError
from twotower.data.shop.generate import generate
from twotower.features.encoder import Encoder
from twotower.pipeline.prepare import PreparedData, prepare
from twotower.retrieval.embed import embed_rows
from twotower.training import run as run_folder

pytestmark = pytest.mark.slow

ROWS = 1000


FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8},
        "history": {"type": "history", "max_length": 4},
        "event": {"type": "string", "embedding_size": 4},  # of the row: a context
    },
    "item": {"item_id": {"type": "string", "embedding_size": 8}},
}


def config_of(source, **sections):
    """A configuration with a history, a context, and columns that are shown."""
    (source / "features.json").write_text(json.dumps(FEATURES))
    values = {
        "data": {
            "source": "csv",
            "interactions": {"path": str(source / "log.csv")},
            "item_table": {"path": str(source / "items.csv")},
        },
        "features": {"path": str(source / "features.json")},
        "model": {
            "user": {"layers": (8,)},
            "item": {"layers": (8,)},
            "history": {"kind": "bag"},
        },
        "training": {"batch_size": 64, "steps": 4, "validate_every": 2, "keep_checkpoints": 9},
        "retrieval": {"display": ("title", "price")},
    }
    return from_dict(values | sections)


@pytest.fixture(scope="module")
def shop():
    return generate(ROWS + 50)


@pytest.fixture(scope="module", autouse=True)
def validations_are_free():
    """A validation that compiles nothing: each training would compile one of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "make_validate", lambda *_: lambda weights: {"recall@10": 0.5})
        yield


@pytest.fixture
def nothing_is_trained(monkeypatch):
    """Leaves out the steps of trainings: their folders are made all the same."""
    monkeypatch.setattr(run_folder, "fit", lambda *args, **options: None)


def write_source(shop, folder, rows=ROWS):
    folder.mkdir(exist_ok=True)
    log = shop.interactions.select(["user_id", "item_id", "timestamp", "event"])
    pyarrow.csv.write_csv(log.slice(0, rows), folder / "log.csv")
    pyarrow.csv.write_csv(shop.items, folder / "items.csv")
    return folder


@dataclasses.dataclass
class Trained:
    """A run that was moved to `workdir` after its source was deleted."""

    workdir: Path
    source: Path
    config: Config
    prepared: PreparedData  # as it was made of the source

    def copy(self, folder, *left_out):
        ignore = shutil.ignore_patterns("bundle", *left_out)
        return shutil.copytree(self.workdir, folder, ignore=ignore)


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    base = tmp_path_factory.mktemp("alone")
    source = write_source(shop, base / "source")
    config = config_of(source)
    prepared = prepare(config)
    api.train_in_folder(config, base / "first", devices=1)
    shutil.rmtree(source)
    shutil.move(base / "first", base / "moved")
    return Trained(base / "moved", source, config, prepared)


def num_rows(workdir):
    raw = api.load_run(workdir).prepared.raw
    return len(raw.train) + len(raw.validation) + len(raw.test)


def test_every_command_answers_without_the_source(trained, tmp_path):
    workdir = trained.workdir
    flag = f"--workdir={workdir}"
    printed = output_of("export", flag, f"--plot={tmp_path / 'index.png'}")
    assert f"{workdir / 'bundle'}" in printed and "index has nothing to tune" in printed
    assert "popularity" in output_of("evaluate", flag, "--k=5", "--baselines")
    user = trained.prepared.users["user_id"][0].as_py()
    assert "title" in output_of("query", flag, f"--user={user}", "--k=3")
    output_of("embed", flag, f"--out={tmp_path / 'embedded'}")
    assert pq.read_table(tmp_path / "embedded" / "items").num_rows == len(trained.prepared.items)
    history = f"--history={tmp_path / 'history'}"
    output_of("history", history, f"--append={workdir}", "--run_date=2026-11-28")
    output_of("recommend_all", flag, f"--out={tmp_path / 'lists'}", "--k=3")
    output_of("train", flag)  # that has ended
    assert "Data: what the run was begun with" in output_of("train", flag, "--dry_run")
    run = api.load_run(workdir)
    assert run.config == trained.config
    # By the features that were made of the source.
    expected = embed_rows(run.model, run.weights, "item", trained.prepared.features["item"])
    for place in (workdir / "bundle", workdir / "checkpoints" / str(run.step)):
        retriever = tt.load_retriever(place)
        assert len(retriever.recommend(user, k=3)) == 3
        np.testing.assert_array_equal(retriever.bundle.vectors, expected)


def test_a_source_that_grew_changes_nothing(shop, trained, tmp_path):
    """Fifty rows more: the run goes on with the rows that it began with, to the same bits."""
    killed = trained.copy(tmp_path / "killed", "4")
    write_source(shop, trained.source, rows=ROWS + 50)
    try:
        api.train_in_folder(trained.config, killed, devices=1)
    finally:
        shutil.rmtree(trained.source)
    whole, resumed = (api.load_run(run, checkpoint="4") for run in (trained.workdir, killed))
    for name, table in whole.weights.tables.items():
        np.testing.assert_array_equal(np.asarray(resumed.weights.tables[name]), np.asarray(table))


def test_a_run_of_an_earlier_version_is_prepared_again_and_kept(shop, trained, tmp_path):
    old = trained.copy(tmp_path / "old", "data")
    encoder = Encoder.load(old / "encoder")
    with pytest.raises(ConfigError, match="log.csv"):
        run_folder.load_data(old, trained.config, encoder)
    write_source(shop, trained.source)
    again = run_folder.load_data(old, trained.config, encoder)
    shutil.rmtree(trained.source)
    kept = run_folder.load_data(old, trained.config, encoder)
    for prepared in (again, kept):
        assert prepared.raw.train.equals(trained.prepared.raw.train)
        for name, values in trained.prepared.features["user"].items():
            np.testing.assert_array_equal(prepared.features["user"][name], values)


@pytest.mark.usefixtures("nothing_is_trained")
def test_runs_share_prepared_data(shop, tmp_path):
    source = write_source(shop, tmp_path / "source")
    config = config_of(source)
    shared = tmp_path / "shared"
    api.train_in_folder(config, tmp_path / "a", data=shared)
    (source / "log.csv").unlink()
    # The rest of a configuration may differ.
    other = config_of(source, evaluation={"query": "interaction"})
    api.train_in_folder(other, tmp_path / "b", data=shared)
    (tmp_path / "b" / "checkpoints" / "4").mkdir(parents=True)
    assert not list((tmp_path / "b" / "data").glob("*.npy"))
    changed = config_of(source, split={"test": 0.2})
    with pytest.raises(ConfigError, match="--data=.*config.split.test was 0.1 and is now 0.2"):
        api.train_in_folder(changed, tmp_path / "c", data=shared)
    encoder = Encoder.load(tmp_path / "b" / "encoder")
    first = run_folder.load_data(tmp_path / "b", other, encoder)
    # A place that it was moved to is named once.
    shared.rename(tmp_path / "moved")
    with pytest.raises(FolderError, match="shared.* is missing"):
        run_folder.load_data(tmp_path / "b", other, encoder)
    api.train_in_folder(other, tmp_path / "b", data=tmp_path / "moved")
    again = run_folder.load_data(tmp_path / "b", other, encoder)
    assert again.raw.train.equals(first.raw.train)


def test_a_refit_sees_all_rows_and_keeps_the_figures(trained, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    printed = output_of("train", f"--workdir={workdir}", "--refit")
    assert f"refit: {ROWS:,} rows" in printed and "recall@10 0.5000" in printed
    refit = api.load_run(workdir / "refit")
    assert len(refit.prepared.train) == ROWS and not len(refit.prepared.test)
    # The rows are those of the run, in the order of the file, which breaks ties of time.
    raw = trained.prepared.raw
    parts = pa.concat_tables([raw.train, raw.validation, raw.test])
    in_file = np.argsort(raw.joined_file_positions())
    assert refit.prepared.raw.train.equals(parts.take(pa.array(in_file)))
    # As many passes: of two steps, which were best.
    assert refit.step == int(np.ceil(2 * ROWS / len(raw.train)))
    manifest = api.export(refit).manifest
    assert manifest["refit"]["validated"] == {"recall@10": 0.5}
    assert manifest["refit"]["rows"] == {"validated": len(raw.train), "refit": ROWS}
    error = error_of("evaluate", f"--workdir={workdir / 'refit'}")
    assert "config.split.test must be above 0" in error
    error = error_of("train", f"--workdir={workdir / 'refit'}", "--refit")
    assert "all of its rows already" in error
    assert "give --refit too" in error_of("train", f"--workdir={workdir}", "--on_top")
    with pytest.raises(ConfigError, match="other kind"):
        tt.refit(workdir, on_top=True)


@pytest.mark.usefixtures("nothing_is_trained")
def test_a_refit_on_top_goes_on_from_the_best_checkpoint(trained, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    best = api.load_run(workdir)
    refit = tt.refit(workdir, on_top=True)
    assert refit.step == best.step == 2 and len(refit.prepared.train) == ROWS
    assert refit.config.training.steps == 2 + int(np.ceil(2 * ROWS / len(best.prepared.train)))
    name = "item.item_id"
    known = np.asarray(best.weights.tables[name])[: best.prepared.encoder.tables[name].rows]
    np.testing.assert_array_equal(np.asarray(refit.weights.tables[name])[: len(known)], known)


@pytest.mark.usefixtures("nothing_is_trained")
def test_a_run_grows_by_rows_alone(shop, trained, tmp_path):
    day = shop.interactions.slice(ROWS).select(["user_id", "item_id", "timestamp", "event"])
    pyarrow.csv.write_csv(day, tmp_path / "day.csv")
    grown = tmp_path / "grown"
    flags = [f"--source={trained.workdir}", f"--rows={tmp_path / 'day.csv'}"]
    flags += [f"--workdir={grown}", "--passes=0.5", "--checkpoint=best"]
    assert "Would put" in output_of("grow", *flags, "--dry_run") and not grown.exists()
    assert "interactions: 50 rows" in output_of("grow", *flags)
    output_of("train", f"--workdir={grown}")
    assert num_rows(grown) == ROWS + 50
    run = api.load_run(grown)
    further = int(np.ceil(0.5 * len(run.prepared.train) / 64))
    assert run.config.training.steps == 2 + further
    # The next one goes on from what it holds.
    pyarrow.csv.write_csv(day.slice(0, 10), tmp_path / "next.csv")
    tt.grow(run, tmp_path / "next.csv", workdir=tmp_path / "next")
    assert num_rows(tmp_path / "next") == ROWS + 60
