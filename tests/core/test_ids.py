"""Ids: one text for each, whatever type and spelling a source has."""

import datetime
import decimal
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from twotower.core.arrow import BadValue
from twotower.core.ids import IdForm, written_forms

DIGITS = IdForm.DIGITS
TEXT = IdForm.TEXT


def column(values, kind=None):
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    ("written", "form", "read"),
    [
        (["7", "12.0", None], DIGITS, ["7", "12", None]),
        (["7", "nan", " 3 ", ""], DIGITS, ["7", None, "3", None]),
        (["-7", "0"], DIGITS, ["-7", "0"]),
        (["7", "012"], TEXT, ["7", "012"]),
        (["7.0", "7.5"], TEXT, ["7.0", "7.5"]),
        (["7", "1e3"], TEXT, ["7", "1e3"]),
        (["u 1 ", "\tu2"], TEXT, ["u 1", "u2"]),
        (["e\u0301", "é"], TEXT, ["é", "é"]),
    ],
)
def test_ids_of_text_are_digits_where_all_are_whole_numbers(written, form, read):
    assert IdForm.find(column(written)) is form
    assert form.column(column(written)).to_pylist() == read


BIG = 2**62 + 1
HUGE = 10**37 + 1


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([BIG, BIG + 1], pa.int64(), [str(BIG), str(BIG + 1)]),
        ([2**64 - 1], pa.uint64(), [str(2**64 - 1)]),
        ([3.0, float("nan"), None], pa.float64(), ["3", None, None]),
        ([decimal.Decimal(HUGE)], pa.decimal128(38, 0), [str(HUGE)]),
        ([decimal.Decimal(HUGE)], pa.decimal256(76, 0), [str(HUGE)]),
        ([decimal.Decimal("5.00"), None], pa.decimal128(10, 2), ["5", None]),
        (["a", "b"], pa.large_string(), ["a", "b"]),
        (["a", "b"], pa.string_view(), ["a", "b"]),
    ],
)
def test_typed_ids_are_their_digits_or_text(values, kind, read):
    typed = column(values, kind)
    assert IdForm.find(typed).column(typed).to_pylist() == read
    coded = typed.dictionary_encode()
    assert IdForm.find(coded).column(coded).to_pylist() == read


def test_uuids_have_their_canonical_form():
    value = uuid.UUID("0F0E0D0C-0B0A-0908-0706-050403020100")
    assert TEXT.column(column([value])).to_pylist() == [str(value)] == [TEXT.one(value)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([b"\xff"], "bytes: decode"),
        ([["a", "b"]], "lists: write one row"),
        ([True], "type bool"),
        ([datetime.date(2020, 1, 1)], "type date32"),
        ([{"a": 1}], "type struct"),
        ([1.0, 1.5], "1.5 is no exact whole number"),
        ([2.0**53], "no exact whole number"),
        ([decimal.Decimal("1.50")], "'1.50' is no exact whole number"),
        (["a", "b\x00"], "NUL"),
        (["\ufeffa"], "byte order mark"),
    ],
)
def test_what_is_no_id_is_refused_with_the_way_out(values, problem):
    for form in IdForm:
        with pytest.raises(BadValue, match=problem):
            form.column(column(values))
        with pytest.raises(BadValue):
            form.one(values[-1])


@pytest.mark.parametrize(
    "value",
    [3, 3.0, "3", " 3", np.int64(3), np.uint8(3), np.float32(3), decimal.Decimal("3.0")],
)
def test_a_single_id_is_the_same_by_every_type(value):
    assert DIGITS.one(value) == "3" == TEXT.one(value)
    assert (DIGITS.one("3.0"), TEXT.one("3.0")) == ("3", "3.0")


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, "", " "])
def test_a_missing_id_is_none(value):
    assert DIGITS.one(value) is None is TEXT.one(value)


@pytest.mark.parametrize("value", [True, np.bool_(False), "\ud800", [1], 1.5, float("inf"), 1j])
def test_a_single_value_that_is_no_id_is_refused(value):
    for form in IdForm:
        with pytest.raises(BadValue):
            form.one(value)


def test_the_first_written_form_of_equal_ids_is_kept():
    log = column(["e\u0301", "é", "u", "n\u0303", "ñ"])
    assert written_forms(log) == {"é": "e\u0301", "ñ": "n\u0303"}
    assert written_forms(column(["é", "e\u0301"])) == {}
