"""Training rows from BigQuery, by the real client against the server of `tests.bigquery_server`."""

import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import typed_log as log
from tests.extras import extra
from twotower.config import DataConfig, TableConfig, from_dict
from twotower.core.arrow import fingerprint, plain_text
from twotower.core.errors import ConfigError
from twotower.core.install import install_line
from twotower.data.sources.load import load_dataset
from twotower.pipeline.prepare import prepare

extra("google.cloud.bigquery", "bigquery")


def shuffled(table, step=17):
    return table.take(pa.array([n * step % len(table) for n in range(len(table))]))


@pytest.fixture
def server(bigquery_server):
    return bigquery_server


def load(project="p", **tables):
    configs = {name: TableConfig(**options) for name, options in tables.items()}
    return load_dataset(DataConfig(source="bigquery", project=project, **configs))


def test_a_table_is_read_page_by_page_as_parquet_is(server, tmp_path):
    server.page = 7
    server.put("shop.log", log())
    pq.write_table(log(), tmp_path / "log.parquet")
    files = DataConfig(
        source="parquet", interactions=TableConfig(path=str(tmp_path / "log.parquet"))
    )
    expected = load_dataset(files).interactions
    read = load(interactions={"path": "shop.log"}).interactions
    assert read.schema.equals(expected.schema)
    keys = [("timestamp", "ascending"), ("user_id", "ascending"), ("item_id", "ascending")]
    in_order = []
    for rows in (read, expected):
        columns = {name: plain_text(rows[name]) for name in rows.column_names}
        # Arrow sorts no codes.
        in_order.append(pa.table(columns).sort_by(keys))
    assert in_order[0].equals(in_order[1])
    assert sum(call.endswith("/tables/log/data") for call in server.calls) == 8


def test_whatever_order_bigquery_gives_the_rows_are_the_same(server):
    server.put("shop.log", log())
    first = load(interactions={"path": "shop.log"})
    server.put("shop.log", shuffled(log()))
    again = load(interactions={"path": "p.shop.log"})
    assert again.interactions.equals(first.interactions)
    assert again.items.equals(first.items)
    assert fingerprint(again.interactions) == fingerprint(first.interactions)
    times = first.interactions["timestamp"].to_pylist()
    assert times == sorted(times)


def test_a_query_is_read_and_a_view_by_a_query(server):
    server.page = 9
    server.queries["SELECT who, what FROM x"] = pa.table(
        {"who": ["a", "b"] * 10, "what": [f"{n}" for n in range(20)]}
    )
    data = load(
        interactions={
            "query": "SELECT who, what FROM x",
            "columns": {"user_id": "who", "item_id": "what"},
        }
    )
    assert len(data.interactions) == 20
    assert data.users["user_id"].to_pylist() == ["a", "b"]
    server.put("shop.recent", log(), kind="VIEW")
    server.queries["SELECT * FROM `p.shop.recent`"] = log(30)
    assert len(load(interactions={"path": "shop.recent"}).interactions) == 30


def test_users_items_and_the_test_rows_come_from_there_too(server):
    server.put("shop.log", log())
    server.put("shop.later", log(4))
    items = pa.table({"sku": ["i9", "i0"], "title": ["Ninth", "Zeroth"]})
    server.queries["SELECT * FROM items"] = items
    data = load(
        interactions={"path": "shop.log"},
        test={"path": "shop.later"},
        item_table={"query": "SELECT * FROM items", "columns": {"item_id": "sku"}},
    )
    assert data.has_catalogue
    assert data.items["item_id"].to_pylist()[:2] == ["i0", "i9"]
    assert data.items["title"].to_pylist()[:2] == ["Zeroth", "Ninth"]
    assert len(data.items) == 6
    assert data.interactions["split"].to_pylist() == ["train"] * 50 + ["test"] * 4


def test_a_later_command_finds_the_rows_that_training_found(server):
    server.put("shop.log", log(200))
    features = {"user": {"user_id": {"type": "string"}}, "item": {"item_id": {"type": "string"}}}
    data = {"source": "bigquery", "interactions": {"path": "shop.log"}}
    config = from_dict({"data": data, "features": features, "split": {"kind": "time"}})
    encoder = prepare(config).encoder
    server.put("shop.log", shuffled(log(200)))
    prepare(config, encoder=encoder)  # refuses other training rows
    server.put("shop.log", log(199))
    with pytest.raises(ValueError, match="train"):
        prepare(config, encoder=encoder)


@pytest.mark.parametrize(
    "table, message",
    [
        (
            {"path": "shop.lgo"},
            r"interactions: table shop\.lgo: BigQuery refuses: .*Not found: Table p:shop\.lgo",
        ),
        (
            {"path": "log"},
            r"interactions\.path='log' must be PROJECT\.DATASET\.TABLE or DATASET\.TABLE",
        ),
        ({"path": ""}, r"interactions\.path='' must name a table"),
        (
            {"query": "SELEC 1"},
            r"result of config\.data\.interactions\.query: BigQuery refuses: .*Syntax error",
        ),
        (
            {"path": "shop.log", "columns": {"user_id": "user"}},
            r"table shop\.log has no column 'user' \(did you mean 'user_id'\?\)",
        ),
        ({"path": "shop.none"}, r"table shop\.none has no rows"),
        (
            {"path": "shop.log", "columns": {"rating": "event"}},
            r"table shop\.log, row \d+ as it came, column 'event': '(buy|view)'",
        ),
    ],
)
def test_what_cannot_be_read_is_named_in_a_line(server, table, message):
    server.put("shop.log", log())
    server.put("shop.none", log().slice(0, 0))
    with pytest.raises(ConfigError, match=message) as error:
        load(interactions=table)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"source": "csv", "interactions": {"query": "SELECT 1"}},
            "config.data.interactions.query='SELECT 1' must be empty unless",
        ),
        (
            {"source": "bigquery", "item_table": {"path": "a.b", "query": "SELECT 1"}},
            "data.item_table.path='a.b' must be empty",
        ),
    ],
)
def test_a_query_beside_files_or_a_path_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"data": data})


def test_without_the_extra_or_credentials_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(
        ConfigError, match="BigQuery needs credentials: gcloud auth application-default login"
    ):
        load(interactions={"path": "a.b"})
    monkeypatch.setitem(sys.modules, "google.cloud.bigquery", None)
    monkeypatch.delattr("google.cloud.bigquery")
    with pytest.raises(
        ConfigError,
        match=r"BigQuery needs the extra 'bigquery' .*" + re.escape(install_line("bigquery")),
    ):
        load(interactions={"path": "a.b"})
