"""The report of the data of a run: ten lines at its start, and a JSON file in its folder.

`twotower.pipeline.describe` makes it of prepared data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from twotower.core.errors import FolderError
from twotower.core.fields import build
from twotower.core.files import atomic
from twotower.data.dataset import Dropped
from twotower.data.matching import Match

FILE = "report.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out rows of a part of a split, and what of them can be predicted.

    Only rows in which a user wanted an item count, where the objective has a label.

    Attributes:
        rows: Number of rows.
        outside_corpus: Number of rows whose item cannot be recommended, so that none finds it.
        new_items: Number of rows whose item no training row has, those outside of the corpus among
            them.
        new_users: Number of rows whose user no training row has.
        greatest_recall: Mean over the queries of the share of the right items that the corpus has,
            from 0 to 1: the recall of a perfect ranking without an end.
    """

    rows: int
    outside_corpus: int
    new_items: int
    new_users: int
    greatest_recall: float

    def share(self, rows: int) -> float:
        """Returns a number of rows as a share of all, from 0 to 1."""
        return rows / max(self.rows, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
    """Facts about the data of a run that a person should know before training.

    Attributes:
        warnings: Sentences to read first: what is odd, what it means, and what to do.
        rows: Number of rows of the log that are kept.
        users: Number of users that have rows.
        items: Number of items that have rows.
        corpus: Number of items that can be recommended.
        first_time: Earliest time of the rows, in seconds since the epoch; None without times.
        last_time: Latest time, likewise.
        dropped: Rows that were left out, in the order in which they were.
        matches: Ids of the tables of users and items beside those of the log.
        repeats: Number of rows whose user and item an earlier row has.
        split: Kind of the split.
        parts: Number of rows of each part of the split.
        held_out: Held-out rows by the name of their part.
        notes: Sentences on what columns of the log do.
    """

    warnings: tuple[str, ...]
    rows: int
    users: int
    items: int
    corpus: int
    first_time: int | None
    last_time: int | None
    dropped: tuple[Dropped, ...]
    matches: tuple[Match, ...]
    repeats: int
    split: str
    parts: Mapping[str, int]
    held_out: Mapping[str, HeldOut]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns the report without its warnings, a line for each fact."""
        times = "without times"
        if self.first_time is not None:
            times = f"{_moment(self.first_time)} to {_moment(self.last_time)} UTC"
        lines = [
            f"Data: {self.rows:,} rows of {self.users:,} users and {self.items:,} items, {times}."
        ]
        left_out = [_describe_dropped(dropped) for dropped in self.dropped if dropped.rows]
        if left_out:
            lines.append(f"Left out: {'; '.join(left_out)}.")
        share = format_share(self.repeats, self.rows)
        lines.append(f"Repeats: {self.repeats:,} rows ({share}) have user and item of another.")
        lines += [match.describe() for match in self.matches]
        parts = ", ".join(f"{count:,} {part}" for part, count in self.parts.items())
        lines.append(
            f"Split by {self.split}: {parts} rows; {self.corpus:,} items can be recommended."
        )
        lines += [_describe_held_out(part, rows) for part, rows in self.held_out.items()]
        return lines + list(self.notes)

    def save(self, folder: Path) -> None:
        """Writes the report into the data folder of a run, whole or not at all."""
        values = dataclasses.asdict(self)
        with atomic(folder / FILE) as temporary:
            text = json.dumps(values, indent=2, ensure_ascii=False)
            temporary.write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> DataReport | None:
        """Returns the report that `save` wrote; None where there is none.

        Raises:
            FolderError: The file is damaged.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return build(cls, values, str(path))
        except ValueError as error:
            raise FolderError(f"{path} is damaged ({error}). It may be deleted.") from None


def log_report(report: DataReport) -> None:
    """Writes a report to the log, its warnings first."""
    for warning in report.warnings:
        logging.warning("%s", warning)
    for line in report.lines():
        logging.info("%s", line)


def print_report(report: DataReport) -> None:
    """Prints a report, its warnings first."""
    warnings = [f"WARNING: {warning}" for warning in report.warnings]
    print("\n".join(warnings + report.lines()), flush=True)


def describe_unreachable(
    outside: int, rows: int, greatest_recall: float, *, part: str, has_item_table: bool
) -> str:
    """Returns a sentence on right answers that no ranking can find, with the cure.

    Args:
        outside: Number of right answers outside of the corpus.
        rows: Number of right answers.
        greatest_recall: Recall of a perfect ranking, from 0 to 1.
        part: Name of the part of the split.
        has_item_table: Whether items come from a table of their own.
    """
    cure = (
        "The corpus are the items of training rows. Give a table of all items "
        "(config.data.item_table.path) with columns that describe new ones, such as title, "
        "category and time of publication, or hold out a shorter time "
        f"(config.split.{part}=0.02, say)"
    )
    if has_item_table:
        cure = "Add these items to the item table"
    return (
        f"{format_share(outside, rows)} of the {rows:,} {part} answers ({outside:,}) are items "
        f"outside the corpus: no ranking can find them, so the greatest recall possible is "
        f"{greatest_recall:.4f}. {cure}."
    )


def format_share(count: int, total: int) -> str:
    """Returns a share in percent; one that is not 0 never reads 0.0%.

    >>> format_share(1, 8), format_share(1, 5_325), format_share(5_324, 5_325)
    ('12.5%', 'less than 0.1%', 'more than 99.9%')
    """
    share = count / max(total, 1)
    if 0 < share < 0.001:
        return "less than 0.1%"
    if 0.999 < share < 1:
        return "more than 99.9%"
    return f"{share:.1%}"


def _describe_dropped(dropped: Dropped) -> str:
    share = format_share(dropped.rows, dropped.total)
    words = f"{dropped.rows:,} of {dropped.total:,} rows ({share}) {dropped.reason}"
    if dropped.locations:
        words += f", such as {dropped.locations[0]}"
    return words


def _describe_held_out(part: str, rows: HeldOut) -> str:
    found = format_share(rows.rows - rows.outside_corpus, rows.rows)
    users = format_share(rows.new_users, rows.rows)
    items = format_share(rows.new_items, rows.rows)
    return (
        f"{part.capitalize()}: {found} of {rows.rows:,} answers can be found (greatest recall "
        f"{rows.greatest_recall:.4f}); {users} are of users and {items} of items new to training."
    )


def _moment(seconds: int | None) -> str:
    # Python's own dates end with the year 9999, which a log in another unit passes.
    moment = np.datetime64(seconds, "s").astype("datetime64[m]")
    return str(moment).replace("T", " ")
