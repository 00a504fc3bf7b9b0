"""The leakage audit: refuses a split whose training rows reveal the held-out rows.

A kind of leakage that a published protocol has can be accepted by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrow import fingerprint, pc
from twotower.core.codes import distinct, positions
from twotower.core.errors import LeakageError, choose
from twotower.data.dataset import Dropped
from twotower.data.interactions import Split, codes, describe, has_timestamps, pair_codes
from twotower.data.split import has_order

# Share of the held-out rows below which repeated ones are dropped: no figure hangs on them.
FEW_REPEATS = 0.01


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of leakage that a split has.

    Attributes:
        name: Kind of leakage, a key of `FINDINGS`; `SplitConfig.accept_leakage` accepts it.
        rows: Number of rows that show it.
        message: Sentence with the number of rows and one of them as an example.
        repeated: Held-out rows that repeat an earlier part, bool [rows of validation and test];
            None for other kinds.
    """

    name: str
    rows: int
    message: str
    repeated: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def is_few(self) -> bool:
        """Whether so few rows are repeated that they are dropped in place of a refusal."""
        return self.repeated is not None and self.rows < FEW_REPEATS * len(self.repeated)


@dataclasses.dataclass(frozen=True)
class Check:
    """One kind of leakage to look for.

    Attributes:
        reason: Sentences on why it flatters the figures, and on the cure.
        look: Function that returns the finding in a split, or None.
    """

    reason: str
    look: Callable[[Split, SplitConfig], Finding | None]


def audit(split: Split, config: SplitConfig, *, describes_items: bool = False) -> list[Finding]:
    """Looks for every kind of leakage of `FINDINGS`.

    Args:
        split: The parts of the log.
        config: Kind of the split, and the kinds of leakage to accept.
        describes_items: Whether all rows of the log, those held out among them, describe the items.

    Returns:
        The findings, all of them accepted by `config.accept_leakage` or of a few repeated rows,
        which `drop_repeats` drops.

    Raises:
        LeakageError: A finding is not accepted.
        ConfigError: `accept_leakage` names no known kind of leakage.
    """
    for name in config.accept_leakage:
        choose(FINDINGS, name, "config.split.accept_leakage")
    # All checks run before the first complaint, so that one message names everything to mend.
    findings = _look(split, config, tuple(FINDINGS), describes_items)
    check_findings(findings, config)
    return findings


def check_findings(findings: Sequence[Finding], config: SplitConfig) -> None:
    """Refuses kinds of leakage that are not accepted, but for a few repeated rows.

    Args:
        findings: All that was found.
        config: Kinds of leakage to accept.

    Raises:
        LeakageError: A finding is not accepted.
    """
    not_accepted = [finding for finding in findings if finding.name not in config.accept_leakage]
    refused = [finding for finding in not_accepted if not finding.is_few]
    if refused:
        raise LeakageError(_message(refused, config))


def accepted_findings(
    split: Split, config: SplitConfig, *, describes_items: bool = False
) -> list[Finding]:
    """Looks again for the kinds of leakage that `config.accept_leakage` names.

    Args:
        split: The parts of the log, after `audit`.
        config: Kind of the split, and the kinds of leakage that were accepted.
        describes_items: Whether all rows of the log, those held out among them, describe the items.
    """
    return _look(split, config, config.accept_leakage, describes_items)


def _look(
    split: Split, config: SplitConfig, names: Sequence[str], describes_items: bool
) -> list[Finding]:
    """Returns the findings of some kinds, in the order of `FINDINGS`."""
    results = [check.look(split, config) for name, check in FINDINGS.items() if name in names]
    # Beside the others, as it needs to know where the items come from, which no split tells.
    if describes_items and "held_out_text" in names:
        results.append(_held_out_text(split))
    return [finding for finding in results if finding is not None]


