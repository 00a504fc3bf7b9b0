"""The form of the times in a column, found by looking at them: unit of numbers, format of texts."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from twotower.config import TimeUnit
from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import UNITS_PER_SECOND, pc
from twotower.data import columns

EARLIEST = datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC)
DAY = 24 * 3600  # seconds
# Share of the values that must be times of one form. The others are mistakes or stand for missing.
ENOUGH = 0.95
SAMPLE = 20_000  # values that are looked at
_UNITS: dict[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_DAYS = (
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%d/%m/%y",
    "%m/%d/%y",
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%d %b %Y",
    "%b %d, %Y",
    "%m %d, %Y",
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
_WHOLE = ("%Y-%m-%d %H:%M:%S UTC", "%Y%m%d", "%Y%m%d%H%M%S", "%a %b %d %H:%M:%S %Y")
FORMATS = (*_WHOLE, *(f"{day}{clock}" for day in _DAYS for clock in _CLOCKS))


@dataclasses.dataclass(frozen=True)
class TimeForm:
    """A form that the times of a column have.

    Attributes:
        words: Description, such as "seconds" or "text, %d/%m/%Y".
        unit: Unit of numbers since the epoch.
        format: Strptime format of text; empty for ISO 8601, numbers and typed times.
        is_typed: Whether the type of the column says that these are times.
    """

    words: str
    unit: TimeUnit = "s"
    format: str = ""
    is_typed: bool = False


def find_time_forms(column: pa.ChunkedArray, *, now: float) -> list[TimeForm]:
    """Returns the forms by which a column holds times between 1990 and tomorrow.

    There are several where day and month cannot be told apart, and none for a column of no times.

    Args:
        column: Values of any type.
        now: Seconds since the epoch, which tomorrow counts from.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return find_time_forms(columns.decode_dictionary(column), now=now)
    # A type says what it is; no range is asked of it.
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return [TimeForm("of type time", is_typed=True)]
    values = _sample(column)
    if not len(values):
        return []
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _forms_of_numbers(values, now)
    values = columns.simplify_type(values)
    if not pa.types.is_string(values.type):
        return []
    return _forms_of_text(pc.utf8_trim_whitespace(values), now)


def in_range(seconds: pa.ChunkedArray, *, now: float) -> pa.ChunkedArray:
    """Marks the times between 1990 and tomorrow; missing ones are missing."""
    is_late = pc.greater_equal(seconds, EARLIEST.timestamp())
    return pc.and_(is_late, pc.less_equal(seconds, now + DAY))


def _sample(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns values of a column that are not missing, evenly spaced."""
    valid = column.drop_null()
    return valid.take(pa.array(evenly_spaced(np.arange(len(valid)), SAMPLE)))


def _forms_of_numbers(values: pa.ChunkedArray, now: float) -> list[TimeForm]:
    # Not safe: of nanoseconds the last digits are lost, which does not matter here.
    numbers = values.cast(pa.float64(), safe=False)
    for unit, words in _UNITS.items():
        # At most one unit fits: the range is shorter than the step to the next.
        seconds = pc.divide(numbers, float(UNITS_PER_SECOND[unit]))
        if _share(in_range(seconds, now=now)) >= ENOUGH:
            return [TimeForm(f"{words} since 1970", unit=unit)]
    if not pa.types.is_integer(values.type):
        return []
    return _forms_of_digits(values.cast(pa.string()), now)


def _forms_of_text(values: pa.ChunkedArray, now: float) -> list[TimeForm]:
    digits = pc.match_substring_regex(values, r"^-?\d+(\.\d*)?$")
    if _share(digits) >= ENOUGH:
        numbers = values.filter(digits).cast(pa.float64())
        whole = pc.all(pc.match_substring_regex(values, r"^\d+$")).as_py()
        forms = _forms_of_numbers(numbers, now)
        if not forms and whole:
            return _forms_of_digits(values, now)
        return forms
    iso = pc.match_substring_regex(values, r"^\d{4}-\d{2}-\d{2}([T ]\d[\d:.,]*(Z|[+-][\d:]+)?)?$")
    if _share(iso) >= ENOUGH:
        years = pc.utf8_slice_codeunits(values.filter(iso), 0, 4).cast(pa.int64())
        latest = datetime.datetime.fromtimestamp(now + DAY, datetime.UTC).year
        is_near = pc.and_(pc.greater_equal(years, EARLIEST.year), pc.less_equal(years, latest))
        if _share(is_near) < ENOUGH:
            return []
        return [TimeForm("text, ISO 8601")]
    return _forms_by_format(values, FORMATS, now)


def _forms_of_digits(values: pa.ChunkedArray, now: float) -> list[TimeForm]:
    """Returns the form of days written as 20260131, and of moments written alike."""
    forms = []
    for length, form in ((8, "%Y%m%d"), (14, "%Y%m%d%H%M%S")):
        # Strptime itself would take shorter numbers too.
        if _share(pc.equal(pc.utf8_length(values), length)) >= ENOUGH:
            forms.append(form)
    return _forms_by_format(values, forms, now)


def _forms_by_format(values: pa.ChunkedArray, formats: Sequence[str], now: float) -> list[TimeForm]:
    forms = []
    for form in formats:
        times = pc.strptime(values, format=form, unit="s", error_is_null=True)
        seconds = times.cast(pa.int64())
        if _share(pc.fill_null(in_range(seconds, now=now), False)) >= ENOUGH:
            forms.append(TimeForm(f"text, {form}", format=form))
    return forms


def _share(mask: pa.ChunkedArray) -> float:
    """Returns the share of true values, from 0 to 1."""
    return pc.mean(mask.cast(pa.float64())).as_py() or 0.0
