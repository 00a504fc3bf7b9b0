"""Runs side by side: every metric, the best of each, and what cannot be told from it.

Differences are paired: both figures are of the same queries, and both are resampled with the same
counts of users, which are drawn once for all metrics. Of thousands of users nearly every difference
is larger than chance; hence the effect size beside each, and p-values that are corrected for their
number.

Wilcoxon's and the sign test are left out on purpose: on metrics of recommendations, mostly ties and
zeros, they find differences that are none (Ihemelandu and Ekstrand, Inference at scale:
significance testing for large search and recommendation experiments, SIGIR 2023, arXiv 2305.02461).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twotower.core.errors import ConfigError
from twotower.evaluation.comparison.records import (
    Record,
    answers_note,
    check_alike,
    item_slice,
)
from twotower.evaluation.intervals import interval, resampled_means

ALPHA = 0.05  # share of false ones among the differences that are called real
MIN_USERS = 30  # fewer have no standard error that could be believed


@dataclasses.dataclass(frozen=True)
class QueryPart:
    """A part of the queries.

    Attributes:
        slice: Name of the division, such as "history"; "" for all queries.
        value: Value of its queries; "" for all.
    """

    slice: str = ""
    value: str = ""

    def __str__(self) -> str:
        return f"{self.slice}={self.value}" if self.slice else "all"


ALL = QueryPart()


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two runs in one metric over one part of the queries.

    Attributes:
        run: Name of the run.
        other: Name of the run that it is compared with.
        metric: Name of the metric, such as "recall@10".
        part: Queries that were asked of both.
        difference: Mean of `run` less that of `other`.
        low, high: Ends of its interval by resampling users.
        effect: Cohen's d_z: the mean over users of their difference, in its standard deviations.
        p_value: Chance of such a difference between equals, two-sided, by the standard error that
            the resamples have; 1 of fewer than `MIN_USERS` users.
        adjusted: The p-value by Benjamini and Hochberg over all differences of the comparison.
    """

    run: str
    other: str
    metric: str
    part: QueryPart
    difference: float
    low: float
    high: float
    effect: float
    p_value: float
    adjusted: float = 1.0

    @property
    def is_real(self) -> bool:
        """Whether the two can be told apart."""
        return self.adjusted < ALPHA


