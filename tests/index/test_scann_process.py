"""Input that ends a process, or that ScaNN itself answers wrongly without a word: the cases run in
another process, so that this one would live to tell."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.index.oracles import unit
from twotower.config import RetrievalConfig
from twotower.index.build import build_index, load_index, save_index

pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")

START = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
import numpy as np
import pyarrow as pa
from twotower.config import RetrievalConfig
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.scann import import_scann
from twotower.retrieval.live.catalogue import LiveCatalogue
rng = np.random.default_rng(0)
unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
items, users = unit(rng.normal(size=(1500, 8))), unit(rng.normal(size=(60, 8)))
KINDS = ("scann_tree", "scann_tree_ah", "scann_brute_force")
built = {}

def build(kind, items=items):
    config = RetrievalConfig(index=kind, target_recall=0.8)
    return build_index(items, config, normalized=True, queries=users)

def index_of(kind):
    if kind not in built:
        built[kind] = build(kind)
    return built[kind]
"""

# Name of a case -> (code, lines that it prints). They run one after the other.
CASES = {
    # ScaNN imports TensorFlow where there is one; it is hidden meanwhile, and there again
    # afterwards.
    "a TensorFlow of another version": (
        """
        import_scann()
        print("tensorflow" in sys.modules)
        own = sys.modules["tensorflow"] = types.ModuleType("tensorflow")
        import_scann()
        print(sys.modules.pop("tensorflow") is own)
        """,
        ["False", "True"],
    ),
    "vectors that are not finite": (
        """
        for value in (np.nan, np.inf):
            bad = items.copy()
            bad[7, 3] = value
            try:
                build("scann_tree", bad)
            except ValueError as error:
                print(error)
        """,
        ["item vector 7 is not finite (1 of 1500 are not)."] * 2,
    ),
    "a NaN that is upserted": (
        """
        index = index_of("scann_tree")
        table = lambda ids: pa.table({"item_id": pa.array(ids, pa.string())})
        names = table([str(n) for n in range(1500)])
        corpus = LiveCatalogue.build(index, items, names)
        wrong = [np.full((1, 8), np.nan), np.full((1, 8), np.inf), np.ones((1, 9)), np.ones((2, 8))]
        for vectors in wrong:
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
        for kind in KINDS:
            index, refusals = index_of(kind), set()
            for value in (np.nan, np.inf, -np.inf, 0.0):
                row = np.full((1, 8), value)
                for queries in (row, np.r_[users, row], [[value] + 7 * [0]]):
                    try:
                        print(index.search(np.asarray(queries, np.float32), 5))
                    except ValueError as error:
                        refusals.add(str(error)[str(error).index("is"):][:13])
            narrow, wide = users[:, :7], np.c_[users, users]
            for queries, k in ((narrow, 5), (wide, 5), (users[0], 5), (users, 0), (users, -1)):
                try:
                    print(index.search(queries, k))
                except ValueError as error:
                    refusals.add(str(error)[:18])
            print(*sorted(refusals), index.search(users, 5)[1].min() >= 0, sep="|")
        """,
        [
            "is not finite|is zero altho|k=-1 must be at le|k=0 must be at lea|query vectors are |"
            "query vectors must|True"
        ]
        * 3,
    ),
    "queries of any length": (
        """
        for kind in KINDS:
            index = index_of(kind)
            for length in (1e-35, 1e-8, 1e-4, 1e-2, 10.0, 1e30):
                for some in (users, users[:1]):
                    scores, rows = index.search((some * length).astype(np.float32), 5)
                    unit_scores, unit_rows = index.search(some, 5)
                    other = (rows != unit_rows).mean() > 0.02
                    if other or not np.allclose(scores / length, unit_scores, 1e-3, 1e-4):
                        print(kind, length, "is answered otherwise")
        """,
        [],
    ),
    "lists longer than what the leaves hold, and than the corpus": (
        """
        for kind in KINDS:
            index = index_of(kind)
            _, rows = index.search_with(users, 600, 1, 640)
            print((rows == 0).sum(1).max() <= 1, (rows == -1).any() or kind == "scann_brute_force")
            scores, rows = index.search(users[:2], 10**8)
            print(rows.shape, np.isneginf(scores[rows == -1]).all())
        """,
        ["True True", "(2, 1500) True"] * 3,
    ),
    "fewer candidates scored anew than the list is long": (
        """
        index = index_of("scann_tree_ah")
        print(index.search_with(users, 100, 38, 10)[1].shape)
        print(index.search(users, 700)[1].min() >= 0)
        """,
        ["(60, 100)", "True"],
    ),
    "no items, one, and no queries": (
        """
        print(ExactIndex(items[:0]).search(users[:2], 3)[1].tolist())
        print(build("scann_tree", items[:1]).search(users[:2], 3)[1].tolist())
        print(index_of("scann_tree").search(users[:0], 3)[1].shape)
        """,
        ["[[], []]", "[[0], [0]]", "(0, 3)"],
    ),
    "lists of another process": (
        """
        print(json.dumps(index_of("scann_tree_ah").search(users, 5)[1].tolist()))
        """,
        None,  # compared with those of this process
    ),
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Lines that each case prints; a case after which the process ended has none."""
    folder = tmp_path_factory.mktemp("tensorflow")
    (folder / "tensorflow.py").write_text("raise RuntimeError('undefined symbol')")
    code = START
    for case, (lines, _) in CASES.items():
        code += f"print({'== ' + case!r}, flush=True)\n" + textwrap.dedent(lines)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    found = {}
    for part in done.stdout.split("== ")[1:]:
        case, *lines = part.splitlines()
        found[case] = lines
    assert done.returncode == 0, f"ended after {list(found)[-1:]}: {done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("case", [case for case, (_, lines) in CASES.items() if lines is not None])
def test_neither_ends_the_process_nor_answers_wrongly(printed, case):
    assert printed[case] == CASES[case][1]


def test_two_processes_build_one_index_which_moves(printed, tmp_path):
    """Not seeded by the clock; and no absolute path in what is written."""
    rng = np.random.default_rng(0)
    items = unit(rng.normal(size=(1500, 8)))
    users = unit(rng.normal(size=(60, 8)))
    config = RetrievalConfig(index="scann_tree_ah", target_recall=0.8)
    index = build_index(items, config, normalized=True, queries=users)
    expected = index.search(users, 5)[1].tolist()
    (line,) = printed["lists of another process"]
    assert json.loads(line) == expected
    save_index(index, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    assert load_index(tmp_path / "second", items).search(users, 5)[1].tolist() == expected
