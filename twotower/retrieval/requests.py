"""Requests as callers write them, read in the forms of the log: ids, rows and histories.

What cannot be meant is refused with its place and its value: a request that is answered wrongly
looks like one that is answered.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.core.arrow import (
    BadValue,
    is_list,
    is_missing,
    is_table,
    members_of,
    pc,
    read_value,
    table_of,
)
from twotower.core.errors import ConfigError, did_you_mean, echo
from twotower.core.ids import IdForm, ReadsIds
from twotower.core.times import UNITS_PER_SECOND, TimeForm, TimeUnit
from twotower.data.contract import Contract, Side
from twotower.data.operators import unit_of

if TYPE_CHECKING:  # the bundle loads what matching ids needs not
    from twotower.features.encoder import Encoder
    from twotower.retrieval.bundle import Bundle

# A table or a frame, or rows: a mapping of columns to values each.
RequestRows = pa.Table | Sequence[Mapping[str, Any]] | Mapping[str, Any]
# Values of one column, in a type of Arrow or as a caller wrote them.
Values = pa.ChunkedArray | Sequence[Any]
PlainValue = str | list[str]  # a value of a column that needs no reading
# Column of a single row -> its value, in the form of the log.
Row = Mapping[str, PlainValue | pa.ChunkedArray]
EVENT_FIELDS = ("item_id", "event", "timestamp")


@runtime_checkable
class ReadColumn(Protocol):
    """A reader of a column of rows: its values in the form of the log, a null for each missing."""

    def __call__(self, values: Values) -> pa.ChunkedArray: ...


@dataclasses.dataclass(frozen=True)
class LogIds:
    """The ids of one side of a log, as the log writes them.

    Attributes:
        contract: Forms of the log.
        name: "user_id" or "item_id".
    """

    contract: Contract
    name: str

    def one(self, value: Any) -> str | None:
        """Returns a single id; None for a missing one."""
        return self.contract.id(self.name, value)

    def are_plain(self, values: Sequence[Any]) -> bool:
        """Whether `one` returns each value as it is; False where it takes a look at each."""
        form: IdForm = getattr(self.contract, self.name)
        return not self.contract.written.get(self.name) and form.are_plain(values)

    def column(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns a column of ids; null is missing."""
        return self.contract.ids(self.name, values)


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms of a log in which its requests are read.

    Attributes:
        user_id: Form of user ids.
        item_id: Form of item ids.
        time: Form of times.
        texts: Columns of items that hold single texts.
        separators: Column of items whose text is a list -> the text between its members.
        units: Column of items whose numbers are times -> their unit, in older bundles.
        contract: Forms of the columns that features read.
    """

    user_id: ReadsIds = IdForm.TEXT
    item_id: ReadsIds = IdForm.TEXT
    time: TimeForm = TimeForm()
    texts: frozenset[str] = frozenset()
    separators: Mapping[str, str] = dataclasses.field(default_factory=dict)
    units: Mapping[str, TimeUnit] = dataclasses.field(default_factory=dict)
    contract: Contract = Contract()


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names of columns that the rows of a request may have.

    Attributes:
        names: Name of a column, or of a field of events -> our name for it.
        strict: Whether a name that nothing reads is refused; otherwise it is left out.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    strict: bool = True

    @classmethod
    def read(cls, names: Mapping[str, str] | None, strict: bool) -> Naming:
        """Returns the names that a caller gives; None for ours alone."""
        # One object for all usual requests, whose readers are kept by it.
        if names is None:
            return OUR_NAMES if strict is True else cls(strict=strict)
        return cls(names, strict)

    def __post_init__(self):
        if not isinstance(self.strict, (bool, np.bool_)):
            raise ConfigError(f"strict={echo(self.strict)} must be True or False.")
        # As text both: a set of names, or a name of another type, would be found nowhere.
        is_mapping = isinstance(self.names, Mapping)
        pairs = self.names.items() if is_mapping else ()
        if not is_mapping or not all(isinstance(name, str) for pair in pairs for name in pair):
            raise ConfigError(
                f"names={echo(self.names)} must be a mapping of your names to ours, such as "
                "{'buyer_id': 'user_id'}."
            )

    def ours(self, theirs: Iterable[Any], known: Collection[str], location: str) -> dict[Any, str]:
        """Returns the names that something reads -> our names for them.

        Args:
            theirs: Names as the request has them.
            known: Our names.
            location: Place of the names in messages.

        Raises:
            ConfigError: Nothing reads a name, or two names mean one column.
        """
        found: dict[Any, str] = {}
        for name in theirs:
            ours = self._one(name)
            # Which of both is meant nobody can say.
            if ours in found.values():
                raise ConfigError(f"{location}: two columns are {ours!r}: leave one out.")
            if ours in known:
                found[name] = ours
            elif self.strict:
                raise self._unknown(name, known, location)
        return found

    def _one(self, name: Any) -> str:
        if not isinstance(name, str):
            return str(name)
        return self.names.get(name, name)

    def _unknown(self, name: Any, known: Collection[str], location: str) -> ConfigError:
        hint = did_you_mean(str(name), known)
        return ConfigError(
            f"{location}: nothing reads {echo(name)}{hint} Known: {', '.join(known)}. "
            f"names={{{echo(name)}: ...}} says which of these it is, and strict=False leaves it "
            "out."
        )


PLAIN = Forms()  # ids as they are written, times in seconds
OUR_NAMES = Naming()


def find_forms(bundle: Bundle) -> Forms:
    """Returns the forms in which requests to a bundle are read."""
    contract = bundle.encoder.contract
    separators = {}
    for feature in bundle.encoder.spec.to_dict()["item"].values():
        if feature["type"] == "strings" and feature["separator"]:
            separators[feature["column"]] = feature["separator"]
    return Forms(
        user_id=LogIds(contract, "user_id"),
        item_id=LogIds(contract, "item_id"),
        time=contract.time,
        texts=frozenset(x.name for x in bundle.items.schema if pa.types.is_string(x.type)),
        separators=separators,
        units=time_units(bundle.encoder, "item"),
        contract=contract,
    )


def read_rows(
    rows: Any,
    known: Collection[str],
    naming: Naming,
    readers: Mapping[str, ReadColumn],
    *,
    key: str,
) -> pa.Table:
    """Returns raw rows under our names, their columns in the form of the log.

    Args:
        rows: Table of Arrow, frame of pandas or polars, one mapping, or a list of mappings.
        known: Names of the columns that something reads.
        naming: Names that the rows have instead.
        readers: Column -> the function that reads it; others keep the types that they have.
        key: Column of the ids.

    Raises:
        ConfigError: They are no rows, a name is unknown, or a value is not what its column holds.
    """
    columns = _columns(rows, key, naming)
    read = {}
    for theirs, ours in naming.ours(columns, known, "rows").items():
        read_column = readers.get(ours)
        if read_column is None:
            read[ours] = _as_array(columns[theirs], f"rows, column {theirs!r}")
        else:
            read[ours] = read_column(columns[theirs])
    if not read and columns:
        # A table without columns has no rows either.
        (first, *_) = columns.values()
        read[key] = pa.chunked_array([pa.nulls(len(first), pa.string())])
    return pa.Table.from_arrays(list(read.values()), list(read))


def read_row(
    rows: Any, known: Collection[str], naming: Naming, readers: Mapping[str, ReadColumn]
) -> Row | None:
    """Returns the columns of a single mapping, as `read_rows` does, plain values without Arrow.

    Args:
        rows: Rows of a request.
        known: Names of the columns that something reads.
        naming: Names that the rows have instead.
        readers: Column -> the function that reads it.

    Returns:
        Column -> its value where its reader finds nothing to do, else a column of one row; missing
        values are left out. None of rows that are written in another way, under other names, or
        with none of the columns: `read_rows` tells what they are.

    Raises:
        ConfigError: A value is not what its column holds.
    """
    row = rows
    # `type` and not `isinstance`, here and below: this is asked for every request, and a subclass
    # takes the longer way.
    if type(rows) is list and len(rows) == 1:
        row = rows[0]
    if type(row) is not dict or naming.names or not all(map(known.__contains__, row)):
        return None
    # Under the key, a list makes the mapping one of columns.
    if row is rows and type(row.get("user_id", "")) is not str:
        return None
    read: dict[str, PlainValue | pa.ChunkedArray] = {}
    for name, value in row.items():
        if value is None:
            continue
        read_column = readers.get(name)
        is_plain = getattr(read_column, "is_plain", None)
        if is_plain is not None and is_plain(value):
            read[name] = value
        elif read_column is None:
            read[name] = _as_array([value], f"rows, column {name!r}")
        else:
            column = read_column([value])
            # An id is text, whatever it was.
            text = column[0].as_py() if isinstance(read_column, IdColumn) else column
            if text is not None:
                read[name] = text
    return read or None


def row_table(row: Row) -> pa.Table:
    """Returns a single row as a table."""
    columns = {}
    for name, value in row.items():
        columns[name] = value
        if not isinstance(value, pa.ChunkedArray):
            columns[name] = pa.chunked_array([[value]])
    return pa.table(columns)


def as_table(rows: Any) -> pa.Table:
    """Returns raw rows as an Arrow table, under the names and types that they have.

    Args:
        rows: Table of Arrow, frame of pandas or polars, one mapping, or a list of mappings.

    Raises:
        ConfigError: They are no rows.
    """
    read = {}
    for name, values in _columns(rows, "", OUR_NAMES).items():
        read[name] = _as_array(values, f"rows, column {name!r}")
    return pa.table(read)


def as_display(rows: pa.Table, schema: pa.Schema, forms: Forms) -> pa.Table:
    """Returns the rows of items with the columns that lists show in the types of the others.

    Args:
        rows: Rows that were read.
        schema: Columns of the items that are there already.
        forms: Forms of the columns of items.

    Raises:
        ConfigError: A value is no time, in a column of times.
    """
    columns = dict(zip(rows.column_names, rows.columns))
    for field in schema:
        # A column that new items lack becomes null among the others.
        column = columns.get(field.name)
        if column is None or column.type == field.type:
            continue
        is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        is_time = pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)
        if pa.types.is_integer(field.type) and is_time:
            # As every table has the times that no feature reads.
            columns[field.name] = _convert(TimeForm().column, column, field.name)
        elif is_list(column.type) and field.name in forms.separators:
            texts = column.cast(pa.list_(pa.string()))
            columns[field.name] = pc.binary_join(texts, forms.separators[field.name])
        elif is_number and pa.types.is_floating(column.type):
            # As frames write a missing number.
            columns[field.name] = pc.if_else(pc.is_nan(column), None, column)
    return pa.table(columns)


@dataclasses.dataclass(frozen=True)
class IdColumn:
    """Reads a column of ids, of which some may be missing.

    Attributes:
        name: Name of the column in messages.
        form: Form of the ids.
    """

    name: str
    form: ReadsIds

    def is_plain(self, value: Any) -> bool:
        """Whether a value is an id as it is."""
        return self.form.are_plain([value])

    def __call__(self, values: Values) -> pa.ChunkedArray:
        if isinstance(values, pa.ChunkedArray):
            return _convert(self.form.column, values, self.name)
        ids = values
        # Looked at one by one only where one of them is no text already.
        if not self.form.are_plain(values):
            ids = _each(self.form.one, values, self.name)
        return pa.chunked_array([pa.array(ids, pa.string())])


@dataclasses.dataclass(frozen=True)
class TimeColumn:
    """Reads a column of times as seconds since 1970.

    Attributes:
        name: Name of the column in messages.
        form: Form of the times.
    """

    name: str
    form: TimeForm

    def __call__(self, values: Values) -> pa.ChunkedArray:
        if isinstance(values, pa.ChunkedArray):
            return _convert(self._read, values, self.name)
        # Most requests have times of one kind, which are read at once.
        try:
            return self._read(pa.chunked_array([pa.array(values, from_pandas=True)]))
        except (BadValue, pa.ArrowException, OverflowError, TypeError, ValueError):
            seconds = _each(self._read_one, values, self.name)
            return pa.chunked_array([pa.array(seconds, pa.int64())])

    def _read(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns the seconds of times, and refuses numbers of another unit than the log's."""
        kind = column.type
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        # A day written as the number 20240131 is of no unit.
        if is_number and not self.form.format:
            # The ends are enough: units are a factor of 1,000 apart.
            for value in pc.min_max(column).as_py().values():
                self._check_unit(value)
        return self.form.column(column)

    def _read_one(self, value: Any) -> int | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._check_unit(value)
        return self.form.one(value)

    def _check_unit(self, value: float | None) -> None:
        """Refuses a number that is a time of our days in another unit alone.

        Raises:
            BadValue: It is one.
        """
        if value is None or self.form.format:
            return
        unit = unit_of(value)
        if unit not in (None, self.form.unit):
            raise BadValue(
                value,
                f"is a time in {unit}, and times are in {self.form.unit} here: give it in that "
                "unit, or as a datetime",
            )


