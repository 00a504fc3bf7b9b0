"""The tuner against a grid of all settings, on an index whose recall and work are known, and on
ScaNN."""

import json
import re
import sys

import numpy as np
import pytest

from tests.index.oracles import unit
from twotower.config import RetrievalConfig
from twotower.core.errors import ConfigError
from twotower.core.install import install_line
from twotower.index import tuning as tuner
from twotower.index.build import build_index, save_index
from twotower.index.exact import ExactIndex
from twotower.index.recall import isin_lists, list_recall, recall_by_decile
from twotower.index.tuning import Trial, TunableIndex, Tuning, tune
from twotower.index.tuning_report import check_plot, format_tuning, plot_tuning, save_plot


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(1_200, 8))), unit(rng.normal(size=(6_000, 8)))


def _products(queries, vectors):
    """Dot products of small matrices, without the threads of a BLAS, which cost more here."""
    return np.einsum("qd,nd->qn", queries, vectors)


class Partitioned:
    """Items in leaves by nearest centre, rounded codes in the place of hashed ones: what ScaNN
    does, in NumPy."""

    def __init__(self, items, leaves, digits):
        self.items = items
        self.centres = items[:: len(items) // leaves][:leaves]
        self.leaf = (items @ self.centres.T).argmax(1)
        self.codes = np.round(items, digits)

    def search(self, queries, k, leaves, reorder):
        order = np.argsort(-_products(queries, self.centres), axis=1, kind="stable")
        rank = np.argsort(order, axis=1)  # of each leaf among those of the query
        inside = rank[:, self.leaf] < leaves
        if reorder:
            rough = np.where(inside, _products(queries, self.codes), -np.inf)
            position = max(0, rough.shape[1] - reorder)
            inside &= rough >= np.partition(rough, position, axis=1)[:, [position]]
        scores = np.where(inside, _products(queries, self.items), -np.inf)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(scores, rows, 1)
        return found, np.where(np.isneginf(found), -1, rows)


def tunable(search, num_items=500, num_leaves=8, hashed=False, target_recall=0.9):
    return TunableIndex(search, num_items, num_leaves, hashed, target_recall)


@pytest.fixture(scope="module")
def partitioned(vectors):
    """(100 user vectors, 500 item vectors, an index of eight leaves over them)."""
    users = vectors[0][:100]
    items = vectors[1][:500]
    return users, items, Partitioned(items, 8, 2)


@pytest.mark.parametrize("hashed", [False, True])
def test_the_choice_is_the_cheapest_of_a_full_grid(vectors, hashed):
    users = vectors[0][:200]
    items = vectors[1][:1_000]
    index = Partitioned(items, 16, 1)
    task = tunable(index.search, 1_000, 16, hashed)
    (effort, *_), trials, _ = tune(task, items, users, 10)
    tuning = users[::2]
    _, truth = ExactIndex(items).search(tuning, 10)

    def reaches_target(leaves, reorder):
        _, rows = index.search(tuning, 10, leaves, reorder)
        recalls = isin_lists(truth, rows).mean(1)
        return recalls.mean() - 1.64 * recalls.std() / np.sqrt(len(recalls)) >= 0.9

    reorders = (320, 160, 80, 40, 20) if hashed else (0,)
    grid = [
        (task.cost(leaves, reorder), leaves, reorder)
        for leaves in range(1, 17)
        for reorder in reorders
        if reaches_target(leaves, reorder)
    ]
    assert (effort.leaves, effort.reorder) == min(grid)[1:]
    tried = [trial for trial in trials if trial.k == 10]
    assert len(tried) < (32 if hashed else 8)  # of the 80 and 16 of a grid
    held_out = users[1::2]
    _, found = index.search(held_out, 10, effort.leaves, effort.reorder)
    recall = list_recall(found, ExactIndex(items).search(held_out, 10)[1])
    assert effort.recall == pytest.approx(recall, abs=1e-4)
    assert effort.recall >= 0.9
    assert effort.queries == 100


def test_users_who_tune_and_users_who_measure_are_different(partitioned):
    users, items, index = partitioned
    searched = []

    def search(queries, *setting):
        searched.append({row.tobytes() for row in queries})
        return index.search(queries, *setting)

    tune(tunable(search, target_recall=0.8), items, users, 10)
    assert {row.tobytes() for row in users} == set().union(*searched)
    assert not searched[0] & searched[-1]


def test_the_margin_is_1_64_standard_errors(partitioned):
    """A target that the mean reaches and the mean less its margin does not is not reached."""
    users, items, index = partitioned
    half = tuner._every_second(users, ExactIndex(items).search(users, 10), first=0)
    _, rows = index.search(half.queries, 10, 3, 0)
    recalls = isin_lists(half.rows, rows).mean(1)
    margin = 1.64 * recalls.std() / np.sqrt(50)
    for margins_below, reached in ((0.9, False), (1.1, True)):
        target = float(recalls.mean() - margins_below * margin)
        task = tunable(index.search, target_recall=target)
        trial = tuner._run_trial(task, half, 10, 3, 0)
        assert trial.reached is reached
        assert trial.margin == pytest.approx(margin, abs=1e-4)


def test_held_out_users_who_need_more_leaves_get_them(partitioned):
    users, items, index = partitioned
    half = tuner._every_second(users, ExactIndex(items).search(users, 10), first=1)
    leaves, _, recalls = tuner._raise_to_held_out(tunable(index.search), half, 10, 1, 0)
    assert leaves > 1
    assert recalls.mean() >= 0.9


def test_an_index_that_reaches_the_target_at_no_effort_gets_none(partitioned):
    users, items, _ = partitioned

    def find_nothing(queries, k, *setting):
        shape = (len(queries), k)
        return np.full(shape, -np.inf), np.full(shape, -1)

    efforts, trials, _ = tune(tunable(find_nothing), items, users, 10)
    assert efforts == ()
    assert [trial.leaves for trial in trials] == [1, 2, 4, 8]


def test_of_equal_scores_any_item_is_found():
    """Five hundred copies of one item: which of them come back is nobody's loss."""
    items = np.ones((500, 4), np.float32)
    users = np.ones((40, 4), np.float32)

    def find_the_last(queries, k, *setting):
        rows = np.tile(np.arange(499, 499 - k, -1), (len(queries), 1))
        return np.full(rows.shape, 4.0), rows

    efforts, _, _ = tune(tunable(find_the_last, target_recall=0.99), items, users, 10)
    assert efforts[0].leaves == 1
    assert efforts[0].recall == 1.0


def test_recall_by_decile_is_counted_by_hand():
    # Each value twice: ten tenths of two items.
    popularity = np.array([5, 0, 9, 1, 7, 3, 2, 8, 4, 6] * 2)
    truth = np.array([[0, 1], [1, 2], [10, 3]])
    rows = np.array([[1, 9], [2, 8], [3, 4]])
    # The items 0 and 10 have 5 (decile 5), 1 has 0 (decile 0), 2 has 9 (decile 9), 3 has 1 (decile
    # 1).
    expected = [0.5, 1.0, None, None, None, 0.0, None, None, None, 1.0]
    assert list(recall_by_decile(rows, truth, popularity)) == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64])
