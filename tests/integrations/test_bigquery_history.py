"""Dates of the history in BigQuery: the real client against a server that checks schema, partition
and payload."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.extras import extra
from tests.integrations.test_embedding_history import DAY, block, version
from twotower.core.errors import HistoryError
from twotower.data.sources.bigquery import make_client
from twotower.integrations.bigquery_history import BigQueryHistory
from twotower.integrations.embedding_history import EmbeddingHistory

pytestmark = pytest.mark.slow

extra("google.cloud.bigquery", "bigquery")
NEXT = DAY + datetime.timedelta(1)
ITEMS = "shop.item_embeddings"
USERS = "shop.user_embeddings"


@pytest.fixture
def server(bigquery_server):
    return bigquery_server


@pytest.fixture
def history(tmp_path):
    history = EmbeddingHistory(tmp_path / "history")
    history.append(version(), {"item": [block(30)], "user": [block(20)]})
    return history


@pytest.fixture
def sink(server):
    return BigQueryHistory(make_client("p"), "p.shop")


def test_a_date_arrives_as_it_is_kept(server, sink, history):
    history.append(version("other"), {"item": [block(5, seed=1)]})
    assert sink.load(history, DAY) == {"p.shop.user_embeddings": 20, "p.shop.item_embeddings": 35}
    expected = history.dataset("item").to_table()
    found = server.tables[ITEMS].rows
    assert (
        found.select(expected.column_names)
        .sort_by([("run_id", "ascending"), ("entity_id", "ascending")])
        .equals(expected.sort_by([("run_id", "ascending"), ("entity_id", "ascending")]))
    )


def test_the_tables_are_fit_for_vector_search(server, sink, history):
    sink.load(history, DAY)
    resource = server.tables[ITEMS].resource
    columns = {
        field["name"]: (field["type"], field["mode"]) for field in resource["schema"]["fields"]
    }
    assert columns["vector"] == ("FLOAT", "REPEATED") and columns["run_date"] == (
        "DATE",
        "NULLABLE",
    )
    assert resource["timePartitioning"] == {"type": "DAY", "field": "run_date"} and resource[
        "labels"
    ] == {"vector_width": "4"}
    assert {len(vector) for vector in server.tables[ITEMS].rows["vector"].to_pylist()} == {4}
    assert all(
        np.isfinite(server.tables[ITEMS].rows["vector"].combine_chunks().flatten().to_numpy())
    )


def test_it_is_one_load_job_a_date_and_a_repeat_changes_nothing(server, sink, history):
    sink.load(history, DAY)
    before = server.tables[ITEMS].rows
    jobs = len(server.jobs)
    assert jobs == 2  # users, items
    sink.load(history, DAY)
    assert server.tables[ITEMS].rows.equals(before) and len(server.jobs) == jobs + 2


def test_a_date_takes_the_place_of_its_own_partition_alone(server, sink, history):
    sink.load(history, DAY)
    history.append(version(date=NEXT), {"item": [block(8)]})
    assert sink.load(history, NEXT) == {"p.shop.item_embeddings": 8}
    history.append(version(model_version="newer"), {"item": [block(3)]})
    sink.load(history, DAY)
    dates = server.tables[ITEMS].rows["run_date"].to_pylist()
    assert (dates.count(DAY), dates.count(NEXT), len(dates)) == (3, 8, 11)
    assert server.tables[USERS].rows["run_date"].to_pylist() == [DAY] * 20


def test_a_load_that_fails_leaves_the_partition_as_it_was(server, sink, history):
    sink.load(history, DAY)
    before = server.tables[ITEMS].rows
    history.append(version(), {"item": [block(9)], "user": [block(9)]})
    server.broken = "An internal error"
    with pytest.raises(
        HistoryError,
        match=r"table p\.shop\.user_embeddings\$20261125: BigQuery refuses: .*An internal error",
    ):
        sink.load(history, DAY)
    assert server.tables[ITEMS].rows.equals(before) and len(server.tables[USERS].rows) == 20
    server.broken = ""
    sink.load(history, DAY)
    assert len(server.tables[ITEMS].rows) == len(server.tables[USERS].rows) == 9


def changed(resource, **field):
    fields = [
        one | field if one["name"] == "vector" else one for one in resource["schema"]["fields"]
    ]
    return resource | {"schema": {"fields": fields}}


def without(resource, name):
    fields = [one for one in resource["schema"]["fields"] if one["name"] != name]
    return resource | {"schema": {"fields": fields}}


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda r: changed(r, mode="NULLABLE"),
            "column 'vector' is FLOAT NULLABLE and must be FLOAT REPEATED",
        ),
        (
            lambda r: changed(r, type="STRING"),
            "column 'vector' is STRING REPEATED and must be FLOAT REPEATED",
        ),
        (
            lambda r: changed(r, name="embedding"),
            "column 'vector' is nothing and must be FLOAT REPEATED",
        ),
        (lambda r: without(r, "run_id"), "column 'run_id' is nothing and must be STRING NULLABLE"),
        (
            lambda r: {k: v for k, v in r.items() if k != "timePartitioning"},
            "must be partitioned by the DAY of run_date",
        ),
        (
            lambda r: r | {"timePartitioning": {"type": "MONTH", "field": "run_date"}},
            "must be partitioned by the DAY of run_date",
        ),
        (
            lambda r: r | {"labels": {"vector_width": "8"}},
            "holds vectors that are 8 wide .* these are 4 wide",
        ),
    ],
)
def test_a_table_of_another_form_is_refused_by_name_before_anything_is_loaded(
    server, sink, history, harm, message
):
    sink.load(history, DAY)
    server.tables[ITEMS].resource = harm(server.tables[ITEMS].resource)
    history.append(version(), {"user": [block(3)]})
    with pytest.raises(HistoryError, match=rf"table p\.shop\.item_embeddings.*{message}"):
        sink.load(history, DAY)
    assert len(server.tables[USERS].rows) == 20


def test_what_is_not_there_is_said(server, history):
    client = make_client("p")
    with pytest.raises(HistoryError, match="holds no vectors of 2026-11-26"):
        BigQueryHistory(client, "shop").load(history, NEXT)
    with pytest.raises(
        HistoryError,
        match=r"p\.nowhere\.user_embeddings: BigQuery refuses: .*Not found: Dataset p:nowhere",
    ):
        BigQueryHistory(client, "nowhere").load(history, DAY)
    with pytest.raises(HistoryError, match=r"'a\.b\.c' must be PROJECT\.DATASET or DATASET"):
        BigQueryHistory(client, "a.b.c").load(history, DAY)
    history.append(version("wide"), {"item": [block(3, width=8)]})
    with pytest.raises(
        HistoryError, match=r"one width .*'2026-11-25/shop': 4, '2026-11-25/wide': 8"
    ):
        BigQueryHistory(client, "shop").load(history, DAY)
    assert not server.jobs


def test_the_server_refuses_what_bigquery_would(sink, history, monkeypatch):
    """The tests above rest on it: rows of another date than the partition's, lists without
    inference."""
    from google.cloud import bigquery

    from twotower.integrations import bigquery_history

    sink.load(history, DAY)
    stored = history.files("item")
    write = bigquery_history._write
    table = sink.client.get_table("p.shop.item_embeddings")
    with (
        monkeypatch.context() as patch,
        pytest.raises(HistoryError, match="not in the partition 20261126"),
    ):
        patch.setattr(bigquery_history, "_write", lambda file, some, date: write(file, some, DAY))
        sink._load(table, stored, NEXT)
    without = type("Without", (bigquery.ParquetOptions,), {"enable_list_inference": False})
    monkeypatch.setattr(bigquery, "ParquetOptions", without)
    with pytest.raises(HistoryError, match="Provided Schema does not match"):
        sink._load(table, stored, DAY)


def test_the_command_appends_a_bundle_and_loads_its_date(server, history, workdir, retriever):
    command = [
        sys.executable,
        "-m",
        "experiments.history",
        f"--history={history.folder}",
        f"--append={workdir}",
    ]
    where = {"cwd": Path(__file__).parents[2], "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    flags = ["--run_id=new", "--run_date=2026-11-26", "--bigquery=p.shop"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    items = len(retriever.bundle.items)
    assert (
        "run-new.parquet" in done.stdout
        and f"p.shop.item_embeddings: {items:,} rows of 2026-11-26." in done.stdout
    )
    assert (
        server.tables[ITEMS].rows["entity_id"].to_pylist()
        == retriever.bundle.items["item_id"].to_pylist()
    )
    assert [one.version.name for one in history.files("user")] == [
        "2026-11-25/shop",
        "2026-11-26/new",
    ]
