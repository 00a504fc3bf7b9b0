"""Times: one parser of all forms that logs, tables, requests and conditions have.

Whatever the form, a time becomes whole seconds since 1970, UTC, rounded down.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import BadValue, convert_rows, is_missing, pc, plain_text
from twotower.core.fields import TimeUnit

# Integers, so that nanoseconds are divided without rounding.
UNITS_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_UNIT_WORDS: dict[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_FAR = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC).timestamp()
EARLIEST = datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC)  # of a log's own times
DAY = 24 * 3600  # seconds
_NUMBER = r"^\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*$"
# Text that stands for a missing time: a frame's, once it has become text.
_NO_TIME = r"^\s*((?i:nan|nat|none|null|<na>)\s*)?$"
_ZONE = r"[Tt ]\d.*([Zz]|UTC|GMT|[-+]\d{2}(:?\d{2})?)\s*$"
_ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}(:\d{2}){0,2}(Z|[-+]\d{2}(:?\d{2})?)?)?$"
# What ISO 8601 and its usual variants allow, into the one form that Arrow reads.
_ISO_VARIANTS = (
    (r"^\s+|\s+$", ""),
    (r"\s*(UTC|GMT|[zZ])$", "Z"),
    (r"\s+([-+]\d{2}(:?\d{2})?)$", r"\1"),
    (r"^(\d{4})(\d{2})(\d{2})[Tt](\d{2})(\d{2})(\d{2})?", r"\1-\2-\3T\4:\5:\6"),
    (r"^(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}):($|\D)", r"\1\2"),
    (r"^(\d{4})-(\d)-", r"\1-0\2-"),
    (r"^(\d{4}-\d{2})-(\d)($|\D)", r"\1-0\2\3"),
    (r"^(\d{4}-\d{2}-\d{2})[tT ]+(\d):", r"\1T0\2:"),
    (r"^(\d{4}-\d{2}-\d{2})(t| +)(\d)", r"\1T\3"),
    # Dropped, which rounds down.
    (r"(:\d{2})[.,]\d+", r"\1"),
)
# Directive of strptime -> the text that it stands for.
_DIRECTIVES = {
    "Y": r"\d{4}",
    "y": r"\d{2}",
    "m": r"\d{1,2}",
    "d": r"(?P<day>\s?\d{1,2})",
    "e": r"(?P<day>\s?\d{1,2})",
    "H": r"\s?\d{1,2}",
    "I": r"\s?\d{1,2}",
    "M": r"\d{1,2}",
    "S": r"\d{1,2}",
    "p": r"[AaPp]\.?[Mm]\.?",
    "z": r"(?:Z|[-+]\d{2}:?\d{2})",
    "j": r"\d{1,3}",
    "f": r"\d{1,9}",
    "%": "%",
}
_DAYS = (
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%d/%m/%y",
    "%m/%d/%y",
    "%d.%m.%y",
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%d %b %Y",
    "%d-%b-%Y",
    "%b %d, %Y",
    "%m %d, %Y",
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
_WHOLE = ("%Y%m%d", "%Y%m%d%H%M%S", "%a %b %d %H:%M:%S %Y", "%a, %d %b %Y %H:%M:%S")
FORMATS = (*_WHOLE, *(f"{day}{clock}" for day in _DAYS for clock in _CLOCKS))
# Numbers that look like a time, by their digits.
_DIGITS = ((4, "%Y"), (8, "%Y%m%d"), (14, "%Y%m%d%H%M%S"))
# Days since 1899-12-30, as spreadsheets write a date that has lost its format.
_SPREADSHEET_DAYS = (32_874, 73_050)
_PROBLEMS = {
    pa.time32("s").id: "holds times of day without a date: join them with a date",
    pa.time64("us").id: "holds times of day without a date: join them with a date",
    pa.duration("s").id: "holds durations, no moments: add them to a moment",
    pa.bool_().id: "holds true and false, no times",
}
# Share of the values that must be times of one form. The others are mistakes or stand for missing.
ENOUGH = 0.95
SAMPLE = 20_000  # values that are looked at
FEW = 20  # values by which formats are ruled out


@dataclasses.dataclass(frozen=True)
class TimeForm:
    """The form of the times of a log, in columns and in single values alike.

    Columns of times and dates mean what their types say. Text without a format is a number of
    `unit`, or ISO 8601: with or without a fraction, a zone, Z or " UTC", with T or a space, padded
    or not. A time without a zone is UTC.

    >>> TimeForm(unit="ms").one(1_700_000_000_123)
    1700000000
    >>> TimeForm(format="%m/%d/%Y %I:%M %p").one("11/14/2023 10:13 PM")
    1700000000

    Attributes:
        unit: Unit of numbers since 1970.
        format: Strptime format of text and of numbers such as 20231114; empty for none.
        is_typed: Whether the type of the column says that these are times.
        is_text: Whether the column holds ISO 8601, and no numbers.
    """

    unit: TimeUnit = "s"
    format: str = ""
    is_typed: bool = dataclasses.field(default=False, compare=False)
    is_text: bool = dataclasses.field(default=False, compare=False)

    @property
    def words(self) -> str:
        """Description of the form, such as "milliseconds since 1970"."""
        if self.is_typed:
            return "of type time"
        if self.format:
            return f"text, {self.format}"
        if self.is_text:
            return "text, ISO 8601"
        return f"{_UNIT_WORDS[self.unit]} since 1970"

    def column(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns the seconds of a column of times, int64 [N]; null is missing.

        Args:
            values: Times, dates, numbers or text.

        Raises:
            BadValue: Values of this type are no times, or one of them is none.
        """
        values = plain_text(values)
        kind = values.type
        if pa.types.is_string(kind):
            if self.format:
                return _parse_format(values, self.format)
            return _parse_text(values, self.unit)
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return _typed_seconds(values)
        if pa.types.is_null(kind):
            return values.cast(pa.int64())
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            if self.format:
                return _parse_format(_as_digits(values), self.format)
            return _scale(values, UNITS_PER_SECOND[self.unit])
        raise BadValue(None, _PROBLEMS.get(kind.id, f"holds values of type {kind}, no times"))

    def one(self, value: Any) -> int | None:
        """Returns the seconds of a single time, as `column` does; None for a missing one.

        Args:
            value: Text, number, `datetime`, `date`, or a time of pandas, NumPy or Arrow.

        Raises:
            BadValue: The value is no time.
        """
        if is_missing(value):
            return None
        if isinstance(value, np.datetime64):
            # Months and minutes have no type in Arrow.
            value = value.astype("datetime64[us]")
        try:
            values = pa.chunked_array([pa.array([value])])
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            raise BadValue(value, f"of type {type(value).__name__} is no time") from None
        try:
            (seconds,) = self.column(values)
        except BadValue as error:
            raise BadValue(value, error.problem) from None
        return seconds.as_py()