def test_isin_lists_equals_a_loop(dtype):
    """Of any type of rows, also ScaNN's unsigned ones, in which -1 is the greatest number."""
    rng = np.random.default_rng(0)
    truth, rows = rng.integers(-1, 30, (6, 5)), rng.integers(-1, 30, (6, 8))
    expected = [
        [value in row and value != -1 for value in line]
        for line, row in zip(truth.tolist(), rows.tolist())
    ]
    assert isin_lists(truth.astype(dtype), rows.astype(dtype)).tolist() == expected
    assert isin_lists(truth, rows.astype(dtype)).tolist() == expected


@pytest.fixture(scope="module", params=["scann_tree", "scann_tree_ah"])
def built(request, vectors):
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    popularity = np.arange(len(vectors[1]))
    config = RetrievalConfig(index=request.param, target_recall=0.9, k=10)
    return build_index(
        vectors[1], config, normalized=True, queries=vectors[0][::2], popularity=popularity
    )


@pytest.mark.parametrize("k", [3, 10, 40, 100, 300])
def test_users_never_tuned_on_find_the_target_at_every_length(built, vectors, k):
    """Lists shorter, as long as, between and beyond the tuned lengths."""
    others = vectors[0][1::2]
    assert (
        list_recall(built.search(others, k)[1], ExactIndex(vectors[1]).search(others, k)[1])
        >= 0.9 - 0.01
    )
    assert built.tuning.effort(k)[0] < built.tuning.num_leaves


