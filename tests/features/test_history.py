"""Histories: what a user had done strictly before, against a loop over rows; and as a request
brings them."""

import jax
import numpy as np
import pyarrow as pa
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.data.interactions import PARTS
from twotower.features.encoder import Encoder
from twotower.features.history import (
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
)
from twotower.features.spec import from_mappings
from twotower.pipeline.histories import KNOWN_PARTS, SPANS, windows
from twotower.pipeline.prepare import prepare

L, DAY = 4, 86_400
ITEM = {
    "item_id": {"type": "string", "embedding_size": 8, "oov_rows": 3},
    "kind": {"type": "strings", "separator": "|"},
}
IDS = "history/item_id"


def write_log(path, *, rows=200, times=None, seed=0):
    """A log of 12 users and 20 items; timestamps with many ties, or none."""
    rng = np.random.default_rng(seed)
    columns = {"user_id": rng.integers(0, 12, rows), "item_id": rng.integers(0, 20, rows)}
    if times:
        columns["timestamp"] = rng.integers(0, times, rows) * 1000
        columns["event"] = rng.choice(["view", "buy"], rows)
    lines = [",".join(columns)] + [",".join(map(str, row)) for row in zip(*columns.values())]
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared_of(path, split, **history):
    return prepare(
        from_dict(
            {
                "data": {"source": "csv", "interactions": {"path": str(path)}},
                "split": {"validation": 0.2, "test": 0.2, "accept_leakage": tuple(LEAKS)} | split,
                "features": {
                    "user": {"history": {"type": "history", "max_length": L} | history},
                    "item": {
                        "item_id": ITEM["item_id"],
                        "kind": {"type": "string", "column": "item_id"},
                    },
                },
            }
        )
    )


LEAKS = ("random_split", "repeated_pairs", "identical_rows", "future_rows")


def histories_by_hand(path, prepared, part):
    """For each row of a part the ids of the last L events that are strictly earlier, among those
    that it may know of."""
    lines = [line.split(",") for line in path.read_text().split("\n")[1:] if line]
    raw = [getattr(prepared.raw, name) for name in PARTS]
    places = prepared.raw.file_positions
    known = sorted((place, which) for which in KNOWN_PARTS[part] for place in places[which])
    found = []
    for place, user in zip(
        places[PARTS.index(part)], raw[PARTS.index(part)]["user_id"].to_pylist()
    ):
        # Time, or without one the place itself; a stable sort, so that the file orders what
        # happened at once.
        when = (lambda p: int(lines[p][2])) if len(lines[0]) > 2 else (lambda p: p)
        earlier = [p for p, _ in known if lines[p][0] == user and when(p) < when(place)]
        found.append([lines[p][1] for p in sorted(earlier, key=when)][-L:])
    return found


@pytest.mark.parametrize("times", [None, 40, 10**6], ids=["no times", "ties", "times"])
@pytest.mark.parametrize("kind", ["leave_last_out", "random", "time"])
def test_a_history_is_the_last_strictly_earlier_events_of_what_a_row_may_know(
    tmp_path, times, kind
):
    if kind == "time" and not times:
        pytest.skip("a split by time needs times")
    path = write_log(tmp_path / "log.csv", times=times)
    prepared = prepared_of(path, {"kind": kind})
    vocabulary = prepared.encoder.fitted["item", "item_id"].vocabulary
    longest = 0
    for part in PARTS:
        rows = getattr(prepared, part)
        got = prepared.histories.take(rows.context[SPANS])[IDS]
        expected = np.zeros_like(got)
        for i, ids in enumerate(histories_by_hand(path, prepared, part)):
            expected[i, : len(ids)] = vocabulary.rows(pa.array(ids, pa.large_string()))
            longest = max(longest, len(ids))
        np.testing.assert_array_equal(got, expected, err_msg=part)
    assert longest == L


