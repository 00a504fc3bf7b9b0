"""The example of a night: the model is taken on by a day's rows, or what is served stays."""

import json
import runpy
import sys

import pyarrow.csv
import pytest

import twotower as tt
from tests.pages import ROOT
from twotower import api, fitting
from twotower.data.shop.generate import generate
from twotower.retrieval.bundle import load_bundle
from twotower.training import run as run_folder

SCRIPT = ROOT / "experiments" / "examples" / "nightly" / "nightly.py"
CHEAP = {
    "features.user": {},
    "features.item": {},
    "training.steps": 4,
    "training.batch_size": 64,
    "training.validate_every": 4,
}


@pytest.fixture
def night(tmp_path, monkeypatch):
    """Runs the script in this process, with the figures of a test and trainings of seconds."""
    figures = {}
    make_config = fitting.make_config
    monkeypatch.setattr(fitting, "make_config", lambda log, config: make_config(log, CHEAP))
    monkeypatch.setattr(api, "make_validate", lambda *_: lambda weights: {"ndcg@10": 0.5})

    def evaluate(run, **options):
        measured = {"model": {"ndcg@10": figures[run.workdir.name]}}
        measured["protocol"] = {"step": run.step, "split": "test"}
        api.measure.write_metrics(measured, api.metrics_path(run.workdir, "test"))
        return measured

    monkeypatch.setattr(tt.Run, "evaluate", evaluate)
    shop = generate(1200)
    log = shop.interactions.select(["user_id", "item_id", "timestamp"])
    starts = {"day-1": 0, "day-2": 1000, "day-3": 1100}
    stops = [*starts.values(), 1200][1:]
    for (day, start), stop in zip(starts.items(), stops):
        pyarrow.csv.write_csv(log.slice(start, stop - start), tmp_path / f"{day}.csv")

    def run_night(day, figure, **flags):
        figures[day] = figure
        flags = {"runs": tmp_path / "runs", "day": day, "rows": tmp_path / f"{day}.csv"} | flags
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run_night


def killed(*args, **options):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_nights_swap_what_is_better_and_keep_days(night, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    night("day-1", 0.20)
    assert (runs / "current").resolve().name == "day-1"
    # From here on what is grown has its checkpoint, and no further step is trained.
    monkeypatch.setattr(run_folder, "fit", lambda *args, **options: None)
    with pytest.raises(SystemExit, match="0.1000, served now 0.2000: not good enough"):
        night("day-2", 0.10)
    assert (runs / "current").resolve().name == "day-1"
    # Killed in its training, begun again: the rows of the bad day are in it too.
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            night("day-3", 0.19)
    night("day-3", 0.19, keep=1)
    assert sorted(path.name for path in runs.iterdir()) == ["current", "day-3"]
    bundle = load_bundle(runs / "current" / "refit" / "bundle")
    record = json.loads((runs / "day-3" / "refit" / "refit.json").read_text())
    assert bundle.manifest["refit"] == record and record["rows"]["refit"] == 1200
    assert bundle.manifest["data"]["rows"] == {"train": 1200, "validation": 0, "test": 0}
    assert bundle.counts.sum() == 1200


def test_the_served_day_is_never_forgotten(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    for day in ("day-1", "day-2", "day-3", "day-4"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "config.json").touch()
    script["swap"](tmp_path / "current", "day-3")
    script["swap"](tmp_path / "current", "day-1")
    script["forget_old"](tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["current", "day-1", "day-3", "day-4"]
