"""The gate: whether a candidate may take the place of a run, and whether that can be judged at all.

A check fails where the whole interval of the difference lies below -tolerance, passes where none of
it does, and is undecided between. Before the candidate is looked at, the same checks judge models
whose worth is known. If one of these comes through, the gate refuses to judge: it would let
anything through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twotower.core.errors import ConfigError, choose, did_you_mean, echo
from twotower.core.files import read_json
from twotower.evaluation.comparison.compare import ALL, QueryPart, differences_of, parts_of
from twotower.evaluation.comparison.records import (
    Record,
    answers_note,
    check_alike,
    item_slice,
)
from twotower.evaluation.metrics import ranking_figures

GateVerdict = Literal["passes", "fails", "undecided"]
EXIT_CODES: Mapping[GateVerdict, int] = {"passes": 0, "fails": 1, "undecided": 2}
DEFAULT_METRICS = ("recall", "ndcg")
DEFAULT_SHARE = 0.05
TENTH = 0.1
# Of the training: a first validation later than this says nothing of a tenth of it.
LATEST_VALIDATION = 0.25
DEGRADED = 0.8  # share of right answers that an undertrained model keeps where no curve says more


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The loss of a metric over one part of the queries that is put up with.

    Attributes:
        metric: Name of the metric.
        part: Queries that are averaged.
        tolerance: Loss, in the metric's own unit.
        share: Loss as a share of the figure of the run that stands; it counts where `tolerance` is
            None.
    """

    metric: str
    part: QueryPart
    tolerance: float | None
    share: float = DEFAULT_SHARE

    def loss(self, figure: float) -> float:
        """Returns the greatest loss from the figure of the run that stands."""
        if self.tolerance is not None:
            return self.tolerance
        return self.share * figure


@dataclasses.dataclass(frozen=True)
class Check:
    """One threshold, judged.

    Attributes:
        metric, part: Metric, and queries or right answers of items.
        standing: Figure of the run that stands.
        candidate: Figure of the candidate.
        low, high: Ends of the interval of candidate less standing.
        tolerance: Loss that is put up with.
        verdict: Result.
    """

    metric: str
    part: QueryPart
    standing: float
    candidate: float
    low: float
    high: float
    tolerance: float
    verdict: GateVerdict


@dataclasses.dataclass(frozen=True)
class PreflightTrial:
    """A model of known worth, judged before the candidate.

    Attributes:
        name: Description of the model, the subject of a sentence.
        expected: Verdict that a gate must come to.
        verdict: Verdict that it came to.
    """

    name: str
    expected: GateVerdict
    verdict: GateVerdict


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The result of a gate.

    Attributes:
        standing: Name of the run that stands.
        candidate: Name of the run that would take its place.
        verdict: The worst of the checks; "undecided" where the gate refuses to judge.
        checks: Thresholds, judged.
        preflight: Models of known worth.
        refusal: Sentence on why nothing can be judged; empty where it can.
        notes: Sentences on what was compared less closely than it could be.
    """

    standing: str
    candidate: str
    verdict: GateVerdict
    checks: tuple[Check, ...]
    preflight: tuple[PreflightTrial, ...]
    refusal: str = ""
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Status for a shell: 0 passes, 1 fails, 2 undecided."""
        return EXIT_CODES[self.verdict]


def read_thresholds(content: Mapping[str, Any], record: Record) -> list[Threshold]:
    """Reads thresholds, and refuses every name that there is not.

    Args:
        content: {"recall@10": {"tolerance": 0.005}, "slices": {"users=cold": {"recall@10":
            {"share": 0.1}}}}. A slice without a value means each of its values.
        record: Record of the run that stands, whose metrics and slices these must be.

    Raises:
        ConfigError: A metric, a slice, a value or a key is unknown, or a number out of range.
    """
    thresholds = _of_part(content, [ALL], record, "")
    parts = [part for part, _ in parts_of(record) if part != ALL]
    for pairs in record.of_items.values():
        parts += [part for part, _ in parts_of(pairs) if part != ALL]
    for name, of_slice in _mapping(content.get("slices", {}), "slices").items():
        found = [part for part in parts if name in (part.slice, str(part))]
        if not found:
            known = [*record.slices, *record.of_items, *map(str, parts)]
            raise ConfigError(_unknown_slice(name, known, record))
        thresholds += _of_part(of_slice, found, record, f"slices.{name}.")
    if not thresholds:
        raise ConfigError(
            'The thresholds name no metric. Write {"recall@10": {"tolerance": 0.005}}.'
        )
    return thresholds


