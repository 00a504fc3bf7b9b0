"""Values of display columns read from buffers against Arrow's own scalars."""

import datetime
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from twotower.index.exact import ExactIndex
from twotower.retrieval.live import segments
from twotower.retrieval.live.segments import BaseSegment, values_reader

TEXT = ["lamp", None, "", "مصباح", "été", "a" * 300]
COLUMNS = {
    "text": pa.array(TEXT),
    "long text": pa.array(TEXT, pa.large_string()),
    "text, none missing": pa.array([x or "-" for x in TEXT]),
    "only missing": pa.nulls(6, pa.string()),
    "no type": pa.nulls(6),
    "numbers": pa.array([1.5, 2.0, -0.0, 3.25, float("inf"), 1e-30], pa.float32()),
    "numbers, some missing": pa.array([1, None, 3, 4, 5, 6]),
    "whole numbers": pa.array([2**62, 1, -3, 4, 5, 6]),
    "lists": pa.array([["a"], [], None, ["b", "c"], ["d"], ["e"]]),
    "times": pa.array([datetime.datetime(2026, 1, day) for day in range(1, 7)]),
    "codes": pa.array(TEXT).dictionary_encode(),
    "truths": pa.array([True, None, False, True, True, False]),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("pieces", [1, 2])
def test_values_are_those_of_arrow(name, first, pieces):
    """Also of a slice, whose buffers begin before it, and of a column of several pieces."""
    column = COLUMNS[name].slice(first)
    read = values_reader(
        pa.chunked_array([column] if pieces == 1 else [column.slice(0, 1), column.slice(1)])
    )
    rows = [2, 0, 2, *range(len(column))]
    found = read(rows)
    expected = column.take(pa.array(rows)).to_pylist()
    assert found == expected
    assert [type(x) for x in found] == [type(x) for x in expected]
    assert read([]) == []


WITHOUT_PANDAS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import pyarrow as pa
from twotower.retrieval.live.segments import values_reader
for kind in map(pa.type_for_alias, ("int8", "uint16", "int64", "uint64", "float", "double")):
    read = values_reader(pa.chunked_array([pa.array([1, None, 3], kind)]))
    assert read([2, 1, 0]) == [3, None, 1], kind
"""


def test_numbers_are_read_where_pandas_is_not_installed():
    """It is no requirement; Arrow's own ways to NumPy's types import it."""
    subprocess.run([sys.executable, "-c", WITHOUT_PANDAS], check=True)


def test_no_rows_at_all():
    for column in (pa.array([], pa.string()), pa.array([], pa.int64()), pa.array([], pa.bool_())):
        assert values_reader(pa.chunked_array([], column.type))([]) == []
        assert values_reader(pa.chunked_array([column]))([]) == []


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("shown", ["titles", "lists"])
def test_a_list_may_be_changed_by_who_is_given_it(shown, is_prepared, monkeypatch):
    """What is kept of an item for later lists is not what was handed out; it is bounded, too."""
    # Three rows of two columns.
    monkeypatch.setattr(segments, "MAX_VALUES_READ", 6)
    columns = {"item_id": pa.array(list("abcdef")), "tags": COLUMNS["lists"]}
    if shown == "titles":
        columns["tags"] = pa.array(TEXT)
    items = pa.table(columns)
    vectors = np.eye(6, dtype=np.float32)
    numbers = np.arange(6)
    base = BaseSegment.build(ExactIndex(vectors), vectors, items, np.ones(6, int), numbers, 6)
    if is_prepared:
        base.prepare_rows()
        assert sorted(base._rows_read) == ([0, 1, 2] if shown == "titles" else [])
    for rows in ([0, 1, 3], [3, 0, 5], [4, 2, 0], [0, 1, 3], [1, 1, 2]):
        found = base.read_rows(np.array(rows))
        assert found == items.take(pa.array(rows)).to_pylist()
        for row in found:
            row["item_id"] = "changed"
            if isinstance(row["tags"], list):
                row["tags"].append("changed")
        assert len(base._rows_read) <= 3
