"""Known mistakes of training, as changes to the modules of twotower; see `experiments.benchmarks.mistakes`."""

from __future__ import annotations

from experiments.benchmarks.mistakes import make  # noqa: F401

# fmt: off
TABLES = (
)
# fmt: on

TRAINING = (*TABLES,)