def _unknown_slice(name: str, known: Sequence[str], record: Record) -> str:
    """Returns what is said of a slice that no query, and no right answer, is of."""
    # Its evaluation is older than the file that has them; "users=cold" is spelt like "items=cold".
    is_old = name.startswith("item") and not record.of_items
    hint = "." if is_old else did_you_mean(name, known)
    told = (
        f"the slice of the thresholds={name!r} is not known{hint} Known: "
        f"{', '.join(sorted(set(known)))}."
    )
    if is_old:
        told += f" {record.name} recorded no slices of items: evaluate it again to have them."
    return told


def default_thresholds(record: Record) -> list[Threshold]:
    """Returns those of recall and NDCG at the shortest lists, a twentieth of the figure each."""
    # The shortest lists are what people see.
    shortest = min(int(metric.partition("@")[2]) for metric in record.values)
    names = [f"{name}@{shortest}" for name in DEFAULT_METRICS]
    return [Threshold(name, ALL, None) for name in names if name in record.values]


def _of_part(
    content: Any, parts: Sequence[QueryPart], record: Record, prefix: str
) -> list[Threshold]:
    thresholds = []
    for metric, limits in _mapping(content, prefix or "the file").items():
        # Beside the metrics in the file, and only there.
        if metric == "slices" and not prefix:
            continue
        choose(record.values, metric, "the metric of the thresholds")
        name = f"{prefix}{metric}"
        limits = _mapping(limits, name)
        for key in limits:
            choose({"tolerance": 0, "share": 0}, key, f"the key of {name}")
        # Of both, the one that was not meant might decide.
        if len(limits) != 1:
            raise ConfigError(f"{name} must have either a tolerance or a share, not {limits}.")
        ((key, value),) = limits.items()
        # True is a number in Python, and no tolerance.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{name}.{key}={echo(value)} must be a number from 0 to below 1.")
        for part in parts:
            if key == "tolerance":
                thresholds.append(Threshold(metric, part, float(value)))
            else:
                thresholds.append(Threshold(metric, part, None, float(value)))
    return thresholds


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"The thresholds: {name} is {echo(value)}, and must be a mapping.")
    return value


def judge(
    standing: Record,
    candidate: Record,
    thresholds: Sequence[Threshold],
    *,
    undertrained: tuple[str, Record] | None = None,
) -> Judgement:
    """Judges a candidate, if models of known worth are told from each other.

    Args:
        standing: Record of the run that stands.
        candidate: Record of the run that would take its place.
        thresholds: Losses that are put up with.
        undertrained: Description and record of a model of a tenth of the training; None makes one
            of a fifth of wrong answers.

    Raises:
        ConfigError: The two were not measured alike, or the candidate lacks a metric.
    """
    check_alike([standing, candidate])
    for threshold in thresholds:
        choose(candidate.values, threshold.metric, f"the metric of {candidate.name}")
    checks = check(standing, candidate, thresholds)
    # By the same thresholds, over the same queries: what a gate cannot tell among models of known
    # worth, it cannot tell of the candidate.
    preflight = []
    for name, record, expected in _known_models(standing, undertrained):
        verdict = worst(check(standing, record, thresholds))
        preflight.append(PreflightTrial(name, expected, verdict))
    wrong = [trial for trial in preflight if trial.verdict != trial.expected]
    verdict = worst(checks)
    refusal = ""
    if wrong:
        # Also where the candidate fails: a gate that is blind may be wrong in either direction.
        verdict = "undecided"
        refusal = _refusal(wrong[0], int(standing.is_asked.sum()))
    return Judgement(
        standing=standing.name,
        candidate=candidate.name,
        verdict=verdict,
        checks=tuple(checks),
        preflight=tuple(preflight),
        refusal=refusal,
        notes=tuple(answers_note([standing, candidate])),
    )


