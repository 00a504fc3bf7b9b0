"""Facts about a log, by which options are chosen for it."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import BadValue, is_list, pc, plain_text
from twotower.core.codes import count_distinct, distinct, positions
from twotower.core.times import TimeForm, find_time_forms
from twotower.data.contract import NumberForm
from twotower.data.dataset import Dataset
from twotower.data.interactions import Split
from twotower.data.nested import first_value

SAMPLE = 100_000  # rows by which a column is described
DAY = 24 * 3600  # seconds
# Separators that lists written as text may have. A comma is not one: sentences have commas.
SEPARATORS = ("|", ";")
# Numbers that are codes: a zero leads, or no int64 holds their digits.
_CODE = r"^\s*-?0\d|^\s*-?\d{19,}\s*$"
SEPARATED = 0.2  # share of the texts that have a separator, from which on they are lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnFacts:
    """Facts about a column of the users, of the items, or of the log.

    Attributes:
        name: Name of the column, by which a feature reads it.
        kind: Type of its values: text, number, flag (true or false), time, list (several texts, in
            a list column or in text with `separator`), or vector (a list of numbers).
        num_values: Number of distinct values; of the members of lists.
        share_missing: Share of the rows without a value, from 0 to 1.
        mean_length: Mean number of words of a text, or of members of a list or vector; else 1.
        is_whole: Whether all numbers are whole.
        separator: Separator of the members of a list that is stored as text, such as "|".
        is_readable: Whether a feature of times reads all of them: not texts of which a few are no
            times.
    """

    name: str
    kind: Literal["text", "number", "flag", "time", "list", "vector"]
    num_values: int
    share_missing: float = 0.0
    mean_length: float = 1.0
    is_whole: bool = False
    separator: str = ""
    is_readable: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogFacts:
    """Facts about a log, by which `twotower.recommended` chooses options.

    Attributes:
        num_rows: Number of rows.
        num_users: Number of users that have rows.
        num_items: Number of items that can be recommended.
        num_training_rows: Number of rows before the validation rows.
        has_times: Whether rows have times, and not all the same.
        span_days: Days from the first row to the last.
        share_new_items: Share of the validation rows whose item has no training row, from 0 to 1.
        share_new_users: Share of the validation rows whose user has no training row, from 0 to 1.
        newest_users: Number of users of the newest 32nd of the training rows; 0 without times.
        users: Columns of the users, without their id.
        items: Columns of the items, without their id.
        context: Further columns of the log, without the ids and the time.
    """

    num_rows: int
    num_users: int
    num_items: int
    num_training_rows: int
    has_times: bool
    span_days: float
    share_new_items: float
    share_new_users: float
    newest_users: int = 0
    users: tuple[ColumnFacts, ...] = ()
    items: tuple[ColumnFacts, ...] = ()
    context: tuple[ColumnFacts, ...] = ()


def column_facts(name: str, column: pa.ChunkedArray, *, now: float) -> ColumnFacts:
    """Returns the facts about a column, as a source has it or as text.

    Args:
        name: Name of the column.
        column: Values, of which a sample is looked at.
        now: Seconds since the epoch, for telling times from other numbers.
    """
    # Spread over the file and not its head: logs are ordered, and the oldest rows are unlike the
    # rest.
    rows = evenly_spaced(np.arange(len(column)), SAMPLE)
    values = column.take(pa.array(rows))
    values = plain_text(values)
    missing = values.null_count / max(len(values), 1)
    # Missing values are counted above, and would be one more value below.
    values = values.drop_null()
    # Before times: a list of numbers holds none.
    if is_list(values.type):
        return _list_facts(name, values, missing)
    if pa.types.is_floating(values.type):
        # Frames write a missing number so.
        is_number = pc.is_finite(values)
        missing += (1 - missing) * (1 - (pc.mean(is_number.cast(pa.float64())).as_py() or 0.0))
        values = values.filter(is_number)
    # Before numbers: seconds since 1970 look like any whole number.
    forms = find_time_forms(values, now=now)
    if forms:
        return ColumnFacts(
            name=name,
            kind="time",
            num_values=pc.count_distinct(values).as_py(),
            share_missing=missing,
            is_readable=_is_readable(forms[0], values),
        )
    if pa.types.is_string(values.type):
        text = _text_facts(name, values, missing)
        if text is not None:
            return text
        # Text files have no types, and a feature of numbers is chosen by what all values are.
        values = _infer_type(values)
    return _value_facts(name, values, missing)


def _value_facts(name: str, values: pa.ChunkedArray, missing: float) -> ColumnFacts:
    """Returns the facts about flags, numbers and texts; bytes and the like are of no use."""
    is_value = _is_number(values.type) or pa.types.is_boolean(values.type)
    # One value tells whoever chooses features that the column is worth none.
    if not is_value and not pa.types.is_string(values.type):
        return ColumnFacts(name=name, kind="text", num_values=1, share_missing=missing)
    num_values = pc.count_distinct(values).as_py()
    if pa.types.is_boolean(values.type):
        return ColumnFacts(name=name, kind="flag", num_values=num_values, share_missing=missing)
    if pa.types.is_string(values.type):
        return ColumnFacts(
            name=name,
            kind="text",
            num_values=num_values,
            share_missing=missing,
            mean_length=_mean_words(values),
        )
    numbers = values.cast(pa.float64())
    # By value and not by type: a frame turns whole numbers with gaps into float64.
    is_whole = bool(pc.all(pc.equal(pc.floor(numbers), numbers)).as_py())
    return ColumnFacts(
        name=name,
        kind="number",
        num_values=num_values,
        share_missing=missing,
        is_whole=is_whole,
    )


def log_facts(
    dataset: Dataset, parts: Split, *, users: pa.Table, items: pa.Table, log: pa.Table, now: float
) -> LogFacts:
    """Returns the facts about a log.

    Args:
        dataset: The log under our names and types.
        parts: Its division.
        users: Columns of the users to describe, as their source has them.
        items: Columns of the items, likewise.
        log: Further columns of the log, likewise.
        now: Seconds since the epoch, for telling times from other numbers.
    """
    rows = dataset.interactions
    span = 0.0
    has_times = "timestamp" in rows.column_names
    if has_times:
        first_and_last = pc.min_max(rows["timestamp"]).as_py()
        span = (first_and_last["max"] - first_and_last["min"]) / DAY
    num_items = count_distinct(rows["item_id"])
    # All of a catalogue can be recommended, those without a row included.
    if dataset.has_catalogue:
        num_items = len(dataset.items)
    return LogFacts(
        num_rows=len(rows),
        num_users=count_distinct(rows["user_id"]),
        num_items=num_items,
        num_training_rows=len(parts.train),
        # One time for all rows gives no order.
        has_times=has_times and span > 0,
        span_days=span,
        share_new_items=_share_new(parts, "item_id"),
        share_new_users=_share_new(parts, "user_id"),
        newest_users=_newest_users(parts.train),
        users=_facts_of(users, now),
        items=_facts_of(items, now),
        context=_facts_of(log, now),
    )


def _facts_of(table: pa.Table, now: float) -> tuple[ColumnFacts, ...]:
    facts = []
    for name in table.column_names:
        facts.append(column_facts(name, table[name], now=now))
    return tuple(facts)


def _is_readable(form: TimeForm, values: pa.ChunkedArray) -> bool:
    """Returns whether a feature of times can read all values of a column."""
    try:
        form.column(values)
    except BadValue:
        return False
    return True


def _share_new(parts: Split, key: str) -> float:
    """Returns the share of the validation rows whose id no training row has, from 0 to 1."""
    held_out = parts.validation
    if not len(held_out):
        return 0.0
    # Not of the test rows: options that are chosen by them would flatter the figures.
    is_new = positions(held_out[key], distinct(parts.train[key])) < 0
    return float(is_new.mean())


def _newest_users(train: pa.Table) -> int:
    """Returns the number of users of the newest 32nd of the rows; 0 without times."""
    if "timestamp" not in train.column_names:
        return 0
    order = pc.sort_indices(train["timestamp"])
    # A 32nd of the rows stands for what a service sees between two trainings.
    newest = order[len(train) - max(len(train) // 32, 1) :]
    return count_distinct(train["user_id"].take(newest))


def _is_number(kind: pa.DataType) -> bool:
    is_real = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return is_real or pa.types.is_integer(kind)


def _infer_type(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns text as numbers or booleans if all values are, but for codes: 007 is one."""
    # One such value is enough: as numbers 007 and 7 would be one.
    if pc.any(pc.match_substring_regex(texts, _CODE)).as_py():
        return texts
    try:
        return NumberForm().column(texts)
    except BadValue:
        pass
    try:
        return texts.cast(pa.bool_())
    except pa.ArrowInvalid:
        return texts


