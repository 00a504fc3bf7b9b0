"""The figures of slices as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.core.tables import format_table
from twotower.evaluation.intervals import LEVEL


def format_slices(slices: Mapping[str, Any], k: int) -> list[str]:
    """Returns a table with a row for each value: its recall, and that of its best baseline.

    A slice that has but one value says nothing that the other tables do not, and is left out.

    Args:
        slices: Figures as `twotower.evaluation.slices.measure_slices` returns them.
        k: Length of the lists.
    """
    metric = f"recall@{k}"
    rows = []
    has_baselines = False
    for name, values in slices.items():
        if len(values) < 2:
            continue
        for value, measured in values.items():
            low, high = measured["intervals"][metric]
            row = [
                name.replace("_", " "),
                value,
                f"{measured['queries']:,}",
                f"{measured['model'][metric]:.4f}",
                f"{low:.4f} to {high:.4f}",
            ]
            if "baseline" in measured:
                has_baselines = True
                best = measured["baseline_name"].replace("_", " ")
                row += [f"{measured['baseline'][metric]:.4f}", best]
            rows.append(row)
    # A header above nothing would look like a failure.
    if not rows:
        return []
    header = ["slice", "value", "queries", metric, f"{LEVEL:.0%} interval"]
    if has_baselines:
        # Named in each row: which baseline is the best differs from part to part.
        header += ["baseline", "the best one"]
    table = format_table(rows, header, align="llrrrrl")
    return [
        "",
        "Slices, seen items masked; those of items ask for their right answers alone:",
        table,
    ]
