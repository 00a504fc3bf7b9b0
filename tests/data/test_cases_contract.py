"""Ids, times, numbers and types as logs of other people have them: read right, or refused."""

import datetime
import decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.reading import load, write
from twotower.config import DataConfig, TableConfig, from_dict
from twotower.core.errors import ConfigError
from twotower.data.contract import Contract
from twotower.data.sources.load import load_dataset
from twotower.features.fit import fit_encoder
from twotower.features.spec import from_mappings
from twotower.pipeline.prepare import prepare

START = 1_700_000_000
USERS = ("u1", "u2", "u3")
DAYS = tuple(f"2023-11-{day:02}" for day in range(1, 6))


def events(rows=30, *, user=lambda n: f"u{n % 3}", item=lambda n: f"i{n % 5}", **columns):
    """The text of a log with one row an hour, and columns made of the number of the row."""
    lines = [",".join(("user_id", "item_id", "timestamp", *columns))]
    for n in range(rows):
        values = (user(n), item(n), START + 3600 * n, *(make(n) for make in columns.values()))
        lines.append(",".join(map(str, values)))
    return "\n".join(lines) + "\n"


def read(tmp_path, text=None, *, items=None, features=None, **options):
    """The dataset of a log and a table of items, read for features."""
    tables = {"interactions": {"path": write(tmp_path / "events.csv", text or events())}}
    tables["interactions"] |= options.pop("interactions", {})
    if items is not None:
        tables["item_table"] = {"path": write(tmp_path / "items.csv", items)}
        tables["item_table"] |= options.pop("item_table", {})
    configs = {name: TableConfig(**table) for name, table in tables.items()}
    uses = from_mappings({"item": features}).uses() if features else None
    return load_dataset(DataConfig(source="csv", **configs), uses=uses)


def items_with(name, values):
    lines = [f"i{n},{value}" for n, value in enumerate(values)]
    return "\n".join([f"item_id,{name}", *lines]) + "\n"


def encode_items(tmp_path, items, features):
    """What a feature makes of a table of items, and the encoder."""
    data = read(tmp_path, items=items, features=features)
    spec = from_mappings({"item": features})
    encoder = fit_encoder(spec, data.interactions, users=data.users, items=data.items)
    return encoder.encode("item", data.items), data


@pytest.mark.parametrize(
    "values", [("1.1", "1.10", "2.0", "2.00", "1.1"), ("1E3", "1000", "2E2", "200", "True")]
)
def test_a_string_feature_has_the_text_of_the_file(tmp_path, values):
    arrays, _ = encode_items(tmp_path, items_with("v", values), {"v": {"type": "string"}})
    assert len(set(arrays["v"].tolist())) == len(set(values))


@pytest.mark.parametrize("separator", ["", ",", "|"])
def test_lists_that_a_frame_wrote_as_text_are_lists(tmp_path, separator):
    written = ("\"['Drama', 'War']\"", "['War']", "[]", "", "\"['Drama', 'War']\"")
    features = {"g": {"type": "strings", "separator": separator, "max_length": 3}}
    arrays, _ = encode_items(tmp_path, items_with("g", written), features)
    drama, war, _ = arrays["g"][0]
    assert arrays["g"].tolist() == [
        [drama, war, 0],
        [war, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [drama, war, 0],
    ]
    assert drama != war


@pytest.mark.parametrize(
    "values",
    [
        [f"{day}T10:00:00" for day in DAYS],
        [f"{day}T12:00:00+02:00" for day in DAYS],
        [1_698_832_800_000 + 86_400_000 * n for n in range(5)],
        [(1_698_832_800 + 86_400 * n) for n in range(5)],
        [f"{n + 1:02}/11/2023 10:00 AM" for n in range(20, 25)],
    ],
    ids=["iso", "zone", "ms", "s", "ampm"],
)
def test_a_feature_of_times_finds_their_form(tmp_path, values):
    features = {"rel": {"type": "timestamp", "parts": ("hour",)}}
    arrays, data = encode_items(tmp_path, items_with("rel", values), features)
    assert set((arrays["rel"] - 2).ravel().tolist()) == {10}
    # A request is read in the form of the table.
    again = data.contract.column("item", "rel", pa.chunked_array([[str(values[0])]]))
    assert again[0].as_py() == data.items["rel"][0].as_py()


def test_wrong_values_of_features_are_named_as_the_file_has_them(tmp_path):
    dates = "item_id,rel\ni0,2023-11-01T10:00:00.5\ni1,2023-11-02\ni2,unknown\n"
    message = r"features\.item\.rel: .*items\.csv, line 4, column 'rel': 'unknown' is not a time"
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, items=dates, features={"rel": {"type": "timestamp"}})
    # Before rows of one item are merged.
    prices = "item_id,price\ni0,1\ni0,1\ni1,2\ni1,2\ni2,bad\n"
    message = r"features\.item\.price: .*items\.csv, line 6, column 'price': 'bad' is not a number"
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, items=prices, features={"price": {"type": "float"}})
    with pytest.raises(ConfigError, match=r"features\.item\.price.*'1e39' is too large"):
        read(tmp_path, items="item_id,price\ni0,1e39\n", features={"price": {"type": "float"}})


