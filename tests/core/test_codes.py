"""Columns as codes: whatever the form of a column, its codes stand for its values."""

import numpy as np
import pyarrow as pa
import pytest

from twotower.core import arrow
from twotower.core.arrow import fingerprint, join_chunks
from twotower.core.codes import (
    codes_and_values,
    count_distinct,
    distinct,
    encode,
    encode_columns,
    positions,
)

COLUMNS = {
    "digits": ["7", "12", "7", "3"],
    "codes": ["007", "7", "12", "7"],
    "signs and spaces": ["+7", " 7", "7", "-7"],
    # As many letters as the digits of their values.
    "hexadecimal": ["0x2540BE400", "0x2540BE401", "0x2540BE400"],
    "missing": ["7", None, "7", None],
    "missing text": [None, "a", None],
    "text": ["b", "a", "", "b"],
    "long": ["1" * 40, "2" * 40, "1" * 40],
    "all missing": [None, None],
    "none": [],
}


@pytest.fixture(params=COLUMNS, name="column")
def column_of_two_chunks(request):
    values = pa.array(COLUMNS[request.param], pa.string())
    return pa.chunked_array([values[:2], values[2:]])


def test_codes_stand_for_the_values_in_order_of_first_appearance(column):
    coded = encode(column)
    codes, values = codes_and_values(coded)
    expected = column.to_pylist()
    assert coded.to_pylist() == expected
    assert [None if code < 0 else values[code].as_py() for code in codes] == expected
    seen = list(dict.fromkeys(value for value in expected if value is not None))
    assert values.to_pylist() == seen
    for form in (column, coded, coded[1:]):
        left = dict.fromkeys(value for value in form.to_pylist() if value is not None)
        assert distinct(form).to_pylist() == list(left)
        assert count_distinct(form) == len(left)


def test_positions_are_those_of_a_look_up(column):
    known = pa.chunked_array([["3", "7"], ["a", "1" * 40]])
    expected = [
        known.to_pylist().index(x) if x in known.to_pylist() else -1 for x in column.to_pylist()
    ]
    for form in (column, encode(column)):
        np.testing.assert_array_equal(positions(form, known), np.array(expected, np.int32))


def test_columns_of_several_dictionaries_are_one():
    parts = [encode(pa.chunked_array([values])) for values in (["a", "b"], ["c", None, "a"])]
    joined = pa.chunked_array([chunk for part in parts for chunk in part.chunks])
    codes, values = codes_and_values(joined)
    assert codes.tolist() == [0, 1, 2, -1, 0]
    assert values.to_pylist() == ["a", "b", "c"]


def test_rows_have_the_fingerprint_of_their_text(column, monkeypatch):
    monkeypatch.setattr(arrow, "_BLOCK", 2)
    rows = pa.table({"user_id": column, "item_id": column})
    coded = pa.table({"user_id": encode(column), "item_id": column})
    assert fingerprint(rows) == fingerprint(coded)
    assert fingerprint(rows.slice(1)) == fingerprint(coded.slice(1))


def test_text_beyond_what_a_string_array_holds_is_joined_as_large_text(monkeypatch):
    column = pa.chunked_array([["ab", None], ["", "cd"]])
    assert join_chunks(column).type == pa.string()
    monkeypatch.setattr(arrow, "LARGEST_TEXT", 3)
    assert join_chunks(column).type == pa.large_string()
    assert join_chunks(column).to_pylist() == ["ab", None, "", "cd"]


def test_codes_without_a_sign_are_read_too():
    """As categories of polars have them."""
    indices = pa.array([0, None, 1], pa.uint32())
    column = pa.chunked_array([pa.DictionaryArray.from_arrays(indices, pa.array(["a", "b"]))])
    codes, values = codes_and_values(column)
    assert codes.tolist() == [0, -1, 1] and values.to_pylist() == ["a", "b"]


def test_codes_are_read_as_text_by_blocks(monkeypatch):
    monkeypatch.setattr(arrow, "_BLOCK", 2)
    column = pa.chunked_array([["a", None, "b", "a", "c"]]).dictionary_encode()
    text = arrow.plain_text(column)
    assert text.num_chunks == 3 and text.to_pylist() == ["a", None, "b", "a", "c"]
    assert arrow.plain_text(column[:0]).to_pylist() == []


@pytest.mark.parametrize(
    "values, indices",
    [
        (["a", "b", "a"], [0, 1, 2, None, 1]),
        (["a", None, "b"], [0, 1, 2, None, 2]),
        (["a", "b"], [0, 1, 0, None, 1]),
    ],
    ids=["repeats", "nulls", "plain"],
)
def test_codes_of_somebody_else_have_one_value_each(values, indices):
    """Two codes of one id would be two users, and a code of null would be somebody."""
    chunk = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), values)
    column = pa.chunked_array([chunk, chunk.slice(2)])
    table = encode_columns(pa.table({"user_id": column}), ("user_id",))
    coded, known = codes_and_values(table["user_id"])
    ids = column.to_pylist()
    assert sorted(known.to_pylist()) == ["a", "b"]
    assert [None if code < 0 else known[int(code)].as_py() for code in coded] == ids
