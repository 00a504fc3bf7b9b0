"""Bundles of vectors cut to a width that the model was trained for: everything in them is as wide,
and ranks by that."""

import numpy as np
import pytest

from tests.retrieval.runs import make_run, storing
from twotower.core.errors import ConfigError, QueryError
from twotower.evaluation.evaluate import dot_scores, evaluate
from twotower.evaluation.measure import measure_run
from twotower.evaluation.queries import make_queries
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import export, make_bundle
from twotower.retrieval.match import MatchModel
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow


def trained_for(folder, *widths, **model):
    return make_run(folder, objective={"matryoshka": widths}, **({"model": model} if model else {}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained_for(tmp_path_factory.mktemp("cut"), 8, 4)


@pytest.fixture(scope="module")
def folder(whole):
    export(storing(whole, dim=8), whole.workdir / "bundle")
    return whole.workdir / "bundle"


def cut(vectors, width):
    """By hand."""
    return vectors[:, :width] / np.linalg.norm(vectors[:, :width], axis=1, keepdims=True)


def items_of(run):
    return embed_rows(run.model, run.weights, "item", run.prepared.features["item"])


def test_both_towers_and_all_vectors_are_cut_and_normalised_again(whole, folder):
    retriever = Retriever.load(folder)
    full = Retriever(make_bundle(whole))
    bundle = retriever.bundle
    assert (
        bundle.manifest["dim"] == bundle.towers.dim == bundle.index.dim == 8
        and full.bundle.towers.dim == 16
    )
    np.testing.assert_allclose(bundle.vectors, cut(items_of(whole), 8), atol=1e-6)
    np.testing.assert_allclose(bundle.user_vectors, cut(full.bundle.user_vectors, 8), atol=1e-6)
    # The programs too: of users and items that came later.
    rows = [{"user_id": "never seen", "city": "Paris"}]
    np.testing.assert_allclose(
        retriever.encode_users(rows), cut(full.encode_users(rows), 8), atol=1e-6
    )
    rows = [{"item_id": "never seen", "price": 4.0}]
    np.testing.assert_allclose(
        retriever.encode_items(rows), cut(full.encode_items(rows), 8), atol=1e-6
    )


def test_answers_agree_with_ranking_by_cut_vectors(whole, folder):
    retriever = Retriever.load(folder)
    full = make_bundle(whole)
    ids = full.items["item_id"].to_pylist()
    user = full.users["user_id"][5].as_py()
    scores = cut(full.user_vectors[5:6], 8)[0] @ cut(full.vectors, 8).T
    found = retriever.recommend(user, k=len(ids), exclude_seen=False)
    np.testing.assert_allclose([item.score for item in found], np.sort(scores)[::-1], atol=1e-6)
    assert found[0].item_id == ids[int(scores.argmax())]
    np.testing.assert_allclose(
        MatchModel.load(folder).match([user] * len(ids), ids), scores, atol=1e-6
    )


def test_what_cutting_loses_is_measured(whole, folder):
    full = make_bundle(whole)
    told = load_bundle(folder).manifest["against_full"]
    users = full.user_vectors
    items = full.vectors
    right, found = (
        np.argsort(-u @ v.T, axis=1, kind="stable")[:, :10]
        for u, v in ((users, items), (cut(users, 8), cut(items, 8)))
    )
    hits = (found[:, :, None] == right[:, None, :]).any(2)
    gains = 1 / np.log2(np.arange(10) + 2)
    assert told["recall@10"] == pytest.approx(hits.mean(), abs=1e-3) and told["dim"] == 16
    assert told["ndcg@10"] == pytest.approx((hits @ gains).mean() / gains.sum(), abs=1e-3)
    assert 0.1 < told["recall@10"] < 0.9  # weights that were never trained to be cut


def test_held_out_metrics_are_those_of_cut_vectors(whole):
    measured = measure_run(storing(whole, dim=4), ks=(10,), baselines=False)
    queries = make_queries(whole.prepared, "test", "user")
    users = embed_rows(
        whole.model,
        whole.weights,
        "user",
        whole.prepared.user_features(queries.user, queries.context),
    )
    expected = evaluate(
        dot_scores(cut(users, 4), cut(items_of(whole), 4)), queries, (10,), mask_seen=True
    )
    assert (
        measured["model"] == pytest.approx(expected, abs=2e-3) and measured["protocol"]["dim"] == 4
    )


def test_vectors_that_are_not_normalised_are_cut_alone(tmp_path):
    run = trained_for(tmp_path / "run", 8, normalize=False)
    bundle = make_bundle(storing(run, dim=8))
    np.testing.assert_allclose(bundle.vectors, items_of(run)[:, :8], atol=1e-6)
    assert np.ptp(np.linalg.norm(bundle.vectors, axis=1)) > 0.01


@pytest.mark.parametrize("dim", [12, 32])
def test_a_width_that_was_not_trained_is_refused(whole, tmp_path, dim):
    with pytest.raises(
        ConfigError,
        match=f"config.retrieval.dim={dim} is not a width that the model was trained for: 16, 8, 4",
    ):
        export(storing(whole, dim=dim), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert make_bundle(storing(whole, dim=16)).towers.dim == 16


def test_items_change_and_are_rounded_at_that_width(whole, tmp_path):
    export(storing(whole, dim=4, vectors="int8"), tmp_path / "bundle")
    live = Retriever.load(tmp_path / "bundle")
    assert live.bundle.vectors.shape[1] == 4
    with pytest.raises(QueryError, match=r"must be of \[1, 4\]"):
        live.upsert([{"item_id": "new"}], vectors=np.ones((1, 16), np.float32))
    live.upsert([{"item_id": "new", "price": 3.0}])
    full = Retriever(make_bundle(whole)).encode_items([{"item_id": "new", "price": 3.0}])
    np.testing.assert_allclose(live.item_vectors(["new"]), cut(full, 4), atol=2e-2)
    live.compact()
    again = load_bundle(tmp_path / "bundle")
    assert again.vectors.shape == (len(live), 4) and again.manifest["against_full"]["dim"] == 16
