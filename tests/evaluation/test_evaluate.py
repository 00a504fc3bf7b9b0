"""Evaluation against a loop over plain lists; ties, seen items, answers that nothing can find."""

import math

import numpy as np
import pytest

from twotower.core.arrays import Ragged
from twotower.core.errors import ScoreError
from twotower.evaluation import evaluate as module
from twotower.evaluation.evaluate import dot_scores, evaluate
from twotower.evaluation.queries import Queries

pytestmark = pytest.mark.slow

KS = (1, 5, 20)


def csr(lists):
    lengths = [len(x) for x in lists]
    return Ragged.from_pairs(
        np.repeat(np.arange(len(lists)), lengths), np.concatenate([*lists, []]), num_rows=len(lists)
    )


def make(user, right, seen, num_items, *, missing=None, counts=None):
    return Queries(
        user=np.array(user),
        relevant=csr(right),
        missing=np.zeros(len(user), np.int32) if missing is None else np.array(missing, np.int32),
        seen=csr(seen),
        counts=np.ones(num_items, np.int64) if counts is None else counts,
    )


def oracle(scores, queries, k, mask_seen):
    """One query after the other, with Python lists. A right answer sorts behind its equals."""
    totals = {}
    used = 0
    shown = set()
    lists = {}
    lifts = []
    popular = np.argsort(-queries.counts, kind="stable")[:k].tolist()
    total = int(queries.counts.sum())
    size = queries.num_items
    for q, user in enumerate(queries.user):
        seen = set(queries.seen[user].tolist()) if mask_seen else set()
        right = set(queries.relevant[q].tolist()) - seen
        number = len(right) + int(queries.missing[q])
        if not number:
            continue
        used += 1
        items = [n for n in range(size) if n not in seen]
        top = sorted(items, key=lambda n: (-scores[q][n], n in right, n))[:k]
        gains = [n in right for n in top] + [False] * (k - len(top))
        shown |= set(top)
        lists.setdefault(frozenset(top), []).append(user)
        if len(queries.seen[user]):
            before = queries.counts[queries.seen[user]].mean()
            lifts.append((np.mean([queries.counts[n] for n in top]) if top else 0.0, before))
        precisions = [sum(gains[:r]) / r for r, hit in enumerate(gains, 1) if hit]
        ideal = sum(1 / math.log2(r + 1) for r in range(1, min(number, k) + 1))
        for name, value in {
            "recall": sum(gains) / number,
            "precision": sum(gains) / k,
            "hit_rate": float(any(gains)),
            "ndcg": sum(hit / math.log2(r + 1) for r, hit in enumerate(gains, 1)) / ideal,
            "mrr": 1 / (gains.index(True) + 1) if any(gains) else 0.0,
            "map": sum(precisions) / min(number, k),
            "novelty": np.mean([-math.log2((queries.counts[n] + 1) / (total + size)) for n in top])
            if top
            else 0.0,
            "never_trained": np.mean([queries.counts[n] == 0 for n in top]) if top else 0.0,
            "average_popularity": np.mean([queries.counts[n] for n in top]) if top else 0.0,
            "short_list": len(top) < k,
            "serendipity": sum(n in right and n not in popular for n in top) / k,
        }.items():
            totals[name] = totals.get(name, 0.0) + value
    repeated = sum(len(users) for users in lists.values() if len(set(users)) > 1)
    listed, before = np.mean(lifts, axis=0)
    result = {name: value / used for name, value in totals.items()} | {
        "coverage": len(shown) / size,
        "repeated_list": repeated / used,
        "popularity_lift": listed / before - 1,
    }
    return result, used


@pytest.fixture
def problem():
    """60 queries of 25 users over 40 items; many ties, items unknown to training, users that saw
    nearly everything."""
    rng = np.random.default_rng(3)
    seen = [rng.permutation(40)[: rng.integers(0, 39)] for _ in range(25)]
    user = rng.integers(0, 25, 60)
    right = [rng.permutation(40)[: rng.integers(0, 9)] for _ in range(60)]
    queries = make(
        user, right, seen, 40, missing=rng.integers(0, 2, 60), counts=rng.integers(0, 4, 40)
    )
    queries = queries.take(np.flatnonzero(queries.num_relevant > 0))
    return rng.integers(-3, 4, (len(queries), 40)).astype(np.float32), queries


