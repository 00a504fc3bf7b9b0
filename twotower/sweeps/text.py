"""A sweep as text for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.core.install import command
from twotower.core.tables import format_table
from twotower.sweeps.space import describe_edges
from twotower.sweeps.study import Sweep, Tried

SHOWN = 15  # trials of the table; the page has all
TEST_METRICS = ("recall", "ndcg")


def format_sweep(sweep: Sweep, best_file: Path, data: Path) -> str:
    """Returns the table of the best trials and what came of the sweep.

    Args:
        sweep: The sweep.
        best_file: File of the best configuration.
        data: Folder of its prepared data.
    """
    # A terminal shows the best first; the page tells in which order they were tried.
    order = ranked(sweep.trials)
    rows = [[str(trial.number), *cells(trial, sweep)] for trial in order[:SHOWN]]
    header = ["trial", sweep.metric, "deviation", "", *short_names(list(sweep.space))]
    lines = [count_line(sweep), "", format_table(rows, header, align="lrr")]
    if len(order) > SHOWN:
        lines.append(f"The best {SHOWN} of {len(order):,}.")
    lines += ["", best_line(sweep), *describe_edges(sweep.space, sweep.best.options)]
    if sweep.importances:
        # By whole names, which can be copied into a space or a flag.
        shares = ", ".join(f"{name} {share:.0%}" for name, share in sweep.importances.items())
        lines.append(f"What the differences come from: {shares}.")
    lines += [f"{test_line(sweep)}", ""]
    lines.append(f"Best configuration: {best_file}")
    # With the data of the sweep, which is not prepared again.
    flags = (f"--config={best_file}", f"--data={data}", "--workdir=runs/NAME")
    lines.append(f"  {command('train', *flags)}")
    lines.append(f"Its run: {sweep.runs[0]}")
    return "\n".join(lines)


def ranked(trials: Sequence[Tried]) -> list[Tried]:
    """Returns trials with the best first, and those that were not finished last."""
    states = ("finished", "pruned", "failed")
    # The value of a pruned trial is of an unfinished curve, and is compared with no mean of seeds.
    return sorted(trials, key=lambda one: (states.index(one.state), -one.value, one.number))


def count_line(sweep: Sweep) -> str:
    """Returns how many configurations were tried, and what became of them."""
    line = f"{len(sweep.trials):,} configurations tried"
    parts = []
    for state in ("pruned", "failed"):
        number = sum(trial.state == state for trial in sweep.trials)
        if number:
            parts.append(f"{number:,} {state}")
    if parts:
        line += f" ({', '.join(parts)})"
    seeds = len(sweep.best.seeds)
    word = "seed" if seeds == 1 else "seeds"
    return f"{line}, {seeds} {word} each, compared by validation {sweep.metric}."


def best_line(sweep: Sweep) -> str:
    """Returns the best value, with the number of those that it is the best of."""
    # The greatest of many noisy figures is in part luck, and a reader must know of how many.
    best = sweep.best
    return (
        f"Best: trial {best.number}, validation {sweep.metric} {best.value:.4f}, the best of "
        f"{len(sweep.trials):,} configurations tried: other rows will show less."
    )


def test_line(sweep: Sweep) -> str:
    """Returns the figures of the best on the test rows, which nothing was chosen by."""
    if not sweep.test:
        return "There are no test rows: how good the best is on rows that chose nothing is unknown."
    parts = []
    for name in sweep.test[0]:
        # An evaluation has dozens of figures: these two are those that people compare.
        if name.partition("@")[0] not in TEST_METRICS:
            continue
        values = [figures[name] for figures in sweep.test]
        text = f"{name} {statistics.mean(values):.4f}"
        # A single seed has no deviation, and 0 would claim that there is none.
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.4f}"
        parts.append(text)
    return f"Test rows, measured once, for the best of {len(sweep.trials):,}: {', '.join(parts)}."


def cells(trial: Tried, sweep: Sweep) -> list[str]:
    """Returns the cells of a trial: value, deviation over seeds, state, options."""
    value = "-"
    if trial.seeds:
        value = f"{trial.value:.4f}"
    deviation = "-"
    if len(trial.seeds) > 1:
        deviation = f"{statistics.stdev(trial.seeds):.4f}"
    options = [show(trial.options[name]) for name in sweep.space]
    return [value, deviation, trial.state, *options]


def show(value: Any) -> str:
    """Returns a value of an option as tables show it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the names of options without what all of them begin with.

    >>> short_names(["training.tables.learning_rate", "training.batch_size"])
    ['tables.learning_rate', 'batch_size']
    """
    parts = [name.split(".") for name in names]
    common = 0
    # Each keeps its last part at least, even where it is the only option.
    while all(
        len(one) > common + 1 and one[: common + 1] == parts[0][: common + 1] for one in parts
    ):
        common += 1
    return [".".join(one[common:]) for one in parts]
