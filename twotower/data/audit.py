"""The leakage audit: what a split lets training know of what it is tested on, refused unless
accepted by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrow import pc
from twotower.core.errors import LeakageError, choose
from twotower.data.interactions import (
    Split,
    codes,
    describe,
    fingerprint,
    has_timestamps,
    pair_codes,
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One way in which held-out rows are known in training.

    Attributes:
        name: a key of `FINDINGS`, which `SplitConfig.accept_leakage` accepts.
        rows: how many rows show it.
        message: what was found, with the count and an example row.
    """

    name: str
    rows: int
    message: str


def audit(split: Split, config: SplitConfig) -> list[Finding]:
    """Looks for every kind of leakage of `FINDINGS`.

    Returns:
        The findings, all of them accepted by `config.accept_leakage`.
    Raises:
        LeakageError: a finding is not accepted.
        ConfigError: `accept_leakage` names no known finding.
    """
    for name in config.accept_leakage:
        choose(FINDINGS, name, "config.split.accept_leakage")
    findings = [finding for _, look in FINDINGS.values() for finding in look(split, config)]
    refused = [finding for finding in findings if finding.name not in config.accept_leakage]
    if refused:
        raise LeakageError(_refusal(refused, config))
    return findings


def check_fitted(fitted_on: str, split: Split) -> None:
    """Refuses an encoder whose vocabularies and statistics come from other rows than the training
    rows of `split`.

    Args:
        fitted_on: `fingerprint` of the rows that the encoder was fitted on.
    """
    expected = fingerprint(split.train)
    if fitted_on != expected:
        raise LeakageError(
            f"the encoder was fitted on rows with fingerprint {fitted_on!r}, but the training rows now have {expected!r}: "
            "the data that config.data names, or how it is split, has changed since, and held-out rows may be known. Bring "
            "the data back, or train in a new folder."
        )


def _random_split(split: Split, config: SplitConfig) -> Iterator[Finding]:
    held = sum(rows.num_rows for rows in _held(split))
    if config.kind == "random" and held and has_timestamps(split.train):
        example = _held(split)[-1]
        yield Finding(
            "random_split",
            held,
            f"{held:,} held-out rows were drawn at random although rows have timestamps, for example "
            f"{describe(example, 0)}",
        )


def _future_rows(split: Split, config: SplitConfig) -> Iterator[Finding]:
    """Leave-last-out: training rows of some users are later than held-out rows of others, and tell
    what is coming."""
    held = _held(split)[-1:]
    if config.kind != "leave_last_out" or not held or not has_timestamps(split.train):
        return
    since = pc.min(held[0]["timestamp"]).as_py()
    later = np.asarray(pc.fill_null(pc.greater(split.train["timestamp"], since), False))
    if later.any():
        row = int(later.argmax())
        yield Finding(
            "future_rows",
            int(later.sum()),
            f"{later.sum():,} of {split.train.num_rows:,} training rows are later than the "
            f"earliest held-out row (timestamp={since}), for example {describe(split.train, row)}",
        )


def _repeated_pairs(split: Split, config: SplitConfig) -> Iterator[Finding]:
    if (
        config.kind != "time"
    ):  # over time people do come back to an item, and a served model meets that too
        yield from _known(
            "repeated_pairs", split, pair_codes, "have their (user, item) in an earlier part too"
        )


def _identical_rows(split: Split, config: SplitConfig) -> Iterator[Finding]:
    if has_timestamps(split.train) and (
        config.kind != "time" or any(_time_order(split, config))
    ):  # rows in order of time differ
        yield from _known(
            "identical_rows",
            split,
            _row_codes,
            "have their (user, item, timestamp) in an earlier part too",
        )


