"""Scores of pairs against the vectors they come from."""

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.errors import BundleError, ConfigError, FolderError, UnknownIdError
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


def test_set_embeddings_replaces_known_ids_and_adds_others(vectors, saved):
    model = MatchModel.load(saved)
    new = np.arange(10, dtype=np.float32).reshape(2, 5)
    model.set_embeddings("item", ["new", "b"], new)
    now = dict(zip(IDS["item"], vectors["item"])) | {"new": new[0], "b": new[1]}
    model.save(saved.parent / "changed")
    for changed in (model, MatchModel.load(saved.parent / "changed")):
        scores = changed(["u"] * 5, list(now))
        expected = [vectors["user"][0] @ vector for vector in now.values()]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # Arrays that were handed over stay as they were, as the files of a bundle do.
    given = vectors["user"].copy()
    other = MatchModel(IDS, {side: array.view() for side, array in vectors.items()})
    other.set_embeddings("user", [""], np.ones((1, 5)))
    np.testing.assert_array_equal(vectors["user"], given)


@pytest.mark.parametrize(
    ("side", "ids", "new", "message"),
    [
        ("items", ["a"], np.ones((1, 5)), "side='items' is not known; did you mean 'item'"),
        ("item", ["a", "a"], np.ones((2, 5)), "1 item ids are given more than once, the first 'a'"),
        ("item", ["a"], np.ones((1, 4)), r"shape \(1, 4\) do not go with 1 item ids.*5 wide"),
        ("item", ["a"], np.ones(5), r"shape \(5,\)"),
        ("user", ["u", "x"], [[1] * 5, [np.nan] * 5], "vector of user 'x' is not finite .1 of 2"),
    ],
)
def test_embeddings_that_do_not_fit_change_nothing(vectors, side, ids, new, message):
    model = MatchModel(IDS, vectors)
    before = model(["u"], ["a"])
    with pytest.raises(ConfigError, match=message):
        model.set_embeddings(side, ids, new)
    assert model(["u"], ["a"]) == before


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


def test_ids_are_read_in_the_form_of_the_model():
    """Digits in any form where all ids are digits, text otherwise."""
    vectors = {"user": np.eye(2), "item": np.eye(2)}
    digits = MatchModel({"user": ["3", "40"], "item": np.array([1, 2])}, vectors)
    for users in ([3, 40], [3.0, "40.0"], np.array([3, 40]), pa.array(["3", "40"])):
        np.testing.assert_array_equal(digits(users, [1, "2.0"]), [1.0, 1.0])
    codes = MatchModel({"user": ["03", "3"], "item": ["1", "2"]}, vectors)
    assert codes(["03", 3], [1, 2]).tolist() == [1.0, 1.0]
    with pytest.raises(UnknownIdError, match="'3.0' has no vector"):
        codes(["3.0"], [1])
    for wrong in ("3", b"3", 3):
        with pytest.raises(ConfigError, match="user ids=.* must be a list"):
            digits(wrong, [1])
    with pytest.raises(ConfigError, match="NUL"):
        digits(["3\x00"], [1])
