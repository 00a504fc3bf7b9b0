"""The engine "bigquery" leaves the folder of the others: its script, sent by the real client and
translated by `sqlglot`, runs on DuckDB, and the same rows are read into memory."""

import datetime
import re

import numpy as np
import pyarrow as pa
import pytest

from tests import buckets
from tests.experiments.commands import error_of, output_of
from tests.extras import extra
from tests.pipeline.engines.test_engines import GAPS, HISTORY, ID, ITEM, content
from twotower.config import SplitConfig, from_dict
from twotower.core.errors import ConfigError
from twotower.data.split import held_out_counts
from twotower.pipeline.engines.engine import prepare_folder
from twotower.pipeline.engines.warehouse.columns import quote
from twotower.pipeline.engines.warehouse.conditions import literal
from twotower.pipeline.engines.warehouse.script import divides

extra("google.cloud.bigquery", "bigquery")
extra("duckdb", "duckdb")
extra("sqlglot", "dev")
COLUMNS = {"timestamp": "when", "user_id": "who", "item_id": "sku"}
TABLES = "shop.made"
CASES = {
    "conditions, one row a pair, histories with weights": {
        "features": {"user": ID | {"history": HISTORY | {"half_life": 0.01}}, "item": ITEM},
        "model": {"history": {"kind": "bag"}},
        "data": {
            "event_weights": {"view": 1, "buy": 5},
            "where": (
                ("hour", "<", 22),
                ("event", "!=", "cart"),
                ("event", "not in", ("sell", "it's \\ \n")),
                ("day", ">=", "2020-09-13"),
                ("price", "!=", None),
                ("timestamp", ">", "2020-09-13 13:00:00"),
            ),
            "duplicates": "last",
        },
    },
    "a core, tables of users and items, a context": {
        "features": {
            "user": ID
            | {"hour": {"type": "int", "column": "hour", "buckets": 3}}
            | {"city": {"type": "string", "embedding_size": 4}},
            "item": ITEM,
        },
        "retrieval": {"display": ("title",)},
        "data": {
            "k_core": 9,
            "duplicates": "first",
            "user_table": {"query": "SELECT who AS user_id, city FROM `p.shop.users`"},
            "item_table": {"path": "shop.items"},
        },
        "split": {"test": 0.0},
    },
    "the last rows of users, numbers as ids": {
        "features": {"user": {"history": GAPS}, "item": ITEM},
        "data": {
            "interactions": {
                "path": "",
                "query": "SELECT UNIX_MILLIS(`when`) AS ms, DIV(hour * 977, 23) AS number, sku,\n"
                "hour AS weight FROM `p.shop.log` -- of the shop",
                "timestamp_unit": "ms",
                "columns": {"timestamp": "ms", "user_id": "number", "item_id": "sku"},
            }
        },
        "split": {
            "kind": "leave_last_out",
            "held_out": 2,
            "accept_leakage": ("future_rows", "identical_rows", "repeated_pairs"),
        },
    },
    "rows at random, validation by users, labels": {
        "features": {"user": ID, "item": ITEM},
        "objective": {"label": "gift", "heads": {"dear": {"label": "liked"}}},
        "data": {"duplicates": "first"},
        "split": {
            "kind": "random",
            "validation_by": "user",
            "validation": 0.1,
            "test": 0.2,
            "accept_leakage": ("random_split", "identical_rows", "repeated_pairs"),
        },
    },
    "the last rows of users, drawn among ties": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "split": {
            "kind": "leave_last_out",
            "ties": "drawn",
            "accept_leakage": ("future_rows", "identical_rows", "repeated_pairs"),
        },
    },
    "nothing held out": {
        "features": {"user": ID, "item": ITEM},
        "split": {"kind": "none", "validation": 0.0, "test": 0.0},
    },
}


def make_rows():
    """A log with the types that BigQuery has, in no order, whose ids are spelt in several ways."""
    rng = np.random.default_rng(0)
    rows = 700
    user, item, time = rng.integers(0, (40, 50, 150), (rows, 3)).T
    # Rows of one time, user and item, which their other columns order.
    for values in (user, item, time):
        values[650:] = values[:50]
    start = datetime.datetime(2020, 9, 13, 12, tzinfo=datetime.UTC)
    # Half of a second later: times are rounded down.
    moments = [start + datetime.timedelta(seconds=600 * int(each) + 0.5) for each in time]
    who = [f"{each}" if row % 2 else f" {each}.0" for row, each in enumerate(user)]
    # Decomposed, as some systems write it, and with a space of Unicode.
    sku = [
        f"ie\u0301-{each}" if row % 3 else f"ie\u0301-{each}\u00a0" for row, each in enumerate(item)
    ]
    who[5:8] = ["", "nan", None]
    sku[20:22] = [" ", None]
    price = rng.integers(0, 3, rows) / 2
    price[::50] = np.nan
    return pa.table(
        {
            "when": pa.array(moments, pa.timestamp("us", "UTC")),
            "price": pa.array(price, mask=np.arange(rows) % 40 == 1),
            "who": who,
            "sku": sku,
            "event": rng.choice(["view", " buy", "cart", ""], rows),
            "hour": time % 24,
            "day": pa.array([moment.date() for moment in moments], pa.date32()),
            "gift": rng.random(rows) < 0.5,
            "liked": pa.array(item % 2, pa.int64(), mask=item % 3 == 1),
        }
    )


