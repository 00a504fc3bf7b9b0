"""Export, evaluate and query as they are launched, one after the other, on a run of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from twotower.config import from_dict
from twotower.evaluation.evaluate import make_validate
from twotower.training.run import train

ROOT = Path(__file__).parents[2]
CONFIG = {
    "data": {"source": "shop", "num_interactions": 3000},
    "features": {
        "user": {"user_id": {"type": "string", "embedding_size": 8}},
        "item": {"item_id": {"type": "string", "embedding_size": 8}},
    },
    "training": {"batch_size": 64, "steps": 4, "validate_every": 4, "log_every": 2},
    "retrieval": {"display": ("title",)},
}


def launch(command, *flags, ok=True):
    """The standard output of a command, or its standard error where it must fail."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", *flags], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout if ok else done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "shop"
    train(from_dict(CONFIG), workdir, make_validate=make_validate)
    return workdir


@pytest.fixture(scope="module")
def exported(trained):
    assert "items" in launch("export", f"--workdir={trained}")
    return trained


def test_a_bundle_is_asked_for_before_it_is_there(trained):
    if (trained / "bundle").exists():
        pytest.skip("another test has exported it")
    error = launch("query", f"--workdir={trained}", "--user=1", ok=False)
    assert f"python -m experiments.export --workdir={trained}" in error and "Traceback" not in error


def test_evaluate_writes_what_it_prints(exported):
    printed = launch("evaluate", f"--workdir={exported}", "--k=10,5", "--baselines")
    measured = json.loads((exported / "evaluation" / "metrics.json").read_text())
    assert set(measured) == {"protocol", "model", "model_unmasked", "baselines", "baselines_unmasked", "index"}
    assert set(measured["baselines"]) == {
        "random", "popularity", "popularity_last_week", "popularity_top_quantile", "true_preferences",
    }  # fmt: skip
    assert measured["index"]["recall@10"] > 0.95 and measured["index"]["queries_per_second"] > 0
    assert {"recall@5", "recall@10", "ndcg@10", "coverage@10", "novelty@5", "never_trained@10"} <= set(
        measured["model"]
    )
    best, model = measured["baselines"]["true_preferences"], measured["model"]
    assert best["recall@10"] > measured["baselines"]["random"]["recall@10"]
    assert f"{model['recall@5']:.4f}" in printed and "of what ranking by the true preferences reaches" in printed


def test_query_prints_a_table_for_a_user_and_for_an_item(exported):
    items = pq.read_table(exported / "bundle" / "items.parquet")
    item, title = (items[name][0].as_py() for name in ("item_id", "title"))
    printed = launch("query", f"--workdir={exported}", f"--item={item}", "--k=3")
    assert title[:40] in printed and "score" in printed
    user = pq.read_table(exported / "bundle" / "users.parquet")["user_id"][0].as_py()
    lines = launch("query", f"--workdir={exported}", f"--user={user}", "--k=4").splitlines()
    ranks = [line.split()[0] for line in lines[-4:]]
    assert ranks == ["1", "2", "3", "4"]


def test_query_writes_lists_of_many_users(exported, tmp_path):
    (tmp_path / "users.txt").write_text("1\nnobody\n\n2\n")
    printed = launch(
        "query",
        f"--workdir={exported}",
        f"--users={tmp_path / 'users.txt'}",
        f"--out={tmp_path / 'o.parquet'}",
        "--k=3",
    )
    table = pq.read_table(tmp_path / "o.parquet")
    assert table["user_id"].to_pylist() == ["1"] * 3 + ["nobody"] * 3 + ["2"] * 3 and "1 of them not known" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--item=nothing"], "'nothing' is not among"),
        ([], "Give one of --user=ID, --item=ID and --users=FILE"),
        (["--users=nowhere.csv"], "nowhere.csv is not a file"),
    ],
)
def test_mistakes_are_one_line(exported, flags, message):
    error = launch("query", f"--workdir={exported}", *flags, ok=False)
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("k", ["ten", "0", "-1", "10,,5"])
def test_what_is_no_list_length(exported, k):
    error = launch("evaluate", f"--workdir={exported}", f"--k={k}", ok=False)
    assert f"--k={k}" in error and "is not a list length" in error and "Traceback" not in error


@pytest.mark.parametrize("command", ["export", "evaluate", "query"])
def test_a_folder_that_is_no_run(command, tmp_path):
    error = launch(command, f"--workdir={tmp_path}", *(["--user=1"] if command == "query" else []), ok=False)
    assert "is no run" in error and "python -m experiments.train" in error and "Traceback" not in error
