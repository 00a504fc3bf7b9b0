"""The page of several runs side by side, which `compare --report` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from twotower.core.files import atomic
from twotower.evaluation.comparison.compare import ALL, Comparison, Row
from twotower.evaluation.comparison.text import (
    decisive_row,
    describe_best,
    describe_marks,
    describe_protocol,
    difference_cells,
)
from twotower.evaluation.intervals import LEVEL
from twotower.evaluation.report.figures import Line, Mark, line_chart, row_chart
from twotower.evaluation.report.page import (
    Chart,
    Section,
    Table,
    bullets,
    charts,
    escape,
    paragraph,
    render_page,
    table,
)
from twotower.evaluation.report.quality import SIGNS, big_number, slice_title
from twotower.evaluation.report.verdict import Standing

MOST_RUNS = 8  # lines of a chart: as many as there are colours
MOST_PARTS = 12  # rows of a chart
METRICS = ("recall", "ndcg")


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the page of a comparison, whole or not at all.

    Args:
        comparison: Runs that were compared.
        path: File to write.

    Raises:
        ConfigError: Matplotlib is missing.
    """
    # Whole paths would not fit into a legend.
    comparison = _with_short_names(comparison)
    whole = [row for row in comparison.rows if row.part == ALL]
    ks = sorted({int(row.metric.partition("@")[2]) for row in whole})
    decisive = decisive_row(comparison)
    sections = [
        _differences(comparison, decisive.metric),
        _lengths(whole, comparison.runs, ks),
    ]
    parts = _slices(comparison, decisive.metric)
    if parts:
        lead = "For whom is the one better, and for whom the other?"
        sections.append(Section("slices", "By slice", lead, [charts(parts)]))
    sections.append(_all_figures(whole, comparison))
    title = ", ".join(comparison.runs)
    if len(comparison.runs) > 3:
        title = f"{len(comparison.runs)} runs compared"
    about = describe_protocol(comparison.protocol)
    page = render_page(title, about, _hero(decisive, comparison.runs), sections)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _with_short_names(comparison: Comparison) -> Comparison:
    """Returns the comparison with the last parts of folders as names, where these differ."""
    short = {run: run.rpartition("/")[2] for run in comparison.runs}
    # Two runs in different folders may have one name, and would be one here.
    if len(set(short.values())) < len(short):
        return comparison
    rows = []
    for row in comparison.rows:
        figures = {short[run]: value for run, value in row.figures.items()}
        equals = tuple(short[run] for run in row.equals)
        rows.append(dataclasses.replace(row, figures=figures, best=short[row.best], equals=equals))
    differences = []
    for one in comparison.differences:
        named = dataclasses.replace(one, run=short[one.run], other=short[one.other])
        differences.append(named)
    return dataclasses.replace(
        comparison,
        runs=tuple(short.values()),
        rows=tuple(rows),
        differences=tuple(differences),
        spreads={short[run]: spread for run, spread in comparison.spreads.items()},
    )


def _hero(row: Row, runs: Sequence[str]) -> str:
    """Returns which run is best, and which cannot be told from it."""
    standing: Standing = "even" if row.equals else "ahead"
    sentence = f"{SIGNS[standing]} {describe_best(row, runs)}"
    order = sorted(runs, key=lambda run: -row.figures[run])
    marks = [Mark(run, row.figures[run], strong=run == row.best) for run in order]
    rows = []
    for run in order:
        said = "best" if run == row.best else "not to be told from it" * (run in row.equals)
        rows.append([run, f"{row.figures[run]:.4f}", said or "behind"])
    svg = row_chart("runs", marks, x_label=f"{row.metric} (share of right answers found, 0 to 1)")
    caption = (
        f"The mean of {row.queries:,} queries of {row.users:,} users, the same for each run; "
        "further right is better. Whether two can be told apart says the next part."
    )
    chart = Chart(
        "runs", row.metric, svg, caption, Table(["run", row.metric, ""], rows, row.metric)
    )
    numbers = ""
    for run in order[:2]:
        beside = "best" if run == row.best else "next"
        numbers += big_number(f"{run}, {row.metric}", f"{row.figures[run]:.4f}", beside)
    left = f'<p class="verdict {standing}">{escape(sentence)}</p><dl class="numbers">{numbers}</dl>'
    return (
        '<section class="hero" id="verdict" aria-label="Verdict">'
        f'<div class="grid"><div>{left}</div>{chart.html()}</div></section>'
    )


