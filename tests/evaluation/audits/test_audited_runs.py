"""What is wrong with a run, its data or its protocol stands in the first lines of its report."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from tests.retrieval.runs import make_run
from twotower.data.shop.generate import generate
from twotower.evaluation.measure import measure_run
from twotower.evaluation.report.text import format_report

pytestmark = pytest.mark.slow

KS = (10,)


def spoken_of(run):
    """The audits that speak, and the first lines of the report."""
    measured = measure_run(run, ks=KS, baselines=False)
    audits = measured["audits"]
    spoken = [name for name, audit in audits.items() if audit["speaks"]]
    lines = format_report(measured, KS).splitlines()[: len(spoken)]
    assert lines == [f"WARNING: {audits[name]['sentence']}" for name in spoken]
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
    # Weights that were never trained are what shuffled labels leave of a training.
    assert spoken == ["unreachable", "no_signal"]
    assert audits["unreachable"]["outside_corpus"] == 91
    assert audits["unreachable"]["sentence"].startswith("91.0% of the 100 test answers")


def test_a_leaky_split_and_a_collapsed_model(tmp_path):
    split = {"kind": "leave_last_out", "accept_leakage": ("future_rows", "repeated_pairs")}
    run = make_run(tmp_path / "run", split=split)
    without_ids = run.weights._replace(tables=jax.tree.map(np.zeros_like, run.weights.tables))
    spoken, audits = spoken_of(dataclasses.replace(run, weights=without_ids))
    assert spoken[0] == "leakage" and {"no_signal", "collapse"} <= set(spoken)
    assert audits["leakage"]["rows"]["future_rows"] > 0
    assert audits["collapse"]["items"]["effective_rank"] < 2
