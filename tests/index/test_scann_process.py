"""What ends a process, or is answered wrongly without a word, by ScaNN itself: each case in a
process of its own, guarded."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from twotower.config import RetrievalConfig
from twotower.index.build import build_index, save_index

pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")

START = """
import json, sys
import numpy as np
import pyarrow as pa
from twotower.config import RetrievalConfig
from twotower.index.exact import ExactIndex
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.index.build import build_index, load_index
rng = np.random.default_rng(0)
unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
items, users = unit(rng.normal(size=(1500, 8))), unit(rng.normal(size=(60, 8)))
config = lambda kind: RetrievalConfig(index=kind, target_recall=0.8)
build = lambda kind, items=items: build_index(items, config(kind), normalized=True, queries=users)
table = lambda ids: pa.table({"item_id": pa.array(ids, pa.string())})
"""
CASES = {
    "a NaN that is upserted": (
        """
        index = build("scann_tree")
        corpus = LiveCatalogue.build(index, items, table([str(n) for n in range(1500)]))
        for vectors in (np.full((1, 8), np.nan), np.full((1, 8), np.inf), np.ones((1, 9)), np.ones((2, 8))):
            try:
                corpus.upsert(*corpus.check(table(["new"]), vectors))
            except ValueError as error:
                print(str(error)[:40])
        print(len(corpus.snapshot), corpus.snapshot.search(users, 5)[1].min() >= 0)
    """,
        [
            "item vector 0 is not finite (1 of 1 are ",
            "item vector 0 is not finite (1 of 1 are ",
            "item vectors are of shape [1, 9]; of the",
            "item vectors are of shape [2, 8]; of the",
            "1500 True",
        ],
    ),
    "what is no query, one by one and in a batch": (
        """
        for kind in ("scann_tree", "scann_tree_ah", "scann_brute_force"):
            index, kinds = build(kind), set()
            for value in (np.nan, np.inf, -np.inf, 0.0):
                for queries in (np.full((1, 8), value), np.r_[users, np.full((1, 8), value)], [[value] + 7 * [0]]):
                    try:
                        print(index.search(np.asarray(queries, np.float32), 5))
                    except ValueError as error:
                        kinds.add(str(error)[str(error).index("is"):][:13])
            for queries, k in ((users[:, :7], 5), (np.c_[users, users], 5), (users[0], 5), (users, 0), (users, -1)):
                try:
                    print(index.search(queries, k))
                except ValueError as error:
                    kinds.add(str(error)[:18])
            print(sorted(kinds), index.search(users, 5)[1].min() >= 0)
    """,
        [
            "['is not finite', 'is zero altho', 'k=-1 must be at le', 'k=0 must be at lea', 'query vectors are ', "
            "'query vectors must'] True"
        ]
        * 3,
    ),
    "queries of any length": (
        """
        for kind in ("scann_tree", "scann_tree_ah", "scann_brute_force"):
            index = build(kind)
            for length in (1e-35, 1e-8, 1e-4, 1e-2, 10.0, 1e30):
                for these in (users, users[:1]):
                    found, where = index.search((these * length).astype(np.float32), 5)
                    one = index.search(these, 5)
                    if (where != one[1]).mean() > 0.02 or not np.allclose(found / length, one[0], rtol=1e-3, atol=1e-4):
                        print(kind, length, "is answered otherwise")
    """,
        [],
    ),
    "lists longer than what the leaves hold, and than the corpus": (
        """
        for kind in ("scann_tree", "scann_tree_ah", "scann_brute_force"):
            index = build(kind)
            _, rows = index.search_with(users, 600, 1, 640)
            print((rows == 0).sum(1).max() <= 1, (rows == -1).any() or kind == "scann_brute_force")
            scores, rows = index.search(users[:2], 1600)
            print(rows.shape, (rows[:, 1500:] == -1).all(), np.isneginf(scores[rows == -1]).all())
    """,
        ["True True", "(2, 1600) True True"] * 3,
    ),
    "fewer candidates scored anew than the list is long": (
        """
        index = build("scann_tree_ah")
        print(index.search_with(users, 100, 38, 10)[1].shape, index.search(users, 700)[1].min() >= 0)
    """,
        ["(60, 100) True"],
    ),
    "no items, one, and no queries": (
        """
        for count in (0, 1):
            index = build("scann_tree", items[:count]) if count else ExactIndex(items[:0])
            print(index.search(users[:2], 3)[1].tolist())
        print(build("scann_tree").search(users[:0], 3)[1].shape)
    """,
        ["[[-1, -1, -1], [-1, -1, -1]]", "[[0, -1, -1], [0, -1, -1]]", "(0, 3)"],
    ),
}


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("case", CASES)
def test_neither_ends_the_process_nor_answers_wrongly(case):
    code, expected = CASES[case]
    assert run(code) == expected


def test_two_processes_build_one_index_which_moves(tmp_path):
    """Not seeded by the clock; and no absolute path in what is written."""
    code = 'print(json.dumps(build("scann_tree_ah").search(users, 5)[1].tolist()))'
    rng = np.random.default_rng(0)
    items, users = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (rng.normal(size=(1500, 8)), rng.normal(size=(60, 8)))
    )
    config = RetrievalConfig(index="scann_tree_ah", target_recall=0.8)
    index = build_index(items, config, normalized=True, queries=users.astype(np.float32))
    (found,) = run(code)
    assert json.loads(found) == index.search(users, 5)[1].tolist()
    save_index(index, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    (loaded,) = run(
        "print(json.dumps(load_index(sys.argv[1], items).search(users, 5)[1].tolist()))",
        str(tmp_path / "second"),
    )
    assert loaded == found
