"""The command `sweep`: real trainings that share their data, a table, and a best run that says of
how many it is the best."""

import json

import pytest

from tests.experiments.commands import error_of, output_of
from tests.experiments.trained import CONFIG
from twotower import api
from twotower.evaluation.report.text import format_report
from twotower.experiment import load_config

TRIALS = 4
EXPERIMENT = f"""
from twotower.config import defaults

def get_config():
    config = defaults()
    config.data.num_interactions = {CONFIG["data"]["num_interactions"]}
    config.features.user = {CONFIG["features"]["user"]}
    config.features.item = {CONFIG["features"]["item"]}
    config.training.batch_size = 64
    config.training.steps = 4
    config.training.validate_every = 2
    return config
"""


@pytest.mark.slow
def test_the_best_of_a_sweep_is_measured_once_and_says_of_how_many(tmp_path):
    config = tmp_path / "shop.py"
    config.write_text(EXPERIMENT)
    space = tmp_path / "space.json"
    space.write_text('{"training.tables.learning_rate": {"low": 1e-3, "high": 0.5, "log": true}}')
    workdir = tmp_path / "sweep"
    flags = [f"--config={config}", f"--space={space}", f"--workdir={workdir}"]
    said = output_of("sweep", *flags, f"--trials={TRIALS}")
    assert f"the best of {TRIALS} configurations tried" in said
    assert "What the differences come from: training.tables.learning_rate 100%" in said
    assert (workdir / "sweep.html").is_file() and len(list((workdir / "data").iterdir())) == 1
    measured = list(workdir.glob("trials/*/seed-0/evaluation/metrics.json"))
    assert len(measured) == 1
    run = api.load_run(measured[0].parent.parent)
    figures = json.loads(measured[0].read_text())
    assert figures["tuning"]["tried"] == TRIALS
    assert figures["tuning"]["value"] == run.validated["recall@10"]
    # Beside every figure of it, whenever it is measured.
    again = api.evaluate(run, split="validation")
    assert f"Tuned: the best of {TRIALS} configurations" in format_report(again, (10,))
    # Its file trains the same run.
    best = load_config(workdir / "best.py")
    api.train_in_folder(best, tmp_path / "again", data=next((workdir / "data").iterdir()))
    assert api.load_run(tmp_path / "again").validated == run.validated


def test_a_wrong_space_is_refused_before_anything_is_read(tmp_path):
    space = tmp_path / "space.json"
    space.write_text('{"training.batchsize": [1, 2]}')
    workdir = tmp_path / "sweep"
    flags = ["--config=quickstart", f"--space={space}", f"--workdir={workdir}"]
    said = error_of("sweep", *flags)
    assert "space.json" in said and "did you mean 'batch_size'" in said and not workdir.exists()
