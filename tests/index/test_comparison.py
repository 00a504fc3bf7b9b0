"""Builds that are compared: the rule's is kept unless another is clearly faster on the vectors."""

import logging
import re
import sys

import numpy as np
import pytest

from tests.index.oracles import clustered_vectors
from twotower.config import RetrievalConfig
from twotower.core.install import install_line
from twotower.index import build as build_module
from twotower.index import comparison
from twotower.index.base import Build
from twotower.index.build import build_index, builds_to_compare, load_index, save_index
from twotower.index.comparison import build_of, fastest_index, seconds_per_query
from twotower.index.exact import ExactIndex
from twotower.index.recall import list_recall
from twotower.index.tuned import TunedIndex
from twotower.index.tuning import SearchEffort, Tuning
from twotower.index.tuning_report import format_tuning

TREE, SHORT, CODES = Build("scann_tree", 3), Build("scann_tree", 8), Build("scann_tree_ah", 3)
LISTS = (Build("faiss_ivf", 4), Build("faiss_ivf", 8))


class FakeIndex(TunedIndex):
    """An index that was tuned, and is neither searched nor written."""

    def save(self, folder):
        raise NotImplementedError


def fake_index(build, num_items, kind=None):
    num_leaves = round((build.leaves_per_root or 1) * num_items**0.5)
    efforts = (SearchEffort(10, 1, 0, 0.95, 50),)
    return FakeIndex(Tuning(kind or build.kind, num_items, 8, True, num_leaves, 0.9, efforts))


def compare(monkeypatch, times, *, num_items=400, min_gain=1.1, other_kinds=()):
    """Compares builds that take the given times, in the order of `times`."""
    made = []

    def make(build, vectors):
        made.append((build, len(vectors)))
        kind = "scann_brute_force" if build in other_kinds else build.kind
        return fake_index(build, len(vectors), kind)

    def seconds(first, second, queries, k, optimize_for):
        return times[build_of(first)], times[build_of(second)]

    monkeypatch.setattr(comparison, "seconds_per_query", seconds)
    vectors = np.ones((num_items, 8), np.float32)
    options = {"optimize_for": "batches", "min_gain": min_gain}
    index = fastest_index(list(times), make, vectors, vectors[:60], 10, **options)
    return index, made


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({CODES: 1.0, TREE: 0.95, SHORT: 0.92}, CODES),
        ({CODES: 1.0, TREE: 0.95, SHORT: 0.90}, SHORT),
        ({CODES: 1.0, TREE: 0.5, SHORT: 0.46}, TREE),
        ({CODES: 1.0, TREE: 0.5, SHORT: 0.4}, SHORT),
        ({TREE: 1.0, CODES: 3.0, SHORT: 2.0}, TREE),
    ],
)
def test_another_build_must_be_clearly_faster(times, expected, monkeypatch):
    index, made = compare(monkeypatch, times)
    assert build_of(index) == expected
    assert made == [(build, 400) for build in times]
    chosen = [build.chosen for build in index.tuning.compared]
    assert chosen == [build == expected for build in times]
    assert [build.milliseconds for build in index.tuning.compared] == [
        pytest.approx(1e3 * seconds) for seconds in times.values()
    ]


def test_a_build_that_gave_way_to_another_kind_is_left_out(monkeypatch):
    times = {CODES: 1.0, TREE: 0.1, SHORT: 0.5}
    index, _ = compare(monkeypatch, times, other_kinds=(TREE,))
    assert build_of(index) == SHORT
    assert [build.kind for build in index.tuning.compared] == ["scann_tree_ah", "scann_tree"]


def test_a_large_corpus_is_compared_by_a_sample_and_built_once(monkeypatch):
    monkeypatch.setattr(comparison, "MAX_COMPARED_ITEMS", 100)
    index, made = compare(monkeypatch, {TREE: 1.0, SHORT: 0.2}, num_items=900)
    assert made == [(TREE, 100), (SHORT, 100), (SHORT, 900)]
    assert index.num_items == 900
    assert [build.num_items for build in index.tuning.compared] == [100, 100]


def builds(index, num_items=60_000, dim=64, normalized=True, **config):
    config = RetrievalConfig(index=index, **config)
    return builds_to_compare(config, num_items, dim, normalized=normalized)


