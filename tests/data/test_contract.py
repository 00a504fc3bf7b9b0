"""The contract of columns: ids are text, times are seconds, numbers numbers; else a refusal."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.reading import LOG, load, read_rows, write
from twotower.core.errors import ConfigError
from twotower.core.times import TimeForm
from twotower.data.tables import check_time_range


def test_ids_are_text_times_are_seconds_and_the_order_of_the_file_is_kept(tmp_path):
    table = read_rows(write(tmp_path / "log.csv", LOG))
    assert table.schema.field("user_id").type == pa.dictionary(pa.int32(), pa.string())
    assert table.schema.field("timestamp").type == pa.int64()
    assert table["user_id"].to_pylist() == ["7", "8", "7"]
    assert table["rating"].to_pylist() == ["3", "4.5", None]
    assert table["timestamp"].to_pylist() == [100, 200, 300]


def test_columns_are_renamed_and_one_column_can_serve_twice(tmp_path):
    path = write(tmp_path / "log.csv", "who,what,when\nu,x,5\n")
    table = read_rows(path, columns={"user_id": "who", "item_id": "what", "title": "what"})
    assert table.to_pylist() == [{"user_id": "u", "item_id": "x", "title": "x", "when": "5"}]


def test_columns_that_nothing_computes_with_are_the_text_of_the_file(tmp_path):
    path = write(
        tmp_path / "log.csv",
        "user_id,item_id,version,code,flag,day\n1,a,1.10,1E3,True,2020-01-02\n2,b,2.0,007,,NA\n",
    )
    table = read_rows(path).select(["version", "code", "flag", "day"])
    assert table.to_pylist() == [
        {"version": "1.10", "code": "1E3", "flag": "True", "day": "2020-01-02"},
        {"version": "2.0", "code": "007", "flag": None, "day": None},
    ]


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


def refusal_of_times(seconds, unit="s", accept=(), now=1_795_000_000.0):
    """The refusal of a log with these times; empty for none."""
    rows = pa.table({"user_id": ["u"] * len(seconds), "item_id": ["i"] * len(seconds)})
    rows = rows.append_column("timestamp", pa.array(seconds, pa.int64()))
    try:
        check_time_range(rows, TimeForm(unit), accept, now=now)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("seconds", "unit", "cure"),
    [
        (
            [1_577_934_245_123] * 3,
            "s",
            "interactions.timestamp_unit='ms' 1577934245123 is 2020-01-02",
        ),
        ([20231114, 20231115], "s", "timestamp_format='%Y%m%d' 20231114 is 2023-11-14"),
        ([2023, 2019], "s", "timestamp_format='%Y' 2023 is 2023-01-01"),
        ([45244, 45245], "s", "days of a spreadsheet"),
        ([1_700_000, 1_700_003], "ms", "timestamp_unit='s' 1700000000 is 2023-11-14"),
        ([-61_413_904_020], "s", "1 of 1 rows have a time before 1990, such as 0023-11-14"),
        ([1_700_000_000, 4_000_000_000], "s", "1 of 2 rows have a time after tomorrow"),
    ],
)
def test_times_out_of_range_are_refused_with_what_makes_them_right(seconds, unit, cure):
    assert cure in refusal_of_times(seconds, unit)
    assert not refusal_of_times(seconds, unit, accept=("old_times", "future_times"))


def test_times_between_1990_and_tomorrow_are_taken():
    assert not refusal_of_times([631_152_000, 1_795_000_000 + 86_400])


WRONG = [("timestamp", "soon"), ("weight", "1,5"), ("weight", "heavy")]


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