def drop_repeats(
    split: Split, findings: list[Finding], config: SplitConfig
) -> tuple[Split, tuple[Dropped, ...]]:
    """Drops the few held-out rows that repeat an earlier part, where that is not accepted.

    Args:
        split: The parts of the log.
        findings: Result of `audit`.
        config: Kinds of leakage to accept.

    Returns:
        The parts without these rows, and a note on each kind of them.
    """
    is_dropped = np.zeros(len(split.validation) + len(split.test), bool)
    dropped = []
    for finding in findings:
        if finding.repeated is None or finding.name in config.accept_leakage:
            continue
        reason = f"of those held out, as they repeat an earlier part ({finding.name})"
        dropped.append(Dropped(reason, finding.rows, len(is_dropped)))
        is_dropped |= finding.repeated
    if not dropped:
        return split, ()
    is_kept = ~is_dropped
    masks = (is_kept[: len(split.validation)], is_kept[len(split.validation) :])
    positions = split.file_positions
    if positions is not None:
        # Training rows are never dropped: what repeats in them is theirs to learn.
        positions = (positions[0], positions[1][masks[0]], positions[2][masks[1]])
    parts = Split(
        split.train,
        split.validation.filter(pa.array(masks[0])),
        split.test.filter(pa.array(masks[1])),
        file_positions=positions,
    )
    return parts, tuple(dropped)


def check_fitted(fitted_on: str, split: Split) -> None:
    """Refuses an encoder that was fitted on other rows than the training rows.

    Args:
        fitted_on: `fingerprint` of the rows that the encoder was fitted on.
        split: The parts of the log.

    Raises:
        LeakageError: The fingerprints differ.
    """
    # By content rather than by path: the same file may hold other rows today.
    expected = fingerprint(split.train)
    if fitted_on != expected:
        raise LeakageError(
            f"the encoder was fitted on rows with fingerprint {fitted_on!r}, but the training rows "
            f"now have {expected!r}: the data that config.data names, or how it is split, has "
            "changed since, and held-out rows may be known. Bring the data back, or train in a new "
            "folder."
        )


def _random_split(split: Split, config: SplitConfig) -> Finding | None:
    parts = _held_out_parts(split)
    if config.kind != "random" or not parts or not _has_order(split, config):
        return None
    count = sum(rows.num_rows for rows in parts)
    return rows_drawn(count, describe(parts[-1], 0))


def rows_drawn(count: int, example: str) -> Finding:
    """Returns the finding of held-out rows that were drawn although rows have times.

    Args:
        count: Number of held-out rows.
        example: Description of one of them.
    """
    message = (
        f"{count:,} held-out rows were drawn at random although rows have timestamps, for example "
        f"{example}"
    )
    return Finding("random_split", count, message)


def _has_order(split: Split, config: SplitConfig) -> bool:
    """Returns whether the log could be divided by time; the cure would be a refusal otherwise."""
    if not has_timestamps(split.train):
        return False
    parts = (split.train, split.validation, split.test)
    rows = pa.concat_tables([part.select(["timestamp"]) for part in parts])
    return has_order(rows, config)


def _future_rows(split: Split, config: SplitConfig) -> Finding | None:
    """Looks, after leave-last-out, for training rows that are later than a held-out row.

    They are rows of other users, and show coming trends.
    """
    parts = _held_out_parts(split)
    # Without a usable order there is no other split to offer, so that nothing is said.
    if config.kind != "leave_last_out" or not parts or not _has_order(split, config):
        return None
    # The last part that has rows is the one that is reported on.
    earliest = pc.min(parts[-1]["timestamp"]).as_py()
    # One moment for all users: leave-last-out compares each row with its own user's rows alone.
    is_later = _as_mask(pc.greater(split.train["timestamp"], earliest))
    if not is_later.any():
        return None
    example = describe(split.train, int(is_later.argmax()))
    return rows_of_future(int(is_later.sum()), split.train.num_rows, earliest, example)


def rows_of_future(count: int, total: int, earliest: int, example: str) -> Finding:
    """Returns the finding of training rows that are later than a held-out row.

    Args:
        count: Number of these rows.
        total: Number of training rows.
        earliest: Earliest time of the held-out rows, in seconds.
        example: Description of one of the rows.
    """
    message = (
        f"{count:,} of {total:,} training rows are later than the earliest held-out row "
        f"(timestamp={earliest}), for example {example}"
    )
    return Finding("future_rows", count, message)


