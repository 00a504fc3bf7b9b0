"""Times: one parser, by columns and by single values, of all forms that logs have."""

import datetime
import decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from twotower.core.arrow import BadValue
from twotower.core.times import TimeForm, are_spreadsheet_days, find_time_forms

NOW = datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC).timestamp()
MOMENT = 1_700_000_000  # 2023-11-14 22:13:20
MINUTE = MOMENT - 20
MIDNIGHT = 1_699_920_000


def column(values, kind=None):
    return pa.chunked_array([pa.array(values, kind)])


def read(value, **form):
    """The seconds of a value, by a column and by itself."""
    seconds = TimeForm(**form).one(value)
    many = column([value, None, value])
    assert TimeForm(**form).column(many).to_pylist() == [seconds, None, seconds]
    return seconds


@pytest.mark.parametrize(
    "text",
    [
        "2023-11-14 22:13:20",
        "2023-11-14T22:13:20Z",
        "2023-11-14t22:13:20z",
        "2023-11-14 22:13:20 UTC",
        "2023-11-14 22:13:20.999999999",
        "2023-11-14T22:13:20,5",
        "2023-11-15T00:13:20+02:00",
        "2023-11-15 00:13:20 +0200",
        "2023-11-15T00:13:20.25+02",
        " 2023-11-14 22:13:20 ",
        "20231114T221320Z",
        "1700000000",
        "1700000000.9",
        "1.7e9",
    ],
)
def test_numbers_and_iso_8601_are_read_without_a_format(text):
    assert read(text) == MOMENT


def test_days_and_fields_without_a_leading_zero_are_read():
    assert read("2023-11-14") == MIDNIGHT
    assert read("2023-1-2 3:04") == 1_672_628_640


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        (MOMENT, "s"),
        (MOMENT * 1000 + 999, "ms"),
        (MOMENT * 10**6 + 1, "us"),
        (MOMENT * 10**9 + 999_999_999, "ns"),
        (str(MOMENT * 10**9 + 999_999_999), "ns"),
        (float(MOMENT * 1000), "ms"),
        (np.int64(MOMENT * 1000), "ms"),
        (decimal.Decimal(f"{MOMENT}.5"), "s"),
    ],
)
def test_numbers_are_of_the_unit(value, unit):
    assert read(value, unit=unit) == MOMENT


@pytest.mark.parametrize(
    "value",
    [
        datetime.datetime(2023, 11, 14, 22, 13, 20, 999_999),
        datetime.datetime(2023, 11, 14, 22, 13, 20, tzinfo=datetime.UTC),
        pd.Timestamp("2023-11-15 00:13:20", tz="Europe/Helsinki"),
        np.datetime64("2023-11-14T22:13:20.5"),
        pa.scalar(MOMENT, pa.timestamp("s")).as_py(),
    ],
)
def test_typed_times_mean_what_their_types_say(value):
    for form in (TimeForm(), TimeForm("ms"), TimeForm(format="%d/%m/%Y")):
        assert form.one(value) == MOMENT
    typed = pa.chunked_array([pa.array([value])]) if not isinstance(value, np.datetime64) else None
    if typed is not None:
        assert TimeForm("ns").column(typed).to_pylist() == [MOMENT]
    assert TimeForm("ms").one(datetime.date(2023, 11, 14)) == MIDNIGHT


@pytest.mark.parametrize(
    ("format", "text", "seconds"),
    [
        ("%d/%m/%Y %H:%M", "14/11/2023 22:13", MINUTE),
        ("%d/%m/%y %H:%M", "14/11/23 22:13", MINUTE),
        ("%m/%d/%Y %I:%M %p", "11/14/2023 10:13 PM", MINUTE),
        ("%d.%m.%Y %H:%M:%S.%f", "14.11.2023 22:13:20.250000", MOMENT),
        ("%d.%m.%Y %H:%M:%S.%f %z", "15.11.2023 00:13:20.25 +02:00", MOMENT),
        ("%Y%m%d", "20231114", MIDNIGHT),
        ("%Y%m%d", 20231114, MIDNIGHT),
        ("%Y%m%d", 20231114.0, MIDNIGHT),
        ("%d/%m/%Y", "1/2/2023", 1_675_209_600),
        ("%d/%m/%Y", "29/02/2024", 1_709_164_800),
    ],
)
def test_a_format_reads_what_it_says(format, text, seconds):
    assert read(text, format=format) == seconds


