"""Filters the rows of a log in a database, and counts them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.config import Config, DataConfig
from twotower.core.arrow import join_chunks, pc
from twotower.core.codes import codes_and_values, positions
from twotower.core.fields import check_fields
from twotower.core.times import DAY, EARLIEST, format_time
from twotower.data.dataset import Dropped
from twotower.data.filters import describe_absent_values, no_rows_left
from twotower.data.interactions import missing_times
from twotower.data.operators import matches
from twotower.data.report import HeldOut
from twotower.data.sources.load import groups_of_items, merge_groups
from twotower.data.split import TRAIN
from twotower.data.tables import time_cure, time_out_of_range
from twotower.pipeline.describe import SAMPLE
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.log import Log
from twotower.pipeline.engines.pairs import Pairs
from twotower.pipeline.labels import check_label_counts, check_label_values, read_labels

# Column of the code of each id.
_CODES = {"user_id": "u", "item_id": "i"}
# More than any position: time and position of a row in one number.
_POSITIONS = 2**44


def filter_log(database: Database, log: Log, config: DataConfig) -> Log:
    """Applies the filters of a configuration to the rows of a log.

    Args:
        database: Rows of the log.
        log: The log.
        config: Options of the data.

    Raises:
        ConfigError: No row is left, or the times of those that are cannot be right.
    """
    if config.item_group:
        log = _group_items(database, log, config.item_group)
    warnings = []
    for condition in config.where:
        name = condition[0]
        column = log.columns.get(name, _CODES.get(name))
        values = database.table(
            f"SELECT {column} AS value, min(position) AS first FROM log GROUP BY value "
            "ORDER BY first"
        )["value"]
        if name in _CODES:
            values = pa.chunked_array([log.ids[name].take(join_chunks(values))])
        # Distinct values in the order of their appearance say all that the rows would.
        warnings += describe_absent_values(pa.table({name: values}), [condition])
    dropped = []
    # One by one, since each says how many rows it took.
    for number, condition in enumerate(config.where):
        fails = f"failed = {number}"
        if condition[0] in _CODES:
            fails = _fail_by_id(database, log, condition, number)
        sql = f"DELETE FROM log WHERE {fails}"
        dropped.append(_drop(database, f"where {condition!r}", sql))
    if config.duplicates != "all":
        first = "min" if config.duplicates == "first" else "max"
        # Earliest and latest by time, and by the file among equals: one number to compare.
        moment = f"({log.time}::HUGEINT * {_POSITIONS} + position)"
        sql = (
            f"DELETE FROM log WHERE {moment} NOT IN "
            f"(SELECT {first}({moment}) FROM log GROUP BY u, i)"
        )
        # Before rows are compared: a time that is missing makes NOT IN keep every row.
        _check_times(database, log)
        dropped.append(_drop(database, f"duplicates={config.duplicates!r}", sql))
    if config.k_core:
        dropped.append(_drop_to_core(database, config.k_core))
    return check_filtered(database, log, config, dropped, warnings)


def _group_items(database: Database, log: Log, column: str) -> Log:
    """Returns the log with a column of the items as the item id.

    Raises:
        ConfigError: The items have no such column.
    """
    if column == "item_id":
        return log
    items = log.dataset.items
    groups = groups_of_items(items, column)
    codes, _ = database.columns(
        "SELECT i, min(position) AS first FROM log GROUP BY i ORDER BY first"
    )
    rows = positions(pa.chunked_array([log.ids["item_id"]]), items["item_id"])
    # In the order of their first rows, by which a log in memory gives groups their codes.
    codes_of_groups, ids = codes_and_values(groups.take(pa.array(rows[codes])))
    database.create("groups", pa.table({"i": codes, "code": codes_of_groups}))
    database.run(
        "CREATE TABLE grouped AS SELECT log.* REPLACE (groups.code AS i) FROM log "
        "JOIN groups ON log.i = groups.i; "
        "DROP TABLE log; ALTER TABLE grouped RENAME TO log; DROP TABLE groups"
    )
    dataset = dataclasses.replace(log.dataset, items=merge_groups(items, groups))
    return dataclasses.replace(log, dataset=dataset, ids={**log.ids, "item_id": ids})


def _fail_by_id(database: Database, log: Log, condition: tuple, number: int) -> str:
    """Returns the rows that fail a condition on ids, as SQL.

    Args:
        database: Rows of the log, which gets a table of the codes of these ids.
        log: The log.
        condition: Condition on "user_id" or "item_id".
        number: Its number among all conditions.
    """
    key = condition[0]
    ids = pa.table({key: log.ids[key]})
    is_kept = np.asarray(
        matches(ids, condition, field=f"config.data.where[{number}]={condition!r}")
    )
    codes = np.flatnonzero(~is_kept).astype(np.int32)
    database.create(f"failed_{number}", pa.table({"code": codes}))
    return f"{_CODES[key]} IN (FROM failed_{number})"


def check_filtered(
    database: Database,
    log: Log,
    config: DataConfig,
    dropped: Sequence[Dropped],
    warnings: Sequence[str],
) -> Log:
    """Checks the rows that filters have left, and notes what these have dropped.

    Args:
        database: Rows of the log.
        log: The log.
        config: Options of the data.
        dropped: Note of each filter.
        warnings: Sentences on their conditions.

    Raises:
        ConfigError: No row is left, or the times of those that are cannot be right.
    """
    dataset = log.dataset
    if not database.value("SELECT count(*) FROM log"):
        raise no_rows_left(dropped, warnings)
    if config.k_core:
        dataset = dataclasses.replace(
            dataset,
            users=_with_rows(database, "u", dataset.users, log.ids["user_id"]),
            items=_with_rows(database, "i", dataset.items, log.ids["item_id"]),
        )
    dataset = dataclasses.replace(
        dataset,
        dropped=(*dataset.dropped, *dropped),
        warnings=(*dataset.warnings, *warnings),
    )
    _check_times(database, log)
    _check_time_range(database, log, config.accept)
    return dataclasses.replace(log, dataset=dataset)


def _drop(database: Database, name: str, sql: str) -> Dropped:
    before = database.value("SELECT count(*) FROM log")
    database.run(sql)
    return Dropped(f"by {name}", before - database.value("SELECT count(*) FROM log"), before)


def _drop_to_core(database: Database, k: int) -> Dropped:
    """Drops users and items with fewer than k rows, until all have as many."""
    before = database.value("SELECT count(*) FROM log")
    count = before
    # Dropping a rare user may make an item rare: until nothing changes.
    while True:
        # Both sides at once: the core is the same in whatever order rows are dropped.
        rare = " OR ".join(
            f"{column} IN (SELECT {column} FROM log GROUP BY {column} HAVING count(*) < {k})"
            for column in ("u", "i")
        )
        database.run(f"DELETE FROM log WHERE {rare}")
        left = database.value("SELECT count(*) FROM log")
        if left == count:
            return Dropped(f"by k_core={k}", before - left, before)
        count = left


def _with_rows(database: Database, column: str, table: pa.Table, ids: pa.Array) -> pa.Table:
    """Restricts a table of users or items to those of the log."""
    (codes,) = database.columns(f"SELECT DISTINCT {column} FROM log")
    return table.filter(pc.is_in(table.columns[0], value_set=ids.take(pa.array(codes))))


def _check_times(database: Database, log: Log) -> None:
    """Refuses a log some of whose rows have a time, and others none."""
    if not log.has_times:
        return
    column = log.time
    missing = database.value(f"SELECT count(*) FROM log WHERE {column} IS NULL")
    if not missing:
        return
    total = database.value("SELECT count(*) FROM log")
    user, item = _example(database, log, f"{column} IS NULL")
    raise missing_times(missing, total, f"one of user {user!r} and item {item!r}")


def _example(database: Database, log: Log, condition: str) -> tuple[str, str]:
    """Returns user and item of the first row that satisfies a condition."""
    sql = f"SELECT u, i FROM log WHERE {condition} ORDER BY position LIMIT 1"
    user, item = (column[0] for column in database.columns(sql))
    return log.ids["user_id"][user].as_py(), log.ids["item_id"][item].as_py()


def _check_time_range(database: Database, log: Log, accept: Sequence[str]) -> None:
    """Refuses times before 1990 or after tomorrow, as a log in memory does."""
    if not log.has_times:
        return
    column = log.time
    now = time.time()
    bounds = {
        "old_times": f"{column} < {int(EARLIEST.timestamp())}",
        "future_times": f"{column} > {int(now) + DAY}",
    }
    total = database.value("SELECT count(*) FROM log")
    for finding, condition in bounds.items():
        count = database.value(f"SELECT count(*) FROM log WHERE {condition}")
        if not count or finding in accept:
            continue
        user, item = _example(database, log, condition)
        sql = f"SELECT {column} FROM log WHERE {condition} ORDER BY position LIMIT 1"
        seconds = database.value(sql)
        moment = format_time(seconds)
        example = f"{moment} (user_id={user!r}, item_id={item!r}, timestamp={seconds})"
        share = f"{count:,} of {total:,}"
        # Some of the times tell the unit that all of them have.
        times = database.table(f"SELECT {column} AS t FROM log ORDER BY position LIMIT {SAMPLE}")
        cure = time_cure(times["t"], log.dataset.contract.time, now)
        raise time_out_of_range(finding, share, example, accept, now=now, cure=cure)


def check_log_labels(database: Database, log: Log, columns: Mapping[str, str]) -> None:
    """Refuses labels that nothing can be learned from; see `twotower.pipeline.labels.check_labels`.

    Args:
        database: Rows of the log, divided.
        log: The log.
        columns: Columns that are labels, and the fields of the configuration that name them.

    Raises:
        ConfigError: A column does not exist, holds something else, or one label alone.
    """
    total = database.value("SELECT count(*) FROM log")
    for column, field in columns.items():
        table = f"{field}={column!r}: the interactions table"
        check_fields({column: field}, log.schema.names, table)
        names = ["u", "i", *log.columns.values()]
        sql = f"SELECT {', '.join(names)}, part FROM log ORDER BY position"
        first = 0
        rows_of_label = np.zeros(3, np.int64)
        for block in database.blocks(sql, total, f"labels {column}"):
            rows = log.rows(block.drop_columns(["part"]))
            check_label_values(rows, column, field, first)
            first += len(block)
            labels = read_labels(rows, {column: field})[column]
            labels = labels[block["part"].to_numpy() == TRAIN]
            # Missing ones come last.
            rows_of_label += np.bincount(np.nan_to_num(labels, nan=2).astype(int), minlength=3)
        check_label_counts(column, field, int(rows_of_label.sum()), rows_of_label[:2].tolist())


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Rows that are counted by part and code.

    Attributes:
        users: Rows of each user, int64 [3, users].
        items: Rows of each item, int64 [3, items].
        pairs: Their users and items.
    """

    users: np.ndarray
    items: np.ndarray
    pairs: Pairs

    def add(self, user: np.ndarray, item: np.ndarray, part: np.ndarray) -> None:
        """Counts rows, of which each argument has the codes or parts, int [N]."""
        np.add.at(self.users, (part, user), 1)
        np.add.at(self.items, (part, item), 1)
        self.pairs.add(user, item, part)


