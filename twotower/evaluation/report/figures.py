"""Charts of the report as SVG, whose text stays text and whose colours are CSS variables.

Matplotlib draws; what it writes is then cleaned, so that equal figures are equal text, the style
sheet of the page decides the colours in light and dark, and no attribute holds a style, which the
page's own security policy would refuse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from twotower.core.install import extra

if TYPE_CHECKING:  # an extra, which is not always installed
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Variable of page.css -> the colour that stands for it while matplotlib draws; each is the value of
# light pages, so that an image that no style sheet reaches has the right colours too.
INK = "#1b2026"
SOFT = "#4f5964"
GRID = "#dfe3e8"
CARD = "#ffffff"
SERIES = (
    "#0072b2",
    "#c24a00",
    "#007a5a",
    "#a0407a",
    "#6d5f00",
    "#4f4fb3",
    "#8a5526",
    "#76818c",
)
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", CARD: "card"}
VARIABLES |= {colour: f"c{number}" for number, colour in enumerate(SERIES)}
# Beside the colour: nothing is told by colour alone.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (8, 2)))

# Units of a chart, in which text is `TEXT` high. On a phone of 390 pixels 330 are left for it, and
# text is 11.6 pixels high: a wider chart would shrink it until nobody reads it.
WIDTH = 340
TEXT = 12
LINE = 16  # units from one line of text to the next
LETTER = 6.6  # units that a letter takes in the mean
PLOT = 205  # units of the height of a plot
LEFT = 54  # units beside the axis upwards, for its numbers
RIGHT = 14  # units beside the other end
ROW = 25  # units of a row of a chart of rows
LEGEND_ROW = 20  # units of a row of a legend
LONGEST_LABEL = 22  # characters of a label of a row
LONGEST_NAME = 19  # characters of a name in a legend, two of which stand side by side
LONGEST_LINE = 44  # characters of a line of the name of an axis
FEW_DECADES = 50  # ends of a logarithmic axis, one through the other, that have few powers of ten
# Numbers in a row.
Floats = Sequence[float] | np.ndarray
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_NUMBER = re.compile(r"-?\d+\.\d+")
_FONT = re.compile(r"font:\s*(?:(bold)\s+)?([\d.]+)px[^;]*")
_COLOUR = re.compile("|".join(VARIABLES))


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Name of the line.
        x: Positions, rising.
        y: Heights.
        low: Lower ends of a band around the line; empty without one.
        high: Upper ends, likewise.
    """

    label: str
    x: Floats
    y: Floats
    low: Floats = ()
    high: Floats = ()


