"""ScaNN behind the same meaning as exact search, and what must not reach it."""

import json

import numpy as np
import pytest

from tests.index.oracles import clustered_vectors
from twotower.config import RetrievalConfig, from_dict
from twotower.core.errors import BadIndexError, ConfigError, QueryError
from twotower.index import build as build_module
from twotower.index import scann as scann_module
from twotower.index.build import build_index, load_index, save_index
from twotower.index.exact import ExactIndex
from twotower.index.graphs import GRAPHS
from twotower.index.recall import list_recall
from twotower.index.scann import ScannIndex

pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
TREES = ["scann_tree", "scann_tree_ah"]


@pytest.fixture(scope="module")
def vectors():
    """400 user vectors and 3,000 item vectors near them."""
    return clustered_vectors(400, 3_000)


@pytest.fixture(scope="module", params=TREES)
def built(request, vectors):
    users, items = vectors
    return build_index(
        items,
        RetrievalConfig(index=request.param, target_recall=0.95),
        normalized=True,
        queries=users,
    )


def test_brute_force_equals_exact(vectors):
    users, items = vectors
    index = build_index(items, RetrievalConfig(index="scann_brute_force"), normalized=True)
    scores, rows = index.search(users, 20)
    expected_scores, expected_rows = ExactIndex(items).search(users, 20)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert list_recall(rows, expected_rows) > 0.999


def test_the_same_vectors_give_the_same_index(built, vectors):
    users, items = vectors
    again = build_index(
        items, RetrievalConfig(index=built.kind, target_recall=0.95), normalized=True, queries=users
    )
    np.testing.assert_array_equal(again.search(users, 10)[1], built.search(users, 10)[1])
    assert again.tuning == built.tuning


@pytest.mark.parametrize("k", [1, 30])
def test_queries_in_batches_of_all_sizes_find_what_they_find_alone(built, vectors, k):
    users, _ = vectors
    alone = [built.search(users[number : number + 1], k) for number in range(40)]
    scores = np.concatenate([found for found, _ in alone])
    rows = np.concatenate([found for _, found in alone])
    for size in (2, 9, 40):
        found, found_rows = built.search(users[:size], k)
        np.testing.assert_array_equal(found_rows, rows[:size])
        np.testing.assert_allclose(found, scores[:size], rtol=1e-6)


def test_what_is_not_found_is_minus_one_and_never_row_zero(built, vectors):
    users, _ = vectors
    scores, rows = built.search_with(users[:5], 3_500, 1, 400)  # one leaf: ScaNN itself has to pad
    assert rows.shape == scores.shape == (5, built.num_items)
    for found, score in zip(rows, scores):
        real = found[found >= 0]
        assert len(np.unique(real)) == len(real)
        assert np.isneginf(score[found < 0]).all() and np.isfinite(score[found >= 0]).all()
    assert (rows[:, -1] == -1).all()


def test_longer_lists_than_the_tuned_leaves_hold_are_still_full(built, vectors):
    users, _ = vectors
    assert (built.search(users, 300)[1] >= 0).all()


def test_a_moved_folder_loads_and_answers_the_same(built, vectors, tmp_path):
    users, items = vectors
    save_index(built, tmp_path / "first", vectors="abc")
    (tmp_path / "first").rename(tmp_path / "second")
    loaded = load_index(tmp_path / "second", items)
    assert loaded.tuning == built.tuning and loaded.tuning.tried == built.tuning.tried
    np.testing.assert_array_equal(loaded.search(users, 10)[1], built.search(users, 10)[1])
    info = json.loads((tmp_path / "second" / "index.json").read_text())
    assert (
        info["vectors"] == "abc"
        and info["efforts"][0]["recall"] >= 0.95
        and info["kind"] == built.kind
    )
    with pytest.raises(BadIndexError, match="3000 vectors 16 wide"):
        load_index(tmp_path / "second", items[:-1])


def test_where_scann_cannot_be_imported_the_search_is_exact(built, vectors, tmp_path, monkeypatch):
    users, items = vectors
    save_index(built, tmp_path)

    def fail(*args):
        raise ImportError("no wheel")

    monkeypatch.setattr(scann_module, "load_searcher", fail)
    loaded = load_index(tmp_path, items)
    np.testing.assert_array_equal(
        loaded.search(users, 10)[1], ExactIndex(items).search(users, 10)[1]
    )
    monkeypatch.setattr(scann_module, "import_scann", fail)
    assert build_index(items, RetrievalConfig(index="auto"), normalized=True).kind == "exact"


def test_a_truncated_index_is_a_clean_error(built, vectors, tmp_path):
    save_index(built, tmp_path)
    (tmp_path / "scann_config.pb").write_bytes(b"")
    with pytest.raises(BadIndexError, match="no ScaNN index"):
        load_index(tmp_path, vectors[1])


