"""Files as people have them: read right, or refused with the line and what to do; 300 rows each."""

import gzip
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.reading import load, read_rows, write
from twotower.core.errors import ConfigError

NAMES = ("user_id", "item_id", "timestamp", "search")
ROWS = [(f"u{n % 12}", f"i{n % 15}", str(1_700_000_000 + 3600 * n), "blue") for n in range(300)]


def text_of(rows=ROWS, delimiter=",", header=NAMES):
    """A file without quotes: values are joined as they are."""
    return "".join(delimiter.join(row) + "\n" for row in [header, *rows])


def with_search(**values):
    """The rows with other texts searched for, by the number of the row."""
    rows = list(ROWS)
    for name, value in values.items():
        row = int(name.removeprefix("row_"))
        rows[row] = (*rows[row][:3], value)
    return rows


def is_whole(table):
    """Whether a table has the rows of the log."""
    names = ("user_id", "item_id")
    return [tuple(table[name][n].as_py() for name in names) for n in range(len(table))] == [
        row[:2] for row in ROWS
    ]


@pytest.mark.parametrize("delimiter", [",", "\t", "|", ";"])
@pytest.mark.parametrize(
    "searches, line",
    [
        ({"row_200": '"red shoes'}, 202),
        ({"row_50": '"red shoes', "row_250": '"red shoes'}, 52),
        # The text that the first one opens is closed as a right one would be.
        ({"row_50": '"red shoes', "row_51": 'shoes"'}, 52),
    ],
)
def test_a_text_that_takes_in_other_rows_is_refused_by_its_line(
    tmp_path, delimiter, searches, line
):
    rows = with_search(**searches)
    path = write(tmp_path / "log.csv", text_of(rows, delimiter))
    with pytest.raises(ConfigError, match=rf"log\.csv, line {line}: .*\.quoting='off'"):
        read_rows(path, delimiter=delimiter)
    table = read_rows(path, delimiter=delimiter, quoting="off")
    assert is_whole(table)
    assert table["search"].to_pylist() == [row[3] for row in rows]


@pytest.mark.parametrize("row", [50_000, 99_990])
def test_a_large_file_is_held_against_its_records_too(tmp_path, row):
    """Across the blocks that are read at once, and in the last of them."""
    lines = [f"u{n % 97},i{n % 89},{n},a blue shirt" for n in range(100_000)]
    lines[row] = f'u1,i1,{row},"red'
    path = write(tmp_path / "log.csv", "\n".join([",".join(NAMES), *lines, ""]))
    with pytest.raises(ConfigError, match=rf"log\.csv, line {row + 2}: .*line breaks"):
        read_rows(path)


def test_honest_texts_of_several_lines_are_read(tmp_path):
    texts = ["Soft, warm,\nblue", 'The "best", 2\n\n- one, 1\n- two, 2, 3', "a\n1,2\n3"]
    lines = [f'i{n},7,"{texts[n % 3].replace(chr(34), 2 * chr(34))}"' for n in range(300)]
    items = write(tmp_path / "items.csv", "\n".join(["item_id,price,text", *lines, ""]))
    log = write(tmp_path / "log.csv", text_of())
    table = load(interactions={"path": log}, item_table={"path": items}).items
    assert table["text"].to_pylist() == [texts[n % 3] for n in range(300)]


def test_an_open_quote_in_a_title_is_named(tmp_path):
    lines = [f"i{n},Title {n}" for n in range(15)]
    lines[3] = 'i3,"Alien 3'
    items = write(tmp_path / "items.csv", "\n".join(["item_id,title", *lines, ""]))
    with pytest.raises(ConfigError, match=r"item_table: .*items\.csv, line 5: .*Alien 3"):
        load(
            interactions={"path": write(tmp_path / "log.csv", text_of())},
            item_table={"path": items},
        )


def test_a_text_that_takes_in_a_single_row_is_seen_among_hashes(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"{key:016x},Of words" for key in rng.integers(1 << 60, 1 << 62, size=60).tolist()]
    lines[20] = lines[20].replace(",", ',"')
    lines[21] += '"'
    items = write(tmp_path / "items.csv", "\n".join(["item_id,title", *lines, ""]))
    log = {"path": write(tmp_path / "log.csv", text_of())}
    with pytest.raises(ConfigError, match=r"items\.csv, line 22: "):
        load(interactions=log, item_table={"path": items})


