"""Guesses about a log: the columns of users, items and times, and the form of the times."""

import datetime

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.core.times import find_time_forms
from twotower.data.guess import guess_columns, guess_key
from twotower.data.sources.frames import read_table

NOW = datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC).timestamp()
SECONDS = [1_577_869_200, 1_577_955_600, 1_580_547_600, 1_591_000_000]
IDS = [3, 1, 3, 2]
NAMES = ["a", "b", "a", "c"]


def guessed(columns, **given):
    return guess_columns(pa.table(columns), now=NOW, **given)


@pytest.mark.parametrize(
    ("user", "item", "time"),
    [
        ("user_id", "item_id", "timestamp"),
        ("CustomerID", "StockCode", "InvoiceDate"),
        ("userId", "movieId", "timestamp"),
        ("visitorid", "itemid", "timestamp"),
        ("reviewerID", "asin", "unixReviewTime"),
        ("customer_id", "article_id", "t_dat"),
        ("client_number", "sku", "created_at"),
        ("user", "track", "ts"),
        ("fullVisitorId", "productSKU", "date"),
    ],
)
def test_columns_of_published_logs_are_found_by_name(user, item, time):
    others = {"item_price": [1.5, 2, 3, 4], "user_age": [30, 31, 30, 30], "quantity": IDS}
    found = guessed({**others, time: SECONDS, user: IDS, item: NAMES})
    assert (found.user, found.item, found.time) == (user, item, time)


def test_content_outweighs_a_name():
    """A name of times does not make a time, and a column of prices is no item."""
    found = guessed({"user": IDS, "item": [0.5, 0.25, 1, 2], "sku": NAMES, "time": [1, 2, 3, 4]})
    assert (found.item, found.time) == ("sku", "")


def test_what_is_given_is_taken():
    columns = {"user_id": IDS, "household": NAMES, "item": NAMES, "sku": IDS, "day": SECONDS}
    found = guessed(columns, user="household", item="sku", time="")
    assert (found.user, found.item, found.time) == ("household", "sku", "")


def test_columns_that_cannot_be_told_are_shown_with_the_keyword_to_give():
    with pytest.raises(ConfigError, match=r"user's: give user=NAME(.|\n)*'a': whole numbers such"):
        guessed({"a": IDS, "item": NAMES})
    with pytest.raises(ConfigError, match=r"may be 'movie_id' or 'track_id': give item=NAME"):
        guessed({"user": IDS, "movie_id": NAMES, "track_id": IDS})
    with pytest.raises(ConfigError, match=r"may be 'event_time' or 'time': give time=NAME"):
        guessed({"user": IDS, "item": NAMES, "event_time": SECONDS, "time": SECONDS})
    with pytest.raises(ConfigError, match="user='buyer' is no column"):
        guessed({"user": IDS, "item": NAMES}, user="buyer")


def test_of_several_times_that_of_the_event_is_taken():
    columns = {"user": IDS, "item": NAMES, "release_date": SECONDS, "date": SECONDS}
    assert guessed(columns).time == "date"


def moments(form):
    return [datetime.datetime.fromtimestamp(s, datetime.UTC).strftime(form) for s in SECONDS]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_the_unit_of_numbers_is_that_which_puts_them_into_our_time(unit):
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    (form,) = find_time_forms(pa.chunked_array([[s * factor for s in SECONDS]]), now=NOW)
    assert form.unit == unit and not form.format
    # As a CSV file has them.
    (form,) = find_time_forms(pa.chunked_array([[str(s * factor) for s in SECONDS]]), now=NOW)
    assert form.unit == unit


@pytest.mark.parametrize(
    "form",
    [
        "%d/%m/%Y %H:%M",
        "%d.%m.%Y",
        "%Y%m%d",
        "%m %d, %Y",
        "%d %b %Y",
        "%m/%d/%Y %I:%M %p",
        "%d.%m.%y %H:%M",
    ],
)
def test_the_format_of_texts_is_found(form):
    texts = moments(form)
    # A day above 12 tells the order of day and month.
    texts.append(datetime.datetime(2020, 5, 25, 10).strftime(form))
    (found,) = find_time_forms(pa.chunked_array([texts]), now=NOW)
    assert found.format == form


def test_iso_needs_no_format():
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S.%f"):
        (found,) = find_time_forms(pa.chunked_array([moments(form)]), now=NOW)
        assert found.format == ""


def test_days_and_months_that_cannot_be_told_apart_are_asked_for():
    columns = {"user": IDS, "item": NAMES, "date": ["01/02/2020", "03/04/2020"] * 2}
    with pytest.raises(ConfigError, match="%d/%m/%Y and %m/%d/%Y.*timestamp_format"):
        guessed(columns)


@pytest.mark.parametrize("values", [[1.5, 2.5], [1, 2], [19, 65], ["x", "y"], [True, False]])
def test_other_values_are_no_times(values):
    assert find_time_forms(pa.chunked_array([values]), now=NOW) == []
    with pytest.raises(ConfigError, match="in no unit or format|no unit"):
        guessed({"user": IDS, "item": NAMES, "when": values * (4 // len(values))}, time="when")


def test_times_of_tomorrow_and_of_the_last_century_are_none():
    day = 24 * 3600
    assert find_time_forms(pa.chunked_array([[int(NOW) + 3 * day]]), now=NOW) == []
    assert find_time_forms(pa.chunked_array([["1971-01-01"]]), now=NOW) == []


def test_types_of_frames_are_read_as_what_they_are():
    frames = [
        pd.DataFrame({"user": IDS, "item": pd.Categorical(NAMES), "at": pd.to_datetime(SECONDS)}),
        pl.DataFrame({"user": IDS, "item": pl.Series(NAMES, dtype=pl.Categorical)}).with_columns(
            at=pl.from_epoch(pl.Series(SECONDS), time_unit="s")
        ),
    ]
    for frame in frames:
        table, _ = read_table(frame, TableConfig(), "interactions")
        found = guess_columns(table, now=NOW)
        assert (found.user, found.item, found.time) == ("user", "item", "at")


def test_the_key_of_a_table_has_the_ids_of_the_log():
    ids = pa.chunked_array([["1", "2"]])
    items = pa.table({"item": ["x", "y"], "sku": [1, 2], "title": ["one", "two"]})
    assert guess_key(items, "product", ids, "item", now=NOW) == "sku"
    assert guess_key(items.rename_columns(["a", "id", "b"]), "p", ids, "item", now=NOW) == "id"
    with pytest.raises(ConfigError, match="'item' of the items has none of the ids"):
        guess_key(items.select(["item"]), "item", ids, "item", now=NOW)


def test_events_and_ratings_are_told_by_name_and_content():
    found = guessed({"user": IDS, "item": NAMES, "event_type": ["view"] * 4, "stars": [1, 2, 3, 4]})
    assert (found.event, found.rating) == ("event_type", "stars")
    # Numbers of events, and words for a rating, are something else.
    found = guessed({"user": IDS, "item": NAMES, "event": [9, 8, 7, 6], "rating": NAMES})
    assert (found.event, found.rating) == ("", "")


def test_a_form_of_the_caller_must_be_of_some_column():
    columns = {"user": IDS, "item": NAMES, "when": ["1st of May", "2nd of May"] * 2}
    with pytest.raises(ConfigError, match="times cannot be told: give time=NAME"):
        guess_columns(pa.table(columns), has_form=True, now=NOW)
    assert guess_columns(pa.table(columns), time="when", has_form=True, now=NOW).form is None