def test_a_pickle_beside_the_index_is_not_read(built, vectors, tmp_path):
    save_index(built, tmp_path)
    (tmp_path / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(BadIndexError, match="pickle"):
        load_index(tmp_path, vectors[1])


def test_bad_queries_are_refused_and_none_are_answered(built, vectors):
    users = vectors[0][:3].copy()
    assert built.search(users[:0], 4)[1].shape == (0, 4)
    with pytest.raises(QueryError, match="15 wide; the items are 16 wide"):
        built.search(users[:, :15], 4)
    users[1, 2] = np.nan
    with pytest.raises(QueryError, match="query vector 1 is not finite"):
        built.search(users, 4)
    with pytest.raises(ValueError, match="k=0"):
        built.search(vectors[0], 0)


@pytest.mark.parametrize("kind", TREES + ["scann_brute_force"])
def test_queries_of_length_zero_are_refused_where_vectors_are_normalised(kind, vectors, tmp_path):
    users, items = vectors[0].copy(), vectors[1]
    users[7] = 0  # not tuned on either: it has no best items
    index = build_index(
        items, RetrievalConfig(index=kind, target_recall=0.9), normalized=True, queries=users
    )
    save_index(index, tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["normalized"] is True
    for each in (index, load_index(tmp_path, items)):
        with pytest.raises(QueryError, match="query vector 7 is zero"):
            each.search(users, 4)
        assert (each.search(users[:7], 4)[1] >= 0).all()


def test_a_zero_query_is_answered_where_vectors_are_not_normalised(vectors):
    index = build_index(
        vectors[1], RetrievalConfig(index="scann_tree"), normalized=False, queries=vectors[0]
    )
    assert index.search(np.zeros((1, 16)), 4)[0].tolist() == [[0.0] * 4]


def test_building_writes_nothing_to_the_terminal(vectors, capfd):
    config = RetrievalConfig(target_recall=0.9)
    ScannIndex.build(vectors[1], config, kind="scann_tree", queries=vectors[0])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", TREES + ["scann_brute_force"])
@pytest.mark.parametrize("count", [1, 15, 999])
def test_few_vectors_are_searched_by_brute_force(kind, count, vectors):
    index = build_index(
        vectors[1][:count], RetrievalConfig(index=kind), normalized=True, queries=vectors[0]
    )
    assert index.kind == "scann_brute_force"
    rows = index.search(vectors[0], 20)[1]
    assert ((rows >= 0).sum(1) == min(20, count)).all()


@pytest.mark.parametrize("kind", TREES)
def test_duplicates_and_zero_vectors_are_indexed(kind, vectors):
    items = vectors[1].copy()
    items[:1_000] = items[0]
    items[1_000:2_000] = 0
    index = build_index(
        items, RetrievalConfig(index=kind, target_recall=0.9), normalized=True, queries=vectors[0]
    )
    truth = ExactIndex(items).search(vectors[0], 10)[1]
    assert list_recall(index.search(vectors[0], 10)[1], truth) >= 0.9


def test_auto_chooses_by_size_width_norm_lists_and_platform(monkeypatch):
    def kind(num_items, dim=64, k=10, normalized=True):
        return build_module.resolve_kind(
            RetrievalConfig(k=k), num_items, dim, normalized=normalized
        )

    assert kind(999) == "exact"
    assert kind(1_000) == kind(49_999) == kind(100_000, dim=16) == "scann_brute_force"
    assert kind(50_000) == kind(25_000, dim=128) == kind(199_999) == "scann_tree"
    assert kind(200_000) == kind(200_000, k=10_000) == "scann_tree_ah"
    assert kind(200_000, normalized=False) == "scann_tree"
    assert kind(200_000, k=10_001) == "scann_brute_force"
    monkeypatch.setattr(build_module, "has_library", lambda kind: False)
    assert kind(200_000) == "exact"


def test_hashing_is_refused_for_vectors_that_are_not_normalised(vectors):
    with pytest.raises(ConfigError, match="scann_tree"):
        build_index(vectors[1], RetrievalConfig(index="scann_tree_ah"), normalized=False)


@pytest.mark.parametrize(
    "kind", [kind for kind in build_module.KINDS if kind not in (*GRAPHS, "faiss_ivf")]
)
def test_every_kind_can_be_configured(kind, vectors):
    config = from_dict({"retrieval": {"index": kind, "target_recall": 0.8}}).retrieval
    index = build_index(vectors[1], config, normalized=True, queries=vectors[0][:100])
    chosen = ("auto", "fastest")
    assert index.kind == ("scann_brute_force" if kind in chosen else kind)


def test_an_unknown_kind_names_the_nearest(vectors):
    with pytest.raises(ConfigError, match="did you mean 'scann_tree'"):
        build_index(vectors[1], RetrievalConfig(index="scan_tree"), normalized=True)
