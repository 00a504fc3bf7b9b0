"""An experiment with several seeds, as it is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from twotower.evaluation import report
from twotower.training.run import load_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs")
    small = (
        "data.num_interactions=3000",
        "training.steps=4",
        "training.validate_every=4",
        "training.batch_size=64",
        "training.steps_per_dispatch=1",
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.repeat",
            "--config=experiments/configs/quickstart.py",
            f"--workdir={workdir}",
            "--seeds=2",
            "--baselines",
            *(f"--config.{option}" for option in small),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert not done.returncode, done.stderr
    return workdir, done.stdout


def test_each_seed_is_a_run_of_its_own_and_measured_as_evaluate_does(repeated):
    workdir, _ = repeated
    written = json.loads((workdir / "repeat.json").read_text())
    assert list(written) == ["seed-0", "seed-1"]
    for seed in (0, 1):
        run = load_run(workdir / f"seed-{seed}")
        assert run.config.training.seed == seed
        measured = report.measure_run(run, ks=run.config.evaluation.ks, baselines=False)
        assert written[f"seed-{seed}"]["model"] == measured["model"]
    assert written["seed-0"]["model"] != written["seed-1"]["model"]
    assert "baselines" in written["seed-0"] and "baselines" not in written["seed-1"]


def test_the_table_has_means_and_deviations_beside_the_baselines(repeated):
    workdir, printed = repeated
    written = json.loads((workdir / "repeat.json").read_text())
    values = [each["model"]["recall@10"] for each in written.values()]
    line = next(line for line in printed.splitlines() if line.startswith("recall@10 ")).split()
    popularity = written["seed-0"]["baselines"]["popularity"]["recall@10"]
    assert line[1:5] == [
        f"{x:.4f}" for x in (np.mean(values), np.std(values, ddof=1), min(values), max(values))
    ]
    assert f"{popularity:.4f}" in line[5:]
