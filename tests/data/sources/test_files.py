"""CSV and Parquet files: one dataset from every format, and errors that name what is wrong."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.reading import LOG, read_rows, write
from twotower.core.errors import ConfigError


def test_every_format_yields_the_same_dataset(tmp_path):
    plain = write(tmp_path / "log.csv", LOG)
    (tmp_path / "zipped.csv.gz").write_bytes(gzip.compress(LOG.encode()))
    write(tmp_path / "log.dat", LOG.split("\n", 1)[1].replace(",", "::"), "latin-1")
    typed = pa.table(
        {
            "user_id": [7, 8, 7],
            "item_id": ["a", "b", "b"],
            "rating": ["3", "4.5", None],
            "timestamp": pa.array([100, 200, 300], pa.timestamp("s")),
        }
    )
    pq.write_table(typed, tmp_path / "log.parquet")
    expected = read_rows(plain)
    names = ("user_id", "item_id", "timestamp", "rating")
    options = [
        ("zipped.csv.gz", {}),
        ("log.dat", {"delimiter": "::", "names": names}),
        ("log.parquet", {}),
    ]
    for name, option in options:
        table = read_rows(str(tmp_path / name), **option)
        assert table.select(names).equals(expected.select(names)), name


def test_folders_and_globs_are_read_in_the_order_of_names_and_paths_are_expanded(
    tmp_path, monkeypatch
):
    days = ["2", "9", "1", "5", "3", "8", "4", "7", "6"]
    for day in days:
        write(tmp_path / f"day{day}.csv", f"user_id,item_id\nu{day},i\n")
    write(tmp_path / "_SUCCESS", "")
    assert read_rows(str(tmp_path))["user_id"].to_pylist() == [f"u{day}" for day in sorted(days)]
    monkeypatch.setenv("LOGS", str(tmp_path))
    assert read_rows("$LOGS/day[1-3].csv")["user_id"].to_pylist() == ["u1", "u2", "u3"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_rows("~/day2.csv")["user_id"].to_pylist() == ["u2"]


def test_quotes_newlines_and_missing_values(tmp_path):
    path = write(
        tmp_path / "log.csv", 'user_id,item_id,text\n"1","a","x, ""y""\nz"\n2,b,\n3,c,NA\n'
    )
    assert read_rows(path)["text"].to_pylist() == ['x, "y"\nz', None, None]
    # Long enough that a block of the file ends within quotes.
    text = "line\n" * 50
    path = write(tmp_path / "long.csv", "user_id,item_id,text\n" + f'u,i,"{text}"\n' * 10_000)
    assert read_rows(path)["text"].to_pylist() == [text] * 10_000


def test_latin_1_and_semicolons(tmp_path):
    path = write(tmp_path / "log.csv", "user_id;item_id\nZoë;café\n", "latin-1")
    assert read_rows(path, delimiter=";", encoding="latin-1").to_pylist() == [
        {"user_id": "Zoë", "item_id": "café"}
    ]
    with pytest.raises(ConfigError, match=r"log\.csv.*interactions\.encoding"):
        read_rows(path, delimiter=";")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"log\.csv is empty"),
        ("user_id,item_id\n", r"log\.csv has no rows"),
        (
            "userId,item_id\nu,i\n",
            r"no column 'user_id' \(did you mean 'userId'\?\).*=\{'user_id': 'userId'\}",
        ),
        (
            "user_id,item_id\nu,i\nu\n",
            r"log\.csv, line 3: 1 fields in the place of 2: 'u'\. .*bad_rows='skip'",
        ),
        ("user_id,user_id\nu,i\n", r"several columns named 'user_id'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = write(tmp_path / "log.csv", text)
    with pytest.raises(ConfigError, match=message):
        read_rows(path)


def test_paths_that_lead_nowhere_say_why(tmp_path, monkeypatch):
    write(tmp_path / "clicks.csv", LOG)
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("NOWHERE", raising=False)
    # Another folder than the one that a relative path was meant for.
    monkeypatch.chdir(tmp_path / "empty")
    for path, message in (
        ("", r"interactions\.path='' is empty"),
        (str(tmp_path / "click.csv"), r"no such file \(did you mean 'clicks\.csv'\?\)"),
        (str(tmp_path / "empty"), r"holds no file that ends in \.csv"),
        ("$NOWHERE/log.csv", r"environment variable NOWHERE is not set"),
        ("clicks.csv", rf"there is no such file in {tmp_path / 'empty'}"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_rows(path)


def test_a_damaged_file_is_named(tmp_path):
    for name in ("log.parquet", "log.csv.gz"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            read_rows(str(tmp_path / name))


def test_the_shops_dirty_csv(shared_data):
    names = {"user_id": "CustomerID", "item_id": "StockCode", "timestamp": "InvoiceDate"}
    table = read_rows(str(shared_data / "online-retail" / "online_retail.csv.gz"), columns=names)
    assert len(table) == 541_909 - 135_080
    assert table["user_id"][0].as_py() == "17850"
    assert table["timestamp"][0].as_py() == 1291191960
    # Text, as the file has it: nothing reads it as a number.
    assert table["Quantity"][0].as_py() == "6"