def find_time_forms(
    column: pa.ChunkedArray, *, now: float, earliest: float = EARLIEST.timestamp()
) -> list[TimeForm]:
    """Returns the forms by which a column holds times between 1990 and tomorrow.

    There are several where day and month cannot be told apart, and none for a column of no times.

    Args:
        column: Values of any type.
        now: Seconds since the epoch, which tomorrow counts from.
        earliest: Seconds since the epoch from which on a time is likely.
    """
    column = plain_text(column)
    kind = column.type
    # A type says what it is; no range is asked of it.
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return [TimeForm(is_typed=True)]
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return []
    valid = column.drop_null()
    values = valid.take(pa.array(evenly_spaced(np.arange(len(valid)), SAMPLE)))
    candidates = [TimeForm(unit=unit) for unit in UNITS_PER_SECOND]
    if pa.types.is_floating(kind):
        values = values.filter(pc.is_finite(values))
        return _fitting(values, candidates, now, earliest)[:1]
    texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
    if not len(texts):
        return []
    # At most one unit fits: the range is shorter than the step to the next.
    forms = _fitting(texts, candidates, now, earliest)[:1]
    if forms:
        is_number = pc.match_substring_regex(texts, _NUMBER)
        return [dataclasses.replace(forms[0], is_text=_share(is_number) < ENOUGH)]
    formats = list(FORMATS)
    if _share(pc.match_substring_regex(texts, r"^\d+$")) >= ENOUGH:
        lengths = pc.utf8_length(texts)
        formats = [form for size, form in _DIGITS if _share(pc.equal(lengths, size)) >= ENOUGH]
    likely = _likely_formats(texts.slice(0, FEW).to_pylist(), formats)
    return _fitting(texts, [TimeForm(format=form) for form in likely], now, earliest)


