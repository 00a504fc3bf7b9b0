"""From tables of any kind to a run that can be trained: columns, split, options, kept rows.

`twotower.api.fit` trains it. Each step says in a line what it took.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from twotower.config import Config, DataConfig, SplitConfig, TableConfig, defaults, from_dict
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.times import DAY, EARLIEST, in_range
from twotower.data import guess
from twotower.data.audit import audit, drop_repeats
from twotower.data.contract import Contract
from twotower.data.dataset import Dataset, assemble
from twotower.data.facts import LogFacts, log_facts
from twotower.data.filters import filter_rows
from twotower.data.interactions import Split, pair_codes, timestamps
from twotower.data.matching import check_matches
from twotower.data.sources import kept
from twotower.data.sources.frames import TableLike, read_table
from twotower.data.split import kinds_without_order, split
from twotower.data.tables import apply_contract
from twotower.experiment import change, read
from twotower.pipeline.describe import check_log
from twotower.pipeline.log_items import items_of_rows
from twotower.recommended import recommended_config
from twotower.training.run import claim, holds_run, local_folder

LOG_KEYS = ("user_id", "item_id")
MIN_ROWS = 20  # rows below which there is nothing to hold out and nothing to learn
# Rows to validate with and to report on. A larger share makes the figures hardly more certain.
VALIDATION_ROWS = 5_000
TEST_ROWS = 10_000
MOST_HELD_OUT = 0.1  # share of the rows for each part
LEAST_HELD_OUT = 0.02

Options = Mapping[str, Any] | Config | str | Path | None


@dataclasses.dataclass(frozen=True)
class Log:
    """A log that was read, and the options that suit it.

    Attributes:
        tables: Tables by their names in `config.data`, with our names and types of columns.
        split: Options of `config.split`.
        data: Further options of `config.data`.
        facts: Facts by which the other options are recommended.
        said: Lines that tell what was taken.
        configs: Options by which each table was read, by the same names, without their paths.
        where: Conditions of `config.data.where` that leave out the rows that were left out here.
    """

    tables: dict[str, pa.Table]
    split: dict[str, Any]
    data: dict[str, Any]
    facts: LogFacts
    said: list[str]
    configs: dict[str, TableConfig] = dataclasses.field(default_factory=dict)
    where: tuple[tuple, ...] = ()


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that the caller names; empty ones, and a time of None, are guessed.

    Attributes:
        user: Column of the user's id.
        item: Column of the item's id.
        time: Column of the time; empty for none.
    """

    user: str = ""
    item: str = ""
    time: str | None = None

    def or_ours(self, names: Sequence[str]) -> Columns:
        """Returns these columns, and of those that are not named the ones under our own names.

        A few further rows of a log show too little to be guessed by.

        Args:
            names: Columns of the table.
        """
        ours = [name if name in names else "" for name in ("user_id", "item_id", "timestamp")]
        user, item, time = ours
        if self.time is not None:
            time = self.time
        return Columns(self.user or user, self.item or item, time or self.time)