def _list_facts(name: str, values: pa.ChunkedArray, missing: float) -> ColumnFacts:
    members = pc.list_flatten(values)
    lengths = pc.list_value_length(values)
    kind = "vector" if _is_number(members.type) else "list"
    return ColumnFacts(
        name=name,
        kind=kind,
        num_values=pc.count_distinct(members).as_py(),
        share_missing=missing,
        mean_length=pc.mean(lengths).as_py() or 0.0,
    )


def _text_facts(name: str, texts: pa.ChunkedArray, missing: float) -> ColumnFacts | None:
    """Returns the facts about lists and vectors that are written as text; None of other text."""
    # The first value decides how the column is read; others that differ make it plain text.
    first = first_value(texts) or ""
    if first.startswith("["):
        return _json_facts(name, texts, missing)
    for separator in SEPARATORS:
        has_it = pc.match_substring(texts, separator)
        # A title with a semicolon is no list of two.
        if (pc.mean(has_it.cast(pa.float64())).as_py() or 0.0) < SEPARATED:
            continue
        members = pc.split_pattern(texts, separator)
        facts = _list_facts(name, members, missing)
        # The members of lists come again and again; the halves of titles do not.
        if facts.num_values <= len(pc.list_flatten(members)) / 2:
            return dataclasses.replace(facts, separator=separator)
    return None


def _json_facts(name: str, texts: pa.ChunkedArray, missing: float) -> ColumnFacts | None:
    try:
        # Arrow refuses lists of mixed members, which are then text.
        lists = [json.loads(text) for text in texts.to_pylist()]
        return _list_facts(name, pa.chunked_array([pa.array(lists)]), missing)
    except (ValueError, pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None


def _mean_words(texts: pa.ChunkedArray) -> float:
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
    return pc.mean(pc.list_value_length(words)).as_py() or 0.0
