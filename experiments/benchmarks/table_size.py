"""Does a step cost more when the table is larger? It must not: only the rows of the batch are touched.

    python -m experiments.benchmarks.table_size [--quick] [--json=FILE]

Two id-only models that differ in the rows of their tables take turns in one process, on the same ids (Zipf, so that the
rows in use are the same in number). Reported: the best and median milliseconds a step, and their ratios.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from absl import app

from experiments.benchmarks import harness

_ROWS = (100_000, 10_000_000)


def main(argv: list[str]) -> None:
    harness.steady_allocator()
    rounds, steps = (6, 20) if harness.QUICK.value else (30, 20)
    runs = {f"{rows:,} rows": _stepper(rows) for rows in _ROWS}
    times = harness.alternate(runs, rounds=rounds, repeats=steps)
    harness.report("table_size", times, unit="ms a step", base=f"{_ROWS[0]:,} rows")


def _stepper(rows: int):
    """One training step as a function of nothing, its state donated and kept inside."""
    from twotower.config import from_dict
    from twotower.data.encodings import Input, TableShape
    from twotower.towers.two_tower import TwoTower
    from twotower.training.step import Trainer, init_state, train_step

    config = from_dict({"objective": {"symmetric": True}, "training": {"batch_size": 1024}})
    inputs = {side: {"id": Input(table=f"{side}.id")} for side in ("user", "item")}
    # The tables are the users' and a catalogue as large, of half the width so that both fit into memory beside the peer's.
    tables = {f"{side}.id": TableShape(rows=rows, width=32) for side in inputs}
    model = TwoTower.build_from(config.model, inputs, tables)
    trainer = Trainer.build(config, model)
    counts = {side: np.ones(rows, np.float32) for side in inputs} | {"rows": np.float32(rows)}
    state = [jax.jit(functools.partial(init_state, trainer))(counts)]
    jitted = jax.jit(functools.partial(train_step, trainer=trainer), donate_argnums=0)
    rng = np.random.default_rng(0)
    batches = [jax.device_put(_batch(rng, rows)) for _ in range(8)]
    place = iter(range(10**9))

    def step() -> None:
        state[0], metrics = jitted(state[0], batches[next(place) % 8])
        jax.block_until_ready(metrics["loss"])

    return step


def _batch(rng: np.random.Generator, rows: int) -> dict:
    user, item = ((rng.zipf(1.1, 1024) % 100_000 * (rows // 100_000)).astype(np.int32) for _ in range(2))
    return {
        "user": user, "item": item, "weight": np.ones(1024, np.float32),
        "user_features": {"id": user}, "item_features": {"id": item},
    }  # fmt: skip


if __name__ == "__main__":
    app.run(main)