@dataclasses.dataclass(frozen=True)
class UnitColumn:
    """Reads a column of times as numbers of the unit in which a feature reads it.

    Attributes:
        name: Name of the column in messages.
        unit: Unit of its numbers.
    """

    name: str
    unit: TimeUnit

    def __call__(self, values: Values) -> pa.ChunkedArray:
        seconds = TimeColumn(self.name, TimeForm(self.unit))(values)
        return pc.multiply(seconds, UNITS_PER_SECOND[self.unit])


@dataclasses.dataclass(frozen=True)
class TextColumn:
    """Reads a column of a feature of text: a number or a flag is spelt as the log spells it.

    Attributes:
        name: Name of the column in messages.
        known: Texts of the log.
    """

    name: str
    known: pa.Array

    def is_plain(self, value: Any) -> bool:
        """Whether a value is a text of which nothing is to be changed."""
        if type(value) is not str:
            return False
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a character
            return False
        return True

    def __call__(self, values: Values) -> pa.ChunkedArray:
        column = _as_array(values, f"rows, column {self.name!r}")
        kind = column.type
        if not (
            pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        ):
            return column
        spelt = [spellings(value) for value in column.to_pylist()]
        known = pc.is_in(
            pa.array([text for texts in spelt for text in texts], pa.large_string()),
            value_set=self.known.cast(pa.large_string()),
        )
        is_known = iter(known.to_pylist())
        # The first of those that the log has, or the usual one.
        chosen = []
        for texts in spelt:
            found = [text for text in texts if next(is_known)]
            chosen.append((found or [*texts, None])[0])
        return pa.chunked_array([pa.array(chosen, pa.string())])


