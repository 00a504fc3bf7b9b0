"""The report of the data of a run, made of what was read for it, and the refusal of data that can
only be a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from twotower.config import Config
from twotower.core.arrow import is_list, pc, plain_text
from twotower.core.codes import count_distinct
from twotower.core.errors import ConfigError
from twotower.data.dataset import Dataset
from twotower.data.interactions import PARTS, Split, has_timestamps, timestamps
from twotower.data.report import DataReport, HeldOut, describe_unreachable, format_share
from twotower.data.split import cure_without_order
from twotower.features.base import Feature
from twotower.features.categorical import StringsFeature
from twotower.features.spec import FeatureSpec
from twotower.pipeline.labels import read_labels

# Share of the held-out answers outside of the corpus, or of items of which nothing is known, from
# which on it is said first.
MANY = 0.1
# Held-out rows from which on it is no chance that none of them can be found.
CERTAIN = 20
# Share of the rows from which on nearly every row has a user, or an item, of its own.
NEARLY_ALL = 0.9
# Share of the weight that the heaviest hundredth of the rows may hold unsaid.
HEAVY = 0.1
# Rows by which the kinds of events are told, and kinds that are listed.
SAMPLE = 100_000
LISTED = 5
# Separators that lists written as text may have.
SEPARATORS = ("|", ";", ",", "/")


def check_log(rows: pa.Table, accept: Sequence[str]) -> None:
    """Refuses a log of one user or of one item.

    Args:
        rows: All interactions that the filters keep.
        accept: Option `config.data.accept`.

    Raises:
        ConfigError: All rows are of one user, or of one item.
    """
    for side in ("user", "item"):
        ids = rows[f"{side}_id"]
        if _is_constant(ids):
            refuse_one_id(side, ids[0].as_py(), len(rows), accept)


def refuse_one_id(side: str, value: str, rows: int, accept: Sequence[str]) -> None:
    """Refuses a log of one user or of one item, unless that is accepted.

    Args:
        side: "user" or "item".
        value: The one id.
        rows: Number of rows.
        accept: Option `config.data.accept`.

    Raises:
        ConfigError: It is not accepted.
    """
    _refuse(
        f"one_{side}",
        f"all {rows:,} rows have {side}_id={value!r}: with one {side} there is nothing to tell "
        f"apart. Name the column of the {side}s by "
        f"config.data.interactions.columns={{'{side}_id': ...}}, or let config.data.where keep "
        "more rows",
        accept,
    )


def list_separators(spec: FeatureSpec) -> dict[str, str]:
    """Returns the columns that features read as lists in texts, with the text between members."""
    separators = {}
    for feature in spec:
        if isinstance(feature, StringsFeature) and feature.separator:
            separators[feature.column] = feature.separator
    return separators


def check_times(config: Config, spec: FeatureSpec, rows: pa.Table) -> None:
    """Refuses to divide a log without times by time, with all that is to be changed for it.

    Args:
        config: Configuration of the run.
        spec: Features of the run.
        rows: All interactions that the filters keep.

    Raises:
        ConfigError: The split is by time and the rows have none.
    """
    # The split itself would refuse next, but names neither the features nor all options at once.
    if config.split.kind != "time" or has_timestamps(rows):
        return
    readers = []
    for name, feature in spec.user.items():
        if "timestamp" in feature.columns_read:
            readers.append(f"config.features.user[{name!r}]")
    cure = cure_without_order(rows)
    if readers:
        cure += f", and leave out {', '.join(readers)}, which reads the time"
    raise ConfigError(
        "config.split.kind='time' needs a column 'timestamp', and the log has none. If a column "
        "holds the time, name it by config.data.interactions.columns={'timestamp': ...}; for a log "
        f"without times {cure}."
    )


def describe_data(
    config: Config,
    spec: FeatureSpec,
    dataset: Dataset,
    parts: Split,
    users: Sequence[np.ndarray],
    items: Sequence[np.ndarray],
) -> DataReport:
    """Returns the report of the data.

    Args:
        config: Configuration of the run.
        spec: Features of the run.
        dataset: The log, with its items restricted to the corpus.
        parts: Parts of the log.
        users: Row of `dataset.users` for each row of train, validation and test, int32 [N] each.
        items: Row of `dataset.items` likewise, -1 where the item is not in the corpus.

    Raises:
        ConfigError: No held-out answer can be found, which is not accepted.
    """
    numbers = _Numbers(config, dataset, parts, users, items)
    return describe_numbers(config, spec, dataset, numbers, parts.train)


def describe_numbers(
    config: Config, spec: FeatureSpec, dataset: Dataset, numbers: LogNumbers, train: pa.Table
) -> DataReport:
    """Returns the report of data whose rows were counted.

    Args:
        config: Configuration of the run.
        spec: Features of the run.
        dataset: The log, with its items restricted to the corpus; of its rows none is read.
        numbers: Counts of the rows.
        train: Training rows, with the columns that features read.

    Raises:
        ConfigError: No held-out answer can be found, which is not accepted.
    """
    held_out = {}
    for part in (1, 2):
        answers = numbers.held_out(part)
        # A part without a positive row asks for nothing; evaluation says so when it is measured.
        if answers is not None:
            held_out[PARTS[part]] = answers
    # Before the refusal, which gives them as its reasons.
    of_ids = list(_describe_ids(numbers))
    _check_answers(config, held_out, dataset.has_catalogue, of_ids)
    warnings = [
        *_describe_answers(held_out, spec, dataset.has_catalogue),
        *of_ids,
        # Ids in two forms, though most match.
        *(match.describe() for match in dataset.matches if match.cause),
        *_describe_features(spec, dataset, train),
        *dataset.warnings,
    ]
    first, last = numbers.time_range()
    return DataReport(
        warnings=tuple(warnings),
        rows=sum(numbers.part_rows),
        users=numbers.num_users,
        items=numbers.num_items,
        corpus=len(dataset.items),
        first_time=first,
        last_time=last,
        dropped=dataset.dropped,
        matches=dataset.matches,
        repeats=numbers.count_repeats(),
        split=config.split.kind,
        parts=dict(zip(PARTS, numbers.part_rows)),
        held_out=held_out,
        notes=(*dataset.notes, *_describe_values(config, spec, numbers)),
    )


class LogNumbers(Protocol):
    """Counts of the rows of a log that is divided, however these are held.

    Attributes:
        num_rows: Number of rows that the filters keep.
        part_rows: Number of rows of train, validation and test.
        num_users: Number of users that have rows.
        num_items: Number of items that have rows.
        columns: Columns of the rows.
    """

    num_rows: int
    part_rows: Sequence[int]
    num_users: int
    num_items: int
    columns: Sequence[str]

    def held_out(self, part: int) -> HeldOut | None:
        """Returns what can be predicted of the rows of a part; None where there are none.

        Args:
            part: Number of the part.
        """
        ...

    def count_repeats(self) -> int:
        """Returns the number of rows whose user and item another row before them has."""
        ...

    def time_range(self) -> tuple[int | None, int | None]:
        """Returns the earliest and the latest time; None in a log without times."""
        ...

    def heaviest_share(self) -> float:
        """Returns the share of the weight that the heaviest hundredth of the rows hold."""
        ...

    def first_kinds(self) -> list[str | None]:
        """Returns the kinds of events of the first `SAMPLE` rows."""
        ...


class _Numbers:
    """Users and items of the parts as numbers, by which all is counted without hashing texts.

    It is the `LogNumbers` of rows in memory.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        parts: Split,
        users: Sequence[np.ndarray],
        items: Sequence[np.ndarray],
    ):
        self._config = config
        self._rows = dataset.interactions
        self._tables = parts.tables
        self.num_rows = len(self._rows)
        self.part_rows: Sequence[int] = [len(table) for table in parts.tables]
        self.columns: Sequence[str] = self._rows.column_names
        self._users = users
        corpus = len(dataset.items)
        # Items outside of the corpus get numbers behind it; no training row has one.
        outside: list[pa.ChunkedArray] = []
        for table, item in zip(self._tables, items):
            is_outside = np.flatnonzero(item < 0)
            outside.append(plain_text(table["item_id"].take(pa.array(is_outside))))
        ids = pa.chunked_array(
            [chunk for column in outside for chunk in column.chunks], pa.string()
        )
        # Over all parts: one item that two parts hold out is one item.
        distinct = pc.unique(ids)
        self._items = []
        for item, column in zip(items, outside):
            numbers = item
            # No training row has one, so that the longest part is not copied.
            if len(column):
                # int32, as rows of tables are: eight bytes a row would be felt in a long log.
                numbers = item.copy()
                absent = pc.index_in(column, value_set=distinct).to_numpy()
                numbers[item < 0] = corpus + absent
            self._items.append(numbers)
        self._corpus = corpus
        self._range = corpus + len(distinct)
        rows_of_users = [np.bincount(user, minlength=len(dataset.users)) for user in users]
        rows_of_items = [np.bincount(item, minlength=self._range) for item in self._items]
        # Of training alone, by which users and items are new.
        self._rows_of_user = rows_of_users[0]
        self._rows_of_item = rows_of_items[0]
        self.num_users = int(np.count_nonzero(sum(rows_of_users)))
        self.num_items = int(np.count_nonzero(sum(rows_of_items)))

    def held_out(self, part: int) -> HeldOut | None:
        """See `LogNumbers`; rows in which a user did not want the item do not count."""
        positive = _positives(self._config, self._tables[part])
        if not positive.any():
            return None
        users = self._users[part][positive]
        items = self._items[part][positive]
        is_outside = items >= self._corpus
        if self._config.evaluation.query == "user":
            # Of several rows with one user and item, one answer is right; see `make_queries`.
            pairs = np.sort(users * np.int64(self._range) + items)
            pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
            query_of_answer = pairs // self._range
            is_found = pairs % self._range < self._corpus
        else:
            # Each row is a query of its own.
            query_of_answer = np.arange(len(users))
            is_found = ~is_outside
        answers = np.bincount(query_of_answer)
        found = np.bincount(query_of_answer, weights=is_found)
        has_answers = answers > 0
        # Numbers of users have gaps: not everybody is held out.
        recall = found[has_answers] / answers[has_answers]
        return HeldOut(
            rows=len(users),
            outside_corpus=int(is_outside.sum()),
            new_items=int((self._rows_of_item[items] == 0).sum()),
            new_users=int((self._rows_of_user[users] == 0).sum()),
            greatest_recall=float(recall.mean()),
        )

    def count_repeats(self) -> int:
        """See `LogNumbers`."""
        # One array for all rows, filled in place: the log is the largest thing in memory here.
        pairs = np.empty(sum(map(len, self._users)), np.int64)
        start = 0
        for user, item in zip(self._users, self._items):
            part = pairs[start : start + len(user)]
            np.multiply(user, self._range, out=part, dtype=np.int64)
            part += item
            start += len(user)
        # Sorted in place of hashed, which takes a tenth of the time.
        pairs.sort()
        return int((pairs[1:] == pairs[:-1]).sum())

    def time_range(self) -> tuple[int | None, int | None]:
        """See `LogNumbers`."""
        if timestamps(self._rows) is None:
            return None, None
        ends = pc.min_max(self._rows["timestamp"]).as_py()
        return ends["min"], ends["max"]

    def heaviest_share(self) -> float:
        """See `LogNumbers`."""
        weights = np.sort(pc.fill_null(self._rows["weight"], 1.0).to_numpy())
        heaviest = weights[len(weights) - max(len(weights) // 100, 1) :]
        return float(heaviest.sum() / max(weights.sum(), 1e-30))

    def first_kinds(self) -> list[str | None]:
        """See `LogNumbers`."""
        # Of some rows: all of them would take longer to count than the rest of the report.
        return pc.unique(self._rows["event"][:SAMPLE]).to_pylist()


def _positives(config: Config, rows: pa.Table) -> np.ndarray:
    label = config.objective.label
    if not label:
        return np.ones(len(rows), bool)
    return read_labels(rows, {label: "config.objective.label"})[label] == 1


def _check_answers(
    config: Config, held_out: Mapping[str, HeldOut], has_item_table: bool, reasons: Sequence[str]
) -> None:
    """Refuses held-out rows none of which can be found, with the reasons that are known."""
    for part, rows in held_out.items():
        if rows.outside_corpus == rows.rows >= CERTAIN:
            words = _describe_outside(part, rows, has_item_table)
            sentences = " ".join([*reasons, words]).removesuffix(".")
            _refuse("nothing_to_find", sentences, config.data.accept)


def _describe_outside(part: str, rows: HeldOut, has_item_table: bool) -> str:
    return describe_unreachable(
        rows.outside_corpus,
        rows.rows,
        rows.greatest_recall,
        part=part,
        has_item_table=has_item_table,
    )


def _describe_answers(
    held_out: Mapping[str, HeldOut], spec: FeatureSpec, has_item_table: bool
) -> Iterator[str]:
    """Yields sentences on held-out answers that cannot be found, or hardly."""
    # Test first: its figures are those that are reported. The cure is the same for both parts, and
    # each has a line of the report.
    for part, rows in reversed(list(held_out.items())):
        if rows.share(rows.outside_corpus) >= MANY:
            yield _describe_outside(part, rows, has_item_table)
            break
        if rows.share(rows.new_items) >= MANY and not _describes_items(spec):
            share = format_share(rows.new_items, rows.rows)
            yield (
                f"{share} of the {part} answers are items that no training row has, and the "
                "features of items hold their id alone: they are found by chance. Give columns of "
                "the item table as config.features.item."
            )
            break
    rows = held_out.get("test") or held_out.get("validation")
    if rows and rows.share(rows.new_users) >= 0.99:
        yield (
            f"{format_share(rows.new_users, rows.rows)} of the {rows.rows:,} held-out rows are of "
            "users without a training row: nothing that was learned of a user serves there, and "
            "item-kNN and EASE find nothing. If user_id is a basket, an order or a session, name "
            "the customer's column by config.data.interactions.columns={'user_id': ...}, or split "
            "by config.split.kind='leave_last_out'."
        )


def _describes_items(spec: FeatureSpec) -> bool:
    """Returns whether a feature tells of an item more than its id."""
    return any(feature.columns_read != ("item_id",) for feature in spec.item.values())


def _describe_ids(numbers: LogNumbers) -> Iterator[str]:
    counts = {"user": numbers.num_users, "item": numbers.num_items}
    meanings = {
        "user": "of most users nothing is known but one row",
        "item": "no two users share an item, so that nothing is learned of one by the other",
    }
    for side, count in counts.items():
        # An id of nearly every row is mostly the wrong column.
        if count >= NEARLY_ALL * numbers.num_rows:
            yield (
                f"{numbers.num_rows:,} rows have {count:,} different {side}s: {meanings[side]}. If "
                f"{side}_id numbers the rows, orders or visits, name another column by "
                f"config.data.interactions.columns={{'{side}_id': ...}}."
            )


def _describe_features(spec: FeatureSpec, dataset: Dataset, train: pa.Table) -> Iterator[str]:
    """Yields sentences on features that tell nothing apart."""
    for feature in spec:
        # It reads events and no column of a table.
        if feature is spec.history:
            continue
        for name in feature.columns_read:
            column = _find_column(feature, name, dataset, train)
            if column is None or not len(column):
                continue
            field = f"config.features.{feature.side}.{feature.name}"
            if column.null_count == len(column):
                yield f"{field}: the column {name!r} has no value in any row. Leave it out."
            # Lists do not compare, and one list for all is rarer than a constant.
            elif not is_list(column.type) and _is_constant(column):
                yield (
                    f"{field}: the column {name!r} is {column[0].as_py()!r} in all "
                    f"{len(column):,} rows and tells nothing apart. Leave the feature out."
                )
            elif isinstance(feature, StringsFeature) and feature.separator:
                yield from _describe_separator(field, name, column, feature.separator)


def _find_column(
    feature: Feature, name: str, dataset: Dataset, train: pa.Table
) -> pa.ChunkedArray | None:
    """Returns the column that a feature reads, as the encoder finds it."""
    table = dataset.items
    if feature.side == "user":
        table = dataset.users
        # A column of the log, where the users table has none of the name.
        if name not in table.column_names:
            table = train
    if name not in table.column_names:
        return None
    return table[name]


def _is_constant(column: pa.ChunkedArray) -> bool:
    """Returns whether all values are equal, of which none is missing."""
    if column.null_count or not len(column):
        return False
    # Most columns end at a second value that differs.
    if len(column) > 1 and column[0].as_py() != column[1].as_py():
        return False
    if pa.types.is_dictionary(column.type):
        return count_distinct(column) == 1
    return bool(pc.all(pc.equal(column, column[0])).as_py())


def _describe_separator(
    field: str, name: str, column: pa.ChunkedArray, separator: str
) -> Iterator[str]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    # One list is enough: most items may have a single member.
    if pc.any(pc.match_substring(column, separator)).as_py():
        return
    example = column.drop_null()[0].as_py()
    cure = f"The first is {example!r}: if it is a list, name its separator"
    for other in SEPARATORS:
        if pc.any(pc.match_substring(column, other)).as_py():
            cure = f"Texts hold {other!r}: set {field}.separator={other!r}, if it divides the lists"
            break
    yield (
        f"{field}.separator={separator!r} occurs in no text of the column {name!r}, so that each "
        f"text is one value. {cure}."
    )


def _describe_values(config: Config, spec: FeatureSpec, numbers: LogNumbers) -> Iterator[str]:
    """Yields sentences on what columns of the log with a name of ours do, or do not do."""
    objective = config.objective
    # All that reads a column of the log by its name, or a condition on it.
    used = {condition[0] for condition in config.data.where}
    used |= {objective.label, *(head.label for head in objective.heads.values())}
    used |= {name for feature in spec.user.values() for name in feature.columns_read}
    if "weight" in numbers.columns:
        yield _describe_weights(numbers.heaviest_share())
    cures = {
        "rating": "config.data.where=(('rating', '>=', ...),) keeps some of them",
        "label": "config.objective.label='label' tells those with 0 apart",
    }
    for name, cure in cures.items():
        if name in numbers.columns and name not in used:
            yield f"The column {name!r} is not read: each row counts as liked. {cure}."
    if "event" in numbers.columns and not config.data.event_weights and "event" not in used:
        kinds = numbers.first_kinds()
        if len(kinds) > 1:
            listed = ", ".join(f"{kind!r}" for kind in kinds[:LISTED])
            yield (
                f"Events of all kinds ({listed}) count alike; "
                "config.data.event_weights weighs them."
            )


def _describe_weights(share: float) -> str:
    # A few rows with most of the weight are mostly a mistake of units, and train like so few rows.
    line = "The column 'weight' multiplies the loss of each row"
    if share > HEAVY:
        line += f": the heaviest 1% of the rows hold {share:.0%} of it"
    return f"{line}."


def _refuse(finding: str, words: str, accept: Sequence[str]) -> None:
    """Refuses the data for a finding that is not accepted.

    Args:
        finding: Name of the finding.
        words: Sentence without its full stop: what was found and what to do.
        accept: Option `config.data.accept`.
    """
    if finding in accept:
        return
    accepted = (*accept, finding)
    raise ConfigError(f"{words}. If the data is right so: config.data.accept={accepted!r}.")
