"""The page of a sweep: what was best, how it was found, and which options matter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from twotower.core.files import atomic
from twotower.evaluation.report.figures import (
    LONGEST_LABEL,
    Line,
    Mark,
    Points,
    line_chart,
    row_chart,
    scatter_chart,
)
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
from twotower.evaluation.report.quality import big_number
from twotower.sweeps.space import Choices, Range, describe_edges
from twotower.sweeps.study import Sweep, Tried
from twotower.sweeps.text import best_line, cells, count_line, ranked, short_names, show, test_line

PAGE = "sweep.html"
MOST_TICKS = 8  # of the axis of trials


def write_page(sweep: Sweep) -> Path:
    """Writes the page of a sweep, whole or not at all, and returns its file.

    Raises:
        ConfigError: Matplotlib is missing.
    """
    sections = [_options(sweep), _history(sweep), _slices(sweep), _trials(sweep)]
    title = sweep.workdir.resolve().name
    page = render_page(title, count_line(sweep), _hero(sweep), sections)
    path = sweep.workdir / PAGE
    # A browser may have the page of the sweep before open while this one is written.
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _hero(sweep: Sweep) -> str:
    numbers = big_number(f"validation {sweep.metric}", f"{sweep.best.value:.4f}", "best")
    numbers += big_number("configurations tried", f"{len(sweep.trials):,}", "")
    rows = [[name, show(value)] for name, value in sweep.best.options.items()]
    chosen = table(Table(["option", "best value"], rows, "The best configuration"))
    # Above everything else: where the best lies at an end the space was too narrow.
    edges = describe_edges(sweep.space, sweep.best.options)
    return (
        '<section class="hero" id="verdict" aria-label="Verdict">'
        f'<p class="verdict even">{escape(best_line(sweep))}</p>'
        f'<p>{escape(test_line(sweep))}</p><dl class="numbers">{numbers}</dl>'
        f"{bullets(edges)}{chosen}</section>"
    )


def _options(sweep: Sweep) -> Section:
    lead = "Which options make the difference, and which may stay as they are?"
    title = "Which options matter"
    # Shares of hardly any trials would be read as findings.
    if not sweep.importances:
        note = paragraph("Too few configurations were finished to tell.", "note")
        return Section("options", title, lead, [note])
    # All that options have in common says nothing, and takes the room of the bars.
    short = dict(zip(sweep.space, short_names(list(sweep.space))))
    marks = [Mark(_end_of(short[name]), share) for name, share in sweep.importances.items()]
    rows = [[name, f"{share:.3f}"] for name, share in sweep.importances.items()]
    heading = "Importance of each option"
    svg = row_chart("importances", marks, x_label="share of what separates good from all (0 to 1)")
    caption = (
        "By PED-ANOVA: how far the best tenth of the trials lies from all that were tried. An "
        "option near 0 can be left out of the next sweep; of few trials the shares are rough."
    )
    chart = Chart("importances", heading, svg, caption, Table(["option", "share"], rows, heading))
    return Section("options", title, lead, [charts([chart])])


def _history(sweep: Sweep) -> Section:
    finished = [trial for trial in sweep.trials if trial.state == "finished"]
    best_so_far: list[float] = []
    for trial in finished:
        # The slice is empty at the first trial, where an index would fail.
        best_so_far.append(max([trial.value, *best_so_far[-1:]]))
    numbers = [trial.number for trial in finished]
    title = "The best so far"
    label = f"{sweep.metric} (more is better)"
    line = Line("best so far", numbers, best_so_far)
    # Whole numbers: there is no trial 1.5.
    ticks = range(0, numbers[-1] + 1, 1 + numbers[-1] // MOST_TICKS)
    svg = line_chart("history", [line], x_label="trial (number)", y_label=label, x_ticks=ticks)
    rows = []
    for number, value in zip(numbers, best_so_far):
        rows.append([f"{number}", f"{value:.4f}"])
    caption = "A line that has been flat for long: more trials of this space will hardly help."
    chart = Chart("history", title, svg, caption, Table(["trial", label], rows, title))
    values = "Every trial"
    groups = _by_state(sweep.trials, lambda trial: float(trial.number))
    svg = scatter_chart("trials", groups, x_label="trial (number)", y_label=label)
    # Value, deviation and state; the options have a table of their own at the end.
    rows = [[f"{trial.number}", *cells(trial, sweep)[:3]] for trial in sweep.trials]
    header = ["trial", sweep.metric, "deviation", ""]
    caption = (
        "Pruned trials ended early, behind the median of the others, and show the best that they "
        "had reached."
    )
    every = Chart("trials", values, svg, caption, Table(header, rows, values))
    lead = "Was it tried long enough?"
    return Section("history", "How it was found", lead, [charts([chart, every])])


def _slices(sweep: Sweep) -> Section:
    made = []
    names = short_names(list(sweep.space))
    # Figures are named by their number: the id of an element of HTML has no dots to escape.
    for number, (name, entry) in enumerate(sweep.space.items()):
        if isinstance(entry, Range):
            made.append(_range_chart(sweep, name, names[number], entry, number))
        else:
            made.append(_choice_chart(sweep, name, entry, number))
    lead = "What each option did, whatever the others were: good values lie together."
    return Section("slices", "Option by option", lead, [charts(made)])


def _range_chart(sweep: Sweep, name: str, short: str, entry: Range, number: int) -> Chart:
    groups = _by_state(sweep.trials, lambda trial: float(trial.options[name]))
    svg = scatter_chart(
        f"slice{number}",
        groups,
        x_label=short,
        y_label=f"{sweep.metric} (more is better)",
        log_x=entry.log,
    )
    rows = []
    # By the value of the option, as the chart beside it, and not by the number of the trial.
    for trial in sorted(sweep.trials, key=lambda trial: trial.options[name]):
        rows.append([show(trial.options[name]), *cells(trial, sweep)[:3]])
    caption = f"Tried from {entry.low:g} to {entry.high:g}; the best at {_best(sweep, name)}."
    header = [short, sweep.metric, "deviation", ""]
    return Chart(f"slice{number}", name, svg, caption, Table(header, rows, name))


def _choice_chart(sweep: Sweep, name: str, entry: Choices, number: int) -> Chart:
    marks = []
    rows = []
    for label in entry.values:
        values = []
        for trial in sweep.trials:
            # An unfinished curve would lower the mean of its choice.
            if trial.state == "finished" and trial.options[name] == label:
                values.append(trial.value)
        # A bar at 0 would say that the value is bad, and it was never tried.
        if not values:
            rows.append([show(label), "0", "-", "-"])
            continue
        best = max(values)
        mean = statistics.mean(values)
        strong = label == sweep.best.options[name]
        marks.append(Mark(show(label), best, other=mean, strong=strong))
        rows.append([show(label), f"{len(values)}", f"{best:.4f}", f"{mean:.4f}"])
    label = f"{sweep.metric} (more is better)"
    svg = row_chart(f"slice{number}", marks, x_label=label, label="best", other_label="mean")
    caption = (
        f"Of the trials that were finished with each value; the best had {_best(sweep, name)}."
    )
    header = ["value", "trials", "best", "mean"]
    return Chart(f"slice{number}", name, svg, caption, Table(header, rows, name))


def _end_of(name: str) -> str:
    """Returns the end of an option's name, which tells it from others, where it is too long."""
    if len(name) <= LONGEST_LABEL:
        return name
    return f"…{name[1 - LONGEST_LABEL :]}"


def _best(sweep: Sweep, name: str) -> str:
    return show(sweep.best.options[name])


def _trials(sweep: Sweep) -> Section:
    rows = [[str(trial.number), *cells(trial, sweep)] for trial in ranked(sweep.trials)]
    header = ["trial", sweep.metric, "deviation", "", *sweep.space]
    blocks = [table(Table(header, rows, "All configurations, the best first"))]
    # Sentences, which would stretch a column of the table beyond the page.
    reasons = [f"Trial {one.number}: {one.reason}" for one in sweep.trials if one.reason]
    if reasons:
        blocks.append(bullets(reasons))
    return Section("all", "All configurations", count_line(sweep), blocks)


def _by_state(trials: Sequence[Tried], position_of: Callable[[Tried], float]) -> list[Points]:
    """Returns a group of points for trials that were finished, and one for those that were not."""
    groups = []
    for state in ("finished", "pruned"):
        # A metric may be NaN where nothing could be ranked, which has no place in a chart.
        found = [trial for trial in trials if trial.state == state and math.isfinite(trial.value)]
        if found:
            across = [position_of(trial) for trial in found]
            groups.append(Points(state, across, [trial.value for trial in found]))
    return groups
