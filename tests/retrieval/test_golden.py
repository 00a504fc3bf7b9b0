"""The golden answers of a bundle: made again by whoever serves it."""

import copy
import shutil

import numpy as np
import pytest

from twotower.retrieval import golden
from twotower.retrieval.bundle import load_bundle
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def bundle(exported):
    return load_bundle(exported)


@pytest.fixture(scope="module")
def recorded(bundle):
    return bundle.read_golden()


def test_an_export_carries_requests_of_every_kind_and_a_server_reproduces_them(bundle, recorded):
    kinds = [kind for request in recorded["requests"] for kind in request]
    assert len(kinds) == golden.REQUESTS and set(kinds) == {"user", "item", "row"}
    assert golden.differences(bundle, recorded) == []
    assert golden.make(bundle)["answers"] == [
        [tuple(pair) for pair in answer] for answer in recorded["answers"]
    ]


def test_they_are_what_a_retriever_answers(bundle, recorded, exported):
    retriever = Retriever.load(exported)
    for request, answer in zip(recorded["requests"], recorded["answers"]):
        if "user" in request:
            found = retriever.recommend(request["user"])
        elif "item" in request:
            found = retriever.similar_items(request["item"])
        else:
            found = retriever.recommend(rows=[request["row"]])
        assert [item.item_id for item in found] == [item for item, _ in answer]
        scores = [score for _, score in answer]
        np.testing.assert_allclose([item.score for item in found], scores, atol=1e-5)


def test_a_change_to_the_items_is_no_difference(bundle, recorded, exported, tmp_path):
    copied = tmp_path / "bundle"
    shutil.copytree(exported, copied)
    best = recorded["answers"][0][0][0]
    retriever = Retriever.load(copied)
    assert retriever.delete([best]) == 1
    changed = Retriever.load(copied)
    assert best not in [item.item_id for item in changed.recommend(recorded["requests"][0]["user"])]
    assert golden.differences(changed.bundle, recorded) == []


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda answer: answer[0].__setitem__(1, answer[0][1] + 0.01), "score"),
        (lambda answer: answer[0].__setitem__(0, "nobody"), "'nobody' is missing"),
        (lambda answer: answer.pop(), "10 items in the place of 9"),
        (lambda answer: answer[0].__setitem__(1, float("nan")), "score"),
    ],
)
def test_another_answer_is_told_with_its_request(bundle, recorded, spoil, told):
    spoilt = copy.deepcopy(recorded)
    spoil(spoilt["answers"][40])
    (difference,) = golden.differences(bundle, spoilt)
    assert told in difference
    ((_, value),) = spoilt["requests"][40].items()
    assert repr(value) in difference


def test_near_ties_may_change_places(bundle, recorded):
    swapped = copy.deepcopy(recorded)
    answer = swapped["answers"][0]
    answer[0][0], answer[1][0] = answer[1][0], answer[0][0]
    assert golden.differences(bundle, swapped)
    answer[0][1] = answer[1][1] = (answer[0][1] + answer[1][1]) / 2
    near = abs(recorded["answers"][0][0][1] - answer[0][1]) <= golden.TOLERANCE
    assert bool(golden.differences(bundle, swapped)) != near


def test_events_of_a_model_without_histories_are_not_recommended_again(exported):
    retriever = Retriever.load(exported)
    user = retriever.bundle.users["user_id"][0].as_py()
    best = [item.item_id for item in retriever.recommend(user)]
    found = retriever.recommend(user, events=best[:2], k=8)
    assert [item.item_id for item in found] == best[2:]
