"""Tables with our names and types, whatever they were read from.

A column is read as its use declares, never as its values look: ids are text, digit for digit;
times are seconds; numbers are numbers where something computes with them; all else is the text of
the file. What does not match is refused with its row and column, and the cure.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

import pyarrow as pa
from absl import logging

from twotower.config import TableConfig
from twotower.core.arrow import BadValue, pc, plain_text
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm
from twotower.core.install import command
from twotower.core.times import (
    DAY,
    EARLIEST,
    TimeForm,
    are_spreadsheet_days,
    find_time_forms,
    format_time,
)
from twotower.data.contract import KEYS, SECONDS, Contract, NumberForm, Side, Uses, convert
from twotower.data.interactions import describe
from twotower.data.nested import expand_objects

# Columns of the log that are codes; ids have forms of their own.
CODES = ("event", "split")
_MOST_NAMES = 30  # names of columns that a message lists
# Delimiters that a file may have where its rows were read as one column.
SEPARATORS = r"[;\t|,]"
# Years between which the times of most features lie, 1700 and 2200 in seconds: films and births,
# releases to come.
_FIRST_YEAR = -8_520_336_000
_LAST_YEAR = 7_258_118_400


@dataclasses.dataclass(frozen=True)
class Origin:
    """The source of the rows of a table, for messages.

    Attributes:
        name: Name of the source, such as a path.
        describe_row: Function from the number of a row, from 0, to its name in the source.
        is_typed: Whether the columns have types already, as in Parquet; if not, they are text.
        is_ordered: Whether the order of the rows is always the same.
        missing_words: Function from a column of the source to the words in it that were taken for
            missing values, each with its number.
        skipped: Number of rows that were left out, as they had other fields than the header.
        skipped_locations: Files and lines of the first of these.
    """

    name: str
    describe_row: Callable[[int], str]
    is_typed: bool
    is_ordered: bool = True
    missing_words: Callable[[str], Mapping[str, int]] = lambda column: {}
    skipped: int = 0
    skipped_locations: tuple[str, ...] = ()


def keys_of(name: str) -> tuple[str, ...]:
    """Returns the columns that a table of `config.data` must have."""
    return {"user_table": ("user_id",), "item_table": ("item_id",)}.get(name, KEYS)


@dataclasses.dataclass(frozen=True)
class RawTable:
    """A table as it was read, with what is known of it.

    Attributes:
        rows: The table under the names and types of its source.
        config: Its options.
        name: Name of the table in the configuration: interactions, user_table, item_table,
            validation or test.
        origin: Source of its rows.
    """

    rows: pa.Table
    config: TableConfig
    name: str
    origin: Origin

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns that the table must have."""
        return keys_of(self.name)

    @property
    def time(self) -> TimeForm:
        """Form of the times of events, as the configuration says."""
        return TimeForm(self.config.timestamp_unit, self.config.timestamp_format)

    def time_of_features(self, contract: Contract) -> TimeForm:
        """Returns the form of times that is tried first: that of the table, or else of the log."""
        # The default says nothing: a table without an option follows the log.
        return contract.time if self.time == SECONDS else self.time

    @property
    def numbers(self) -> NumberForm:
        """Spelling of the numbers, as the configuration says."""
        return NumberForm(self.config.decimal, self.config.thousands, self.config.marks)

    def with_our_names(self) -> RawTable:
        """Returns the table with our names, and the fields of objects as columns.

        Raises:
            ConfigError: A column is missing.
        """
        # "metadata.brand" is a field of the column "metadata".
        fields = {name.split(".")[0] for name in self.config.columns.values() if "." in name}
        try:
            # Before columns are renamed: the mapping may name fields of objects.
            rows = expand_objects(self.rows, required=fields)
        except BadValue as error:
            raise self.refusal(error, ", ".join(sorted(fields))) from None
        rows = _rename(rows, self.config, self.name, self.keys, self.origin)
        for key in self.keys:
            # Under the name of the source, which counted them.
            words = self.origin.missing_words(self.config.columns.get(key, key))
            _say_words(words, key, self.name)
        return dataclasses.replace(self, rows=rows)

    def refusal(self, error: BadValue, column: str, field: str = "") -> ConfigError:
        """Returns the error of a value in a column, named as the file has it.

        Args:
            error: Value and problem.
            column: Column under our name, or its own.
            field: Name of what reads the column; empty for the table itself.
        """
        source = self.config.columns.get(column, column)
        location = self.origin.name
        shown = ""
        if error.row is not None:
            location = self.origin.describe_row(error.row)
            shown = f": {error.value!r}"
        begin = f"{field}: {self.name}" if field else self.name
        return ConfigError(f"{begin}: {location}, column {source!r}{shown} {error.problem}.")


