"""Recommendations against a sort of all scores, and the defined answers to what is not known."""

import dataclasses
import datetime
import difflib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.index.fakes import UnconditionalIndex
from tests.retrieval.runs import make_run
from twotower.core.arrays import Ragged
from twotower.core.errors import BundleError, ConfigError, UnknownItemError, most_alike
from twotower.index.exact import ExactIndex
from twotower.index.search import search_filtered
from twotower.retrieval import retriever as retriever_module
from twotower.retrieval.export import make_bundle
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.retrieval.retriever import Retriever


def scores_of(retriever, user):
    bundle = retriever.bundle
    row = bundle.users["user_id"].to_pylist().index(user)
    return bundle.vectors @ retriever.encode_users(bundle.users.slice(row, 1))[0], set(
        bundle.seen[row].tolist()
    )


def busiest(retriever):
    row = int(retriever.bundle.seen.lengths.argmax())
    return retriever.bundle.users["user_id"][row].as_py()


def test_the_best_items_that_the_user_has_not_seen(retriever):
    user = busiest(retriever)
    scores, seen = scores_of(retriever, user)
    ids = retriever.bundle.items["item_id"].to_pylist()
    expected = [ids[n] for n in np.argsort(-scores, kind="stable") if n not in seen][:10]
    found = retriever.recommend(user, k=10)
    assert [item.item_id for item in found] == expected and found.known
    unseen = np.delete(scores, list(seen))
    np.testing.assert_allclose(
        [item.score for item in found], np.sort(unseen)[::-1][:10], atol=1e-6
    )
    with_seen = retriever.recommend(user, k=10, exclude_seen=False)
    assert [item.item_id for item in with_seen] == [
        ids[n] for n in np.argsort(-scores, kind="stable")[:10]
    ]


def test_display_columns_come_with_each_item(retriever):
    first = retriever.recommend(busiest(retriever), k=1)[0]
    row = retriever.bundle.items["item_id"].to_pylist().index(first.item_id)
    assert first.display == {
        n: v
        for n, v in retriever.bundle.items.slice(row, 1).to_pylist()[0].items()
        if n != "item_id"
    }


def test_a_list_has_the_columns_that_are_asked_for_in_their_order(retriever):
    user = busiest(retriever)
    (item, *_) = retriever.bundle.items["item_id"].to_pylist()
    kinds = [
        lambda **options: retriever.recommend(user, k=4, **options),
        lambda **options: retriever.similar_items(item, k=4, **options),
        lambda **options: retriever.popular_items(k=4, **options),
        lambda **options: retriever.newest_items(k=4, column="price", **options),
    ]
    for ask in kinds:
        whole = ask()
        for columns in ([], (), ["price", "title"]):
            found = ask(columns=columns)
            for expected, one in zip(whole, found, strict=True):
                shown = [(name, expected.display[name]) for name in columns]
                assert one.item_id == expected.item_id and one.score == expected.score
                assert list(one.display.items()) == shown
    with pytest.raises(ConfigError, match=r"'titel'.*'title'"):
        retriever.recommend(user, columns=["titel"])
    with pytest.raises(ConfigError, match="must be a list"):
        retriever.recommend(user, columns="title")


def test_a_list_is_short_only_when_the_corpus_is(retriever):
    user = busiest(retriever)
    _, seen = scores_of(retriever, user)
    size = len(retriever.bundle.items)
    found = retriever.recommend(user, k=size + 5)
    assert len(found) == size - len(seen)
    with pytest.raises(ValueError, match="k=0"):
        retriever.recommend(user, k=0)


def test_an_unknown_user_is_answered_and_marked(retriever):
    found = retriever.recommend("nobody at all", k=5)
    assert len(found) == 5 and not found.known
    assert retriever.latest_items("nobody at all") == []
    features = retriever.bundle.encoder.encode("user", pa.table({"user_id": ["nobody at all"]}))
    assert 0 < features["user_id"][0] <= retriever.bundle.encoder.inputs["user"]["user_id"].oov_rows


