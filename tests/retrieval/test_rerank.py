"""Diversified lists against loops that follow the formula."""

import dataclasses
import shutil

import numpy as np
import pytest

from twotower.config import RerankConfig
from twotower.core.errors import ConfigError
from twotower.retrieval.rerank import (
    RERANKERS,
    cap_per_label,
    maximal_marginal_relevance,
    parse_rerank,
)
from twotower.retrieval.retriever import Retriever


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


@pytest.mark.parametrize("diversity", [0.2, 0.9])
def test_marginal_relevance_of_many_candidates_is_that_of_all_compared(diversity):
    """The best of them are much alike: what comes next is soon none of the few that are near."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(3, 8)).repeat([600, 300, 600], axis=0)
    vectors = centres + 0.3 * rng.normal(size=(1_500, 8))
    scores = np.repeat([0.9, 0.6, 0.2], [600, 300, 600]) + 0.1 * rng.normal(size=1_500)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units.T
    expected = [int(np.argmax(scores))]
    while len(expected) < 120:
        worth = (1 - diversity) * scores - diversity * cosines[expected].max(axis=0)
        worth[expected] = -np.inf
        expected.append(int(np.argmax(worth)))
    for k in (120, 7):
        found = maximal_marginal_relevance(scores, vectors, k, diversity=diversity)
        assert found.tolist() == expected[:k]


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


def known_users(retriever, count=3):
    return retriever.bundle.users["user_id"][:count].to_pylist()


def items_and_scores(recommendations):
    return [(item.item_id, item.score) for item in recommendations]


def test_lists_are_chosen_from_a_multiple_of_their_length(retriever):
    """By hand: the candidates of a plain list, and the function on their vectors."""
    user = known_users(retriever)[0]
    plain = retriever.recommend(user, k=20)
    vectors = retriever.item_vectors([item.item_id for item in plain])
    scores = np.array([item.score for item in plain])
    chosen = maximal_marginal_relevance(scores, vectors, 5, diversity=0.5)
    assert chosen.tolist() != [0, 1, 2, 3, 4]
    mmr = {"kind": "mmr", "multiple": 4, "options": {"diversity": 0.5}}
    found = retriever.recommend(user, k=5, rerank=mmr)
    assert items_and_scores(found) == items_and_scores([plain[i] for i in chosen])


def test_caps_hold_and_filters_too(retriever):
    caps = {"kind": "caps", "options": {"column": "category", "max_items": 1}, "multiple": 20}
    for user in known_users(retriever):
        seen = {item.item_id for item in retriever.latest_items(user, k=100)}
        found = retriever.recommend(user, k=4, rerank=caps)
        categories = [item.display["category"] for item in found]
        assert len(set(categories)) == len(categories) == 4
        assert not seen & {item.item_id for item in found}


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", RerankConfig()),
        ("mmr", RerankConfig(kind="mmr")),
        (
            "caps:column=category, max_items=2,multiple=9",
            RerankConfig(kind="caps", multiple=9, options={"column": "category", "max_items": 2}),
        ),
    ],
)
def test_a_text_names_a_kind_with_options(text, config):
    assert parse_rerank(text) == config


def test_many_users_get_the_lists_of_each(retriever):
    users = known_users(retriever)
    lists = retriever.recommend_many(users, 4, rerank="mmr").to_pylist()
    for user in users:
        alone = retriever.recommend(user, k=4, rerank="mmr")
        rows = [row for row in lists if row["user_id"] == user]
        assert [row["item_id"] for row in rows] == [item.item_id for item in alone]
        assert [row["rank"] for row in rows] == [1, 2, 3, 4]


def test_the_configuration_of_the_bundle_is_the_default(retriever):
    user = known_users(retriever)[0]
    options = {"column": "category", "max_items": 1}
    config = RerankConfig(kind="caps", options=options)
    configured = reconfigured(retriever, config)
    assert configured.recommend(user, k=3) == retriever.recommend(user, k=3, rerank=config)
    assert configured.recommend(user, k=3, rerank="") == retriever.recommend(user, k=3)


def reconfigured(retriever, rerank):
    """The retriever of the same bundle with another section of re-ranking."""
    bundle = retriever.bundle
    retrieval = dataclasses.replace(bundle.config.retrieval, rerank=rerank)
    config = dataclasses.replace(bundle.config, retrieval=retrieval)
    return Retriever(dataclasses.replace(bundle, config=config, folder=None))


def test_new_items_are_candidates_too(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "bundle")
    live = Retriever.load(tmp_path / "bundle")
    user = known_users(live)[0]
    best = live.recommend(user, k=2)
    twin = live.item_vectors([best[0].item_id])
    live.upsert([{"item_id": "twin", "category": "new"}], vectors=twin)
    mmr = {"kind": "mmr", "options": {"diversity": 1.0}}
    found = [item.item_id for item in live.recommend(user, k=5, rerank=mmr)]
    twins = {"twin", best[0].item_id}
    assert {item.item_id for item in live.recommend(user, k=2)} == twins
    # Of two equal vectors one is enough.
    assert len(twins & set(found)) == 1
    caps = {"kind": "caps", "options": {"column": "category", "max_items": 1}, "multiple": 20}
    assert "twin" in [item.item_id for item in live.recommend(user, k=5, rerank=caps)]


@pytest.mark.parametrize(
    ("rerank", "message"),
    [
        ("diversity", "rerank.kind='diversity' is not known; did you mean 'mmr'"),
        ({"kind": "mmr", "options": {"diversty": 1}}, "no field 'diversty'; did you mean 'diver"),
        ({"kind": "mmr", "options": {"diversity": 2.0}}, "options.diversity=2.0 must be between"),
        ({"kind": "caps"}, "options has no column, which CapsOptions needs"),
        ({"kind": "caps", "options": {"column": "categry"}}, "did you mean 'category'"),
        ("mmr:diversity", "'diversity' must be an option with its value"),
        ("mmr:diversty=0.1", "did you mean 'diversity'"),
        ({"kid": "caps"}, "rerank has no field 'kid'; did you mean 'kind'"),
        ({"multiple": 0}, "rerank.multiple=0 must be at least 1"),
    ],
)
def test_wrong_choices_are_refused(retriever, rerank, message):
    with pytest.raises(ConfigError, match=message):
        retriever.recommend(known_users(retriever)[0], k=3, rerank=rerank)


@pytest.mark.parametrize("chosen", [[0, 0], [0, 99], [-1], [0, 1, 2, 3]])
def test_a_reranker_that_chooses_what_is_not_there_is_refused(retriever, chosen, monkeypatch):
    monkeypatch.setitem(RERANKERS, "mine", lambda candidates, k: np.array(chosen))
    with pytest.raises(ConfigError, match="rerank.kind='mine' chose"):
        retriever.recommend(known_users(retriever)[0], k=3, rerank="mine")
