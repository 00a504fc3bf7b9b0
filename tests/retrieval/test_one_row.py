"""One row of a request by plain values, against the same row as a table of Arrow."""

import datetime

import jax
import numpy as np
import pytest

from tests.retrieval.runs import make_run, write
from twotower.core.errors import ConfigError, TwotowerError
from twotower.retrieval.retriever import Retriever
from twotower.retrieval.users import UserRows

# Kinds with a way of their own for a single value, and kinds without.
ITEM = {
    "item_id": {"type": "string", "embedding_size": 8},
    "category": {"type": "string", "embedding_size": 8},
}
PLAIN = {
    "user_id": {"type": "string", "embedding_size": 8},
    "city": {"type": "string", "embedding_size": 8, "min_count": 3, "oov_rows": 4},
    "gender": {"type": "strings", "separator": "|", "embedding_size": 8},
    "when": {"type": "timestamp", "column": "timestamp", "embedding_size": 8},
}
HISTORIES = {
    "bag": {
        "reads": ["item_id", "category"],
        "weights": {"purchase": 10.0},
        "half_life": 2.0,
        "max_length": 4,
    },
    "gaps": {"gaps": 8, "max_length": 4},
    "request": {"gaps": 8, "request_gap": True, "max_length": 4},
}


@pytest.fixture(
    scope="module",
    params=["bag", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gaps", "request"))],
)
def retriever(request, tmp_path_factory):
    history = {"type": "history", **HISTORIES[request.param]}
    features = {"user": {**PLAIN, "history": history}, "item": ITEM}
    kind = "causal" if "gaps" in history else "bag"
    model = {
        "user": {"layers": (8,)},
        "item": {"layers": (8,)},
        "history": {"kind": kind, "heads": 2, "blocks": 1},
    }
    run = make_run(tmp_path_factory.mktemp("row"), features=features, model=model)
    return Retriever.load(write(run))


def draws(retriever, rng):
    """A request, of values that are right, missing, of another type, or nothing at all."""
    users = list(retriever.user_rows.row_by_id)
    cities = [value for value in retriever.bundle.users["city"].to_pylist() if value]
    items = retriever.bundle.items["item_id"].to_pylist()

    def one(*values):
        return values[rng.integers(len(values))]

    def event():
        item = one(*items, *items, "nothing", "", " P1", 7, None, 2.5)
        kinds = ({}, {"event": "purchase"}, {"event": "view", "timestamp": 1_700_000_000})
        if rng.random() < 0.3:
            return {"item_id": item, **one(*kinds, {"timestamp": "never"}, {"evnt": "x"})}
        return item

    plain = [one(*items) for _ in range(rng.integers(0, 9))]
    history = one(plain, plain, plain, [], [event() for _ in range(rng.integers(0, 6))], None, "P1")
    values = {
        "user_id": one(*users, "nobody", "é", "a b", "", 7, 7.0, True, b"x", None, float("nan")),
        "city": one(*cities, "nowhere", "القاهرة", "", 3, True, None, ["Cairo"], "\ud800"),
        "gender": one("f", "m", "f|m", ["f", "m"], None, 1),
        "timestamp": one(1_700_000_000, datetime.datetime(2024, 1, 1), None, "soon", 1e18),
        "history": history,
        "ctiy": "Cairo",
    }
    chances = {"timestamp": 0.2, "ctiy": 0.03}
    row = {name: x for name, x in values.items() if rng.random() < chances.get(name, 0.5)}
    return one([row], [row], row)


def outcome(retriever, rows, options):
    """The answer to a request, or the words of its refusal."""
    try:
        found = retriever.recommend(rows=rows, k=5, **options)
    except TwotowerError as error:
        return str(error)
    return found, found.known, found.note


def test_a_row_of_plain_values_is_that_of_a_table(retriever, monkeypatch):
    rng = np.random.default_rng(0)
    users = retriever.user_rows
    asked = 0
    answers = 0
    for _ in range(120):
        rows = draws(retriever, rng)
        # With events, be they none, what is stored of a known user stands beside the row.
        known = {"user": next(iter(users.row_by_id)), "events": ()}
        options = [{}, {"events": []}, {"user": "nobody"}, {"strict": False}, known, known][
            rng.integers(6)
        ]
        found = outcome(retriever, rows, options)
        try:
            row = users.read_one(rows)
        except ConfigError:
            row = None
        if row is not None:
            asked += 1
            arrays = users.encode_one(row)
            expected = users.encode(users.read(rows))
            assert arrays.keys() == expected.keys(), rows
            for name, array in expected.items():
                assert arrays[name].dtype == array.dtype, (name, rows)
                np.testing.assert_array_equal(arrays[name], array, err_msg=f"{name} {rows}")
        with monkeypatch.context() as patch:
            patch.setattr(UserRows, "read_one", lambda *_: None)
            assert outcome(retriever, rows, options) == found, rows
        answers += not isinstance(found, str)
    # Right and wrong requests both, or nothing was compared.
    assert asked > 40 and 30 < answers < 110, (asked, answers)


def test_unknown_users_are_those_of_a_table(retriever):
    names = ["nobody", "é", "a" * 80, "u-1"]
    expected = retriever.bundle.towers.embed(
        "user", retriever.user_rows.encode(retriever.user_rows.unknown(names))
    )
    for name, vector in zip(names, expected):
        (found,) = retriever.embed_users([name])
        row = retriever.user_rows.encode_one({"user_id": name})
        np.testing.assert_array_equal(found, retriever.bundle.towers.embed("user", row)[0])
        np.testing.assert_allclose(found, vector, atol=1e-6)


def test_after_warming_no_request_compiles(retriever, caplog):
    said = retriever.warm(4)
    assert said == "Compiled the user tower for 1, 2 and 4 rows and the item tower for 1."
    with jax.log_compiles(True):
        retriever.recommend("nobody")
        retriever.encode_users([{"user_id": "x"}, {"user_id": "y"}, {"city": "Cairo"}])
        retriever.encode_items([{"item_id": "new"}])
    assert "Compiling" not in caplog.text
