"""The results table: each figure a row, each evaluation once."""

import datetime

import pyarrow.dataset as ds

from tests.retrieval.runs import make_run
from twotower.integrations.results import append_results, figure_rows

MEASURED = {
    "protocol": {"split": "test", "step": 7, "queries": 40},
    "model": {"recall@10": 0.25, "coverage": 0.5, "auc": "-"},
    "model_unmasked": {"recall@10": 0.2},
    "model_intervals": {"recall@10": [0.2, 0.3]},
    "baselines": {"popularity": {"recall@10": 0.1}},
    "slices": {"country": {"EG": {"queries": 9, "model": {"recall@10": 0.4}}}},
}


def test_each_figure_is_a_row():
    rows = list(figure_rows(MEASURED))
    found = {
        (row["system"], row["mask_seen"], row["slice_value"], row["metric"], row["k"]): row["value"]
        for row in rows
    }
    assert found == {
        ("model", True, "", "recall", 10): 0.25,
        ("model", True, "", "coverage", None): 0.5,
        ("model", False, "", "recall", 10): 0.2,
        ("popularity", True, "", "recall", 10): 0.1,
        ("model", True, "EG", "recall", 10): 0.4,
    }
    assert (rows[0]["low"], rows[0]["high"]) == (0.2, 0.3)


def test_an_evaluation_is_kept_once_whatever_the_day(tmp_path):
    run = make_run(tmp_path / "shop", data={"num_interactions": 1000})
    days = [datetime.date(2026, 11, 25), datetime.date(2026, 11, 26)]
    written = [append_results(tmp_path, run, MEASURED, day)[1] for day in days]
    other = MEASURED | {"model": {"recall@10": 0.3}}
    written.append(append_results(tmp_path, run, other, days[1])[1])
    assert written == [True, False, True]
    table = ds.dataset(tmp_path / "results", partitioning="hive").to_table()
    assert len(table) == 5 + 4 and set(table["run_id"].to_pylist()) == {"shop"}
