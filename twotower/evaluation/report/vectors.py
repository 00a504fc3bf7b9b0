"""The parts of the report on vectors: the space of items, the index, storage, and their health."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.core.install import command
from twotower.evaluation.report.figures import (
    Line,
    Points,
    bar_chart,
    line_chart,
    scatter_chart,
    shorten,
)
from twotower.evaluation.report.page import (
    Chart,
    Section,
    Table,
    bidi_text,
    charts,
    collapsible,
    escape,
    missing_note,
    paragraph,
    table,
)
from twotower.index.exact import top_k
from twotower.index.recall import list_recall
from twotower.index.tuning import Trial, Tuning
from twotower.index.vectors import quantize
from twotower.retrieval.item_map.plane import MAP_ITEMS, Grouping, Plane, map_data

DRAWN_ITEMS = 1_200  # items of a picture; more would be no clearer, and the file too large
STORED_QUERIES = 300  # users that storage is measured with
STORED_ITEMS = 50_000  # items, likewise
STORED_K = 10
STRONG = 0.5  # correlation from which on two things go together
LONGEST_TITLE = 70  # characters of a title on the map
HUB_K = 10  # length of the lists in which hubs are looked for


def space(
    plane: Plane,
    groupings: Sequence[Grouping],
    titles: Sequence[str],
    vectors: np.ndarray,
    images: Sequence[str],
    *,
    further: Sequence[Chart] = (),
) -> Section:
    """Returns the pictures of the item vectors and the map.

    Args:
        plane: Items as points.
        groupings: Columns to colour by.
        titles: Titles of all items.
        vectors: Vectors of all items, float32 [N, D].
        images: Names of the PNG files beside the page.
        further: Other pictures of the same items.
    """
    rows = evenly_spaced(np.arange(len(vectors)), DRAWN_ITEMS)
    sample = ""
    if len(rows) < len(vectors):
        sample = f" A sample: {len(rows):,} of {len(vectors):,} items, evenly spaced."
    # Said with every picture: where two axes show little of the differences, what looks near may
    # not be.
    share = sum(plane.shares)
    made = []
    for number, grouping in enumerate(groupings):
        name = f"space{number}"
        groups = group_points(grouping, plane, rows)
        svg = scatter_chart(
            name, groups, x_label=axis_label(plane, 0), y_label=axis_label(plane, 1), small=True
        )
        caption = (
            "Each point is an item, where the item tower puts it; near points are recommended to "
            f"the same people. Colour and shape say the {grouping.column}: where they keep "
            f"together, the model has learned it. A flat picture shows "
            f"{share:.0%} of all differences.{sample}"
        )
        title = f"Items by {grouping.column}"
        counts = np.bincount(grouping.groups, minlength=len(grouping.labels))
        header = [grouping.column, "items", "mean of axis 1", "mean of axis 2"]
        numbers = Table(header, group_rows(grouping, plane, counts), title)
        made.append(Chart(name, title, svg, caption, numbers))
    # The map is coloured by the first column alone: it has room for one key.
    blocks = [charts([*made, *further]), _map(plane, groupings[0], titles, vectors)]
    if images:
        blocks.append(paragraph(f"As images beside this file: {', '.join(images)}.", "note"))
    return Section(
        "space",
        "The space of items",
        "The model has no map of the assortment: it draws one from what people do. Things that the "
        "same people take come to lie together.",
        blocks,
    )


def group_points(grouping: Grouping, plane: Plane, rows: np.ndarray) -> list[Points]:
    """Returns the points of some items, by group.

    Args:
        grouping: Groups of all items.
        plane: Positions of all items.
        rows: The items, int [M].
    """
    made = []
    for number, label in enumerate(grouping.labels):
        chosen = rows[grouping.groups[rows] == number]
        made.append(Points(label, plane.points[chosen, 0], plane.points[chosen, 1]))
    return made


def axis_label(plane: Plane, axis: int) -> str:
    """Returns the name of an axis with its unit."""
    ordinal = ("first", "second")[axis]
    return f"{ordinal} component ({plane.shares[axis]:.0%} of variance)"


def group_rows(grouping: Grouping, plane: Plane, counts: np.ndarray) -> list[list[str]]:
    """Returns the cells of each group: its name, its number of items and where its middle is.

    Args:
        grouping: Groups of the items.
        plane: Positions of the items.
        counts: Number of items of each group.
    """
    rows = []
    for number, label in enumerate(grouping.labels):
        # Drawn from a sample, a small group may have no item in it.
        if not counts[number]:
            continue
        x, y = plane.points[grouping.groups == number].mean(0)
        rows.append([label, f"{counts[number]:,}", f"{x:.3f}", f"{y:.3f}"])
    return rows


def _map(plane: Plane, grouping: Grouping, titles: Sequence[str], vectors: np.ndarray) -> str:
    """Returns the map to move in; without two items there is nothing to move to."""
    rows = evenly_spaced(np.arange(len(vectors)), MAP_ITEMS)
    if len(rows) < 2:
        return ""
    shown = [shorten(titles[int(row)], LONGEST_TITLE) for row in rows]
    content = map_data(plane, grouping, shown, vectors, rows)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # No title may end the element that holds it.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    sample = f"All {len(rows):,} items."
    if len(rows) < len(vectors):
        sample = (
            f"A sample: {len(rows):,} of {len(vectors):,} items, evenly spaced; neighbours are "
            "those within it."
        )
    key = ""
    for number, label in enumerate(grouping.labels):
        shape = f'<svg viewBox="-5 -5 10 10" aria-hidden="true">{_shape(number)}</svg>'
        key += f"<li>{shape}{bidi_text(label)}</li>"
    help_text = (
        "Drag to move, pinch or press + and − to enlarge; with the keyboard arrows move, + and − "
        "enlarge, 0 shows all, Enter chooses the item in the middle. The wheel enlarges once the "
        "map was pressed."
    )
    return (
        '<div class="map"><h3 id="map-title">Map of the items</h3>'
        '<div class="tools"><label>Find a title<input id="map-search" type="search" '
        'dir="auto" autocomplete="off"></label>'
        '<button type="button" id="map-in" aria-label="Enlarge">+</button>'
        '<button type="button" id="map-out" aria-label="Shrink">−</button>'
        '<button type="button" id="map-whole">Show all</button></div>'
        '<div class="columns"><div class="sheet" id="map-sheet" tabindex="0" role="application" '
        'aria-labelledby="map-title" aria-describedby="map-help">'
        '<canvas id="map-canvas" aria-hidden="true"></canvas></div>'
        '<div aria-live="polite"><p class="chosen" id="map-chosen" dir="auto"></p>'
        '<p class="about">Nearest neighbours, by the cosine of all numbers</p>'
        '<ol id="map-nearest"></ol></div></div>'
        f'<ul class="key" aria-label="{escape(grouping.column)}">{key}</ul>'
        f'<p class="note" id="map-help">{escape(sample)} {escape(help_text)}</p>'
        f'<script type="application/json" id="map-data">{text}</script></div>'
    )


def _shape(number: int) -> str:
    """Returns the marker of a group, as map.js draws it."""
    # Drawn here once more, as the key of the map is HTML and the map a canvas.
    shapes = (
        '<circle r="4"',
        '<rect x="-4" y="-4" width="8" height="8"',
        '<path d="M0-4.6 4.4 3H-4.4z"',
        '<path d="M0-5 5 0 0 5-5 0z"',
        '<path d="M0 4.6 4.4-3H-4.4z"',
        '<path d="M-5-1.5h3.5V-5h3v3.5H5v3H1.5V5h-3V1.5H-5z"',
        '<path d="M5 0 2.5 4.3h-5L-5 0l2.5-4.3h5z"',
        '<path d="M0-4.8 4.6-1.5 2.8 3.9h-5.6L-4.6-1.5z"',
    )
    return f'{shapes[number % 8]} fill="var(--c{number % 8})"/>'


def index(
    measured: Mapping[str, Any],
    tuning: Tuning | None,
    users: np.ndarray,
    items: np.ndarray,
    workdir: str,
    *,
    normalized: bool,
) -> Section:
    """Returns how well the index finds what exact search finds, and what storage costs.

    Args:
        measured: Figures of the run.
        tuning: Trials of the index of the bundle; None without a bundle.
        users: Vectors of queries, float32 [Q, D].
        items: Vectors of the items, float32 [N, D].
        workdir: Folder of the run, for commands.
        normalized: Whether vectors have length 1.
    """
    blocks = []
    parts = []
    if "index" in measured:
        found = measured["index"]
        # There is one, whose length the measurement has chosen.
        recall = next(value for name, value in found.items() if name.startswith("recall@"))
        blocks.append(
            paragraph(
                f"The bundle searches {found['items']:,} items by {found['kind']}: it finds "
                f"{recall:.1%} of the exact top 10, answers {found['queries_per_second']:,.0f} "
                f"queries a second in one batch, and one alone in {found['single_query_ms']:.2f} "
                "ms, on the machine that measured it."
            )
        )
    else:
        export = command("export", f"--workdir={workdir}")
        blocks.append(missing_note("The run has no bundle, so no index was measured.", export))
    if tuning is not None and tuning.tried:
        parts.append(_trials(tuning))
    elif tuning is not None:
        blocks.append(
            paragraph(
                "The index compares every item, which at this size is fast: nothing is lost and "
                "nothing had to be tuned.",
                "note",
            )
        )
    if tuning is not None and tuning.recall_by_decile:
        parts.append(_deciles(tuning))
    # Also without a bundle: it needs the vectors alone, and is asked before the export.
    parts.append(_storage(users, items, normalized=normalized))
    blocks.append(charts(parts))
    return Section(
        "index",
        "Search and storage",
        "A search that looks at fewer items answers sooner and may miss some; shorter numbers take "
        "less memory and may put items into another order.",
        blocks,
    )


def _trials(tuning: Tuning) -> Chart:
    effort = tuning.efforts[0] if tuning.efforts else None
    k = effort.k if effort else tuning.tried[0].k
    # Trials for the lists of `config.retrieval.k`: recalls of other lengths do not compare.
    trials = [trial for trial in tuning.tried if trial.k == k]
    by_reorder: dict[int, list[Trial]] = {}
    for trial in trials:
        by_reorder.setdefault(trial.reorder, []).append(trial)
    lines = []
    # As many lines as can be told apart; the table has all.
    for reorder in sorted(by_reorder)[:6]:
        series = sorted(by_reorder[reorder], key=lambda trial: trial.recall)
        label = f"{reorder} again" if reorder else "whole"
        x = [trial.recall for trial in series]
        lines.append(Line(label, x, [trial.queries_per_second for trial in series]))
    chosen = effort.recall if effort else None
    svg = line_chart(
        "trials",
        lines,
        x_label=f"recall@{k} (share of the exact list found, 0 to 1)",
        y_label="queries a second (in one batch)",
        mark_x=chosen,
        mark_label="chosen",
    )
    caption = (
        "Each point is a setting that was tried: further right finds more, higher answers sooner. "
        f"Taken was the cheapest that surely reaches the target of {tuning.target_recall:.4g}; the "
        "dotted line is its recall on users that had no part in the choice. Lines differ in how "
        "many candidates are scored again with whole vectors."
    )
    header = ["leaves", "scored again", "recall", "queries a second", "reaches the target"]
    rows = []
    for trial in trials:
        speed = f"{trial.queries_per_second:,.0f}"
        reached = "yes" if trial.reached else "no"
        rows.append([str(trial.leaves), str(trial.reorder), f"{trial.recall:.4f}", speed, reached])
    title = "Recall against speed of the index"
    return Chart("trials", title, svg, caption, Table(header, rows, title))


def _deciles(tuning: Tuning) -> Chart:
    labels = [str(number) for number in range(1, len(tuning.recall_by_decile) + 1)]
    svg = bar_chart(
        "deciles",
        labels,
        tuning.recall_by_decile,
        x_label="tenth of the items (1 least popular, 10 most)",
        y_label="recall (share of the exact list found, 0 to 1)",
    )
    caption = (
        "Whether the index loses rare items sooner than popular ones: bars of one height are fair. "
        "A tenth without a bar is in nobody's exact list."
    )
    rows = []
    for label, recall in zip(labels, tuning.recall_by_decile):
        rows.append([label, "-" if recall is None else f"{recall:.4f}"])
    title = "Recall of the index by popularity"
    return Chart("deciles", title, svg, caption, Table(["tenth", "recall"], rows, title))


def storage_recall(
    users: np.ndarray, items: np.ndarray, *, normalized: bool
) -> list[tuple[str, int, int, float]]:
    """Measures ways to store the item vectors, by exact search.

    Args:
        users: Vectors of queries, float32 [Q, D].
        items: Vectors of the items, float32 [N, D].
        normalized: Whether cut vectors are brought back to length 1.

    Returns:
        Kind, width, bytes of an item, and the share of the top 10 by whole float32 vectors that is
        in the top 10 by stored ones.
    """
    k = min(STORED_K, len(items))
    # Against the whole vectors, not against right answers: what storage itself loses.
    _, truth = top_k(users, items, k)
    dim = items.shape[1]
    measured = []
    # Halves, as models are trained for; of less than four numbers nothing is left to search in.
    for width in [dim // factor for factor in (1, 2, 4, 8) if dim // factor >= 4]:
        cut_users = _cut(users, width, normalized)
        cut_items = _cut(items, width, normalized)
        # int8 has one scale of four bytes an item.
        kinds = {
            "float32": (cut_items, 4 * width),
            "int8": (np.asarray(quantize(cut_items)), width + 4),
        }
        for kind, (stored, size) in kinds.items():
            _, rows = top_k(cut_users, stored, k)
            measured.append((kind, width, size, list_recall(np.asarray(rows), np.asarray(truth))))
    return measured


def _cut(vectors: np.ndarray, width: int, normalized: bool) -> np.ndarray:
    cut = vectors[:, :width]
    if not normalized:
        return np.ascontiguousarray(cut)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    # A vector of zeros stays one: it has no direction.
    return cut / np.maximum(lengths, 1e-30)


def _storage(users: np.ndarray, items: np.ndarray, *, normalized: bool) -> Chart:
    users = users[evenly_spaced(np.arange(len(users)), STORED_QUERIES)]
    sampled = items[evenly_spaced(np.arange(len(items)), STORED_ITEMS)]
    measured = storage_recall(users, sampled, normalized=normalized)
    lines = []
    for kind in ("float32", "int8"):
        points = sorted((size, recall) for name, _, size, recall in measured if name == kind)
        sizes, recalls = zip(*points)
        lines.append(Line(kind, sizes, recalls))
    svg = line_chart(
        "storage",
        lines,
        x_label="size of an item (bytes)",
        y_label="recall@10 (share of the whole vectors' list, 0 to 1)",
        log_x=True,
        # The sizes that there are: halves, which round numbers would miss.
        x_ticks=lines[0].x,
    )
    rows = []
    for kind, width, size, recall in measured:
        # For all items, of which the sample has only a share.
        total = f"{size * len(items) / 2**20:,.1f}"
        rows.append([f"{kind}, {width} wide", str(size), total, f"{recall:.4f}"])
    caption = (
        f"How much of each list of 10 stays when vectors are rounded to int8 or cut, for "
        f"{len(users):,} users. Cutting is cheap only for models that were trained for it "
        "(config.objective.matryoshka); rounding nearly always is."
    )
    if len(sampled) < len(items):
        caption += f" A sample: {len(sampled):,} of {len(items):,} items."
    title = "What smaller vectors lose"
    header = ["stored as", "bytes an item", "MiB in all", "recall@10"]
    return Chart("storage", title, svg, caption, Table(header, rows, title))


def health(
    measured: Mapping[str, Any],
    users: np.ndarray,
    items: np.ndarray,
    counts: np.ndarray,
    lines: Sequence[Mapping[str, float]],
) -> Section:
    """Returns hubs, norms against popularity, and the temperature.

    Args:
        measured: Figures of the run.
        users: Vectors of queries, float32 [Q, D].
        items: Vectors of the items, float32 [N, D].
        counts: Training rows of each item, int64 [N].
        lines: Metrics of the training by step.
    """
    parts = [_hubs(users, items)]
    lengths = np.linalg.norm(items, axis=1)
    # Normalised vectors differ in length by rounding alone, which no chart should show as a
    # pattern.
    is_one_length = float(lengths.std()) < 1e-3 * max(float(lengths.mean()), 1e-30)
    if not is_one_length:
        parts.append(_norms(lengths, counts))
    temperatures = [(line["step"], line["temperature"]) for line in lines if "temperature" in line]
    # One that is not learned has no curve that could settle.
    is_learned = len({value for _, value in temperatures}) > 1
    if is_learned:
        parts.append(_temperature(temperatures))
    figures = measured.get("health", {})
    # A loss without negatives, such as one on labels, has none.
    if "expected_counts" in figures:
        parts.append(_negatives(figures))
    blocks = [charts(parts)]
    if is_one_length:
        said = "All item vectors have one length, so that none scores higher with everybody."
        blocks.append(paragraph(said, "note"))
    if temperatures and not is_learned:
        said = f"The temperature is not learned: it is {temperatures[0][1]:g} in every step."
        blocks.append(paragraph(said, "note"))
    if figures:
        blocks.append(_health_table(figures))
    return Section(
        "health",
        "Health of the vectors",
        "Signs by which trouble shows before the figures fall: a few items that push into every "
        "list, lengths that stand for popularity, a temperature that runs away.",
        blocks,
    )


def count_in_lists(users: np.ndarray, items: np.ndarray, k: int = HUB_K) -> np.ndarray:
    """Returns in how many of the users' lists of `k` each item stands, int64 [N]."""
    _, rows = top_k(users, items, min(k, len(items)))
    return np.bincount(np.asarray(rows).ravel(), minlength=len(items))


