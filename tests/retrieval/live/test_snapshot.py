"""A changing catalogue against a dictionary of what is alive, searched by sorting."""

import numpy as np
import pyarrow as pa
import pytest

from tests.index.fakes import UnconditionalIndex
from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError, QueryError, UnknownItemError
from twotower.index.exact import ExactIndex
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.retrieval.live.conditions import as_conditions

DIM = 6


def table(ids, brands=None):
    return pa.table(
        {
            "item_id": pa.array(ids, pa.string()),
            "brand": pa.array(brands or ["x"] * len(ids), pa.string()),
        }
    )


def fresh(count=30, seed=0, index=ExactIndex):
    """A catalogue, and the same as a dictionary id -> (vector, brand)."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, DIM)).astype(np.float32)
    ids = [f"i{n}" for n in range(count)]
    brands = [("x", "y", "z")[n % 3] for n in range(count)]
    return LiveCatalogue.build(index(vectors), vectors, table(ids, brands)), dict(
        zip(ids, zip(vectors, brands))
    )


def upsert(catalogue, model, ids, rng, brand="x"):
    vectors = rng.normal(size=(len(ids), DIM)).astype(np.float32)
    catalogue.upsert(*catalogue.check(table(ids, [brand] * len(ids)), vectors))
    model.update(zip(ids, [(vector, brand) for vector in vectors]))


def check(snapshot, model, queries, *, exclude=(), k=7, where=(), only=None, numbers=None):
    """Ids and scores of every query are those of a sort of the dictionary."""
    banned = [numbers[i] for i in exclude]
    count = len(queries)
    lists = Ragged.from_pairs(
        np.repeat(np.arange(count), len(banned)), np.tile(banned, count), num_rows=count
    )
    only_numbers = None if only is None else np.array([numbers[i] for i in only], np.int64)
    scores, positions = snapshot.search(
        queries, k, exclude=lists, where=as_conditions(where), only=only_numbers
    )
    left = {
        i: v
        for i, (v, brand) in model.items()
        if i not in exclude
        and (only is None or i in only)
        and (not where or brand in where["brand"])
    }
    assert len(snapshot) == len(model)
    for query, score, position in zip(queries, scores, positions):
        expected = sorted(left, key=lambda i: -float(left[i] @ query))[:k]
        found = position[position >= 0]
        assert (
            [row["item_id"] for row in snapshot.rows(found)]
            == expected
            == snapshot.item_ids(found).to_pylist()
        )
        np.testing.assert_allclose(
            score[position >= 0], [left[i] @ query for i in expected], atol=1e-5
        )
        assert [row["brand"] for row in snapshot.rows(found)] == [model[i][1] for i in expected]
        assert (position[len(expected) :] == -1).all() and np.isneginf(score[len(expected) :]).all()


@pytest.mark.parametrize("index", [ExactIndex, UnconditionalIndex])
def test_any_sequence_of_changes_equals_a_dictionary(index):
    rng = np.random.default_rng(1)
    catalogue, model = fresh(index=index)
    queries = rng.normal(size=(3, DIM)).astype(np.float32)
    past = []
    for step in range(70):
        kind = rng.integers(0, 10)
        ids = [f"i{n}" for n in rng.choice(60, rng.integers(1, 4), replace=False)]
        if kind < 5:
            upsert(catalogue, model, ids, rng, brand=str(rng.choice(["x", "y"])))
        elif kind < 9:
            assert catalogue.delete([*ids, "never"]) == sum(
                model.pop(i, None) is not None for i in ids
            )
        else:
            catalogue.rebalance(lambda vectors, items, counts: index(vectors))
        some = [i for i in ids if i in catalogue.numbers]
        check(catalogue.snapshot, model, queries, exclude=some, numbers=catalogue.numbers)
        if step % 7 == 0:
            check(
                catalogue.snapshot,
                model,
                queries,
                where={"brand": ["y"]},
                numbers=catalogue.numbers,
            )
            check(catalogue.snapshot, model, queries, only=some, k=5, numbers=catalogue.numbers)
            past.append((catalogue.snapshot, dict(model)))
    for snapshot, was in past:  # each moment still is what it was, whatever came after
        check(snapshot, was, queries, numbers=catalogue.numbers)
        check(snapshot, was, queries, where={"brand": ["y"]}, numbers=catalogue.numbers)


def test_more_items_than_there_is_room_for(monkeypatch):
    rng = np.random.default_rng(2)
    catalogue, model = fresh(4)
    then = catalogue.snapshot
    was = dict(model)
    for n in range(40):
        upsert(catalogue, model, [f"n{n}_{m}" for m in range(60)], rng)
    assert len(catalogue.snapshot.memtable.numbers) >= 2_400 and len(model) == 2_404
    queries = rng.normal(size=(2, DIM)).astype(np.float32)
    check(catalogue.snapshot, model, queries, numbers=catalogue.numbers)
    check(then, was, queries, numbers=catalogue.numbers)


def test_changes_while_the_index_is_built_are_in_it():
    rng = np.random.default_rng(3)
    catalogue, model = fresh()
    upsert(catalogue, model, ["i1", "new1", "new2"], rng)
    versions = []

    def build(vectors, items, counts):
        """What happens meanwhile: changes to what was indexed, what was new, and what nobody
        knew."""
        versions.append(catalogue.snapshot.version)
        upsert(catalogue, model, ["i2", "new1", "later"], rng, brand="y")
        catalogue.delete(["i3", "new2"])
        del model["i3"], model["new2"]
        upsert(catalogue, model, ["i3"], rng)
        catalogue.delete(["i4"])
        del model["i4"]
        return ExactIndex(vectors)

    catalogue.rebalance(build)
    queries = rng.normal(size=(3, DIM)).astype(np.float32)
    check(catalogue.snapshot, model, queries, numbers=catalogue.numbers)
    check(catalogue.snapshot, model, queries, where={"brand": ["y"]}, numbers=catalogue.numbers)
    assert (
        catalogue.snapshot.version > versions[0] and catalogue.snapshot.num_slots == 4
    )  # i2, i3, new1, later
    catalogue.rebalance(lambda vectors, items, counts: ExactIndex(vectors))
    check(catalogue.snapshot, model, queries, numbers=catalogue.numbers)
    assert catalogue.snapshot.num_slots == 0 and catalogue.snapshot.num_removed == 0


def test_nothing_at_all_can_be_searched_and_filled():
    catalogue, model = fresh(3)
    rng = np.random.default_rng(4)
    queries = rng.normal(size=(2, DIM)).astype(np.float32)
    catalogue.delete(list(model))
    check(catalogue.snapshot, {}, queries, numbers=catalogue.numbers)
    catalogue.rebalance(lambda vectors, items, counts: ExactIndex(vectors))
    check(catalogue.snapshot, {}, queries, numbers=catalogue.numbers)
    model.clear()
    upsert(catalogue, model, ["i1", "again"], rng)
    check(catalogue.snapshot, model, queries, numbers=catalogue.numbers)


@pytest.mark.parametrize(
    "vectors, ids, message",
    [
        (np.full((1, DIM), np.nan), ["a"], "item vector 0 is not finite"),
        (np.full((1, DIM), np.inf), ["a"], "item vector 0 is not finite"),
        (np.ones((1, DIM + 1)), ["a"], r"shape \[1, 7\]; of these items they must be of \[1, 6\]"),
        (np.ones((2, DIM)), ["a"], r"shape \[2, 6\]"),
        (np.ones(DIM), ["a"], "must be of shape"),
        (np.ones((2, DIM)), ["a", "a"], "'a' in the rows of upsert is there twice"),
        (np.ones((1, DIM)), [None], "is missing"),
    ],
)
def test_what_would_spoil_the_catalogue_changes_nothing(vectors, ids, message):
    catalogue, model = fresh()
    with pytest.raises(ValueError, match=message):
        catalogue.check(table(ids), vectors)
    check(catalogue.snapshot, model, np.ones((1, DIM), np.float32), numbers=catalogue.numbers)


def test_a_zero_vector_among_normalised_ones_and_a_column_of_another_type():
    vectors = np.eye(3, DIM, dtype=np.float32)
    items = table(["a", "b", "c"]).append_column("price", pa.array([1.0, 2.0, 3.0]))
    catalogue = LiveCatalogue.build(ExactIndex(vectors, normalized=True), vectors, items)
    with pytest.raises(QueryError, match="item vector 0 is zero"):
        catalogue.check(table(["d"]), np.zeros((1, DIM)))
    with pytest.raises(ValueError, match="column 'price' must hold double"):
        catalogue.check(table(["d"]).append_column("price", pa.array(["much"])), np.ones((1, DIM)))
    with pytest.raises(ValueError, match="needs a column 'item_id'"):
        catalogue.check(pa.table({"id": ["d"]}), np.ones((1, DIM)))
    assert catalogue.check(table(["d"]), np.ones((1, DIM)))[0]["price"].to_pylist() == [None]


def test_conditions_on_numbers_and_on_what_is_not_there():
    vectors = np.eye(4, DIM, dtype=np.float32) + 0.1
    prices = pa.array([1.0, 2.0, 3.0, None])
    catalogue = LiveCatalogue.build(
        ExactIndex(vectors), vectors, table(["a", "b", "c", "d"]).append_column("price", prices)
    )

    def ask(where):
        found = catalogue.snapshot.search(np.ones((1, DIM)), 4, where=as_conditions(where))[1][0]
        return set(catalogue.snapshot.item_ids(found[found >= 0]).to_pylist())

    assert ask([("price", "<=", 2)]) == {"a", "b"} and ask([("price", "==", None)]) == {"d"}
    assert ask([("price", ">", 1), ("item_id", "!=", "c")]) == {"b"} and ask(
        {"item_id": ["a", "nothing"]}
    ) == {"a"}
    assert ask({"item_id": []}) == set()
    with pytest.raises(ConfigError, match="did you mean 'price'"):
        ask([("prize", "<=", 2)])
    with pytest.raises(ConfigError, match="must hold texts, numbers"):
        ask({"price": {"above": 2}})


def test_an_item_that_is_gone_is_not_known():
    catalogue, _ = fresh()
    position = catalogue.position(catalogue.snapshot, "i3")
    assert catalogue.snapshot.rows(np.array([position]))[0]["item_id"] == "i3"
    catalogue.delete(["i3"])
    with pytest.raises(UnknownItemError, match="'i3' is not among the 29 items"):
        catalogue.position(catalogue.snapshot, "i3")
