"""Metrics against trec_eval, the reference implementation of the field, and masking against
slicing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytrec_eval

from tests.evaluation.test_evaluate import make
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.evaluation import metrics
from twotower.evaluation.evaluate import check_metric_name, evaluate

K = 12
# Our names -> those of trec_eval; the reciprocal rank is of a whole list, so lists are cut to K.
TREC_NAMES = {
    "recall": f"recall_{K}",
    "precision": f"P_{K}",
    "hit_rate": f"success_{K}",
    "ndcg": f"ndcg_cut_{K}",
    "mrr": "recip_rank",
    "map": f"map_cut_{K}",
    "map_of_all": f"map_cut_{K}",
}


def trec_eval(ranked, relevant):
    """The metrics of lists of items, by trec_eval: {name: float [Q]}."""
    judged = {str(q): {str(i): 1 for i in items} for q, items in enumerate(relevant)}
    # trec_eval sorts by score: the first item of a list has the greatest.
    lists = {str(q): {str(i): -rank for rank, i in enumerate(x[:K])} for q, x in enumerate(ranked)}
    lists = {q: {i: float(score) for i, score in scores.items()} for q, scores in lists.items()}
    wanted = {f"{name}.{K}" for name in ("recall", "P", "success", "ndcg_cut", "map_cut")}
    found = pytrec_eval.RelevanceEvaluator(judged, wanted | {"recip_rank"}).evaluate(lists)
    values = {
        name: np.array([found[str(q)][theirs] for q in range(len(ranked))])
        for name, theirs in TREC_NAMES.items()
    }
    # MAP@K divides by min(|relevant|, K), trec_eval by |relevant| though a list holds but K.
    sizes = np.array([len(items) for items in relevant])
    values["map"] *= sizes / np.minimum(sizes, K)
    # trec_eval knows the first answer alone.
    values["mrr_of_all"] = np.array([mrr_of_all(*pair) for pair in zip(ranked, relevant)])
    return values


def mrr_of_all(ranked, relevant):
    return sum(1 / rank for rank, i in enumerate(ranked[:K], 1) if i in relevant) / len(relevant)


@functools.cache
def jitted(name):
    return jax.jit(metrics.RANKING_METRICS[name])


@pytest.fixture(scope="module")
def lists():
    """200 lists of 12 of 30 items, and from 1 to 24 relevant items for each."""
    rng = np.random.default_rng(0)
    ranked = [rng.permutation(30)[:K].tolist() for _ in range(200)]
    relevant = [set(rng.permutation(30)[: rng.integers(1, 25)].tolist()) for _ in range(200)]
    relevant[0] = set(ranked[0][:5])  # all found at the top
    relevant[1] = {99}  # none found
    return ranked, relevant


def hits_of(ranked, relevant):
    hits = [[item in known for item in items] for items, known in zip(ranked, relevant)]
    return jnp.array(hits), jnp.array([len(known) for known in relevant])


@pytest.mark.parametrize("name", metrics.RANKING_METRICS)
def test_equals_trec_eval(lists, name):
    expected = trec_eval(*lists)[name]
    np.testing.assert_allclose(jitted(name)(*hits_of(*lists)), expected, rtol=1e-5)


def test_one_pass_over_several_lengths_equals_each_metric_at_each_length(lists):
    hits, num_relevant = map(np.asarray, hits_of(*lists))
    num_relevant = np.where(np.arange(len(hits)) == 3, 0, num_relevant)  # nothing to find
    ks = (1, 5, K)
    figures = metrics.ranking_figures(hits, num_relevant, ks)
    assert list(figures) == [f"{name}@{k}" for k in ks for name in metrics.RANKING_METRICS]
    for k in ks:
        for name, metric in metrics.RANKING_METRICS.items():
            expected = np.where(num_relevant > 0, metric(hits[:, :k], num_relevant), 0.0)
            found = np.where(num_relevant > 0, figures[f"{name}@{k}"], 0.0)
            np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=f"{name}@{k}")
    counts = np.arange(len(hits) * K).reshape(len(hits), K)
    where = counts % 3 > 0
    information = metrics.self_information(counts, 30, 10)
    for k, means in zip(ks, metrics.means_at(information, where, ks)):
        expected = metrics.novelty(counts[:, :k], 30, 10, where=where[:, :k])
        np.testing.assert_allclose(means, expected, rtol=1e-12)


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("num_items", [70, 9])
def test_an_evaluation_of_a_corpus_equals_trec_eval(num_items, mask_seen):
    """From scores with ties to averages, with seen items, relevant items outside of the corpus,
    queries without any, and a corpus shorter than the lists."""
    rng = np.random.default_rng(1)
    num_queries = 90
    scores = rng.integers(-9, 9, (num_queries, num_items)).astype(np.float32)
    seen = [rng.permutation(num_items)[: rng.integers(0, 40)] for _ in range(num_queries)]
    relevant = [rng.permutation(num_items)[: rng.integers(0, 20)] for _ in range(num_queries)]
    outside = rng.integers(0, 3, num_queries)
    relevant[7] = relevant[7][:0]
    outside[7] = 0
    queries = make(np.arange(num_queries), relevant, seen, num_items, missing=outside)
    found = evaluate(lambda chosen: scores[chosen], queries, (K,), mask_seen=mask_seen)

    ranked = []
    judged = []
    for query in range(num_queries):
        masked = set(seen[query].tolist()) if mask_seen else set()
        # Of equals a right answer is the last.
        is_right = np.isin(np.arange(num_items), relevant[query])
        order = np.lexsort((is_right, -scores[query]))
        ranked.append([item for item in order.tolist() if item not in masked])
        missing = [f"outside {number}" for number in range(outside[query])]
        judged.append({*relevant[query].tolist()} - masked | {*missing})
    kept = [query for query in range(num_queries) if judged[query]]
    expected = trec_eval([ranked[query] for query in kept], [judged[query] for query in kept])
    assert found["queries"] == len(kept) < num_queries
    for name, values in expected.items():
        assert found[f"{name}@{K}"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("name", metrics.RANKING_METRICS)
def test_masking_equals_slicing(lists, name):
    hits, num_relevant = hits_of(*lists)
    metric = jitted(name)
    top = jnp.broadcast_to(jnp.arange(K) < 5, hits.shape)
    np.testing.assert_array_equal(
        metric(hits, num_relevant, where=top), metric(hits[:, :5], num_relevant)
    )
    odd = jnp.broadcast_to(jnp.arange(K) % 2 == 1, hits.shape)
    np.testing.assert_allclose(
        metric(hits, num_relevant, where=odd), metric(hits[:, 1::2], num_relevant), rtol=1e-6
    )


@pytest.mark.parametrize("name", metrics.RANKING_METRICS)
def test_a_perfect_list_is_one_and_an_empty_one_zero(name):
    # Precision of a perfect list is 1 only where there is something to fill it with.
    hits = jnp.array([[True] * 7, [False] * 7, [False] * 7])
    values = jitted(name)(hits, jnp.array([7, 7, 0]))
    # Reciprocals of seven ranks cannot all be 1.
    perfect = np.mean(1 / np.arange(1, 8)) if name == "mrr_of_all" else 1.0
    np.testing.assert_allclose(values, [perfect, 0.0, 0.0], rtol=1e-6)


def test_ndcg_and_map_are_normalised_by_what_fits_in_the_list():
    hits = jnp.ones((1, 3), bool)
    num_relevant = jnp.array([10])
    np.testing.assert_allclose(jitted("ndcg")(hits, num_relevant), 1.0, rtol=1e-6)
    np.testing.assert_allclose(jitted("map")(hits, num_relevant), 1.0, rtol=1e-6)
    np.testing.assert_allclose(jitted("recall")(hits, num_relevant), 0.3, rtol=1e-6)


def test_novelty_is_the_mean_self_information():
    counts = jnp.array([[7, 0, 3], [1, 1, 1]])
    where = jnp.array([[True, True, False], [True, True, True]])
    expected = [np.mean([-math.log2(8 / 40), -math.log2(1 / 40)]), -math.log2(2 / 40)]
    novelty = jax.jit(metrics.novelty)
    np.testing.assert_allclose(novelty(counts, 30, 10, where=where), expected, rtol=1e-6)


def test_never_trained_counts_only_real_items():
    counts = jnp.array([[0, 5, 0], [0, 0, 0]])
    where = jnp.array([[True, True, False], [False, False, False]])
    assert jax.jit(metrics.never_trained)(counts, where=where).tolist() == [0.5, 0.0]


def test_gini_is_the_mean_difference_of_two_items_over_twice_the_mean():
    exposures = np.random.default_rng(0).integers(0, 50, 40)
    apart = np.abs(exposures[:, None] - exposures[None, :])
    # Of pairs of two items: an item is not compared with itself.
    expected = apart.sum() / (40 * 39) / (2 * exposures.mean())
    assert metrics.gini(exposures) == pytest.approx(expected)
    assert metrics.gini(np.array([0, 0, 9])) == pytest.approx(1.0)
    assert metrics.gini(np.array([3, 3, 3])) == metrics.gini(np.zeros(3, int)) == 0.0


def test_the_long_tail_is_what_the_most_popular_fifth_is_not():
    tail = metrics.is_long_tail(np.array([5, 9, 9, 0, 1, 2, 3, 4, 6, 7]))
    assert np.flatnonzero(~tail).tolist() == [1, 2]


def test_coverage():
    assert metrics.coverage(jnp.array([True, False, False, True])) == 0.5


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [
        ("recal@10", "recall@10"),
        ("HR@10", "hit_rate@10"),
        ("hit-ratio@10", "hit_rate@10"),
        ("mean_average_precision@20", "map@20"),
        ("mrr", "mrr@10"),
        ("click/aucs", "click/auc"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_with_the_nearest(metric, nearest):
    values = {
        "evaluation": {"ks": (10, 20)},
        "objective": {"heads": {"click": {"label": "clicked"}}},
        "training": {"metric": metric},
    }
    with pytest.raises(ConfigError, match=f"metric='{metric}' is not known.*mean '{nearest}'"):
        check_metric_name(from_dict(values))
    # Each name that is offered is taken.
    check_metric_name(from_dict(values | {"training": {"metric": nearest}}))
    # Without validation rows it is not read.
    check_metric_name(from_dict(values | {"split": {"validation": 0.0}}))
