"""Divides the rows of a log in a database into parts, and audits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrow import join_chunks
from twotower.core.errors import choose
from twotower.data.audit import (
    FINDINGS,
    Finding,
    check_findings,
    drop_repeats,
    identical_rows,
    is_of_training_time,
    repeated_pairs,
    rows_drawn,
    rows_of_future,
    rows_out_of_order,
)
from twotower.data.contract import KEYS
from twotower.data.interactions import PARTS, Split, describe
from twotower.data.split import (
    HELD,
    TEST,
    TRAIN,
    VALIDATION,
    check_parts,
    held_out_counts,
    is_enough,
    no_part,
    parts_by_later_rows,
    split_at_random,
    undivided,
    validation_twice,
    without_split_column,
)
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.log import Log

# Kinds of split that rows in a database have.
KINDS = ("time", "leave_last_out", "random", "fixed", "none")
# Those whose part is computed from a row alone.
_COMPUTED = ("time", "fixed", "none")
# Part of the rows that the audit drops.
_NO_PART = -1
# Ranges of time, as a power of two, that rows are counted by to find the moment at which a share of
# them begins.
_RANGE_BITS = 16


def split_log(database: Database, log: Log, config: SplitConfig) -> Log:
    """Gives the rows of a log the column `part`, the number of their part.

    Args:
        database: Rows of the log.
        log: The log.
        config: Kind of the split, one of `KINDS`.

    Returns:
        The log, with a note on the rows that the audit has dropped: they have no part.

    Raises:
        ConfigError: A part that has a share would be empty, or train too small.
        LeakageError: The split leaks.
    """
    is_apart = config.validation_by != "kind" and config.validation > 0
    # Without validation rows of its own, so that all that is not the test is training at first.
    first = dataclasses.replace(config, validation=0.0) if is_apart else config
    _divide(database, log, first)
    if is_apart:
        if part_sizes(database)[VALIDATION]:
            raise validation_twice(config)
        _take_validation(database, log, config)
    return _check_parts(database, log, config)


def check_split(database: Database, log: Log, config: SplitConfig) -> Log:
    """Refuses parts that are too small, and audits the rows of a log that has been divided.

    Args:
        database: Rows of the log, with the column `part`.
        log: The log.
        config: Kind of the split.

    Returns:
        The log, with a note on the rows that the audit has dropped: they have no part.

    Raises:
        ConfigError: A part that has a share is empty, or train too small.
        LeakageError: The split leaks.
    """
    if config.kind == "time":
        _check_times(database, log, config)
    return _check_parts(database, log, config)


def _check_parts(database: Database, log: Log, config: SplitConfig) -> Log:
    sizes = part_sizes(database)
    check_parts(sizes, config)
    return _audited(database, log, config, sizes)


def _divide(database: Database, log: Log, config: SplitConfig) -> None:
    """Gives the rows of a log their part by the kind of the split.

    Raises:
        ConfigError: Times leave too few training rows.
    """
    if config.kind == "leave_last_out":
        _hold_out(database, *_last_rows(database, log, config))
        return
    if config.kind == "random":
        _hold_out(database, *_drawn_rows(database, config))
        return
    part = str(TRAIN)
    if config.kind == "time":
        part = _part_by_time(database, log.time, config)
    if config.kind == "fixed":
        part = _part_by_column(database, log)
    # The part is computed whenever it is read: no row is written again for it.
    database.run(
        "ALTER TABLE log RENAME TO undivided; "
        f"CREATE VIEW log AS SELECT *, ({part})::TINYINT AS part FROM undivided"
    )
    if config.kind == "time":
        _check_times(database, log, config)
    if config.kind == "fixed" and not part_sizes(database)[VALIDATION]:
        _hold_training_rows(database, log, config)


def _part_by_column(database: Database, log: Log) -> str:
    """Returns the number of the part of a row as SQL; see `twotower.data.split.split_by_column`.

    Raises:
        ConfigError: There is no such column, or it names no part.
    """
    if "split" not in log.columns:
        raise without_split_column()
    text = f"CAST({log.columns['split']} AS VARCHAR)"
    names = ", ".join(f"'{name}'" for name in PARTS)
    position = database.value(
        f"SELECT min(position) FROM log WHERE ({text} IN ({names})) IS NOT TRUE"
    )
    if position is not None:
        wrong = f"position = {position}"
        row = database.value(f"SELECT count(*) FROM log WHERE position < {position}")
        value = database.value(f"SELECT {text} FROM log WHERE {wrong}")
        example = _rows(database, log, wrong, "position")
        raise no_part(row, describe(example, 0), value)
    cases = " ".join(f"WHEN '{name}' THEN {part}" for part, name in enumerate(PARTS))
    return f"CASE {text} {cases} END"


def _hold_training_rows(database: Database, log: Log, config: SplitConfig) -> None:
    """Makes a share of the training rows validation rows, in the way of `config.held`."""
    choose(HELD, config.held, "config.split.held")
    training = f"part = {TRAIN}"
    total = part_sizes(database)[TRAIN]
    chosen = []
    if config.held == "random":
        order = np.random.default_rng(config.seed).permutation(total)
        is_chosen = np.zeros(total, bool)
        is_chosen[order[: round(total * config.validation)]] = True
        first = 0
        sql = f"SELECT position FROM log WHERE {training} ORDER BY position"
        for block in database.blocks(sql, total, "drawing"):
            chosen.append(block["position"].to_numpy()[is_chosen[first : first + len(block)]])
            first += len(block)
    else:
        by_file = dataclasses.replace(config, ties="file")
        for position, later, rows_of_user in _rows_from_the_end(database, log, by_file, training):
            chosen.append(position[later < np.round(rows_of_user * config.validation)])
    positions = np.concatenate([np.zeros(0, np.int64), *chosen])
    if len(positions):
        database.create("chosen", pa.table({"position": positions}))
        _make_validation(database, "position IN (FROM chosen)", "VIEW")


def _check_times(database: Database, log: Log, config: SplitConfig) -> None:
    """Refuses times that leave too few training rows."""
    sizes = part_sizes(database)
    total = sum(sizes)
    # Before parts without rows are told: rows of one second are the cause of both.
    if is_enough(sizes[TRAIN] / total, config):
        return
    column = log.time
    (times, counts) = database.columns(
        f"SELECT {column} AS t, count(*) AS n FROM log GROUP BY t ORDER BY n DESC, t LIMIT 1"
    )
    cure = "use --engine=memory, which names a kind of split that suits them"
    raise undivided(config, total, int(counts[0]), int(times[0]), cure)


def _take_validation(database: Database, log: Log, config: SplitConfig) -> None:
    """Makes some training rows validation rows; see `twotower.data.split.VALIDATION_BY`."""
    training = f"part = {TRAIN}"
    total = part_sizes(database)[TRAIN]
    share = config.validation
    if config.validation_by == "time":
        column = log.time
        # At least one: a share above 0 asks for some.
        (begin,) = _begins_of_last(database, column, [max(1, round(total * share))], training)
        chosen = f"{column} >= {begin}"
    elif config.validation_by == "user":
        (users,) = database.columns(f"SELECT DISTINCT u FROM log WHERE {training} ORDER BY u")
        count = max(1, round(len(users) * share))
        drawn = np.random.default_rng(config.seed).permutation(users)[:count]
        database.create("chosen", pa.table({"u": drawn}))
        chosen = "u IN (FROM chosen)"
    else:
        positions = []
        for position, later, rows_of_user in _rows_from_the_end(database, log, config, training):
            is_last = (later < config.held_out) & (rows_of_user > 2 * config.held_out)
            positions.append(position[is_last])
        database.create("chosen", pa.table({"position": np.concatenate(positions)}))
        chosen = "position IN (FROM chosen)"
    kind = "VIEW" if config.kind in _COMPUTED else "TABLE"
    _make_validation(database, f"{training} AND {chosen}", kind)


def _make_validation(database: Database, condition: str, kind: str) -> None:
    """Gives the rows that satisfy a condition to validation.

    Args:
        database: Rows of the log, with their parts.
        condition: Condition as SQL, which may read the table `chosen`.
        kind: Whether the log is a TABLE or a VIEW, whose parts are computed; it is a table then.
    """
    database.run(
        "CREATE TABLE divided AS SELECT * REPLACE ("
        f"(CASE WHEN {condition} THEN {VALIDATION} ELSE part END)::TINYINT AS part) "
        f"FROM log; DROP {kind} log; ALTER TABLE divided RENAME TO log; "
        "DROP TABLE IF EXISTS chosen; DROP TABLE IF EXISTS undivided"
    )


def _hold_out(database: Database, position: np.ndarray, part: np.ndarray) -> None:
    """Gives rows at some positions of the source their part, and the others to training."""
    database.create("held", pa.table({"position": position, "part": part}))
    database.run(
        f"CREATE TABLE divided AS SELECT log.*, coalesce(held.part, {TRAIN})::TINYINT AS part "
        "FROM log LEFT JOIN held ON log.position = held.position; "
        "DROP TABLE log; ALTER TABLE divided RENAME TO log; DROP TABLE held"
    )


def _last_rows(database: Database, log: Log, config: SplitConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns position and part of the last rows of each user."""
    positions = []
    parts = []
    for position, later, rows_of_user in _rows_from_the_end(database, log, config, "true"):
        part = parts_by_later_rows(later, rows_of_user, config)
        positions.append(position[part != TRAIN])
        parts.append(part[part != TRAIN])
    return np.concatenate(positions), np.concatenate(parts)