def spellings(value: bool | float | None) -> tuple[str, ...]:
    """Returns the texts by which files have a number or a flag, the usual one first.

    >>> spellings(True), spellings(8), spellings(8.5), spellings(None)
    (('True', 'true', 'TRUE'), ('8', '8.0'), ('8.5',), ())
    """
    if value is None:
        return ()
    if isinstance(value, bool):
        return str(value), str(value).lower(), str(value).upper()
    # 8.5 has one spelling; 8.0 may have been a whole number before a frame made it a float.
    if isinstance(value, float) and not value.is_integer():
        return (repr(value),)
    return f"{value:.0f}", f"{value:.1f}"


def feature_readers(encoder: Encoder, side: Side) -> dict[str, ReadColumn]:
    """Returns the readers of the columns that features of a side read, but for ids."""
    readers: dict[str, ReadColumn] = {}
    # What the log's tables have as numbers or times comes first: a text of it is theirs.
    for key in encoder.contract.columns:
        of_side, _, name = key.partition(".")
        if of_side == side:
            readers[name] = FeatureColumn(name, side, encoder.contract)
    for name, unit in time_units(encoder, side).items():
        readers.setdefault(name, UnitColumn(name, unit))
    for name, feature in encoder.spec.to_dict()[side].items():
        column = feature["column"]
        if feature["type"] == "string" and column not in ("user_id", "item_id"):
            vocabulary = encoder.fitted[side, name].require_vocabulary()
            # An id has a form of its own; other texts have the spelling of the log.
            readers.setdefault(column, TextColumn(column, vocabulary.values))
    return readers


