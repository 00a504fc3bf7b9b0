"""Histories of a log: what a user had done strictly before each row, against a loop over rows."""

import jax
import numpy as np
import pyarrow as pa
import pytest

from tests.pipeline.history_log import LENGTH, prepare_log, read_log, write_log
from twotower.core.errors import ConfigError
from twotower.data.split import PARTS
from twotower.features.inputs import (
    HISTORY_COUNT,
    HISTORY_ROW,
    HISTORY_SLOT,
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
)
from twotower.pipeline import histories
from twotower.pipeline.batches import SPANS, flat_events, windows
from twotower.pipeline.histories import KNOWN_PARTS

IDS = "history/item_id"


def items_before_each_row(log, prepared, part):
    """For each row of a part the ids of the last events that are strictly earlier, among those that
    it may know of."""
    positions = prepared.raw.file_positions
    known = sorted(np.concatenate([positions[number] for number in KNOWN_PARTS[part]]))

    def moment(position):
        # Without times the position is the time.
        return int(log[position][2]) if len(log[0]) > 2 else position

    histories = []
    for position in positions[PARTS.index(part)]:
        user = log[position][0]
        earlier = [p for p in known if log[p][0] == user and moment(p) < moment(position)]
        # A stable sort: the file orders what happened at once.
        histories.append([log[p][1] for p in sorted(earlier, key=moment)][-LENGTH:])
    return histories


@pytest.mark.parametrize("times", [None, 40, 10**6], ids=["no times", "ties", "times"])
@pytest.mark.parametrize("kind", ["leave_last_out", "random", "time"])
def test_a_history_is_the_last_strictly_earlier_events_of_what_a_row_may_know(
    tmp_path, times, kind
):
    if kind == "time" and not times:
        pytest.skip("a split by time needs times")
    path = write_log(tmp_path / "log.csv", times=times)
    prepared = prepare_log(path, {"kind": kind})
    vocabulary = prepared.encoder.fitted["item", "item_id"].vocabulary
    longest = 0
    for part in PARTS:
        ids = prepared.histories.take(getattr(prepared, part).context[SPANS])[IDS]
        expected = np.zeros_like(ids)
        for row, items in enumerate(items_before_each_row(read_log(path), prepared, part)):
            expected[row, : len(items)] = vocabulary.rows(pa.array(items, pa.large_string()))
            longest = max(longest, len(items))
        np.testing.assert_array_equal(ids, expected, err_msg=part)
    assert longest == LENGTH


def test_what_is_held_out_changes_no_history_of_training(tmp_path):
    """Whatever users do later, or in held-out rows between: histories of training rows stay as they
    are."""
    path = write_log(tmp_path / "log.csv", times=10**6)
    before = prepare_log(path, {"kind": "random"})
    lines = path.read_text().splitlines()
    for position in np.concatenate(before.raw.file_positions[1:]):
        user, _, rest = lines[position + 1].split(",", 2)
        lines[position + 1] = f"{user},19,{rest}"
    path.write_text("\n".join(lines))
    after = prepare_log(path, {"kind": "random"})
    ids = []
    for prepared in (before, after):
        spans = prepared.train.context[SPANS]
        assert (spans <= len(prepared.train)).all(), "events of held-out rows"
        ids.append(prepared.histories.take(spans)[IDS])
    np.testing.assert_array_equal(*ids)


def bucket(seconds, buckets):
    return 1 + min(int(np.log2(1 + seconds)), buckets - 1)


@pytest.mark.parametrize(
    "times, kind", [(40, "leave_last_out"), (10**6, "time")], ids=["ties", "times"]
)
def test_a_row_knows_its_own_time_and_nothing_else_of_itself(tmp_path, times, kind):
    path = write_log(tmp_path / "log.csv", times=times)
    prepared = prepare_log(path, {"kind": kind}, gaps=25, request_gap=True)
    log = read_log(path)
    for part in PARTS:
        spans = getattr(prepared, part).context[SPANS]
        to_next = prepared.histories.take(spans)[HISTORY_TIME_TO_NEXT]
        known = [
            (log[position][0], int(log[position][2]))
            for number in KNOWN_PARTS[part]
            for position in prepared.raw.file_positions[number]
        ]
        rows = getattr(prepared.raw, part)
        users_and_times = zip(rows["user_id"].to_pylist(), rows["timestamp"].to_pylist())
        for row, (user, time) in enumerate(users_and_times):
            moments = sorted(t for other, t in known if other == user and t < time)[-LENGTH:]
            expected = [bucket(seconds, 25) for seconds in np.diff([*moments, time])]
            expected += [0] * (LENGTH - len(expected))
            assert to_next[row].tolist() == expected, (part, row)


