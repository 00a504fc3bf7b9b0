"""What readers promise: the same three tables from every format, and errors that name file, row,
column and value."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import DataConfig, TableConfig
from twotower.core.errors import ConfigError
from twotower.data.dataset import collapse
from twotower.data.sources.load import load_dataset


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def load(source="csv", **tables):
    made = {
        name: TableConfig(**value) if isinstance(value, dict) else value
        for name, value in tables.items()
    }
    return load_dataset(DataConfig(source=source, **made))


def rows(path, **options):
    return load(interactions={"path": path, **options}).interactions


LOG = "user_id,item_id,timestamp,rating\n7,a,100,3\n8,b,200,4.5\n7,b,300,\n"


def test_ids_are_text_times_are_seconds_and_the_order_of_the_file_is_kept(tmp_path):
    table = rows(write(tmp_path / "log.csv", LOG))
    assert (
        table.schema.field("user_id").type == pa.string()
        and table.schema.field("timestamp").type == pa.int64()
    )
    assert table["user_id"].to_pylist() == ["7", "8", "7"] and table["rating"].to_pylist() == [
        3.0,
        4.5,
        None,
    ]
    assert table["timestamp"].to_pylist() == [100, 200, 300]


def test_every_format_yields_the_same_dataset(tmp_path):
    plain = write(tmp_path / "log.csv", LOG)
    (tmp_path / "zipped.csv.gz").write_bytes(gzip.compress(LOG.encode()))
    write(tmp_path / "log.dat", LOG.split("\n", 1)[1].replace(",", "::"), "latin-1")
    typed = pa.table(
        {
            "user_id": [7, 8, 7],
            "item_id": ["a", "b", "b"],
            "rating": [3.0, 4.5, None],
            "timestamp": pa.array([100, 200, 300], pa.timestamp("s")),
        }
    )
    pq.write_table(typed, tmp_path / "log.parquet")
    expected = rows(plain)
    names = ("user_id", "item_id", "timestamp", "rating")
    options = [
        ("zipped.csv.gz", {}),
        ("log.dat", {"delimiter": "::", "names": names}),
        ("log.parquet", {}),
    ]
    for name, option in options:
        assert rows(str(tmp_path / name), **option).select(names).equals(expected.select(names)), (
            name
        )


def test_folders_and_globs_are_read_in_the_order_of_names_and_paths_are_expanded(
    tmp_path, monkeypatch
):
    days = ["2", "9", "1", "5", "3", "8", "4", "7", "6"]
    for day in days:
        write(tmp_path / f"day{day}.csv", f"user_id,item_id\nu{day},i\n")
    write(tmp_path / "_SUCCESS", "")
    assert rows(str(tmp_path))["user_id"].to_pylist() == [f"u{day}" for day in sorted(days)]
    monkeypatch.setenv("LOGS", str(tmp_path))
    assert rows("$LOGS/day[1-3].csv")["user_id"].to_pylist() == ["u1", "u2", "u3"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows("~/day2.csv")["user_id"].to_pylist() == ["u2"]


def test_columns_are_renamed_and_one_column_can_serve_twice(tmp_path):
    path = write(tmp_path / "log.csv", "who,what,when\nu,x,5\n")
    table = rows(path, columns={"user_id": "who", "item_id": "what", "title": "what"})
    assert table.to_pylist() == [{"user_id": "u", "item_id": "x", "title": "x", "when": 5}]


def test_quotes_newlines_and_missing_values(tmp_path):
    path = write(
        tmp_path / "log.csv", 'user_id,item_id,text\n"1","a","x, ""y""\nz"\n2,b,\n3,c,NA\n'
    )
    assert rows(path)["text"].to_pylist() == ['x, "y"\nz', None, None]
    text = "line\n" * 50  # long enough that a block of the file ends within quotes
    path = write(tmp_path / "long.csv", "user_id,item_id,text\n" + f'u,i,"{text}"\n' * 10_000)
    assert rows(path)["text"].to_pylist() == [text] * 10_000


def test_latin_1_and_semicolons(tmp_path):
    path = write(tmp_path / "log.csv", "user_id;item_id\nZoë;café\n", "latin-1")
    assert rows(path, delimiter=";", encoding="latin-1").to_pylist() == [
        {"user_id": "Zoë", "item_id": "café"}
    ]
    with pytest.raises(ConfigError, match=r"log\.csv.*interactions\.encoding"):
        rows(path, delimiter=";")


def test_numbers_are_numbers_and_codes_stay_text(tmp_path):
    path = write(
        tmp_path / "log.csv",
        "user_id,item_id,n,price,zip,ean,flag,day\n"
        "1,a,1,2.5,01234,12345678901234567890,true,2020-01-02\n"
        "2,b, 2,3,98765,1,false,1970-01-01 00:01\n",
    )
    table = rows(path)
    assert table["n"].to_pylist() == [1, 2] and table["price"].to_pylist() == [2.5, 3.0]
    assert (
        table["zip"].to_pylist() == ["01234", "98765"]
        and table["ean"][0].as_py() == "12345678901234567890"
    )
    assert table["flag"].to_pylist() == [True, False] and table["day"].to_pylist() == [
        1577923200,
        60,
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
    assert rows(path)["user_id"].to_pylist() == read


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
    assert rows(path, **options)["timestamp"].to_pylist() == [expected]


def test_milliseconds_taken_for_seconds_are_doubted(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        rows(write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,i,1577934245123\n"))
    assert "beyond the year 5000: is timestamp_unit='s' right?" in caplog.text


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
    assert items["brand"].to_pylist() == ["Noor", None, None] and items[
        "metadata.stock"
    ].to_pylist() == [3, None, None]
    assert items["metadata.tags"].to_pylist() == [["a", "b"], ["1"], None]
    assert items["metadata.size.cm"].to_pylist() == [4.5, None, None]


def test_structs_of_parquet_are_flattened_as_json_is(tmp_path):
    table = pa.table(
        {"user_id": ["u"], "item_id": ["i"], "metadata": [{"brand": "Noor", "ids": [1, 2]}]}
    )
    pq.write_table(table, tmp_path / "log.parquet")
    read = rows(str(tmp_path / "log.parquet"), columns={"brand": "metadata.brand"})
    assert read.to_pylist() == [
        {"user_id": "u", "item_id": "i", "brand": "Noor", "metadata.ids": ["1", "2"]}
    ]


def test_a_value_that_is_no_json_object_is_an_error_where_its_fields_are_asked_for(tmp_path):
    path = write(tmp_path / "log.csv", 'user_id,item_id,m\nu,i,"{""a"": 1}"\nu,j,{oops\n')
    assert rows(path)["m"].to_pylist() == ['{"a": 1}', "{oops"]
    with pytest.raises(ConfigError, match=r"log\.csv, row 2 .*'m'.*'\{oops' is not a JSON object"):
        rows(path, columns={"a": "m.a"})
    with pytest.raises(ConfigError, match=r"no column 'm\.brnd' \(did you mean 'm\.brand'\?\)"):
        rows(
            write(tmp_path / "b.csv", 'user_id,item_id,m\nu,i,"{""brand"": 1}"\n'),
            columns={"b": "m.brnd"},
        )


def test_rows_without_ids_are_dropped_and_counted(tmp_path, caplog):
    path = write(tmp_path / "log.csv", 'user_id,item_id\nu,i\n,i\nu,\n"",j\n')
    with caplog.at_level("WARNING"):
        assert rows(path).to_pylist() == [{"user_id": "u", "item_id": "i"}]
    with pytest.raises(ConfigError, match="none of 1 rows has both a user_id and an item_id"):
        rows(write(tmp_path / "none.csv", "user_id,item_id\n,i\n"))
    assert (
        "dropped 2 of 4 rows without user_id" in caplog.text
        and "dropped 1 of 2 rows without item_id" in caplog.text
    )


def test_entities_are_unique_take_their_first_values_and_hold_every_id_of_the_log(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id\nu2,c\nu1,a\n")
    items = write(tmp_path / "items.csv", "item_id,title,price\na,,1\nb,B,2\na,A,9\n")
    data = load(interactions={"path": log}, item_table={"path": items})
    assert data.items.to_pylist() == [
        {"item_id": "a", "title": "A", "price": 1},
        {"item_id": "b", "title": "B", "price": 2},
        {"item_id": "c", "title": None, "price": None},
    ]
    assert data.users.to_pylist() == [{"user_id": "u2"}, {"user_id": "u1"}]
    assert data.has_catalogue and not load(interactions={"path": log}).has_catalogue


def test_collapse_equals_a_loop():
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 20, 200)
    values = [None if v < 3 else int(v) for v in draw.integers(0, 9, 200)]
    expected: dict[str, int | None] = {}
    for name, value in zip(map(str, ids), values):
        expected[name] = value if expected.get(name) is None else expected[name]
    table = pa.table(
        {
            "id": pa.chunked_array([[str(i) for i in ids[:70]], [str(i) for i in ids[70:]]]),
            "v": values,
        }
    )
    assert collapse(table, "id").to_pylist() == [
        {"id": name, "v": value} for name, value in expected.items()
    ]


def test_an_item_group_takes_the_place_of_the_item(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id\nu,1\nu,2\nv,3\nv,4\n")
    items = write(tmp_path / "items.csv", "item_id,title,year\n1,Film,\n2,Film,1990\n3,,1991\n")
    config = DataConfig(
        source="csv", interactions=TableConfig(path=log), item_table=TableConfig(path=items)
    )
    data = load_dataset(dataclasses.replace(config, item_group="title"))
    assert data.interactions["item_id"].to_pylist() == ["Film", "Film", "3", "4"]
    assert data.items["item_id"].to_pylist() == ["Film", "3", "4"]
    assert data.items["year"].to_pylist() == [1990, 1991, None]
    with pytest.raises(ConfigError, match=r"item_group='titel' .*did you mean 'title'"):
        load_dataset(dataclasses.replace(config, item_group="titel"))


WRONG = [("timestamp", "soon"), ("rating", "abc"), ("weight", "1,5"), ("label", "yes")]


@pytest.mark.parametrize(("column", "value"), WRONG)
def test_a_wrong_value_is_named_with_file_row_and_column(tmp_path, column, value):
    good = "".join(f"u,{n},1\n" for n in range(16))
    write(tmp_path / "a.csv", f"user_id,item_id,{column}\nu,i,2\n")
    write(tmp_path / "b.csv", f'user_id,item_id,{column}\n{good}u,i,"{value}"\n{good}')
    message = rf"b\.csv, row 17 \(row 18 with the header\), column '{column}': '{value}' is not a"
    with pytest.raises(ConfigError, match=message):
        rows(str(tmp_path))


def test_a_wrong_time_is_named_and_its_form_explained(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,when\nu,i,2020-01-01\nu,j,31/12/2020\n")
    columns = {"timestamp": "when"}
    message = r"row 2 .*column 'when': '31/12/2020' is not an ISO 8601 time .*timestamp_format"
    with pytest.raises(ConfigError, match=message):
        rows(path, columns=columns)
    with pytest.raises(
        ConfigError, match=r"row 1 .*'2020-01-01' is not a time of the form '%d/%m/%Y'"
    ):
        rows(path, columns=columns, timestamp_format="%d/%m/%Y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"log\.csv is empty"),
        ("user_id,item_id\n", r"log\.csv has no rows"),
        (
            "userId,item_id\nu,i\n",
            r"no column 'user_id' \(did you mean 'userId'\?\).*=\{'user_id': 'userId'\}",
        ),
        ("user_id,item_id\nu,i\nu\n", r"log\.csv cannot be read: .*Row #3"),
        ("user_id,user_id\nu,i\n", r"several columns named 'user_id'"),
        (
            "user_id;item_id\nu;i\n",
            r"no column 'user_id'.*separated by ';': set config\.data\.interactions\.delimiter=';'",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = write(tmp_path / "log.csv", text)
    with pytest.raises(ConfigError, match=message):
        rows(path)


def test_a_column_that_the_file_lacks_can_be_named_or_left_out(tmp_path):
    path = write(tmp_path / "log.csv", "user,item_id\nu,i\n")
    given = {"user_id": "user", "item_id": "item_id"}
    with pytest.raises(ConfigError) as error:
        rows(path, columns=given | {"timestamp": "timestamp"})
    offered = f"or that there is none by config.data.interactions.columns={given!r}"
    assert offered in str(error.value) and rows(path, columns=given).column_names == [
        "user_id",
        "item_id",
    ]
    with pytest.raises(ConfigError) as error:
        rows(path, columns={"user_id": "user", "item_id": "product"})
    assert "'product'" in str(error.value) and "there is none" not in str(error.value)


def test_a_negative_weight_is_named_with_its_row(tmp_path):
    for weights, row, value in ((["1", "", "-1"], 3, "'-1'"), (["-0.5", "2", "3"], 1, "'-0.5'")):
        lines = "".join(f"u,i,{weight}\n" for weight in weights)
        path = write(tmp_path / "log.csv", f"user_id,item_id,weight\n{lines}")
        with pytest.raises(
            ConfigError, match=rf"row {row} .*column 'weight': {value} is not at least 0"
        ):
            rows(path)


def test_paths_that_lead_nowhere_say_why(tmp_path, monkeypatch):
    write(tmp_path / "clicks.csv", LOG)
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(
        tmp_path / "empty"
    )  # another folder than the one that a relative path was meant for
    for path, message in (
        ("", r"interactions\.path='' is empty"),
        (str(tmp_path / "click.csv"), r"no such file \(did you mean 'clicks\.csv'\?\)"),
        (str(tmp_path / "empty"), r"holds no file that ends in \.csv"),
        ("$NOWHERE/log.csv", r"environment variable NOWHERE is not set"),
        ("clicks.csv", rf"there is no such file in {tmp_path / 'empty'}"),
    ):
        with pytest.raises(ConfigError, match=message):
            rows(path)
    with pytest.raises(ConfigError, match=r"data\.source='cvs' is not known.*did you mean 'csv'"):
        load("cvs")


def test_a_damaged_file_is_named(tmp_path):
    for name in ("log.parquet", "log.csv.gz"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            rows(str(tmp_path / name))


def test_the_shops_dirty_csv(shared_data):
    names = {"user_id": "CustomerID", "item_id": "StockCode", "timestamp": "InvoiceDate"}
    table = rows(str(shared_data / "online-retail" / "online_retail.csv.gz"), columns=names)
    assert len(table) == 541_909 - 135_080 and table["user_id"][0].as_py() == "17850"
    assert table["timestamp"][0].as_py() == 1291191960 and pa.types.is_integer(
        table["Quantity"].type
    )