def test_raw_rows_of_somebody_new(retriever):
    city = retriever.bundle.users["city"].drop_null()[0].as_py()
    rows = [{"user_id": "new", "city": city}, {"user_id": "new"}]
    vectors = retriever.encode_users(rows)
    assert vectors.shape == (2, 16) and not np.allclose(vectors[0], vectors[1])
    # The columns of all rows count, whichever row names them first.
    np.testing.assert_allclose(retriever.encode_users(rows[::-1])[::-1], vectors, atol=1e-6)
    np.testing.assert_allclose(
        retriever.encode_users(pa.Table.from_pylist(rows)), vectors, atol=1e-6
    )
    assert retriever.encode_users([]).shape == (0, 16)
    found = retriever.recommend(rows=rows[:1], k=3)
    np.testing.assert_allclose(
        [i.score for i in found],
        np.sort(retriever.bundle.vectors @ vectors[0])[::-1][:3],
        atol=1e-6,
    )
    assert not found.known
    with pytest.raises(ValueError, match="rows holds 2"):
        retriever.recommend(rows=rows)
    with pytest.raises(ValueError, match="user=ID or rows"):
        retriever.recommend()


def test_rows_beside_an_id_still_exclude_what_that_user_has_seen(retriever):
    user = busiest(retriever)
    seen = {item.item_id for item in retriever.latest_items(user, 1000)}
    found = retriever.recommend(user, rows=[{"city": None}], k=len(retriever.bundle.items))
    assert found.known and not seen & {item.item_id for item in found}
    # The id may stand in the row itself.
    assert retriever.recommend(rows=[{"user_id": user, "city": None}], k=5) == found[:5]


def test_allowed_items_must_satisfy_the_conditions_too(retriever):
    items = retriever.bundle.items
    allowed = items["item_id"].to_pylist()[::3]
    cheap = set(items.filter(pc.less_equal(items["price"], 30.0))["item_id"].to_pylist())
    found = retriever.recommend(
        "nobody at all", k=len(items), allow=allowed, where=[("price", "<=", 30)]
    )
    assert set() != {item.item_id for item in found} == set(allowed) & cheap != set(allowed)


def test_many_users_equal_one_by_one(retriever):
    users = [*retriever.bundle.users["user_id"].to_pylist()[:20], "nobody", busiest(retriever)]
    table = retriever.recommend_many(users, k=4)
    assert table.column_names == ["user_id", "rank", "item_id", "score"]
    lists = [[item.item_id for item in retriever.recommend(user, k=4)] for user in users]
    assert table["item_id"].to_pylist() == [item for items in lists for item in items]
    assert table["user_id"].to_pylist() == [user for user in users for _ in range(4)]
    assert table["rank"].to_pylist() == [1, 2, 3, 4] * len(users)
    assert len(retriever.recommend_many([], k=4)) == 0


def test_many_users_are_answered_in_parts_with_progress(retriever, monkeypatch):
    """Memory is bounded by the part, not by the number of users."""
    users = [*retriever.bundle.users["user_id"].to_pylist()[:20], "nobody"]
    expected = retriever.recommend_many(users, k=4)
    asked = []
    shown = []
    index = retriever.bundle.index
    search = index.search
    show = retriever_module.progress
    monkeypatch.setattr(retriever_module, "USERS_AT_ONCE", 8)
    monkeypatch.setattr(
        index,
        "search",
        lambda vectors, *a, **k: asked.append(len(vectors)) or search(vectors, *a, **k),
    )
    monkeypatch.setattr(
        retriever_module, "progress", lambda *a, **k: shown.append(k["total"]) or show(*a, **k)
    )
    assert retriever.recommend_many(users, k=4) == expected
    assert asked == [8, 8, 5] and shown == [3]


