"""Facts about a log, by which options are chosen for it."""

from __future__ import annotations

import dataclasses
from typing import Literal


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
    """

    name: str
    kind: Literal["text", "number", "flag", "time", "list", "vector"]
    num_values: int
    share_missing: float = 0.0
    mean_length: float = 1.0
    is_whole: bool = False
    separator: str = ""


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
        share_new_items: Share of the test rows whose item has no training row, from 0 to 1.
        share_new_users: Share of the test rows whose user has no training row, from 0 to 1.
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
    users: tuple[ColumnFacts, ...] = ()
    items: tuple[ColumnFacts, ...] = ()
    context: tuple[ColumnFacts, ...] = ()
