"""Users who are what they did: by id, unknown, and with a history that the request brings."""

import dataclasses
import functools

import jax
import numpy as np
import pyarrow as pa
import pytest

from tests.retrieval.runs import make_run
from twotower.core.errors import BundleError, ConfigError
from twotower.retrieval import export as export_module
from twotower.retrieval.explain import explain
from twotower.retrieval.export import export
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow

HISTORY = {
    "type": "history",
    "max_length": 4,
    "reads": ["item_id", "category"],
    "weights": {"purchase": 10.0},
}
HISTORY |= {"gaps": 30, "request_gap": True}
FEATURES = {
    "user": {"city": {"type": "string", "embedding_size": 4}, "history": HISTORY},
    "item": {
        "item_id": {"type": "string", "embedding_size": 16},
        "category": {"type": "string", "embedding_size": 8},
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = {
        "user": {"layers": (16,)},
        "item": {"layers": (16,)},
        "history": {"kind": "causal", "heads": 2, "blocks": 1},
    }
    run = make_run(tmp_path_factory.mktemp("history"), features=FEATURES, model=model)
    history = run.weights.params["user"]["history"]
    history["until"] = jax.random.normal(
        jax.random.key(1), history["until"].shape
    )  # as if it had been trained
    return run


@pytest.fixture(scope="module")
def retriever(run):
    export(run, run.workdir / "bundle")  # which proves that the bundle scores as the trainer did
    return Retriever.load(run.workdir / "bundle")


def ids(found):
    return [item.item_id for item in found]


def test_a_known_user_is_asked_with_all_that_they_did(run, retriever):
    log = pa.concat_tables(
        [run.prepared.raw.train, run.prepared.raw.validation, run.prepared.raw.test]
    ).to_pylist()
    user = run.prepared.raw.test["user_id"][0].as_py()
    own = sorted((row for row in log if row["user_id"] == user), key=lambda row: row["timestamp"])[
        -HISTORY["max_length"] :
    ]
    city = run.prepared.users.to_pylist()[run.prepared.users["user_id"].to_pylist().index(user)][
        "city"
    ]
    history = [{name: row[name] for name in ("item_id", "event", "timestamp")} for row in own]
    by_hand = retriever.encode_users([{"user_id": user, "city": city, "history": history}])
    stored = retriever.embed_users([user])
    np.testing.assert_allclose(by_hand, stored, atol=1e-6)
    found = retriever.recommend(user, k=10)
    assert found.known and ids(found) == ids(
        retriever.recommend(user, rows=[{"city": city, "history": history}], k=10)
    )
    assert ids(retriever.recommend(user, rows=[{"city": city, "history": []}], k=10)) != ids(found)


def test_a_vector_depends_on_when_one_asks(run, retriever):
    user = run.prepared.raw.test["user_id"][0].as_py()
    row = retriever.user_rows.take([user]).to_pylist()[0]
    log = [
        time
        for name in ("train", "validation", "test")
        for time in getattr(run.prepared.raw, name)["timestamp"].to_pylist()
    ]
    last = row["history"][-1]["timestamp"]
    newest = max(log)
    stored = retriever.embed_users([user])
    for time in (newest, None):  # now, which is the newest time of the log
        np.testing.assert_allclose(
            retriever.encode_users([row | {"timestamp": time}]), stored, atol=1e-6
        )
    for since, same in ((newest - last + 2**28, False), (newest - last, True), (1, False)):
        vectors = retriever.encode_users([row | {"timestamp": last + since}])
        assert np.allclose(vectors, stored, atol=1e-4) == same, since
    late = retriever.encode_users([row | {"history": [{**row["history"][-1], "timestamp": None}]}])
    assert not np.allclose(
        late, retriever.encode_users([row | {"history": row["history"][-1:]}]), atol=1e-4
    )


def test_an_unknown_user_is_asked_with_an_empty_history(retriever):
    found = retriever.recommend("nobody", k=5)
    assert not found.known and ids(found) == ids(retriever.recommend(rows=[{"history": []}], k=5))
    assert ids(found) == ids(retriever.recommend(rows=[{"city": None}], k=5))


def test_a_request_brings_any_history(retriever):
    known = retriever.bundle.items["item_id"].to_pylist()[:6]
    plain = retriever.recommend(rows=[{"history": known}], k=5)
    assert len(plain) == 5 and not plain.known and not set(ids(plain)) & set(known)
    size = len(retriever.bundle.items)
    assert len(retriever.recommend(rows=[{"history": known}], k=size)) == size - len(known)
    assert ids(plain) == ids(
        retriever.recommend(rows=[{"history": known[:2] + known[-4:]}], k=5)
    )  # the latest L
    assert ids(retriever.recommend(rows=[{"history": ["no such item", None, known[0]]}], k=5))
    lists = retriever.recommend_many(
        ["nobody", *retriever.bundle.users["user_id"].to_pylist()[:3]], k=3
    )
    assert len(lists) == 12
    with pytest.raises(ConfigError, match="features.user.history: column 'history' holds string"):
        retriever.recommend(rows=[{"history": "P1"}], k=5)


def test_a_bundle_whose_histories_are_not_the_trainers_is_refused(run, tmp_path, monkeypatch):
    stored = export_module.known_users

    def cut(prepared):
        users = stored(prepared)
        place = users.column_names.index("history")
        column = users["history"]
        return users.set_column(
            place, "history", pa.array([row[:-1] for row in column.to_pylist()], column.type)
        )

    monkeypatch.setattr(export_module, "known_users", cut)
    with pytest.raises(BundleError, match="scores differ from the trainer's"):
        export(dataclasses.replace(run, workdir=tmp_path), tmp_path / "bundle")


def test_an_explanation_is_the_score_that_is_lost_without_an_event(run, retriever):
    """By a request for each history without one event, through the same door."""
    bundle = retriever.bundle
    history = bundle.encoder.spec.history
    user_rows = retriever.user_rows
    embed = functools.partial(bundle.towers.embed, "user")
    column = bundle.users["history"].to_pylist()
    user = bundle.users["user_id"][max(range(len(column)), key=lambda row: len(column[row]))]
    row = user_rows.take([user.as_py()])
    lost = explain(history, user_rows.encode, embed, row, bundle.vectors[:3])
    events = row["history"].to_pylist()[0][-HISTORY["max_length"] :]
    assert lost.shape == (len(events), 3) and len(events) == 4
    (raw,) = row.to_pylist()
    whole = retriever.encode_users([raw | {"history": events}]) @ bundle.vectors[:3].T
    for number in range(len(events)):
        rest = events[:number] + events[number + 1 :]
        without = retriever.encode_users([raw | {"history": rest}]) @ bundle.vectors[:3].T
        np.testing.assert_allclose(lost[number], (whole - without)[0], atol=1e-5)
    empty = row.set_column(
        row.column_names.index("history"), "history", pa.array([[]], row["history"].type)
    )
    assert explain(history, user_rows.encode, embed, empty, bundle.vectors[:3]).shape == (0, 3)
    assert explain(None, user_rows.encode, embed, row, bundle.vectors[:3]).shape == (0, 3)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_raw_histories_of_held_out_rows_are_what_these_rows_read(run, part):
    prepared = run.prepared
    rows = getattr(prepared, part)
    spans = prepared.histories.spans[part]
    table = pa.table(
        {
            "history": prepared.histories.requests_at(prepared.raw, spans),
            "timestamp": pa.array(rows.timestamp),
        }
    )
    encoded = prepared.encoder.encode("user", table, ["history"])
    for name, values in prepared.histories.take(spans).items():
        np.testing.assert_array_equal(encoded[name], values, err_msg=name)
