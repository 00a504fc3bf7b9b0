"""Rows into train, validation and test: by time, leave-last-out, at random, or as the files say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.data.audit import audit, check_fitted
from twotower.data.filters import filter_rows
from twotower.data.interactions import Split, describe, places_from_end, timestamps

__all__ = ["SPLITS", "Split", "audit", "check_fitted", "filter_rows", "split"]

TRAIN, VALIDATION, TEST = 0, 1, 2
PARTS = ("train", "validation", "test")


def split(interactions: pa.Table, config: SplitConfig) -> Split:
    """Divides `interactions` as `config.kind` says.

    Raises:
        ConfigError: the kind is unknown, needs a column that is missing, or leaves a part empty
            that was asked for.
    """
    parts = choose(SPLITS, config.kind, "config.split.kind")(interactions, config)
    places = [np.flatnonzero(parts == part) for part in range(3)]
    tables = [interactions.filter(pa.array(parts == part)) for part in range(3)]
    asked = (True, config.validation > 0, config.test > 0)
    for name, table, wanted in zip(PARTS, tables, asked):
        if wanted and not table.num_rows:
            raise ConfigError(
                f"config.split.kind={config.kind!r} with validation={config.validation} and test={config.test} leaves "
                f"no {name} rows of {interactions.num_rows:,}. {_HINTS[config.kind]}"
            )
    return Split(*tables, places=tuple(places))


def by_time(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Cuts the log at two moments: train < t_validation <= validation < t_test <= test. Part of
    each row, int8 [N].

    The moments are quantiles of the timestamps. Rows of one second stay together, so a part may
    exceed its share.
    """
    times = timestamps(rows)
    if times is None:
        raise ConfigError(
            "config.split.kind='time' needs a column 'timestamp'; choose leave_last_out, random or fixed without one."
        )
    held, test = _shares(rows, config)
    ordered = np.sort(times)
    parts = np.full(len(times), TRAIN, np.int8)
    for count, part in ((held, VALIDATION), (test, TEST)):
        if count:
            parts[times >= ordered[len(times) - count]] = part
    return parts


def leave_last_out(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Holds out the last row of each user for test and the one before it for validation. Part of
    each row, int8 [N].

    Rows are ordered by timestamp where there is one; file order breaks ties, or is the order. Users
    with fewer than three rows stay in train. Without a share for test (validation) no row goes
    there.
    """
    later, count = places_from_end(rows)
    wanted = [
        part for part, share in ((TEST, config.test), (VALIDATION, config.validation)) if share > 0
    ]
    parts = np.full(len(later), TRAIN, np.int8)
    for place, part in enumerate(wanted):
        parts[(later == place) & (count >= 3)] = part
    return parts


def at_random(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Draws exactly round(N * share) rows for each part by the seed. Part of each row, int8 [N]."""
    held, test = _shares(rows, config)
    order = np.random.default_rng(config.seed).permutation(rows.num_rows)
    parts = np.full(rows.num_rows, TRAIN, np.int8)
    parts[order[:held]] = VALIDATION
    parts[order[:test]] = TEST
    return parts


def as_given(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Follows the column `split`; if no row says validation, a share of train becomes it, by
    `held`. Parts, int8 [N]."""
    if "split" not in rows.column_names:
        raise ConfigError(
            "config.split.kind='fixed' needs a column 'split' of train, validation and test, or a file "
            "config.data.test.path."
        )
    index = pc.index_in(rows["split"].cast(pa.string()), value_set=pa.array(PARTS))
    if index.null_count:
        row = pc.index(pc.is_null(index), True).as_py()
        raise ConfigError(
            f"interactions row {row + 1} ({describe(rows, row)}): split={rows['split'][row].as_py()!r} "
            f"must be one of {', '.join(PARTS)}."
        )
    parts = index.to_numpy().astype(np.int8)
    if not (parts == VALIDATION).any():
        train = np.flatnonzero(parts == TRAIN)
        hold = choose(HELD, config.held, "config.split.held")
        parts[train[hold(rows.take(pa.array(train)), config)]] = VALIDATION
    return parts


def _random_share(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    order = np.random.default_rng(config.seed).permutation(rows.num_rows)
    return order[: round(rows.num_rows * config.validation)]


def _latest_share_of_users(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    later, count = places_from_end(rows)
    return np.flatnonzero(later < np.round(count * config.validation))


# How `fixed` chooses validation rows where none are named: places among the training rows.
HELD: dict[str, Callable[[pa.Table, SplitConfig], np.ndarray]] = {
    "random": _random_share,
    "latest": _latest_share_of_users,
}


SPLITS: dict[str, Callable[[pa.Table, SplitConfig], np.ndarray]] = {
    "time": by_time,
    "leave_last_out": leave_last_out,
    "random": at_random,
    "fixed": as_given,
}

_HINTS = {
    "time": "Change the shares, or give finer timestamps: rows of one second are never divided.",
    "leave_last_out": "Only users with at least three rows have one held out.",
    "random": "Change the shares, or bring more rows.",
    "fixed": "The column 'split' decides it; set the share to 0 for a part that is not wanted.",
}


def _shares(rows: pa.Table, config: SplitConfig) -> tuple[int, int]:
    """Rows held out in all, and those of them for test."""
    if config.validation + config.test >= 1:
        raise ConfigError(
            f"config.split.validation={config.validation} and config.split.test={config.test} must leave a share for "
            "train."
        )
    test = round(rows.num_rows * config.test)
    return test + round(rows.num_rows * config.validation), test