@dataclasses.dataclass(frozen=True)
class Mark:
    """One row of a chart of rows.

    Attributes:
        label: Name of the row.
        value: The figure.
        low: Lower end of its interval; None without one.
        high: Upper end, likewise.
        other: Figure to compare with, shown hollow; None without one.
        strong: Whether it is the row to look at.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    other: float | None = None
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Points:
    """One group of points of a scatter chart.

    Attributes:
        label: Name of the group.
        x: Positions across.
        y: Positions upwards.
    """

    label: str
    x: Floats
    y: Floats


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    x_ticks: Sequence[float] = (),
    mark_x: float | None = None,
    mark_label: str = "",
) -> str:
    """Returns lines with their bands.

    Args:
        name: Name of the figure, which no other one of the page has.
        lines: At most as many lines as there are colours.
        x_label: Name of the axis across, with its unit.
        y_label: Name of the axis upwards, likewise.
        log_x: Whether the axis across is logarithmic, which its name then says.
        x_ticks: Positions that are named on it; by default round ones.
        mark_x: Position of an upright line.
        mark_label: What stands there.
    """
    with _drawing(name):
        figure, axes = _axes(
            _say_log(x_label) if log_x else x_label,
            y_label,
            names=len(lines),
            note=mark_label,
        )
        for number, line in enumerate(lines):
            colour = SERIES[number % len(SERIES)]
            axes.plot(
                line.x,
                line.y,
                color=colour,
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4 if len(line.x) > 12 else 5.5,
                linewidth=2 if number == 0 else 1.5,
                # The first line, which is the model's, lies on top.
                zorder=5 - number / 10,
            )
            if len(line.low):
                # Below all lines, and paler where many bands may overlap.
                alpha = 0.16 if number == 0 else 0.09
                axes.fill_between(
                    line.x, line.low, line.high, color=colour, alpha=alpha, linewidth=0
                )
        if log_x:
            _log_scale(axes)
        if len(x_ticks):
            axes.set_xticks(list(x_ticks), [f"{tick:,g}" for tick in x_ticks])
            # Minor ticks of a logarithmic axis would name further positions.
            axes.minorticks_off()
        axes.margins(x=0.04)
        if mark_x is not None:
            axes.axvline(mark_x, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
            _above(axes, mark_x, mark_label)
        if len(lines) > 1:
            _legend(figure, _by_last_height(lines), lines=True)
        return _svg(figure)


def row_chart(
    name: str,
    marks: Sequence[Mark],
    *,
    x_label: str,
    label: str = "model",
    other_label: str = "",
) -> str:
    """Returns one figure a row, each with its interval, under each other.

    Args:
        name: Name of the figure.
        marks: The rows, from the top.
        x_label: Name of the axis across, with its unit.
        label: Name of the filled marks, where there are hollow ones.
        other_label: Name of the hollow marks; "" without such.
    """
    with _drawing(name):
        labels = [shorten(mark.label) for mark in marks]
        # As wide as the longest: what is left is the data's.
        longest = max(map(len, labels), default=0)
        figure, axes = _axes(
            x_label,
            "",
            height=10 + ROW * len(marks),
            left=max(LEFT, round(14 + LETTER * longest)),
            note=other_label,
        )
        for row, mark in enumerate(marks):
            colour = SERIES[0] if mark.strong or other_label else SOFT
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.low, mark.high], [row, row], color=colour, linewidth=6, alpha=0.3)
            axes.plot([mark.value], [row], marker="o", color=colour, markersize=8)
            if mark.other is not None:
                hollow: Any = {"markerfacecolor": "none", "markeredgecolor": SERIES[1]}
                axes.plot(
                    [mark.other], [row], marker="D", markersize=7, markeredgewidth=1.7, **hollow
                )
        axes.set_yticks(range(len(marks)), labels, parse_math=False)
        for text, mark in zip(axes.get_yticklabels(), marks):
            text.set_color(INK)
            if mark.strong:
                text.set_fontweight("bold")
        # Downwards, so that the first row is on top.
        axes.set_ylim(len(marks) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        # With 0 in sight a small difference looks small.
        left, right = axes.get_xlim()
        left = min(0.0, left)
        right = max(0.0, right)
        # Room for the whole of the outermost marks.
        room = 0.04 * (right - left)
        axes.set_xlim(left - room, right + room)
        if any(mark.value < 0 for mark in marks):
            axes.axvline(0, color=SOFT, linewidth=1)
        if other_label:
            _key_above(figure, label, other_label)
        return _svg(figure)


def scatter_chart(
    name: str,
    groups: Sequence[Points],
    *,
    x_label: str,
    y_label: str,
    small: bool = False,
    log_x: bool = False,
) -> str:
    """Returns groups of points, each with a marker and a colour of its own.

    Args:
        name: Name of the figure.
        groups: At most as many groups as there are colours.
        x_label: Name of the axis across, with its unit.
        y_label: Name of the axis upwards, likewise.
        small: Whether there are so many points that they are drawn small.
        log_x: Whether the axis across is logarithmic, which its name then says.
    """
    with _drawing(name):
        figure, axes = _axes(
            _say_log(x_label) if log_x else x_label,
            y_label,
            names=len(groups),
            # A cloud of points has no direction in which it is longer.
            height=WIDTH - LEFT - RIGHT if small else PLOT,
        )
        _draw_groups(axes, groups, size=3.2 if small else 7.5)
        axes.margins(0.05)
        if log_x:
            _log_scale(axes)
        elif all(np.equal(np.mod(group.x, 1), 0).all() for group in groups):
            _count_across(axes)
        if len(groups) > 1:
            labels = [(number, group.label) for number, group in enumerate(groups)]
            _legend(figure, labels, lines=False)
        return _svg(figure)


def scatter_image(
    groups: Sequence[Points], *, x_label: str, y_label: str, title: str, target: io.BytesIO
) -> None:
    """Writes the chart of `scatter_chart` as PNG, for places that show images alone."""
    with _drawing("image"):
        figure, axes = _axes(
            x_label,
            y_label,
            names=max(2, len(groups)),
            height=WIDTH - LEFT - RIGHT,
            title=shorten(title, LONGEST_LINE),
        )
        _draw_groups(axes, groups, size=2.2)
        labels = [(number, group.label) for number, group in enumerate(groups)]
        _legend(figure, labels, lines=False)
        # Without the version of matplotlib, so that equal images are equal bytes.
        figure.savefig(target, format="png", dpi=200, metadata={"Software": None})


def bar_chart(
    name: str,
    labels: Sequence[str],
    heights: Sequence[float | None],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Returns upright bars; a height of None, which is not known, has none.

    Args:
        name: Name of the figure.
        labels: Names of the bars.
        heights: Their heights.
        x_label: Name of the axis across, with its unit.
        y_label: Name of the axis upwards, likewise.
    """
    with _drawing(name):
        figure, axes = _axes(x_label, y_label)
        known = [0.0 if height is None else height for height in heights]
        axes.bar(range(len(labels)), known, color=SERIES[0], width=0.72)
        axes.set_xticks(range(len(labels)), labels, parse_math=False)
        axes.grid(axis="x", visible=False)
        return _svg(figure)


