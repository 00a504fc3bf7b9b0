"""An experiment with several seeds: their runs, and the table of what they gave."""

import dataclasses
import json

import numpy as np
import pytest

from tests.experiments.trained import CONFIG
from twotower import api
from twotower.config import from_dict
from twotower.evaluation import measure
from twotower.evaluation.baselines.popularity import random_scores
from twotower.evaluation.baselines.tuning import Baselines
from twotower.evaluation.report.text import format_seeds, format_spread

pytestmark = pytest.mark.slow


def test_each_seed_is_a_run_of_its_own_and_measured_as_evaluate_does(tmp_path, monkeypatch):
    def make_baselines(prepared, queries, options, folder):
        return Baselines({"random": random_scores(queries.num_items)})

    monkeypatch.setattr(measure, "make_baselines", make_baselines)
    config = from_dict(CONFIG | {"training": CONFIG["training"] | {"steps": 2}})
    measured = api.repeat(config, tmp_path, seeds=2, baselines=True)
    written = json.loads((tmp_path / "repeat.json").read_text())
    assert list(written) == ["seed-0", "seed-1"] and list(written.values()) == measured
    for seed in (0, 1):
        run = api.load_run(tmp_path / f"seed-{seed}")
        assert run.config.training == dataclasses.replace(config.training, seed=seed)
        alone = measure.measure_run(run, ks=config.evaluation.ks, baselines=False)
        assert measured[seed]["model"] == alone["model"]
    assert measured[0]["model"] != measured[1]["model"]
    assert "baselines" in measured[0] and "baselines" not in measured[1]
    # A second call measures what is there.
    assert api.repeat(config, tmp_path, seeds=1)[0]["model"] == measured[0]["model"]


def figures(value):
    return {f"{name}@10": value for name in ("recall", "ndcg")}


def cells(table, metric):
    line = next(line for line in table.splitlines() if line.startswith(f"{metric} "))
    return line.split()[1:]


def test_the_table_has_means_and_deviations_beside_the_baselines():
    values = [0.1, 0.25, 0.2]
    baselines = {"popularity_last_week": figures(0.05)}
    table = format_spread([figures(value) for value in values], baselines, (10,))
    assert "last week" in table.splitlines()[0]
    spread = (np.mean(values), np.std(values, ddof=1), min(values), max(values), 0.05)
    for metric in ("recall@10", "ndcg@10"):
        assert cells(table, metric) == [f"{figure:.4f}" for figure in spread]
    # One seed has no deviation.
    assert cells(format_spread([figures(0.1)], {}, (10,)), "recall@10")[1] == "-"


def test_both_ways_of_masking_are_shown():
    one = {"model": figures(0.1), "model_unmasked": figures(0.2), "baselines": {}}
    text = format_seeds([one, one], (10,), "validation")
    assert "Seen items masked, validation, 2 seeds:" in text and "Nothing masked" in text
