"""The form of an audit, and of many as a report holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


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
        # Flat, so that a figure is found by one name and its audit: "ties.share".
        table[audit.name] = said | dict(audit.figures)
    return table


def spoken_sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the sentences of the audits that speak, in the order of `audit_table`."""
    # From the table, not from the audits: a report is made from the JSON file of an earlier run
    # too.
    return [audit["sentence"] for audit in table.values() if audit["speaks"]]