def test_single_quotes_are_read_as_the_configuration_says(tmp_path):
    rows = [(f"'{user}'", f"'{item}'", *rest) for user, item, *rest in ROWS]
    assert is_whole(read_rows(write(tmp_path / "log.csv", text_of(rows)), quoting="'"))


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path):
    rows = with_search(row_7="a,b", row_20="nul\0", row_30="nul\0", row_100='"open', row_110='"')
    rows[40] = ("u1", "i1")
    with pytest.raises(ConfigError) as error:
        read_rows(write(tmp_path / "log.csv", text_of(rows)))
    for problem in (
        "line 9: 5 fields in the place of 4",
        "(and 1 more such rows)",
        r"line 22, column 'search': 'nul\x00' has a NUL character",
        "line 102: a quoted text takes in 10 line breaks",
    ):
        assert problem in str(error.value)


def test_ragged_rows_are_refused_skipped_or_padded(tmp_path, caplog):
    rows = [*ROWS[:-2], ("u1", "i1"), ("u1", "i2", "1700000000", "x", "", "")]
    path = write(tmp_path / "log.csv", text_of(rows))
    with pytest.raises(ConfigError, match=r"line 300: 2 fields in the place of 4: 'u1,i1' \(and 1"):
        read_rows(path)
    assert read_rows(path, bad_rows="skip")["item_id"].to_pylist()[-1] == ROWS[297][1]
    assert "line 300: 2 fields" in caplog.text
    padded = read_rows(path, bad_rows="pad")
    assert padded["item_id"].to_pylist()[-2:] == ["i1", "i2"]
    assert padded["timestamp"].to_pylist()[-2:] == [None, 1_700_000_000]
    # Fields with values have no column that they could be of.
    path = write(tmp_path / "log.csv", text_of([*ROWS, ("u1", "i1", "5", "x", "y")]))
    with pytest.raises(ConfigError, match=r"line 302: 5 fields .* cuts empty fields only"):
        read_rows(path, bad_rows="pad")


def test_a_delimiter_at_the_end_of_every_row_is_cut(tmp_path):
    path = write(tmp_path / "log.csv", text_of([(*row, "") for row in ROWS]))
    with pytest.raises(ConfigError, match="line 2: 5 fields in the place of 4.*bad_rows='pad'"):
        read_rows(path)
    assert is_whole(read_rows(path, bad_rows="pad"))
    # In the header too it is a column without a name.
    path = write(tmp_path / "log.csv", text_of([(*row, "") for row in ROWS], header=(*NAMES, "")))
    assert is_whole(read_rows(path))


@pytest.mark.parametrize(
    "written, options",
    [
        (text_of(delimiter="\t"), {"delimiter": r"\t"}),
        (text_of(delimiter="\t"), {"delimiter": "tab"}),
        # Found in the header, where the configured one is not.
        (text_of(delimiter="\t"), {}),
        (text_of(delimiter=";"), {}),
        (text_of(delimiter="|"), {}),
        (text_of(delimiter="   "), {"delimiter": "whitespace"}),
        (text_of(delimiter=" \t "), {"delimiter": r"\s+"}),
        ("sep=;\n" + text_of(delimiter=";"), {}),
        ("# made by hand\n" + text_of() + "# the end\n", {"comment": "#"}),
        ("Report of May\n\n" + text_of(), {"skip_lines": 2}),
        (text_of(delimiter="::").partition("\n")[2], {"delimiter": "::", "names": NAMES}),
        # Names beside a header that has them.
        (text_of(), {"names": NAMES}),
        # The first columns have names, or those at their positions.
        (text_of().partition("\n")[2], {"names": NAMES[:2]}),
        (
            text_of([("x", user, "y", item) for user, item, *_ in ROWS]).partition("\n")[2],
            {"names": ("", "user_id", "", "item_id")},
        ),
        ("\ufeff" + text_of(ROWS[:100]) + "\ufeff" + text_of(ROWS[100:]), {}),
        ("\ufeff" + text_of(ROWS[:9]) + "\ufeff" + text_of(ROWS[9:]).partition("\n")[2], {}),
        (text_of(ROWS[:100]) + text_of(ROWS[100:]), {}),
    ],
)
def test_text_in_other_forms_is_the_same_log(tmp_path, written, options):
    assert is_whole(read_rows(write(tmp_path / "log.csv", written), **options))