def _rows_from_the_end(
    database: Database, log: Log, config: SplitConfig, condition: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields blocks of rows: the position of each, the rows of its user that are later, and all
    rows of its user; of moments in the place of rows where ties stay together.

    Args:
        database: Rows of the log.
        log: The log.
        config: Meaning of ties.
        condition: Rows that are counted, as SQL.
    """
    rows = f"(SELECT u, {log.time} AS t, position FROM log WHERE {condition})"
    is_together = config.ties == "together"
    counted = f"(SELECT DISTINCT u, t FROM {rows})" if is_together else rows
    users, counts = database.columns(f"SELECT u, count(*) FROM {counted} GROUP BY u")
    count_of_user = np.zeros(len(log.ids["user_id"]), np.int64)
    count_of_user[users] = counts
    ends = np.cumsum(count_of_user)
    total = database.value(f"SELECT count(*) FROM {rows}")
    order = f"SELECT u, t, position FROM {rows} ORDER BY u, t, position"
    # Without times there are no ties.
    if config.ties == "drawn" and log.has_times:
        _draw(database, config, rows, total)
        order = f"SELECT u, t, position FROM {rows} JOIN draws USING (position) ORDER BY u, t, draw"
    last = (-1, 0)
    first = 0
    for block in database.blocks(order, total, "last rows of users"):
        user, time, position = (column.to_numpy() for column in block.columns)
        number = np.arange(first, first + len(user))
        if is_together:
            is_same = np.append(last[0], user[:-1]) == user
            is_same &= np.append(last[1], time[:-1]) == time
            number = first - 1 + np.cumsum(~is_same)
            last = (int(user[-1]), int(time[-1]))
        # By user and time, the number of a row says how many the user has after it.
        yield position, ends[user] - 1 - number, count_of_user[user]
        first = int(number[-1]) + 1
    database.run("DROP TABLE IF EXISTS draws")


def _draw(database: Database, config: SplitConfig, rows: str, total: int) -> None:
    """Makes the table `draws` of a number for each row, as a log in memory draws it."""
    # As many numbers as rows, of which the draw itself is one more.
    (positions,) = database.columns(f"SELECT position FROM {rows} ORDER BY position")
    draws = np.random.default_rng(config.seed).permutation(total)
    database.create("draws", pa.table({"position": positions, "draw": draws}))


def _drawn_rows(database: Database, config: SplitConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns position and part of the rows that are drawn to be held out."""
    total = database.value("SELECT count(*) FROM log")
    # By their number alone, as a log in memory is divided.
    part = split_at_random(pa.table({"row": pa.nulls(total)}), config)
    positions = []
    first = 0
    for block in database.blocks("SELECT position FROM log ORDER BY position", total, "drawing"):
        is_held_out = part[first : first + len(block)] != TRAIN
        positions.append(block["position"].to_numpy()[is_held_out])
        first += len(block)
    return np.concatenate(positions), part[part != TRAIN]


def _audited(database: Database, log: Log, config: SplitConfig, sizes: Sequence[int]) -> Log:
    """Looks for what the audit of a log in memory looks for; see `twotower.data.audit`."""
    for name in config.accept_leakage:
        choose(FINDINGS, name, "config.split.accept_leakage")
    # Cut at a moment, parts differ in their times.
    if config.kind == "time" or not sum(sizes[VALIDATION:]):
        return log
    held_out = _rows(database, log, f"part > {TRAIN}")
    parts = held_out.column("part").to_numpy()
    position = held_out.column("position").to_numpy()
    # Validation and then test, as the findings number held-out rows.
    order = np.argsort(parts, kind="stable")
    tables = [held_out.filter(pa.array(parts == part)) for part in (VALIDATION, TEST)]
    # Training rows that repeat none of them are no finding.
    pairs = f"SELECT u, i FROM log WHERE part > {TRAIN}"
    train = _rows(database, log, f"part = {TRAIN} AND (u, i) IN ({pairs})")
    split = Split(train, *tables)
    found = [
        _random_split(database, log, config, tables),
        _future_rows(database, log, config, tables),
        repeated_pairs(split, config),
        identical_rows(split, config),
        _rows_out_of_order(database, log, config, tables),
    ]
    findings = [finding for finding in found if finding is not None]
    check_findings(findings, config)
    _, dropped = drop_repeats(split, findings, config)
    if not dropped:
        return log
    is_dropped = np.zeros(len(order), bool)
    for finding in findings:
        if finding.repeated is not None and finding.name not in config.accept_leakage:
            is_dropped |= finding.repeated
    database.create("gone", pa.table({"position": position[order[is_dropped]]}))
    # Not deleted: positions in the file count all rows, as in memory.
    database.run(f"UPDATE log SET part = {_NO_PART} WHERE position IN (FROM gone); DROP TABLE gone")
    dataset = log.dataset
    dataset = dataclasses.replace(dataset, dropped=(*dataset.dropped, *dropped))
    return dataclasses.replace(log, dataset=dataset)


def _rows(
    database: Database, log: Log, condition: str, columns: str = "part, position"
) -> pa.Table:
    """Returns ids, time and some columns of some rows, in the order of the source."""
    time = f"{log.time} AS timestamp, " if log.has_times else ""
    rows = database.table(
        f"SELECT u, i, {time}{columns} FROM log WHERE {condition} ORDER BY position"
    )
    for column, key in zip(("u", "i"), KEYS, strict=True):
        codes = join_chunks(rows[column].cast(pa.int32()))
        ids = pa.DictionaryArray.from_arrays(codes, log.ids[key])
        rows = rows.set_column(rows.column_names.index(column), key, ids)
    return rows


def _random_split(
    database: Database, log: Log, config: SplitConfig, held_out: list[pa.Table]
) -> Finding | None:
    """Finds rows that were drawn from a log which has an order."""
    last = [rows for rows in held_out if len(rows)][-1:]
    if config.kind != "random" or not last or not _has_order(database, log, config):
        return None
    return rows_drawn(sum(map(len, held_out)), describe(last[0], 0))


def _future_rows(
    database: Database, log: Log, config: SplitConfig, held_out: list[pa.Table]
) -> Finding | None:
    """Finds training rows of other users that are later than a held-out row."""
    last = [rows for rows in held_out if len(rows)][-1:]
    if config.kind != "leave_last_out" or not last or not _has_order(database, log, config):
        return None
    earliest = int(last[0]["timestamp"].to_numpy().min())
    later = f"part = {TRAIN} AND {log.time} > {earliest}"
    count = database.value(f"SELECT count(*) FROM log WHERE {later}")
    if not count:
        return None
    first = database.value(f"SELECT min(position) FROM log WHERE {later}")
    example = describe(_rows(database, log, f"position = {first}"), 0)
    return rows_of_future(count, part_sizes(database)[TRAIN], earliest, example)


def _rows_out_of_order(
    database: Database, log: Log, config: SplitConfig, held_out: list[pa.Table]
) -> Finding | None:
    """Finds held-out rows of a column that are not after every row of the part before."""
    if config.kind != "fixed" or not log.has_times:
        return None
    before = VALIDATION if is_of_training_time(config) else TRAIN
    parts = [rows for rows in held_out[before:] if len(rows)]
    latest = database.value(f"SELECT max({log.time}) FROM log WHERE part BETWEEN 0 AND {before}")
    return rows_out_of_order(int(latest), parts)


def _has_order(database: Database, log: Log, config: SplitConfig) -> bool:
    """Returns whether the log could be divided by time in the same shares."""
    if not log.has_times:
        return False
    if config.validation + config.test >= 1:
        return True
    part = _part_by_time(database, log.time, config)
    # Not a whole number: DuckDB divides those as floats.
    share = database.value(f"SELECT count(*) FILTER ({part} = {TRAIN}) / count(*) FROM log")
    return is_enough(share, config)


def part_sizes(database: Database) -> list[int]:
    """Returns the number of rows of each part."""
    numbers, counts = database.columns(
        "SELECT part, count(*) FROM log WHERE part >= 0 GROUP BY part"
    )
    sizes = [0, 0, 0]
    for number, count in zip(numbers, counts, strict=True):
        sizes[number] = int(count)
    return sizes


def _part_by_time(database: Database, column: str, config: SplitConfig) -> str:
    """Returns the number of the part of a row as SQL; see `twotower.data.split.split_by_time`."""
    total = database.value("SELECT count(*) FROM log")
    held_out, test = held_out_counts(total, config)
    # The first that fits is taken: test rows are after those of validation.
    parts = [(count, part) for count, part in ((test, TEST), (held_out, VALIDATION)) if count]
    if not parts:
        return str(TRAIN)
    begins = _begins_of_last(database, column, [count for count, _ in parts])
    cases = ""
    for begin, (_, part) in zip(begins, parts, strict=True):
        cases += f"WHEN {column} >= {begin} THEN {part} "
    return f"CASE {cases} ELSE {TRAIN} END"


def _begins_of_last(
    database: Database, column: str, counts: Sequence[int], condition: str = "true"
) -> list[int]:
    """Returns for each of some counts the time of the row that is so many from the end.

    Rows are counted by ranges of time first and then by the times of one range: neither is as many
    as the rows are.

    Args:
        database: Rows of the log.
        column: Column of the times.
        counts: Numbers of rows.
        condition: Rows that are counted, as SQL.
    """
    source = f"FROM log WHERE {condition}"
    total, low, high = (
        int(value[0])
        for value in database.columns(f"SELECT count(*), min({column}), max({column}) {source}")
    )
    # A power of two, since to divide by it is to shift.
    bits = max((high - low).bit_length() - _RANGE_BITS, 0)
    rows_of_range = np.zeros(2**_RANGE_BITS, np.int64)
    for block in database.blocks(f"SELECT {column} {source}", total, "counting times"):
        # Wider than any true log is: accepted times may lie 2^64 seconds apart, which wrap around.
        since = block.column(0).to_numpy().view(np.uint64) - np.uint64(low % 2**64)
        rows_of_range += np.bincount(
            (since >> np.uint64(bits)).view(np.int64), minlength=2**_RANGE_BITS
        )
    # From the last range on.
    running = np.cumsum(rows_of_range[::-1])
    begins = []
    for count in counts:
        bucket = int(np.searchsorted(running, count))
        number = 2**_RANGE_BITS - 1 - bucket
        before = int(running[bucket] - rows_of_range[number])
        first = low + (number << bits)
        last = min(low + ((number + 1) << bits) - 1, high)
        times, rows = database.columns(
            f"SELECT {column} AS t, count(*) {source} AND {column} BETWEEN {first} AND {last} "
            "GROUP BY t ORDER BY t DESC"
        )
        begins.append(int(times[np.searchsorted(np.cumsum(rows), count - before)]))
    return begins
