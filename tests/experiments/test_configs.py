"""Every shipped configuration loads and says how to run it; those whose reports somebody looks at
run from the log to the metrics and to a report that a browser finds no fault with."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.extras import extra, program
from twotower.config import defaults, from_dict
from twotower.evaluation import measure
from twotower.evaluation.baselines.popularity import random_scores
from twotower.evaluation.evaluate import evaluate
from twotower.evaluation.queries import make_queries
from twotower.evaluation.report.text import describe_index
from twotower.experiment import load_config
from twotower.features.spec import load_spec
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever
from twotower.training.run import load_run, train

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.stem for path in (ROOT / "experiments" / "configs").glob("*.py") if path.stem != "__init__"
)


def module(name):
    return importlib.import_module(f"experiments.configs.{name}")


def leaves(values, where=""):
    """The names of all options, dotted; a mapping that is itself a value (columns, features) ends a
    name."""
    open_ended = ("columns", "options", "features.user", "features.item", "event_weights")
    for name, value in values.items():
        path = f"{where}{name}"
        if hasattr(value, "items") and not path.endswith(open_ended):
            yield from leaves(value, f"{path}.")
        else:
            yield path


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_configuration_whose_features_load(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # by name it is found from any folder
    config = load_config(name)
    spec = load_spec(config.features)
    assert spec.user and spec.item


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_can_override_every_option(name):
    assert set(leaves(defaults())) == set(leaves(module(name).get_config()))


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_names_its_commands(name):
    text = module(name).__doc__
    config = f"--config=experiments/configs/{name}.py"
    assert config in text, (
        f"experiments/configs/{name}.py must say: python -m experiments.train {config}"
    )
    for command in ("train", "export", "evaluate"):
        assert f"python -m experiments.{command} " in text


# The reports that tests/evaluation/report/screenshots.md names.
@pytest.fixture(
    scope="module", params=["movielens_100k", "online_retail", "quickstart", "arabic_shop"]
)
def trained(request, shared_data, tmp_path_factory):
    config = module(request.param).get_config()
    if config.features.path:  # relative to the file of the configuration
        folder = ROOT / "experiments" / "configs"
        config.features.path = str((folder / config.features.path).resolve())
    if config.data.source == "shop":
        config.data.num_interactions = 20_000
    config.training.steps = config.training.validate_every = 20
    config.training.batch_size = 256
    config.evaluation.ks = (10,)
    workdir = tmp_path_factory.mktemp("runs") / request.param
    # What is measured at the end shows more than a validation, which would be compiled beside it.
    metric = config.training.metric
    train(from_dict(config), workdir, make_validate=lambda *_: lambda weights: {metric: 0.5})
    return load_run(workdir)


@pytest.fixture(scope="module")
def measured(trained):
    """Figures of a run without those of tuned baselines, whose tuning would be most of the test."""
    return measure.measure_run(trained, ks=(10,), baselines=False)


@pytest.mark.slow
def test_from_the_log_to_the_metrics(trained, measured):
    folder = trained.workdir / "bundle"
    bundle = export(trained, folder)  # which proves that the bundle scores as the trainer does
    assert len(bundle.items) == len(trained.prepared.items) and describe_index(bundle.index)
    asked = make_queries(trained.prepared, "test", trained.config.evaluation.query)
    draws = [
        evaluate(random_scores(asked.num_items, seed=seed), asked, (10,), mask_seen=True)
        for seed in range(3)
    ]
    # Of one draw the figure is a matter of luck itself.
    by_chance = {name: np.mean([draw[name] for draw in draws]) for name in draws[0]}
    retriever = Retriever.load(folder)
    queries = make_queries(trained.prepared, "test", "user")
    measured["index"] = measure.measure_index(retriever, queries.user)
    measure.write_metrics(measured, trained.workdir / "evaluation" / "metrics.json")
    measured = json.loads((trained.workdir / "evaluation" / "metrics.json").read_text())
    assert measured["index"]["recall@10"] >= 0.95
    # Twenty steps are enough to tell a model that learns from one that does not.
    assert measured["model"]["queries"] == by_chance["queries"]
    assert measured["model"]["ndcg@10"] > 2 * by_chance["ndcg@10"]
    user = retriever.bundle.users["user_id"][0].as_py()
    assert len(retriever.recommend(user, k=5)) == 5
    if (
        "period" in retriever.bundle.encoder.context
    ):  # by id alone a query is asked at the end of the log
        newest = max(retriever.bundle.users["timestamp"].to_pylist(), key=lambda time: time or 0)
        at_the_end = retriever.recommend(rows=[{"user_id": "nobody", "timestamp": newest}], k=5)
        assert [item.item_id for item in retriever.recommend("nobody", k=5)] == [
            item.item_id for item in at_the_end
        ]


@pytest.fixture(scope="module")
def browser():
    extra("playwright.sync_api", "dev")
    from tests.evaluation.report.browser import open_browser

    with open_browser(program("chromium", "chromium")) as opened:
        yield opened


@pytest.mark.slow
def test_a_browser_finds_no_fault_with_its_report(trained, measured, browser):
    extra("matplotlib", "plots")
    from tests.evaluation.report.browser import find_faults, open_report
    from twotower.evaluation.report.write import write_report

    path = trained.workdir / "evaluation" / "report.html"
    write_report(trained, measured, path)
    assert path.stat().st_size < 1.5e6
    for width, scheme in (("desktop", "light"), ("phone", "dark")):
        with open_report(browser, path, width, scheme) as page:
            assert find_faults(page) == []
            assert page.locator("figure svg").count() > 5