@pytest.fixture
def server(bigquery_server):
    from tests.bigquery_sql import Database

    bigquery_server.database = Database()
    users = pa.table({"who": [f"{user}" for user in range(45)], "city": ["a", "b", "c"] * 15})
    items = pa.table({"item_id": [f"ie\u0301-{item}" for item in range(3, 60)]})
    items = items.append_column("title", pa.array([f"t{item}" for item in range(57)]))
    for name, rows in (("log", make_rows()), ("users", users), ("items", items)):
        bigquery_server.add(f"shop.{name}", rows)
    return bigquery_server


def config_of(case):
    values = {"data": {}, "split": {"validation": 0.1, "test": 0.2}} | case
    data = {"source": "bigquery", "project": "p"} | values["data"]
    interactions = {"path": "shop.log", "columns": COLUMNS}
    data["interactions"] = interactions | data.get("interactions", {})
    return from_dict(values | {"data": data})


def check_same(folder, other):
    found = content(folder)
    expected = content(other)
    assert expected.keys() == found.keys()
    for name, data in expected.items():
        assert found[name] == data, name


@pytest.mark.parametrize("case", CASES)
def test_the_warehouse_leaves_the_folder_that_memory_leaves(server, tmp_path, case):
    config = config_of(CASES[case])
    server.page = 150
    memory = prepare_folder(config, tmp_path / "memory")
    warehouse = prepare_folder(config, tmp_path / "warehouse", engine="bigquery", tables=TABLES)
    assert warehouse == memory
    assert sum(warehouse.parts.values()) > 150
    check_same(tmp_path / "warehouse", tmp_path / "memory")
    # What stays in the warehouse has the rows of the parts, in their order.
    made = server.database.rows("shop.made_rows").sort_by("position")
    assert made["position"].to_pylist() == list(range(len(made)))
    if divides(config.split):
        assert np.bincount(made["part"]).tolist() == [n for n in warehouse.parts.values() if n]
    else:
        assert made["part"].null_count == len(made)


def test_rows_come_by_way_of_a_bucket(server, tmp_path, monkeypatch):
    config = config_of(CASES["nothing held out"])
    prepare_folder(config, tmp_path / "memory")
    options = {"engine": "bigquery", "tables": TABLES, "export": "gs://anonymous@lake/shop/made"}
    with buckets.serving() as bucket:
        buckets.set_addresses(monkeypatch, bucket)
        monkeypatch.setattr(server.database, "write", lambda *each: bucket.put(*each))
        prepare_folder(config, tmp_path / "warehouse", **options)
        check_same(tmp_path / "warehouse", tmp_path / "memory")
        # Of an earlier script that had more rows.
        rows = "lake/shop/made/rows-"
        bucket.put(f"{rows}000000000007.parquet", bucket.objects[f"{rows}000000000000.parquet"][0])
        with pytest.raises(ConfigError, match="has 695 of them: empty the folder"):
            prepare_folder(config, tmp_path / "again", **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"where": (("hour", ">", 100),)}, "where ('hour', '>', 100) removed 695 of 695 rows"),
        ({"duplicates": "first"}, "1 of 695 rows have no timestamp"),
        ({}, "1 of 695 rows have no timestamp"),
    ],
)
def test_rows_that_can_only_be_a_mistake_are_refused_as_in_memory(server, tmp_path, change, words):
    rows = make_rows()
    times = rows["when"].to_pylist()
    times[70] = None
    server.add("shop.log", rows.set_column(0, "when", pa.array(times, rows["when"].type)))
    config = config_of(CASES["nothing held out"] | {"data": change})
    for engine, options in (("memory", {}), ("bigquery", {"tables": TABLES})):
        with pytest.raises(ConfigError, match=re.escape(words)):
            prepare_folder(config, tmp_path / engine, engine=engine, **options)


