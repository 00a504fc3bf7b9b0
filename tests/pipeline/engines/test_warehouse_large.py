"""The same on a long log and on real ones, where TWOTOWER_WAREHOUSE says how many rows to generate:

TWOTOWER_WAREHOUSE=1000000 bash launch_local.sh test
tests/pipeline/engines/test_warehouse_large.py -s
"""

import os
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from tests import buckets
from tests.extras import extra
from tests.pipeline.engines.test_engines import content

extra("google.cloud.bigquery", "bigquery")
extra("duckdb", "duckdb")
extra("sqlglot", "dev")
ROWS = os.environ.get("TWOTOWER_WAREHOUSE")
pytestmark = pytest.mark.skipif(not ROWS, reason="opt-in: TWOTOWER_WAREHOUSE is no number of rows")


def generated(tmp_path, _):
    from experiments.benchmarks.preparing import write_log

    write_log(str(tmp_path / "log.parquet"), int(ROWS or 0), "parquet", ("u", "i"))
    return parquet.read_table(tmp_path / "log.parquet"), {}


def movielens(_, shared_data):
    names = csv.ReadOptions(column_names=["user_id", "item_id", "rating", "timestamp"])
    tabs = csv.ParseOptions(delimiter="\t")
    path = shared_data / "movielens-100k" / "u.data"
    rows = csv.read_csv(path, read_options=names, parse_options=tabs)
    return rows, {"where": (("rating", ">=", 3),)}


def retail(_, shared_data):
    kinds = {"CustomerID": pa.string(), "StockCode": pa.string(), "InvoiceNo": pa.string()}
    options = csv.ConvertOptions(column_types=kinds, strings_can_be_null=True)
    path = shared_data / "online-retail" / "online_retail.csv.gz"
    rows = csv.read_csv(path, convert_options=options)
    taken = {"user_id": "CustomerID", "item_id": "StockCode", "timestamp": "InvoiceDate"}
    names = [*taken.values(), "Quantity", "UnitPrice", "Description"]
    rows = rows.select(names).rename_columns([*taken, *names[3:]])
    times = rows["timestamp"].cast(pa.timestamp("us", "UTC"))
    rows = rows.set_column(2, "timestamp", times)
    filters = {"where": (("Quantity", ">", 0),), "k_core": 3, "duplicates": "last"}
    return rows, filters


@pytest.mark.parametrize("read", [generated, movielens, retail])
def test_the_folders_are_equal(bigquery_server, tmp_path, shared_data, monkeypatch, read):
    from experiments.configs import my_log
    from tests.bigquery_sql import Database
    from twotower.config import from_dict
    from twotower.data.sources import bigquery
    from twotower.pipeline.engines.engine import prepare_folder

    rows, filters = read(tmp_path, shared_data)
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))))
    bigquery_server.database = Database()
    bigquery_server.add("shop.log", rows)
    # Pages of JSON of so many rows take minutes in Python's own server.
    monkeypatch.setattr(bigquery, "_read_batches", lambda *_: rows.to_batches())
    config = my_log.get_config()
    config.data.update(filters | {"source": "bigquery", "project": "p"})
    config.data.interactions.path = "shop.log"
    options = {"tables": "shop.made", "export": "gs://anonymous@lake/made"}
    with buckets.serving() as bucket:
        buckets.set_addresses(monkeypatch, bucket)
        monkeypatch.setattr(bigquery_server.database, "write", lambda *each: bucket.put(*each))
        for engine, own in (("bigquery", options), ("memory", {})):
            start = time.process_time()
            report = prepare_folder(from_dict(config), tmp_path / engine, engine=engine, **own)
            seconds = time.process_time() - start
            print(f"\n{read.__name__}, {engine}: {report.parts} of {len(rows):,}, {seconds:.1f} s")
    found = content(tmp_path / "bigquery")
    expected = content(tmp_path / "memory")
    assert found.keys() == expected.keys()
    assert [name for name, data in expected.items() if found[name] != data] == []
