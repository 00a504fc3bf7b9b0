"""The contract of columns: ids are text, times are seconds, numbers numbers; else a refusal."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.reading import LOG, load, read_rows, write
from twotower.core.errors import ConfigError


def test_ids_are_text_times_are_seconds_and_the_order_of_the_file_is_kept(tmp_path):
    table = read_rows(write(tmp_path / "log.csv", LOG))
    assert table.schema.field("user_id").type == pa.string()
    assert table.schema.field("timestamp").type == pa.int64()
    assert table["user_id"].to_pylist() == ["7", "8", "7"]
    assert table["rating"].to_pylist() == [3.0, 4.5, None]
    assert table["timestamp"].to_pylist() == [100, 200, 300]


def test_columns_are_renamed_and_one_column_can_serve_twice(tmp_path):
    path = write(tmp_path / "log.csv", "who,what,when\nu,x,5\n")
    table = read_rows(path, columns={"user_id": "who", "item_id": "what", "title": "what"})
    assert table.to_pylist() == [{"user_id": "u", "item_id": "x", "title": "x", "when": 5}]


def test_numbers_are_numbers_and_codes_stay_text(tmp_path):
    path = write(
        tmp_path / "log.csv",
        "user_id,item_id,n,price,zip,ean,flag,day\n"
        "1,a,1,2.5,01234,12345678901234567890,true,2020-01-02\n"
        "2,b, 2,3,98765,1,false,1970-01-01 00:01\n",
    )
    table = read_rows(path)
    assert table["n"].to_pylist() == [1, 2]
    assert table["price"].to_pylist() == [2.5, 3.0]
    assert table["zip"].to_pylist() == ["01234", "98765"]
    assert table["ean"][0].as_py() == "12345678901234567890"
    assert table["flag"].to_pylist() == [True, False]
    assert table["day"].to_pylist() == [1577923200, 60]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["17850.0", "", "3.0"], ["17850", "3"]),
        (["1.0", "1.5"], ["1.0", "1.5"]),
        (["007", "12"], ["007", "12"]),
    ],
)
def test_ids_that_pandas_wrote_as_floats_are_whole_numbers_again(tmp_path, written, read):
    path = write(
        tmp_path / "log.csv", "item_id,user_id\n" + "".join(f"i,{user}\n" for user in written)
    )
    assert read_rows(path)["user_id"].to_pylist() == read


def test_float_and_dictionary_ids_of_parquet_match_those_of_csv(tmp_path):
    ids = pa.array(["x", "y", "x", ""]).dictionary_encode()
    pq.write_table(
        pa.table({"user_id": [17850.0, None, 2.0, 3.0], "item_id": ids}), tmp_path / "log.parquet"
    )
    table = load("parquet", interactions={"path": str(tmp_path / "log.parquet")}).interactions
    assert table.to_pylist() == [
        {"user_id": "17850", "item_id": "x"},
        {"user_id": "2", "item_id": "x"},
    ]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("2020-01-02T03:04:05Z", {}, 1577934245),
        ("2020-01-02T05:04:05.250+02:00", {}, 1577934245),
        ("2020-01-02 03:04:05", {}, 1577934245),
        ("2020-01-02", {}, 1577923200),
        ("02/01/2020 03:04", {"timestamp_format": "%d/%m/%Y %H:%M"}, 1577934240),
        ("20200102", {"timestamp_format": "%Y%m%d"}, 1577923200),
        ("1577934245123", {"timestamp_unit": "ms"}, 1577934245),
        ("1577934245123456789", {"timestamp_unit": "ns"}, 1577934245),
        ("1577934245.9", {}, 1577934245),
    ],
)
def test_timestamps_are_seconds_whatever_they_were(tmp_path, text, options, expected):
    path = write(tmp_path / "log.csv", f"user_id,item_id,timestamp\nu,i,{text}\n")
    assert read_rows(path, **options)["timestamp"].to_pylist() == [expected]


def test_milliseconds_taken_for_seconds_are_doubted(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        read_rows(write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,i,1577934245123\n"))
    assert "beyond the year 5000: is timestamp_unit='s' right?" in caplog.text


WRONG = [("timestamp", "soon"), ("rating", "abc"), ("weight", "1,5"), ("label", "yes")]


@pytest.mark.parametrize(("column", "value"), WRONG)
def test_a_wrong_value_is_named_with_file_row_and_column(tmp_path, column, value):
    good = "".join(f"u,{n},1\n" for n in range(16))
    write(tmp_path / "a.csv", f"user_id,item_id,{column}\nu,i,2\n")
    write(tmp_path / "b.csv", f'user_id,item_id,{column}\n{good}u,i,"{value}"\n{good}')
    message = rf"b\.csv, line 18, column '{column}': '{value}' is not a"
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path))


def test_a_wrong_time_is_named_and_its_form_explained(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,when\nu,i,2020-01-01\nu,j,31/12/2020\n")
    columns = {"timestamp": "when"}
    message = r"line 3, column 'when': '31/12/2020' is not a time.*timestamp_format='%d/%m/%Y'"
    with pytest.raises(ConfigError, match=message):
        read_rows(path, columns=columns)
    with pytest.raises(
        ConfigError, match=r"line 2, .*'2020-01-01' is not a time of the form '%d/%m/%Y'"
    ):
        read_rows(path, columns=columns, timestamp_format="%d/%m/%Y")


def test_a_column_that_the_file_lacks_can_be_named_or_left_out(tmp_path):
    path = write(tmp_path / "log.csv", "user,item_id\nu,i\n")
    columns = {"user_id": "user", "item_id": "item_id"}
    with pytest.raises(ConfigError) as error:
        read_rows(path, columns=columns | {"timestamp": "timestamp"})
    cure = f"or that there is none by config.data.interactions.columns={columns!r}"
    assert cure in str(error.value)
    assert read_rows(path, columns=columns).column_names == ["user_id", "item_id"]
    with pytest.raises(ConfigError) as error:
        read_rows(path, columns={"user_id": "user", "item_id": "product"})
    assert "'product'" in str(error.value) and "there is none" not in str(error.value)


def test_a_negative_weight_is_named_with_its_row(tmp_path):
    for weights, line, value in (
        (["1", "", "-1"], 4, "'-1'"),
        (["-0.5", "2", "3"], 2, "'-0.5'"),
    ):
        lines = "".join(f"u,i,{weight}\n" for weight in weights)
        path = write(tmp_path / "log.csv", f"user_id,item_id,weight\n{lines}")
        with pytest.raises(
            ConfigError, match=rf"line {line}, column 'weight': {value} is not at least 0"
        ):
            read_rows(path)
