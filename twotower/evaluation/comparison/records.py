"""What evaluations recorded of every query, and whether two of them measured the same thing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.errors import ConfigError, choose, echo
from twotower.core.install import command
from twotower.evaluation.metrics import RANKING_METRICS
from twotower.evaluation.queries import EARLIER_PARTS, TARGETS
from twotower.evaluation.query_table import (
    PROTOCOL_KEY,
    SLICE,
    item_slice_path,
    query_table_path,
)

MODEL = "model"  # ranking of a run's own towers
# Entries of a protocol that are the model's, or that say which figures there are: runs may differ
# in them.
OF_THE_MODEL = ("step", "dim", "ks")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """The figures of Q queries by one ranking, in the order of their users.

    Attributes:
        name: Name of the run as it was given, such as "runs/a" or "runs/a:ease".
        protocol: How the figures were measured.
        users: Id of the user of each query, Q texts.
        relevant: Number of right answers of each query, int [Q]; 0 where nothing was asked.
        values: Metric -> float64 [Q], the mean over seeds; NaN where nothing was asked.
        slices: Name of a division of the queries -> its value of each, Q texts; "" is none.
        seeds: Metric -> mean of each seed, float64 [S]; empty for a single run.
        answers: Hash of the right answers of each query, uint64 [Q]; None of an evaluation that
            recorded their number alone.
        of_items: Name of a slice of items -> the figures of each query and value of it, a record
            whose "queries" are these pairs and whose only division is the slice; empty of an
            evaluation that did not record them.
    """

    name: str
    protocol: Mapping[str, Any]
    users: np.ndarray
    relevant: np.ndarray
    values: Mapping[str, np.ndarray]
    slices: Mapping[str, np.ndarray]
    seeds: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    answers: np.ndarray | None = None
    of_items: Mapping[str, Record] = dataclasses.field(default_factory=dict)

    @property
    def is_asked(self) -> np.ndarray:
        """Whether a query has a right answer, so that it counts in the means, bool [Q]."""
        return self.relevant > 0


def read_record(name: str, split: str = "test") -> Record:
    """Reads what an evaluation recorded.

    Args:
        name: Folder of a run; or of the runs of `repeat`, whose seeds are averaged; with ":ease"
            and the like after it, a baseline that was measured beside the run.
        split: Split that was measured.

    Raises:
        ConfigError: Nothing was recorded there, or not of this baseline.
    """
    folder = Path(name)
    ranking = MODEL
    # A folder whose name has a colon is still a folder.
    if not folder.exists() and ":" in name:
        path, _, ranking = name.rpartition(":")
        folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{name} is no folder of a run.")
    seeds = sorted(folder.glob("seed-*"))
    if not seeds:
        return _read_tables(name, folder, ranking, split)
    # Baselines do not depend on the seed, and are measured with the first alone.
    if ranking != MODEL:
        return _read_tables(name, seeds[0], ranking, split)
    return _average([_read_tables(name, seed, ranking, split) for seed in seeds])


def _read_tables(name: str, workdir: Path, ranking: str, split: str) -> Record:
    """Reads the figures of the queries of a run, and those of its slices of items beside them."""
    path = query_table_path(workdir, split)
    if not path.exists():
        # With baselines, which the next comparison may name.
        flags = [f"--workdir={workdir}", "--baselines"]
        flags += _flags_of(split)
        raise ConfigError(
            f"{workdir} has no {path.relative_to(workdir)}: it was not evaluated. "
            f"Evaluate it first: {command('evaluate', *flags)}"
        )
    record = _read_table(name, path, ranking)
    beside = item_slice_path(workdir, split)
    # Of evaluations before there was such a file, or of a test set of which none is asked for.
    if not beside.exists():
        return record
    cells = _read_table(name, beside, ranking, record.protocol)
    of_items = {}
    for part in dict.fromkeys(cells.slices["slice"]):
        where = cells.slices["slice"] == part
        of_items[part] = dataclasses.replace(
            cells,
            users=cells.users[where],
            relevant=cells.relevant[where],
            values={metric: column[where] for metric, column in cells.values.items()},
            slices={part: cells.slices["value"][where]},
        )
    return dataclasses.replace(record, of_items=of_items)


def _read_table(
    name: str, path: Path, ranking: str, protocol: Mapping[str, Any] | None = None
) -> Record:
    """Reads a table of queries, or of the pairs of slices of items, which has no protocol."""
    try:
        table = pq.read_table(path)
        names = ["user", "query"]
        if protocol is not None:
            names += ["slice", "value"]
        protocol = protocol or json.loads((table.schema.metadata or {})[PROTOCOL_KEY])
        assert protocol is not None, "JSON of an evaluation is a mapping"
        # By users, not in the order of a table that another run may have read otherwise.
        table = table.sort_by([(column, "ascending") for column in names])
        users = table["user"].to_numpy(zero_copy_only=False)
        relevant = table["relevant"].to_numpy()
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} is not as an evaluation writes it ({error}). Evaluate again."
        ) from None
    values: dict[str, np.ndarray] = {}
    rankings: dict[str, None] = {}
    slices: dict[str, np.ndarray] = {}
    answers = None
    for column in table.column_names:
        start, _, metric = column.rpartition("/")
        if column.startswith(SLICE) or column in ("slice", "value"):
            texts = table[column].cast(pa.string()).fill_null("")
            slices[column.removeprefix(SLICE)] = texts.to_numpy(zero_copy_only=False)
        elif column == "answers":
            answers = table[column].to_numpy()
        # Other columns hold facts of the queries, and none of a ranking.
        elif metric.partition("@")[0] in RANKING_METRICS:
            rankings[start] = None
            if start == ranking:
                floats = table[column].cast(pa.float64())
                values[metric] = floats.to_numpy(zero_copy_only=False)
    if ranking not in rankings:
        choose(rankings, ranking, f"the ranking of {name}")
    return Record(name, protocol, users, relevant, values, slices, answers=answers)


def _flags_of(name: str) -> list[str]:
    """Returns the flags of the evaluation whose figures are kept under a name."""
    flags = []
    start, _, targets = name.rpartition("_")
    if targets in TARGETS:
        flags.append(f"--targets={targets}")
        name = start
    if name in EARLIER_PARTS:
        return flags if name == "test" else [f"--split={name}", *flags]
    return ["--test=FILE", f"--test_name={name}", *flags]


def _average(records: Sequence[Record]) -> Record:
    """Returns the means over seeds of every query, with the mean of each seed beside them."""
    first = records[0]
    # Folders of seeds may be older than a change of the data.
    check_alike(records)
    values = {}
    seeds = {}
    for metric in first.values:
        stacked = np.stack([record.values[metric] for record in records])
        values[metric] = stacked.mean(0)
        if first.is_asked.any():
            seeds[metric] = stacked[:, first.is_asked].mean(1)
    # Those that all seeds have and divide alike.
    of_items = {
        part: _average(pairs) for part in first.of_items if (pairs := item_slice(records, part)[0])
    }
    return dataclasses.replace(first, values=values, seeds=seeds, of_items=of_items)


def answers_note(records: Sequence[Record]) -> list[str]:
    """Returns what is said where the right answers of records are compared by their numbers."""
    unknown = [record.name for record in records if record.answers is None]
    if not unknown:
        return []
    return [
        f"The right answers are compared by their numbers alone, as {', '.join(unknown)} recorded "
        "no more: evaluate again to have the answers themselves compared."
    ]


def check_alike(records: Sequence[Record]) -> None:
    """Refuses records that are not of the same queries by the same protocol.

    Raises:
        ConfigError: They differ; the message names both values of the first that do.
    """
    first = records[0]
    for other in records[1:]:
        # The protocol first: other rules explain other queries, and are what to mend.
        differences = _protocol_differences(first.protocol, other.protocol)
        if not differences:
            differences = _query_differences(first, other)
        if differences:
            raise ConfigError(
                f"{first.name} and {other.name} were not measured alike: "
                f"{'; '.join(differences)}. Evaluate both with the same flags on the same data."
            )


def _protocol_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    differences = []
    for key in dict.fromkeys([*one, *other]):
        if key in OF_THE_MODEL or one.get(key) == other.get(key):
            continue
        differences.append(f"{key} is {echo(one.get(key))} and {echo(other.get(key))}")
    return differences


def _query_differences(one: Record, other: Record) -> list[str]:
    if len(one.users) != len(other.users):
        return [f"{len(one.users):,} and {len(other.users):,} queries"]
    # Both are sorted by user, so that equal sets of queries lie row by row.
    is_other_user = one.users != other.users
    if is_other_user.any():
        row = int(is_other_user.argmax())
        number = int(is_other_user.sum())
        pair = f"{echo(one.users[row])} and {echo(other.users[row])}"
        return [f"{number:,} queries are of other users, the first {pair}"]
    is_changed = one.relevant != other.relevant
    if is_changed.any():
        row = int(is_changed.argmax())
        answers = f"{one.relevant[row]} and {other.relevant[row]}"
        return [_changed_answers(one, is_changed, f"with {answers}")]
    # Two test sets of like sizes differ in these alone. Evaluations of before recorded none.
    if one.answers is not None and other.answers is not None:
        is_changed = one.answers != other.answers
        if is_changed.any():
            return [_changed_answers(one, is_changed, "with as many of other items")]
    return []


def item_slice(records: Sequence[Record], name: str) -> tuple[list[Record], str]:
    """Returns what records have of a slice of items, if the pairs of all are the same.

    Args:
        records: Records of the same queries.
        name: Name of the slice.

    Returns:
        The records of its pairs; or none, and why: "b has no figures of the slice items".
    """
    found = []
    for record in records:
        if name not in record.of_items:
            return [], (
                f"{record.name} has no figures of the slice {name}: evaluate it again, with "
                f"--slices={name} if it is a column"
            )
        found.append(record.of_items[name])
    for other in found[1:]:
        one = found[0]
        # Popularity and what is cold go by the training rows, which may differ.
        is_same = len(one.users) == len(other.users) and all(
            (mine == theirs).all()
            for mine, theirs in (
                (one.users, other.users),
                (one.slices[name], other.slices[name]),
                (one.relevant, other.relevant),
            )
        )
        if not is_same:
            return [], (
                f"{one.name} and {other.name} divide the items otherwise by {name}: their "
                "training rows or their tables of items differ"
            )
    return found, ""


def _changed_answers(record: Record, is_changed: np.ndarray, how: str) -> str:
    row = int(is_changed.argmax())
    return (
        f"{int(is_changed.sum()):,} queries have other right answers, the first that of user "
        f"{echo(record.users[row])} {how}"
    )
