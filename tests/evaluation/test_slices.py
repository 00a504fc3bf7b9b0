"""Slices against an evaluation of the queries, or the right answers, of a slice alone."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from tests.evaluation.test_evaluate import make
from twotower.evaluation import slices
from twotower.evaluation.evaluate import evaluate, evaluate_both
from twotower.evaluation.metrics import RANKING_METRICS
from twotower.evaluation.report.slice_table import format_slices

KS = (3, 50)  # one of them longer than the corpus


@pytest.fixture(scope="module")
def problem():
    """200 queries of 90 users over 40 items, and two rankings without ties."""
    rng = np.random.default_rng(0)
    seen = [rng.permutation(40)[: rng.integers(0, 12)] for _ in range(90)]
    right = [rng.permutation(40)[: rng.integers(0, 6)] for _ in range(200)]
    queries = make(
        rng.integers(0, 90, 200),
        right,
        seen,
        40,
        missing=rng.integers(0, 2, 200),
        counts=rng.integers(0, 30, 40) * (np.arange(40) > 4),
    )
    scores = {name: rng.permuted(np.tile(np.arange(40.0), (200, 1)), axis=1) for name in "ab"}
    both = {name: evaluate_both(lambda s, x=x: x[s], queries, KS)[0] for name, x in scores.items()}
    evaluations = {"model": both["a"], "random": both["a"], "popularity": both["b"]}
    return queries, scores, evaluations


def accuracy(figures):
    return {name: x for name, x in figures.items() if name.partition("@")[0] in RANKING_METRICS}


def check(measured, queries, scores):
    """Compares the figures of a value with an evaluation of its queries alone."""
    for ranking, key in (("a", "model"), ("b", "baseline")):
        found = evaluate(lambda s, x=scores[ranking]: x[s], queries, KS, mask_seen=True)
        assert measured["queries"] == found["queries"]
        assert measured[key] == pytest.approx(accuracy(found), abs=1e-12)
    # Chance is no rival, though it is ahead here and there.
    assert measured["baseline_name"] == "popularity"


def test_a_slice_of_items_asks_for_its_own_right_answers_alone(problem):
    queries, scores, evaluations = problem
    parts = slices.default_slices(queries, np.arange(50))
    measured = slices.measure_slices(parts, queries, evaluations, KS)
    assert len(measured["item_popularity"]) > 7
    # From the least to the most popular, and named so, as in every other figure.
    parts_of = parts["item_popularity"].groups.values
    means = [queries.counts[parts_of == number].mean() for number in np.unique(parts_of)]
    assert means == sorted(means)
    assert "least" in parts["item_popularity"].values[0]
    for name in ("item_popularity", "items"):
        for number, value in enumerate(parts[name].values):
            if value in measured[name]:
                is_inside = parts[name].groups.values[queries.relevant.values] == number
                nothing = np.zeros_like(queries.missing)
                part = dataclasses.replace(
                    queries, relevant=queries.relevant.filter(is_inside), missing=nothing
                )
                check(measured[name][value], part, scores)
    assert measured["items"]["cold"]["queries"] > 10
    low, high = measured["items"]["warm"]["intervals"]["recall@3"]
    assert low < measured["items"]["warm"]["model"]["recall@3"] < high
    assert any("tenth 2" in line for line in format_slices(measured, 3))


def test_a_slice_of_queries_is_the_mean_over_them(problem):
    queries, scores, evaluations = problem
    parts = slices.default_slices(queries, np.arange(50))
    measured = slices.measure_slices(parts, queries, evaluations, KS)
    cold = np.array([row for row, user in enumerate(queries.user) if user >= 50])
    lengths = queries.seen.lengths[queries.user]
    scores_of = {name: x[cold] for name, x in scores.items()}
    check(measured["users"]["cold"], queries.take(cold), scores_of)
    middle = np.flatnonzero((lengths >= 3) & (lengths <= 5))
    scores_of = {name: x[middle] for name, x in scores.items()}
    check(measured["history"]["3 to 5"], queries.take(middle), scores_of)
    totals = [sum(x["queries"] for x in measured[name].values()) for name in ("users", "history")]
    assert totals == [evaluations["model"].is_averaged.sum()] * 2


def test_values_with_few_queries_are_joined_and_each_query_counts_once(problem, monkeypatch):
    queries, scores, evaluations = problem
    monkeypatch.setattr(slices, "MAX_VALUES", 2)
    texts = ["a", "b,c", "b,d", None, "", "c,d"]
    column = pa.chunked_array([[texts[row % 6] for row in range(200)]])
    part = slices._slice_by_values(column, ",", of_items=False)
    measured = slices.measure_slices({"tags": part}, queries, evaluations, KS)["tags"]
    assert list(measured)[-1] == "other (4 values)" and len(measured) == 3
    # "", a, the missing ones, and either c or d, which had less queries than the other.
    left = "c" if "d" in measured else "d"
    inside = [row for row in range(200) if texts[row % 6] in ("a", "", None)]
    inside += [row for row in range(200) if left in (texts[row % 6] or "")]
    inside = np.unique(inside)
    scores_of = {name: x[inside] for name, x in scores.items()}
    check(measured["other (4 values)"], queries.take(inside), scores_of)


def test_many_numbers_are_cut_into_ranges_and_few_are_not():
    numbers = pa.chunked_array([[*range(100), None]])
    part = slices._slice_by_values(numbers, "", of_items=False)
    assert list(part.values) == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"] + [
        "(missing)"
    ]
    assert part.groups.values.tolist() == [*np.repeat(range(5), 20), 5]
    part = slices._slice_by_values(pa.chunked_array([[3, 1, 3, None]]), "", of_items=True)
    assert list(part.values) == ["3", "1", "(missing)"] and part.of_items
    lists = slices._slice_by_values(pa.chunked_array([[["x", "y"], [], None]]), "", of_items=False)
    assert [members.tolist() for members in lists.groups] == [[0, 1], [2], [2]]