def in_range(
    seconds: pa.ChunkedArray, *, now: float, earliest: float = EARLIEST.timestamp()
) -> pa.ChunkedArray:
    """Marks the times between 1990 and tomorrow; missing ones are missing."""
    # Integers: seconds of a wrong unit may have more digits than a float holds.
    is_late = pc.greater_equal(seconds, int(earliest))
    return pc.and_(is_late, pc.less_equal(seconds, int(now) + DAY))


def are_spreadsheet_days(column: pa.ChunkedArray) -> bool:
    """Returns whether numbers look like dates that a spreadsheet has written as days."""
    column = plain_text(column)
    try:
        numbers = column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    first, last = _SPREADSHEET_DAYS
    is_day = pc.and_(pc.greater_equal(numbers, first), pc.less_equal(numbers, last))
    return _share(is_day.drop_null()) >= ENOUGH


def format_time(seconds: int) -> str:
    """Returns a time as text, for messages.

    >>> format_time(1_700_000_000)
    '2023-11-14 22:13:20'
    """
    try:
        moment = np.datetime64(int(seconds), "s")
    except (OverflowError, ValueError):
        return f"{seconds} s since 1970"
    return str(moment).replace("T", " ")


def _likely_formats(texts: Sequence[str], formats: Sequence[str]) -> list[str]:
    """Returns the formats of which one of a few texts may be: most are ruled out at once."""
    likely = []
    for form in formats:
        pattern = re.compile(_pattern(form))
        if any(pattern.match(text) for text in texts):
            likely.append(form)
    return likely


def _fitting(
    values: pa.ChunkedArray, forms: Sequence[TimeForm], now: float, earliest: float
) -> list[TimeForm]:
    """Returns the forms by which nearly all values are times in range."""
    fitting = []
    for form in forms:
        seconds = _seconds_or_null(values, form)
        near = pc.fill_null(in_range(seconds, now=now, earliest=earliest), False)
        if _share(near) >= ENOUGH:
            fitting.append(form)
    return fitting


def _seconds_or_null(values: pa.ChunkedArray, form: TimeForm) -> pa.ChunkedArray:
    """Returns the seconds of a sample of times, null for values of another form."""
    if not pa.types.is_string(values.type):
        return form.column(values)
    if form.format:
        return _strptime(values, form.format)
    is_number = pc.match_substring_regex(values, _NUMBER)
    if _share(is_number) >= ENOUGH:
        return form.column(pc.if_else(is_number, values, None))
    if form.unit != "s":
        return pa.chunked_array([pa.nulls(len(values), pa.int64())])
    texts = _iso_texts(values)
    is_iso = pc.match_substring_regex(texts, _ISO)
    # Days that no month has are rare: where one is met, the whole sample is tried one by one.
    try:
        return _cast_iso(pc.if_else(is_iso, texts, None))
    except pa.ArrowInvalid:
        return pa.chunked_array(
            [pa.array([_one_or_none(text, form) for text in texts], pa.int64())]
        )


def _one_or_none(text: pa.Scalar, form: TimeForm) -> int | None:
    try:
        return form.one(text.as_py())
    except BadValue:
        return None


