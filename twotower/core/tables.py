"""Tables for a terminal, aligned in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_SPACES = re.compile(r"\s+")
# Marks that open or close a direction; one left open in a cell would turn the cells after it.
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")
_ALIGNMENTS = {"l": "left", "r": "right"}


def format_table(rows: Iterable[Sequence[str]], header: Sequence[str], *, align: str = "l") -> str:
    """Returns the rows as lines of text under a header, in columns two spaces apart.

    Args:
        rows: Cells of each row, one for each cell of the header. Tabs and line breaks in a cell are
            shown as a space, other control characters as "�".
        header: Title of each column.
        align: "l" (left) or "r" (right) for each column; its last letter serves all further ones.

    >>> print(format_table([["ring", "0.5"], ["bracelet", "12.25"]], ["item", "score"], align="lr"))
    item      score
    ring        0.5
    bracelet  12.25
    """
    # Imported where a table is printed: `wcwidth` and it take longer than most of our modules.
    from tabulate import tabulate

    letters = align.ljust(len(header), align[-1])[: len(header)]
    cells = []
    # The header goes in as a row, since tabulate sets real headers apart by two more columns.
    for row in (header, *rows):
        cells.append([_printable(cell) for cell in row])
    table = tabulate(
        cells,
        tablefmt="plain",
        disable_numparse=True,  # else "007" would be printed as 7
        colalign=[_ALIGNMENTS[letter] for letter in letters],
    )
    return "\n".join(line.rstrip() for line in table.split("\n"))


def shorten(text: str, width: int) -> str:
    """Returns a text on one line, cut to a width on the terminal, on which some letters take two.

    Args:
        text: Text of any length.
        width: Greatest number of columns.

    >>> shorten("a bracelet\\nof silver", 12)
    'a bracelet …'
    """
    text = _SPACES.sub(" ", text)
    used = 0
    for position, letter in enumerate(text):
        used += _width(letter)
        # Marks of no width of their own may go on for ever.
        if used > width or position > 4 * width:
            return _cut(text[:position], width - 1) + "…"
    return text


def _cut(text: str, width: int) -> str:
    while sum(map(_width, text)) > width:
        text = text[:-1]
    return text


def _width(letter: str) -> int:
    """Returns the number of columns that a letter takes."""
    import wcwidth

    # Control characters, of width -1, are shown by another letter.
    return abs(wcwidth.wcwidth(letter))


def _printable(cell: str) -> str:
    """Returns the cell as one line that does not move the cells beside it."""
    text = _DIRECTIONS.sub("", _SPACES.sub(" ", cell))
    # After white space was folded: tabs and line breaks are control characters too.
    text = "".join("�" if unicodedata.category(letter) == "Cc" else letter for letter in text)
    if any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in text):
        # Isolated, or a terminal would show the number in the next column before this text.
        return f"\u2068{text}\u2069"
    return text
