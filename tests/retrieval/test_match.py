"""Scores of pairs against the vectors they come from."""

import numpy as np
import pytest

from twotower.core.errors import BundleError, FolderError, UnknownIdError
from twotower.retrieval.match import MatchModel

IDS = {"user": ["u", "ü 1", ""], "item": ["a", "b", "日本", "d"]}


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return {side: rng.normal(size=(len(ids), 5)).astype(np.float32) for side, ids in IDS.items()}


@pytest.fixture
def saved(vectors, tmp_path):
    MatchModel(IDS, vectors).save(tmp_path / "match")
    return tmp_path / "match"


def test_scores_are_dot_products_of_the_named_vectors(vectors, saved):
    users = np.repeat(IDS["user"], 4)
    items = np.tile(IDS["item"], 3)
    expected = (vectors["user"] @ vectors["item"].T).ravel()
    for model in (MatchModel(IDS, vectors), MatchModel.load(saved)):
        np.testing.assert_allclose(model.match(users, items), expected, rtol=1e-5)
        assert model.match([], []).shape == (0,) and model.dim == 5


def test_unknown_ids_are_an_error_or_nan(saved):
    model = MatchModel.load(saved)
    with pytest.raises(UnknownIdError, match=r"item 'never' has no vector \(2 of 3 have none\)"):
        model.match(["u", "u", "u"], ["a", "never", "x"])
    with pytest.raises(UnknownIdError, match="user '7' has no vector"):
        model.match([7], ["a"])
    scores = model.match(["u", "u", "who"], ["a", "never", "a"], unknown="nan")
    assert np.isnan(scores).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["u"], ["a", "b"]), "1 user ids do not go with 2 item ids"),
        ((["u"], ["a"], "zero"), "unknown='zero' must be"),
    ],
)
def test_what_is_no_question(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        MatchModel.load(saved).match(
            *arguments[:2], **({"unknown": arguments[2]} if arguments[2:] else {})
        )


def test_what_does_not_go_together(vectors):
    with pytest.raises(ValueError, match="4 item ids, 3 of them distinct"):
        MatchModel(IDS | {"item": ["a", "a", "b", "c"]}, vectors)
    with pytest.raises(ValueError, match="differ in width"):
        MatchModel(IDS, vectors | {"user": vectors["user"][:, :4]})


def test_damage_is_refused_by_name(saved, tmp_path):
    for path in sorted(saved.iterdir()):
        original = path.read_bytes()
        for spoilt in (
            original[:-1],
            original[:-3] + bytes([original[-3] ^ 1]) + original[-2:],
            None,
        ):
            path.unlink() if spoilt is None else path.write_bytes(spoilt)
            with pytest.raises(FolderError, match=path.name):
                MatchModel.load(saved)
            path.write_bytes(original)
    with pytest.raises(FolderError, match="holds no match"):
        MatchModel.load(tmp_path)


def test_a_bundle_is_matched_as_it_recommends(retriever, exported, tmp_path):
    model = MatchModel.load(exported)
    model.save(tmp_path / "small")
    users = retriever.bundle.users["user_id"].to_pylist()[:3]
    lists = retriever.recommend_many(users, k=5)
    for each in (model, MatchModel.load(tmp_path / "small")):
        scores = each.match(lists["user_id"].to_pylist(), lists["item_id"].to_pylist())
        np.testing.assert_allclose(scores, lists["score"].to_numpy(), atol=1e-6)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        MatchModel.load(tmp_path)
