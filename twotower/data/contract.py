"""The contract of a log: the forms in which it writes ids, times and numbers.

They are found on the log, kept with the run, and are those of its tables, requests, lists and
changes: a value means the same wherever it is written.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from twotower.core.arrow import BadValue, convert_rows, is_missing, pc, plain_text
from twotower.core.ids import IdForm, written_forms
from twotower.core.times import TimeForm

KEYS = ("user_id", "item_id")
SECONDS = TimeForm()
Side = Literal["user", "item"]
# Text that stands for a missing number: a frame's, once it has become text.
_NO_NUMBER = r"^\s*((?i:nan|none|null|<na>)\s*)?$"
_INFINITE = r"^\s*[-+]?(?i:inf|infinity)\s*$"
# Towers compute in float32.
LARGEST = float(np.finfo(np.float32).max)
# Decimal and thousands as they are written: English, German, Swiss and those with spaces.
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
        # Parquet and frames have types of their own, which need no form.
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
        # Only where there is one: replacing copies the column.
        if pc.any(is_empty).as_py():
            values = pc.if_else(is_empty, None, values)
        try:
            numbers = convert_rows(values, self.parse, "is not a number")
        except BadValue as error:
            text = str(error.value)
            raise BadValue(text, f"{error.problem}{_cure(text)}", error.row) from None
        # A price of 1e300 would become infinite in the towers; an infinity that was written is left
        # to the feature, which says what it does with it.
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
            # By way of a column, so that a request is read by the very rules of the file.
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
        # After the marks: "12 €" leaves a space behind.
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


Form = NumberForm | TimeForm


@dataclasses.dataclass(frozen=True)
class Use:
    """The use of a column, which says how it is read.

    Attributes:
        kind: Whether the column is read as numbers, as times, or as labels (0, 1, true and false).
            All else is text, as it is.
        field: Name of what reads it, such as "features.item.price".
        time: Form of the times where the reader says it; None to find it.
    """

    kind: Literal["number", "time", "label"]
    field: str
    time: TimeForm | None = None


# "user", "item" or "log" -> column -> its use. Columns of users may be those of the log.
Uses = Mapping[str, Mapping[str, Use]]


@dataclasses.dataclass(frozen=True)
class Contract:
    """The forms in which a log writes ids, times and numbers, for all that is read after it.

    Attributes:
        user_id: Form of the ids of users.
        item_id: Form of the ids of items.
        time: Form of the times of events.
        columns: "item.price" -> form of the numbers or times of a column that is read as such.
        written: "user_id" or "item_id" -> id in NFC -> the form in which the log writes it, where
            that is another.
    """

    user_id: IdForm = IdForm.TEXT
    item_id: IdForm = IdForm.TEXT
    time: TimeForm = SECONDS
    columns: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def find(cls, parts: Sequence[pa.Table], time: TimeForm = SECONDS) -> Contract:
        """Finds the forms of the ids of a log.

        Args:
            parts: Rows of the log with user_id and item_id, such as those to train and to test.
            time: Form of its times, as the configuration says.
        """
        forms = {}
        written = {}
        for key in KEYS:
            # Digits only where all parts have them: one id of letters makes all of them text.
            found = {IdForm.find(part[key]) for part in parts if len(part)}
            forms[key] = IdForm.DIGITS if found == {IdForm.DIGITS} else IdForm.TEXT
            written[key] = written_forms(*(part[key] for part in parts))
        return cls(**forms, time=time, written=written)

    def id(self, name: str, value: Any) -> str | None:
        """Returns a single id as the log has it; None for a missing one.

        Args:
            name: "user_id" or "item_id".
            value: Id of any type.

        Raises:
            BadValue: The value is no id.
        """
        form: IdForm = getattr(self, name)
        text = form.one(value)
        if text is None:
            return None
        # An id that the log writes in a decomposed Unicode form is found by its composed one too.
        return self.written.get(name, {}).get(text, text)

    def ids(self, name: str, values: pa.ChunkedArray | pa.Array | Iterable[Any]) -> pa.ChunkedArray:
        """Returns ids as the log has them: text, null where one is missing.

        Args:
            name: "user_id" or "item_id".
            values: Ids of any type.

        Raises:
            BadValue: A value is no id; `row` says which.
        """
        if not isinstance(values, (pa.Array, pa.ChunkedArray)):
            read = functools.partial(self.id, name)
            return pa.chunked_array([pa.array(_each(read, values), pa.string())])
        form: IdForm = getattr(self, name)
        texts = form.column(_chunked(values))
        written = self.written.get(name)
        if not written:
            return texts
        # Null where an id has one form only, which `coalesce` then keeps.
        known = pc.index_in(texts, value_set=pa.array(list(written)))
        return pc.coalesce(pa.array(list(written.values())).take(known), texts)

    def times(self, values: pa.ChunkedArray | pa.Array | Iterable[Any]) -> pa.ChunkedArray:
        """Returns times as seconds, int64, read in the form that the log has; null is missing.

        Args:
            values: Times of any type: a model of a log in milliseconds is asked in milliseconds.

        Raises:
            BadValue: A value is no time; `row` says which.
        """
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            return self.time.column(_chunked(values))
        return pa.chunked_array([pa.array(_each(self.time.one, values), pa.int64())])

    def column(self, side: Side, name: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns a column of a request or a change with the type that the log's tables have.

        Args:
            side: Side that the rows describe.
            name: Column of a feature: neither an id nor the time of the request.
            values: Values of any type.

        Raises:
            BadValue: A value is not what the column is read as; `row` says which.
        """
        # No feature reads it as a number or a time: it stays text, as in the log.
        form = self.columns.get(f"{side}.{name}")
        if form is None:
            return values
        return convert(values, form)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contract as values that JSON holds."""
        columns = {}
        for name, form in self.columns.items():
            kind = "time" if isinstance(form, TimeForm) else "number"
            columns[name] = {kind: _form_dict(form)}
        return {
            "user_id": self.user_id.value,
            "item_id": self.item_id.value,
            "time": _form_dict(self.time),
            "columns": columns,
            # In an order of their own: those of rows that come in another order are the same.
            "written": {name: dict(sorted(forms.items())) for name, forms in self.written.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Contract:
        """Returns the contract whose `to_dict` this is; {} is that of runs that had none."""
        # Runs before there were contracts wrote none; their ids were text.
        if not state:
            return cls()
        columns: dict[str, Form] = {}
        for name, form in state["columns"].items():
            if "time" in form:
                columns[name] = TimeForm(**form["time"])
            else:
                number = dict(form["number"])
                columns[name] = NumberForm(**{**number, "marks": tuple(number["marks"])})
        # Read at once: what is no mapping of texts is told when it is loaded, not by a request.
        written = {name: dict(forms) for name, forms in dict(state["written"]).items()}
        return cls(
            user_id=IdForm(state["user_id"]),
            item_id=IdForm(state["item_id"]),
            time=TimeForm(**state["time"]),
            columns=columns,
            written=written,
        )


def convert(values: pa.ChunkedArray, form: Form) -> pa.ChunkedArray:
    """Returns text as numbers, or values as times of a type that says so."""
    if isinstance(form, NumberForm):
        return form.column(values)
    # Seconds of the type time: nothing takes them for another unit later on.
    return form.column(values).cast(pa.timestamp("s"))


def _form_dict(form: Form) -> dict[str, Any]:
    state = dataclasses.asdict(form)
    # How a form was found is of no matter later.
    state.pop("is_typed", None)
    state.pop("is_text", None)
    return state


def _each(read: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Returns single values as they are read, or names the first that cannot be by its row."""
    found = []
    for row, value in enumerate(values):
        try:
            found.append(read(value))
        except BadValue as error:
            raise BadValue(value, error.problem, row) from None
    return found


def _chunked(values: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    if isinstance(values, pa.ChunkedArray):
        return values
    return pa.chunked_array([values])


def _cure(text: str) -> str:
    """Returns the words for options that read a number as it is written."""
    marks = tuple(dict.fromkeys(re.findall(r"[^\W\d_]+|[^\w\s.,'+-]", text)))
    sample = pa.chunked_array([[text]])
    # Without marks first: the simplest option that reads the value is offered.
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
