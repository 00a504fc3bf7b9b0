"""Does a training that is killed again and again end in the same bits?

    python -m experiments.benchmarks.attacks [--kills=30] [--steps=6000] [--quick] [--json=FILE]

A small model is trained in a process, which is ended at random steps, by SIGKILL and by SIGTERM in
turn, and started again by the same command. Its last checkpoint is compared with that of a training
that nobody ended: every array, the progress and the best step. SIGTERM must save and end with the
status 75. Prints what was wrong, which should be nothing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from experiments.benchmarks import harness

_KILLS = flags.DEFINE_integer("kills", 30, "Number of times that the training is ended.")
_STEPS = flags.DEFINE_integer("steps", 6_000, "Steps of the training.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the steps to end it at.")
QUICK_KILLS = 2
CONFIG = "tests/training/tiny_config.py"
VALIDATE_EVERY = 50


def command(workdir: Path, steps: int) -> list[str]:
    """Returns the command that begins the training, and goes on with it."""
    return [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--config.training.steps={steps}",
        f"--config.training.validate_every={VALIDATE_EVERY}",
        "--config.training.log_every=5",
    ]


def last_step(workdir: Path) -> int:
    """Returns the step of the last line of metrics."""
    from twotower.training.metrics import read_lines

    lines = read_lines(workdir)
    if not lines:
        return 0
    return lines[-1]["step"]


def end_at(workdir: Path, steps: int, step: int, number: signal.Signals) -> list[str]:
    """Starts the training and ends it a moment after a step; returns what was wrong."""
    process = subprocess.Popen(command(workdir, steps), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and last_step(workdir) < step:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    expected = -signal.SIGKILL if number == signal.SIGKILL else os.EX_TEMPFAIL
    if process.returncode == expected:
        return []
    return [f"{number.name} at step {step}: status {process.returncode}, {errors[-300:]}"]


def final_state(workdir: Path) -> tuple[Any, Any, int | None]:
    """Returns all arrays of the last checkpoint, the progress, and the best step."""
    from twotower.core.mesh import make_mesh
    from twotower.training.candidates import corpus_size
    from twotower.training.init import abstract_state
    from twotower.training.loop import open_checkpoints
    from twotower.training.run import load_run
    from twotower.training.state import Trainer

    run = load_run(workdir, checkpoint="latest")
    trainer = Trainer.build(run.config, run.model, corpus_size(run.prepared))
    with open_checkpoints(workdir, run.config, read_only=True) as checkpoints:
        state, record = checkpoints.restore(run.step, abstract_state(trainer, make_mesh(1)))
        return state, record, checkpoints.best()


def differences(killed: Path, whole: Path) -> list[str]:
    """Returns the names of what differs between the ends of two trainings."""
    import jax
    import numpy as np

    state, *rest = final_state(killed)
    expected, *expected_rest = final_state(whole)
    wrong = []
    for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected)):
        if not np.array_equal(np.asarray(a), np.asarray(b)):
            wrong.append(jax.tree_util.keystr(path))
    if rest != expected_rest:
        wrong.append(f"progress {rest}, {expected_rest}")
    return wrong


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    kills = QUICK_KILLS if harness.QUICK.value else _KILLS.value
    steps = _STEPS.value
    rng = random.Random(_SEED.value)
    # Not the last steps, which may be over before the signal comes.
    moments = sorted(rng.sample(range(1, steps * 9 // 10), kills))
    wrong: list[str] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        killed = Path(folder) / "killed"
        whole = Path(folder) / "whole"
        for count, step in enumerate(moments):
            number = (signal.SIGKILL, signal.SIGTERM)[count % 2]
            wrong += end_at(killed, steps, step, number)
        for workdir in (killed, whole):
            subprocess.run(command(workdir, steps), check=True, capture_output=True)
        wrong += differences(killed, whole)
    for line in wrong:
        print(line)
    seconds = time.perf_counter() - start
    print(f"{kills} kills, {len(wrong)} things wrong, {seconds:.0f} s.")
    harness.write_json("attacks", {"kills": kills, "wrong": len(wrong)}, unit="", base="")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
