"""Metrics that are asked for, against loops over pairs."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from tests.evaluation.test_evaluate import make
from twotower.core.errors import ConfigError
from twotower.evaluation import evaluate as module
from twotower.evaluation.evaluate import evaluate_both
from twotower.evaluation.further import FurtherMetrics, item_values
from twotower.evaluation.report.text import format_metrics

NUM_ITEMS = 12
KS = (2, 5, 30)


@pytest.fixture(scope="module")
def problem():
    """40 queries over 12 items, with few different scores, negative ones and zeros among them."""
    rng = np.random.default_rng(2)
    seen = [rng.permutation(NUM_ITEMS)[: rng.integers(0, 9)] for _ in range(15)]
    right = [rng.permutation(NUM_ITEMS)[: rng.integers(0, 5)] for _ in range(40)]
    missing = rng.integers(0, 2, 40)
    queries = make(rng.integers(0, 15, 40), right, seen, NUM_ITEMS, missing=missing)
    scores = rng.integers(-2, 3, (40, NUM_ITEMS)) * rng.choice([-1.0, 1.0], (40, NUM_ITEMS))
    return queries, scores.astype(np.float32)


def pairs_in_order(rights, others):
    return sum((right > other) + (right == other) / 2 for right in rights for other in others)


@pytest.mark.parametrize("ranker", ["host", "device"])
def test_auc_counts_pairs_of_a_right_answer_and_another_item(problem, ranker, monkeypatch):
    queries, scores = problem
    if ranker == "device":
        monkeypatch.setattr(
            module, "_make_ranker", lambda s, queries, x, k: module._DeviceRanker(queries, x, k)
        )
    both = evaluate_both(lambda s: scores[s], queries, KS, further=FurtherMetrics(auc=True))
    for evaluation, mask_seen in zip(both, (True, False)):
        values = []
        every_right = []
        every_other = []
        missing = 0
        for query, user in enumerate(queries.user):
            seen = set(queries.seen[user].tolist()) if mask_seen else set()
            right = set(queries.relevant[query].tolist()) - seen
            rights = [scores[query][item] for item in right]
            others = [scores[query][n] for n in range(NUM_ITEMS) if n not in seen | right]
            every_right += rights
            every_other += others
            missing += queries.missing[query]
            if rights or queries.missing[query]:
                # An answer outside of the corpus is behind all others.
                total = (len(rights) + queries.missing[query]) * len(others)
                values.append(pairs_in_order(rights, others) / total if total else 0.5)
        assert evaluation.figures["auc"] == pytest.approx(np.mean(values), rel=1e-12)
        total = (len(every_right) + missing) * len(every_other)
        expected = pairs_in_order(every_right, every_other) / total
        assert evaluation.figures["auc_of_all"] == pytest.approx(expected, rel=1e-12)
    assert both[0].figures["auc"] != both[1].figures["auc"]


def test_diversity_and_distinct_values_are_those_of_a_loop_over_pairs(problem):
    queries, scores = problem
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 3)) * [[3.0]]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    brand = np.arange(NUM_ITEMS) % 4 - 1
    further = FurtherMetrics(item_vectors=vectors, item_values={"brand": brand})
    # Without equals, so that the lists are known.
    scores = scores + np.linspace(0, 0.5, NUM_ITEMS, dtype=np.float32)
    masked, _ = evaluate_both(lambda s: scores[s], queries, KS, further=further)
    for k in KS:
        for query, user in enumerate(queries.user):
            order = np.argsort(-scores[query])
            top = [n for n in order if n not in queries.seen[user]][:k]
            apart = [1 - units[a] @ units[b] for a, b in itertools.combinations(top, 2)]
            expected = np.mean(apart) if apart else 0.0
            assert masked.values[f"diversity@{k}"][query] == pytest.approx(expected, abs=1e-12)
            brands = {brand[n] for n in top} - {-1}
            assert masked.values[f"distinct.brand@{k}"][query] == len(brands)
    table = format_metrics({"model": masked.figures}, KS)
    assert "diversity@2" in table and "distinct.brand@2" in table


def test_a_column_is_asked_for_by_name_and_a_misspelt_one_is_refused():
    items = pa.table({"item_id": ["a", "b", "c"], "brand": ["x", None, "x"]})
    values = item_values(items, ["auc", "distinct.brand"])
    assert values["brand"].tolist() == [0, -1, 0]
    with pytest.raises(ConfigError, match="distinct.brands: items have no column.*'brand'"):
        item_values(items, ["distinct.brands"])
    with pytest.raises(ConfigError, match="--further_metrics='acu' is not known.*'auc'"):
        item_values(items, ["acu"])


def test_a_figure_that_nothing_was_asked_for_is_a_dash():
    queries = make([0], [[]], [[]], 3)
    masked, _ = evaluate_both(lambda s: np.zeros((1, 3), np.float32), queries, (2,))
    table = format_metrics({"model": masked.figures}, (2,))
    assert "0.0000" not in table and "recall@2     " in table