def test_what_is_held_out_changes_no_history_of_training(tmp_path):
    """Whatever users do later, or in held-out rows between: histories of training rows stay as they
    are."""
    path = write_log(tmp_path / "log.csv", times=10**6)
    before = prepared_of(path, {"kind": "random"})
    lines = path.read_text().split("\n")
    for place in np.concatenate(before.raw.file_positions[1:]):
        user, _, rest = lines[place + 1].split(",", 2)
        lines[place + 1] = f"{user},19,{rest}"
    path.write_text("\n".join(lines))
    after = prepared_of(path, {"kind": "random"})
    for prepared in (before, after):
        assert (
            prepared.histories.spans["train"] <= len(prepared.train)
        ).all()  # events of training alone
    np.testing.assert_array_equal(
        *[p.histories.take(p.train.context[SPANS])[IDS] for p in (before, after)]
    )


def encoder(history=None, tables=None):
    train = pa.table(
        {
            "user_id": ["a", "a", "b"],
            "item_id": ["x", "y", "z"],
            "timestamp": [0, 5 * DAY, 10 * DAY],
        }
    )
    items = pa.table({"item_id": ["x", "y", "z", "new"], "kind": ["p|q", "p", None, "q"]})
    spec = from_mappings(
        {"user": {"history": {"type": "history", "max_length": 3} | (history or {})}, "item": ITEM}
    )
    return Encoder.fit(spec, train, users=pa.table({"user_id": ["a", "b"]}), items=items)


def encoded(encoder, rows):
    return encoder.encode("user", pa.table({"history": pa.array(rows)}))


def test_requests_bring_ids_or_mappings_of_any_length():
    enc = encoder()
    x, y, z = enc.fitted["item", "item_id"].vocabulary.rows(
        pa.array(["x", "y", "z"], pa.large_string())
    )
    got = encoded(enc, [["x", "y", "z", "x"], [], None, ["y", None, "z"]])[IDS]
    np.testing.assert_array_equal(got, [[y, z, x], [0, 0, 0], [0, 0, 0], [y, z, 0]])
    mappings = [
        ids and [{"item_id": i} for i in ids]
        for ids in (["x", "y", "z", "x"], [], None, ["y", "z"])
    ]
    np.testing.assert_array_equal(encoded(enc, mappings)[IDS], got)
    assert encoded(enc, [["never seen"]])[IDS][0, 0] in (
        1,
        2,
        3,
    )  # an out-of-vocabulary row, as in the item tower
    nothing = enc.encode("user", pa.table({"other": [1, 2]}))
    np.testing.assert_array_equal(nothing[IDS], np.zeros((2, 3)))
    assert enc.encode("user", pa.table({"history": pa.array([], pa.list_(pa.string()))}))[
        IDS
    ].shape == (0, 3)


@pytest.mark.parametrize(
    "rows,message",
    [
        ([1, 2], "holds int64; a history is a list"),
        ([[{"id": "x"}]], "must have an item_id"),
    ],
)
def test_requests_that_are_no_histories_are_refused(rows, message):
    with pytest.raises(ConfigError, match=f"features.user.history: .*{message}"):
        encoded(encoder(), rows)


def test_weights_of_events_fall_with_their_age_and_gaps_are_buckets():
    enc = encoder({"weights": {"view": 1, "purchase": 10.0}, "half_life": 5.0, "gaps": 8})
    events = [
        ("x", "view", 0),
        ("y", "purchase", 5 * DAY),
        ("z", "hover", 5 * DAY + 6),
        ("x", "view", None),
    ]
    rows = [
        [{"item_id": i, "event": e, "timestamp": t} for i, e, t in events][:3],
        [dict(zip(("item_id", "event"), events[3]))],
    ]
    got = encoded(enc, rows)
    weights = np.exp(got[HISTORY_WEIGHT][0])
    np.testing.assert_allclose(
        weights / weights[0], [1, 20, 2], rtol=1e-4
    )  # what is not named weighs 1
    np.testing.assert_array_equal(got[HISTORY_WEIGHT][1], [0, 0, 0])  # no time: as if it were now
    np.testing.assert_array_equal(
        got[HISTORY_TIME_SINCE_PREVIOUS], [[0, 8, 3], [0, 0, 0]]
    )  # 1 + min(floor(log2(1 + s)), 7)