def shorten(text: str, length: int = LONGEST_LABEL) -> str:
    """Returns a text cut to a length, with an ellipsis where something was cut.

    >>> shorten("bracelets and necklaces of silver", 12)
    'bracelets a…'
    """
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    return f"{text[: length - 1].rstrip()}…"


def _draw_groups(axes: Axes, groups: Sequence[Points], *, size: float) -> None:
    # The last groups are the smallest, or all that has no name: they lie below.
    for number, group in reversed(list(enumerate(groups))):
        axes.plot(
            np.asarray(group.x),
            np.asarray(group.y),
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=size,
            markeredgewidth=0,
            color=SERIES[number % len(SERIES)],
            # Many small points lie on each other: where they do the colour is deeper.
            alpha=0.8 if size < 5 else 1.0,
        )


@contextlib.contextmanager
def _drawing(name: str) -> Iterator[None]:
    """Sets how matplotlib draws, for the figure of this name alone."""
    with extra("plots", "--report"):
        import matplotlib
    settings: Any = {
        # Text, not outlines: it can be searched, read aloud and drawn in the page's own font.
        "svg.fonttype": "none",
        # Ids are hashes of what is drawn: with a salt for each figure no two of a page share one.
        "svg.hashsalt": name,
        # Titles and categories are data: "$" is a dollar in them.
        "text.parse_math": False,
        "font.size": TEXT,
        "axes.edgecolor": GRID,
        "axes.labelcolor": SOFT,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "text.color": INK,
        # The page has the background, light or dark.
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none" if name != "image" else CARD,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        # Otherwise points that nearly lie on a line are left out, and a figure changes with its
        # size.
        "path.simplify": False,
        # A tick says its whole number, not what is to be added to another.
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        yield


def _axes(
    x_label: str,
    y_label: str,
    *,
    names: int = 1,
    height: int = PLOT,
    left: int = LEFT,
    note: str = "",
    title: str = "",
) -> tuple[Figure, Axes]:
    """Returns a figure with one pair of axes, at margins that hold all that stands beside them.

    Args:
        x_label: Name of the axis across.
        y_label: Name of the axis upwards; "" without one.
        names: Number of names in the legend, which has its place below where there are two.
        height: Height of the plot, in units.
        left: Width of what stands beside the axis upwards, in units.
        note: What is written right above the plot, for which a line is left.
        title: Title of the whole.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    below = _wrap(x_label)
    # The name of the axis upwards lies above it, where it is read without turning the head.
    above = [*([title] if title else []), *_wrap(y_label)]
    legend = 10 + LEGEND_ROW * _legend_rows(names) if names > 1 else 0
    bottom = legend + 26 + LINE * len(below)
    top = 10 + LINE * (len(above) + bool(note))
    whole = bottom + height + top
    # Without pyplot, whose figures are global and stay in memory until they are closed.
    figure = Figure(figsize=(WIDTH / 72, whole / 72), dpi=72)
    FigureCanvasSVG(figure)
    width = WIDTH - left - RIGHT
    axes = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
    # At the right end, from where a long name has the width of the whole figure.
    for row, text in enumerate(below):
        y = bottom - 32 - LINE * row
        _write(figure, (WIDTH - RIGHT) / WIDTH, y / whole, text, color=SOFT, ha="right")
    for row, text in enumerate(above):
        y = whole - 10 - LINE * row
        colour = INK if title and not row else SOFT
        _write(figure, 8 / WIDTH, y / whole, text, color=colour, ha="left")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=3)
    return figure, axes


def _write(figure: Figure, x: float, y: float, text: str, *, color: str, ha: str) -> None:
    figure.text(x, y, text, color=color, ha=ha, va="center_baseline", parse_math=False)


def _wrap(label: str) -> list[str]:
    """Returns the name of an axis in lines that the figure has room for.

    >>> _wrap("recall@10 (share of the whole vectors' list, 0 to 1)")
    ['recall@10', "(share of the whole vectors' list, 0 to 1)"]
    """
    name, bracket, unit = label.partition(" (")
    # The unit stays in one piece where it can.
    if len(label) > LONGEST_LINE and bracket:
        return textwrap.wrap(name, LONGEST_LINE) + textwrap.wrap(f"({unit}", LONGEST_LINE)
    return textwrap.wrap(label, LONGEST_LINE)


def _say_log(label: str) -> str:
    """Returns the name of an axis that says that it is logarithmic.

    >>> _say_log("size of an item (bytes)")
    'size of an item (bytes, log scale)'
    """
    if label.endswith(")"):
        return f"{label[:-1]}, log scale)"
    return f"{label} (log scale)"


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Powers of ten alone would name one position or none.
    if high < FEW_DECADES * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    # Matplotlib writes powers of ten as formulas, which are no text.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _count_across(axes: Axes) -> None:
    """Names whole numbers alone: there is no trial 1.5."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _mark_thousands(axes: Axes) -> None:
    """Writes numbers from 10,000 on as the text of the page does."""
    from matplotlib.ticker import ScalarFormatter, StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        # Ticks that were named by hand stay as they are.
        is_plain = isinstance(axis.get_major_formatter(), ScalarFormatter)
        if is_plain and max(map(abs, axis.get_view_interval())) >= 10_000:
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _by_last_height(lines: Sequence[Line]) -> list[tuple[int, str]]:
    """Returns numbers and labels of lines, in the order in which their ends lie from the top."""
    heights = [line.y[-1] if len(line.y) else -np.inf for line in lines]
    order = sorted(range(len(lines)), key=lambda number: -heights[number])
    return [(number, lines[number].label) for number in order]


def _legend_rows(names: int) -> int:
    return (names + 1) // 2


def _legend(figure: Figure, labels: Sequence[tuple[int, str]], *, lines: bool) -> None:
    """Writes names with their colours, dashes and markers below the plot, in two columns."""
    from matplotlib.lines import Line2D

    height = 72 * figure.get_figheight()
    rows = _legend_rows(len(labels))
    for index, (number, label) in enumerate(labels):
        # Downwards first: the order of the names is that of the ends of the lines.
        column, row = divmod(index, rows)
        x = 10 + column * WIDTH / 2
        y = 10 + LEGEND_ROW * (rows - 1 - row)
        end = x + 24 if lines else x + 10
        sample = Line2D(
            [x / WIDTH, (x + end) / 2 / WIDTH, end / WIDTH],
            [y / height] * 3,
            color=SERIES[number % len(SERIES)],
            linestyle=DASHES[number % len(DASHES)] if lines else "none",
            marker=MARKERS[number % len(MARKERS)],
            markevery=[1],
            markersize=6,
            linewidth=1.8,
        )
        figure.add_artist(sample)
        text = shorten(label, LONGEST_NAME)
        _write(figure, (end + 6) / WIDTH, y / height, text, color=INK, ha="left")


def _key_above(figure: Figure, label: str, other_label: str) -> None:
    """Writes above the rows what filled and hollow marks are."""
    from matplotlib.lines import Line2D

    height = 72 * figure.get_figheight()
    y = 1 - 10 / height
    markers = (
        (14, "o", SERIES[0], SERIES[0], label),
        (WIDTH / 2, "D", "none", SERIES[1], other_label),
    )
    for x, marker, face, edge, words in markers:
        key = Line2D([x / WIDTH], [y], marker=marker, markersize=7, linestyle="none")
        key.set(markerfacecolor=face, markeredgecolor=edge, markeredgewidth=1.7)
        figure.add_artist(key)
        _write(figure, (x + 10) / WIDTH, y, shorten(words), color=INK, ha="left")


def _above(axes: Axes, x: float, label: str) -> None:
    """Writes a label above the axes, where no line can run, over a position on the axis across."""
    left, right = axes.get_xlim()
    is_right = x > (left + right) / 2
    axes.annotate(
        label,
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4 if is_right else -4, 5),
        textcoords="offset points",
        ha="right" if is_right else "left",
        color=INK,
        parse_math=False,
    )