@pytest.mark.parametrize(
    ("values", "options", "cure"),
    [
        (["1,5", "2,25"], {"decimal": ","}, r"set decimal=','"),
        (["1.234,5", "2,0"], {"decimal": ",", "thousands": "."}, r"decimal=',', thousands='\.'"),
        (["$1.5", "$2"], {"marks": ("$",)}, r"marks=\('\$',\)"),
        (["12 %", "5 %"], {"marks": ("%",)}, r"marks=\('%',\)"),
        (["-", "5"], {"missing": ("", "-")}, "'-' is not a number"),
    ],
)
def test_numbers_are_read_in_their_spelling(tmp_path, values, options, cure):
    table = items_with("price", [f'"{value}"' for value in values])
    features = {"price": {"type": "float"}}
    with pytest.raises(ConfigError, match=cure):
        read(tmp_path, items=table, features=features)
    data = read(tmp_path, items=table, features=features, item_table=options)
    assert pa.types.is_integer(data.items["price"].type) or data.items["price"].type == "double"
    assert data.items["price"][1].as_py() in (2.25, 2.0, 5)


@pytest.mark.parametrize(
    ("times", "options", "seconds"),
    [
        ("14.11.2023 22:13:20.250000", {"timestamp_format": "%d.%m.%Y %H:%M:%S.%f"}, START),
        ("2023-11-14 22:13:20 UTC", {}, START),
        ("11/14/2023 10:13 PM", {"timestamp_format": "%m/%d/%Y %I:%M %p"}, START - 20),
        ("14/11/23 22:13", {"timestamp_format": "%d/%m/%y %H:%M"}, START - 20),
        ("20231114", {"timestamp_format": "%Y%m%d"}, 1_699_920_000),
        (f"{START}500", {"timestamp_unit": "ms"}, START),
    ],
)
def test_times_of_logs_are_read_in_their_form(tmp_path, times, options, seconds):
    text = f"user_id,item_id,timestamp\nu,i,{times}\n"
    data = read(tmp_path, text, interactions=options)
    assert data.interactions["timestamp"].to_pylist() == [seconds]
    assert data.contract.times([times]).to_pylist() == [seconds]
    again = Contract.from_dict(data.contract.to_dict())
    assert again.time == data.contract.time == again.time


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        (lambda n: f"2023-11-{n % 28 + 1:02}T10:00:00{'Z' if n % 2 else ''}", "has a time zone"),
        (lambda n: f"{n % 12 + 1:02}/14/2023 10:13 PM", r"timestamp_format='%m/%d/%Y %I:%M %p'"),
        (lambda n: f"30/02/{2020 + n % 3}", "not a time"),
        (lambda n: 20231101 + n % 28, "timestamp_format='%Y%m%d' 2023110"),
        (lambda n: 45244.5 + n, "days of a spreadsheet"),
        (lambda n: 2000 + n % 20, "timestamp_format='%Y' 20"),
        (lambda n: (START + n) * 1000, "timestamp_unit='ms'"),
    ],
    ids=["zones", "ampm", "february", "digits", "spreadsheet", "years", "ms"],
)
def test_times_that_are_misread_are_refused_with_the_cure(tmp_path, values, cure):
    lines = [f"u{n % 3},i{n % 5},{values(n)}" for n in range(30)]
    path = write(tmp_path / "log.csv", "\n".join(["user_id,item_id,timestamp", *lines]))
    with pytest.raises(ConfigError, match=cure):
        prepare(from_dict({"data": {"source": "csv", "interactions": {"path": path}}}))


