"""Graphs and inverted files behind the same meaning as exact search, tuned, saved, and never
padding with an item."""

import dataclasses
import json
import re
import sys
import threading

import numpy as np
import pytest

from tests.index.oracles import clustered_vectors
from twotower.config import from_dict
from twotower.core.errors import BadIndexError, QueryError
from twotower.core.install import install_line
from twotower.index import graphs
from twotower.index.build import build_index, load_index, save_index
from twotower.index.exact import ExactIndex
from twotower.index.graphs import GRAPHS, import_library
from twotower.index.recall import list_recall


@pytest.fixture(scope="module")
def vectors():
    return clustered_vectors(400, 2_000)


def config(kind, target=0.95):
    return from_dict({"retrieval": {"index": kind, "target_recall": target}}).retrieval


@pytest.fixture(scope="module", params=[*GRAPHS, "faiss_ivf"])
def built(request, vectors):
    extra = request.param.removesuffix("_ivf")
    pytest.importorskip(extra, reason=f"the extra {extra} is not installed")
    return build_index(vectors[1], config(request.param), normalized=True, queries=vectors[0][::2])


def test_lists_are_nearly_exact_and_full(built, vectors):
    users, items = vectors[0][1::2], vectors[1]
    for k in (1, 10, 300):
        scores, rows = built.search(users, k)
        expected_scores, expected = ExactIndex(items).search(users, k)
        assert list_recall(rows, expected) >= 0.94
        # As many items as the lists that an inverted file has looked at hold.
        missing = rows < 0
        assert not missing.any() or (built.kind == "faiss_ivf" and k == 300)
        products = np.einsum("qd,qkd->qk", users, items[rows])
        products[missing] = -np.inf
        np.testing.assert_allclose(scores, products, atol=1e-5)
    assert built.tuning.efforts[0].recall >= 0.95 and built.tuning.efforts[0].leaves < 200


def test_what_is_written_is_read(built, vectors, tmp_path):
    save_index(built, tmp_path / "first", vectors="abc")
    (tmp_path / "first").rename(tmp_path / "second")
    loaded = load_index(tmp_path / "second", vectors[1])
    assert loaded.tuning == built.tuning
    for one, other in zip(loaded.search(vectors[0], 10), built.search(vectors[0], 10)):
        np.testing.assert_array_equal(one, other)


def test_a_graph_of_distances_is_refused(built, vectors, tmp_path):
    """Its distances would be served as scores."""
    if built.kind != "faiss":
        return
    faiss = import_library("faiss")
    save_index(built, tmp_path)
    graph = faiss.IndexHNSWFlat(vectors[1].shape[1], 4)
    graph.add(vectors[1])
    faiss.write_index(graph, str(tmp_path / "index.faiss"))
    with pytest.raises(BadIndexError, match="holds no graph of"):
        load_index(tmp_path, vectors[1])


def test_how_the_graph_was_built_is_written_down(built, vectors, tmp_path):
    if built.kind not in GRAPHS:
        return
    thin = dataclasses.replace(config(built.kind, 0.5), hnsw_m=5, hnsw_ef_construction=17)
    made = build_index(vectors[1], thin, normalized=True, queries=vectors[0][::2])
    for name, index, expected in (("usual", built, (32, 200)), ("thin", made, (5, 17))):
        save_index(index, tmp_path / name)
        info = json.loads((tmp_path / name / "index.json").read_text())
        assert (info["hnsw_m"], info["hnsw_ef_construction"]) == expected
        # A graph that was read knows it too.
        read = load_index(tmp_path / name, vectors[1]).save(tmp_path)
        assert (read["hnsw_m"], read["hnsw_ef_construction"]) == expected
    sizes = {
        name: sum(path.stat().st_size for path in (tmp_path / name).glob("index.[hf]*"))
        for name in ("usual", "thin")
    }
    assert sizes["thin"] < sizes["usual"] - 2_000 * 4 * 2 * 20


def test_the_same_vectors_give_the_same_index(built, vectors):
    again = build_index(vectors[1], config(built.kind), normalized=True, queries=vectors[0][::2])
    np.testing.assert_array_equal(again.search(vectors[0], 10)[1], built.search(vectors[0], 10)[1])
    assert again.tuning == built.tuning


def test_more_than_there_is_and_nothing(built, vectors):
    scores, rows = built.search(vectors[0][:3], 10**8)
    assert rows.shape == (3, 2_000) and np.isneginf(scores[rows < 0]).all()
    assert built.search(vectors[0][:0], 4)[1].shape == (0, 4)
    with pytest.raises(QueryError, match="query vector 0 is zero"):
        built.search(np.zeros((1, 16)), 4)
    with pytest.raises(QueryError, match="is not finite"):
        built.search(np.full((1, 16), np.nan), 4)
    with pytest.raises(ValueError, match="k=0"):
        built.search(vectors[0], 0)


def test_threads_that_ask_for_lists_of_different_lengths(built, vectors):
    expected = {k: built.search(vectors[0][:20], k)[1] for k in (3, 40)}
    wrong = []

    def ask(k):
        for _ in range(30):
            if not np.array_equal(built.search(vectors[0][:20], k)[1], expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=ask, args=(k,)) for k in (3, 40, 3, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_library_that_is_not_there_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=re.escape(install_line("faiss"))):
        import_library("faiss")


def test_a_target_beyond_the_graph_is_searched_exactly(vectors, monkeypatch):
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    monkeypatch.setattr(graphs, "MAX_EF_SEARCH", 1)
    few_links = dataclasses.replace(config("faiss", 0.999), hnsw_m=2)
    index = build_index(vectors[1], few_links, normalized=True, queries=vectors[0])
    assert index.kind == "exact"
