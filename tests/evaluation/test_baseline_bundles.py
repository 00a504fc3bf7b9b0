"""Baselines as vectors: they score as the baselines do, and are served as towers are."""

import dataclasses

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.evaluation.baselines.als import has_implicit
from twotower.evaluation.baselines.as_run import baseline_run, export_baseline
from twotower.evaluation.baselines.factors import MAKERS, NOT_EXPORTED, factorize, make_factors
from twotower.evaluation.baselines.factors import _matrix as matrix
from twotower.evaluation.baselines.make import ALL_BASELINES as ALL
from twotower.evaluation.baselines.make import NAMES, make_baselines
from twotower.evaluation.baselines.tuning import NO_CACHE
from twotower.evaluation.evaluate import model_scores
from twotower.evaluation.queries import make_queries
from twotower.pipeline.prepare import prepare
from twotower.retrieval.retriever import Retriever
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.run import Run

NUM_ITEMS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A log in which nobody has an item twice, of 40 users."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        taken = rng.choice(NUM_ITEMS - 2, 9, replace=False)
        times = rng.permutation(10**6)[:9]
        lines += [f"u{user},i{item},{10**9 + time}" for item, time in zip(taken, times)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    items = ["item_id,category,title"]
    for item in range(NUM_ITEMS):
        items.append(f"i{item},{'abc'[item % 3]},thing {item % 7} {item % 5}")
    (folder / "items.csv").write_text("\n".join(items) + "\n")
    config = from_dict(
        {
            "data": {
                "source": "csv",
                "path": str(folder / "log.csv"),
                "item_table": {"path": str(folder / "items.csv")},
            },
            "split": {"validation": 0.1, "test": 0.2},
            "features": {
                "user": {"user_id": {"type": "string"}},
                "item": {"item_id": {"type": "string"}},
            },
            "retrieval": {"index": "exact"},
        }
    )
    # Baselines read its data alone.
    prepared = prepare(config)
    model = TwoTower.build(config.model, prepared.encoder)
    return Run(folder, config, prepared, model, Weights({}, {}, {}), 0)


def factors_of(run, name, dim=256):
    return make_factors(run.prepared, name, dim=dim, tuning=None, cache=NO_CACHE)


@pytest.mark.parametrize("name", ["popularity_in_categories", "item_graph", "ease", "als"])
def test_towers_score_as_the_baseline_does(run, name):
    if name == "als" and not has_implicit():
        pytest.skip("als needs its extra")
    of_baseline = baseline_run(run, factors_of(run, name))
    queries = make_queries(run.prepared, "test", "user")
    prepared = of_baseline.prepared
    served = model_scores(
        prepared, of_baseline.model, of_baseline.weights, make_queries(prepared, "test", "user")
    )
    # Without validation rows to tune with: both take the middle settings.
    validation = dataclasses.replace(run.prepared.validation.take(np.zeros(0, int)))
    untuned = dataclasses.replace(run.prepared, validation=validation)
    others = tuple(other for other in NAMES if other != name)
    known = make_baselines(untuned, queries, dataclasses.replace(ALL, without=others))[name]
    every = slice(0, len(queries))
    asked = queries.seen_lists(every).lengths > 0
    assert asked.sum() > 20
    for own, baseline in zip(np.asarray(served(every))[asked], np.asarray(known(every))[asked]):
        assert np.corrcoef(own, baseline)[0, 1] > 0.999


def test_a_wider_matrix_is_approximated_as_well_as_can_be():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(60, 60)) @ np.diag(0.8 ** np.arange(60)) @ rng.normal(size=(60, 60))
    read, items = factorize(matrix(weights, 60), 64)
    np.testing.assert_allclose(read @ items.T, weights, atol=1e-5)
    read, items = factorize(matrix(weights, 60), 10)
    values = np.linalg.svd(weights, compute_uv=False)
    least = np.sqrt((values[10:] ** 2).sum())
    assert least <= np.linalg.norm(weights - read @ items.T) < 1.01 * least


def test_what_is_no_bundle_is_refused_with_the_reason(run):
    assert set(NAMES) == set(MAKERS) | set(NOT_EXPORTED)
    for name, reason in NOT_EXPORTED.items():
        with pytest.raises(ConfigError, match=f"--baseline={name} .*{reason[:20]}"):
            factors_of(run, name)
    with pytest.raises(ConfigError, match="'item_kn'.*did you mean 'item_knn'"):
        factors_of(run, "item_kn")


@pytest.mark.slow
def test_a_baseline_is_exported_and_answers_known_users_new_ones_and_histories(run, tmp_path):
    bundle = export_baseline(run, "item_knn", tmp_path / "bundle", dim=8)
    assert bundle.manifest["baseline"]["name"] == "item_knn"
    assert not bundle.manifest["baseline"]["exact"]
    assert bundle.manifest["figures"]["test"]["recall@10"] > 0
    assert "The baseline item_knn (neighbours 20" in (bundle.version / "README.md").read_text()
    retriever = Retriever.load(tmp_path / "bundle")
    known = [one.item_id for one in retriever.recommend("u3", k=5)]
    had = run.prepared.items["item_id"].take(
        bundle.seen[bundle.users["user_id"].index("u3").as_py()]
    )
    assert len(known) == 5 and not set(known) & set(had.to_pylist())
    order = np.argsort(-bundle.counts, kind="stable")
    new = [one.item_id for one in retriever.recommend("nobody", k=1)]
    assert bundle.counts[bundle.items["item_id"].index(new[0]).as_py()] == bundle.counts[order[0]]
    one, other = (
        [one.item_id for one in retriever.recommend(None, rows={"history": [item]}, k=5)]
        for item in ("i1", "i2")
    )
    assert one != other and "i1" not in one
