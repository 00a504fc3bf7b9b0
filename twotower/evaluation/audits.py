"""Audits: what a reader must know before believing the figures of a run.

Each is a small function over what is there (prepared data, queries, figures, vectors, lists) that
says what it looked at, and speaks where figures mean less than they seem to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from twotower.config import Config
from twotower.data.audit import FINDINGS, accepted_findings
from twotower.data.interactions import Split
from twotower.data.report import format_share
from twotower.data.sources.load import describes_items, takes_items_of_log
from twotower.evaluation.queries import Queries

SHARE_OF_NEWS = 0.2  # share of right answers that training never saw, from which on it is said


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of one audit.

    Attributes:
        name: Name of the audit, such as "ties".
        speaks: Whether a reader must know it before believing the figures.
        sentence: What was found, with its numbers; where it speaks also what it means and what to
            do.
        figures: What was measured, by name, as JSON holds it.
    """

    name: str
    speaks: bool
    sentence: str
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def audit_table(audits: Iterable[Audit]) -> dict[str, dict[str, Any]]:
    """Returns audits as JSON holds them: {name: {"speaks": ..., "sentence": ..., figures ...}}."""
    table: dict[str, dict[str, Any]] = {}
    for audit in audits:
        said = {"speaks": audit.speaks, "sentence": audit.sentence}
        table[audit.name] = said | dict(audit.figures)
    return table


def spoken_sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the sentences of the audits that speak, in the order of `audit_table`."""
    return [audit["sentence"] for audit in table.values() if audit["speaks"]]


def audit_unreachable(answers: Mapping[str, Any]) -> Audit:
    """Says how many right answers no ranking of the corpus can find.

    Args:
        answers: Result of `twotower.evaluation.measure.measure_answers`.
    """
    figures = {name: answers[name] for name in ("all", "outside_corpus", "greatest_recall")}
    if "warning" in answers:
        return Audit("unreachable", True, answers["warning"], figures)
    return Audit("unreachable", False, "Every right answer is in the corpus.", figures)


def audit_leakage(parts: Split, config: Config) -> Audit:
    """Says which kinds of leakage of the split the configuration accepts.

    Others are none: a split that has them is refused before anything is trained.

    Args:
        parts: The parts of the log.
        config: Configuration that the log was divided for.
    """
    held_out_text = describes_items(config.data) and not takes_items_of_log(config.data)
    findings = accepted_findings(parts, config.split, describes_items=held_out_text)
    figures = {"rows": {finding.name: finding.rows for finding in findings}}
    if not findings:
        return Audit("leakage", False, "Training rows reveal no held-out row.", figures)
    reasons = []
    for finding in findings:
        why = FINDINGS[finding.name].reason.split(". ")[0].rstrip(".")
        reasons.append(f"{finding.message} ({finding.name}: {why})")
    names = ", ".join(repr(finding.name) for finding in findings)
    sentence = (
        f"The split leaks, as config.split.accept_leakage knowingly accepts ({names}): "
        f"{'; '.join(reasons)}. These figures compare with those of the same split alone, and a "
        "served model will not reach them."
    )
    return Audit("leakage", True, sentence, figures)


def audit_never_trained(queries: Queries) -> Audit:
    """Says how many right answers are items of the corpus that no training row has."""
    count = int((queries.counts[queries.relevant.values] == 0).sum())
    total = int(queries.num_relevant.sum())
    share = count / max(total, 1)
    figures = {"answers": count, "share": share}
    sentence = (
        f"{format_share(count, total)} of the {total:,} right answers ({count:,}) are items of the "
        "corpus that training never saw"
    )
    if share < SHARE_OF_NEWS:
        return Audit("never_trained", False, f"{sentence}.", figures)
    sentence += (
        ": they are found by their columns alone, and baselines that count rows find none. Read "
        "the figures of new items apart, and give items columns that describe them."
    )
    return Audit("never_trained", True, sentence, figures)
