"""A run needs its folder alone: its source is deleted, grown or moved, and every command answers as
before."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import twotower as tt
from tests.experiments.commands import error_of, output_of
from twotower import api
from twotower.config import from_dict
from twotower.core.errors import ConfigError, FolderError
from twotower.data.shop.generate import generate
from twotower.pipeline import folder as data_folder
from twotower.retrieval.embed import embed_rows

pytestmark = pytest.mark.slow

ROWS = 1000


def config_of(source, **sections):
    """A configuration with a history, a context, and columns that are shown."""
    values = {
        "data": {
            "source": "csv",
            "interactions": {"path": str(source / "log.csv")},
            "item_table": {"path": str(source / "items.csv")},
        },
        "features": {
            "user": {
                "user_id": {"type": "string", "embedding_size": 8},
                "history": {"type": "history", "max_length": 4},
                "hour": {"type": "timestamp", "column": "timestamp"},
            },
            "item": {"item_id": {"type": "string", "embedding_size": 8}},
        },
        "model": {"user": {"layers": (8,)}, "item": {"layers": (8,)}},
        "training": {"batch_size": 64, "steps": 4, "validate_every": 2, "log_every": 2},
        "retrieval": {"display": ("title", "price")},
    }
    return from_dict(values | sections)


@pytest.fixture(scope="module")
def shop():
    return generate(ROWS + 50)


def write_source(shop, folder, rows=ROWS):
    folder.mkdir()
    log = shop.interactions.select(["user_id", "item_id", "timestamp", "event"])
    pyarrow.csv.write_csv(log.slice(0, rows), folder / "log.csv")
    pyarrow.csv.write_csv(shop.items, folder / "items.csv")
    return folder


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """A run whose source is deleted after training, moved to another folder; and, by the source
    itself while it was there, its item vectors and its log."""
    base = tmp_path_factory.mktemp("alone")
    source = write_source(shop, base / "source")
    config = config_of(source)
    api.train_in_folder(config, base / "first", devices=1)
    run = api.load_run(base / "first")
    vectors = embed_rows(run.model, run.weights, "item", run.prepared.features["item"])
    shutil.rmtree(source)
    shutil.move(base / "first", base / "moved")
    return base / "moved", config, vectors


def test_every_command_answers_without_the_source(trained, tmp_path):
    workdir, config, vectors = trained
    flag = f"--workdir={workdir}"
    assert f"{workdir / 'bundle'}" in output_of("export", flag, f"--plot={tmp_path / 'index.png'}")
    assert "popularity" in output_of("evaluate", flag, "--k=5", "--baselines")
    user = api.load_run(workdir).prepared.users["user_id"][0].as_py()
    assert "title" in output_of("query", flag, f"--user={user}", "--k=3")
    output_of("embed", flag, f"--out={tmp_path / 'embedded'}")
    assert pq.read_table(tmp_path / "embedded" / "items").num_rows == len(vectors)
    history = f"--history={tmp_path / 'history'}"
    output_of("history", history, f"--append={workdir}", "--run_date=2026-11-28")
    output_of("recommend_all", flag, f"--out={tmp_path / 'lists'}", "--k=3")
    output_of("train", flag)
    for place in (workdir / "checkpoints" / "4", workdir / "bundle"):
        retriever = tt.load_retriever(place)
        assert len(retriever.recommend(user, k=3)) == 3
    best = api.load_run(workdir).step
    retriever = tt.load_retriever(workdir / "checkpoints" / str(best))
    np.testing.assert_array_equal(retriever.bundle.vectors, vectors)
    assert api.load_run(workdir).config == config


def test_a_source_that_grew_changes_nothing(shop, tmp_path):
    """Fifty rows more: the run goes on with the rows that it began with, to the same bits."""
    source = write_source(shop, tmp_path / "source")
    short = config_of(source, training={"batch_size": 64, "steps": 4, "validate_every": 2})
    api.train_in_folder(short, tmp_path / "whole", devices=1)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    shutil.rmtree(source)
    write_source(shop, source, rows=ROWS + 50)
    api.train_in_folder(short, tmp_path / "killed", devices=1)
    states = [api.load_run(tmp_path / name, checkpoint="latest") for name in ("whole", "killed")]
    for name in ("user.user_id", "item.item_id"):
        tables = [np.asarray(run.weights.tables[name]) for run in states]
        np.testing.assert_array_equal(*tables)
    assert states[1].step == 4
    # A new run of the same configuration has them.
    api.train_in_folder(short, tmp_path / "new", devices=1)
    assert sum(map(len, parts_of(tmp_path / "new"))) == ROWS + 50


def parts_of(workdir):
    raw = api.load_run(workdir).prepared.raw
    return raw.train, raw.validation, raw.test


def test_a_run_of_an_earlier_version_is_prepared_again_and_kept(shop, tmp_path):
    source = write_source(shop, tmp_path / "source")
    api.train_in_folder(config_of(source), tmp_path / "run", devices=1)
    expected = api.load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data")
    again = api.load_run(tmp_path / "run")
    shutil.rmtree(source)
    kept = api.load_run(tmp_path / "run")
    for run in (again, kept):
        assert run.prepared.raw.train.equals(expected.prepared.raw.train)
        for name, values in expected.prepared.features["user"].items():
            np.testing.assert_array_equal(run.prepared.features["user"][name], values)
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(ConfigError, match="log.csv"):
        api.load_run(tmp_path / "run")


def test_runs_share_prepared_data(shop, tmp_path):
    source = write_source(shop, tmp_path / "source")
    config = config_of(source)
    shared = tmp_path / "shared"
    api.train_in_folder(config, tmp_path / "a", devices=1, data=shared)
    shutil.rmtree(source)
    other = config_of(source, model={"user": {"layers": (4,)}, "item": {"layers": (4,)}})
    api.train_in_folder(other, tmp_path / "b", devices=1, data=shared)
    api.train_in_folder(other, tmp_path / "b", devices=1)
    runs = [api.load_run(tmp_path / name) for name in ("a", "b")]
    assert runs[0].prepared.raw.train.equals(runs[1].prepared.raw.train)
    assert not list((tmp_path / "b" / "data").glob("*.npy"))
    changed = config_of(source, split={"test": 0.2})
    with pytest.raises(ConfigError, match="--data=.*config.split.test was 0.1 and is now 0.2"):
        api.train_in_folder(changed, tmp_path / "c", devices=1, data=shared)
    # A place that it was moved to is named once.
    shared.rename(tmp_path / "moved")
    with pytest.raises(FolderError, match="shared.* is missing"):
        api.load_run(tmp_path / "b")
    api.train_in_folder(other, tmp_path / "b", devices=1, data=tmp_path / "moved")
    assert api.load_run(tmp_path / "b").step == runs[1].step


def test_a_refit_sees_all_rows_and_keeps_the_figures(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    validated = api.load_run(workdir)
    printed = output_of("train", f"--workdir={workdir}", "--refit")
    assert f"refit: {ROWS:,} rows" in printed
    refit = api.load_run(workdir / "refit")
    assert len(refit.prepared.train) == ROWS and not len(refit.prepared.test)
    # As many passes, over more rows.
    passes = validated.step / len(validated.prepared.train)
    assert refit.step == int(np.ceil(passes * ROWS))
    record = json.loads((workdir / "refit" / "refit.json").read_text())
    assert record["validated"] == validated.validated and record["step"] == validated.step
    # It keeps the order of the file, which breaks ties of time.
    log = refit.prepared.raw.train
    parts = pa.concat_tables([getattr(validated.prepared.raw, part) for part in data_folder.PARTS])
    assert log.num_rows == parts.num_rows
    assert sorted(log["timestamp"].to_pylist()) == sorted(parts["timestamp"].to_pylist())
    manifest = api.export(refit).manifest
    assert manifest["refit"]["validated"] == dict(validated.validated)
    assert "config.split.test must be above 0" in error_of(
        "evaluate", f"--workdir={workdir / 'refit'}"
    )
    assert "all of its rows already" in error_of(
        "train", f"--workdir={workdir / 'refit'}", "--refit"
    )
    with pytest.raises(ConfigError, match="other kind"):
        tt.refit(workdir, on_top=True)


def test_a_refit_on_top_goes_on_from_the_best_checkpoint(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    best = api.load_run(workdir)
    refit = tt.refit(workdir, on_top=True)
    assert refit.step > best.step and len(refit.prepared.train) == ROWS
    first = api.load_run(workdir / "refit", checkpoint=str(best.step))
    table = np.asarray(best.weights.tables["item.item_id"])
    rows = best.prepared.encoder.tables["item.item_id"].rows
    np.testing.assert_array_equal(
        np.asarray(first.weights.tables["item.item_id"])[:rows], table[:rows]
    )


def test_a_run_grows_by_rows_alone(shop, trained, tmp_path):
    day = shop.interactions.slice(ROWS).select(["user_id", "item_id", "timestamp", "event"])
    pyarrow.csv.write_csv(day, tmp_path / "day.csv")
    grown = tmp_path / "grown"
    flags = [f"--source={trained[0]}", f"--rows={tmp_path / 'day.csv'}", f"--workdir={grown}"]
    assert "Would put" in output_of("grow", *flags, "--dry_run") and not grown.exists()
    assert "interactions: 50 rows" in output_of("grow", *flags, "--passes=0.5")
    output_of("train", f"--workdir={grown}")
    run = api.load_run(grown)
    assert sum(map(len, parts_of(grown))) == ROWS + 50
    steps = int(np.ceil(0.5 * len(run.prepared.train) / 64))
    assert api.load_run(grown, checkpoint="latest").step == 4 + steps