def read_tables(
    log: Sequence[RawTable],
    tables: Sequence[RawTable] = (),
    uses: Uses | None = None,
    contract: Contract | None = None,
) -> tuple[list[pa.Table], list[pa.Table], Contract]:
    """Gives the tables of a log our names and types.

    Args:
        log: Parts of the log: its rows, and those of a fixed split.
        tables: Tables of users and items.
        uses: Uses of columns, by side.
        contract: Contract of a run whose log has grown; by default one is found.

    Returns:
        Parts of the log: ids as text, timestamp as int64 seconds, weight as float32, and other
        columns as they were read, but for those with a use. The tables, likewise. The contract.

    Raises:
        ConfigError: A missing column, or a value of the wrong type.
    """
    log = [part.with_our_names() for part in log]
    if contract is None:
        contract = Contract.find([part.rows for part in log], log[0].time)
    typed_tables = []
    # Before the log: uses of users' columns hold for those of the log too, with the form found
    # here.
    for table in tables:
        typed, contract = _read(table.with_our_names(), contract, uses or {})
        typed_tables.append(typed)
    parts = []
    for part in log:
        typed, contract = _read(part, contract, uses or {})
        parts.append(typed)
    return parts, typed_tables, contract


def apply_contract(
    table: pa.Table,
    config: TableConfig,
    name: str,
    *,
    origin: Origin,
    contract: Contract | None = None,
) -> tuple[pa.Table, Contract]:
    """Gives one table our names and types; see `read_tables`.

    Args:
        table: The table as it was read.
        config: Mapping of our names to columns of the source, and the forms of values.
        name: Name of the table in the configuration.
        origin: Source of its rows.
        contract: Contract of the log; None for the log itself, on which it is found.

    Raises:
        ConfigError: A missing column, or a value of the wrong type.
    """
    raw = RawTable(table, config, name, origin).with_our_names()
    if contract is None:
        contract = Contract.find([raw.rows], raw.time)
    return _read(raw, contract, {})


def read_uses(
    table: pa.Table,
    side: Literal["user", "item", "log"],
    uses: Uses,
    contract: Contract,
    raw: RawTable | None = None,
) -> tuple[pa.Table, Contract]:
    """Reads the columns with a use as what they are used for.

    Args:
        table: Table under our names.
        side: Key of its uses.
        uses: Uses of columns.
        contract: Contract, to which the forms of these columns are added.
        raw: Source of the table, for its options and for messages; None where it is not known.

    Raises:
        ConfigError: A value is not what its column is used for.
    """
    # A frame that was given in Python has no file to name.
    if raw is None:
        words = f"the table of {side}s"
        origin = Origin(words, lambda row: f"{words}, row {row + 1}", is_typed=True)
        raw = RawTable(table, TableConfig(), f"{side}_table", origin)
    columns = dict(contract.columns)
    for name, use in uses.get(side, {}).items():
        # Ids and the times of events have types already; an item has a `timestamp` like any other.
        is_typed = name in KEYS or (name == "timestamp" and side != "item")
        if name not in table.column_names or is_typed:
            continue
        values = plain_text(table[name])
        key = f"{side}.{name}"
        try:
            if use.kind == "label":
                # Labels need no form: they are written as 0 and 1 wherever they come from.
                labels = _read_labels(values)
                table = table.set_column(table.column_names.index(name), name, labels)
                continue
            form = columns.get(key)
            # The first table that has the column decides, and the contract keeps it for all after.
            if form is None:
                form = raw.numbers
                if use.kind == "time":
                    form = use.time or _find_time_form(
                        values, raw.time_of_features(contract), use.field
                    )
            values = convert(values, form)
        except BadValue as error:
            raise raw.refusal(error, name, use.field) from None
        columns[key] = form
        table = table.set_column(table.column_names.index(name), name, values)
    return table, dataclasses.replace(contract, columns=columns)


