"""FAISS's inverted files: files that hold anything else are refused, by name."""

import numpy as np
import pytest

from tests.index.oracles import clustered_vectors, stable_sort
from twotower.config import RetrievalConfig
from twotower.core.errors import BadIndexError
from twotower.index.build import build_index, load_index, save_index
from twotower.index.inverted import FILE

faiss = pytest.importorskip("faiss", reason="the extra faiss is not installed")
DIM = 8


@pytest.fixture(scope="module")
def vectors():
    return clustered_vectors(100, 1_000, DIM)


def build(vectors):
    config = RetrievalConfig(index="faiss_ivf", target_recall=0.9)
    return build_index(vectors[1], config, normalized=True, queries=vectors[0])


@pytest.fixture(scope="module")
def folder(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    save_index(build(vectors), folder)
    return folder


def inverted(items, num_lists, metric=faiss.METRIC_INNER_PRODUCT, rows=None):
    quantizer = faiss.IndexFlatIP(items.shape[1])
    index = faiss.IndexIVFFlat(quantizer, items.shape[1], num_lists, metric)
    quantizer.this.disown()
    index.own_fields = True
    index.cp.min_points_per_centroid = 1
    index.train(items)
    rows = np.arange(len(items)) if rows is None else rows
    index.add_with_ids(items, rows)
    return index


def emptied(items):
    """Without any row in its lists, and with the number that there were."""
    index = inverted(items, 126)
    index.reset()
    index.ntotal = len(items)
    return index


def graph(items):
    index = faiss.IndexHNSWFlat(items.shape[1], 4)
    index.add(items)
    return index


def on_disk(items, folder):
    index = inverted(items, 126)
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(folder / "elsewhere"))
    lists.merge_from(index.invlists, index.nlist)
    index.replace_invlists(lists)
    lists.this.disown()
    return index


OTHERS = {
    "a graph": lambda items, folder: graph(items),
    "fewer lists": lambda items, folder: inverted(items, 99),
    "fewer items": lambda items, folder: inverted(items[:-1], 126),
    "narrower items": lambda items, folder: inverted(np.ascontiguousarray(items[:, 1:]), 126),
    "another metric": lambda items, folder: inverted(items, 126, faiss.METRIC_L2),
    "a row twice": lambda items, folder: inverted(items, 126, rows=np.arange(1_000) // 2 * 2),
    "rows beyond": lambda items, folder: inverted(items, 126, rows=np.arange(1_000) + 1),
    "lists elsewhere": on_disk,
    "empty lists": lambda items, folder: emptied(items),
}


def test_an_inverted_file_has_the_lists_that_these_tests_take(folder, vectors):
    """Else all of them would be refused for that alone."""
    kept = (folder / FILE).read_bytes()
    faiss.write_index(inverted(vectors[1], 126), str(folder / FILE))
    loaded = load_index(folder, vectors[1])
    (folder / FILE).write_bytes(kept)
    assert loaded.kind == "faiss_ivf"


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_index_is_refused(what, folder, vectors, tmp_path):
    kept = (folder / FILE).read_bytes()
    faiss.write_index(OTHERS[what](vectors[1], tmp_path), str(folder / FILE))
    try:
        with pytest.raises(BadIndexError, match=f"{FILE} holds no inverted file of 126 lists"):
            load_index(folder, vectors[1])
    finally:
        (folder / FILE).write_bytes(kept)


def test_a_damaged_file_is_refused_or_harmless(folder, vectors):
    """Cut off anywhere, and with bytes changed in its head and within."""
    kept = (folder / FILE).read_bytes()
    rng = np.random.default_rng(0)
    users = vectors[0][:1]
    refused = 0
    try:
        for start in rng.integers(0, len(kept), 10).tolist():
            (folder / FILE).write_bytes(kept[:start])
            with pytest.raises(BadIndexError):
                load_index(folder, vectors[1])
        # The first hundred bytes say what the rest is.
        for place in [*range(0, 100, 3), *rng.integers(0, len(kept), 20).tolist()]:
            (folder / FILE).write_bytes(
                kept[:place] + bytes([kept[place] ^ 0x55]) + kept[place + 1 :]
            )
            try:
                _, rows = load_index(folder, vectors[1]).search(users, 5)
            except BadIndexError:
                refused += 1
                continue
            assert rows.min() >= -1 and rows.max() < len(vectors[1])
    finally:
        (folder / FILE).write_bytes(kept)
    assert refused > 10


def test_a_search_of_all_lists_is_exact(vectors):
    users, items = vectors
    index = build(vectors)
    scores, rows = index.search_with(users, 20, index.tuning.num_leaves)
    expected_scores, expected = stable_sort(users, items, 20)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert (rows == expected).mean() > 0.99  # but for ties within rounding