def read_log(
    interactions: TableLike,
    *,
    items: TableLike | None,
    users: TableLike | None,
    columns: Columns,
    config: Options,
) -> Log:
    """Reads the tables, finds their columns, and chooses a split that they allow.

    Args:
        interactions: The log.
        items: Table of the items, which is then the corpus; None for the items of the log.
        users: Table of the users' attributes.
        columns: Columns that the caller names.
        config: Options of the caller, of which those of the data are used here.

    Raises:
        ConfigError: A table or column cannot be used, or the log is too small.
    """
    # What is recommended depends on the log, which is not read yet; how it is read only on the
    # caller.
    data = _whole_config(config, {}).data
    said: list[str] = []
    describes_items = _is_same(items, interactions)
    # The log describes its items by what each row says of them, which is only known after the
    # split.
    if describes_items:
        items = None
    read = read_tables(
        interactions, items=items, users=users, columns=columns, data=data, said=said
    )
    tables = read.typed
    _check_rows(tables["interactions"], len(read.raw["log"]), said)
    dataset = assemble(tables["interactions"], tables.get("user_table"), tables.get("item_table"))
    # Before the split: tables whose ids hardly meet are a mistake that no split cures.
    check_matches(dataset.matches, data.accept)
    check_log(dataset.interactions, data.accept)
    if _gives_split(config):
        chosen = _given_split(dataset, _whole_config(config, {}), said)
    else:
        chosen = _choose_split(dataset, data, said)
    tables["interactions"] = chosen.rows
    raw_items = read.raw["item"]
    configs = dict(read.configs)
    if describes_items:
        key = configs["interactions"].columns["item_id"]
        configs["item_table"] = TableConfig(columns={"item_id": key})
        # From the training rows alone: what later rows say of an item would tell the future.
        tables["item_table"] = _items_of_log(chosen.parts.train, read.others, said)
        raw_items = tables["item_table"].drop_columns(["item_id"])
    facts = log_facts(
        dataclasses.replace(dataset, interactions=chosen.rows),
        chosen.parts,
        users=read.raw["user"],
        items=raw_items,
        log=read.raw["log"].select(read.others),
        now=clock.time(),
    )
    return Log(tables, chosen.split, chosen.data, facts, said, configs=configs, where=read.where)


def _is_same(items: TableLike | None, interactions: TableLike) -> bool:
    """Returns whether the table of items is the log itself."""
    if isinstance(items, (str, os.PathLike)) and isinstance(interactions, (str, os.PathLike)):
        return os.fspath(items) == os.fspath(interactions)
    return items is interactions