def time_units(encoder: Encoder, side: Side) -> dict[str, TimeUnit]:
    """Returns the columns that features read as times -> the unit of their numbers."""
    # By the words of the specification, so that no kind of feature is loaded for it.
    units = {}
    for feature in encoder.spec.to_dict()[side].values():
        column = feature["column"]
        # The contract knows those of all but older runs.
        if feature["type"] == "timestamp" and f"{side}.{column}" not in encoder.contract.columns:
            units[column] = feature["unit"] or "s"
    return units


@dataclasses.dataclass(frozen=True)
class FeatureColumn:
    """Reads a column of numbers or times as the log's tables were read.

    Attributes:
        name: Name of the column.
        side: Side that the rows describe.
        contract: Forms of the log.
    """

    name: str
    side: Side
    contract: Contract

    def __call__(self, values: Values) -> pa.ChunkedArray:
        form = self.contract.columns[f"{self.side}.{self.name}"]
        if isinstance(form, TimeForm):
            # Times of several types in one request, none of them in another unit.
            column = TimeColumn(self.name, form)(values).cast(pa.timestamp("s"))
        else:
            column = _as_array(values, f"rows, column {self.name!r}")
        read = functools.partial(self.contract.column, self.side, self.name)
        return _convert(read, column, self.name)