def test_ids_that_are_numbers_are_taken_as_text(retriever):
    user = next(u for u in retriever.bundle.users["user_id"].to_pylist() if u.isdigit())
    assert retriever.recommend(int(user), k=2) == retriever.recommend(user, k=2)


def test_similar_items_are_by_cosine_without_the_item(retriever):
    vectors = retriever.bundle.vectors
    ids = retriever.bundle.items["item_id"].to_pylist()
    found = retriever.similar_items(ids[5], k=6)
    expected = [ids[n] for n in np.argsort(-(vectors @ vectors[5]), kind="stable") if n != 5][:6]
    assert [item.item_id for item in found] == expected


def test_similar_items_of_vectors_that_are_not_normalised(retriever):
    bundle = retriever.bundle
    lengths = np.linspace(1, 9, len(bundle.vectors), dtype=np.float32)[:, None]
    longer = dataclasses.replace(
        bundle, vectors=bundle.vectors * lengths, index=ExactIndex(bundle.vectors * lengths)
    )
    ids = bundle.items["item_id"].to_pylist()
    expected = retriever.similar_items(ids[5], 6)
    found = Retriever(longer).similar_items(ids[5], 6)
    assert [i.item_id for i in found] == [i.item_id for i in expected]


def test_an_unknown_item_names_the_nearest(retriever):
    some = retriever.bundle.items["item_id"][0].as_py()
    with pytest.raises(
        UnknownItemError, match=f"'{some}x' is not among .* nearest ids are: {some}"
    ):
        retriever.similar_items(f"{some}x")


def test_the_ids_nearest_to_one_among_very_many_are_found_by_few_comparisons(monkeypatch):
    known = {f"{letter}{letter}{n}": n for letter in "cab" for n in range(10_000)}
    compared = []
    closest = difflib.get_close_matches

    def count(name, texts, **options):
        compared.append(len(texts))
        return closest(name, texts, **options)

    monkeypatch.setattr(difflib, "get_close_matches", count)
    catalogue = LiveCatalogue.__new__(LiveCatalogue)
    catalogue.numbers = known
    catalogue._ordered = []
    ordered = catalogue._ordered_ids()
    assert ordered == sorted(known) and catalogue._ordered_ids() is ordered
    for name, nearest in [("bb4x", "bb4"), ("cc9999x", "cc9999"), ("aa", "aa"), ("bb4x56", "b")]:
        found = most_alike(name, ordered, 3)
        assert found[0].startswith(nearest) and len(found) == 3
    assert most_alike("x" * 10**6, ordered, 1) and max(compared) <= 64
    known["dd"] = 30_000
    # A hint may lack the latest ids, so that none of them costs the order of all.
    assert catalogue._ordered_ids() is ordered


def test_latest_items_come_the_latest_first(retriever):
    user = busiest(retriever)
    row = retriever.bundle.users["user_id"].to_pylist().index(user)
    ids = retriever.bundle.items["item_id"].to_pylist()
    assert [i.item_id for i in retriever.latest_items(user, 3)] == [
        ids[n] for n in retriever.bundle.seen[row][::-1][:3]
    ]


class Forgetful(UnconditionalIndex):
    """An approximate index that finds every second item only, and gives up after `limit`."""

    def __init__(self, vectors, limit):
        super().__init__(vectors)
        self.limit = limit

    def search(self, queries, k):
        scores, rows = self.exact.search(queries, self.num_items)
        out_scores = np.full((len(queries), k), -np.inf, np.float32)
        out_rows = np.full((len(queries), k), -1, np.int32)
        for q, row in enumerate(rows):
            kept = np.flatnonzero(row % 2 == 0)[: min(k, self.limit)]
            out_scores[q, : len(kept)] = scores[q, kept]
            out_rows[q, : len(kept)] = row[kept]
        return out_scores, out_rows


