"""Comparisons and gates as text: tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.core.tables import format_table
from twotower.evaluation.comparison.compare import (
    ALL,
    ALPHA,
    Comparison,
    Difference,
    Row,
    Spread,
)
from twotower.evaluation.comparison.gate import Judgement
from twotower.evaluation.intervals import LEVEL, RESAMPLES
from twotower.evaluation.metrics import RANKING_METRICS

SLICE_METRICS = ("recall", "ndcg")  # those that the tables of slices show, at the shortest K


def format_comparison(comparison: Comparison) -> str:
    """Returns the figures of all runs, their differences to the first, slices and spreads."""
    whole = _in_order([row for row in comparison.rows if row.part == ALL])
    first = comparison.runs[0]
    lines = [describe_protocol(comparison.protocol), "", _figures_table(whole, comparison.runs)]
    lines += ["", describe_marks(comparison), *comparison.notes]
    for run in comparison.runs[1:]:
        found = _differences(comparison, run)
        rows = [[row.metric, *difference_cells(found[row.metric, row.part])] for row in whole]
        lines += ["", _differences_table(f"{run} less {first}", rows)]
    parts = [row for row in comparison.rows if row.part != ALL]
    shortest = min((_length(row.metric) for row in parts), default=0)
    for metric in [f"{name}@{shortest}" for name in SLICE_METRICS]:
        rows = [row for row in parts if row.metric == metric]
        if rows:
            lines += ["", f"{metric} by slice:", _slices_table(rows, comparison)]
    if comparison.spreads:
        lines += ["", "Over seeds, of which the intervals above know nothing:"]
        lines.append(_spreads_table(comparison.spreads, whole))
    # At the end, where somebody looks who will not read the tables.
    decisive = decisive_row(comparison)
    lines += ["", f"In short, by {decisive.metric}: {describe_best(decisive, comparison.runs)}"]
    return "\n".join(lines)


def decisive_row(comparison: Comparison) -> Row:
    """Returns the figure that decides a headline: recall of the shortest lists, of all users."""
    whole = [row for row in comparison.rows if row.part == ALL]
    recalls = [row for row in whole if row.metric.startswith("recall@")]
    return min(recalls, key=lambda row: _length(row.metric))


def describe_best(row: Row, runs: Sequence[str]) -> str:
    """Returns which run is best by a figure, and which cannot be told from it, as a sentence."""
    if len(row.equals) == len(runs) - 1:
        return "The runs cannot be told apart."
    if row.equals:
        return f"{row.best} is not to be told from {', '.join(row.equals)}."
    return f"{row.best} is ahead of all others."


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """Returns the protocol that all runs share, as a line."""
    # The lengths of lists are those of the rows, and the step is each model's own.
    shown = {name: value for name, value in protocol.items() if name not in ("ks", "step", "dim")}
    entries = []
    for name, value in shown.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        entries.append(f"{name} {text}")
    return f"Measured alike: {', '.join(entries)}."


def describe_marks(comparison: Comparison) -> str:
    """Returns the sentence that says what the marks of a comparison mean."""
    users = comparison.rows[0].users
    return (
        f"* best, = not to be told from it: paired over {users:,} users, {RESAMPLES:,} Poisson "
        f"resamples, Benjamini-Hochberg at {ALPHA:.0%} over {len(comparison.differences):,} "
        "differences."
    )


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Returns rows with the metrics in the order of the reports, each by rising length."""
    order = list(RANKING_METRICS)
    return sorted(rows, key=lambda row: (order.index(_name(row.metric)), _length(row.metric)))


def _name(metric: str) -> str:
    return metric.partition("@")[0]


def _length(metric: str) -> int:
    return int(metric.partition("@")[2])


def _figures_table(rows: Sequence[Row], runs: Sequence[str]) -> str:
    cells = [[row.metric, *_marked_figures(row, runs)] for row in rows]
    return format_table(cells, ["", *runs], align="lr")


