"""Numbers as files write them: decimal commas, thousands, marks of currencies and of shares."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import BadValue, convert_rows, is_missing, pc, plain_text

# Text that stands for a missing number: a frame's, once it has become text.
_NO_NUMBER = r"^\s*((?i:nan|none|null|<na>)\s*)?$"
_INFINITE = r"^\s*[-+]?(?i:inf|infinity)\s*$"
# Towers compute in float32.
LARGEST = float(np.finfo(np.float32).max)
_SPELLINGS = ((",", ""), (".", ","), (",", "."), (".", " "), (",", " "), (".", "'"))


@dataclasses.dataclass(frozen=True)
class NumberForm:
    """The spelling of the numbers of a table.

    >>> NumberForm(decimal=",", thousands=".", marks=("€",)).one("1.234,50 €")
    1234.5

    Attributes:
        decimal: Character before the decimals.
        thousands: Character between groups of three digits; empty for none.
        marks: Texts beside numbers that are left out, such as "$" or "%".
    """

    decimal: str = "."
    thousands: str = ""
    marks: tuple[str, ...] = ()

    def column(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns text as numbers: int64 where all are whole, else float64; null is missing.

        Other columns are returned as they are.

        Raises:
            BadValue: A text is no number, or too large for one.
        """
        values = plain_text(values)
        if not pa.types.is_string(values.type):
            return values
        is_plain = self == NumberForm()
        if is_plain:
            try:
                # Whole numbers first: float64 would lose digits beyond 2^53.
                return values.cast(pa.int64())
            except pa.ArrowInvalid:
                pass
        is_empty = pc.match_substring_regex(values, _NO_NUMBER)
        if pc.any(is_empty).as_py():
            values = pc.if_else(is_empty, None, values)
        try:
            numbers = convert_rows(values, self.parse, "is not a number")
        except BadValue as error:
            text = str(error.value)
            raise BadValue(text, f"{error.problem}{_cure(text)}", error.row) from None
        is_large = pc.greater(pc.abs(numbers.cast(pa.float64(), safe=False)), LARGEST)
        is_large = pc.and_(is_large, pc.invert(pc.match_substring_regex(values, _INFINITE)))
        row = pc.index(is_large, True).as_py()
        if row >= 0:
            raise BadValue(values[row].as_py(), f"is too large: at most {LARGEST:.3g}", row)
        return numbers

    def one(self, value: Any) -> float | None:
        """Returns a single number, as `column` does; None for a missing one.

        Raises:
            BadValue: The value is no number.
        """
        if is_missing(value):
            return None
        if not isinstance(value, str):
            return float(value)
        try:
            (number,) = self.column(pa.chunked_array([pa.array([value])]))
        except BadValue as error:
            raise BadValue(value, error.problem) from None
        return number.as_py()

    def parse(self, texts: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns texts as numbers.

        Raises:
            pa.ArrowInvalid: A text is none.
        """
        for mark in self.marks:
            texts = pc.replace_substring(texts, mark, "")
        texts = pc.utf8_trim_whitespace(texts)
        if self.thousands:
            # "1,5" is not fifteen: groups are of three digits.
            group = re.escape(self.thousands)
            point = re.escape(self.decimal)
            grouped = rf"^[-+]?\d{{1,3}}({group}\d{{3}})+({point}\d*)?$"
            is_grouped = pc.match_substring_regex(texts, grouped)
            without = pc.replace_substring(texts, self.thousands, "")
            texts = pc.if_else(is_grouped, without, texts)
        if self.decimal != ".":
            # A point would be read as another decimal sign.
            has_point = pc.match_substring(texts, ".")
            if pc.any(has_point).as_py():
                texts = pc.if_else(has_point, "a point", texts)
            texts = pc.replace_substring(texts, self.decimal, ".")
        try:
            return texts.cast(pa.int64())
        except pa.ArrowInvalid:
            return texts.cast(pa.float64())


def _cure(text: str) -> str:
    """Returns the words for options that read a number as it is written."""
    marks = tuple(dict.fromkeys(re.findall(r"[^\W\d_]+|[^\w\s.,'+-]", text)))
    sample = pa.chunked_array([[text]])
    for given in dict.fromkeys(((), marks)):
        for decimal, thousands in ((".", ""), *_SPELLINGS):
            form = NumberForm(decimal, thousands, given)
            try:
                form.parse(sample)
            except pa.ArrowInvalid:
                continue
            changed = {}
            for field in dataclasses.fields(form):
                value = getattr(form, field.name)
                if value != field.default:
                    changed[field.name] = value
            # As they are by default, where other options were given.
            changed = changed or {"decimal": decimal}
            listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
            return f"; set {listed} among the options of its table"
    return ""
