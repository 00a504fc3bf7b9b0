"""A run killed with SIGKILL at random moments and started again by the same command ends in the
same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from twotower.core.mesh import make_mesh
from twotower.training.candidates import corpus_size
from twotower.training.init import abstract_state
from twotower.training.loop import open_checkpoints
from twotower.training.run import load_run
from twotower.training.state import Trainer

pytestmark = pytest.mark.slow

STEPS = 200
COMMAND = [
    sys.executable,
    "-m",
    "experiments.train",
    "--config=tests/training/tiny_config.py",
    f"--config.training.steps={STEPS}",
    "--config.training.validate_every=10",
    "--config.training.log_every=5",
]

# The uninterrupted run compiles for itself, as it does for those who keep no compiled programs; the
# one that is killed takes what is kept, and must end in the same bits.
ALONE = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}


def _final_state(workdir):
    run = load_run(workdir, checkpoint="latest")
    trainer = Trainer.build(run.config, run.model, corpus_size(run.prepared))
    abstract = abstract_state(trainer, make_mesh(1))
    with open_checkpoints(workdir, run.config) as checkpoints:
        return checkpoints.restore(STEPS, abstract), checkpoints.best()


def _last_step(path):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _kill_after(workdir, step, delay):
    """Starts the run, and kills it a moment after it has logged `step`."""
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and _last_step(workdir / "metrics.jsonl") < step:
            time.sleep(0.005)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, (
        f"ended by itself before step {step}: {errors.decode()[-2000:]}"
    )


def test_killed_three_times_it_ends_in_the_same_bits(tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, int(0.9 * STEPS)), 3)):
        _kill_after(tmp_path / "killed", step, delay=rng.random() * 0.05)
    for name, environment in (("killed", None), ("whole", ALONE)):
        command = [*COMMAND, f"--workdir={tmp_path / name}"]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    (killed, killed_record), killed_best = _final_state(tmp_path / "killed")
    (whole, whole_record), whole_best = _final_state(tmp_path / "whole")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b, err_msg=f"seed {seed}"), killed, whole
    )
    assert (killed_record, killed_best) == (whole_record, whole_best), f"seed {seed}"
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps) and steps[-1] == STEPS
