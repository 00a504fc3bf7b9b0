"""How many configurations a run was chosen from, which is said beside its figures.

The best of many on validation rows is in part the luckiest: its validation figure promises more
than other rows will keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.core.files import atomic, read_json

FILE = "tuning.json"  # beside the configuration of a run


def write_tuning(workdir: Path, tuning: Mapping[str, Any]) -> None:
    """Writes what a run was chosen from into its folder.

    Args:
        workdir: Folder of the run.
        tuning: "tried", number of configurations; "metric", what they were compared by; "value",
            that of this run's configuration; "sweep", the folder of the sweep.
    """
    with atomic(workdir / FILE) as temporary:
        temporary.write_text(json.dumps(tuning, indent=1) + "\n", encoding="utf-8")


def read_tuning(workdir: Path) -> dict[str, Any] | None:
    """Returns what `write_tuning` wrote; None of a run that was chosen from no others."""
    path = workdir / FILE
    # Most runs: nothing was chosen between.
    if not path.exists():
        return None
    return read_json(path)


def describe_tuning(tuning: Mapping[str, Any]) -> str:
    """Returns the sentence that stands beside the figures of a tuned run."""
    return (
        f"Tuned: the best of {tuning['tried']:,} configurations tried, by validation "
        f"{tuning['metric']} ({tuning['value']:.4f})."
    )