def _differences(comparison: Comparison, metric: str) -> Section:
    first = comparison.runs[0]
    # Each with the first alone: of ten runs there are 45 pairs, which nobody reads.
    found = [
        one
        for one in comparison.differences
        if one.other == first and one.metric == metric and one.part == ALL
    ]
    marks = []
    rows = []
    for one in found:
        marks.append(Mark(one.run, one.difference, one.low, one.high, strong=one.is_real))
        rows.append([one.run, *difference_cells(one), "yes" if one.is_real else "no"])
    caption = (
        f"How much more each run finds than {first}, for the same people. A {LEVEL:.0%} interval "
        "(pale bar) that holds 0 means that the two may be equally good; bold are those that can "
        "be told from it after correction for the number of looks."
    )
    title = f"{metric} less that of {first}"
    svg = row_chart("differences", marks, x_label=f"difference in {metric} (above 0 is better)")
    header = ["run", "difference", "interval", "effect d_z", "p, adjusted", "told apart"]
    chart = Chart("differences", title, svg, caption, Table(header, rows, title))
    # What "told apart" means stands below the chart, since the words alone claim more than a
    # p-value does.
    blocks = [charts([chart]), paragraph(describe_marks(comparison), "note")]
    if comparison.notes:
        blocks.append(bullets(comparison.notes))
    lead = "A difference counts where it is larger than chance, and matters where it is large."
    return Section("told", "Can they be told apart?", lead, blocks)


def _lengths(whole: Sequence[Row], runs: Sequence[str], ks: Sequence[int]) -> Section:
    by_metric = {row.metric: row for row in whole}
    # In the order in which they were named: who wants another one in the chart names it earlier.
    shown = runs[:MOST_RUNS]
    made = []
    for metric in METRICS:
        lines = []
        for run in shown:
            lines.append(Line(run, ks, [by_metric[f"{metric}@{k}"].figures[run] for k in ks]))
        title = f"{metric} by length of the list"
        svg = line_chart(
            metric,
            lines,
            x_label="K, length of the list (items)",
            y_label=f"{metric} (0 to 1, more is better)",
            # Lengths are chosen as 10, 50, 100: on a plain axis the short ones would lie on each
            # other.
            log_x=len(ks) > 1,
            x_ticks=ks,
        )
        rows = []
        for run in runs:
            rows.append([run, *(f"{by_metric[f'{metric}@{k}'].figures[run]:.4f}" for k in ks)])
        caption = "Lines that cross: one run is better in short lists, the other in long ones."
        if len(shown) < len(runs):
            caption += f" The first {len(shown)} of {len(runs)} runs; the table has all."
        header = ["run", *(f"K = {k}" for k in ks)]
        made.append(Chart(metric, title, svg, caption, Table(header, rows, title)))
    lead = "Who finds more at the same length?"
    return Section("lengths", "By length of the list", lead, [charts(made)])


def _slices(comparison: Comparison, metric: str) -> list[Chart]:
    """Returns a chart for each slice, of the first two runs; its table has all."""
    first = comparison.runs[0]
    # Two marks a row: of more, nobody sees which belong together.
    second = comparison.runs[-1] if len(comparison.runs) == 1 else comparison.runs[1]
    by_slice: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.part != ALL and row.metric == metric:
            by_slice.setdefault(row.part.slice, []).append(row)
    made = []
    for number, (name, found) in enumerate(by_slice.items()):
        # The largest, whose figures are the surest.
        large = sorted(found, key=lambda row: -row.queries)[:MOST_PARTS]
        marks = []
        for row in found:
            if row in large:
                marks.append(Mark(row.part.value, row.figures[first], other=row.figures[second]))
        rows = []
        for row in found:
            figures = [f"{row.figures[run]:.4f}" for run in comparison.runs]
            rows.append([row.part.value, f"{row.queries:,}", *figures])
        svg = row_chart(
            f"slice{number}", marks, x_label=f"{metric} (0 to 1)", label=first, other_label=second
        )
        title = slice_title(name)
        # In the colours that the lines above have.
        caption = f"{metric} of each part apart. Filled: {first}; hollow: {second}."
        header = ["part", "queries", *comparison.runs]
        made.append(Chart(f"slice{number}", title, svg, caption, Table(header, rows, title)))
    return made


def _all_figures(whole: Sequence[Row], comparison: Comparison) -> Section:
    rows = []
    for row in whole:
        figures = [f"{row.figures[run]:.4f}" for run in comparison.runs]
        rows.append([row.metric, *figures, row.best, ", ".join(row.equals)])
    header = ["", *comparison.runs, "best", "not to be told from it"]
    blocks = [table(Table(header, rows, "All figures over all queries"))]
    if comparison.spreads:
        blocks.append(_spreads(comparison))
    return Section("figures", "All figures", "Every metric over all queries.", blocks)


def _spreads(comparison: Comparison) -> str:
    rows = []
    for run, metrics in comparison.spreads.items():
        for metric, one in metrics.items():
            range_of = f"{one.lowest:.4f} to {one.highest:.4f}"
            mean = f"{one.mean:.4f} ± {one.deviation:.4f}"
            rows.append([run, metric, mean, range_of, str(one.seeds)])
    header = ["run", "metric", "mean ± deviation", "range", "seeds"]
    return table(Table(header, rows, "Over seeds, of which the intervals know nothing"))