@pytest.mark.parametrize(
    ("form", "value", "cure"),
    [
        ({}, "soon", "not a time"),
        ({}, "2023-02-30", "not a time"),
        ({}, "14/11/23 22:13", r"timestamp_format='%d/%m/%y %H:%M'"),
        ({}, "11/14/2023 10:13 PM", r"timestamp_format='%m/%d/%Y %I:%M %p'"),
        ({}, "2023/11/14 22:13:20", r"timestamp_format='%Y/%m/%d %H:%M:%S'"),
        ({}, "01/02/2023", r"'%d/%m/%Y' or '%m/%d/%Y'"),
        ({"format": "%d/%m/%Y %H:%M"}, "14/11/23 22:13", r"timestamp_format='%d/%m/%y %H:%M'"),
        ({"format": "%d/%m/%Y"}, "30/02/2023", "not a time of the form"),
        ({"format": "%d/%m/%Y"}, "31/11/2023", "not a time of the form"),
        ({"format": "%d/%m/%Y"}, "2023-11-14", "not a time of the form"),
        ({}, datetime.time(3), "times of day without a date"),
        ({}, datetime.timedelta(1), "durations"),
        ({}, True, "true and false"),
        ({}, b"x", "type binary"),
        ({}, [1], "type list"),
        ({}, 2**64 - 1, "no time"),
        ({}, 2**70, "no time"),
        ({}, float("inf"), "too large"),
        ({}, "\ud800", "no time"),
    ],
)
def test_what_is_no_time_is_refused_and_the_format_that_reads_it_is_offered(form, value, cure):
    with pytest.raises(BadValue, match=cure):
        TimeForm(**form).one(value)


@pytest.mark.parametrize(
    "value", [None, pd.NaT, pd.NA, float("nan"), np.datetime64("NaT"), "", "NaT"]
)
def test_a_missing_time_is_none(value):
    assert TimeForm().one(value) is None
    assert TimeForm(format="%d/%m/%Y").one(value) is None


def test_a_wrong_time_is_named_with_its_row_and_the_others_tell_the_format():
    values = column(["2023-11-01T10:00:00.5"] * 9 + ["unknown", "x"])
    with pytest.raises(BadValue) as error:
        TimeForm().column(values)
    assert (error.value.row, error.value.value) == (9, "unknown")
    # By itself the first could be either.
    with pytest.raises(BadValue, match=r"timestamp_format='%m/%d/%Y'\.$"):
        TimeForm().column(column(["01/02/2023", "01/25/2023"]))


def test_times_of_which_some_have_a_zone_are_refused_as_such():
    with pytest.raises(BadValue, match="has none, while '2023-11-14T22:13:20Z' has a time zone"):
        TimeForm().column(column(["2023-11-14T22:13:20Z", "2023-11-14T22:13:20"]))
    zones = column(["2023-11-14T22:13:20Z", "2023-11-15T00:13:20+02:00", "1700000000"])
    assert TimeForm().column(zones).to_pylist() == [MOMENT] * 3


def test_times_before_1970_are_rounded_down():
    assert TimeForm().one(datetime.datetime(1969, 12, 31, 23, 59, 59, 500_000)) == -1
    assert TimeForm("ms").one(-500) == -1 == TimeForm("ms").one(-500.0)


def test_years_and_days_written_as_numbers_are_told():
    assert find_time_forms(column([20231114]), now=NOW) == [TimeForm(format="%Y%m%d")]
    assert find_time_forms(column([2023, 2019]), now=NOW) == [TimeForm(format="%Y")]
    assert are_spreadsheet_days(column([45244.93])) and not are_spreadsheet_days(column([MOMENT]))
