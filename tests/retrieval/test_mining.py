"""Hard negatives against a NumPy sort; what is known to be liked never among them."""

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.arrays import Ragged
from twotower.core.errors import QueryError
from twotower.pipeline.prepare import prepare
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.mining import make_miner, mine_hard_negatives

USERS = 6
ITEMS = 30
DIM = 4


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(n, DIM)).astype(np.float32) for n in (USERS, ITEMS))


@pytest.fixture
def known():
    """Two to four positives a user; the last user has none."""
    rng = np.random.default_rng(1)
    rows = np.repeat(np.arange(USERS - 1), [2, 3, 4, 2, 3])
    return Ragged.from_pairs(rows, rng.integers(0, ITEMS, len(rows)), num_rows=USERS).distinct()


def oracle(users, items, known, first, last, margin):
    """One user after the other, with Python lists."""
    pools = []
    for scores, positives in zip(users @ items.T, known):
        ranked = [i for i in np.argsort(-scores, kind="stable") if i not in positives][first:last]
        limit = scores[positives].mean() - margin if margin >= 0 and len(positives) else np.inf
        pools.append([int(i) for i in ranked if scores[i] <= limit])
    return pools


def lists(pools):
    """The pools as lists, after a look at what is behind their ends."""
    for items, size in zip(pools["items"], pools["sizes"]):
        assert (items[size:] == -1).all() and (items[:size] >= 0).all()
    return [items[:size].tolist() for items, size in zip(pools["items"], pools["sizes"])]


@pytest.mark.parametrize("margin", [-1.0, 0.0, 0.5])
@pytest.mark.parametrize("ranks", [(0, 5), (3, 12), (0, ITEMS)])
def test_pools_are_the_ranks_asked_for(vectors, known, ranks, margin, monkeypatch):
    monkeypatch.setattr(
        "twotower.retrieval.mining.USER_BLOCK", 4
    )  # more than one block of users, and of pairs
    monkeypatch.setattr("twotower.retrieval.mining.PAIR_BLOCK", 3)
    users, items = vectors
    pools = mine_hard_negatives(users, items, known, ranks=ranks, margin=margin)
    assert lists(pools) == oracle(users, items, known, *ranks, margin)
    assert pools["items"].shape == (USERS, ranks[1] - ranks[0]) and pools["items"].dtype == np.int32
    for user, pool in enumerate(lists(pools)):
        assert not set(pool) & set(known[user].tolist())


def test_the_margin_leaves_out_what_scores_like_a_positive(vectors, known):
    users, items = vectors
    sizes = [
        mine_hard_negatives(users, items, known, ranks=(0, ITEMS), margin=m)["sizes"]
        for m in (-1.0, 0.0, 1.0)
    ]
    assert (
        (sizes[0][:-1] > sizes[1][:-1]).all()
        and (sizes[1] >= sizes[2]).all()
        and sizes[1].sum() > sizes[2].sum()
    )
    assert sizes[0][-1] == sizes[2][-1] == ITEMS  # of a user without positives nothing is like one


def test_vectors_that_nothing_can_be_ranked_by_are_refused(vectors, known):
    users, items = vectors
    items[3] = np.nan
    with pytest.raises(QueryError, match="item vector 3 is not finite"):
        mine_hard_negatives(users, items, known, ranks=(0, 5))


def test_pools_of_a_model(run):
    """Of users as they stood at their latest training row, ranked by the weights given; users
    without rows have none."""
    prepared = run.prepared
    model = run.model
    pools = make_miner(prepared, model)(run.weights)
    train = prepared.train
    num_users = len(prepared.users)
    assert pools["items"].shape == (num_users, 90)  # ranks 10 to 100
    items = embed_rows(model, run.weights, "item", prepared.features["item"])
    asked = np.unique(train.user)
    assert (
        0 < len(asked) < num_users
        and (pools["sizes"][np.setdiff1d(np.arange(num_users), asked)] == 0).all()
    )
    for user in asked[:: len(asked) // 5]:
        rows = np.flatnonzero(train.user == user)
        latest = rows[np.flatnonzero(train.timestamp[rows] == train.timestamp[rows].max())[-1]]
        features = {name: x[[user]] for name, x in prepared.features["user"].items()}
        features |= {name: x[[latest]] for name, x in train.context.items()}
        vector = embed_rows(model, run.weights, "user", features)
        known = Ragged.from_pairs(np.zeros(len(rows)), train.item[rows], num_rows=1)
        (expected,) = oracle(vector, items, known, 10, 100, -1.0)
        assert lists(pools)[user] == expected
    assert not (set(prepared.features["user"]) & set(train.context)) and train.context


def test_shown_and_refused_items_are_mined_like_others(run):
    """Only rows with label 1 are known positives: what was shown and not taken may be the hardest
    negative of all."""
    features = {"user": dict(run.config.features.user), "item": dict(run.config.features.item)}
    values = {
        "data": {"source": "shop", "num_interactions": 3000},
        "features": features,
        "objective": {
            "label": "liked",
            "negatives": {"mined": 2, "mined_refresh": 100, "mined_ranks": (0, 5000)},
        },
    }
    prepared = prepare(from_dict(values))
    pools = make_miner(prepared, run.model)(run.weights)
    liked = prepared.is_positive("train")
    pairs = set(zip(prepared.train.user[liked], prepared.train.item[liked]))
    mined = {(user, item) for user, pool in enumerate(lists(pools)) for item in pool}
    refused = set(zip(prepared.train.user[~liked], prepared.train.item[~liked])) - pairs
    asked = {user for user, _ in pairs}
    assert not mined & pairs
    assert refused and {(u, i) for u, i in refused if u in asked} <= mined