def test_utf_16_is_known_by_its_mark_and_guessed_without_one(tmp_path):
    assert is_whole(read_rows(write(tmp_path / "log.csv", text_of(), "utf-16")))
    with pytest.raises(ConfigError, match="encoding='utf-16-le'|NUL"):
        read_rows(write(tmp_path / "log.csv", text_of(), "utf-16-le"))
    assert is_whole(read_rows(str(tmp_path / "log.csv"), encoding="utf-16-le"))


def test_names_that_are_one_after_trimming_are_refused(tmp_path):
    header = ("user_id", "item_id", "timestamp", " user_id")
    with pytest.raises(ConfigError, match=r"several columns named 'user_id'"):
        read_rows(write(tmp_path / "log.csv", text_of(header=header)))
    columns = [pa.array(["u"]), pa.array(["i"]), pa.array(["u"])]
    pq.write_table(
        pa.Table.from_arrays(columns, ["user_id", "item_id", "user_id"]), tmp_path / "log.parquet"
    )
    with pytest.raises(ConfigError, match=r"log\.parquet has several columns named 'user_id'"):
        read_rows(str(tmp_path / "log.parquet"))


def test_names_beyond_the_columns_are_refused_with_the_first_line(tmp_path):
    path = write(tmp_path / "log.csv", "u1,i1\nu2,i2\n")
    with pytest.raises(ConfigError, match=r"2 columns, and .*names has 3 names.* 'u1,i1'"):
        read_rows(path, names=NAMES[:3])


OBJECTS = [dict(zip(NAMES, row)) for row in ROWS]


@pytest.mark.parametrize(
    "name, content",
    [
        ("log.jsonl", "\n".join(map(json.dumps, OBJECTS))),
        ("log.ndjson", "\n\n".join(map(json.dumps, OBJECTS)) + "\n"),
        # By its content, whatever its name.
        ("log.txt", "\n".join(map(json.dumps, OBJECTS))),
        ("log.json", json.dumps(OBJECTS)),
        ("log.json", json.dumps(OBJECTS, indent=1)),
        ("log.json", json.dumps({"events": OBJECTS})),
        ("log.json", json.dumps({name: [row[name] for row in OBJECTS] for name in NAMES})),
        (
            "log.json",
            json.dumps({k: {str(n): row[k] for n, row in enumerate(OBJECTS)} for k in NAMES}),
        ),
    ],
)
def test_json_of_every_form_is_the_same_log(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert is_whole(read_rows(str(tmp_path / name)))
    zipped = tmp_path / f"zipped-{name}.gz"
    zipped.write_bytes(gzip.compress(content.encode()))
    assert is_whole(read_rows(str(zipped)))


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"u1": {"i1": 4, "i2": 2.5}, "u2": {"i1": 1}}, [("u1", "i1", 4.0), ("u1", "i2", 2.5)]),
        ({"u1": ["i1", "i2"], "u2": []}, [("u1", "i1", None), ("u1", "i2", None)]),
        ({"u1": [{"item_id": "i1", "rating": 3}], "u2": []}, [("u1", "i1", 3.0)]),
    ],
)
def test_a_mapping_of_users_to_their_items_is_a_log(tmp_path, value, expected):
    path = write(tmp_path / "log.json", json.dumps(value))
    rows = read_rows(path).to_pylist()[: len(expected)]
    assert [(row["user_id"], row["item_id"], row.get("rating")) for row in rows] == expected


def test_fields_of_several_types_and_long_numbers_keep_their_digits(tmp_path):
    lines = [
        '{"user_id": 12345678901234567890, "item_id": 7}',
        '{"user_id": 9007199254740993, "item_id": "x", "day": "2024-01-02"}',
    ]
    table = read_rows(write(tmp_path / "log.jsonl", "\n".join(lines)))
    assert table["user_id"].to_pylist() == ["12345678901234567890", "9007199254740993"]
    assert table["item_id"].to_pylist() == ["7", "x"]