def check(standing: Record, candidate: Record, thresholds: Sequence[Threshold]) -> list[Check]:
    """Returns every threshold, judged, in their order."""
    asked = {part: (prefix, (standing, candidate)) for part, prefix in parts_of(standing)}
    by_part: dict[QueryPart, list[Threshold]] = {}
    for threshold in thresholds:
        by_part.setdefault(threshold.part, []).append(threshold)
    checks = []
    for part, of_part in by_part.items():
        if part not in asked:
            asked |= _pairs_of(part.slice, standing, candidate)
        prefix, pair = asked[part]
        # Once each: a metric may have a tolerance twice, and one set of resamples serves a part.
        metrics = list(dict.fromkeys(threshold.metric for threshold in of_part))
        found = {one.metric: one for one in differences_of(pair, metrics, part, prefix)}
        for threshold in of_part:
            one = found[threshold.metric]
            figure = float(pair[0].values[threshold.metric][prefix].mean())
            tolerance = threshold.loss(figure)
            checks.append(
                Check(
                    metric=threshold.metric,
                    part=part,
                    standing=figure,
                    candidate=figure + one.difference,
                    low=one.low,
                    high=one.high,
                    tolerance=tolerance,
                    verdict=_verdict(one.low, one.high, tolerance),
                )
            )
    return checks


def _pairs_of(
    name: str, standing: Record, candidate: Record
) -> dict[QueryPart, tuple[np.ndarray, tuple[Record, Record]]]:
    """Returns the parts of a slice of items, with the records of its pairs."""
    pairs, reason = item_slice([standing, candidate], name)
    if reason:
        raise ConfigError(f"The thresholds name the slice {name}, but {reason}.")
    one, other = pairs
    return {part: (prefix, (one, other)) for part, prefix in parts_of(one)[1:]}


def _verdict(low: float, high: float, tolerance: float) -> GateVerdict:
    # By the ends of the interval, not by the mean: few queries leave it undecided, rather than
    # pass.
    if high < -tolerance:
        return "fails"
    return "passes" if low >= -tolerance else "undecided"


def worst(checks: Sequence[Check]) -> GateVerdict:
    """Returns the verdict of all checks together: one that fails is enough to fail."""
    found = {one.verdict for one in checks}
    if "fails" in found:
        return "fails"
    return "undecided" if "undecided" in found else "passes"


def _known_models(
    standing: Record, undertrained: tuple[str, Record] | None
) -> list[tuple[str, Record, GateVerdict]]:
    """Returns the models of the preflight: what each is, its record, and its right verdict."""
    if undertrained is None:
        share = f"{1 - DEGRADED:.0%}"
        name = f"a model of {share} shuffled answers, in the place of a tenth of the training"
        undertrained = (name, mix(standing, random_order(standing), DEGRADED))
    return [
        # A gate that nothing passes is as useless as one that everything does.
        ("the run that stands itself", standing, "passes"),
        ("a model of shuffled scores", random_order(standing), "fails"),
        ("a collapsed model, which scores all items alike,", equal_scores(standing), "fails"),
        (*undertrained, "fails"),
    ]


def _refusal(trial: PreflightTrial, queries: int) -> str:
    verb = "is undecided" if trial.verdict == "undecided" else trial.verdict
    if trial.expected == "passes":
        return f"The gate refuses to judge: {trial.name} {verb}."
    return (
        f"The gate refuses to judge: {trial.name} should fail, and {verb} by these thresholds over "
        f"{queries:,} queries. Lower the tolerances, or evaluate more queries."
    )


