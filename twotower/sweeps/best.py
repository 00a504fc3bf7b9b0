"""The best configuration of a sweep as an experiment file, one option a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from twotower.core.files import atomic
from twotower.experiment import changed_options
from twotower.sweeps.study import Sweep

BEST = "best.py"


def write_best(sweep: Sweep) -> Path:
    """Writes the experiment that `train --config=` reads, and returns its file."""
    path = sweep.workdir / BEST
    with atomic(path) as temporary:
        temporary.write_text(format_experiment(sweep), encoding="utf-8")
    return path


def format_experiment(sweep: Sweep) -> str:
    """Returns the best configuration as Python: all options that are not at their defaults."""
    summary = (
        f"The best of {len(sweep.trials)} configurations tried, by validation {sweep.metric}: "
        f"{sweep.best.value:.4f}."
    )
    swept = set()
    for name, value in sweep.values.items():
        # Of a choice of several options of a section, those that it names.
        inner = value if isinstance(value, Mapping) else {}
        swept |= {name, *(f"{name}.{key}" for key in inner)}
    lines = []
    # Defaults are left out, so that what was chosen is not lost among them.
    for name, value in changed_options(sweep.config):
        line = f"    config.{name} = {value!r}"
        if name in swept:
            line += "  # swept"
        lines.append(line)
    body = "\n".join(lines)
    return (
        f'"""{summary}"""\n\n'
        # Python, as the experiments that come with the library: it is meant to be edited further.
        "from twotower.config import defaults\n\n\n"
        f"def get_config():\n    config = defaults()\n{body}\n    return config\n"
    )