@dataclasses.dataclass(frozen=True)
class Row:
    """A metric of every run over one part of the queries.

    Attributes:
        metric: Name of the metric.
        part: Queries that are averaged.
        queries: Number of them; of a slice of items those with a right answer of it.
        users: Number of their users.
        figures: Name of a run -> its mean.
        best: Name of the run with the greatest.
        equals: Names of the others that cannot be told from it.
    """

    metric: str
    part: QueryPart
    queries: int
    users: int
    figures: Mapping[str, float]
    best: str
    equals: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A metric over the seeds of a training.

    Attributes:
        mean, deviation: Mean, and standard deviation of the seeds (n - 1).
        lowest, highest: Least and greatest.
        seeds: Number of seeds.
    """

    mean: float
    deviation: float
    lowest: float
    highest: float
    seeds: int


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Several runs, measured alike.

    Attributes:
        runs: Their names; the others are compared with the first.
        protocol: How they were measured.
        rows: Every metric over all queries, then over each slice.
        differences: Those of every two runs, the later less the earlier, in the order of `rows`.
        spreads: Name of a run of several seeds -> metric -> spread over the seeds. Intervals know
            nothing of it: they are of one training, or of the mean of several, over other users.
        notes: Sentences on what was left out.
    """

    runs: tuple[str, ...]
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    spreads: Mapping[str, Mapping[str, Spread]]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        # Without the hundreds of differences, which a notebook would print.
        return f"Comparison({', '.join(self.runs)}: {len(self.rows)} rows)"

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON holds it; an effect without a deviation is None."""
        found = dataclasses.asdict(self)
        for difference in found["differences"]:
            # JSON has no infinity, and other readers than Python's refuse it.
            if not math.isfinite(difference["effect"]):
                difference["effect"] = None
        return found


def compare_records(records: Sequence[Record], *, seed: int = 0) -> Comparison:
    """Compares what evaluations recorded.

    Args:
        records: At least two, of the same queries.
        seed: Seed of the resamples.

    Raises:
        ConfigError: There are fewer than two, two have one name, or they were not measured alike.
    """
    names = [record.name for record in records]
    if len(names) < 2:
        raise ConfigError(f"A comparison needs two runs or more; given: {', '.join(names) or '-'}.")
    # A run beside itself has differences of 0, which would be corrected for along with the others.
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"{repeated[0]} is given {len(repeated)} times; give other runs.")
    check_alike(records)
    metrics, notes = _shared_metrics(records)
    notes += answers_note(records)
    rows: list[Row] = []
    differences: list[Difference] = []
    divided = [(part, where, records) for part, where in parts_of(records[0])]
    for name in dict.fromkeys(itertools.chain.from_iterable(one.of_items for one in records)):
        pairs, reason = item_slice(records, name)
        if reason:
            notes.append(f"Left out: {reason}.")
        else:
            divided += [(part, where, pairs) for part, where in parts_of(pairs[0])[1:]]
    for part, where, of_part in divided:
        differences += differences_of(of_part, metrics, part, where, seed=seed)
        rows += _rows_of(of_part, metrics, part, where)
    # Over all parts and metrics at once: who looks at hundreds of differences finds some by chance.
    differences = adjust(differences)
    return Comparison(
        runs=tuple(names),
        protocol=records[0].protocol,
        rows=tuple(_mark(rows, differences)),
        differences=tuple(differences),
        spreads={record.name: _spreads(record, metrics) for record in records if record.seeds},
        notes=tuple(notes),
    )


def parts_of(record: Record) -> list[tuple[QueryPart, np.ndarray]]:
    """Returns all queries that were asked, then those of each value of each slice, bool [Q]."""
    parts = [(ALL, record.is_asked)]
    for name, values in record.slices.items():
        for value in _in_order(set(values[record.is_asked]) - {""}):
            parts.append((QueryPart(name, value), record.is_asked & (values == value)))
    # A mean over no query would be no number.
    return [(part, where) for part, where in parts if where.any()]


def _in_order(values: set[str]) -> list[str]:
    """Returns values by the numbers that they are, or that stand in them: "3 to 5", "11 to 20"."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values, key=_by_numbers)


def _by_numbers(value: str) -> list[str | int]:
    # Texts and numbers take turns, so that like is always compared with like.
    parts: list[str | int] = []
    for number, part in enumerate(re.split(r"(\d+)", value)):
        parts.append(int(part) if number % 2 else part)
    return parts


def differences_of(
    records: Sequence[Record],
    metrics: Sequence[str],
    part: QueryPart,
    where: np.ndarray,
    *,
    seed: int = 0,
) -> list[Difference]:
    """Returns the differences of every two records, without a correction for their number.

    Args:
        records: Records of the same queries.
        metrics: Names of metrics that all of them have.
        part: Name of the queries that are averaged.
        where: bool [Q], these queries.
        seed: Seed of the resamples.
    """
    # By user, since queries of one user go up and down together and are no independent draws.
    ids, owner = np.unique(records[0].users[where].astype(str), return_inverse=True)
    # Metrics of all runs beside each other: one set of counts weighs them all.
    values = np.stack([[record.values[name][where] for name in metrics] for record in records])
    flat = values.reshape(-1, len(owner)).T
    resamples = resampled_means(flat, owner, seed=seed)
    means = resamples.reshape(len(resamples), len(records), len(metrics))
    queries = np.bincount(owner)
    differences = []
    for earlier, later in itertools.combinations(range(len(records)), 2):
        by_query = values[later] - values[earlier]
        sampled = means[:, later] - means[:, earlier]
        # Of the differences of the resamples, not of each run's: what both share, hard users,
        # cancels out.
        low, high = interval(sampled)
        for number, metric in enumerate(metrics):
            # Each user counts once here, however many queries: the effect is one on people.
            by_user = np.bincount(owner, by_query[number]) / queries
            # Over queries, as the figures of both runs are.
            difference = float(by_query[number].mean())
            deviation = float(sampled[:, number].std())
            differences.append(
                Difference(
                    run=records[later].name,
                    other=records[earlier].name,
                    metric=metric,
                    part=part,
                    difference=difference,
                    low=float(low[number]),
                    high=float(high[number]),
                    effect=effect_size(by_user),
                    p_value=_p_value(difference, deviation, len(ids)),
                )
            )
    return differences