def _items_of_log(train: pa.Table, columns: list[str], said: list[str]) -> pa.Table:
    """Returns items as the training rows describe them; columns that differ within items are
    said."""
    items, varying = items_of_rows(train.select(["item_id", *columns]), timestamps(train))
    named = ", ".join(items.column_names[1:]) or "none"
    said.append(f"items: {len(items):,} of the training rows; further columns: {named}.")
    left_out = [f"{name!r}" for name in varying if name not in items.column_names]
    if left_out:
        said.append(f"  Left out, as they differ within items: {', '.join(left_out)}.")
    return items


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables as they were given, and as they are used.

    Attributes:
        typed: Tables by their names in `config.data`, with our names and types of columns.
        raw: The same under the caller's names: "log", and "user" and "item" without their key.
        others: Columns of the raw log that are neither an id nor the time.
        configs: Options by which they were read, by their names in `config.data`.
        where: Conditions that leave out the rows that were left out here.
    """

    typed: dict[str, pa.Table]
    raw: dict[str, pa.Table]
    others: list[str]
    configs: dict[str, TableConfig]
    where: tuple[tuple, ...]


def read_tables(
    interactions: TableLike,
    *,
    items: TableLike | None,
    users: TableLike | None,
    columns: Columns,
    data: DataConfig,
    said: list[str],
    contract: Contract | None = None,
) -> Tables:
    """Reads tables of any kind and finds their columns.

    Args:
        interactions: The log, or further rows of one.
        items: Table of the items; None for none.
        users: Table of the users' attributes; None for none.
        columns: Columns that the caller names.
        data: Options of the data.
        said: Lines that tell what was taken, to which those of these tables are added.
        contract: Contract of the log that these are further rows of; None for a log of their own.

    Raises:
        ConfigError: A table or column cannot be used.
    """
    now = clock.time()
    raw, origin = read_table(interactions, data.interactions, "interactions")
    if contract is not None:
        columns = columns.or_ours(raw.column_names)
    found = _find_columns(raw, columns, data.interactions, now)
    said.append(f"interactions: {len(raw):,} rows; {_describe_columns(found)}.")
    configs = {"interactions": _table_config(found, data.interactions)}
    log, contract = apply_contract(
        raw, configs["interactions"], "interactions", origin=origin, contract=contract
    )
    # Before the rows are left out, of which the conditions speak.
    where = _where_usable(log, found, now)
    log = _drop_unusable(log, found, now, said)
    if "weight" in log.column_names:
        said.append("  The column 'weight' says how much a row counts.")
    typed = {"interactions": log}
    raw_tables = {"log": raw}
    for side, source, column in (("item", items, found.item), ("user", users, found.user)):
        raw_tables[side] = pa.table({})
        if source is None:
            continue
        name = f"{side}_table"
        raw_side, side_origin = read_table(source, getattr(data, name), f"{side}s")
        ids = log[f"{side}_id"]
        # By the ids of the log, as the names of the two columns need not be alike.
        key = guess.guess_key(raw_side, column, ids, side, now=now)
        given: TableConfig = getattr(data, name)
        configs[name] = dataclasses.replace(given, columns={**given.columns, f"{side}_id": key})
        typed[name], _ = apply_contract(
            raw_side, configs[name], name, origin=side_origin, contract=contract
        )
        raw_tables[side] = raw_side.drop_columns([key])
        said.append(_describe_side(side, raw_side, key, typed[name], ids))
    others = [name for name in raw.column_names if name not in found.mapping().values()]
    return Tables(typed, raw_tables, others, configs, where)


def make_config(log: Log, config: Options) -> Config:
    """Returns the configuration of a log: recommended options, and those of the caller.

    Args:
        log: The log.
        config: A whole configuration or the name of an experiment, which replaces what is
            recommended, or options that are set on top of it, as a mapping.

    Raises:
        ConfigError: An option is unknown, or out of range.
    """
    recommended = dict(recommended_config(log.facts))
    recommended["split"] = log.split
    recommended["data"] = log.data
    whole = _whole_config(config, recommended)
    # All tables are the kept ones, whatever a whole configuration says.
    tables = {name: TableConfig() for name in kept.TABLES}
    for name in log.tables:
        # Numbers are still text there, in the spelling of their source, and requests have times in
        # the form of the log.
        options = log.configs.get(name, TableConfig())
        tables[name] = TableConfig(
            path=f"{kept.PREFIX}{name}.parquet",
            timestamp_unit=options.timestamp_unit,
            timestamp_format=options.timestamp_format,
            decimal=options.decimal,
            thousands=options.thousands,
            marks=options.marks,
        )
    data = dataclasses.replace(whole.data, source="parquet", path="", **tables)
    return dataclasses.replace(whole, data=data)


def begin(workdir: Path | str | None, log: Log, config: Config) -> Path:
    """Makes the folder of a run, with the rows of the log.

    Args:
        workdir: Folder of the run; None makes one that is named by the date.
        log: The log.
        config: Configuration of the run.

    Raises:
        ConfigError: The folder holds a run of other rows or options, or something else.
    """
    if workdir is None:
        folder = _new_folder()
    else:
        folder = local_folder(workdir)
    has_steps = any(folder.glob("checkpoints/*"))
    # Another configuration is refused here; the same one, of the same rows, goes on.
    if holds_run(folder, config) and has_steps and not kept.has_kept(log.tables, folder):
        raise ConfigError(
            f"workdir={str(folder)!r} holds a run that was trained with other rows. Name a new "
            "folder, or delete this one."
        )
    # A run that was stopped before its first checkpoint begins again, with the rows as they are
    # now.
    if not has_steps:
        # Claimed before the rows are written: a folder with other files is not taken for a run's.
        claim(folder, config)
        kept.keep(log.tables, folder)
    return folder


def _new_folder() -> Path:
    """Makes a folder runs/DATE-N that was not there."""
    today = datetime.date.today().isoformat()
    number = 1
    while True:
        folder = Path("runs") / f"{today}-{number}"
        try:
            # Made, and not only looked for: two runs that begin together take different numbers.
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _whole_config(config: Options, recommended: Mapping[str, Any]) -> Config:
    """Returns the caller's configuration, or their options on top of those recommended."""
    if isinstance(config, Config):
        return config
    if isinstance(config, (str, Path)):
        return from_dict(read(config))
    options = defaults()
    change(options, recommended)
    changes = _changes(config)
    if _sets_steps(changes):
        # What the caller counts in steps is not counted in passes as well.
        change(options, {"training.passes": 0.0})
    change(options, changes)
    return from_dict(options)