def _marked_figures(row: Row, runs: Sequence[str]) -> list[str]:
    cells = []
    for run in runs:
        mark = ""
        if run == row.best:
            mark = "* "
        elif run in row.equals:
            mark = "= "
        # In front, so that the digits stand below each other.
        cells.append(f"{mark}{row.figures[run]:.4f}")
    return cells


def _differences(comparison: Comparison, run: str) -> dict[Any, Difference]:
    """Returns the differences of a run to the first one by metric and part."""
    first = comparison.runs[0]
    found = [one for one in comparison.differences if (one.run, one.other) == (run, first)]
    return {(one.metric, one.part): one for one in found}


def _differences_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    header = [title, "difference", f"{LEVEL:.0%} interval", "effect d_z", "p, adjusted"]
    return format_table(rows, header, align="lr")


def difference_cells(one: Difference) -> list[str]:
    """Returns a difference, its interval, its effect and its corrected p-value as cells."""
    effect = "-"
    if math.isfinite(one.effect):
        effect = f"{one.effect:+.3f}"
    ends = f"{one.low:+.4f} to {one.high:+.4f}"
    p_value = f"{one.adjusted:.3f}"
    # Rounded it would be 0.000, which no p-value is.
    if one.adjusted < 0.001:
        p_value = "<0.001"
    return [f"{one.difference:+.4f}", ends, effect, p_value]


def _slices_table(rows: Sequence[Row], comparison: Comparison) -> str:
    runs = comparison.runs
    found = [_differences(comparison, run) for run in runs[1:]]
    cells = []
    for row in rows:
        line = [str(row.part), f"{row.queries:,}", *_marked_figures(row, runs)]
        for differences in found:
            one = differences[row.metric, row.part]
            # The interval alone: a table of slices is wide, and its middle is the difference of two
            # cells beside it.
            line.append(f"{one.low:+.4f} to {one.high:+.4f}")
        cells.append(line)
    titles = [f"{run} less {runs[0]}" for run in runs[1:]]
    return format_table(cells, ["", "queries", *runs, *titles], align="lr")


def _spreads_table(spreads: Mapping[str, Mapping[str, Spread]], rows: Sequence[Row]) -> str:
    cells = []
    for run, by_metric in spreads.items():
        for row in rows:
            spread = by_metric[row.metric]
            # A single seed has no spread, and 0 would claim that there is none.
            deviation = "-"
            if spread.seeds > 1:
                deviation = f"{spread.deviation:.4f}"
            figures = [f"{spread.mean:.4f}", deviation]
            ends = [f"{spread.lowest:.4f}", f"{spread.highest:.4f}"]
            cells.append([run, row.metric, f"{spread.seeds}", *figures, *ends])
    header = ["", "metric", "seeds", "mean", "deviation", "lowest", "highest"]
    return format_table(cells, header, align="llr")


def format_judgement(judgement: Judgement) -> str:
    """Returns the preflight, every check and the verdict of a gate."""
    # Before the checks: it says what they are worth.
    lines = ["Preflight, by the same thresholds:"]
    for trial in judgement.preflight:
        mark = ""
        if trial.verdict != trial.expected:
            mark = f" (it should be: {trial.expected})"
        lines.append(f"- {trial.name}: {trial.verdict}{mark}")
    rows = []
    for one in judgement.checks:
        figures = [f"{one.standing:.4f}", f"{one.candidate:.4f}"]
        ends = f"{one.low:+.4f} to {one.high:+.4f}"
        # Below 0, as the ends of the interval that it is compared with.
        limit = f"{-one.tolerance:.4f}"
        rows.append([one.metric, str(one.part), *figures, ends, limit, one.verdict])
    names = [judgement.standing, judgement.candidate]
    header = ["", "queries", *names, f"{LEVEL:.0%} interval of the difference", "limit", "verdict"]
    lines += ["", format_table(rows, header, align="llrrrrl"), ""]
    lines += judgement.notes
    if judgement.refusal:
        lines.append(f"UNDECIDED. {judgement.refusal}")
    else:
        lines.append(f"{judgement.candidate}: {judgement.verdict.upper()}.")
    return "\n".join(lines)
