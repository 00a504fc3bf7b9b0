"""The same against the package bqemulator, where one is running and TWOTOWER_BQEMULATOR has its
address:

pip install bqemulator && bqemulator start --rest-port=9050
TWOTOWER_BQEMULATOR=http://127.0.0.1:9050 bash launch_local.sh test
tests/integrations/test_bqemulator.py
"""

import io
import os
import uuid

import pyarrow.parquet as pq
import pytest

from tests.data.logs import typed_log as log
from tests.extras import extra
from tests.integrations.test_embedding_history import DAY, block, version
from twotower.config import DataConfig, TableConfig
from twotower.core.errors import HistoryError
from twotower.data.sources.bigquery import make_client
from twotower.data.sources.load import load_dataset
from twotower.integrations import bigquery_history
from twotower.integrations.bigquery_history import BigQueryHistory
from twotower.integrations.embedding_history import EmbeddingHistory

bigquery = extra("google.cloud.bigquery", "bigquery")
ADDRESS = os.environ.get("TWOTOWER_BQEMULATOR")
pytestmark = pytest.mark.skipif(
    not ADDRESS, reason="opt-in: TWOTOWER_BQEMULATOR is not set to the address of a bqemulator"
)


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", ADDRESS)
    name = f"shop_{uuid.uuid4().hex[:8]}"
    make_client("p").create_dataset(name)
    return name


def load(client, table, file):
    lists = bigquery.ParquetOptions()
    lists.enable_list_inference = True
    config = bigquery.LoadJobConfig(
        source_format="PARQUET", parquet_options=lists, write_disposition="WRITE_TRUNCATE"
    )
    client.load_table_from_file(file, table, rewind=True, job_config=config).result()


def test_the_table_is_made_then_found_fit_and_holds_the_payload(dataset, tmp_path):
    """All of it but the partition's name: bqemulator 1.4 knows no TABLE$YYYYMMDD."""
    history = EmbeddingHistory(tmp_path / "history")
    history.append(version(), {"item": [block(30)]})
    sink = BigQueryHistory(make_client("p"), dataset)
    for _ in range(2):
        table = sink._table("item_embeddings", 4)
    with pytest.raises(HistoryError, match="holds vectors that are 4 wide"):
        sink._table("item_embeddings", 8)
    file = (tmp_path / "payload").open("w+b")
    bigquery_history._write(file, history.files("item"), DAY)
    load(sink.client, f"p.{dataset}.item_embeddings", file)
    rows = sink.client.list_rows(table).to_arrow(create_bqstorage_client=False)
    expected = history.dataset("item").to_table().sort_by("entity_id").to_pylist()
    assert rows.select(list(expected[0])).sort_by("entity_id").to_pylist() == expected


def test_a_table_and_a_query_are_read(dataset):
    client = make_client("p")
    rows = log().select(["user_id", "item_id", "rating"])
    file = io.BytesIO()
    pq.write_table(rows, file)
    schema = [
        bigquery.SchemaField(*field)
        for field in (("user_id", "INT64"), ("item_id", "STRING"), ("rating", "FLOAT64"))
    ]
    client.create_table(bigquery.Table(f"p.{dataset}.log", schema))
    load(client, f"p.{dataset}.log", file)
    for table in (
        {"path": f"{dataset}.log"},
        {"query": f"SELECT user_id, item_id, rating FROM `p.{dataset}.log`"},
    ):
        data = load_dataset(
            DataConfig(source="bigquery", project="p", interactions=TableConfig(**table))
        )
        assert len(data.interactions) == 50 and len(data.users) == 7 and len(data.items) == 5
