"""The front door: its names, their examples, and the way from a frame to recommendations."""

import contextlib
import dataclasses
import doctest
import inspect
import re
import shutil

import numpy as np
import pandas as pd
import polars as pl
import pytest

import twotower as tt
from twotower import api
from twotower.data.facts import LogFacts


def write_events(path, *, rows=400):
    """A log of 30 users and 50 items, a row a minute; every user and item occurs."""
    rng = np.random.default_rng(0)
    users = np.concatenate([np.arange(50) % 30, rng.integers(0, 30, rows - 50)])
    items = np.concatenate([np.arange(50), rng.integers(0, 50, rows - 50)])
    lines = ["user_id,item_id,timestamp"]
    for row, (user, item) in enumerate(zip(users, items, strict=True)):
        lines.append(f"user-{user},item-{item},{1_700_000_000 + 60 * row}")
    path.write_text("\n".join(lines) + "\n")


# Ids alone compile in a second; what is recommended for a log is tested with the logs.
CHEAP = {
    "features.user": {},
    "features.item": {},
    "training.steps": 4,
    "training.validate_every": 4,
    "training.log_every": 2,
}
# Names whose examples need a run, or make one.
OF_A_RUN = (
    *"Recommendation Retriever Run compare fit grow judge".split(),
    *"load_retriever load_run prepare refit rerank sweep train".split(),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a log, a run that `fit` made of a frame of it, and its bundle."""
    folder = tmp_path_factory.mktemp("front_door")
    write_events(folder / "events.csv")
    rows = [f"user-{n % 31},item-{n % 51},{1_700_100_000 + n}" for n in range(20, 60)]
    (folder / "next_day.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
    events = pd.read_csv(folder / "events.csv")
    run = tt.fit(events, config=CHEAP, workdir=folder / "runs" / "mine")
    api.export(run)
    return folder


def examples_of(name):
    """The doctests of a public name, of the methods of a class and of the functions of a module."""
    value = getattr(tt, name)
    module = value if inspect.ismodule(value) else inspect.getmodule(value)
    names = vars(module) | {"tt": tt, "np": np}
    found = doctest.DocTestFinder().find(value, name, module, globs=names)
    return [test for test in found if test.examples]


def test_the_front_door_offers_what_it_lists():
    assert set(tt.__all__) <= set(dir(tt))
    for name in tt.__all__:
        assert getattr(tt, name).__doc__, name


def test_editors_see_the_names_that_the_front_door_offers():
    """The imports for type checkers are those of the lazy names."""
    source = inspect.getsource(tt)
    block = source.partition("if TYPE_CHECKING:")[2].partition("# The module")[0]
    for name in tt.__all__:
        assert name in block, name


def run_examples(name):
    tests = examples_of(name)
    assert tests, f"{name} has no example"
    for test in tests:
        runner = doctest.DocTestRunner(verbose=False)
        output = []
        runner.run(test, out=output.append)
        assert not runner.failures, "".join(output)


@pytest.mark.usefixtures("own_kinds")
@pytest.mark.parametrize("name", sorted(set(tt.__all__) - set(OF_A_RUN)))
def test_every_public_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_RUN)
def test_so_have_the_names_that_need_a_run(name, folder):
    with contextlib.chdir(folder):
        run_examples(name)


def test_a_run_measures_with_all_that_the_command_has(monkeypatch):
    given = {}
    monkeypatch.setattr(api, "evaluate", lambda run, **options: given.update(options))
    monkeypatch.setattr(api, "format_report", lambda *_: "")
    further = {
        "without_baselines": ("ease",),
        "popularity_window": "30d",
        "quantile_threshold": 0.99,
        "popularity_weights": (0.0, 0.05),
        "sanity": True,
        "sanity_columns": ("title", ""),
    }
    run = object.__new__(tt.Run)
    run.evaluate(ks=(5,), **further)
    assert further.items() <= given.items()


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tt.nothing  # noqa: B018  the look-up itself is what fails


@pytest.mark.slow
def test_a_run_answers_without_its_bundle_as_with_it(folder):
    run = tt.load_run(folder / "runs" / "mine")
    exported = run.recommend("user-7", k=5)
    # Of a checkpoint the bundle is made in memory.
    in_memory = tt.load_retriever(folder / "runs" / "mine" / "checkpoints" / "4")
    assert [item.item_id for item in in_memory.recommend("user-7", k=5)] == [
        item.item_id for item in exported
    ]


@pytest.mark.slow
def test_a_run_of_another_checkpoint_does_not_answer_from_the_bundle(folder):
    run = tt.load_run(folder / "runs" / "mine")
    assert run.retriever.bundle.folder is not None
    other = dataclasses.replace(run, step=2)
    assert other.retriever.bundle.folder is None


@pytest.mark.slow
def test_an_unknown_option_of_the_index_is_refused_with_its_nearest(folder):
    run = tt.load_run(folder / "runs" / "mine")
    with pytest.raises(tt.TwotowerError, match="target_recal.*did you mean 'target_recall'"):
        run.export(target_recal=0.9)


@pytest.mark.slow
def test_a_run_needs_nothing_but_its_folder(folder, tmp_path):
    """The rows are kept in it: it is measured and exported wherever it was moved to."""
    before = tt.load_run(folder / "runs" / "mine").recommend("user-7", k=5)
    moved = shutil.copytree(folder / "runs" / "mine", tmp_path / "elsewhere")
    shutil.rmtree(moved / "bundle")
    (folder / "events.csv").rename(folder / "gone.csv")
    try:
        run = tt.load_run(moved)
        assert run.recommend("user-7", k=5) == before
        assert run.evaluate(ks=(10,))["model"]["queries"] > 0
        assert run.export().folder == moved / "bundle"
        assert run.retriever.bundle.folder == moved / "bundle"
    finally:
        (folder / "gone.csv").rename(folder / "events.csv")


@pytest.mark.slow
def test_from_a_frame_of_polars_to_recommendations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    columns = {
        "CustomerID": rng.integers(1, 31, 400),
        "StockCode": rng.integers(1, 51, 400),
        "InvoiceDate": 1_700_000_000 + 3600 * np.arange(400),
    }
    run = tt.fit(pl.DataFrame(columns), config=CHEAP)
    said = capsys.readouterr().out
    assert "user = 'CustomerID', item = 'StockCode', time = 'InvoiceDate' (seconds" in said
    assert f"run: {run.workdir}" in said
    assert "as they take longer: als (it factorises" in said
    assert re.search(
        r"validation: ndcg@10 [\d.]+ at step 4; .*, the best of \d+ baselines, .* same users",
        said.splitlines()[-1],
    )
    # A number, its digits and a float from a column with gaps name one user.
    answers = [run.recommend(user, k=5) for user in (7, "7", 7.0, np.int64(7))]
    assert all(answer.known for answer in answers)
    assert answers == [answers[0]] * 4


@pytest.mark.parametrize(
    ("facts", "cure"),
    [
        ({"share_new_items": 0.7}, "70% of the held-out rows .* items="),
        ({"num_training_rows": 300}, "300 rows to train with are few"),
        ({}, "'training.passes'"),
    ],
)
def test_a_model_behind_a_baseline_is_told_what_to_do(facts, cure):
    values = {
        "num_rows": 10**5,
        "num_users": 100,
        "num_items": 100,
        "num_training_rows": 10**5,
        "has_times": True,
        "span_days": 9.0,
        "share_new_items": 0.0,
        "share_new_users": 0.0,
    }
    assert re.search(cure, api.baseline_cure(LogFacts(**(values | facts))))


def test_the_history_of_a_run_that_was_killed_in_a_line_is_read_without_that_line(tmp_path):
    whole = '{"step": 2, "loss": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    history = api.read_history(tmp_path)
    assert history.to_pylist() == [{"step": 2, "loss": 1.5}]