def repeated_pairs(split: Split, config: SplitConfig) -> Finding | None:
    """Looks for held-out rows whose user and item an earlier part has too.

    Args:
        split: The parts of the log; of the training rows, those with such a user and item will do.
        config: Kind of the split.
    """
    # Over time people do come back to an item, and a served model meets that too.
    if config.kind == "time":
        return None
    consequence = "have their (user, item) in an earlier part too"
    return _find_repeats("repeated_pairs", split, pair_codes, consequence)


def identical_rows(split: Split, config: SplitConfig) -> Finding | None:
    """Looks for held-out rows whose user, item and time an earlier part has too.

    Args:
        split: The parts of the log; of the training rows, those with such a user and item will do.
        config: Kind of the split.
    """
    if not has_timestamps(split.train):
        return None
    # After a split by time that is in order, rows of two parts differ in their time.
    if config.kind == "time" and _time_order(split, config) is None:
        return None
    consequence = "have their (user, item, timestamp) in an earlier part too"
    return _find_repeats("identical_rows", split, _row_codes, consequence)


def _time_order(split: Split, config: SplitConfig) -> Finding | None:
    """Looks for held-out rows that are not after every row of the part before."""
    # Leave-last-out mixes times by design, and "future_rows" tells of it.
    if config.kind not in ("time", "fixed") or not has_timestamps(split.train):
        return None
    before = split.train
    parts = _held_out_parts(split)
    if is_of_training_time(config):
        before = pa.concat_tables([split.train, split.validation])
        parts = [rows for rows in (split.test,) if rows.num_rows]
    return rows_out_of_order(pc.max(before["timestamp"]).as_py(), parts)


def is_of_training_time(config: SplitConfig) -> bool:
    """Returns whether validation rows are of the time of training by choice: the figures are those
    of the test."""
    return config.validation_by in ("last", "user")


def rows_out_of_order(latest: int, parts: list[pa.Table]) -> Finding | None:
    """Returns the finding of held-out rows that are not after every row of the part before.

    Args:
        latest: Latest time of the rows before all parts, in seconds.
        parts: Held-out rows, each part with some.
    """
    count = 0
    example = ""
    for rows in parts:
        # Equal times count as early: rows of one second have no order that could be trusted.
        is_early = _as_mask(pc.less_equal(rows["timestamp"], latest))
        if is_early.any():
            count += int(is_early.sum())
            row = describe(rows, int(is_early.argmax()))
            example = f"{row}, where the part before it ends at {latest}"
        # Test rows must come after validation rows too.
        latest = max(latest, pc.max(rows["timestamp"]).as_py())
    if not count:
        return None
    message = (
        f"{count:,} held-out rows are not after all rows of the part before, for example {example}"
    )
    return Finding("time_order", count, message)


_CURE_OF_REPEATS = (
    "config.data.duplicates='first' leaves one row a pair, the earliest: where users view, put "
    "into a cart and buy, that is the view, and how often they came back is lost. 'last' leaves "
    "the latest, and takes from training what is repeated later."
)


def _held_out_text(split: Split) -> Finding | None:
    """Looks for held-out rows of items that these rows alone describe."""
    # By items and not by texts: an item that training knows may be described by a later row, which
    # changes its words but brings in no new item.
    trained = distinct(split.train["item_id"])
    count = 0
    example = ""
    for rows in _held_out_parts(split):
        is_new = positions(rows["item_id"], trained) < 0
        if is_new.any():
            count += int(is_new.sum())
            example = describe(rows, int(is_new.argmax()))
    if not count:
        return None
    message = (
        f"{count:,} held-out rows are of items that no training row has, and that the held-out "
        f"rows describe, for example {example}"
    )
    return Finding("held_out_text", count, message)


