"""Pieces of text against a plain Python reading of the definition."""

import numpy as np
import pyarrow as pa
import pytest

from tests.features.encoder_shop import assert_same, fitted, shop
from twotower.core.errors import ConfigError
from twotower.features import text
from twotower.features.base import pad_lists
from twotower.features.encoder import Encoder
from twotower.features.spec import from_mappings
from twotower.features.text import hashed_pieces, normalise

MASK = 2**64 - 1
TEXTS = [
    "Red shoe",
    "red  SHOE!",
    "",
    None,
    "a",
    "حذاء أحمر للأطفال",
    "3-in-1 Café\nmaker",
    "🎉",
    "日本語",
    "x" * 40,
    "naïve co-op's",
]


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def python_pieces(value, words, characters, buckets):
    if value is None:
        return []
    tokens = "".join(c if c.isalnum() else " " for c in normalise(value)).split()
    bounded = [[0x110000, *map(ord, token), 0x110001] for token in tokens]
    hashes = [
        mix(sum(mix(position << 21 | c) for position, c in enumerate(word)) & MASK)
        for word in bounded
    ]
    pieces = []
    for size in sorted(words):
        runs = [hashes[n : n + size] for n in range(len(hashes) - size + 1)]
        pieces += [
            mix(
                (sum(mix((h + position + 1) & MASK) for position, h in enumerate(run)) + size)
                & MASK
            )
            for run in runs
        ]
    for size in sorted(characters):
        runs = [word[n : n + size] for word in bounded for n in range(len(word) - size + 1)]
        runs = [run for run in runs if run not in ([0x110000], [0x110001])]
        pieces += [
            mix(
                (sum(mix((position + 1) << 21 | c) for position, c in enumerate(run)) + size) & MASK
            )
            for run in runs
        ]
    return [1 + h % (buckets - 1) for h in pieces]


@pytest.mark.parametrize(
    "words, characters", [((1,), (3, 4, 5)), ((1, 2, 3), ()), ((), (1, 2)), ((2,), (8, 3))]
)
def test_pieces_are_those_of_plain_python(words, characters):
    ids = hashed_pieces(
        pa.array(TEXTS), words=words, characters=characters, buckets=1000, max_length=50
    )
    expected = [(python_pieces(t, words, characters, 1000) + [0] * 50)[:50] for t in TEXTS]
    assert ids.dtype == np.int32 and ids.tolist() == expected


def test_ids_are_within_1_and_buckets_and_0_is_padding():
    many = pa.array([f"title number {n}" for n in range(2000)])
    ids = hashed_pieces(many, buckets=7, max_length=60)
    lengths = (ids > 0).sum(axis=1)
    assert set(np.unique(ids)) == set(range(7))
    assert all((ids[row, :length] > 0).all() for row, length in enumerate(lengths))


def test_blocks_and_repeats_change_nothing(monkeypatch):
    whole = hashed_pieces(pa.array(TEXTS), buckets=1000, max_length=30)
    monkeypatch.setattr(text, "_BLOCK_TEXTS", 3)
    twice = hashed_pieces(pa.chunked_array([TEXTS, TEXTS[::-1]]), buckets=1000, max_length=30)
    np.testing.assert_array_equal(twice, np.concatenate([whole, whole[::-1]]))


def test_the_first_pieces_are_kept():
    long = hashed_pieces(pa.array(TEXTS), buckets=1000, max_length=50)
    np.testing.assert_array_equal(
        hashed_pieces(pa.array(TEXTS), buckets=1000, max_length=4), long[:, :4]
    )


def test_no_texts_make_no_rows():
    assert hashed_pieces(pa.array([], pa.string()), buckets=10, max_length=5).shape == (0, 5)
    assert hashed_pieces(pa.nulls(2), buckets=10, max_length=5).tolist() == [[0] * 5] * 2