def _parse_text(texts: pa.ChunkedArray, unit: TimeUnit) -> pa.ChunkedArray:
    """Returns the seconds of numbers of a unit and of ISO 8601 times.

    Raises:
        BadValue: A text is neither, or some times have a zone and others have none.
    """
    # Most columns are of one form throughout, and Arrow's own casts do.
    for kind in (pa.int64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            typed = texts.cast(kind)
        except pa.ArrowInvalid:
            continue
        if kind == pa.int64():
            return _scale(typed, UNITS_PER_SECOND[unit])
        return _typed_seconds(typed)
    is_missing_text = pc.match_substring_regex(texts, _NO_TIME)
    texts = pc.if_else(is_missing_text, None, texts)
    is_number = pc.match_substring_regex(texts, _NUMBER)
    numbers = pc.utf8_trim_whitespace(pc.if_else(is_number, texts, None))
    times = pc.if_else(is_number, None, texts)
    seconds = _scale_texts(numbers, unit)
    if times.null_count == len(times):
        return seconds
    _refuse_mixed_zones(times)
    right = (
        f"is not a time: neither a number (of {_UNIT_WORDS[unit]} since 1970) nor ISO 8601, such "
        "as 2025-01-31 18:30:00"
    )
    try:
        moments = convert_rows(times, lambda x: _cast_iso(_iso_texts(x)), right)
    except BadValue as error:
        text = str(error.value)
        raise BadValue(text, right + _cure(texts, text), error.row) from None
    return pc.coalesce(seconds, moments)


def _scale_texts(numbers: pa.ChunkedArray, unit: TimeUnit) -> pa.ChunkedArray:
    # Whole numbers as such: a float does not hold the digits of nanoseconds.
    is_whole = pc.match_substring_regex(numbers, r"^[-+]?\d{1,18}$")
    digits = pc.replace_substring_regex(pc.if_else(is_whole, numbers, None), r"^\+", "")
    floats = pc.if_else(is_whole, None, numbers)
    per_second = UNITS_PER_SECOND[unit]
    whole = _scale(digits.cast(pa.int64()), per_second)
    if floats.null_count == len(floats):
        return whole
    return pc.coalesce(whole, _scale(floats.cast(pa.float64()), per_second))


def _refuse_mixed_zones(times: pa.ChunkedArray) -> None:
    has_zone = pc.match_substring_regex(times, _ZONE)
    with_zone = pc.index(has_zone, True).as_py()
    without = pc.index(has_zone, False).as_py()
    if with_zone < 0 or without < 0:
        return
    # The second kind to come is shown: the first looked right.
    row = max(with_zone, without)
    shown = times[min(with_zone, without)].as_py()
    words = ("has a time zone", "has none")
    if row == without:
        words = words[::-1]
    problem = (
        f"{words[0]}, while {shown!r} {words[1]}: write all times of the column in one form, or in "
        "UTC"
    )
    raise BadValue(times[row].as_py(), problem, row)


def _iso_texts(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns variants of ISO 8601 in the one form that Arrow reads, in whole seconds."""
    for pattern, replacement in _ISO_VARIANTS:
        texts = pc.replace_substring_regex(texts, pattern, replacement)
    return texts


def _cast_iso(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the seconds of times of which all have a zone, or none has.

    Raises:
        pa.ArrowInvalid: A text is no such time.
    """
    has_zone = pc.match_substring_regex(texts, _ZONE)
    if pc.any(has_zone).as_py():
        return texts.cast(pa.timestamp("s", "UTC")).cast(pa.int64())
    return texts.cast(pa.timestamp("s")).cast(pa.int64())


def _parse_format(texts: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
    """Returns the seconds of times of a strptime format.

    Raises:
        BadValue: A text is of another form, or no day of the calendar.
    """
    is_missing_text = pc.match_substring_regex(texts, _NO_TIME)
    if pc.any(is_missing_text).as_py():
        texts = pc.if_else(is_missing_text, None, texts)
    seconds = _strptime(pc.utf8_trim_whitespace(texts), form)
    failed = pc.and_(pc.is_null(seconds), pc.is_valid(texts))
    row = pc.index(failed, True).as_py()
    if row >= 0:
        text = texts[row].as_py()
        problem = f"is not a time of the form {form!r}"
        raise BadValue(text, problem + _cure(texts, text, form), row)
    return seconds


def _strptime(texts: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
    """Returns the seconds of texts of a format, null for those that are no such time."""
    texts = _without_fraction(texts, form)
    form = form.replace("%f", "")
    # Strptime itself takes a year of two digits for %Y, as one of the first century.
    is_form = pc.match_substring_regex(texts, _pattern(form))
    texts = pc.if_else(is_form, texts, None)
    if "%z" in form:
        texts = pc.replace_substring_regex(texts, "Z$", "+0000")
    times = pc.strptime(texts, format=form, unit="s", error_is_null=True)
    return _without_other_days(times, texts, _pattern(form)).cast(pa.int64())


def _without_other_days(
    times: pa.ChunkedArray, texts: pa.ChunkedArray, pattern: str
) -> pa.ChunkedArray:
    """Returns times with null where the text has a day that its month lacks.

    Strptime takes 30 February for 2 March.
    """
    if "?P<day>" not in pattern:
        return times
    # Only the first days of a month, of texts with a 29, 30 or 31, need a second look.
    is_early = pc.less_equal(pc.day(times), 3)
    is_late = pc.match_substring_regex(texts, "29|30|31")
    suspects = pc.fill_null(pc.and_(is_early, is_late), False).to_numpy()
    rows = pa.array(np.flatnonzero(suspects))
    if not len(rows):
        return times
    written = pc.extract_regex(texts.take(rows), pattern)
    days = pc.utf8_trim_whitespace(pc.struct_field(written, "day")).cast(pa.int64())
    is_other = pc.not_equal(days, pc.day(times.take(rows)))
    mask = np.zeros(len(texts), bool)
    mask[rows.filter(is_other).to_numpy()] = True
    return pc.if_else(pa.array(mask), None, times)


def _without_fraction(texts: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
    """Returns texts without the digits that %f stands for: seconds are rounded down."""
    if "%f" not in form:
        return texts
    before, _, after = form.partition("%f")
    pattern = f"^({_inner_pattern(before)})\\d{{1,9}}({_inner_pattern(after)})$"
    return pc.replace_substring_regex(texts, pattern.replace("?P<day>", "?:"), r"\1\2")


@functools.cache
def _pattern(form: str) -> str:
    """Returns the regular expression of the texts of a strptime format."""
    return f"^{_inner_pattern(form)}$"


def _inner_pattern(form: str) -> str:
    """Returns the regular expression of a part of a strptime format."""
    pattern = ""
    has_day = False
    for literal, directive in re.findall(r"([^%]+)|%(.)", form):
        if literal:
            pattern += re.sub(r"(\\ )+", r"\\s+", re.escape(literal))
        else:
            piece = _DIRECTIVES.get(directive, ".+?")
            if has_day:
                piece = piece.replace("?P<day>", "?:")
            has_day = has_day or "?P<day>" in piece
            pattern += piece
    return pattern


def _cure(texts: pa.ChunkedArray, text: str, tried: str = "") -> str:
    """Returns the words that offer a format which reads the value shown."""
    sample = pa.chunked_array([[text]])
    found = []
    for form in _likely_formats([text.strip()], FORMATS):
        seconds = _seconds_or_null(sample, TimeForm(format=form))
        # Tomorrow's clocks are no concern here, only that the form reads it.
        near = in_range(seconds, now=_FAR)
        if form != tried and pc.all(pc.fill_null(near, False)).as_py():
            found.append(form)
    if not found:
        return ""
    # Where day and month cannot be told apart by this value, others of the column may tell.
    valid = texts.drop_null().slice(0, SAMPLE)
    shares = {
        form: _share(pc.is_valid(_seconds_or_null(valid, TimeForm(format=form)))) for form in found
    }
    best = max(shares.values())
    listed = " or ".join(repr(form) for form in found if shares[form] == best)
    return f"; set timestamp_format={listed}"


def _typed_seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # The zone is kept, so that this changes the unit alone: Arrow stores UTC whatever the zone.
    zone = getattr(column.type, "tz", None)
    # Through microseconds, which Arrow casts dates and all times to.
    fine = column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
    return _divide(fine, UNITS_PER_SECOND["us"])


def _scale(column: pa.ChunkedArray, per_second: int) -> pa.ChunkedArray:
    """Returns numbers of a unit as whole seconds, rounded down."""
    right = "is a number too large for a time"
    if pa.types.is_integer(column.type):
        return _divide(convert_rows(column, lambda x: x.cast(pa.int64()), right), per_second)
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    # NaN has no integer: the cast below would fail.
    column = pc.if_else(pc.is_nan(column), None, column)
    seconds = pc.floor(pc.divide(column, float(per_second)))
    return convert_rows(seconds, lambda x: x.cast(pa.int64()), right)


def _divide(column: pa.ChunkedArray, per_second: int) -> pa.ChunkedArray:
    """Divides integers and rounds down: Arrow itself rounds towards 0."""
    # Integers are divided as such: nanoseconds have more digits than a float holds.
    if per_second == 1:
        return column
    lowest = pc.min(column).as_py()
    if lowest is not None and lowest < 0:
        is_before = pc.less(column, 0)
        column = pc.if_else(is_before, pc.subtract(column, per_second - 1), column)
    return pc.divide(column, per_second)


def _as_digits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns numbers such as 20231114 as text, whole floats without ".0"."""
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    texts = column.cast(pa.float64())
    texts = pc.if_else(pc.is_nan(texts), None, texts)
    whole = convert_rows(texts, lambda x: x.cast(pa.int64()), "is no whole number")
    return whole.cast(pa.string())


def _share(mask: pa.ChunkedArray) -> float:
    """Returns the share of true values, from 0 to 1."""
    return pc.mean(mask.cast(pa.float64())).as_py() or 0.0
