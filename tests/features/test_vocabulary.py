"""Vocabularies against a Counter, hashes against plain Python integers."""

import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.arrays import mix64
from twotower.features import vocabulary
from twotower.features.vocabulary import Vocabulary, as_strings, hash64

MASK = 2**64 - 1
STRINGS = ["", "a", "b", "ab", "ba", "حذاء", "a" * 300, "42", "é"]


def strings(values):
    return pa.array(values, pa.large_string())


def python_mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def python_hash(text):
    data = text.encode()
    return python_mix(
        (sum(python_mix(position << 8 | byte) for position, byte in enumerate(data)) + len(data))
        & MASK
    )


def skewed(count=5000, seed=0):
    return [f"v{n}" for n in np.random.default_rng(seed).zipf(1.3, count) % 700]


def test_the_hash_is_that_of_plain_integers():
    assert hash64(strings(STRINGS)).tolist() == [python_hash(text) for text in STRINGS]


def test_the_hash_is_pinned():
    """Saved models depend on it: these numbers never change."""
    assert hash64(strings(["a", "حذاء"])).tolist() == [python_hash("a"), python_hash("حذاء")]
    assert mix64(np.array([0], np.uint64)).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(strings(["user-42"])).tolist() == [0x46A11BFC42908A75]


def test_the_hash_ignores_slices_and_blocks(monkeypatch):
    values = strings(STRINGS * 50)
    whole = hash64(values)
    monkeypatch.setattr(vocabulary, "_BLOCK_BYTES", 7)
    np.testing.assert_array_equal(hash64(values), whole)
    np.testing.assert_array_equal(hash64(values.slice(5, 20)), whole[5:25])
    assert hash64(values.slice(0, 0)).shape == (0,)


@pytest.mark.parametrize("min_count", [1, 3])
def test_fit_orders_by_count_then_value(min_count):
    values = skewed()
    counts = Counter(values)
    frequent = [value for value in counts if counts[value] >= min_count]
    expected = sorted(frequent, key=lambda value: (-counts[value], value))
    fitted = Vocabulary.fit(pa.array(values), min_count=min_count, oov_rows=3)
    assert fitted.values.to_pylist() == expected
    assert fitted.size == 1 + 3 + len(expected)


def test_fit_does_not_depend_on_the_order_of_rows():
    values = np.array(skewed())
    weights = np.random.default_rng(1).integers(1, 5, len(values))
    first = Vocabulary.fit(pa.array(values), weights)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(values))
        assert Vocabulary.fit(pa.array(values[order]), weights[order]).values.equals(first.values)


def test_weights_count_as_repeated_rows():
    values, weights = np.array(skewed(500)), np.random.default_rng(1).integers(1, 9, 500)
    repeated = Vocabulary.fit(pa.array(np.repeat(values, weights)), min_count=9)
    assert Vocabulary.fit(pa.array(values), weights, min_count=9).values.equals(repeated.values)


def test_rows_are_those_of_a_dict():
    fitted = Vocabulary.fit(pa.array(skewed()), oov_rows=5)
    row_of = {value: 6 + position for position, value in enumerate(fitted.values.to_pylist())}
    values = [*skewed(400, seed=1), None, "new", ""]
    expected = [0 if v is None else row_of.get(v, 1 + python_hash(v) % 5) for v in values]
    rows = fitted.rows(pa.array(values))
    assert rows.dtype == np.int32 and rows.tolist() == expected


def test_a_single_value_and_a_column_find_the_same_rows():
    """Few values are found by their hashes, many by a hash table of the vocabulary."""
    fitted = Vocabulary.fit(pa.array(skewed()), oov_rows=5)
    values = pa.array([*skewed(400, seed=1), None, "new", ""])
    single = np.concatenate([fitted.rows(values.slice(n, 1)) for n in range(len(values))])
    np.testing.assert_array_equal(single, fitted.rows(values))


def test_known_values_with_equal_hashes_are_still_told_apart(monkeypatch):
    monkeypatch.setattr(vocabulary, "hash64", lambda values: np.ones(len(values), np.uint64))
    monkeypatch.setattr(vocabulary, "hash_texts", lambda texts: np.ones(len(texts), np.uint64))
    fitted = Vocabulary.fit(pa.array(skewed()))
    assert fitted.rows(fitted.values.slice(7, 1)).tolist() == [fitted.first + 7]
    assert fitted.rows_of_texts([fitted.values[7].as_py()]).tolist() == [fitted.first + 7]


def test_row_0_is_null_alone():
    fitted = Vocabulary.fit(pa.array([*skewed(), None, None]), oov_rows=2)
    rows = fitted.rows(pa.array([*skewed(), "unknown", "", None]))
    assert (rows[:-1] > 0).all() and rows[-1] == 0


def test_unknown_values_spread_over_all_oov_rows():
    fitted = Vocabulary.fit(pa.array(["known"]), oov_rows=8)
    counts = np.bincount(
        fitted.rows(pa.array([f"new{n}" for n in range(8000)])), minlength=fitted.size
    )
    assert counts[0] == 0 and counts[9] == 0
    assert counts[1:9].min() > 850 and counts[1:9].max() < 1150