def random_order(record: Record, *, seed: int = 0) -> Record:
    """Returns the record of the same queries answered in a random order of the corpus.

    Nothing is ranked: in a random order, the right answers of a query stand at ranks that are drawn
    from as many as there are items.
    """
    generator = np.random.default_rng(seed)
    ks = sorted({int(metric.partition("@")[2]) for metric in record.values})
    queries = np.repeat(np.arange(len(record.relevant)), record.relevant)
    # Each by itself: two answers of one query may meet at a rank, which among thousands of items
    # hardly happens.
    ranks = generator.integers(0, record.protocol["items"], len(queries))
    hits = np.zeros((len(record.relevant), max(ks)), bool)
    is_listed = ranks < max(ks)
    hits[queries[is_listed], ranks[is_listed]] = True
    # By the metrics' own function, so that a random order is judged as any model is.
    figures = ranking_figures(hits, record.relevant, ks)
    return dataclasses.replace(
        record,
        values={name: figures[name] for name in record.values},
        of_items={name: random_order(one, seed=seed) for name, one in record.of_items.items()},
    )


def equal_scores(record: Record) -> Record:
    """Returns the record of a model that gives all items one score.

    Ties never count for a model: it finds nothing.
    """
    values = {name: np.zeros(len(record.relevant)) for name in record.values}
    of_items = {name: equal_scores(one) for name, one in record.of_items.items()}
    return dataclasses.replace(record, values=values, of_items=of_items)


def mix(record: Record, other: Record, share: float, *, seed: int = 0) -> Record:
    """Returns the record of a model that answers a share of the queries by one, the rest by other.

    Args:
        record: Record of the one.
        other: Record of the other, of the same queries.
        share: Probability that a query is answered as in `record`.
        seed: Seed of the choice.
    """
    # Query by query, as a model fails: figures times the share would have less spread.
    is_kept = np.random.default_rng(seed).random(len(record.relevant)) < share
    values = {
        name: np.where(is_kept, found, other.values[name]) for name, found in record.values.items()
    }
    of_items = {
        name: mix(one, other.of_items[name], share, seed=seed)
        for name, one in record.of_items.items()
    }
    return dataclasses.replace(record, values=values, of_items=of_items)


def undertrained_by_curve(
    record: Record, curve: Sequence[Mapping[str, Any]], metric: str
) -> tuple[str, Record] | None:
    """Returns a model of a tenth of the training, as far as the validations of a run tell.

    It answers as many queries as the run does as its validation metric stood at that time in
    proportion to its best, and the others in a random order.

    Args:
        record: Record of the run.
        curve: Lines of its training's metrics, each with its "step".
        metric: Name of the validation metric.

    Returns:
        Its description and record; None where no validation came early enough.
    """
    key = f"validation/{metric}"
    validated = {line["step"]: float(line[key]) for line in curve if key in line}
    if not validated:
        return None
    # The step that was kept, after which nothing was learned that counts.
    best = max(validated, key=validated.__getitem__)
    # The last one within a tenth, or the first of all, if that is early enough.
    early = [step for step in validated if step <= TENTH * best] or [min(validated)]
    step = max(early)
    if step > LATEST_VALIDATION * best or validated[best] <= 0:
        return None
    share = min(1.0, validated[step] / validated[best])
    name = (
        f"a model of {step / best:.0%} of the training (step {step:,}, {share:.0%} of the best "
        f"validation {metric})"
    )
    return name, mix(record, random_order(record), share)


def load_thresholds(path: Path, record: Record) -> list[Threshold]:
    """Reads the thresholds in a JSON file, see `read_thresholds`."""
    if not path.is_file():
        raise ConfigError(f"--thresholds={path} is no file.")
    try:
        return read_thresholds(read_json(path), record)
    except ValueError as error:
        raise ConfigError(f"--thresholds={path}: {error}") from None