def test_lines_that_are_no_json_are_named(tmp_path):
    lines = ['{"user_id": 1, "item_id": 2}', "", "oops", "[1]"]
    path = write(tmp_path / "log.jsonl", "\n".join(lines))
    with pytest.raises(ConfigError, match=r"log\.jsonl, line 3: 'oops' is no .*\(and 1 more"):
        read_rows(path)
    objects = ('[{"user_id": 1,', '{"user_id": 1,\n', "[1, 2]", '{"a": 1, "b": [2]}', "[{}")
    # A user without items is a log without rows, not the only list of objects.
    for text in (*objects, '{"u1": []}'):
        with pytest.raises(ConfigError, match=r"log\.json"):
            read_rows(write(tmp_path / "log.json", text))


def zip_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", ".").replace("_in_", "/"), text)
    return buffer.getvalue()


def test_an_archive_of_one_file_is_read_and_others_are_told_by_name(tmp_path):
    path = tmp_path / "log.zip"
    path.write_bytes(zip_of(log__csv=text_of()))
    assert is_whole(read_rows(str(path)))
    path.write_bytes(zip_of(log__csv=text_of().encode("utf-16")))
    assert is_whole(read_rows(str(path)))
    path.write_bytes(zip_of(a__csv="x", b__csv="y"))
    with pytest.raises(ConfigError, match=r"zip of 2 files: a\.csv, b\.csv"):
        read_rows(str(path))
    path.write_bytes(zip_of(xl_in_workbook__xml="x", styles__xml="y"))
    with pytest.raises(ConfigError, match="spreadsheet of Excel.*save it as CSV"):
        read_rows(str(path))
    for content, words in (
        (b"SQLite format 3\0", "SQLite database"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04broken", "cannot be unpacked"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_rows(str(path))
    # What a file is, its first bytes say.
    path = tmp_path / "parquet.csv"
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), path)
    assert read_rows(str(path)).num_rows == 1
    path = tmp_path / "zipped.csv"
    path.write_bytes(gzip.compress(text_of().encode()))
    assert is_whole(read_rows(str(path)))


def test_files_of_one_table_that_differ_are_named(tmp_path):
    write(tmp_path / "a.csv", text_of(ROWS[:150]))
    for header, missing in (
        (("user_id", "item", "timestamp", "search"), "'item_id'"),
        # Without a header, the first row is taken for one.
        (ROWS[150], "'item_id', 'user_id'"),
        (("movieId", "title", "genres", "x"), "'item_id', 'user_id'"),
    ):
        write(tmp_path / "b.csv", text_of(ROWS[151:], header=header))
        with pytest.raises(ConfigError) as error:
            read_rows(str(tmp_path))
        assert f"b.csv has no {missing}" in str(error.value)
        assert f"a.csv: {', '.join(NAMES)}" in str(error.value)


def test_a_further_column_of_one_file_is_missing_in_the_others(tmp_path, caplog):
    write(tmp_path / "a.csv", "user_id,item_id\nu,i\n")
    write(tmp_path / "b.csv", "user_id,item_id,price\nu,i,5\n")
    assert read_rows(str(tmp_path))["price"].to_pylist() == [None, "5"]
    assert "a.csv has no 'price', which other files have" in caplog.text


def test_types_that_differ_between_files_are_named(tmp_path):
    for name, ids in (("a", [1]), ("b", ["x"])):
        pq.write_table(pa.table({"user_id": ids, "item_id": ["i"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(ConfigError, match=r"'user_id': int64 in .*a\.parquet, string in .*b\.par"):
        load("parquet", interactions={"path": str(tmp_path)})


def test_an_option_that_a_source_does_not_read_is_refused(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), path)
    with pytest.raises(ConfigError, match=r"interactions\.delimiter=';' is of files of text"):
        load("parquet", interactions={"path": str(path), "delimiter": ";"})
    text = write(tmp_path / "lists.txt", "u1 i1 i2\n")
    with pytest.raises(ConfigError, match=r"names=\('a',\) changes nothing"):
        load("user_lists", interactions={"path": text, "names": ("a",)})
    with pytest.raises(ConfigError, match=r"interactions\.path=.* is not read by .*'shop'"):
        load("shop", interactions={"path": text})