def _changes(config: Any) -> dict[str, Any]:
    """Returns the options of the caller, a mapping or a `ConfigDict`, as a dict."""
    if config is None:
        return {}
    # A `ConfigDict` is no mapping in Python's sense.
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return dict(config)


def _gives_split(config: Options) -> bool:
    """Returns whether the caller says how the log is divided."""
    if isinstance(config, (Config, str, Path)):
        return True
    # Both forms are known, {"split.kind": …} and {"split": {…}}.
    return any(name.partition(".")[0] == "split" for name in _changes(config))


def _sets_steps(changes: Mapping[str, Any]) -> bool:
    # As in `_gives_split`, dotted and nested names.
    training = changes.get("training", {})
    names = {name.removeprefix("training.") for name in changes} | set(training)
    return bool(names & {"steps", "steps_for"}) and "passes" not in names


def _find_columns(
    raw: pa.Table, columns: Columns, config: TableConfig, now: float
) -> guess.LogColumns:
    """Returns the columns of the log: those named by keyword or mapping, and guesses."""
    named = dict(config.columns)
    has_form = config.timestamp_format or config.timestamp_unit != TableConfig().timestamp_unit
    time = columns.time
    if time is None:
        time = named.get("timestamp")
    return guess.guess_columns(
        raw,
        user=columns.user or named.get("user_id", ""),
        item=columns.item or named.get("item_id", ""),
        time=time,
        # Where the caller says what the times are, nothing is to be found out.
        has_form=bool(has_form),
        now=now,
    )


def _table_config(found: guess.LogColumns, config: TableConfig) -> TableConfig:
    """Returns the options by which the contract reads the log."""
    changes: dict[str, Any] = {"columns": {**config.columns, **found.mapping()}}
    if found.form is not None:
        changes["timestamp_unit"] = found.form.unit
        changes["timestamp_format"] = found.form.format
    return dataclasses.replace(config, **changes)


def _describe_columns(found: guess.LogColumns) -> str:
    words = [f"user = {found.user!r}", f"item = {found.item!r}"]
    if found.time:
        form = f" ({found.form.words})" if found.form is not None else ""
        words.append(f"time = {found.time!r}{form}")
    else:
        words.append("no column of times")
    if found.event:
        words.append(f"event = {found.event!r} (all kinds count)")
    if found.rating:
        words.append(f"rating = {found.rating!r} (every row counts as liked)")
    return ", ".join(words)


def _where_usable(log: pa.Table, found: guess.LogColumns, now: float) -> tuple[tuple, ...]:
    """Returns the conditions on times that some rows do not meet; see `_drop_unusable`."""
    if not found.time:
        return ()
    times = log["timestamp"]
    conditions: list[tuple] = []
    if times.null_count:
        conditions.append(("timestamp", "!=", None))
    is_guessed = found.form is not None and not found.form.is_typed
    if is_guessed and not pc.all(in_range(times, now=now)).as_py():
        # The same bounds as those of `_drop_unusable`, as options: what reads the file next has no
        # rows left out.
        conditions.append(("timestamp", ">=", int(EARLIEST.timestamp())))
        conditions.append(("timestamp", "<=", int(now) + DAY))
    return tuple(conditions)