# The order of the checks is the order of the lines in the message.
FINDINGS: dict[str, Check] = {
    "random_split": Check(
        "Training has seen what the same users did afterwards, and what became popular later, "
        "which no served model has. config.split.kind='time' predicts as a served model must.",
        _random_split,
    ),
    "future_rows": Check(
        "Training knows what other users liked after the moment that is predicted, so it knows "
        "coming trends. config.split.kind='time' trains on earlier rows alone.",
        _future_rows,
    ),
    "repeated_pairs": Check(
        "The answer to a held-out row is remembered, not predicted (and is lost where seen items "
        f"are masked). {_CURE_OF_REPEATS}",
        repeated_pairs,
    ),
    "identical_rows": Check(
        f"The very row that is tested was trained on: the file holds it twice. {_CURE_OF_REPEATS}",
        identical_rows,
    ),
    "time_order": Check(
        "Training knows the time that is tested. config.split.kind='time' cuts all users at one "
        "moment.",
        _time_order,
    ),
    "held_out_text": Check(
        "The table of items is the file of the log, so that the rows to be predicted bring the "
        "items, and their texts, into the corpus. config.data.item_rows='train' takes training "
        "rows alone; a table of items of its own may hold them all.",
        # Only where all rows of the log describe the items; see `audit`.
        lambda split, config: None,
    ),
}


def _message(findings: list[Finding], config: SplitConfig) -> str:
    """Returns the findings, the reason why each flatters the figures, and the option to accept
    them."""
    lines = [
        "the leakage audit refuses this split "
        f"(config.split.kind={config.kind!r}), whose figures would be too good:"
    ]
    for finding in findings:
        lines.append(f"  {finding.name}: {finding.message}. {FINDINGS[finding.name].reason}")
    # The line to copy: it keeps the findings that were accepted before.
    accept = config.accept_leakage + tuple(finding.name for finding in findings)
    lines.append(
        f"If the protocol at hand knowingly has it: config.split.accept_leakage={accept!r}."
    )
    return "\n".join(lines)


def _held_out_parts(split: Split) -> list[pa.Table]:
    """Returns the held-out parts that have rows, validation first."""
    return [rows for rows in (split.validation, split.test) if rows.num_rows]


def _as_mask(condition: pa.ChunkedArray) -> np.ndarray:
    """Returns an Arrow column of booleans as bool [N]; null is False."""
    return np.asarray(pc.fill_null(condition, False))


def _row_codes(rows: pa.Table) -> np.ndarray:
    """Numbers the (user, item, timestamp) of each row: int64 [N], equal if all three are."""
    # `codes` makes the numbers of pairs dense, so that the product below cannot overflow.
    pairs = codes(pa.chunked_array([pair_codes(rows)]))
    # Dense codes instead of seconds, which would leave no room for the pairs in 64 bits.
    times = codes(rows["timestamp"])
    return pairs * (times.max(initial=0) + 1) + times


def _find_repeats(
    name: str, split: Split, number_rows: Callable[[pa.Table], np.ndarray], consequence: str
) -> Finding | None:
    """Looks for held-out rows that occur in an earlier part too.

    Args:
        name: Kind of leakage.
        split: The parts of the log.
        number_rows: Function from rows to codes, int64 [N], that are equal for repeated rows.
        consequence: End of the sentence "3 of 10 held-out rows ...".
    """
    parts = _held_out_parts(split)
    if not parts:
        return None
    held_out = pa.concat_tables(parts)
    ids_and_time = ("user_id", "item_id", "timestamp")
    columns = [column for column in ids_and_time if column in held_out.column_names]
    # One numbering over all parts: codes of different tables cannot be compared.
    rows = pa.concat_tables([part.select(columns) for part in (split.train, *parts)])
    values = number_rows(rows)
    start = split.train.num_rows
    masks = []
    for part in parts:
        stop = start + part.num_rows
        # `values[:start]` are all earlier parts: test rows may repeat validation rows as well.
        masks.append(_occurs_in(values[start:stop], values[:start]))
        start = stop
    is_repeated = np.concatenate(masks)
    if not is_repeated.any():
        return None
    example = describe(held_out, int(is_repeated.argmax()))
    message = (
        f"{is_repeated.sum():,} of {held_out.num_rows:,} held-out rows {consequence}, for example "
        f"{example}"
    )
    return Finding(name, int(is_repeated.sum()), message, is_repeated)


def _occurs_in(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Marks the values that occur among others, which are many more: bool [N].

    It hashes `values` alone; `np.isin` sorts both, which is eight times slower.
    """
    wanted = pa.array(values)
    is_candidate = pc.is_in(pa.array(others), value_set=wanted)
    # The hash table of the second look-up then holds only those that can match.
    candidates = pa.array(others[np.asarray(is_candidate)])
    return np.asarray(pc.is_in(wanted, value_set=candidates))