@pytest.mark.parametrize(
    "one, other",
    [
        ("CAFÉ", "cafe"),
        ("Straße", "STRASSE"),
        ("Łódź", "lodz"),
        ("ﬁt ＡＢＣ１", "fit abc1"),
        ("İstanbul", "istanbul"),
        ("أحمد", "احمد"),
        ("إسلام", "اسلام"),
        ("آمن", "امن"),
        ("مُحَمَّد", "محمد"),
        ("مكتبة", "مكتبه"),
        ("على", "علي"),
        ("جميـــل", "جميل"),
        ("١٢٣ ۴۵", "123 45"),
        ("\u200fحذاء\u200e", "حذاء"),
        ("مؤمن", "مومن"),
        ("کتاب", "كتاب"),
    ],
    ids=str,
)
def test_spellings_of_one_word_are_one(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize("one, other", [("й", "и"), ("が", "か"), ("حذاء", "حذا"), ("a1", "a2")])
def test_different_words_stay_different(one, other):
    assert normalise(one) != normalise(other)


def test_normalising_twice_is_normalising_once():
    for value in [t for t in TEXTS if t] + [
        "Ａ Café, ＬＯＵＤ",
        "أَحْمَد",
        "ΣΊΣΥΦΟΣ",
        "ǅ",
        "İI\u0307",
    ]:
        assert normalise(normalise(value)) == normalise(value)


def test_pad_lists():
    rows = np.array([0, 0, 0, 2], np.int64)
    assert pad_lists(rows, np.array([5, 6, 7, 8], np.int32), 4, 2).tolist() == [
        [5, 6],
        [0, 0],
        [8, 0],
        [0, 0],
    ]


JOINED = {
    "title": ["Oak lamp", None, "  ", "Red\nshoe"],
    "about": ["for the desk", "for kids", "", None],
    "code": [1, 2, None, None],
}
COLUMNS = ["title", "about", "code"]


@pytest.mark.parametrize(("kind", "separator"), [("text", " "), ("sentence", "\n")])
def test_several_columns_are_one_text_without_what_is_missing(kind, separator):
    feature = from_mappings({"item": {"x": {"type": kind, "columns": COLUMNS}}}).item["x"]
    rows = pa.table(JOINED)
    expected = []
    for row in rows.to_pylist():
        texts = [str(row[name]) for name in COLUMNS if row[name] is not None]
        expected.append(separator.join(text for text in texts if text.strip()) or None)
    assert feature.read(rows).to_pylist() == expected
    # A request may know some of the columns.
    assert feature.read(rows.select(["about"])).to_pylist() == [
        "for the desk",
        "for kids",
        None,
        None,
    ]


def test_columns_joined_encode_as_their_text_in_one_column(tmp_path):
    train, users, items = shop()
    fields = {"type": "text", "buckets": 500, "max_length": 12}
    spec = {"item": {"x": fields | {"columns": ["title", "brand"]}}}
    encoder = fitted(spec, (train, users, items))
    pairs = zip(items["title"].to_pylist(), items["brand"].to_pylist())
    whole = pa.array([" ".join(filter(None, pair)) for pair in pairs])
    single = fitted({"item": {"x": fields}}, (train, users, items.append_column("x", whole)))
    encoded = single.encode("item", pa.table({"x": whole}))
    assert_same(encoder.encode("item", items), encoded)
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert again.spec == encoder.spec
    assert_same(again.encode("item", items), encoded)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"columns": ["title", "brnd"]},
            "reads column 'brnd'; the items table has no field 'brnd'",
        ),
        ({"columns": ["title", "title"]}, r"columns=\('title', 'title'\) must be distinct names"),
        (
            {"columns": ["title"], "column": "brand"},
            "column='brand' must be left out beside columns",
        ),
        ({"columns": ["title", "tags"]}, "features.item.x: values of type list"),
    ],
)
def test_columns_that_cannot_be_joined_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        fitted({"item": {"x": {"type": "text"} | fields}})


def test_columns_of_users_come_from_one_table():
    train, users, items = shop()
    users = users.append_column("bio", pa.array(["plays chess"] * len(users)))
    train = train.append_column("query", pa.array(["lamp"] * len(train)))
    spec = {"user": {"x": {"type": "text", "columns": ["query", "page"]}}}
    assert fitted(spec, (train, users, items)).context == ("x",)
    spec = {"user": {"x": {"type": "text", "columns": ["bio", "user_id"]}}}
    assert fitted(spec, (train, users, items)).context == ()
    with pytest.raises(ConfigError, match="columns bio, query, some of which are of the users tab"):
        fitted(
            {"user": {"x": {"type": "text", "columns": ["bio", "query"]}}}, (train, users, items)
        )
    with pytest.raises(ConfigError, match="reads column 'item_id' of the interactions, which the"):
        fitted(
            {"user": {"x": {"type": "text", "columns": ["query", "item_id"]}}},
            (train, users, items),
        )