def bucket(seconds, buckets):
    return 1 + min(int(np.log2(1 + seconds)), buckets - 1)


@pytest.mark.parametrize(
    "times,kind", [(40, "leave_last_out"), (10**6, "time")], ids=["ties", "times"]
)
def test_of_a_request_its_time_is_known_and_nothing_else(tmp_path, times, kind):
    path = write_log(tmp_path / "log.csv", times=times)
    prepared = prepared_of(path, {"kind": kind}, gaps=25, request_gap=True)
    lines = [line.split(",") for line in path.read_text().split("\n")[1:] if line]
    for part in PARTS:
        got = prepared.histories.take(getattr(prepared, part).context[SPANS])[HISTORY_TIME_TO_NEXT]
        raw, places = getattr(prepared.raw, part), prepared.raw.file_positions
        known = [place for which in KNOWN_PARTS[part] for place in places[which]]
        for row, (user, time) in enumerate(
            zip(raw["user_id"].to_pylist(), raw["timestamp"].to_pylist())
        ):
            happened = sorted(
                int(lines[p][2]) for p in known if lines[p][0] == user and int(lines[p][2]) < time
            )[-L:]
            expected = [bucket(seconds, 25) for seconds in np.diff([*happened, time])]
            assert got[row].tolist() == expected + [0] * (L - len(expected)), (part, row)


def test_a_request_may_bring_its_time_and_what_is_missing_has_a_bucket_of_its_own():
    enc = encoder({"gaps": 8, "request_gap": True})
    event = lambda item, time: {"item_id": item, "timestamp": time}  # noqa: E731
    lists = [
        [event("x", 10), event("y", 13)],
        [event("x", 10), event("y", None)],
        [],
        [event("x", 20)],
        [event("z", 0)] * 5,
    ]
    column = pa.array(
        lists, pa.list_(pa.struct([("item_id", pa.string()), ("timestamp", pa.int64())]))
    )
    asked = pa.table({"history": column, "timestamp": pa.array([17, 17, 17, None, 10**9])})
    found = enc.encode("user", asked)[HISTORY_TIME_TO_NEXT].tolist()
    assert found == [[3, 3, 0], [9, 9, 0], [0, 0, 0], [9, 0, 0], [1, 1, 8]]
    assert enc.encode("user", asked.drop_columns(["timestamp"]))[HISTORY_TIME_TO_NEXT].tolist()[
        0
    ] == [
        3,
        9,
        0,
    ]


def test_what_is_read_of_an_item_beside_its_id():
    enc = encoder({"reads": ["item_id", "kind"]})
    items = pa.table({"item_id": ["x", "y", "z"], "kind": ["p|q", "p", None]})
    item = dict(zip(("x", "y", "z"), enc.encode("item", items)["kind"]))
    got = encoded(enc, [["x", "z", "unknown"], ["y"]])["history/kind"]
    assert got.shape == (2, 3, 16)
    np.testing.assert_array_equal(got[0, 0], item["x"])
    np.testing.assert_array_equal(got[1, 0], item["y"])
    assert not got[0, 1:].any() and not got[1, 1:].any()
    assert {n: (i.table, i.history_length) for n, i in enc.inputs["user"].items()} == {
        IDS: ("item.item_id", 3),
        "history/kind": ("item.kind", 3),
    }
    assert enc.fitted["user", "history"].vocabulary is enc.fitted["item", "item_id"].vocabulary


def test_histories_are_the_same_inside_jit(tmp_path):
    path = write_log(tmp_path / "log.csv", times=10**6)
    prepared = prepared_of(
        path,
        {"kind": "time"},
        gaps=6,
        weights={"buy": 3.0},
        reads=("item_id", "kind"),
        request_gap=True,
    )
    histories, spans = prepared.histories, prepared.train.context[SPANS]
    inside = jax.jit(windows, static_argnums=3)(
        histories.training_events, histories.reads, spans, L
    )
    outside = histories.take(spans)
    assert (
        inside.keys()
        == outside.keys()
        == {HISTORY_TIME_SINCE_PREVIOUS, HISTORY_TIME_TO_NEXT, HISTORY_WEIGHT, IDS, "history/kind"}
    )
    for name, x in outside.items():
        np.testing.assert_array_equal(inside[name], x, err_msg=name)