def test_what_is_compared_follows_size_norm_and_libraries(monkeypatch, caplog):
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    for kind in ("auto", "fastest"):
        # All items are compared in a moment, or looked at for lists this long.
        assert builds(kind, 900) == [Build("exact")]
        assert builds(kind, 49_999) == builds(kind, k=4_000) == [Build("scann_brute_force")]
    assert builds("auto") == [TREE, SHORT, CODES]
    assert builds("auto", 200_000) == [CODES, TREE, SHORT]
    assert builds("auto", 200_000, normalized=False) == [TREE, SHORT]
    assert builds("fastest", 200_000) == [CODES, TREE, SHORT, *LISTS]
    # A kind that is named is built.
    assert builds("scann_tree", 200_000) == [Build("scann_tree")]

    monkeypatch.setattr(build_module, "has_library", lambda kind: False)
    assert builds("auto") == [Build("exact")]
    assert builds("fastest") == list(LISTS)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert builds("fastest") == [Build("exact")]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with caplog.at_level(logging.WARNING):
        assert builds("fastest") == [TREE, SHORT, CODES]
    assert re.search(
        "compares ScaNN's builds alone.*" + re.escape(install_line("faiss")), caplog.text
    )


@pytest.fixture(scope="module")
def vectors():
    return clustered_vectors(300, 1_000, 8)


# Five builds take seconds.
@pytest.fixture(scope="module")
def fastest(vectors):
    """The choice among all builds, of vectors as few as trees take."""
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "MIN_TREE_NUMBERS", 0)
        config = RetrievalConfig(index="fastest", target_recall=0.9)
        popularity = np.arange(len(vectors[1]))
        yield build_index(
            vectors[1], config, normalized=True, queries=vectors[0], popularity=popularity
        )


@pytest.mark.slow
def test_the_fastest_of_all_builds_reaches_the_target_and_says_what_it_was_chosen_from(
    fastest, vectors, tmp_path
):
    users, items = vectors
    truth = ExactIndex(items).search(users, 10)[1]
    assert list_recall(fastest.search(users, 10)[1], truth) >= 0.89
    compared = fastest.tuning.compared
    assert {build.kind for build in compared} == {"scann_tree", "scann_tree_ah", "faiss_ivf"}
    assert len(compared) == 5 and [build.chosen for build in compared].count(True) == 1
    assert all(build.recall >= 0.9 and build.milliseconds > 0 for build in compared)
    assert len(fastest.tuning.recall_by_decile) == 10
    save_index(fastest, tmp_path)
    loaded = load_index(tmp_path, items)
    assert loaded.tuning.compared == compared and loaded.kind == fastest.kind
    text = format_tuning(loaded.tuning)
    assert "Builds compared over 1,000 items, for queries:" in text and text.count("faiss_ivf") >= 2


def test_an_index_over_changed_vectors_is_built_as_before(vectors, monkeypatch):
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    monkeypatch.setattr(build_module, "MIN_TREE_NUMBERS", 0)
    monkeypatch.setattr(build_module, "MIN_SCANN_VECTORS", 900)
    monkeypatch.setattr(comparison, "seconds_per_query", None)  # nothing is compared
    users, items = vectors
    config = RetrievalConfig(index="fastest", target_recall=0.8)
    options = {"normalized": True, "queries": users[:100]}
    for before in (fake_index(LISTS[1], 1_000), fake_index(TREE, 1_000)):
        again = build_index(items[:-100], config, **options, like=before)
        # ScaNN takes so few items for brute force.
        kept = build_of(before) if before.kind == "faiss_ivf" else None
        assert build_of(again) == kept


@pytest.mark.parametrize("optimize_for", ["queries", "batches"])
def test_each_of_two_indexes_is_timed_on_what_it_is_for(optimize_for, vectors, monkeypatch):
    """By a clock that ticks once for each search, and thrice for each of the second."""
    clock = {"now": 0.0}
    asked = {"first": [], "second": []}

    class Ticking(FakeIndex):
        def __init__(self, name, ticks):
            super().__init__(fake_index(TREE, 1_500).tuning)
            self.name = name
            self.ticks = ticks

        def search(self, queries, k):
            clock["now"] += self.ticks
            asked[self.name].append(len(queries))

    monkeypatch.setattr(comparison.time, "process_time", lambda: clock["now"])
    one, other = seconds_per_query(
        Ticking("first", 1.0), Ticking("second", 3.0), vectors[0], 10, optimize_for
    )
    assert other == 3 * one > 0
    assert set(asked["first"]) == ({1} if optimize_for == "queries" else {300})
