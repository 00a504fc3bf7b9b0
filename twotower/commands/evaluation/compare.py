r"""Compares evaluated runs, query by query: best, not to be told apart, differences, slices.

    twotower compare runs/a runs/b runs/b:ease [--split=validation] [--json=compared.json]

Each run is a folder that `evaluate` measured, or that of `repeat`, whose seeds are averaged;
RUN:NAME is a baseline that was measured beside it (--baselines). All must have been measured alike.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

FLAGS = flags.FlagValues()
POSITIONAL = "runs"  # the flag that an argument without a name sets
_RUNS = flags.DEFINE_multi_string(
    "runs", [], "Runs to compare, the first with each of the others.", flag_values=FLAGS
)
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["test", "validation"], "The rows that were found.", flag_values=FLAGS
)
_JSON = flags.DEFINE_string("json", None, "File to write all figures to.", flag_values=FLAGS)


def main() -> None:
    from twotower import api
    from twotower.core.files import atomic

    comparison = api.compare(_RUNS.value, split=_SPLIT.value)
    if _JSON.value:
        with atomic(Path(_JSON.value)) as temporary:
            temporary.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")
        print(f"\nWritten to {_JSON.value}.")
