"""Traps of the index and of serving: another metric, old vectors, untuned trees, arbitrary
answers."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.index.fakes import UnconditionalIndex
from tests.retrieval.runs import make_run, rewrite_manifest
from twotower.config import RetrievalConfig
from twotower.core.arrays import Ragged
from twotower.core.errors import BundleError, QueryError
from twotower.evaluation import evaluate
from twotower.evaluation.queries import make_queries
from twotower.index import exact
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.recall import list_recall
from twotower.index.scann import ScannIndex
from twotower.index.search import search_filtered
from twotower.kernels.device_top_k import select_top_k
from twotower.retrieval.bundle import load_bundle, write_bundle
from twotower.retrieval.export import check_parity, make_bundle
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run of seconds that was never trained."""
    return make_run(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def bundled(fresh):
    """The folder of its bundle: not to be changed."""
    folder = fresh.workdir / "bundle"
    folder.mkdir()
    write_bundle(make_bundle(fresh), folder, step=1)
    return folder


@pytest.fixture
def scann():
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")


def _unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _dots(run, users):
    """The dot products of the towers' vectors, and nothing else: [users, N]."""

    def embed(side, features):
        on_device = jax.tree.map(jnp.asarray, features)
        return np.asarray(run.model.embed(side, run.weights, on_device))

    rows = run.prepared.encoder.encode("user", users)
    return embed("user", rows) @ embed("item", dict(run.prepared.features["item"])).T


@pytest.mark.trap(7)
def test_served_scores_are_dot_products_whatever_the_popularity(fresh, bundled):
    """The correction left in at serving favours or punishes popular items: a served score is the
    plain dot product."""
    retriever = Retriever.load(bundled)
    users = retriever.bundle.users.slice(0, 8)
    lists = retriever.recommend_many(users["user_id"].to_pylist(), k=20, exclude_seen=False)
    place = {item: n for n, item in enumerate(fresh.prepared.items["item_id"].to_pylist())}
    items = np.array([place[item] for item in lists["item_id"].to_pylist()]).reshape(8, 20)
    dots = _dots(fresh, users)
    np.testing.assert_allclose(
        lists["score"].to_numpy().reshape(8, 20), np.take_along_axis(dots, items, 1), atol=1e-5
    )
    np.testing.assert_array_equal(items, np.argsort(-dots, axis=1, kind="stable")[:, :20])


@pytest.mark.trap(7)
def test_evaluated_scores_are_dot_products_whatever_the_popularity(fresh):
    """Measured with the correction, served without: evaluation ranks by the plain dot product
    too."""
    queries = make_queries(fresh.prepared, "test", "interaction")
    scores = np.asarray(
        evaluate.model_scores(fresh.prepared, fresh.model, fresh.weights, queries)(slice(0, 8))
    )
    event = fresh.prepared.raw.test["event"].slice(0, 8)
    users = fresh.prepared.users.take(fresh.prepared.test.user[:8]).append_column("event", event)
    np.testing.assert_allclose(scores, _dots(fresh, users), atol=1e-5)


@pytest.fixture(scope="module")
def unscaled(tmp_path_factory):
    """A run whose vectors have any length."""
    return make_run(
        tmp_path_factory.mktemp("unscaled"), model={"normalize": False, "temperature": 1.0}
    )


@pytest.mark.trap(9)
def test_the_index_ranks_by_the_metric_of_training(unscaled, tmp_path):
    """Trained on dot product, indexed by distance: vectors of different lengths rank as the dot
    product ranks them."""
    bundle = make_bundle(unscaled)
    assert np.ptp(np.linalg.norm(bundle.vectors, axis=1)) > 0.5
    users = bundle.users.slice(0, 16)
    queries = Retriever(bundle).encode_users(users)
    expected = np.argsort(-_dots(unscaled, users), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(bundle.index.search(queries, 10)[1], expected)
    manifest = write_bundle(bundle, tmp_path, step=1)
    assert manifest["metric"] == "dot" and manifest["normalized"] is False


@pytest.mark.trap(9)
@pytest.mark.parametrize("kind", ["scann_brute_force", "scann_tree"])
def test_scann_ranks_by_the_metric_of_training(scann, kind):
    """The same for ScaNN, which knows distances too."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(1200, 8)) * rng.lognormal(0, 1, (1200, 1))
    queries = rng.normal(size=(20, 8)).astype(np.float32)
    index = build_index(
        items, RetrievalConfig(index=kind, target_recall=1.0), normalized=False, queries=queries
    )
    assert (
        list_recall(index.search(queries, 10)[1], np.argsort(-queries @ items.T, axis=1)[:, :10])
        > 0.99
    )


@pytest.mark.trap(9)
def test_export_refuses_a_bundle_that_scores_otherwise_than_the_trainer(unscaled, tmp_path):
    """Vectors normalised on the way to the index alone: export compares the written bundle with the
    towers."""
    bundle = make_bundle(unscaled)
    vectors = _unit(bundle.vectors)
    write_bundle(
        dataclasses.replace(bundle, vectors=vectors, index=ExactIndex(vectors)), tmp_path, step=1
    )
    with pytest.raises(BundleError, match="scores differ from the trainer's"):
        check_parity(unscaled, tmp_path)


@pytest.mark.trap(18)
def test_item_vectors_of_an_older_step_are_refused(fresh, bundled, tmp_path):
    """Recall decays quietly when items are older than the user tower: the index knows the weights
    it was made with."""
    trained_on = dataclasses.replace(fresh, weights=fresh.model.init(jax.random.key(1)))
    mixed = tmp_path / "mixed"
    newer = tmp_path / "newer"
    newer.mkdir()
    write_bundle(make_bundle(trained_on), newer, step=2)
    shutil.copytree(bundled, mixed)
    shutil.copy(newer / "params.npz", mixed)
    shutil.copytree(newer / "tables", mixed / "tables", dirs_exist_ok=True)
    rewrite_manifest(mixed)
    with pytest.raises(BundleError, match="weights of another model"):
        load_bundle(mixed)
    rewrite_manifest(
        mixed, model_version=json.loads((newer / "manifest.json").read_text())["model_version"]
    )
    with pytest.raises(BundleError, match="the user tower is of model"):
        load_bundle(mixed)


@pytest.mark.trap(24)
@pytest.mark.parametrize("index", [ExactIndex, UnconditionalIndex])
def test_excluded_items_never_come_back_though_fewer_than_k_remain(index):
    """Pushed down by 1e5 they return when the list cannot be filled: they are dropped, and the list
    is short."""
    items = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    queries = items[:3] * 2
    exclude = Ragged.from_pairs(
        np.repeat([0, 1], [9, 12]), np.r_[np.arange(9), np.arange(12)], num_rows=3
    )
    found = search_filtered(index(items), items, queries, 5, exclude)
    scores, rows = found
    assert (
        set(rows[0, :3]) == {9, 10, 11}
        and (rows[0, 3:] == -1).all()
        and (rows[1] == -1).all()
        and (rows[2] >= 0).all()
    )
    assert np.isneginf(scores[rows < 0]).all()


@pytest.mark.trap(32)
def test_a_tree_is_tuned_until_it_reaches_its_recall(scann):
    """Default settings of a tree lose recall: the leaves searched are those that reach the target,
    and are said."""
    rng = np.random.default_rng(0)
    items = _unit(rng.normal(size=(1500, 12)))
    queries = _unit(rng.normal(size=(100, 12)))
    config = RetrievalConfig(target_recall=0.95)
    index = ScannIndex.build(items, config, kind="scann_tree", queries=queries, normalized=True)
    recall = list_recall(
        index.search(queries, 10)[1], np.argsort(-queries @ items.T, axis=1)[:, :10]
    )
    assert recall >= 0.95 and index.tuning.efforts[0].recall >= 0.95
    assert index.tuning.efforts[0].leaves < index.tuning.num_leaves


@pytest.mark.trap(33)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_query_that_says_nothing_is_refused(value):
    """A zero or NaN vector would be answered with arbitrary items."""
    items = _unit(np.random.default_rng(0).normal(size=(20, 4)))
    queries = items[:3].copy()
    queries[1] = value
    with pytest.raises(QueryError, match="query vector 1 is"):
        ExactIndex(items, normalized=True).search(queries, 5)


@pytest.mark.trap(33)
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_scann_is_not_asked_what_says_nothing(scann, value):
    """The same before ScaNN, which would answer, or end the process."""
    items = _unit(np.random.default_rng(0).normal(size=(60, 4)))
    queries = items[:3].copy()
    queries[1] = value
    index = build_index(
        items, RetrievalConfig(index="scann_brute_force"), normalized=True, queries=items
    )
    with pytest.raises(QueryError, match="query vector 1 is"):
        index.search(queries, 5)


def _top_k_widths(function, *shapes):
    """The widths of the arrays that `function` gives to `top_k`, from its trace: nothing is
    computed."""
    widths = []
    left = [jax.make_jaxpr(function)(*shapes).jaxpr]
    while left:
        for equation in left.pop().eqns:
            if equation.primitive.name in ("top_k", "approx_top_k", "sort"):
                widths.append(equation.invars[0].aval.shape[-1])
            left += [p.jaxpr for p in equation.params.values() if hasattr(p, "jaxpr")]
    return widths


@pytest.mark.trap(34)
def test_no_top_k_takes_a_whole_row():
    """XLA sorts the row that `top_k` takes on a GPU: evaluation and search find the best groups
    first."""
    scores = jax.ShapeDtypeStruct((2, 4_000_007), "float32")
    widths = _top_k_widths(lambda s: select_top_k(s, 100), scores)
    assert len(widths) > 2 and max(widths) <= 32 * 100
    pair = jax.ShapeDtypeStruct((4,), "int32")
    pairs = evaluate._Pairs(pair, pair, pair, pair)
    rank = functools.partial(evaluate._rank.__wrapped__, k=10)
    ranked = _top_k_widths(rank, scores, pairs)
    assert len(ranked) > 2 and max(ranked) <= 32 * 10


@pytest.mark.trap(34)
def test_a_search_takes_no_whole_row_either(monkeypatch):
    """The same for the index on an accelerator, which compares a block of the items at once."""
    widths = []
    top_k = jax.lax.top_k
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.lax, "top_k", lambda x, k: (widths.append(x.shape[-1]), top_k(x, k))[1])
    items = np.zeros((exact.ITEM_BLOCK + 13, 1), np.float32)
    items[-1] = 1.0
    index = ExactIndex(items)
    assert index.search(np.ones((1, 1)), 3)[1].tolist() == [[exact.ITEM_BLOCK + 12, 0, 1]]
    assert widths and max(widths) <= 32 * 3
    assert max(len(block) for block in index._blocks) == exact.ITEM_BLOCK


@pytest.mark.trap(34)
@pytest.mark.parametrize("width", [50, 333, 5_000])
def test_the_best_groups_hold_the_answer_of_the_whole_row(width):
    """The stable sort of the whole row, ties included."""
    scores = np.random.default_rng(0).integers(0, 9, (3, width)).astype(np.float32)
    scores[0] = -np.inf
    found, rows = select_top_k(jnp.asarray(scores), 5)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, 1))


@pytest.mark.trap(34)
def test_blocks_merge_to_the_answer_of_the_whole_row():
    """Of equal scores the lower row stays first, in whichever block it is."""
    scores = np.random.default_rng(0).integers(0, 9, (3, 200)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    index = ExactIndex(np.eye(200, dtype=np.float32), item_block=64)
    np.testing.assert_array_equal(index.search(scores, 20)[1], expected)
    assert [len(block) for block in index._blocks] == [64] * 4