@pytest.fixture(params=["host", "device"])
def ranker(request, monkeypatch):
    """Both ways to rank: by NumPy, as on a CPU, and by a program, as on one accelerator."""
    if request.param == "device":

        def make_ranker(scores, queries, blocks, k):
            return module._DeviceRanker(queries, blocks, k)

        monkeypatch.setattr(module, "_make_ranker", make_ranker)
    return request.param


@pytest.mark.parametrize("mask_seen", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 4 * 40 * 7, 2**20])
def test_equals_a_loop_over_lists(problem, mask_seen, block_bytes, ranker):
    scores, queries = problem
    before = scores.copy()
    found = evaluate(lambda s: scores[s], queries, KS, mask_seen=mask_seen, block_bytes=block_bytes)
    for k in KS:
        expected, used = oracle(scores, queries, k, mask_seen)
        assert found["queries"] == used and found["queries_without_answer"] == len(queries) - used
        for name, value in expected.items():
            assert found[f"{name}@{k}"] == pytest.approx(value, rel=1e-5), f"{name}@{k}"
    np.testing.assert_array_equal(scores, before)


def test_both_protocols_at_once_equal_each_alone(problem, ranker):
    scores, queries = problem
    calls = []

    def score_block(block):
        calls.append(block)
        return scores[block]

    both = [x.figures for x in module.evaluate_both(score_block, queries, KS)]
    assert len(calls) == 1
    for found, mask_seen in zip(both, (True, False)):
        assert found == evaluate(lambda s: scores[s], queries, KS, mask_seen=mask_seen)
    assert both[0]["recall@5"] != both[1]["recall@5"]


def test_a_long_corpus_in_groups_equals_the_loop(ranker):
    """Long enough for groups of scores, of which most are never looked at, and many equals."""
    rng = np.random.default_rng(5)
    num_items = 3_333
    seen = [rng.permutation(num_items)[: rng.integers(0, 3_000)] for _ in range(20)]
    right = [rng.permutation(num_items)[:40] for _ in range(20)]
    queries = make(np.arange(20), right, seen, num_items)
    scores = rng.integers(-40, 40, (20, num_items)).astype(np.float32)
    both = [x.figures for x in module.evaluate_both(lambda s: scores[s], queries, KS)]
    for found, mask_seen in zip(both, (True, False)):
        for k in KS:
            for name, value in oracle(scores, queries, k, mask_seen)[0].items():
                assert found[f"{name}@{k}"] == pytest.approx(value, rel=1e-5), f"{name}@{k}"


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_right_answer_above_the_others_is_first(scale, ranker):
    # The other bound: being put behind equals must not put it behind what is really lower.
    scores = -np.ones((2, 20), np.float32) * scale
    # (Within one step of float32, 1e-7 of the value, the two cannot be told apart, and it is not
    # given the benefit.)
    two_steps = np.nextafter(np.nextafter(np.float32(-scale), np.float32(0)), np.float32(0))
    scores[0, 7] = scale
    scores[1, 3] = two_steps
    queries = make([0, 0], [[7], [3]], [[]], 20)
    assert evaluate(lambda s: scores[s], queries, (2,), mask_seen=False)["recall@2"] == 1.0


def test_an_answer_that_was_seen_cannot_be_asked_for_but_one_outside_the_corpus_is_missed():
    queries = make([0, 1, 2], [[3], [3, 4], []], [[3], [3], []], 10, missing=[0, 0, 1])
    scores = np.tile(np.arange(10, dtype=np.float32), (3, 1))
    found = evaluate(lambda s: scores[s], queries, (10,), mask_seen=True)
    assert found["queries"] == 2 and found["queries_without_answer"] == 1
    assert found["recall@10"] == pytest.approx((1 + 0) / 2)
    found = evaluate(lambda s: scores[s], queries, (10,), mask_seen=False)
    assert found["queries"] == 3 and found["recall@10"] == pytest.approx((1 + 1 + 0) / 3)


def test_nan_scores_are_refused(ranker):
    queries = make([0, 0], [[1], [2]], [[]], 5)
    scores = np.zeros((2, 5), np.float32)
    scores[1, 3] = np.nan
    with pytest.raises(ScoreError, match="queries 0 to 1 hold NaN"):
        evaluate(lambda s: scores[s], queries, (2,), mask_seen=True)


def test_dot_scores_are_dot_products():
    rng = np.random.default_rng(0)
    users = rng.normal(size=(6, 4)).astype(np.float32)
    items = rng.normal(size=(9, 4)).astype(np.float32)
    np.testing.assert_allclose(
        dot_scores(users, items)(slice(2, 5)), users[2:5] @ items.T, rtol=1e-5, atol=1e-6
    )