def check_time_range(
    rows: pa.Table, time: TimeForm, accept: Collection[str], *, now: float
) -> None:
    """Refuses a log with times before 1990 or after tomorrow, which mostly were misread.

    Args:
        rows: Rows of the log that are kept.
        time: Form in which its times were read.
        accept: Option `config.data.accept`.
        now: Seconds since the epoch, which tomorrow counts from.

    Raises:
        ConfigError: A time is out of range; the message offers the unit or format that makes it
            right.
    """
    if "timestamp" not in rows.column_names:
        return
    seconds = rows["timestamp"]
    findings = {
        "old_times": pc.less(seconds, int(EARLIEST.timestamp())),
        "future_times": pc.greater(seconds, int(now) + DAY),
    }
    # Both are mostly a wrong unit: seconds read as milliseconds are of 1970.
    for finding, mask in findings.items():
        row = pc.index(mask, True).as_py()
        if row < 0 or finding in accept:
            continue
        share = f"{pc.sum(mask).as_py():,} of {len(rows):,}"
        example = f"{format_time(seconds[row].as_py())} ({describe(rows, row)})"
        cure = time_cure(seconds, time, now)
        raise time_out_of_range(finding, share, example, accept, now=now, cure=cure)


def time_out_of_range(
    finding: str, share: str, example: str, accept: Collection[str], *, now: float, cure: str = ""
) -> ConfigError:
    """Returns the error of times before 1990 or after tomorrow.

    Args:
        finding: "old_times" or "future_times".
        share: Words for how many rows have such a time, such as "3 of 10".
        example: One of these times.
        accept: Option `config.data.accept`.
        now: Seconds since the epoch, which tomorrow counts from.
        cure: Sentence on the unit or format by which they would be in range.
    """
    when = "before 1990"
    bound = "'>=', 631152000"
    if finding == "future_times":
        when = "after tomorrow"
        bound = f"'<=', {int(now) + DAY}"
    accepted = (*accept, finding)
    return ConfigError(
        f"interactions: {share} rows have a time {when}, such as {example}. {cure}If few are "
        f"wrong, config.data.where=(('timestamp', {bound}),) leaves them out; if they are right: "
        f"config.data.accept={accepted!r}."
    )


def near_equal_ids(ids: pa.Array | pa.ChunkedArray, side: Side) -> list[str]:
    """Returns a line for each way in which ids differ from others by next to nothing.

    Args:
        ids: Distinct ids, text.
        side: Side that they name.
    """
    lines = []
    ways = {
        "case": pc.utf8_lower(ids),
        "leading zeros": pc.replace_substring_regex(ids, r"^0+(.)", r"\1"),
        "spaces": pc.replace_substring_regex(ids, r"\s+", ""),
    }
    for words, folded in ways.items():
        distinct = pc.unique(folded)
        count = len(ids) - len(distinct)
        if not count:
            continue
        # The first id that has a twin, and the twin.
        counts = pc.value_counts(folded)
        twin = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0]
        examples = ids.filter(pc.equal(folded, twin)).to_pylist()[:2]
        listed = " and ".join(map(repr, examples))
        lines.append(f"{side}s: {count:,} ids differ from others only by {words}, as {listed} do.")
    return lines