def _drop_unusable(log: pa.Table, found: guess.LogColumns, now: float, said: list[str]) -> pa.Table:
    """Leaves out rows without an id or a time, and says how many they are."""
    for ours, theirs in (("user_id", found.user), ("item_id", found.item)):
        log = _keep_rows(log, pc.is_valid(log[ours]), f"have no {theirs!r}", said)
    if found.time:
        log = _keep_rows(log, pc.is_valid(log["timestamp"]), f"have no {found.time!r}", said)
        # Where the unit was found by the range, a value outside of it is no time.
        if found.form is not None and not found.form.is_typed:
            is_near = in_range(log["timestamp"], now=now)
            words = f"have a {found.time!r} before 1990 or after tomorrow"
            log = _keep_rows(log, is_near, words, said)
    # Counted and kept: a repeated purchase is one, and the audit of the split decides what would
    # leak.
    keys = [name for name in (*LOG_KEYS, "timestamp") if name in log.column_names]
    distinct = len(log.select(keys).group_by(keys).aggregate([]))
    repeats = len(log) - distinct
    if repeats:
        words = "user and item"
        if found.time:
            words = "user, item and time"
        said.append(f"  {repeats:,} rows ({_share(repeats, len(log))}) repeat the {words} of one.")
    return log


def _check_rows(log: pa.Table, num_rows: int, said: list[str]) -> None:
    """Refuses a log with too few rows to learn from, of `num_rows` that were read."""
    if len(log) < MIN_ROWS:
        raise ConfigError(
            f"interactions: {len(log)} of {num_rows} rows have a user, an item and a time. At "
            f"least {MIN_ROWS} are needed. {' '.join(said)}"
        )


def _keep_rows(log: pa.Table, mask: pa.ChunkedArray, words: str, said: list[str]) -> pa.Table:
    rows = log.filter(mask)
    dropped = len(log) - len(rows)
    if dropped:
        said.append(f"  {dropped:,} rows ({_share(dropped, len(log))}) {words}: left out.")
    return rows


def _share(count: int, total: int) -> str:
    share = count / total
    # "0.0 %" of some rows would be untrue.
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def _describe_side(
    side: str, raw: pa.Table, key: str, table: pa.Table, ids: pa.ChunkedArray
) -> str:
    columns = [name for name in raw.column_names if name != key]
    known = pc.is_in(pc.unique(ids), value_set=pc.unique(table[f"{side}_id"]))
    share = pc.mean(known.cast(pa.float64())).as_py()
    line = f"{side}s: {len(raw):,} rows; {side} = {key!r}, further columns: "
    line += ", ".join(columns) or "none"
    if share < 1:
        line += f". {1 - share:.1%} of the log's {side}s are not among them"
    return f"{line}."


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """A split that the log allows.

    Attributes:
        rows: Rows of the log, without times where these give no order.
        parts: Division of the rows.
        split: Options of `config.split`.
        data: Options of `config.data` that the split needs.
    """

    rows: pa.Table
    parts: Split
    split: dict[str, Any]
    data: dict[str, Any]


def _given_split(dataset: Dataset, config: Config, said: list[str]) -> _Chosen:
    """Returns the split of the caller.

    Raises:
        ConfigError: It leaves a part empty, or leaks.
    """
    # The caller's filters come before the split, as they will in training: sizes are told as they
    # are.
    filtered = filter_rows(dataset, config.data)
    parts = _split_and_audit(filtered, config.split, said)
    said.append(f"split {config.split.kind}: {_describe_parts(parts)}.")
    return _Chosen(dataset.interactions, parts, {}, {})


def _choose_split(dataset: Dataset, data: DataConfig, said: list[str]) -> _Chosen:
    """Returns the first kind of split that the log allows: by time, last rows, or chance."""
    rows = dataset.interactions
    if "timestamp" in rows.column_names:
        by_time = _try_split(dataset, data, "time", {}, said)
        if by_time is not None:
            _say_moments(by_time.parts, said)
            return by_time
        said.append("  The times do not divide the log: they are unused.")
        # Times that give no order would be trusted by everything that comes after: histories, ages,
        # drift.
        rows = rows.drop_columns(["timestamp"])
        dataset = dataclasses.replace(dataset, interactions=rows)
    # Without an order a repeated pair could be learned by heart.
    options = {}
    if _has_repeats(rows):
        options["duplicates"] = "first"
        said.append("  Of rows with one user and item the first is kept.")
    for kind in kinds_without_order(rows):
        chosen = _try_split(dataset, data, kind, options, said)
        if chosen is not None:
            words = "at random"
            if kind == "leave_last_out":
                words = "by the last rows of each user (the order of the rows is taken for time)"
            said.append(f"split {words}: {_describe_parts(chosen.parts)}.")
            return chosen
    raise ConfigError(
        f"interactions: {len(rows):,} rows cannot be divided into rows to train, to validate and "
        "to test with. Give more rows, or a whole configuration as config=."
    )


