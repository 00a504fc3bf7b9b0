"""Diversified lists against loops that follow the formula."""

import numpy as np
import pytest

from twotower.retrieval.rerank import cap_per_label, maximal_marginal_relevance


def by_hand(scores, vectors, k, diversity):
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))  # noqa: E731
    chosen = [max(range(len(scores)), key=lambda i: scores[i])]
    while len(chosen) < k:
        left = [i for i in range(len(scores)) if i not in chosen]
        worth = {
            i: (1 - diversity) * scores[i]
            - diversity * max(cosine(vectors[i], vectors[j]) for j in chosen)
            for i in left
        }
        chosen.append(max(left, key=lambda i: worth[i]))
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.9, 1.0])
def test_marginal_relevance_is_the_formula(diversity):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=30)
    vectors = rng.normal(size=(30, 4))
    found = maximal_marginal_relevance(scores, vectors, 12, diversity=diversity)
    assert found.tolist() == by_hand(scores, vectors, 12, diversity)
    if diversity == 0:
        assert found.tolist() == np.argsort(-scores)[:12].tolist()


def test_ends_of_marginal_relevance():
    vectors = np.ones((3, 2))
    assert sorted(
        maximal_marginal_relevance(np.arange(3.0), vectors, 9, diversity=0.5).tolist()
    ) == [0, 1, 2]
    assert (
        maximal_marginal_relevance(np.zeros(0), np.zeros((0, 2)), 9, diversity=0.5).tolist() == []
    )
    with pytest.raises(ValueError, match="diversity=1.5"):
        maximal_marginal_relevance(np.arange(3.0), vectors, 2, diversity=1.5)


@pytest.mark.parametrize("most", [1, 2, {"a": 1, "b": 0}])
def test_caps_hold_in_order(most):
    labels = np.random.default_rng(1).choice(["a", "b", "c", None], 40).tolist()
    found = cap_per_label(labels, 12, max_items=most)
    kept = []
    counts = {}
    for place, label in enumerate(labels):
        bound = (
            10**9 if label is None else most if isinstance(most, int) else most.get(label, 10**9)
        )
        if counts.get(label, 0) < bound and len(kept) < 12:
            counts[label] = counts.get(label, 0) + 1
            kept.append(place)
    assert found.tolist() == kept


def test_a_list_from_a_retriever(retriever):
    """Fetched, diversified and capped, as a server does it."""
    found = retriever.recommend("nobody", k=60)
    vectors = retriever.item_vectors([item.item_id for item in found])
    scores = np.array([item.score for item in found])
    np.testing.assert_allclose(
        vectors @ retriever.encode_users([{"user_id": "nobody"}])[0], scores, atol=1e-5
    )
    order = maximal_marginal_relevance(scores, vectors, 20, diversity=0.4)
    assert order[0] == 0 and order.tolist() != list(range(20))
    shown = cap_per_label([found[place].display["category"] for place in order], 5, max_items=1)
    assert len({found[order[place]].display["category"] for place in shown}) == len(shown)