class SqlNumbers:
    """The counts of a log in a database; see `twotower.pipeline.describe.LogNumbers`.

    Args:
        database: Rows of the log, divided.
        log: The log.
        config: Configuration of the run.
        scratch: Folder for what lies on the disk meanwhile.
    """

    def __init__(self, database: Database, log: Log, config: Config, scratch: Path):
        self._database = database
        self._log = log
        self._config = config
        # With those that the audit has dropped since they were divided.
        self.num_rows = database.value("SELECT count(*) FROM log")
        self.columns: Sequence[str] = log.schema.names
        self._pairs = Pairs(scratch / "pairs", self.num_rows)
        # [3, users] and [3, items], by code.
        self.user_counts = np.zeros((3, len(log.ids["user_id"])), np.int64)
        self.item_counts = np.zeros((3, len(log.ids["item_id"])), np.int64)
        every = _Answers(self.user_counts, self.item_counts, self._pairs)
        # Of the rows that are answers: all, or those with label 1.
        self._answers = every
        label = config.objective.label
        if label:
            self._answers = _Answers(
                np.zeros_like(self.user_counts),
                np.zeros_like(self.item_counts),
                Pairs(scratch / "answers", self.num_rows),
            )
        # Added up here, since a database takes three times as long to group by codes.
        sql = f"SELECT u, i, part, {log.columns.get(label, 1)} AS label FROM log WHERE part >= 0"
        for block in database.blocks(sql, self.num_rows, "counting rows"):
            user, item, part = (column.to_numpy() for column in block.columns[:3])
            every.add(user, item, part)
            if label:
                rows = np.flatnonzero(read_labels(block, {"label": ""})["label"] == 1)
                self._answers.add(user[rows], item[rows], part[rows])
        self.part_rows: Sequence[int] = self.user_counts.sum(axis=1).tolist()
        self.num_users = int(np.count_nonzero(self.user_counts.sum(axis=0)))
        self.num_items = int(np.count_nonzero(self.item_counts.sum(axis=0)))
        # By code: the row in the table of users and in the corpus, -1 outside of it.
        self.user_rows = np.zeros(0, np.int32)
        self.item_rows = np.zeros(0, np.int32)

    def held_out(self, part: int) -> HeldOut | None:
        """See `LogNumbers`."""
        answers = self._answers
        of_items = answers.items[part]
        rows = int(of_items.sum())
        if not rows:
            return None
        outside = int(of_items[self.item_rows < 0].sum())
        # Where each row is a query, the share of answers in the corpus.
        recall = (rows - outside) / rows
        if self._config.evaluation.query == "user":
            recall = self._greatest_recall(part)
        return HeldOut(
            rows=rows,
            outside_corpus=outside,
            new_items=int(of_items[self.item_counts[0] == 0].sum()),
            new_users=int(answers.users[part][self.user_counts[0] == 0].sum()),
            greatest_recall=recall,
        )

    def _greatest_recall(self, part: int) -> float:
        """Returns the mean over users of the share of their items that the corpus has."""
        users, answers, found = self._answers.pairs.answers(part, self.item_rows >= 0).T
        # In the order of users: the last bits of a mean depend on it.
        order = np.argsort(self.user_rows[users])
        return float((found[order] / answers[order]).mean())

    def count_repeats(self) -> int:
        """See `LogNumbers`."""
        return sum(self.part_rows) - self._pairs.count()

    def time_range(self) -> tuple[int | None, int | None]:
        """See `LogNumbers`."""
        if not self._log.has_times:
            return None, None
        column = self._log.time
        first, last = self._database.columns(f"SELECT min({column}), max({column}) FROM log")
        return int(first[0]), int(last[0])

    def heaviest_share(self) -> float:
        """See `LogNumbers`."""
        # A row without a weight counts as one, in training too.
        weights = f"SELECT coalesce({self._log.columns['weight']}, 1)::DOUBLE AS w FROM log"
        count = max(self.num_rows // 100, 1)
        heaviest = self._database.value(
            f"SELECT sum(w) FROM (FROM ({weights}) ORDER BY w DESC LIMIT {count})"
        )
        return heaviest / max(self._database.value(f"SELECT sum(w) FROM ({weights})"), 1e-30)

    def first_kinds(self) -> list[str | None]:
        """See `LogNumbers`."""
        column = self._log.columns["event"]
        kinds = self._database.table(
            f"SELECT {column} AS kind, min(position) AS first FROM "
            f"(SELECT {column}, position FROM log ORDER BY position LIMIT {SAMPLE}) "
            "GROUP BY kind ORDER BY first"
        )
        return kinds["kind"].to_pylist()

    def count_kinds(self) -> dict[str | None, int]:
        """Returns the rows of each kind of event, in order of first appearance."""
        column = self._log.columns["event"]
        kinds = self._database.table(
            f"SELECT {column} AS kind, count(*) AS rows, min(position) AS first FROM log "
            "GROUP BY kind ORDER BY first"
        )
        return dict(zip(kinds["kind"].to_pylist(), kinds["rows"].to_pylist(), strict=True))
