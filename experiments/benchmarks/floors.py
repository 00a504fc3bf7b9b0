"""Floors of the ratios that benchmarks print, for --check."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from absl import flags

CHECK = flags.DEFINE_bool("check", False, "Fail where a ratio is below its floor.")


def check(figures: Mapping[str, float], floors: Mapping[str, float]) -> None:
    """Ends the program with status 1 where a figure is below its floor, if --check is given.

    Args:
        figures: Name of a ratio -> its value.
        floors: Name of a ratio -> the least value it may have. Those that were not measured, such
            as those to a peer that could not be installed, are passed over.
    """
    if not CHECK.value:
        return
    below = []
    for name, floor in floors.items():
        if name in figures and figures[name] < floor:
            below.append(f"{name} is {figures[name]:.2f}, below {floor:.2f}")
    if below:
        sys.exit("; ".join(below))