@dataclasses.dataclass(frozen=True)
class HistoryColumn:
    """Reads a column of histories: lists of item ids or of events, the latest last.

    Attributes:
        name: Name of the column.
        location: Name of its feature in messages.
        forms: Forms of ids and times.
        naming: Names of the fields of events.
    """

    name: str
    location: str
    forms: Forms
    naming: Naming

    def is_plain(self, value: Any) -> bool:
        """Whether a value is a list of ids as they are."""
        return type(value) is list and self.forms.item_id.are_plain(value)

    def __call__(self, values: Values) -> pa.ChunkedArray:
        histories: Sequence[Any] = values
        if isinstance(values, pa.ChunkedArray):
            column: pa.ChunkedArray = values
            if not is_list(column.type) and not pa.types.is_null(column.type):
                raise self._no_history(str(column.type), column[:1])
            try:
                histories = column.to_pylist()
            # Times that Python's own have no room for.
            except (OverflowError, ValueError) as error:
                raise ConfigError(f"rows, column {self.name!r}: {error}.") from None
        # Row by row: each history may be written in another way.
        parts = [self._events(history, row) for row, history in enumerate(histories)]
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part or ()))
        flat = list(itertools.chain.from_iterable(part or () for part in parts))
        mask = None
        # Missing is not empty: an empty history says that there were no events.
        if None in parts:
            mask = pa.array([part is None for part in parts])
        lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), self._members(flat), mask=mask)
        return pa.chunked_array([lists])

    def _events(self, history: Any, row: int) -> Sequence[str | dict[str, Any]] | None:
        """Returns the events of one history, ids or mappings of our fields; None for a missing."""
        # Most are lists of ids.
        if type(history) is list and self.forms.item_id.are_plain(history):
            return history
        if is_missing(history):
            return None
        # A set has no latest event, and the letters of a text are none.
        is_ordered = isinstance(history, (list, tuple, np.ndarray, pa.Array))
        is_ordered = is_ordered or hasattr(history, "to_list")
        if not is_ordered or getattr(history, "ndim", 1) != 1:
            kind = "string" if isinstance(history, str) else type(history).__name__
            raise self._no_history(kind, history)
        location = f"rows, row {row + 1}, column {self.name!r}"
        return [self._event(event, location) for event in history]

    def _event(self, event: Any, location: str) -> dict[str, Any]:
        """Returns the fields of an event, of which a plain id is one."""
        if not isinstance(event, Mapping):
            return {"item_id": event}
        names = self.naming.ours(event, EVENT_FIELDS, f"{location}, an event")
        if "item_id" not in names.values():
            raise ConfigError(
                f"{location}: an event has no item_id, but "
                f"{', '.join(map(echo, event)) or 'nothing'}."
            )
        return {ours: event[theirs] for theirs, ours in names.items()}

    def _members(self, events: Sequence[str | Mapping[str, Any]]) -> pa.Array:
        """Returns events as ids, or as structs where one of them has a kind or a time."""
        # Ids alone need no struct, and most requests bring nothing else.
        if all(type(event) is str for event in events):
            return pa.array(events, pa.string())
        events = [event if isinstance(event, Mapping) else {"item_id": event} for event in events]
        readers: dict[str, ReadColumn] = {
            "item_id": IdColumn(self.name, self.forms.item_id),
            "event": IdColumn(self.name, IdForm.TEXT),
            "timestamp": TimeColumn(self.name, self.forms.time),
        }
        fields = {}
        for name, read in readers.items():
            if name == "item_id" or any(name in event for event in events):
                column = read([event.get(name) for event in events])
                fields[name] = column.combine_chunks()
        if len(fields) == 1:
            return fields["item_id"]
        return pa.StructArray.from_arrays(list(fields.values()), list(fields))

    def _no_history(self, kind: str, history: Any) -> ConfigError:
        return ConfigError(
            f"{self.location}: column {self.name!r} holds {kind}, such as {echo(history)}; a "
            "history is a list of item ids, or of mappings with an item_id, the latest last."
        )


