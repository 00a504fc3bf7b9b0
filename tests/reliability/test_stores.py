"""Stores that others write to: what is not ours is nothing, in one line and in bounded time."""

import datetime
import decimal
import math
import socket

import pytest

from twotower.core.errors import ConfigError
from twotower.integrations import mlflow_store, redis_store
from twotower.integrations.redis_store import RedisStore
from twotower.retrieval.retriever import Recommendation, Recommendations

WIDTHS = ["-1", "0", str(10**12), "1e400", "NaN", "Infinity", '"4"', "true", "4.0", "null", "[4]"]


@pytest.fixture
def answers(monkeypatch):
    """A store whose server answers what a test puts here."""
    pytest.importorskip("redis")
    store = RedisStore("redis://127.0.0.1:1")
    held = {}
    monkeypatch.setattr(store, "try_call", lambda call: held["value"])
    return store, held


@pytest.mark.parametrize(
    "value",
    [f'{{"version": "v", "width": {width}}}'.encode() for width in WIDTHS]
    + [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"5", b"[]", b"{}", b'{"width": 4}'],
)
def test_what_is_no_current_version_is_none(answers, value):
    store, held = answers
    held["value"] = value
    assert store.current() is None
    vectors, found = store.vectors("user", ["a"])
    assert vectors.shape == (1, 0) and not found.any()
    assert redis_store._from_json(value) is None


@pytest.mark.parametrize(
    "item",
    [
        '["a", 1e999999, {}]',
        f'["a", {10**400}, {{}}]',
        '["a", "x", {}]',
        '["a", 1.0, {"d": {"__kind": "Decimal", "value": "x"}}]',
        '["a", 1.0, {"d": {"__kind": "date", "value": 5}}]',
        '["a", 1.0, {"d": {"__kind": "nothing", "value": ""}}]',
        '["a", 1.0, 5]',
        '["a", 1.0]',
    ],
)
def test_what_is_no_list_is_made_anew(item):
    found = redis_store._from_json(f'{{"known": true, "items": [{item}]}}'.encode())
    assert found is None or not math.isfinite(found[0].score)


def test_display_columns_of_all_kinds_come_back_as_they_were():
    display = {
        "day": datetime.date(2024, 2, 29),
        "moment": datetime.datetime(2024, 1, 1, 1, 2, 3, 4, tzinfo=datetime.UTC),
        "at": datetime.time(1, 2, 3),
        "for": datetime.timedelta(days=-1, microseconds=7),
        "price": decimal.Decimal("12345678901234567890.10"),
        "bytes": b"\x00\xff",
        "tags": [datetime.date(2024, 1, 1), None],
        "nested": {"price": decimal.Decimal("1.50")},
    }
    made = Recommendations([Recommendation("a", 0.5, display)], known=False)
    found = redis_store._from_json(redis_store._to_json(made).encode())
    assert found == made and not found.known
    assert {key: type(value) for key, value in found[0].display.items()} == {
        key: type(value) for key, value in display.items()
    }


@pytest.mark.parametrize(
    "uri, message",
    [
        ("sqlite:///{folder}/text.db", "text.db is no SQLite database"),
        ("sqlite:///{folder}/nowhere/x.db", "there is no folder"),
        ("http://user:secret@127.0.0.1:{port}", "127.0.0.1:.* does not answer within"),
    ],
)
def test_a_store_that_is_none_is_said_in_a_line(tmp_path, monkeypatch, uri, message):
    """A server that takes the connection and says no word is the slowest of those that are none."""
    pytest.importorskip("requests")
    monkeypatch.setattr(mlflow_store, "ANSWER_SECONDS", 0.2)
    (tmp_path / "text.db").write_text("no database")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = uri.format(folder=tmp_path, port=server.getsockname()[1])
        with pytest.raises(ConfigError, match=message) as caught:
            mlflow_store.check_store(uri)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_an_empty_sqlite_file_is_a_store(tmp_path):
    (tmp_path / "new.db").touch()
    mlflow_store.check_store(f"sqlite:///{tmp_path}/new.db")