@pytest.mark.parametrize("rows", [205, 215, 1005])
def test_shares_are_rounded_as_in_memory(server, rows):
    from twotower.pipeline.engines.warehouse.script import _moments

    split = SplitConfig(validation=0.1, test=0.1)
    kept = pa.table({"position": np.arange(rows), "log_timestamp": np.arange(rows)})
    server.database.put("shop.kept", kept)
    script = (
        "DECLARE num_rows, held_out INT64 DEFAULT 0;\nDECLARE share_of_rows FLOAT64;\n"
        f"DECLARE validation_begin, test_begin INT64;\nSET num_rows = {rows};\n"
    )
    script += "".join(_moments(split)).replace("FROM kept", "FROM `p.shop.kept`")
    server.database.run(script)
    held_out, test = held_out_counts(rows, split)
    begins = server.database.variables
    assert (begins["validation_begin"], begins["test_begin"]) == (rows - held_out, rows - test)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"item_group": "title"}}, "config.data.item_group='title'"),
        ({"data": {"where": (("user_id", "!=", "7"),)}}, "config.data.where=('user_id'"),
        ({"data": {"source": "csv"}}, "config.data.source='csv'"),
        ({"data": {"where": (("event", ">", "2020-01-01"),)}}, "orders texts as times"),
        ({"data": {"where": (("event", "==", 3),)}}, "compares texts with a number"),
        ({"data": {"where": (("hour", ">", "2020-01-01"),)}}, "whole numbers with a time"),
        ({"data": {"interactions": {"columns": COLUMNS | {"user_id": "price"}}}}, "'price' is FLO"),
        ({"data": {"interactions": {"columns": COLUMNS | {"timestamp": "sku"}}}}, "'sku' is STRI"),
        ({"data": {"interactions": {"columns": COLUMNS | {"Part": "hour"}}}}, "column 'Part'"),
        (
            {"features": {"user": {"event": {"type": "int", "buckets": 3}}, "item": ITEM}},
            "features.user.event reads the column 'event' as a number",
        ),
    ],
)
def test_what_is_not_done_is_refused_before_anything_runs(server, tmp_path, change, words):
    config = config_of(CASES["nothing held out"] | change)
    with pytest.raises(ConfigError, match=re.escape(words)):
        prepare_folder(config, tmp_path / "undone", engine="bigquery", tables=TABLES)
    assert not server.database.statements and not (tmp_path / "undone").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "bigquery", "tables": "made"}, "--tables='made' must be DATASET.NAME"),
        ({"engine": "bigquery", "tables": "a.b`; DROP"}, "must be DATASET.NAME"),
        ({"engine": "bigquery", "tables": TABLES, "export": "s3://a"}, "--export='s3://a'"),
        ({"engine": "bigquery", "tables": TABLES, "max_bad_rows": 1}, "--max_bad_rows=1 is of"),
        ({"engine": "duckdb", "tables": TABLES}, "--tables='shop.made' is of --engine=bigquery"),
    ],
)
def test_options_are_checked_before_anything_runs(server, tmp_path, options, words):
    config = config_of(CASES["nothing held out"])
    with pytest.raises(ConfigError, match=re.escape(words)):
        prepare_folder(config, tmp_path / "undone", **options)
    assert not server.database.statements


def test_values_cannot_leave_their_place(server):
    text = "'; DROP TABLE `p.shop.log`; -- \\ \" \n\x00é"
    found = server.database.select(f"SELECT {literal(text.replace(chr(0), ''))} AS text")
    assert found["text"].to_pylist() == [text.replace("\x00", "")]
    with pytest.raises(ConfigError, match="is no name"):
        quote("a` FROM x")


def test_a_dry_run_prints_the_script_alone(server, tmp_path):
    query = "SELECT who AS user_id, sku AS item_id, `when` AS timestamp FROM `p.shop.log`"
    values = {
        "source": "bigquery",
        "project": "p",
        "interactions.path": "",
        "interactions.query": query,
    }
    options = ["--config=my_log", f"--data={tmp_path / 'made'}", "--dry_run"]
    options += [f"--config.data.{name}={value}" for name, value in values.items()]
    script = output_of("prepare", *options, "--engine=bigquery", f"--tables={TABLES}")
    assert script.endswith(
        "-- Reads 0.001 GB of the result of config.data.interactions.query, "
        "and then what it has made.\n"
    )
    assert not server.database.statements and not (tmp_path / "made").exists()
    # A person may run it as it is.
    server.database.run(script)
    assert {"shop.made_rows", "shop.made_users"} <= set(server.database.tables())
    assert "--dry_run is of --engine=bigquery" in error_of("prepare", *options)
