"""The results table: each figure a row, each evaluation once, in a folder and in BigQuery."""

import datetime

import pyarrow.dataset as ds
import pytest

from tests.extras import extra
from tests.retrieval.runs import make_run
from twotower.core.errors import HistoryError
from twotower.data.sources.bigquery import make_client
from twotower.integrations.results import append_results, date_of, figure_rows, load_results

MEASURED = {
    "protocol": {"split": "test", "step": 7, "queries": 40},
    "model": {"recall@10": 0.25, "coverage": 0.5, "auc": "-"},
    "model_unmasked": {"recall@10": 0.2},
    "model_intervals": {"recall@10": [0.2, 0.3]},
    "baselines": {"popularity": {"recall@10": 0.1}},
    "baseline_intervals": {"popularity": {"recall@10": [0.05, 0.15]}},
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
    (baseline,) = [row for row in rows if row["system"] == "popularity"]
    assert (baseline["low"], baseline["high"]) == (0.05, 0.15)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results") / "shop", data={"num_interactions": 1000})


DAYS = (datetime.date(2026, 11, 25), datetime.date(2026, 11, 26))
OTHER = MEASURED | {"model": {"recall@10": 0.3}, "tuning": {"tried": 30}}


def test_an_evaluation_is_kept_once_whatever_the_day(run, tmp_path):
    written = [append_results(tmp_path, run, MEASURED, day)[1] for day in DAYS]
    written.append(append_results(tmp_path, run, OTHER, DAYS[1])[1])
    assert written == [True, False, True]
    table = ds.dataset(tmp_path / "results", partitioning="hive").to_table()
    assert len(table) == 5 + 4 and set(table["run_id"].to_pylist()) == {"shop"}
    # Beside every tuned figure, and beside no other.
    tuned = {
        (row["system"], row["tried"])
        for row in table.to_pylist()
        if row["run_date"] == str(DAYS[1])
    }
    assert tuned == {("model", 30), ("popularity", None)}


@pytest.mark.slow
def test_bigquery_holds_what_the_folder_holds_and_a_repeat_changes_nothing(
    run, tmp_path, bigquery_server
):
    extra("google.cloud.bigquery", "bigquery")
    client = make_client("p")
    for measured, day in ((MEASURED, DAYS[0]), (OTHER, DAYS[1]), (MEASURED, DAYS[1])):
        path, _ = append_results(tmp_path, run, measured, day, table="shop_results")
        date = date_of(path)
        loaded = load_results(client, "p.shop", tmp_path, date, table="shop_results")
    assert loaded == ("p.shop.shop_results", 5)
    found = bigquery_server.tables["shop.shop_results"]
    expected = ds.dataset(tmp_path / "shop_results", partitioning="hive").to_table()
    rows = found.rows.drop_columns("run_date").to_pylist()
    kept = expected.drop_columns("run_date").to_pylist()
    assert sorted(map(repr, rows)) == sorted(map(repr, kept))
    dates = found.rows["run_date"].to_pylist()
    assert (dates.count(DAYS[0]), dates.count(DAYS[1]), len(dates)) == (5, 4, 9)
    assert found.resource["timePartitioning"] == {"type": "DAY", "field": "run_date"}
    # A table of another kind is left alone.
    bigquery_server.tables["shop.results"] = bigquery_server.tables.pop("shop.shop_results")
    fields = found.resource["schema"]["fields"]
    fields[-1]["type"] = "STRING"
    append_results(tmp_path, run, MEASURED, DAYS[0])
    with pytest.raises(HistoryError, match="column 'high' is STRING NULLABLE and must be FLOAT"):
        load_results(client, "p.shop", tmp_path, DAYS[0])
    with pytest.raises(HistoryError, match="holds no evaluations"):
        load_results(client, "p.shop", tmp_path, datetime.date(2026, 1, 1))


def test_a_name_that_no_table_can_have_is_refused(run, tmp_path):
    with pytest.raises(HistoryError, match="'a/b' cannot be the table of results"):
        append_results(tmp_path, run, MEASURED, DAYS[0], table="a/b")
