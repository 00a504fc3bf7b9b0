"""What is wrong with a run, its data or its protocol stands in the first lines of its report."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from tests.retrieval.runs import make_run
from twotower.data.shop.generate import generate
from twotower.evaluation.baselines.as_run import baseline_run
from twotower.evaluation.baselines.factors import make_factors
from twotower.evaluation.baselines.make import NAMES, BaselineOptions
from twotower.evaluation.baselines.tuning import NO_CACHE
from twotower.evaluation.measure import measure_run
from twotower.evaluation.report.quality import find_warnings
from twotower.evaluation.report.text import format_report

pytestmark = pytest.mark.slow

KS = (10,)


def spoken_of(run, **options):
    """The audits that speak: the first lines of the text, and the first paragraph of the page."""
    measured = measure_run(run, ks=KS, **({"baselines": False} | options))
    audits = measured["audits"]
    spoken = [name for name, audit in audits.items() if audit["speaks"]]
    sentences = [audits[name]["sentence"] for name in spoken]
    lines = format_report(measured, KS).splitlines()[: len(spoken)]
    assert lines == [f"WARNING: {sentence}" for sentence in sentences]
    assert find_warnings(measured, None) == sentences
    return spoken, audits


def test_a_log_that_is_nine_tenths_unreachable_and_a_model_without_a_signal(tmp_path):
    log = generate(1_000).interactions.select(["user_id", "item_id", "timestamp"])
    item_ids = log["item_id"].to_pylist()
    # Nine of ten of the latest rows are of items that come up then.
    for row in range(800, 1_000):
        if row % 10:
            item_ids[row] = f"new-{row}"
    log = log.set_column(1, "item_id", pa.array(item_ids))
    pyarrow.csv.write_csv(log, tmp_path / "events.csv")
    features = {
        side: {f"{side}_id": {"type": "string", "embedding_size": 16}} for side in ("user", "item")
    }
    run = make_run(
        tmp_path / "run",
        data={"source": "csv", "interactions": {"path": str(tmp_path / "events.csv")}},
        features=features,
        split={"validation": 0.0, "test": 0.1},
    )
    spoken, audits = spoken_of(run)
    assert spoken == ["unreachable", "no_signal"]
    assert audits["unreachable"]["outside_corpus"] == 91
    assert audits["unreachable"]["sentence"].startswith("91.0% of the 100 test answers")


def trained_run(folder, log):
    """A run whose towers are fitted to the training rows of a log, in closed form."""
    folder.mkdir()
    pyarrow.csv.write_csv(log, folder / "events.csv")
    run = make_run(
        folder / "run",
        data={"source": "csv", "interactions": {"path": str(folder / "events.csv")}},
        features={side: {f"{side}_id": {"type": "string"}} for side in ("user", "item")},
        model={"user": {}, "item": {}},
        split={"validation": 0.0, "test": 0.2},
    )
    ease = make_factors(run.prepared, "ease", dim=1_000, tuning=None, cache=NO_CACHE)
    return baseline_run(run, ease)


def test_shuffled_labels_are_told_from_true_ones(tmp_path):
    log = generate(2_000, num_items=100).interactions
    log = log.select(["user_id", "item_id", "timestamp"]).sort_by("timestamp")
    # The items of the training rows, each put beside the user of another row.
    order = np.arange(len(log))
    order[:1_600] = np.random.default_rng(0).permutation(1_600)
    shuffled = log.set_column(1, "item_id", log["item_id"].take(order))
    popularity = {
        "baselines": True,
        "baseline_options": BaselineOptions(without=tuple(set(NAMES) - {"random", "popularity"})),
    }
    spoken, _ = spoken_of(trained_run(tmp_path / "true", log), **popularity)
    assert "no_signal" not in spoken
    spoken, audits = spoken_of(trained_run(tmp_path / "shuffled", shuffled), **popularity)
    # What is popular survives the shuffle: it is what the model is held against.
    assert "no_signal" in spoken
    assert "no signal that popularity does not have" in audits["no_signal"]["sentence"]
    assert "ids or labels that do not belong to their rows" in audits["no_signal"]["sentence"]


def test_a_leaky_split_and_a_collapsed_model(tmp_path):
    split = {"kind": "leave_last_out", "accept_leakage": ("future_rows", "repeated_pairs")}
    run = make_run(tmp_path / "run", split=split)
    without_ids = run.weights._replace(tables=jax.tree.map(np.zeros_like, run.weights.tables))
    spoken, audits = spoken_of(dataclasses.replace(run, weights=without_ids))
    assert spoken[0] == "leakage" and {"no_signal", "collapse"} <= set(spoken)
    assert audits["leakage"]["rows"]["future_rows"] > 0
    assert audits["collapse"]["items"]["effective_rank"] < 2