@pytest.mark.parametrize("form", ["%m/%d/%Y %H:%M %p", "%m/%d/%Y %I:%M"])
def test_a_format_of_half_days_says_which_half(form):
    with pytest.raises(ConfigError, match="timestamp_format=.*both %I .* and %p"):
        TableConfig(timestamp_format=form)


def test_seconds_read_as_milliseconds_are_refused_with_the_unit(tmp_path):
    log = {"path": write(tmp_path / "log.csv", events()), "timestamp_unit": "ms"}
    with pytest.raises(ConfigError, match="timestamp_unit='s' 170000.* is 2023-11-1"):
        prepare(from_dict({"data": {"source": "csv", "interactions": log}}))


@pytest.mark.parametrize(
    ("user", "of_log", "asked"),
    [
        (lambda n: f"{n % 12}.0" if n > 15 else n % 12, "7", (7, 7.0, "7", "7.0", np.int64(7))),
        (lambda n: f"00{n % 12}", "007", ("007", " 007 ")),
        (lambda n: f" u{n % 12} ", "u7", ("u7", " u7")),
    ],
)
def test_ids_of_a_log_and_of_requests_are_one(tmp_path, user, of_log, asked):
    data = read(tmp_path, events(user=user))
    assert len(data.users) == 12 and of_log in data.users["user_id"].to_pylist()
    assert {data.contract.id("user_id", value) for value in asked} == {of_log}
    assert set(data.contract.ids("user_id", list(asked)).to_pylist()) == {of_log}
    again = Contract.from_dict(data.contract.to_dict())
    assert again == data.contract


def test_a_table_is_read_in_the_form_of_the_log(tmp_path):
    log = events(item=lambda n: n % 5)
    items = "item_id,title\n0.0,a\n1.0,b\n2.0,c\n3.0,d\n4.0,e\n"
    assert len(read(tmp_path, log, items=items).items) == 5
    # The text of the file, where ids are text.
    data = read(tmp_path, events(item=lambda n: f"0{n % 5}"), items="item_id,title\n1,a\n")
    assert data.items["item_id"].to_pylist() == ["1", "00", "01", "02", "03", "04"]
    assert "leading zeros, as '1' and '01' do" in " ".join(data.warnings)


def test_ids_come_back_as_the_log_wrote_them_and_are_found_in_any_form(tmp_path):
    written = "caf\u0065\u0301"
    data = read(tmp_path, events(item=lambda n: written if n % 5 == 0 else f"i{n % 5}"))
    assert written in data.items["item_id"].to_pylist()
    assert data.contract.ids("item_id", ["café", written, "i1"]).to_pylist() == [
        written,
        written,
        "i1",
    ]
    assert data.contract.id("item_id", "café") == written


def test_words_for_missing_ids_are_said_and_can_be_ids(tmp_path, caplog):
    text = events(user=lambda n: ("NA", "null", "u1", "u2")[n % 4])
    with caplog.at_level("WARNING"):
        assert len(read(tmp_path, text).users) == 2
    assert "'NA' (8), 'null' (8) of user_id stand for a missing id" in caplog.text
    data = read(tmp_path, text, interactions={"missing": ("", "null")})
    assert sorted(data.users["user_id"].to_pylist()) == ["NA", "u1", "u2"]


@pytest.mark.parametrize(
    ("column", "value"),
    [("rating", "PG-13"), ("timestamp", "spring"), ("weight", "heavy"), ("label", "x")],
)
def test_words_of_the_log_are_ordinary_columns_of_tables(tmp_path, column, value):
    data = read(tmp_path, items=items_with(column, [value] * 5))
    assert set(data.items[column].to_pylist()) == {value}


def test_words_of_the_log_mean_something_where_the_configuration_says_so(tmp_path, caplog):
    data = read(tmp_path, events(rating=lambda n: "dislike", label=lambda n: "homepage"))
    assert set(data.interactions["rating"].to_pylist()) == {"dislike"}
    with pytest.raises(ConfigError, match="'heavy' is not a number; a column 'weight' of the log"):
        read(tmp_path, events(weight=lambda n: "heavy"))
    with caplog.at_level("INFO"):
        read(tmp_path, events(weight=lambda n: n))
    assert "the column 'weight' (0 to 29) says how much each row counts" in caplog.text
    named = {"columns": {"rating": "stars"}}
    data = read(tmp_path, events(stars=lambda n: n), interactions=named)
    assert data.interactions["rating"].type == pa.float32()