def similar_name_hint(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" with the known name most like `name`, or nothing.

    >>> similar_name_hint("user_id", ["UserID", "ItemID"])
    " (did you mean 'UserID'?)"
    """
    similar = _similar_name(name, known)
    if not similar:
        return ""
    return f" (did you mean {similar!r}?)"


def _similar_name(name: str, known: Iterable[str]) -> str:
    """Returns the known name most like `name`, whatever its case and separators, or ""."""
    # Of two names that fold to the same, the first one stays in the dict.
    names = {_fold(other): other for other in reversed(list(known))}
    # Half of the letters alike, as in `did_you_mean`.
    close = difflib.get_close_matches(_fold(name), list(names), n=1, cutoff=0.5)
    if not close:
        return ""
    return names[close[0]]


def _fold(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


def _read(raw: RawTable, contract: Contract, uses: Uses) -> tuple[pa.Table, Contract]:
    """Returns a table that has our names with our types, and the contract with its forms."""
    is_log = raw.keys == KEYS
    # Rows of a fixed split may be written otherwise than the log.
    if is_log and raw.time != contract.time:
        own = dataclasses.replace(contract, time=raw.time)
    else:
        own = contract
    typed = {}
    for name in raw.rows.column_names:
        values = plain_text(raw.rows[name])
        try:
            if name in raw.keys:
                values = contract.ids(name, values)
            # Columns of users and items are typed by the features that read them.
            elif is_log:
                values = log_column(name, values, own, raw)
        except BadValue as error:
            raise raw.refusal(error, name) from None
        typed[name] = values
    side: Side = "item" if raw.name == "item_table" else "user"
    table, contract = read_uses(pa.table(typed), side, uses, contract, raw)
    if is_log:
        table, contract = read_uses(table, "log", uses, contract, raw)
    return table, contract


def log_column(
    name: str, values: pa.ChunkedArray, contract: Contract, raw: RawTable
) -> pa.ChunkedArray:
    """Returns a column of the log whose name says what it is; others as they are.

    Args:
        name: Our name of the column, which is no key.
        values: Values as they were read.
        contract: Contract with the form of the times.
        raw: Source of the table.

    Raises:
        BadValue: A value is not what the column is.
    """
    if name == "timestamp":
        return contract.times(values)
    # Kinds of events are names even where they are written as numbers.
    if name in CODES:
        return IdForm.TEXT.column(values)
    # Where the configuration says so, and not where a column happens to have the name.
    if name == "rating" and name in raw.config.columns:
        return raw.numbers.column(values).cast(pa.float32())
    if name != "weight":
        return values
    try:
        weights = raw.numbers.column(values).cast(pa.float64())
    except BadValue as error:
        cure = (
            "; a column 'weight' of the log says how much a row counts: give it another name by "
            "columns={'ANOTHER NAME': 'weight'} if it says something else"
        )
        raise BadValue(error.value, error.problem + cure, error.row) from None
    row = pc.index(pc.is_inf(weights), True).as_py()
    if row >= 0:
        raise BadValue(values[row].as_py(), "is not finite", row)
    # A negative weight would turn the loss around. Null and NaN are not below anything.
    row = pc.index(pc.less(weights, 0.0), True).as_py()
    if row >= 0:
        raise BadValue(values[row].as_py(), "is not at least 0", row)
    bounds = pc.min_max(weights).as_py()
    logging.info(
        "interactions: the column 'weight' (%g to %g) says how much each row counts in training.",
        bounds["min"] or 0.0,
        bounds["max"] or 0.0,
    )
    # float32, as in the arrays that training reads.
    return weights.cast(pa.float32())


def _read_labels(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns labels written as text as numbers; others as they are."""
    if not pa.types.is_string(values.type):
        return values
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(values))
    for word, number in (("true", "1"), ("false", "0")):
        lower = pc.if_else(pc.equal(lower, word), number, lower)
    try:
        return NumberForm().column(lower).cast(pa.float32())
    except BadValue as error:
        row = error.row or 0
        raise BadValue(
            values[row].as_py(),
            "is no label: labels are numbers 0 and 1, true and false, or missing",
            row,
        ) from None


def _find_time_form(values: pa.ChunkedArray, of_log: TimeForm, field: str) -> TimeForm:
    """Returns the form of the times of a feature.

    Raises:
        BadValue: Several forms would do, or none makes times of the values.
    """
    kind = values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind):
        return TimeForm(of_log.unit)
    # A format that does not fit is no mistake: birthdays are seldom written as events are.
    if of_log.format:
        try:
            of_log.column(values)
        except BadValue:
            pass
        else:
            return of_log
    cure = f"set {field}.unit to 's', 'ms', 'us' or 'ns', or {field}.format"
    if are_spreadsheet_days(values):
        raise BadValue(None, "holds days of a spreadsheet: write them as dates there")
    # No clock: what is likely for a feature does not depend on today.
    forms = find_time_forms(values, now=_LAST_YEAR)
    # Of several readings the log's own is the likeliest.
    if of_log in forms:
        return of_log
    if len(forms) > 1:
        listed = " or ".join(repr(form.format) for form in forms)
        raise BadValue(
            None,
            f"has times of which day and month cannot be told apart: set {field}.format={listed}",
        )
    form = TimeForm(of_log.unit)
    # Numbers of which one unit alone makes sense.
    if forms and not forms[0].is_text:
        return forms[0]
    seconds = form.column(values)
    # The median: a few nonsense dates must not refuse a column, nor make one look right.
    middle = pc.quantile(seconds, 0.5)[0].as_py()
    if middle is not None and not _FIRST_YEAR < middle < _LAST_YEAR:
        row = pc.index(pc.is_valid(values), True).as_py()
        raise BadValue(
            values[row].as_py(),
            f"is {format_time(seconds[row].as_py())} in {form.words}: {cure}",
            row,
        )
    return form


