"""The trials of tuning an index, as a table and as a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from twotower.core.errors import ConfigError
from twotower.core.install import extra
from twotower.core.tables import format_table
from twotower.index.base import Index
from twotower.index.shards.divided import DividedIndex
from twotower.index.tuning import Comparison, SearchEffort, Trial, Tuning

# "-margin" is the recall less its margin, which must reach the target.
HEADER = ("k", "leaves", "reorder", "recall", "-margin", "queries/s", "")


def format_tuning(tuning: Tuning) -> str:
    """Returns a table of the trials that explain the choice, and the choice in words."""
    if not tuning.tried:
        return f"{tuning.kind}: exact, nothing to tune."
    chosen = {(effort.k, effort.leaves, effort.reorder) for effort in tuning.efforts}
    rows = [_cells(trial, chosen) for trial in _select_trials(tuning.tried, chosen)]
    table = format_table(rows, HEADER, align="rrrrrrl")
    lines = [
        f"{tuning.kind}, {tuning.num_leaves:,} leaves, target {tuning.target_recall:.4g}:",
        textwrap.indent(table, "  "),
    ]
    lines.extend(_sentence(effort) for effort in tuning.efforts)
    if tuning.recall_by_decile:
        recalls = " ".join(map(_recall_text, tuning.recall_by_decile))
        k = tuning.efforts[0].k
        lines.append(f"Recall@{k} by decile of popularity, the least popular first: {recalls}")
    if tuning.compared:
        lines.append(format_comparison(tuning.compared))
    return "\n".join(lines)


def format_comparison(compared: Sequence[Comparison]) -> str:
    """Returns a table of the builds that an index was chosen from."""
    rows = [
        [
            build.kind,
            str(build.num_leaves),
            f"{build.recall:.4f}",
            f"{build.milliseconds:.4f}",
            "chosen" if build.chosen else "",
        ]
        for build in compared
    ]
    table = format_table(rows, ("build", "leaves", "recall", "ms a query", ""), align="lrrrl")
    first = compared[0]
    title = f"Builds compared over {first.num_items:,} items, for {first.optimize_for}:"
    return f"{title}\n{textwrap.indent(table, '  ')}"


def _recall_text(recall: float | None) -> str:
    # No true item is in the decile: its recall is not known, which is not 0.
    if recall is None:
        return "-"
    return f"{recall:.3f}"


def _cells(trial: Trial, chosen: set[tuple[int, int, int]]) -> list[str]:
    """Returns a row of the table."""
    mark = "" if trial.reached else "too low"
    if (trial.k, trial.leaves, trial.reorder) in chosen:
        mark = "chosen"
    return [
        str(trial.k),
        str(trial.leaves),
        str(trial.reorder),
        f"{trial.recall:.4f}",
        f"{trial.recall - trial.margin:.4f}",
        f"{trial.queries_per_second:,.0f}",
        mark,
    ]


def _sentence(effort: SearchEffort) -> str:
    """Returns the setting of one list length and its recall in words."""
    setting = f"{effort.leaves} leaves"
    if effort.reorder:
        setting += f", {effort.reorder} candidates"
    return (
        f"Lists of {effort.k:,}: {setting}, recall {effort.recall:.4f} "
        f"on {effort.queries} held-out users."
    )


def _select_trials(trials: Sequence[Trial], chosen: set[tuple[int, int, int]]) -> list[Trial]:
    """Returns the trials that were chosen, and the best of each list length and candidates.

    The best is the one of fewest leaves that reached the target, or that of the highest recall
    where none did.
    """
    # Tuning tries dozens of settings; these say why the others were not taken.
    best: dict[tuple[int, int], Trial] = {}
    for trial in trials:
        key = (trial.k, trial.reorder)
        if key not in best or _rank(trial) > _rank(best[key]):
            best[key] = trial
    shown = set(best.values())
    shown.update(t for t in trials if (t.k, t.leaves, t.reorder) in chosen)
    return sorted(shown, key=lambda trial: (trial.k, trial.reorder, trial.leaves))


def _rank(trial: Trial) -> tuple[bool, float]:
    """Returns a key that is greater for a better trial of one length and number of candidates."""
    if trial.reached:
        return True, -trial.leaves
    return False, trial.recall


def check_plot(path: Path) -> Path:
    """Returns the file that a plot is saved to, a PNG if its name does not say otherwise.

    Raises:
        ConfigError: Matplotlib is missing, or does not write such files.
    """
    with extra("plots", "--plot"):
        from matplotlib.figure import Figure
    path = path if path.suffix else path.with_suffix(".png")
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ConfigError(
            f"--plot={path}: no plot is written as {path.suffix!r}. Known: {', '.join(known)}."
        )
    return path


def save_plot(index: Index, path: Path) -> str:
    """Plots the trials by which an index was tuned, and returns a line on it.

    Args:
        index: Index that was built.
        path: File of the plot, checked by `check_plot`.
    """
    if isinstance(index, DividedIndex):
        return f"No plot in {path}: each of the {len(index.parts)} shards has trials of its own."
    tuning = getattr(index, "tuning", None)
    if tuning is None or not tuning.tried:
        return f"No plot in {path}: the {index.kind} index has nothing to tune."
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_tuning(tuning.tried, tuning.target_recall, path)
    return f"Plot: {path}."


def plot_tuning(trials: Sequence[Trial], target_recall: float, path: Path) -> None:
    """Plots recall against queries per second of the trials into an image.

    Raises:
        ConfigError: Matplotlib is missing; the message names the extra to install.
    """
    with extra("plots", "A plot"):
        from matplotlib.figure import Figure
    # One plot for each list length, and in it one line for each number of candidates.
    lengths = sorted({trial.k for trial in trials})
    figure = Figure(figsize=(6 * len(lengths), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, k in zip(all_axes, lengths):
        same_length = [trial for trial in trials if trial.k == k]
        for reorder in sorted({trial.reorder for trial in same_length}):
            series = [trial for trial in same_length if trial.reorder == reorder]
            # A line from the fewest leaves to the most: recall rises as speed falls.
            points = sorted((trial.recall, trial.queries_per_second) for trial in series)
            label = f"{reorder} candidates" if reorder else "whole vectors"
            axes.plot(*zip(*points), marker="o", label=label)
        axes.axvline(target_recall, color="grey", linestyle="--")
        axes.set(xlabel=f"recall@{k}", ylabel="queries per second", yscale="log")
        axes.legend()
    figure.savefig(path)
