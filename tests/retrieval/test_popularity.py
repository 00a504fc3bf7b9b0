"""The popularity knob against a sort of score + weight x log count, at every weight with one
index."""

import dataclasses

import numpy as np
import pytest

from twotower.index.build import index_items
from twotower.index.vectors import append_coordinate, log_counts, popularity_coordinate
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever

WEIGHTS = (0.0, 0.05, 0.5, -0.1)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """A bundle whose index weighs popularity."""
    retrieval = dataclasses.replace(run.config.retrieval, popularity=True)
    path = tmp_path_factory.mktemp("popular") / "bundle"
    export(
        dataclasses.replace(run, config=dataclasses.replace(run.config, retrieval=retrieval)), path
    )
    return path


def ranking(retriever, weight, counts):
    """(ids, scores) of a sort."""
    bundle = retriever.bundle
    scores = bundle.vectors @ retriever.encode_users([{"user_id": "nobody"}])[0] + weight * np.log(
        np.maximum(counts, 1)
    )
    order = np.argsort(-scores, kind="stable")
    return bundle.items["item_id"].take(order).to_pylist(), scores[order]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_lists_are_sorted_by_score_and_weighed_count(folder, weight):
    retriever = Retriever.load(folder)
    bundle = retriever.bundle
    assert bundle.index.dim == bundle.vectors.shape[1] + 1 and bundle.counts.max() > 3
    expected, scores = ranking(retriever, weight, bundle.counts)
    found = retriever.recommend("nobody", k=20, popularity_weight=weight)
    assert [item.item_id for item in found] == expected[:20]
    np.testing.assert_allclose([item.score for item in found], scores[:20], atol=1e-5)
    some = bundle.items["category"][0].as_py()
    within = retriever.recommend(
        "nobody", k=5, popularity_weight=weight, where={"category": some}
    )  # compared one by one
    kept = [i for i in expected if retriever.item(i).display["category"] == some]
    assert [item.item_id for item in within] == kept[:5]


def test_items_that_came_later_have_no_count_and_changed_ones_keep_theirs(folder):
    retriever = Retriever.load(folder)
    bundle = retriever.bundle
    top = int(np.argmax(retriever.bundle.counts))
    name = bundle.items["item_id"][top].as_py()
    retriever.upsert([{"item_id": name}, {"item_id": "new"}], vectors=bundle.vectors[[top, top]])
    for change in (lambda: None, retriever.rebalance, retriever.compact):
        change()
        found = {
            i.item_id: i.score
            for i in retriever.recommend("nobody", k=len(retriever), popularity_weight=0.3)
        }
        assert found[name] - found["new"] == pytest.approx(
            0.3 * np.log(bundle.counts[top]), abs=1e-5
        )
        similar = {i.item_id: i.score for i in retriever.similar_items("new", k=5)}
        assert similar[name] == pytest.approx(1.0, abs=1e-5)


def test_a_weight_without_the_coordinate_is_refused(retriever):
    with pytest.raises(ValueError, match="config.retrieval.popularity=True"):
        retriever.recommend("nobody", popularity_weight=0.1)


def test_more_weight_recommends_more_popular_items(folder):
    retriever = Retriever.load(folder)
    counts = dict(
        zip(retriever.bundle.items["item_id"].to_pylist(), retriever.bundle.counts.tolist())
    )
    means = [
        np.mean(
            [
                counts.get(i.item_id, 0)
                for i in retriever.recommend("nobody", k=10, popularity_weight=w)
            ]
        )
        for w in (-0.2, 0.0, 0.2)
    ]
    assert means[0] < means[1] < means[2]


def test_an_approximate_index_serves_every_weight(run):
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    centres = rng.normal(size=(40, 16))
    items, users = (
        unit(centres[rng.integers(0, 40, n)] + 0.5 * rng.normal(size=(n, 16))) for n in (4_000, 400)
    )
    counts = (rng.pareto(1.0, 4_000) * 5).astype(np.int64)
    retrieval = dataclasses.replace(
        run.config.retrieval, index="scann_tree_ah", target_recall=0.95, popularity=True
    )
    index = index_items(dataclasses.replace(run.config, retrieval=retrieval), items, counts, users)
    _, factor = popularity_coordinate(counts, 16)
    for weight in (0.0, 0.02, 0.05):
        _, rows = index.search(append_coordinate(users, weight * factor), 10)
        truth = np.argsort(-(users @ items.T + weight * log_counts(counts)), axis=1)[:, :10]
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, truth)]) > 0.9