def parquet(tmp_path, rows=30, **columns):
    """A Parquet log, some of whose columns are given by their Arrow arrays."""
    table = {
        "user_id": [f"u{n % 3}" for n in range(rows)],
        "item_id": [f"i{n % 5}" for n in range(rows)],
        "timestamp": [START + 3600 * n for n in range(rows)],
    }
    pq.write_table(pa.table(table | columns), tmp_path / "e.parquet")
    return {"path": str(tmp_path / "e.parquet")}


TEXTS = [str(np.datetime64(START + 3600 * n, "s")).replace("T", " ") for n in range(30)]


@pytest.mark.parametrize(
    "times",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([text + "Z" for text in TEXTS]),
        pa.array([START + 3600 * n for n in range(30)]).cast(pa.timestamp("s", "Asia/Tokyo")),
    ],
    ids=["large", "view", "category", "Z", "zone"],
)
def test_times_of_parquet_are_read_whatever_their_type(tmp_path, times):
    rows = load("parquet", interactions=parquet(tmp_path, timestamp=times)).interactions
    assert rows["timestamp"].to_pylist() == [START + 3600 * n for n in range(30)]


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("timestamp", pa.array([3600 * n for n in range(30)], pa.time32("s")), "times of day"),
        ("timestamp", pa.array([n for n in range(30)], pa.duration("s")), "durations"),
        ("timestamp", pa.array([True] * 30), "true and false"),
        ("user_id", pa.array([b"\xff\xfeu"] * 30), "holds bytes: decode"),
        ("item_id", pa.array([["a", "b"]] * 30), "holds lists: write one row"),
        ("user_id", pa.array([n / 2 for n in range(30)]), "0.5 is no exact whole number"),
    ],
)
def test_types_that_mean_no_id_and_no_time_are_refused_by_file_and_column(
    tmp_path, column, values, problem
):
    log = parquet(tmp_path, **{column: values})
    with pytest.raises(ConfigError, match=rf"e\.parquet.*column '{column}'.*{problem}"):
        load("parquet", interactions=log)


def test_columns_that_nobody_reads_are_left_alone(tmp_path):
    log = parquet(tmp_path)
    items = {"item_id": [f"i{n}" for n in range(5)], "image": [b"\xff\xfe\x00"] * 5}
    items["opened"] = [datetime.time(8)] * 5
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    table = {"path": str(tmp_path / "items.parquet")}
    data = load("parquet", interactions=log, item_table=table)
    assert data.items["image"].to_pylist() == [b"\xff\xfe\x00"] * 5


BIG = 9_007_199_254_740_992
KINDS = {
    "digits": [str(n) for n in range(12)],
    "codes": [f"{n:05}" for n in range(12)],
    "text": [f"Ünï {n}" for n in range(12)],
    "integers": list(range(-3, 9)),
    "large": [BIG + n for n in range(12)],
    "uuids": [f"00000000-0000-0000-0000-{n:012}" for n in range(12)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_six_kinds_are_one_through_every_library(tmp_path, kind):
    duckdb = pytest.importorskip("duckdb")
    users = [KINDS[kind][n % 12] for n in range(60)]
    columns = {"user_id": users, "item_id": [f"i{n % 5}" for n in range(60)]}
    frame = pd.DataFrame(columns)
    frame.to_csv(tmp_path / "pandas.csv", index=False)
    frame.to_parquet(tmp_path / "pandas.parquet")
    pl.DataFrame(columns).write_parquet(tmp_path / "polars.parquet")
    kind_of_sql = {"large": "DECIMAL(38,0)", "uuids": "UUID"}.get(kind, "")
    cast = f"CAST(user_id AS {kind_of_sql})" if kind_of_sql else "user_id"
    duckdb.sql(f"COPY (SELECT {cast} AS user_id, item_id FROM frame) TO '{tmp_path}/duck.parquet'")
    expected = [str(user) for user in users]
    for name in ("pandas.csv", "pandas.parquet", "polars.parquet", "duck.parquet"):
        data = load("csv", interactions={"path": str(tmp_path / name)})
        assert data.interactions["user_id"].to_pylist() == expected, name
        asked = [*KINDS[kind], decimal.Decimal(KINDS[kind][0])] if kind == "large" else KINDS[kind]
        known = set(data.users["user_id"].to_pylist())
        assert set(data.contract.ids("user_id", asked).to_pylist()) == known, name
