"""Histories as requests bring them, the items that they read, and specifications that are none."""

import numpy as np
import pyarrow as pa
import pytest

from tests.features.encoder_shop import DAY, assert_same
from tests.features.history_encoder import ITEM_FEATURES, LENGTH, history_encoder
from twotower.core.errors import ConfigError
from twotower.features.encoder import Encoder
from twotower.features.fit import extend_encoder
from twotower.features.inputs import (
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
)
from twotower.features.spec import from_mappings

IDS = "history/item_id"


def encode(encoder, histories):
    return encoder.encode("user", pa.table({"history": pa.array(histories)}))


def test_requests_bring_ids_or_mappings_of_any_length():
    encoder = history_encoder()
    vocabulary = encoder.fitted["item", "item_id"].vocabulary
    x, y, z = vocabulary.rows(pa.array(["x", "y", "z"]))
    lists = [["x", "y", "z", "x"], [], None, ["y", None, "z"]]
    expected = [[y, z, x], [0, 0, 0], [0, 0, 0], [y, z, 0]]
    np.testing.assert_array_equal(encode(encoder, lists)[IDS], expected)
    mappings = [
        [{"item_id": "x"}, {"item_id": "y"}, {"item_id": "z"}, {"item_id": "x"}],
        [],
        None,
        [{"item_id": "y"}, {"item_id": "z"}],
    ]
    np.testing.assert_array_equal(encode(encoder, mappings)[IDS], expected)
    unknown = encode(encoder, [["never seen"]])[IDS]
    assert unknown[0, 0] in (1, 2, 3), "an out-of-vocabulary row, as in the item tower"


def test_requests_without_a_history_have_an_empty_one():
    encoder = history_encoder()
    arrays = encoder.encode("user", pa.table({"other": [1, 2]}))
    np.testing.assert_array_equal(arrays[IDS], np.zeros((2, LENGTH)))
    no_rows = pa.table({"history": pa.array([], pa.list_(pa.string()))})
    assert encoder.encode("user", no_rows)[IDS].shape == (0, LENGTH)


@pytest.mark.parametrize(
    "histories, message",
    [
        ([1, 2], "holds int64; a history is a list"),
        ([[{"id": "x"}]], "must have an item_id"),
        ([[{"item_id": "x", "timestamp": "soon"}]], "soon"),
        ([[["x"]]], "are not single strings or numbers"),
    ],
)
def test_requests_that_are_no_histories_are_refused(histories, message):
    with pytest.raises(ConfigError, match=f"features.user.history: .*{message}"):
        encode(history_encoder(gaps=4), histories)


def test_weights_of_events_fall_with_their_age_and_gaps_are_buckets():
    encoder = history_encoder(weights={"view": 1, "purchase": 10.0}, half_life=5.0, gaps=8)
    histories = [
        [
            {"item_id": "x", "event": "view", "timestamp": 0},
            {"item_id": "y", "event": "purchase", "timestamp": 5 * DAY},
            {"item_id": "z", "event": "hover", "timestamp": 5 * DAY + 6},
        ],
        [{"item_id": "x", "event": "view"}],
    ]
    arrays = encode(encoder, histories)
    weights = np.exp(arrays[HISTORY_WEIGHT][0])
    # An event that is not named weighs 1.
    np.testing.assert_allclose(weights / weights[0], [1, 20, 2], rtol=1e-4)
    # Without a time it weighs as if it were now.
    np.testing.assert_array_equal(arrays[HISTORY_WEIGHT][1], [0, 0, 0])
    # 1 + min(floor(log2(1 + seconds)), 7)
    expected = [[0, 8, 3], [0, 0, 0]]
    np.testing.assert_array_equal(arrays[HISTORY_TIME_SINCE_PREVIOUS], expected)


def test_a_request_may_bring_its_time_and_what_is_missing_has_a_bucket_of_its_own():
    encoder = history_encoder(gaps=8, request_gap=True)

    def event(item, time):
        return {"item_id": item, "timestamp": time}

    histories = [
        [event("x", 10), event("y", 13)],
        [event("x", 10), event("y", None)],
        [],
        [event("x", 20)],
        [event("z", 0)] * 5,
    ]
    kind = pa.list_(pa.struct([("item_id", pa.string()), ("timestamp", pa.int64())]))
    times = [17, 17, 17, None, 10**9]
    requests = pa.table({"history": pa.array(histories, kind), "timestamp": times})
    to_next = encoder.encode("user", requests)[HISTORY_TIME_TO_NEXT]
    assert to_next.tolist() == [[3, 3, 0], [9, 9, 0], [0, 0, 0], [9, 0, 0], [1, 1, 8]]
    timeless = encoder.encode("user", requests.drop_columns(["timestamp"]))
    assert timeless[HISTORY_TIME_TO_NEXT][0].tolist() == [3, 9, 0]