def test_saved_and_grown_it_encodes_alike(tmp_path):
    enc = encoder({"reads": ["item_id", "kind"], "gaps": 8})
    rows = [[{"item_id": i, "timestamp": 9} for i in "xyzw"], []]
    enc.save(tmp_path / "encoder")
    loaded = Encoder.load(tmp_path / "encoder")
    assert (
        loaded.fitted["user", "history"].vocabulary is loaded.fitted["item", "item_id"].vocabulary
    )
    for name, x in encoded(enc, rows).items():
        np.testing.assert_array_equal(encoded(loaded, rows)[name], x)
    train = pa.table({"user_id": ["a", "c"], "item_id": ["x", "w"], "timestamp": [0, 5]})
    items = pa.table({"item_id": ["x", "y", "z", "w"], "kind": ["p|q", "p", None, "p"]})
    more = enc.extend(enc.spec, train, users=pa.table({"user_id": ["a", "b", "c"]}), items=items)
    first = encoded(enc, [["x", "y", "z"]])
    for name, x in encoded(more, [["x", "y", "z"]]).items():
        np.testing.assert_array_equal(x, first[name])
    new = encoded(more, [["w"]])
    assert (
        new[IDS][0, 0] == enc.fitted["item", "item_id"].vocabulary.size
        and new["history/kind"][0, 0].any()
    )


@pytest.mark.parametrize(
    "user,message",
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
        from_mappings({"user": user, "item": ITEM})
    with pytest.raises(ConfigError, match="features.item.h.side='item' must be user"):
        from_mappings({"item": {"h": {"type": "history"}, **ITEM}})


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("weights", {"buy": 10}, "needs a column 'event'"),
        ("gaps", 4, "gaps=4 needs a time in every row"),
        ("half_life", 3.0, "half_life=3.0 needs a time in every row"),
    ],
)
def test_what_the_log_does_not_have_is_refused(tmp_path, field, value, message):
    path = write_log(tmp_path / "log.csv")
    with pytest.raises(ConfigError, match=message):
        prepared_of(path, {"kind": "leave_last_out"}, **{field: value})


def test_stored_histories_are_those_of_the_end_of_the_log(tmp_path):
    path = write_log(tmp_path / "log.csv", times=10**6)
    prepared = prepared_of(
        path, {"kind": "time"}, gaps=6, half_life=2.0, weights={"buy": 3}, request_gap=True
    )
    users = np.arange(len(prepared.users))
    stored = prepared.users.append_column("history", prepared.histories.to_requests(prepared.raw))
    newest = max(
        part["timestamp"].to_numpy().max() for part in (prepared.raw.validation, prepared.raw.test)
    )
    stored = stored.append_column("timestamp", pa.array(np.full(len(users), newest)))
    now, again = (
        prepared.histories.take(prepared.histories.latest_spans(users)),
        prepared.encoder.encode("user", stored),
    )
    assert (
        set(now)
        == set(again)
        == {IDS, HISTORY_TIME_SINCE_PREVIOUS, HISTORY_TIME_TO_NEXT, HISTORY_WEIGHT}
    )
    for name in now:
        np.testing.assert_allclose(again[name], now[name], rtol=1e-6)
    lines = [line.split(",") for line in path.read_text().split("\n")[1:] if line]
    for user, history in zip(prepared.users["user_id"].to_pylist(), stored["history"].to_pylist()):
        own = sorted((row for row in lines if row[0] == user), key=lambda row: int(row[2]))[-L:]
        assert [(e["item_id"], e["event"], str(e["timestamp"])) for e in history] == [
            (r[1], r[3], r[2]) for r in own
        ]