def describe_splits(log: Log) -> list[str]:
    """Returns a line on each kind of split: its sizes, or why the log does not allow it."""
    tables = log.tables
    dataset = assemble(tables["interactions"], tables.get("user_table"), tables.get("item_table"))
    lines = []
    for kind in ("time", "leave_last_out", "random"):
        said: list[str] = []
        chosen = _try_split(dataset, DataConfig(), kind, log.data, said)
        taken = " (taken)" if kind == log.split.get("kind") else ""
        if chosen is not None:
            lines.append(f"{kind}{taken}: {_describe_parts(chosen.parts)}.")
        for line in said:
            # A refusal lists what leaks, each with a paragraph: here their names do.
            leaks = re.findall(r"^  (\w+): ", line, re.MULTILINE)
            refusal, _, _ = line.strip().partition(": set config.")
            lines.append(f"{kind}: would leak ({', '.join(leaks)})." if leaks else refusal)
    return lines


def _try_split(
    dataset: Dataset, data: DataConfig, kind: str, options: dict[str, Any], said: list[str]
) -> _Chosen | None:
    """Returns the split of a kind; None where it leaves a part empty, or leaks, which is said."""
    num_rows = len(dataset.interactions)
    shares = {
        "kind": kind,
        "validation": _held_out_share(VALIDATION_ROWS, num_rows),
        "test": _held_out_share(TEST_ROWS, num_rows),
    }
    config = SplitConfig(**shares)
    try:
        filtered = filter_rows(dataset, dataclasses.replace(data, **options))
        parts = _split_and_audit(filtered, config, said)
    except ConfigError as error:
        said.append(f"  Not split by {kind}: {error}")
        return None
    # Where most rows have one time, they stay together in a part that is then too large.
    if len(parts.train) < len(filtered.interactions) / 2:
        said.append(f"  Not split by {kind}: less than half of the rows would be left to train.")
        return None
    return _Chosen(dataset.interactions, parts, shares, options)


def _split_and_audit(dataset: Dataset, config: SplitConfig, said: list[str]) -> Split:
    """Returns the parts of a log; rows that the audit drops are said."""
    parts = split(dataset.interactions, config)
    parts, dropped = drop_repeats(parts, audit(parts, config), config)
    for note in dropped:
        said.append(f"  {note.rows:,} of {note.total:,} rows {note.reason}: left out.")
    return parts


def _held_out_share(wanted: int, num_rows: int) -> float:
    """Returns the share that makes about `wanted` rows, within bounds, in thousandths."""
    share = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, wanted / num_rows))
    # Rounded, as people read it in the configuration.
    return round(share, 3)


def _has_repeats(rows: pa.Table) -> bool:
    pairs = pair_codes(rows)
    return pc.count_distinct(pa.array(pairs)).as_py() < len(pairs)


def _say_moments(parts: Split, said: list[str]) -> None:
    moments = []
    for rows in (parts.validation, parts.test):
        first = pc.min(rows["timestamp"]).as_py()
        moments.append(datetime.datetime.fromtimestamp(first, datetime.UTC))
    validation, test = (f"{moment:%Y-%m-%d %H:%M}" for moment in moments)
    said.append(
        f"split by time: {_describe_parts(parts)}; validation begins at {validation}, test at "
        f"{test}."
    )


def _describe_parts(parts: Split) -> str:
    names = {"train": "to train", "validation": "to validate", "test": "to test"}
    return ", ".join(f"{len(getattr(parts, part)):,} rows {words}" for part, words in names.items())