def test_histories_are_the_same_inside_jit(tmp_path):
    path = write_log(tmp_path / "log.csv", times=10**6)
    prepared = prepare_log(
        path,
        {"kind": "time"},
        gaps=6,
        weights={"buy": 3.0},
        reads=("item_id", "kind"),
        request_gap=True,
    )
    histories = prepared.histories
    spans = prepared.train.context[SPANS]
    compiled = jax.jit(windows, static_argnums=3)
    inside = compiled(histories.training_events, histories.reads, spans, LENGTH)
    outside = histories.take(spans)
    assert set(outside) == {
        IDS,
        "history/kind",
        HISTORY_TIME_SINCE_PREVIOUS,
        HISTORY_TIME_TO_NEXT,
        HISTORY_WEIGHT,
    }
    assert set(inside) == set(outside)
    for name, array in outside.items():
        np.testing.assert_array_equal(inside[name], array, err_msg=name)


def test_spans_one_after_the_other_are_the_windows_without_their_padding(tmp_path):
    path = write_log(tmp_path / "log.csv", times=10**6)
    prepared = prepare_log(
        path, {"kind": "time"}, gaps=6, weights={"buy": 3.0}, reads=("item_id",), request_gap=True
    )
    histories = prepared.histories
    spans = prepared.train.context[SPANS][::3]
    lengths = spans[:, 1] - spans[:, 0]
    assert 0 in lengths and LENGTH in lengths
    total = lengths.sum()
    compiled = jax.jit(flat_events, static_argnums=3)
    flat = compiled(histories.training_events, histories.reads, spans, int(total) + 5)
    outside = flat_events(histories.training_events, histories.reads, spans, int(total) + 5)
    assert set(outside) == set(flat)
    for name, values in outside.items():
        np.testing.assert_array_equal(values, flat[name], strict=True, err_msg=name)
    padded = windows(histories.training_events, histories.reads, spans, LENGTH)
    row = np.repeat(np.arange(len(spans)), lengths)
    slot = np.concatenate([np.arange(length) for length in lengths])
    np.testing.assert_array_equal(flat.pop(HISTORY_COUNT), lengths)
    np.testing.assert_array_equal(flat.pop(HISTORY_ROW)[:total], row)
    np.testing.assert_array_equal(flat.pop(HISTORY_SLOT)[:total], slot)
    assert set(flat) == set(padded)
    for name, values in flat.items():
        np.testing.assert_array_equal(values[:total], padded[name][row, slot], err_msg=name)
    assert not flat[IDS][total:].any()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("weights", {"buy": 10}, "needs a column 'event'"),
        ("gaps", 4, "gaps=4 needs a time in every row"),
        ("half_life", 3.0, "half_life=3.0 needs a time in every row"),
    ],
)
def test_what_the_log_does_not_have_is_refused(tmp_path, field, value, message):
    path = write_log(tmp_path / "log.csv")
    with pytest.raises(ConfigError, match=message):
        prepare_log(path, {"kind": "leave_last_out"}, **{field: value})


def test_more_events_than_can_be_numbered_are_refused(tmp_path, monkeypatch):
    """Spans of 32 bits would wrap, and rows read the events of others."""
    path = write_log(tmp_path / "log.csv")
    log = path.read_text().splitlines()
    monkeypatch.setattr(histories, "MAX_EVENTS", len(log))
    with pytest.raises(ConfigError, match="cannot be numbered. Train on the latest rows"):
        prepare_log(path, {"kind": "leave_last_out"})


def test_histories_as_requests_bring_them_are_those_of_the_end_of_the_log(tmp_path):
    path = write_log(tmp_path / "log.csv", times=10**6)
    prepared = prepare_log(
        path, {"kind": "time"}, gaps=6, half_life=2.0, weights={"buy": 3}, request_gap=True
    )
    users = np.arange(len(prepared.users))
    held_out = (prepared.raw.validation, prepared.raw.test)
    newest = max(rows["timestamp"].to_numpy().max() for rows in held_out)
    raw_histories = prepared.histories.to_requests(prepared.raw)
    requests = prepared.users.append_column("history", raw_histories)
    requests = requests.append_column("timestamp", pa.array(np.full(len(users), newest)))

    at_the_end = prepared.histories.take(prepared.histories.latest_spans(users))
    requested = prepared.encoder.encode("user", requests)
    assert set(at_the_end) == {
        IDS,
        HISTORY_TIME_SINCE_PREVIOUS,
        HISTORY_TIME_TO_NEXT,
        HISTORY_WEIGHT,
    }
    assert set(requested) == set(at_the_end)
    for name, array in at_the_end.items():
        np.testing.assert_allclose(requested[name], array, rtol=1e-6)

    log = read_log(path)
    for user, events in zip(prepared.users["user_id"].to_pylist(), raw_histories.to_pylist()):
        own = sorted((row for row in log if row[0] == user), key=lambda row: int(row[2]))
        expected = [
            {"item_id": item, "event": event, "timestamp": int(time)}
            for _, item, time, event in own[-LENGTH:]
        ]
        assert events == expected