def _time_order(split: Split, config: SplitConfig) -> Iterator[Finding]:
    if config.kind not in ("time", "fixed") or not has_timestamps(split.train):
        return
    early, example, before = 0, "", split.train
    for rows in _held(split):
        latest = pc.max(before["timestamp"]).as_py()
        mask = np.asarray(pc.fill_null(pc.less_equal(rows["timestamp"], latest), False))
        if mask.any():
            early += int(mask.sum())
            example = (
                f"{describe(rows, int(mask.argmax()))}, where the part before it ends at {latest}"
            )
        before = pa.concat_tables([before, rows])
    if early:
        yield Finding(
            "time_order",
            early,
            f"{early:,} held-out rows are not after all rows of the part before, for example {example}",
        )


# name -> (why it flatters the figures, what looks for it)
FINDINGS: dict[str, tuple[str, Callable[[Split, SplitConfig], Iterator[Finding]]]] = {
    "random_split": (
        "Training has seen what the same users did afterwards, and what became popular later, which no served model "
        "has. config.split.kind='time' asks what a served model is asked.",
        _random_split,
    ),
    "future_rows": (
        "Training knows what other users liked after the moment that is predicted, so it knows coming trends. "
        "config.split.kind='time' does not.",
        _future_rows,
    ),
    "repeated_pairs": (
        "The answer to a held-out row is remembered, not predicted (and is lost where seen items are masked). "
        "config.data.duplicates='first' leaves one row a pair.",
        _repeated_pairs,
    ),
    "identical_rows": (
        "The very row that is tested was trained on: the file holds it twice. "
        "config.data.duplicates='first' leaves one row a pair.",
        _identical_rows,
    ),
    "time_order": (
        "Training knows the time that is tested. config.split.kind='time' cuts all users at one moment.",
        _time_order,
    ),
}


def _refusal(refused: list[Finding], config: SplitConfig) -> str:
    lines = [
        f"the leakage audit refuses this split (config.split.kind={config.kind!r}), whose figures would be too good:"
    ]
    lines += [
        f"  {finding.name}: {finding.message}. {FINDINGS[finding.name][0]}" for finding in refused
    ]
    accept = config.accept_leakage + tuple(finding.name for finding in refused)
    return "\n".join(
        [
            *lines,
            f"If the protocol at hand knowingly has it: config.split.accept_leakage={accept!r}.",
        ]
    )


def _held(split: Split) -> list[pa.Table]:
    """The held-out parts that have rows, validation first."""
    return [rows for rows in (split.validation, split.test) if rows.num_rows]


def _row_codes(rows: pa.Table) -> np.ndarray:
    pairs = codes(
        pa.chunked_array([pair_codes(rows)])
    )  # dense, so that the product below cannot overflow
    times = codes(rows["timestamp"])
    return pairs * (times.max(initial=0) + 1) + times


def _known(
    name: str, split: Split, codes_of: Callable[[pa.Table], np.ndarray], what: str
) -> Iterator[Finding]:
    """Finds held-out rows whose code appears in an earlier part."""
    held = pa.concat_tables(_held(split) or [split.test])
    columns = [
        column for column in ("user_id", "item_id", "timestamp") if column in held.column_names
    ]
    rows = pa.concat_tables([part.select(columns) for part in (split.train, *_held(split))])
    values = codes_of(rows)
    start, repeated = split.train.num_rows, np.zeros(0, bool)
    for part in _held(split):
        stop = start + part.num_rows
        repeated = np.append(repeated, _among(values[start:stop], values[:start]))
        start = stop
    if repeated.any():
        row = int(repeated.argmax())
        yield Finding(
            name,
            int(repeated.sum()),
            f"{repeated.sum():,} of {held.num_rows:,} held-out rows {what}, for example {describe(held, row)}",
        )


def _among(few: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Which of `few` are among `many`: bool [N]. Hashes only `few`; NumPy sorts both, eight times
    slower."""
    candidates = many[np.asarray(pc.is_in(pa.array(many), value_set=pa.array(few)))]
    return np.asarray(pc.is_in(pa.array(few), value_set=pa.array(candidates)))
