"""Random tables written as text in random forms: every value is read, or the file is refused by
its line; no row is lost without a word, and nothing ends in a traceback."""

import csv
import gzip
import io
import re

import numpy as np
import pytest

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.data.sources import files

PARTS = [
    "x",
    "Zoë",
    "日本",
    "17",
    "1.10",
    "007",
    '"',
    "'",
    ",",
    ";",
    "\t",
    "|",
    "\n",
    " ",
    "#",
    "é",
    "NA",
]
NAMES = ["user_id", "item_id", "price", "text", "note"]


def random_table(rng):
    """Rows of texts, the first two columns of which are ids."""
    width = int(rng.integers(2, len(NAMES) + 1))
    rows = []
    for _ in range(rng.integers(1, 40)):
        texts = ["".join(rng.choice(PARTS, rng.integers(0, 6))) for _ in range(width - 2)]
        rows.append([f"u{rng.integers(100)}", f"i{rng.integers(100)}", *map(str, texts)])
    return NAMES[:width], rows


def random_form(rng):
    return {
        "delimiter": str(rng.choice([",", ";", "\t", "|"])),
        "quoting": int(rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        "lineterminator": str(rng.choice(["\n", "\r\n"])),
        "encoding": str(rng.choice(["utf-8", "utf-8-sig", "utf-16"])),
        "is_zipped": bool(rng.integers(2)),
    }


def write(folder, header, rows, *, encoding, is_zipped, **form):
    text = io.StringIO()
    csv.writer(text, **form).writerows([header, *rows])
    data = text.getvalue().encode(encoding)
    path = folder / ("log.csv.gz" if is_zipped else "log.csv")
    path.write_bytes(gzip.compress(data, 1) if is_zipped else data)
    return str(path)


def read(path, **options):
    table, origin = files.read_raw(TableConfig(path=path, **options), "interactions", "csv")
    return table, origin


def lines_of(rows, header, form):
    """The line on which each row begins."""
    starts = []
    line = 1
    for row in [header, *rows]:
        starts.append(line)
        text = io.StringIO()
        csv.writer(text, **form).writerow(row)
        line += len(re.findall(r"\r\n|\n|\r", text.getvalue()))
    return starts[1:]


@pytest.mark.parametrize("seed", range(100))
def test_every_value_is_read_and_every_row_is_named_by_its_line(tmp_path, seed):
    rng = np.random.default_rng(seed)
    header, rows = random_table(rng)
    form = random_form(rng)
    path = write(tmp_path, header, rows, **form)
    table, origin = read(path)
    expected = [
        [None if value in TableConfig().missing else value for value in row] for row in rows
    ]
    assert [list(row.values()) for row in table.to_pylist()] == expected
    assert table.column_names == header
    of_csv = {name: form[name] for name in ("delimiter", "quoting", "lineterminator")}
    for row, line in enumerate(lines_of(rows, header, of_csv)):
        assert origin.describe_row(row).endswith(f"line {line}"), row


DAMAGES = {
    "open quote": lambda row: ",".join([*row[:3], '"blue']),
    "missing field": lambda row: ",".join(row[:2]),
    "further field": lambda row: ",".join([*row, "more"]),
    "NUL": lambda row: ",".join(row).replace(",i", ",\0i"),
}


def damaged(folder, rng, damage):
    """A file with one damaged row, which is not the last one, and the number of that row."""
    count = int(rng.integers(3, 60))
    rows = [[f"u{n % 7}", f"i{n % 5}", str(n), "red shoes"] for n in range(count)]
    at = int(rng.integers(count - 1))
    lines = [",".join(row) for row in rows]
    lines[at] = damage(rows[at])
    path = folder / "log.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp,search", *lines, ""]))
    return str(path), at, count


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_row_is_refused_by_its_line_and_no_other_is_lost(tmp_path, name, seed):
    path, at, count = damaged(tmp_path, np.random.default_rng(seed), DAMAGES[name])
    with pytest.raises(ConfigError, match=rf"line {at + 2}\b"):
        read(path)
    treatments = {
        "open quote": {"quoting": "off"},
        "missing field": {"bad_rows": "pad"},
        "further field": {"bad_rows": "skip"},
    }
    if name in treatments:
        table, _ = read(path, **treatments[name])
        assert len(table) == count - (name == "further field")


@pytest.mark.parametrize("seed", range(20))
def test_a_file_that_was_cut_off_is_told_or_read_up_to_there(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path, _, _ = damaged(tmp_path, rng, ",".join)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    text = text[: int(rng.integers(40, len(text)))]
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    lines = text.splitlines()
    if lines[-1].count(",") == 3:
        assert len(read(path)[0]) == len(lines) - 1
    else:
        with pytest.raises(ConfigError, match=rf"line {len(lines)}: [123] fields"):
            read(path)