def _svg(figure: Figure) -> str:
    """Returns a figure as an SVG element for a page of HTML."""
    for axes in figure.axes:
        _mark_thousands(axes)
    buffer = io.StringIO()
    # Without a date or a version: equal figures are equal text.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    text = ElementTree.tostring(root, encoding="unicode")
    # Ids that something refers to must stay; all others are noise of the generator.
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
        _clean(parent, used)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        # Who hears the page has the caption and the table of numbers.
        "aria-hidden": "true",
        "focusable": "false",
    }
    return ElementTree.tostring(root, encoding="unicode").replace("\n", "")


def _clean(element: ElementTree.Element, used: set[str]) -> None:
    """Rounds the numbers of an element, names its colours, and drops ids that nothing names."""
    attributes: dict[str, str] = {}
    for name, value in element.attrib.items():
        if name == "id" and value not in used:
            continue
        if name == "style":
            value = _FONT.sub(_font_size, value)
            value = _COLOUR.sub(lambda found: f"var(--{VARIABLES[found[0]]})", value)
        elif name in ("d", "x", "y", "transform", "width", "height"):
            value = _NUMBER.sub(_round, value.replace("\n", ""))
        if name == _HREF:
            name = "href"
        attributes[name] = value
    element.attrib = attributes


def _font_size(found: re.Match[str]) -> str:
    # The family is that of the page.
    weight = "; font-weight: 600" if found[1] else ""
    return f"font-size: {found[2]}px{weight}"


def _round(found: re.Match[str]) -> str:
    # A hundredth of a unit cannot be seen, and six digits double the size of the page.
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def styles_to_classes(svg: str, classes: dict[str, str]) -> str:
    """Returns an SVG whose styles are names of classes, since the page allows no other styles.

    Args:
        svg: An element that `_svg` returned.
        classes: Style -> class, to which styles that are not there yet are added.
    """

    def replace(found: re.Match[str]) -> str:
        # One class for equal styles of all charts: there are dozens, for thousands of elements.
        name = classes.setdefault(found[1], f"s{len(classes)}")
        return f'class="{name}"'

    return re.sub(r'style="([^"]*)"', replace, svg)


def style_sheet(classes: Mapping[str, str]) -> str:
    """Returns the rules of the classes that `styles_to_classes` made."""
    return "\n".join(f".{name} {{ {style} }}" for style, name in classes.items())