def test_what_was_tried_is_kept_and_shown(built, tmp_path):
    save_index(built, tmp_path)
    info = json.loads((tmp_path / "index.json").read_text())
    assert len(info["tried"]) == len(built.tuning.tried) > 5 and len(info["recall_by_decile"]) == 10
    assert [e["k"] for e in info["efforts"]] == [10, 100]
    text = format_tuning(built.tuning)
    assert text.count("chosen") <= 2 and "by decile" in text and "Lists of 100" in text
    shown = [
        tuple(map(int, line.split()[:3])) for line in text.splitlines()[2:] if line.startswith("  ")
    ]
    tried = {(t.k, t.leaves, t.reorder): t for t in built.tuning.tried}
    assert set(shown) <= set(tried) and shown == sorted(shown, key=lambda t: (t[0], t[2], t[1]))
    assert {(e.k, e.leaves, e.reorder) for e in built.tuning.efforts} & set(tried) <= set(shown)
    for k, leaves, reorder in shown:  # the fewest leaves that reached the target, if any did
        enough = [
            t.leaves for t in tried.values() if (t.k, t.reorder) == (k, reorder) and t.reached
        ]
        assert leaves == min(enough) if enough else "too low" in text


def test_hashing_that_cannot_reach_its_target_gives_way_to_whole_vectors(vectors, monkeypatch):
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    monkeypatch.setattr(
        tuner, "REORDER_FACTORS", (1,)
    )  # as many candidates as the list is long: codes alone decide
    config = RetrievalConfig(index="scann_tree_ah", target_recall=0.99)
    index = build_index(vectors[1], config, normalized=True, queries=vectors[0])
    assert index.kind == "scann_tree" and index.tuning.efforts[0].recall >= 0.99


TRIALS = [
    Trial(10, leaves, 0, 0.8 + leaves / 100, 0.01, 1e4 / leaves, leaves > 4) for leaves in (2, 4, 8)
]


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    plot_tuning(TRIALS, 0.85, tmp_path / "index.png")
    assert (tmp_path / "index.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (check_plot, lambda path: plot_tuning(TRIALS, 0.9, path)):
        with pytest.raises(ConfigError, match=re.escape(install_line("plots"))):
            draw(tmp_path / "index.png")


def test_a_plot_is_a_file_or_a_reason(tmp_path):
    """Where a figure cannot be written, that is said before minutes of work."""
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    assert check_plot(tmp_path / "index") == tmp_path / "index.png"
    with pytest.raises(ConfigError, match=r"as '.xyz'. Known: .*png"):
        check_plot(tmp_path / "index.xyz")
    path = tmp_path / "new" / "index.png"
    exact = ExactIndex(np.eye(3, dtype=np.float32), normalized=True)
    assert "the exact index has nothing to tune" in save_plot(exact, path)
    assert not path.exists()
    tuning = Tuning(kind="scann_tree", num_items=9, dim=3, normalized=True, tried=tuple(TRIALS))
    exact.tuning = tuning
    assert str(path) in save_plot(exact, path) and path.exists()