def effect_size(differences: np.ndarray) -> float:
    """Returns Cohen's d_z of paired differences, mean / standard deviation (n - 1).

    It is 0 where all are 0, and infinite where all are one other number.

    Cohen, Statistical power analysis for the behavioral sciences, 1988, section 2.3.5.

    >>> effect_size(np.array([0.0, 1.0, 2.0]))
    1.0
    """
    mean = float(differences.mean())
    if not mean:
        return 0.0
    deviation = 0.0
    if len(differences) > 1:
        deviation = float(differences.std(ddof=1))
    if not deviation:
        return math.copysign(math.inf, mean)
    return mean / deviation


def _p_value(difference: float, deviation: float, users: int) -> float:
    """Returns the two-sided p-value of a difference by its standard error.

    The share of resamples beyond 0 would be the same but for its coarseness: 1,000 of them know
    nothing below .002, which no correction for hundreds of comparisons would let pass.
    """
    if users < MIN_USERS or not difference:
        return 1.0
    if not deviation:
        return 0.0
    # The two-sided tail of the normal distribution, 2 (1 - Phi(z)).
    return math.erfc(abs(difference) / deviation / math.sqrt(2.0))


def adjust(differences: Sequence[Difference]) -> list[Difference]:
    """Returns the differences with p-values corrected for their number.

    Benjamini and Hochberg, Controlling the false discovery rate, JRSS B 1995.
    """
    # By hand: `scipy.stats`, which has it, takes longer to load than all else here.
    values = np.array([difference.p_value for difference in differences])
    order = np.argsort(values)
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    adjusted = np.empty(len(values))
    # Of greater p-values none may be corrected to less.
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    pairs = zip(differences, adjusted)
    return [dataclasses.replace(one, adjusted=float(value)) for one, value in pairs]


def _rows_of(
    records: Sequence[Record], metrics: Sequence[str], part: QueryPart, where: np.ndarray
) -> list[Row]:
    rows = []
    users = len(set(records[0].users[where]))
    for metric in metrics:
        figures = {record.name: float(record.values[metric][where].mean()) for record in records}
        # Of equal ones the first: it is told from none of them, and the row says so.
        best = max(figures, key=figures.__getitem__)
        rows.append(Row(metric, part, int(where.sum()), users, figures, best, ()))
    return rows


def _mark(rows: Sequence[Row], differences: Sequence[Difference]) -> list[Row]:
    """Returns the rows with the names of the runs that cannot be told from the best."""
    by_row: dict[tuple[str, QueryPart], list[Difference]] = {}
    for one in differences:
        by_row.setdefault((one.metric, one.part), []).append(one)
    marked = []
    for row in rows:
        equals = set()
        for one in by_row[row.metric, row.part]:
            if row.best in (one.run, one.other) and not one.is_real:
                equals |= {one.run, one.other}
        names = [name for name in row.figures if name in equals and name != row.best]
        marked.append(dataclasses.replace(row, equals=tuple(names)))
    return marked


def _shared_metrics(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Returns the metrics that all records have, and a note on the others."""
    # Runs may have been evaluated with other lists: what all have is compared.
    every = dict.fromkeys(itertools.chain.from_iterable(record.values for record in records))
    shared = [name for name in every if all(name in record.values for record in records)]
    if not shared:
        listed = "; ".join(f"{record.name} has {', '.join(record.values)}" for record in records)
        raise ConfigError(f"The runs share no metric: {listed}. Evaluate all with one --k.")
    others = [name for name in every if name not in shared]
    if not others:
        return shared, []
    return shared, [f"Left out, as not all runs have them: {', '.join(others)}."]


def _spreads(record: Record, metrics: Sequence[str]) -> dict[str, Spread]:
    spreads = {}
    for name in metrics:
        values = record.seeds[name]
        deviation = 0.0
        if len(values) > 1:
            deviation = float(values.std(ddof=1))
        spreads[name] = Spread(
            mean=float(values.mean()),
            deviation=deviation,
            lowest=float(values.min()),
            highest=float(values.max()),
            seeds=len(values),
        )
    return spreads
