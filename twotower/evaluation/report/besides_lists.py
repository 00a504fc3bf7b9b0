"""The parts of the report on what is no list: labels and heads, and sanity on one's own items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twotower.evaluation.heads import HEAD_METRICS
from twotower.evaluation.intervals import LEVEL
from twotower.evaluation.report.figures import Line, line_chart
from twotower.evaluation.report.page import (
    Chart,
    Section,
    Table,
    bullets,
    charts,
    collapsible,
    table,
)

Measured = Mapping[str, Any]


def labels_section(measured: Measured) -> Section | None:
    """Returns what was measured of labels and heads; None where the model has neither."""
    label = measured.get("labels")
    tasks = {"label": label} if label else {}
    tasks |= measured.get("heads", {})
    if not tasks:
        return None
    header = [""]
    last = ["rows with a label"]
    columns: list[list[str]] = []
    for name, task in tasks.items():
        header.append(name)
        last.append(f"{task['rows']:,}")
        columns.append([_figure(task, metric) for metric in HEAD_METRICS])
        # Figures of earlier versions have none.
        if "intervals" in task:
            header.append(f"{LEVEL:.0%} interval")
            last.append("")
            columns.append([_ends(task["intervals"].get(metric)) for metric in HEAD_METRICS])
    names = [metric.replace("_", " ") for metric in HEAD_METRICS]
    rows = [*map(list, zip(names, *columns)), last]
    figures = Table(header, rows, "Probabilities against labels")
    blocks = [table(figures)]
    curve = (label or {}).get("calibration_curve")
    if curve:
        blocks.insert(0, charts([_calibration_chart(curve)]))
    return Section(
        "labels",
        "Labels and heads",
        "Is a pair that the model calls likely really likely? AUC asks for the order alone (a half "
        "says nothing, 1 is perfect); log loss and the calibration error ask whether the "
        "probabilities are true, and less of them is better.",
        blocks,
    )


def _figure(task: Mapping[str, Any], metric: str) -> str:
    # Not 0: rows that all have one label have no AUC, for instance.
    return f"{task[metric]:.4f}" if metric in task else "-"


def _ends(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "-"


def _calibration_chart(curve: Sequence[Mapping[str, float]]) -> Chart:
    """Returns the share of label 1 against the probability that was given, bin by bin."""
    predicted = [point["predicted"] for point in curve]
    observed = [point["observed"] for point in curve]
    svg = line_chart(
        "calibration",
        [
            Line("the model", predicted, observed),
            Line("if all were true", [0.0, 1.0], [0.0, 1.0]),
        ],
        x_label="probability that the model gave (0 to 1)",
        y_label="share of label 1 (0 to 1)",
    )
    caption = (
        "Each point is the rows that were given about the same probability. On the straight line "
        "as many of them have the label as the model said; below it the model promises too much, "
        "above it too little. Points of few rows, see the table, say little."
    )
    rows = []
    for point in curve:
        ends = f"{point['from']:.2f} to {point['to']:.2f}"
        values = (f"{point['predicted']:.4f}", f"{point['observed']:.4f}")
        rows.append([ends, f"{point['rows']:,}", *values])
    title = "Probability given and share found"
    header = ["probability", "rows", "mean probability", "share of label 1"]
    return Chart("calibration", title, svg, caption, Table(header, rows, title))


def sanity_section(sanity: Measured | None) -> Section | None:
    """Returns what `check_sanity` found, with its examples; None where it was not asked for."""
    if sanity is None:
        return None
    titles = sanity.get("titles", {})
    categories = sanity.get("categories", {})
    rows = []
    if titles:
        question = f"Items of like {titles['column']} lie closer than unlike ones"
        pairs = f"{titles['pairs']:,} pairs"
        rows.append([question, *_shares(titles, "auc"), _share(0.5), pairs])
    if categories:
        # Short: on a phone the first column is narrow.
        question = (
            f"Lists of {categories['k']} hold the {categories['column']} of "
            f"{categories['events']} events"
        )
        tried = f"{categories['categories']:,} categories"
        chance = _share(categories.get("chance"))
        rows.append([question, *_shares(categories, "share"), chance, tried])
    blocks = []
    if rows:
        header = ["what is expected", "share", f"{LEVEL:.0%} interval", "by chance", "asked of"]
        blocks.append(table(Table(header, rows, "Sanity, on what is known of the items")))
    if titles.get("examples"):
        found = [[one, other, f"{cosine:.2f}"] for one, other, cosine in titles["examples"]]
        header = ["item", "nearest to it", "cosine"]
        title = "Some items, with the nearest one"
        blocks.append(collapsible(title, table(Table(header, found, title))))
    if categories.get("examples"):
        found = [
            [name, _share(share), "; ".join(listed)]
            for name, share, listed in categories["examples"]
        ]
        header = ["events of", "share of the list", "first in it"]
        title = "Some made-up people, with their lists"
        blocks.append(collapsible(title, table(Table(header, found, title))))
    if sanity.get("cannot"):
        blocks.append(bullets(sanity["cannot"]))
    return Section(
        "sanity",
        "Sanity",
        "What anybody who knows the items would expect: like titles lie close, and somebody with "
        "events of one category gets that category.",
        blocks,
    )


def _shares(found: Mapping[str, Any], name: str) -> list[str]:
    """Returns a share and its interval; "-" where nothing could be asked."""
    if name not in found:
        return ["-", "-"]
    low, high = found["interval"]
    return [_share(found[name]), f"{low:.1%} to {high:.1%}"]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
