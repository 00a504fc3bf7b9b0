"""Bundles whose item vectors are stored as int8: of one piece with their scales; searched, matched
and changed as what they stand for."""

import dataclasses
import shutil

import numpy as np
import pytest

from tests.retrieval.runs import rewrite_manifest, storing
from twotower.core.errors import BundleError
from twotower.core.files import current_version
from twotower.index.vectors import Int8Vectors, quantize
from twotower.retrieval import export as export_module
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import export
from twotower.retrieval.match import MatchModel
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported8(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return folder, export(storing(run, vectors="int8", popularity=True), folder)


@pytest.fixture
def folder(exported8, tmp_path):
    """A bundle that a test may change."""
    return shutil.copytree(current_version(exported8[0]), tmp_path / "bundle")


def test_what_is_written_is_mapped_and_a_quarter_of_the_size(run, exported8):
    folder, made = exported8
    bundle = load_bundle(folder)
    whole = embed_rows(run.model, run.weights, "item", run.prepared.features["item"])
    codes = np.load(bundle.version / "item_vectors.npy")
    assert codes.dtype == np.int8 and 4 * codes.nbytes == whole.nbytes
    assert isinstance(bundle.vectors.codes.base, np.memmap) and isinstance(
        bundle.vectors.scales.base, np.memmap
    )
    np.testing.assert_array_equal(np.asarray(bundle.vectors), np.asarray(quantize(whole)))
    # What that loses, counted by hand.
    users = np.asarray(bundle.user_vectors)
    right, found = (
        np.argsort(-users @ np.asarray(x).T, axis=1, kind="stable")[:, :10]
        for x in (whole, bundle.vectors)
    )
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(right, found)])
    told = bundle.manifest["against_full"]
    assert (
        told == made.manifest["against_full"] and told["users"] == len(users) and told["dim"] == 16
    )
    assert told["recall@10"] == pytest.approx(recall, abs=2e-3) and 0.9 < recall < 1
    assert set(told) == {"dim", "users", "recall@10", "recall@100", "ndcg@10", "ndcg@100"}


def test_a_float_bundle_says_nothing_of_a_loss(exported, exported_files):
    assert "against_full" not in load_bundle(exported).manifest
    assert not (exported_files / "item_scales.npy").exists()


@pytest.mark.parametrize("index", ["exact", "scann_brute_force"])
def test_lists_are_those_of_the_dequantised_vectors(run, tmp_path, index):
    export(storing(run, vectors="int8", index=index), tmp_path / "bundle")
    retriever = Retriever.load(tmp_path / "bundle")
    files = current_version(tmp_path / "bundle")
    scales = np.load(files / "item_scales.npy")
    vectors = np.load(files / "item_vectors.npy") * scales[:, None]
    ids = retriever.bundle.items["item_id"].to_pylist()
    prices = np.array(retriever.bundle.items["price"].to_pylist(), float)
    middle = float(np.nanmedian(prices))
    user = retriever.bundle.users["user_id"][3].as_py()
    scores = retriever.embed_users([user])[0] @ vectors.T
    for where, allowed in (
        ((), np.ones(len(ids), bool)),
        ([("price", "<=", middle)], prices <= middle),
    ):
        best = np.sort(np.where(allowed, scores, -np.inf))[::-1][:20]
        found = retriever.recommend(user, k=20, exclude_seen=False, where=where)
        np.testing.assert_allclose([item.score for item in found], best, atol=1e-5)
    model = MatchModel.load(tmp_path / "bundle")
    np.testing.assert_allclose(model.match([user] * 5, ids[:5]), scores[:5], atol=1e-5)


def test_popularity_is_weighed(exported8):
    retriever = Retriever.load(exported8[0])
    bundle = retriever.bundle
    scores = retriever.embed_users(["nobody"])[0] @ np.asarray(bundle.vectors).T + 0.1 * np.log(
        np.maximum(bundle.counts, 1)
    )
    found = retriever.recommend("nobody", k=10, popularity_weight=0.1)
    np.testing.assert_allclose(
        [item.score for item in found], np.sort(scores)[::-1][:10], atol=1e-5
    )


@pytest.mark.parametrize("what", ["codes", "scales"])
def test_more_than_rounding_explains_is_refused(run, tmp_path, monkeypatch, what):
    def spoil(folder):
        bundle = load_bundle(folder)
        parts = {"codes": np.array(bundle.vectors.codes), "scales": np.array(bundle.vectors.scales)}
        parts[what][0] = parts[what][1] if what == "codes" else 1.3 * parts[what][0]
        return dataclasses.replace(bundle, vectors=Int8Vectors(**parts))

    monkeypatch.setattr(export_module, "load_bundle", spoil)
    with pytest.raises(
        BundleError, match=r"differ from the trainer's by up to .* \(rounding to int8 allows"
    ):
        export(storing(run, vectors="int8"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_parts_that_do_not_belong_together_are_refused(folder, exported_files):
    scales = np.load(folder / "item_scales.npy")
    np.save(folder / "item_scales.npy", 2 * scales)
    rewrite_manifest(folder)
    with pytest.raises(BundleError, match="built from other scales than item_scales.npy"):
        load_bundle(folder)
    np.save(folder / "item_scales.npy", scales)
    shutil.copy(exported_files / "config.json", folder / "config.json")
    rewrite_manifest(folder)
    with pytest.raises(
        BundleError, match="item_vectors.npy holds int8, but config.retrieval.vectors='float32'"
    ):
        load_bundle(folder)


def test_an_item_keeps_its_score_when_items_are_indexed_anew_and_written(folder, retriever):
    live = Retriever.load(folder)
    vector = live.encode_items([{"item_id": "new", "price": 3.0}])[0]
    user = live.bundle.users["user_id"][0].as_py()
    expected = live.embed_users([user])[0] @ np.asarray(quantize(vector[None]))[0]

    def score():
        found = live.recommend(user, k=len(live), exclude_seen=False)
        return {item.item_id: item.score for item in found}

    live.upsert([{"item_id": "new", "price": 3.0}])
    before = score()
    assert before["new"] == pytest.approx(float(expected), abs=1e-6)
    assert abs(before["new"] - float(live.embed_users([user])[0] @ vector)) > 1e-5
    live.rebalance()
    assert score() == pytest.approx(before, abs=1e-6)
    assert isinstance(live._live.catalogue.snapshot.base.vectors, Int8Vectors)
    live.compact()
    assert np.load(current_version(folder) / "item_vectors.npy").dtype == np.int8
    live = Retriever.load(folder)
    assert score() == pytest.approx(before, abs=1e-6)
    np.testing.assert_allclose(
        live.item_vectors(["new"])[0], np.asarray(quantize(vector[None]))[0], rtol=1e-6
    )
    assert (
        live.bundle.manifest["against_full"]["recall@10"] < 1
        and live.bundle.manifest["compactions"] == 1
    )
    near = [item.score for item in live.similar_items("new", k=5)]
    assert near == sorted(near, reverse=True) and max(near) <= 1 + 1e-4