def _columns(rows: Any, key: str, naming: Naming) -> dict[Any, Values]:
    """Returns the values of rows by column.

    Raises:
        ConfigError: They are no rows.
    """
    if is_table(rows):
        try:
            table = table_of(rows)
        except BadValue as error:
            raise ConfigError(f"rows: {error.problem}.") from None
        return dict(zip(table.column_names, table.columns))
    # NumPy's own tables.
    fields = getattr(getattr(rows, "dtype", None), "names", None)
    if fields:
        return {name: rows[name].tolist() for name in fields}
    if isinstance(rows, Mapping):
        ids = [value for name, value in rows.items() if naming.names.get(name, name) == key]
        # No id is a list, so this is a mapping of columns.
        if ids and isinstance(ids[0], (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray)):
            return _equal_columns(rows)
        rows = [rows]
    # An array without dimensions is iterable by its type alone.
    is_iterable = isinstance(rows, Iterable) and getattr(rows, "ndim", 1) != 0
    if isinstance(rows, (str, bytes)) or not is_iterable:
        hint = ""
        if hasattr(rows, "collect"):
            hint = " Call .collect() on a lazy frame first."
        raise ConfigError(
            f"rows={echo(rows)} of type {type(rows).__name__!r} are no rows: give a list of "
            f"mappings, such as [{{'user_id': '42'}}], a frame, or an Arrow table.{hint}"
        )
    records = [_record(row, number) for number, row in enumerate(rows)]
    # A dict keeps the order of the first appearance; a set would not. Arrow by itself takes the
    # columns of the first row alone.
    names = list(dict.fromkeys(name for record in records for name in record))
    # Rows that say nothing are rows all the same: their number is kept.
    if records and not names:
        return {key: [None] * len(records)}
    return {name: [record.get(name) for record in records] for name in names}


def _record(row: Any, number: int) -> Mapping[Any, Any]:
    """Returns a row as a mapping of its columns."""
    if isinstance(row, Mapping):
        return row
    # Rows of pandas, and named tuples.
    for name in ("to_dict", "_asdict"):
        convert = getattr(row, name, None)
        if convert is not None:
            return convert()
    raise ConfigError(
        f"rows[{number}]: {echo(row)} of type {type(row).__name__!r} is no row: a row is a mapping "
        "of columns to values, such as {'user_id': '42'}."
    )


def _equal_columns(columns: Mapping[str, Any]) -> dict[Any, Values]:
    lists: dict[Any, Values] = {}
    for name, values in columns.items():
        lists[name] = list(members_of(values, f"rows[{name!r}]"))
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{name!r} has {len(values)}" for name, values in lists.items())
        raise ConfigError(f"rows: the columns differ in length: {lengths}.")
    return lists


def _as_array(values: Values, location: str) -> pa.ChunkedArray:
    """Returns the values of one column, of which Arrow finds the type.

    Raises:
        ConfigError: They are of several types, or of one that no column has.
    """
    if isinstance(values, pa.ChunkedArray):
        return values
    try:
        # As from pandas: NaN and the like are missing values, beside text too.
        return pa.chunked_array([pa.array(values, from_pandas=True)])
    except OverflowError:
        problem = "an integer has more than 64 bits: give it as text"
    except UnicodeEncodeError:
        problem = "a text holds half of a character (a lone surrogate)"
    except (pa.ArrowException, TypeError, ValueError) as error:
        present = [value for value in values if not is_missing(value)]
        kinds = sorted({type(value).__name__ for value in present})
        problem = f"the values are of several types ({', '.join(kinds)}): make them one"
        if len(kinds) < 2:
            problem = f"no column has such values: {error}"
    raise ConfigError(f"{location}: {problem}.")


def _convert(
    convert: Callable[[pa.ChunkedArray], pa.ChunkedArray], values: pa.ChunkedArray, name: str
) -> pa.ChunkedArray:
    """Returns a column converted, or refuses it with the row that cannot be."""
    try:
        return convert(values)
    except BadValue as error:
        shown = "it"
        location = f"rows, column {name!r}"
        if error.row is not None:
            location = f"rows, row {error.row + 1}, column {name!r}"
            shown = echo(error.value)
        raise ConfigError(f"{location}: {shown} {error.problem}.") from None


def _each(convert: Callable[[Any], Any], values: Iterable[Any], name: str) -> list[Any]:
    """Returns single values converted, or refuses the first that cannot be, with its row."""
    converted = []
    for row, value in enumerate(values):
        converted.append(read_value(convert, value, f"rows, row {row + 1}, column {name!r}"))
    return converted