def _hubs(users: np.ndarray, items: np.ndarray) -> Chart:
    counts = np.sort(count_in_lists(users, items))[::-1]
    shares = np.cumsum(counts) / max(int(counts.sum()), 1)
    # At whole shares of the items, from the most listed.
    # Evenly spaced on the logarithmic axis, on which a million points would be drawn on each other.
    marks = np.unique(np.geomspace(1, len(items), 40).astype(int))
    x = marks / len(items)
    y = shares[marks - 1]
    svg = line_chart(
        "hubs",
        [Line("items", x, y)],
        x_label="items, from the most listed (share)",
        y_label="places in lists of 10 (share, 0 to 1)",
        log_x=True,
        x_ticks=[tick for tick in (0.001, 0.01, 0.1, 1.0) if tick >= x[0]],
    )
    top = max(1, len(items) // 100)
    caption = (
        f"The most listed hundredth of the items ({top:,}) takes {shares[top - 1]:.0%} of all "
        f"places in the lists of {len(users):,} queries (with what people had before), and "
        f"{np.mean(counts == 0):.0%} of the items are in none. The steeper the start, the more "
        "a few hubs push into everybody's list."
    )
    title = "Hubs: how few items fill the lists"
    rows = [[f"{share:.2%}", f"{part:.4f}"] for share, part in zip(x, y)]
    header = ["share of items", "share of places"]
    return Chart("hubs", title, svg, caption, Table(header, rows, title))


def _norms(lengths: np.ndarray, counts: np.ndarray) -> Chart:
    rows = evenly_spaced(np.arange(len(lengths)), DRAWN_ITEMS)
    # Plus one, as items without rows have no place on a logarithmic axis.
    shown = counts[rows] + 1
    svg = scatter_chart(
        "norms",
        [Points("items", shown, lengths[rows])],
        x_label="training rows of the item, plus one",
        y_label="length of its vector (no unit)",
        small=True,
        log_x=True,
    )
    correlation = float(np.corrcoef(np.log(counts + 1.0), lengths)[0, 1])
    said = (
        "Longer vectors score further from 0 with everybody. The correlation of length with the "
        f"log of popularity is {correlation:.2f}: {_meaning(correlation)}"
    )
    edges = np.quantile(counts, [0, 0.25, 0.5, 0.75, 1])
    table_rows = []
    for low, high in zip(edges, edges[1:]):
        # Ends count on both sides: many items may have the same number of rows, and a quarter none
        # of its own.
        part = lengths[(counts >= low) & (counts <= high)]
        table_rows.append([f"{low:,.0f} to {high:,.0f}", f"{part.mean():.4f}", f"{part.std():.4f}"])
    title = "Length of item vectors against popularity"
    header = ["training rows", "mean length", "deviation"]
    sample = f" A sample of {len(rows):,} items." if len(rows) < len(lengths) else ""
    return Chart("norms", title, svg, f"{said}{sample}", Table(header, table_rows, title))


def _meaning(correlation: float) -> str:
    if abs(correlation) < STRONG:
        return "length is not popularity."
    side = "popular" if correlation > 0 else "rare"
    return f"the longest vectors are those of {side} items, so that length says little of taste."


def _temperature(points: Sequence[tuple[float, float]]) -> Chart:
    x, y = zip(*points)
    svg = line_chart(
        "temperature",
        [Line("temperature", x, y)],
        x_label="step of the training (batches)",
        y_label="temperature (no unit; scores are divided by it)",
    )
    caption = (
        "How sharply the model tells right from wrong: lower is sharper. It should settle; one "
        "that falls without end learns rows by heart."
    )
    rows = [[f"{int(step):,}", f"{value:.5f}"] for step, value in points]
    title = "Temperature of the loss"
    return Chart("temperature", title, svg, caption, Table(["step", "temperature"], rows, title))


def _health_table(figures: Mapping[str, Any]) -> str:
    """Returns what was measured of the vectors and batches, as far as it is single numbers."""
    rows = []
    for title, value in _numbers(figures):
        rows.append([title, f"{value:,.4g}"])
    title = "Figures of vectors and batches"
    return collapsible(title, table(Table(["figure", "value"], rows, title)))


def _numbers(figures: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested mappings with their names in words."""
    for name, value in figures.items():
        title = f"{above} {name}".replace("_", " ").strip()
        if isinstance(value, Mapping):
            yield from _numbers(value, title)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield title, value


def _negatives(health: Mapping[str, Any]) -> Chart:
    """Returns how often items are candidates of a step, by popularity, and what batches repeat."""
    deciles = health["expected_counts"]["deciles"]
    labels = [str(number) for number in range(1, len(deciles) + 1)]
    svg = bar_chart(
        "negatives",
        labels,
        deciles,
        x_label="tenth of the items (1 least popular, 10 most)",
        y_label="an item as a candidate (expected times a step)",
    )
    caption = (
        "The model learns from what it is told to tell apart. Items that hardly ever are "
        "candidates are never pushed away, and may come up where they should not."
    )
    if "batches" in health:
        batches = health["batches"]
        caption += (
            f" In a batch of {batches['size']:,}, {batches['duplicate_rate']:.0%} of the items are "
            f"there already, and {batches['false_negative_rate']:.1%} of the negatives are things "
            "that the person has in fact taken."
        )
    rows = [[label, f"{count:.4g}"] for label, count in zip(labels, deciles)]
    title = "Negatives by popularity"
    return Chart("negatives", title, svg, caption, Table(["tenth", "expected"], rows, title))