@pytest.mark.parametrize(
    "convert",
    [
        lambda values: pa.chunked_array([values.slice(0, 3), values.slice(3)]),
        lambda values: values.dictionary_encode(),
        lambda values: pa.chunked_array(
            [values.slice(0, 3).dictionary_encode(), values.slice(3).dictionary_encode()]
        ),
        lambda values: pa.concat_arrays([pa.array(["x"]), values]).slice(1),
        lambda values: values.cast(pa.large_string()),
    ],
    ids=["chunks", "dictionary", "dictionaries", "slice", "large"],
)
def test_storage_makes_no_difference(convert):
    values = pa.array([*skewed(50), None, "new"])
    fitted = Vocabulary.fit(values.slice(0, 30))
    np.testing.assert_array_equal(fitted.rows(convert(values)), fitted.rows(values))
    assert Vocabulary.fit(convert(values)).values.equals(Vocabulary.fit(values).values)


def test_integers_are_their_text():
    fitted = Vocabulary.fit(pa.array([42, 42, 7]))
    assert fitted.values.to_pylist() == ["42", "7"]
    np.testing.assert_array_equal(
        fitted.rows(pa.array(["42", "7"])), fitted.rows(pa.array([42, 7]))
    )


def test_nothing_fitted_knows_nothing():
    fitted = Vocabulary.fit(pa.array([None, None], pa.string()), oov_rows=2)
    assert fitted.size == 3
    assert fitted.rows(pa.array([], pa.string())).tolist() == []
    assert set(fitted.rows(pa.array(["a", "b", "c", "d"])).tolist()) <= {1, 2}


def test_arrays_make_the_same_vocabulary():
    fitted = Vocabulary.fit(strings([*STRINGS, "a"]), oov_rows=4)
    again = Vocabulary.from_arrays(fitted.arrays(), oov_rows=4)
    assert again.values.equals(fitted.values)
    np.testing.assert_array_equal(again.rows(strings(STRINGS)), fitted.rows(strings(STRINGS)))


def test_the_hashes_of_a_large_vocabulary_are_kept(monkeypatch):
    values = [f"v{number}" for number in range(50)]
    fitted = Vocabulary(as_strings(pa.array(values)), oov_rows=4)
    assert set(fitted.arrays()) == {"bytes", "offsets"}
    monkeypatch.setattr(vocabulary, "_STORED_HASHES", 50)
    arrays = fitted.arrays()
    expected = fitted.rows(pa.array([*values, "unknown"])).tolist()
    with monkeypatch.context() as patched:
        # They are not made again, nor is anything else of all values.
        patched.setattr(vocabulary, "hash64", None)
        again = Vocabulary.from_arrays(arrays, oov_rows=4)
        assert again.rows_of_texts([*values, "unknown"]).tolist() == expected
    assert pickle.loads(pickle.dumps(again)).rows(pa.array(values)).tolist() == expected[:-1]
    for broken in ({"order": arrays["order"][1:]}, {"hashes": arrays["hashes"][::-1]}):
        with pytest.raises(ValueError, match="hashes of a vocabulary"):
            Vocabulary.from_arrays(arrays | broken, oov_rows=4)


def test_broken_vocabularies_are_refused():
    with pytest.raises(ValueError, match="oov_rows=0 must be at least 1"):
        Vocabulary(strings(["a"]), oov_rows=0)
    with pytest.raises(ValueError, match="1 repeated values and 0 nulls"):
        Vocabulary(strings(["a", "a"]))
    with pytest.raises(ValueError, match="0 repeated values and 1 nulls"):
        Vocabulary(strings(["a", None]))
    with pytest.raises(ValueError, match="list"):
        Vocabulary.fit(pa.array([["a"], ["b"]]))
    with pytest.raises(ValueError):
        Vocabulary.from_arrays(
            {"bytes": np.array([0xFF], np.uint8), "offsets": np.array([0, 1])}, oov_rows=1
        )


def test_few_values_have_the_rows_of_a_column(monkeypatch):
    """By dictionary, by hash and in a column: the known, the unknown, null, and long texts."""
    known = [f"v{n}" for n in range(300)] + ["", "é" * 40]
    values = [*known[::7], "", None, "x", "v300", "é" * 40, "y" * 100]
    few = Vocabulary(strings(known), oov_rows=5)
    first = few.rows(strings(values))
    again = [few.rows(strings([value]))[0] for value in values]
    monkeypatch.setattr(vocabulary, "_FEW_VALUES", 0)
    monkeypatch.setattr(vocabulary, "_VALUES_PER_LOOKUP", 10**9)
    column = Vocabulary(strings(known), oov_rows=5).rows(strings(values))
    assert first.tolist() == again == column.tolist()
    assert vocabulary.hash_texts(["a", "", "é" * 40, "a" * 300]).tolist() == [
        python_hash(text) for text in ("a", "", "é" * 40, "a" * 300)
    ]
    # One by one, and more of them at once.
    for texts in (["a", "حذاء"], [f"item-{number:07}" for number in range(12)]):
        assert vocabulary.hash_texts(texts).tolist() == list(map(python_hash, texts))


def test_what_recent_values_keep_is_bounded(monkeypatch):
    monkeypatch.setattr(vocabulary, "_MAX_RECENT", 10)
    fitted = Vocabulary(strings([f"v{n}" for n in range(100)]), oov_rows=3)
    for value in [*(f"v{n}" for n in range(100)), *(f"stranger{n}" for n in range(100))]:
        fitted.rows(strings([value]))
        assert len(fitted._recent) <= 10
    assert not any(value.startswith("stranger") for value in fitted._recent)
    # A copy for another process is as good.
    copy = pickle.loads(pickle.dumps(fitted))
    assert copy.rows(strings(["v7", "x"])).tolist() == fitted.rows(strings(["v7", "x"])).tolist()
