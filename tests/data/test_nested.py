"""Fields of JSON objects and of structs are columns of their own."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.reading import load, read_rows, write
from twotower.core.errors import ConfigError


def test_fields_of_json_objects_are_columns_with_types_of_their_own(tmp_path):
    first = {"brand": "Noor", "size": {"cm": 4.5}, "tags": ["a", "b"], "stock": 3}
    metadata = [first, {"brand": None, "tags": [1]}, None]
    quoted = ["" if m is None else '"' + json.dumps(m).replace('"', '""') + '"' for m in metadata]
    lines = "".join(f"i{n},{m}\n" for n, m in enumerate(quoted))
    path = write(tmp_path / "items.csv", "item_id,metadata\n" + lines)
    log = write(tmp_path / "log.csv", "user_id,item_id\nu,i0\n")
    items = load(
        interactions={"path": log},
        item_table={"path": path, "columns": {"brand": "metadata.brand"}},
    ).items
    assert items["brand"].to_pylist() == ["Noor", None, None]
    assert items["metadata.stock"].to_pylist() == [3, None, None]
    assert items["metadata.tags"].to_pylist() == [["a", "b"], ["1"], None]
    assert items["metadata.size.cm"].to_pylist() == [4.5, None, None]


def test_structs_of_parquet_are_flattened_as_json_is(tmp_path):
    table = pa.table(
        {"user_id": ["u"], "item_id": ["i"], "metadata": [{"brand": "Noor", "ids": [1, 2]}]}
    )
    pq.write_table(table, tmp_path / "log.parquet")
    read = read_rows(str(tmp_path / "log.parquet"), columns={"brand": "metadata.brand"})
    assert read.to_pylist() == [
        {"user_id": "u", "item_id": "i", "brand": "Noor", "metadata.ids": [1, 2]}
    ]


def test_a_value_that_is_no_json_object_is_an_error_where_its_fields_are_asked_for(tmp_path):
    path = write(tmp_path / "log.csv", 'user_id,item_id,m\nu,i,"{""a"": 1}"\nu,j,{oops\n')
    assert read_rows(path)["m"].to_pylist() == ['{"a": 1}', "{oops"]
    with pytest.raises(
        ConfigError, match=r"log\.csv, line 3, .*'m'.*'\{oops' is not a JSON object"
    ):
        read_rows(path, columns={"a": "m.a"})
    with pytest.raises(ConfigError, match=r"no column 'm\.brnd' \(did you mean 'm\.brand'\?\)"):
        read_rows(
            write(tmp_path / "b.csv", 'user_id,item_id,m\nu,i,"{""brand"": 1}"\n'),
            columns={"b": "m.brnd"},
        )