def test_what_is_read_of_an_item_beside_its_id():
    encoder = history_encoder(reads=["item_id", "kind"])
    items = pa.table({"item_id": ["x", "y"], "kind": ["p|q", "p"]})
    kind_of_x, kind_of_y = encoder.encode("item", items)["kind"]
    kinds = encode(encoder, [["x", "z", "unknown"], ["y"]])["history/kind"]
    assert kinds.shape == (2, LENGTH, 16)
    np.testing.assert_array_equal(kinds[0, 0], kind_of_x)
    np.testing.assert_array_equal(kinds[1, 0], kind_of_y)
    assert not kinds[0, 1:].any() and not kinds[1, 1:].any()
    inputs = encoder.inputs["user"]
    assert {name: (i.table, i.history_length) for name, i in inputs.items()} == {
        IDS: ("item.item_id", LENGTH),
        "history/kind": ("item.kind", LENGTH),
    }
    item_vocabulary = encoder.fitted["item", "item_id"].vocabulary
    assert encoder.fitted["user", "history"].vocabulary is item_vocabulary


def test_saved_it_encodes_alike(tmp_path):
    encoder = history_encoder(reads=["item_id", "kind"], gaps=8)
    encoder.save(tmp_path / "encoder")
    loaded = Encoder.load(tmp_path / "encoder")
    item_vocabulary = loaded.fitted["item", "item_id"].vocabulary
    assert loaded.fitted["user", "history"].vocabulary is item_vocabulary
    histories = [[{"item_id": item, "timestamp": 9} for item in "xyzw"], []]
    assert_same(encode(loaded, histories), encode(encoder, histories))


def test_extended_it_encodes_known_items_alike_and_knows_new_ones():
    encoder = history_encoder(reads=["item_id", "kind"], gaps=8)
    larger = extend_encoder(
        encoder,
        encoder.spec,
        pa.table({"user_id": ["a", "c"], "item_id": ["x", "w"], "timestamp": [0, 5]}),
        users=pa.table({"user_id": ["a", "b", "c"]}),
        items=pa.table({"item_id": ["x", "y", "z", "w"], "kind": ["p|q", "p", None, "p"]}),
    )
    known = [["x", "y", "z"]]
    assert_same(encode(larger, known), encode(encoder, known))
    new = encode(larger, [["w"]])
    assert new[IDS][0, 0] == encoder.fitted["item", "item_id"].vocabulary.size
    assert new["history/kind"][0, 0].any()


@pytest.mark.parametrize(
    "user, message",
    [
        (
            {"h": {"type": "history"}, "g": {"type": "history"}},
            "features.user.g is a second history",
        ),
        (
            {"h": {"type": "history", "reads": ["item"]}},
            "features.user.h.reads='item' is not known; did you mean 'item_id'",
        ),
        (
            {"h": {"type": "history", "reads": ["kind"]}},
            "must begin with a string feature of the column 'item_id'",
        ),
        (
            {"h": {"type": "history", "request_gap": True}},
            "features.user.h.gaps=0 must be how many buckets request_gap has",
        ),
        (
            {"h": {"type": "history", "max_length": 0}},
            "features.user.h.max_length=0 must be at least 1",
        ),
        (
            {"h": {"type": "history", "weights": {"view": 0}}},
            "must be a mapping of events to numbers above 0",
        ),
        (
            {"h": {"type": "history", "embedding_size": 8}},
            "features.user.h.embedding_size=8 must be left out",
        ),
    ],
)
def test_histories_that_cannot_be_are_refused(user, message):
    with pytest.raises(ConfigError, match=message):
        from_mappings({"user": user, "item": ITEM_FEATURES})


def test_items_have_no_history():
    with pytest.raises(ConfigError, match="features.item.h.side='item' must be user"):
        from_mappings({"item": {"h": {"type": "history"}, **ITEM_FEATURES}})