@pytest.mark.parametrize("limit", [1, 30, 1000])
@pytest.mark.parametrize("k", [1, 10, 60, 120])
def test_lists_are_full_whenever_k_items_exist(limit, k):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 4)).astype(np.float32)
    queries = rng.normal(size=(8, 4)).astype(np.float32)
    lists = [rng.permutation(100)[: 14 * q] for q in range(8)]
    exclude = Ragged.from_pairs(
        np.repeat(np.arange(8), [len(x) for x in lists]), np.concatenate(lists), num_rows=8
    )
    scores, rows = search_filtered(Forgetful(vectors, limit), vectors, queries, k, exclude)
    assert rows.shape == scores.shape == (8, min(k, 100))
    for q, row in enumerate(rows):
        real = row[row >= 0]
        assert len(real) == len(set(real.tolist())) == min(k, 100 - 14 * q)
        assert not set(real.tolist()) & set(lists[q].tolist())
        np.testing.assert_allclose(
            scores[q, : len(real)], vectors[real] @ queries[q], rtol=1e-4, atol=1e-5
        )
        assert (
            np.isneginf(scores[q, len(real) :]).all()
            and (np.diff(scores[q, : len(real)]) <= 0).all()
        )


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no manifest.json"):
        Retriever.load(tmp_path)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Of a model that reads the time of the query."""
    features = {
        "user": {
            "user_id": {"type": "string", "embedding_size": 8},
            "when": {"type": "timestamp", "column": "timestamp", "embedding_size": 8},
        },
        "item": {"item_id": {"type": "string", "embedding_size": 8}},
    }
    run = make_run(tmp_path_factory.mktemp("timed"), features=features)
    return Retriever(make_bundle(run))


def test_a_question_without_a_time_is_asked_at_the_end_of_the_log(timed):
    """A missing time has a row that training never touched."""
    newest = pc.max(timed.bundle.users["timestamp"]).as_py()
    known = busiest(timed)
    for user in (known, "nobody"):
        expected = timed.encode_users([{"user_id": user, "timestamp": newest}])[0]
        as_text = datetime.datetime.fromtimestamp(newest, datetime.UTC).strftime(
            "%Y-%m-%d %H:%M:%S"
        )
        rows = [
            {"user_id": user},
            {"user_id": user, "timestamp": None},
            {"user_id": user, "timestamp": newest},
        ]
        np.testing.assert_allclose(timed.encode_users(rows), np.stack([expected] * 3), atol=1e-6)
        np.testing.assert_allclose(
            timed.encode_users(rows[:2]), np.stack([expected] * 2), atol=1e-6
        )
        texts = [{"user_id": user, "timestamp": text} for text in (as_text, None, "")]
        np.testing.assert_allclose(timed.encode_users(texts), np.stack([expected] * 3), atol=1e-6)
        table = pa.table({"user_id": [user]})
        found = timed.recommend(rows=table, k=5)
        np.testing.assert_allclose(
            [i.score for i in found], [i.score for i in timed.recommend(user, k=5)], atol=1e-6
        )
        np.testing.assert_allclose(
            timed.recommend_many([user], k=5)["score"].to_numpy(),
            [i.score for i in found],
            atol=1e-6,
        )


def test_a_time_that_is_given_is_the_one_that_is_asked_about(timed):
    newest = pc.max(timed.bundle.users["timestamp"]).as_py()
    early, late = timed.encode_users(
        [{"user_id": "1", "timestamp": newest - 40 * 86_400}, {"user_id": "1"}]
    )
    assert not np.allclose(early, late)
    encoded = timed.bundle.encoder.encode(
        "user", pa.table({"user_id": ["1"], "timestamp": [newest - 40 * 86_400]})
    )
    expected = timed.bundle.towers.embed("user", encoded)[0]
    np.testing.assert_allclose(early, expected, atol=1e-6)
    with pytest.raises(ConfigError, match="row 1, column 'timestamp': 'soon' is not a time"):
        timed.encode_users([{"user_id": "1", "timestamp": "soon"}])
