"""Every value of every column that lists can be filtered by, for every user, against exact search
over what is allowed."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.retrieval.runs import make_run
from twotower.index.tuning import TIE_TOLERANCE
from twotower.retrieval.export import make_bundle
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow

K = 10
TARGET = 0.95
# Values of a column; where there are more, a condition asks for every value in one of so many
# groups.
FEW = 20
TEXTS = ("item_id", "title", "title_ar", "category", "brand", "material")
NUMBERS = ("price", "created")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A retriever of 2,000 items with a tree, its users, and the scores of both."""
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    sections = {
        "data": {"num_items": 2_000},
        "retrieval": {"index": "scann_tree", "target_recall": TARGET},
    }
    bundle = make_bundle(make_run(tmp_path_factory.mktemp("shop"), **sections))
    assert (
        bundle.index.kind == "scann_tree"
        and bundle.index.tuning.efforts[0].leaves < bundle.index.tuning.num_leaves
    )
    return (
        Retriever(bundle),
        bundle.users["user_id"].to_pylist(),
        bundle.user_vectors @ bundle.vectors.T,
    )


def groups(column):
    """All distinct values, in at most `FEW` groups."""
    values = sorted(column.unique().to_pylist())
    return [values[n::FEW] for n in range(min(FEW, len(values)))]


def asked(items):
    """(column, condition, which items satisfy it) of every value: alone or in its group, all
    others, and up to and beyond it."""
    for name in (*TEXTS, *NUMBERS):
        for group in groups(items[name]):
            value = group if len(group) > 1 else group[0]
            inside = np.isin(items[name].to_numpy(), group)
            yield name, (name, "in" if len(group) > 1 else "==", value), inside
            yield name, (name, "not in" if len(group) > 1 else "!=", value), ~inside
            if name in NUMBERS:
                upto = items[name].to_numpy() <= group[0]
                yield name, (name, "<=", group[0]), upto
                yield name, (name, ">", group[0]), ~upto


def found(retriever, users, condition, exclude_seen):
    """int [U, K], rows of the items found for each user; -1 beyond."""
    table = retriever.recommend_many(users, K, exclude_seen=exclude_seen, where=[condition])
    rows = np.full((len(users), K), -1)
    place = pc.index_in(table["user_id"], pa.array(users)).to_numpy()
    item = pc.index_in(
        table["item_id"], retriever.bundle.items["item_id"].combine_chunks()
    ).to_numpy()
    rows[place, table["rank"].to_numpy() - 1] = item
    return rows


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_every_filter_for_every_user(shop, exclude_seen):
    """No item is forbidden, lists are full whenever K exist, and the exact lists are found at the
    target, column by column."""
    retriever, users, scores = shop
    open_ = np.ones(scores.shape, bool)
    if exclude_seen:
        seen = retriever.bundle.seen
        open_[seen.rows, seen.values] = False
    recalls = {name: [] for name in (*TEXTS, *NUMBERS)}
    for name, condition, allowed in asked(retriever.bundle.items):
        rows = found(retriever, users, condition, exclude_seen)
        left = open_ & allowed
        taken = np.take_along_axis(left, np.maximum(rows, 0), axis=1)
        assert (taken | (rows < 0)).all(), condition
        exist = np.minimum(left.sum(1), K)
        ordered = -np.sort(-rows, axis=1)
        assert ((rows >= 0).sum(1) == exist).all() and (
            (np.diff(ordered) < 0) | (ordered[:, 1:] < 0)
        ).all(), condition
        best = -np.sort(-np.where(left, scores, -np.inf), axis=1)[:, :K]
        least = np.where(
            exist > 0,
            np.take_along_axis(best, np.maximum(exist - 1, 0)[:, None], axis=1)[:, 0],
            np.inf,
        )
        hits = (rows >= 0) & (
            np.take_along_axis(scores, np.maximum(rows, 0), axis=1)
            >= least[:, None] - TIE_TOLERANCE
        )
        recalls[name].append(hits.sum(1)[exist > 0] / exist[exist > 0])
        assert not recalls[name][-1].size or recalls[name][-1].mean() >= TARGET - 0.03, condition
    for name, shares in recalls.items():
        assert np.concatenate(shares).mean() >= TARGET, name
