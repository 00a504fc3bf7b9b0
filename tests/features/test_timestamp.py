"""Times: hour, weekday and age against a plain reading of the definition."""

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.features.encoder_shop import DAY, fitted, shop
from twotower.core.errors import ConfigError

HOUR = 3600


def test_times_become_hour_weekday_and_age():
    train, _, _ = shop()
    newest = pc.max(train["timestamp"]).as_py()
    clock = {"type": "timestamp", "column": "timestamp", "age_buckets": 5}
    encoder = fitted({"user": {"clock": clock}})
    monday_at_5 = 4 * DAY + 5 * HOUR
    ages = [0, HOUR, 3 * HOUR, 7 * HOUR, -1800]
    times = [monday_at_5, *(newest - age for age in ages), None]
    ids = encoder.encode("user", pa.table({"timestamp": times}))["clock"]
    # Behind padding and the missing row come 24 hours, 7 weekdays and the ages.
    hour, weekday, age = 2, 2 + 24, 2 + 24 + 7
    assert ids[0].tolist() == [hour + 5, weekday, age + 4]
    assert (ids[1:6, 2] - age).tolist() == [0, 1, 2, 3, 0]
    assert ids[6].tolist() == [1, 0, 0]
    assert encoder.tables["user.clock"].rows == age + 5


def test_periods_hold_equally_many_items_and_the_last_one_the_future():
    _, _, items = shop()
    listed = {"type": "timestamp", "parts": ["period"], "periods": 2}
    encoder = fitted({"item": {"listed": listed}})
    ids = encoder.encode("item", items)["listed"][:, 0]
    # The missing row, and the two periods.
    assert set(ids.tolist()) == {1, 2, 3}
    assert 10 < (ids == 2).sum() < 17
    last = pc.max(items["listed"]).as_py()
    future = encoder.encode("item", pa.table({"listed": [last + 1000 * DAY, None]}))["listed"]
    assert future[:, 0].tolist() == [3, 1]
    assert encoder.tables["item.listed"].rows == 4


def test_a_time_is_one_however_it_is_stored():
    encoder = fitted({"item": {"listed": {"type": "timestamp"}}})

    def encode(column):
        return encoder.encode("item", pa.table({"listed": column}))["listed"].tolist()

    seconds = pa.array([300 * DAY + 7 * HOUR, None, 200 * DAY])
    moments = seconds.cast(pa.timestamp("s"))
    expected = encode(seconds)
    assert encode(moments) == expected
    assert encode(moments.cast(pa.timestamp("us"))) == expected
    assert encode(moments.cast(pa.timestamp("ms", "UTC"))) == expected
    assert encode(moments.cast(pa.string())) == expected
    with pytest.raises(ConfigError, match="features.item.listed: 'soon' in row 1 is not a time"):
        encode(["soon"])


def test_numbers_are_of_the_unit_that_is_named():
    seconds = pa.array([300 * DAY + 7 * HOUR, None, 200 * DAY])
    expected = fitted({"item": {"listed": {"type": "timestamp"}}})
    in_milliseconds = fitted({"item": {"listed": {"type": "timestamp", "unit": "ms"}}})
    ids = in_milliseconds.encode("item", pa.table({"listed": pc.multiply(seconds, 1000)}))
    assert (
        ids["listed"].tolist()
        == expected.encode("item", pa.table({"listed": seconds}))["listed"].tolist()
    )
