"""Tables line up whatever is in a cell."""

import pytest
from wcwidth import wcswidth

from twotower.core.tables import format_table

CELLS = [
    "",
    "plain",
    "خَاتَمُ ذَهَبٍ",
    "日本",
    "naïve",
    "tab\tbed",
    "two\r\nlines",
    "\x1b[31mred",
    "עברית 12",
]


@pytest.mark.parametrize("cell", CELLS)
def test_columns_begin_at_the_same_terminal_column(cell):
    lines = format_table([[cell, "1.00"], ["x", "23.00"]], ["name", "score"], align="lr").split(
        "\n"
    )
    assert len(lines) == 3
    assert len({wcswidth(line) for line in lines}) == 1, lines


def test_text_that_runs_right_to_left_is_isolated_from_its_neighbours():
    line = format_table([["خاتم", "12"]], ["a", "b"]).splitlines()[1]
    assert line == "\u2068خاتم\u2069  12"
    # An override in the text itself does not reach the next cell.
    line = format_table([["a\u202eb\u2066", "12"]], ["a", "b"]).splitlines()[1]
    assert line == "ab  12"


def test_texts_stay_as_they_are():
    lines = format_table([["007", "1e5", "1_000"]], ["a", "b", "c"]).splitlines()
    assert lines == ["a    b    c", "007  1e5  1_000"]


def test_a_table_without_rows_is_its_header():
    assert format_table([], ["run", "rows"]) == "run  rows"
