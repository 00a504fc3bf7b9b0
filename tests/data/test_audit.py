"""Each kind of leakage is found where it was planted, and nowhere else."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import SplitConfig
from twotower.core.arrow import fingerprint
from twotower.core.errors import ConfigError, LeakageError
from twotower.data.audit import FINDINGS, audit, check_fitted, drop_repeats
from twotower.data.interactions import Split
from twotower.data.split import split

EVERYTHING = tuple(FINDINGS)


def part(*rows: tuple) -> pa.Table:
    """Rows of (user, item) or (user, item, time)."""
    columns = {
        "user_id": pa.array([row[0] for row in rows], pa.string()),
        "item_id": pa.array([row[1] for row in rows], pa.string()),
    }
    if all(len(row) == 3 for row in rows):
        columns["timestamp"] = pa.array([row[2] for row in rows], pa.int64())
    return pa.table(columns)


def count_findings(split: Split, kind: str) -> dict[str, int]:
    """Kind of leakage -> the rows that show it."""
    findings = audit(split, SplitConfig(kind=kind, accept_leakage=EVERYTHING))
    return {finding.name: finding.rows for finding in findings}


TRAIN = [("u", "a", 10), ("u", "b", 20), ("v", "a", 11), ("v", "c", 30)]

CASES = {  # name: (kind, train, validation, test, findings)
    "time: clean": ("time", TRAIN, [("u", "c", 31)], [("v", "b", 32)], {}),
    "time: people come back": ("time", TRAIN, [("u", "a", 31)], [("v", "a", 32)], {}),
    "time: a test row at the last training second": (
        "time",
        TRAIN,
        [],
        [("v", "b", 30), ("u", "c", 31)],
        {"time_order": 1},
    ),
    "time: validation after test": (
        "time",
        TRAIN,
        [("u", "c", 40)],
        [("v", "b", 35), ("v", "d", 41)],
        {"time_order": 1},
    ),
    "random: with times": (
        "random",
        TRAIN,
        [("u", "c", 5)],
        [("v", "b", 15), ("v", "d", 16)],
        {"random_split": 3},
    ),
    "random: a pair again": (
        "random",
        TRAIN,
        [],
        [("v", "b", 15), ("v", "c", 16)],
        {"random_split": 2, "repeated_pairs": 1},
    ),
    "random: a row again": (
        "random",
        TRAIN,
        [],
        [("v", "c", 30)],
        {"random_split": 1, "repeated_pairs": 1, "identical_rows": 1},
    ),
    "random: test repeats validation": (
        "random",
        TRAIN,
        [("u", "c", 5)],
        [("u", "c", 6)],
        {"random_split": 2, "repeated_pairs": 1},
    ),
    "leave_last_out: a test row before another user's training row": (
        "leave_last_out",
        TRAIN,
        [],
        [("u", "c", 25), ("v", "b", 31)],
        {"future_rows": 1},
    ),
    "leave_last_out: all test rows after all training rows": (
        "leave_last_out",
        TRAIN,
        [],
        [("u", "c", 30), ("v", "b", 31)],
        {},
    ),
    "leave_last_out: validation alone": (
        "leave_last_out",
        TRAIN,
        [("u", "c", 15)],
        [],
        {"future_rows": 2},
    ),
    "leave_last_out: a pair again": (
        "leave_last_out",
        TRAIN,
        [],
        [("u", "a", 31)],
        {"repeated_pairs": 1},
    ),
    "fixed: clean": ("fixed", TRAIN, [("u", "c", 31)], [("v", "b", 32)], {}),
    "fixed: out of order": (
        "fixed",
        TRAIN,
        [],
        [("u", "c", 15), ("v", "b", 32)],
        {"time_order": 1},
    ),
    "fixed: a row again": (
        "fixed",
        TRAIN,
        [],
        [("v", "c", 30)],
        {"time_order": 1, "repeated_pairs": 1, "identical_rows": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_audit_finds_what_was_planted_and_counts_its_rows(name):
    kind, train, validation, test, expected = CASES[name]
    nothing = part(*train).slice(0, 0)
    parts = [part(*rows) if rows else nothing for rows in (train, validation, test)]
    assert count_findings(Split(*parts), kind) == expected


@pytest.mark.parametrize("kind", ["random", "leave_last_out", "fixed"])
def test_without_timestamps_only_pairs_can_be_compared(kind):
    train = part(("u", "a"), ("u", "b"), ("v", "a"))
    test = part(("v", "b"), ("u", "b"))
    assert count_findings(Split(train, train.slice(0, 0), test), kind) == {"repeated_pairs": 1}


def test_pairs_are_compared_by_both_ids():
    train = part(("u", "a"), ("v", "b"), ("x", "c"))
    test = part(("u", "b"), ("v", "a"), ("a", "u"), ("c", "x"))
    assert count_findings(Split(train, train.slice(0, 0), test), "random") == {}


def random_rows(seed: int, *, ids: int, times: int) -> list[tuple]:
    rng = np.random.default_rng(seed)
    columns = [rng.integers(ids, size=300), rng.integers(ids, size=300)]
    columns.append(rng.integers(times, size=300))
    return [(str(user), str(item), int(time)) for user, item, time in zip(*columns)]


@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_those_of_sets_of_tuples(seed):
    rows = random_rows(seed, ids=20, times=3)
    parts = split(part(*rows), SplitConfig(kind="random", validation=0.2, test=0.2, seed=seed))
    train, validation, test = (
        [tuple(row.values()) for row in table.to_pylist()]
        for table in (parts.train, parts.validation, parts.test)
    )

    def repeats(width: int) -> int:
        before = {row[:width] for row in train}
        held = sum(row[:width] in before for row in validation)
        return held + sum(row[:width] in before | {v[:width] for v in validation} for row in test)

    assert count_findings(parts, "random") == {
        "random_split": 120,
        "repeated_pairs": repeats(2),
        "identical_rows": repeats(3),
    }
    assert repeats(2) > repeats(3) > 0


def test_a_split_by_time_of_a_log_that_repeats_itself_passes_by_default():
    rows = random_rows(0, ids=5, times=30)
    config = SplitConfig()
    assert audit(split(part(*rows, *rows), config), config) == []


def test_a_refusal_says_what_was_found_with_an_example_why_it_flatters_and_how_to_accept_it():
    rows = Split(part(*TRAIN), part(*TRAIN).slice(0, 0), part(("v", "b", 15), ("v", "c", 16)))
    with pytest.raises(LeakageError) as error:
        audit(rows, SplitConfig(kind="random", accept_leakage=("future_rows",)))
    message = str(error.value)
    for words in (
        "random_split: 2 held-out rows",
        "repeated_pairs: 1 of 2 held-out rows",
        "user_id='v', item_id='c', timestamp=16",
        "no served model has",
        "remembered",
        "accept_leakage=('future_rows', 'random_split', 'repeated_pairs')",
    ):
        assert words in message
    with pytest.raises(LeakageError) as error:
        audit(rows, SplitConfig(kind="random", accept_leakage=("random_split",)))
    assert "random_split:" not in str(error.value)
    accepted = audit(
        rows, SplitConfig(kind="random", accept_leakage=("random_split", "repeated_pairs"))
    )
    assert [finding.name for finding in accepted] == ["random_split", "repeated_pairs"]


def test_an_unknown_name_among_the_accepted_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match="accept_leakage='random_splits'.*did you mean 'random_split'"
    ):
        audit(Split(*[part(*TRAIN)] * 3), SplitConfig(accept_leakage=("random_splits",)))


def test_an_encoder_fitted_on_other_rows_than_train_is_refused():
    parts = Split(part(*TRAIN), part(("u", "c", 31)), part(("v", "b", 32)))
    check_fitted(fingerprint(parts.train), parts)
    with pytest.raises(LeakageError, match="training rows"):
        check_fitted(fingerprint(pa.concat_tables([parts.train, parts.test])), parts)


def test_a_few_repeated_held_out_rows_are_dropped_and_counted():
    """One of a hundred and one is dropped, one of a hundred refused, and none that is accepted."""
    validation = [("u", f"new{n}", 100 + n) for n in range(50)]
    test = [("v", f"new{n}", 200 + n) for n in range(50)]
    again = ("v", "c", 300)
    config = SplitConfig(kind="fixed")
    parts = Split(part(*TRAIN), part(*validation), part(*test, again))
    findings = audit(parts, config)
    kept, dropped = drop_repeats(parts, findings, config)
    assert kept.test.equals(part(*test)) and kept.validation.equals(parts.validation)
    (note,) = dropped
    assert (note.rows, note.total) == (1, 101) and "repeated_pairs" in note.reason
    with pytest.raises(LeakageError, match="the earliest: where users view"):
        audit(dataclasses.replace(parts, test=part(*test[1:], again)), config)
    accepting = SplitConfig(kind="fixed", accept_leakage=("repeated_pairs",))
    assert drop_repeats(parts, audit(parts, accepting), accepting) == (parts, ())