def time_cure(seconds: pa.ChunkedArray, time: TimeForm, now: float) -> str:
    """Returns the sentence that offers the unit or format by which times are in range."""
    if time.format:
        return ""
    # The numbers as the source has them, but for what lies below a second.
    numbers = pc.multiply(seconds, {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[time.unit])
    if are_spreadsheet_days(numbers):
        return "They look like days of a spreadsheet: write them as dates there. "
    for form in find_time_forms(numbers, now=now):
        row = pc.index(pc.is_valid(numbers), True).as_py()
        number = numbers[row].as_py()
        option = f"timestamp_unit={form.unit!r}"
        if form.format:
            option = f"timestamp_format={form.format!r}"
        moment = format_time(form.one(number) or 0)
        return f"With config.data.interactions.{option} {number} is {moment}. "
    return ""


def _say_words(words: Mapping[str, int], column: str, name: str) -> None:
    """Says which words were taken for missing ids: some shop may have a country NA."""
    if words:
        listed = ", ".join(f"{word!r} ({count:,})" for word, count in words.items())
        logging.warning(
            "%s: %s of %s stand for a missing id; config.data.%s.missing lists such words.",
            name,
            listed,
            column,
            name,
        )


def _rename(
    table: pa.Table, config: TableConfig, name: str, keys: tuple[str, ...], origin: Origin
) -> pa.Table:
    """Renames the mapped columns to our names, and puts the keys first.

    Other columns keep their names, unless a mapped column has the same one.
    """
    known = table.column_names
    # A key that is not mapped must be there under our own name.
    needed = {key: key for key in keys} | dict(config.columns)
    missing = {ours: theirs for ours, theirs in needed.items() if theirs not in known}
    if missing:
        raise ConfigError(_missing_columns(missing, known, config, name, keys, origin))
    # One source column may have two of our names, such as user_id and a feature.
    mapped = {ours: table[theirs] for ours, theirs in config.columns.items()}
    renamed = set(config.columns.values())
    others = {}
    for column in known:
        # A column that is mapped stands under our name alone; one whose name is taken is left out.
        if column not in renamed and column not in mapped:
            others[column] = table[column]
    merged = mapped | others
    for key in keys:
        if key not in merged:
            ours = next(ours for ours, theirs in config.columns.items() if theirs == key)
            raise ConfigError(
                f"{name}: config.data.{name}.columns makes the column {key!r} {ours!r}, and none "
                f"the {key}: name that too, {key}='ITS NAME IN THE FILE'."
            )
    # Keys first, for readers of a printed table.
    return pa.table({key: merged[key] for key in keys} | merged)


def _missing_columns(
    missing: Mapping[str, str],
    known: list[str],
    config: TableConfig,
    name: str,
    keys: tuple[str, ...],
    origin: Origin,
) -> str:
    """Returns the refusal of a table that lacks columns: our name -> name in the file."""
    ours, theirs = next(iter(missing.items()))
    # One is mostly misspelt; several are mostly a file of another shop.
    if len(missing) == 1:
        words = f"column {theirs!r}{similar_name_hint(theirs, known)}"
        cure = _missing_column_cure(ours, theirs, known, config, name, is_key=ours in keys)
    else:
        words = f"columns {', '.join(map(repr, missing.values()))}"
        right = {}
        for ours, theirs in missing.items():
            right[ours] = _similar_name(theirs, known) or "ITS NAME IN THE FILE"
        cure = f"say which they are by config.data.{name}.columns={ {**config.columns, **right}!r}"
    listed = ", ".join(known[:_MOST_NAMES])
    if len(known) > _MOST_NAMES:
        listed += f" and {len(known) - _MOST_NAMES:,} more"
    message = f"{name}: {origin.name} has no {words}; {cure}. It has: {listed}."
    # A file is one: tables of BigQuery and frames are not looked at by a command.
    if name == "interactions" and os.path.exists(config.path):
        message += f" `{command('inspect', config.path)}` writes a configuration that fits."
    return message


def _missing_column_cure(
    ours: str, theirs: str, known: list[str], config: TableConfig, name: str, *, is_key: bool
) -> str:
    """Returns the cure for a missing column: the option to write into the configuration."""
    field = f"config.data.{name}"
    separator = None
    # A single column whose name holds a separator is a file read with the wrong delimiter.
    if len(known) == 1:
        separator = re.search(SEPARATORS, known[0])
    if separator:
        return (
            f"its fields look separated by {separator[0]!r}: set {field}.delimiter={separator[0]!r}"
        )
    cure = f"{field}.columns[{ours!r}] names it"
    if ours == theirs:
        right = _similar_name(theirs, known) or "ITS NAME IN THE FILE"
        mapping = {**config.columns, ours: right}
        cure = f"say which it is by {field}.columns={mapping!r}"
    # A key cannot be left out, so that cure is not offered.
    if is_key:
        return cure
    without = {column: source for column, source in config.columns.items() if column != ours}
    cure = f"{cure}, or that there is none by {field}.columns={without!r}"
    if ours == "timestamp":
        # All at once: without times the split and the features would be refused one by one.
        cure += (
            ", with config.split.kind='leave_last_out' (each user's last rows, by the order of the "
            "file) or 'random', and without features that read the column 'timestamp'"
        )
    return cure
