"""Rankings by words and categories of the items, and the ALS factors, against plain loops."""

import math

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError
from twotower.evaluation.baselines import als, content
from twotower.evaluation.baselines.make import parse_window
from twotower.evaluation.baselines.tuning import Choice, FitCache, Fitted, data_hash
from twotower.evaluation.queries import Queries

ITEMS = pa.table(
    {
        "item_id": ["1", "2", "3", "4", "5"],
        "title": ["Red shoe", "red SHOE, new", "blue hat", None, "hat box"],
        "tags": [["a"], ["a", "b"], ["b"], [], None],
        "price": [1, 2, 3, 4, 5],
    }
)
SEEN = [[2, 0], [4], []]


def asked(seen, num_items=5, counts=None):
    lists = Ragged.from_pairs(
        np.repeat(np.arange(len(seen)), [len(x) for x in seen]),
        np.concatenate([np.array(x, int) for x in seen]),
        num_rows=len(seen),
    )
    return Queries(
        user=np.arange(len(seen)),
        relevant=Ragged.empty(len(seen)),
        missing=np.zeros(len(seen), np.int32),
        seen=lists,
        counts=np.ones(num_items, int) if counts is None else np.array(counts),
    )


def test_words_are_weighed_by_rarity_and_the_last_item_asks():
    words = [{"red", "shoe", "a"}, {"red", "shoe", "new", "a", "b"}, {"blue", "hat", "b"}]
    words += [set(), {"hat", "box"}]
    counts = {w: sum(w in item for item in words) for item in words for w in item}

    def vector(item):
        weights = {w: math.log(5 / counts[w]) for w in item if counts[w] > 1}
        length = math.sqrt(sum(x**2 for x in weights.values()))
        return {w: x / length for w, x in weights.items()}

    vectors = [vector(item) for item in words]
    found = content.content_scores(content.word_vectors(ITEMS), asked(SEEN))(slice(0, 3))
    for query, last in enumerate([0, 4]):
        cosines = [sum(vectors[last].get(w, 0) * x for w, x in v.items()) for v in vectors]
        np.testing.assert_allclose(found[query], cosines, atol=1e-6)
    assert not found[2].any()
    assert content.text_columns(ITEMS) == ["title", "tags"]
    # A number is no word, and a word of one item alone tells nothing of another.
    assert content.word_vectors(ITEMS.select(["item_id", "price"])) is None
    assert content.word_vectors(pa.table({"item_id": ["1", "2"], "title": ["a", "b"]})) is None


def test_popularity_within_the_categories_that_a_user_has():
    genres = pa.table(
        {"item_id": list("abcde"), "name": list("vwxyz"), "genre": list("kklm") + ["l"]}
    )
    column, categories = content.find_categories(genres.append_column("id2", genres["name"])) or (
        None,
        None,
    )
    assert column is None, "three genres of five items are rather names"
    many = pa.concat_tables([genres] * 4)
    column, categories = content.find_categories(many)
    assert column == "genre"
    queries = asked([[0, 1, 2], []], 20, counts=[5, 4, 3, 9, 7] + [0] * 15)
    order = np.argsort(-queries.counts, kind="stable")
    scores = content.category_scores(categories, order, queries)(slice(0, 2))
    kinds = np.array(list("kklml") * 4)
    share = {"k": 2 / 3, "l": 1 / 3, "m": 0.0}
    expected = np.array([share[kind] for kind in kinds]) * queries.counts
    np.testing.assert_allclose(scores[0], expected, atol=2e-3)
    # Behind these, and for somebody new, popularity decides.
    assert np.argsort(-scores[0], kind="stable")[:4].tolist() == [0, 1, 4, 2]
    assert np.argsort(-scores[1]).tolist() == order.tolist()


def test_als_is_the_solution_that_the_package_finds_and_the_same_every_time(tmp_path):
    rng = np.random.default_rng(0)
    seen = [np.unique(rng.integers(0, 8, 5) + 8 * (user % 3)) for user in range(60)]
    queries = asked(seen, 24)
    setting = als.AlsSetting(confidence=5.0, regularization=2.0)
    factors = als.factorize(queries.seen, 24, setting)
    np.testing.assert_array_equal(factors, als.factorize(queries.seen, 24, setting))
    model = als.AlsModel(factors, setting)
    users = model.users(queries.seen)
    # The gradient of the weighted least squares vanishes at the users' factors.
    for user, items in enumerate(seen):
        weights = np.ones(24)
        weights[items] = 5.0
        taken = np.isin(np.arange(24), items).astype(float)
        slope = (weights * (taken - factors @ users[user])) @ factors - 2.0 * users[user]
        np.testing.assert_allclose(slope, 0.0, atol=2e-3)
    # Items of the user's third come before all others.
    scores = model(queries)(slice(0, 60))
    best = np.argsort(-scores, axis=1)[:, : len(seen[0])] // 8
    assert (best == (np.arange(60) % 3)[:, None]).mean() > 0.95
    assert not model.users(Ragged.empty(2)).any()
    # Chosen on validation, and kept: the second time nothing is fitted.
    cache = FitCache(tmp_path, data_hash(queries.seen, 24, None))
    kept, choice = als.fit_als(queries.seen, 24, None, cache=cache)
    assert choice.tried == 1 and str(als.SETTINGS[1]) in choice.setting
    np.testing.assert_array_equal(
        kept.factors, als.fit_als(Ragged.empty(60), 24, None, cache=cache)[0].factors
    )


def test_what_was_fitted_is_kept_until_data_or_settings_change(tmp_path):
    fits = []

    def fit():
        fits.append(1)
        return Fitted({"x": np.arange(3)}, Choice("ridge 3", 5))

    one = Ragged.from_pairs(np.array([0, 1]), np.array([1, 2]), num_rows=2)
    other = Ragged.from_pairs(np.array([0, 1]), np.array([1, 1]), num_rows=2)
    for data, settings, expected in [(one, 1, 1), (one, 1, 1), (one, 2, 2), (other, 2, 3)]:
        cache = FitCache(tmp_path, data_hash(data, 3, None))
        fitted = cache.fit("ease", settings, fit)
        assert (len(fits), fitted.choice) == (expected, Choice("ridge 3", 5))
        np.testing.assert_array_equal(fitted.arrays["x"], np.arange(3))
    # A file that was damaged is made again.
    next(tmp_path.glob("ease/*.npy")).write_bytes(b"")
    assert len(cache.fit("ease", 2, fit).arrays["x"]) == 3 and len(fits) == 4


def test_windows_are_hours_days_or_weeks():
    assert [parse_window(text) for text in ("", "12h", "7d", "4w")] == [0, 43200, 604800, 2419200]
    for text in ("7", "d", "0d", "7 days"):
        with pytest.raises(ConfigError, match=f"popularity_window={text}"):
            parse_window(text)
