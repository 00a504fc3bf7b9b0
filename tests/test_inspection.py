"""A look at a log: five kinds of files at the first try, each with a configuration that trains."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands.test_main import ended
from twotower import inspection
from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.data.dialect import find_form
from twotower.data.sources.frames import read_form
from twotower.experiment import load_config
from twotower.fitting import Columns
from twotower.pipeline.prepare import prepare
from twotower.training.run import train

COUNT = 600
RNG = np.random.default_rng(0)
USERS = RNG.integers(60, size=COUNT).tolist()
ITEMS = (RNG.random(COUNT) ** 2 * 40).astype(int).tolist()
TIMES = np.sort(RNG.integers(1_700_000_000, 1_710_000_000, COUNT)).tolist()
MOMENTS = [datetime.datetime.fromtimestamp(time, datetime.UTC) for time in TIMES]
EVENTS = list(zip(USERS, ITEMS, MOMENTS, range(COUNT)))


def comma(folder):
    lines = [f"K{u},A{i:04d},{n % 5},{t:%Y-%m-%d %H:%M}" for u, i, t, n in EVENTS]
    return "log.csv", "\n".join(["kunde,artikelnummer,menge,am", *lines])


def bare_tabs(folder):
    return "log.tsv", "\n".join(f"{u + 100}\t{i + 5000}\t{n % 5 + 1}" for u, i, _, n in EVENTS)


def decimal_commas(folder):
    lines = [f"b{u};w{i};{n % 89},{n % 10};{t:%d.%m.%Y %H:%M}" for u, i, t, n in EVENTS]
    return "log.csv", "\n".join(["Wer;Was;Wieviel;Wann", *lines])


def parquet(folder):
    columns = {"visitor": USERS, "sku": [f"s{i}" for i in ITEMS]}
    columns["ts"] = pa.array(MOMENTS, pa.timestamp("us", "UTC"))
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return "log.parquet", None


def json_lines(folder):
    rows = [
        {"buyer_id": u, "product": f"p{i}", "created_at": int(t.timestamp() * 1000)}
        for u, i, t, _ in EVENTS
    ]
    return "log.jsonl", "\n".join(map(json.dumps, rows))


def utf_16(folder):
    name, text = comma(folder)
    return name, text.encode("utf-16")


def latin_1(folder):
    name, text = comma(folder)
    return name, text.replace("K1", "Zoë").encode("latin-1")


def titled(folder):
    name, text = decimal_commas(folder)
    return name, "Report of May\n\n" + text


def user_lists(folder):
    items = {}
    for user, item, *_ in EVENTS:
        items.setdefault(user, []).append(f"item {item}")
    return "log.txt", "\n".join(",".join([f"u{user}", *of]) for user, of in items.items())


def matrix(folder):
    has = set(zip(USERS, ITEMS))
    rows = [[f"u{u}", *(str(int((u, i) in has)) for i in range(40))] for u in range(60)]
    header = ["", *(f"i{i}" for i in range(40))]
    return "log.csv", "\n".join(",".join(row) for row in [header, *rows])


FORMS = (
    (comma, "csv", "time"),
    (bare_tabs, "csv", "leave_last_out"),
    (decimal_commas, "csv", "time"),
    (parquet, "parquet", "time"),
    (json_lines, "json", "time"),
    (user_lists, "user_lists", "leave_last_out"),
    (matrix, "matrix", "leave_last_out"),
)


def write(folder, form):
    name, content = form(folder)
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(
    "form, source, split", FORMS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_file_gives_a_configuration_that_reads_it_at_the_first_try(tmp_path, form, source, split):
    path = write(tmp_path, form)
    found = inspection.inspect(str(path))
    out = tmp_path / "mine.py"
    inspection.write(found.config, out, str(path))
    config = load_config(out)
    assert config == found.config
    assert config.data.source == source
    assert config.split.kind == split
    prepared = prepare(config)
    held = len(prepared.train) + len(prepared.validation) + len(prepared.test)
    if split == "time":
        assert held == COUNT
        assert any(line.startswith("times: 2023-11-1") for line in found.lines)
    else:
        assert held == len(set(zip(USERS, ITEMS)))
    assert len(prepared.users) == 60
    assert f"  {split} (taken): " in "\n".join(found.lines)


@pytest.mark.parametrize(
    "form, options",
    [
        (utf_16, {"encoding": "utf-16"}),
        (latin_1, {"encoding": "latin-1"}),
        (titled, {"delimiter": ";", "skip_lines": 2, "decimal": ","}),
    ],
)
def test_encodings_and_titles_are_found(tmp_path, form, options):
    path = write(tmp_path, form)
    found = find_form(str(path), TableConfig(), "interactions")
    assert found.config == TableConfig(path=str(path), **options)
    assert len(read_form(found, "interactions")[0]) == COUNT


def test_one_command_writes_what_trains(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, bare_tabs)
    monkeypatch.chdir(tmp_path)
    assert not ended(monkeypatch, "inspect", path.name, "--out=mine.py")
    printed = capsys.readouterr().out
    assert "fields between tabs, without a header" in printed
    assert "user = 'column_1', item = 'column_2', no column of times" in printed
    assert "twotower train --config=mine.py" in printed
    # It may be written again, and another file may not.
    assert not ended(monkeypatch, "inspect", path.name, "--out=mine.py")
    (tmp_path / "other.py").write_text("x = 1\n")
    assert ended(monkeypatch, "inspect", path.name, "--out=other.py")
    assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_written_trains(tmp_path):
    path = write(tmp_path, bare_tabs)
    inspection.write(inspection.inspect(str(path)).config, tmp_path / "mine.py", str(path))
    options = {"training.passes": 0.0, "training.steps": 2, "training.validate_every": 1}
    train(load_config(tmp_path / "mine.py", **options), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_all_that_is_wrong_is_told_at_once_and_what_was_taken(tmp_path):
    path = write(tmp_path, comma)
    lines = path.read_text().splitlines()
    lines[10] += ",more"
    lines[20] = lines[20].rpartition(",")[0]
    lines[30] = lines[30].replace(",A", ',"A')
    lines[40] = lines[40].rpartition(",")[0] + ","
    path.write_text("\n".join(lines))
    found = inspection.inspect(str(path))
    said = "\n".join(found.lines)
    for words in ("line 31: ", "line 11: 5 fields", "quoting='off'", "bad_rows='skip'"):
        assert words in said
    inspection.write(found.config, tmp_path / "mine.py", str(path))
    config = load_config(tmp_path / "mine.py")
    assert config.data.interactions.bad_rows == "skip"
    # The row without a time is left out by a condition.
    assert config.data.where == (("timestamp", "!=", None),)


def test_decimal_commas_are_found(tmp_path):
    path = write(tmp_path, decimal_commas)
    assert find_form(str(path), TableConfig(), "interactions").config.decimal == ","
    path.write_text(path.read_text().replace(",", "."))
    assert find_form(str(path), TableConfig(), "interactions").config.decimal == "."


def test_columns_that_are_not_read_are_said(tmp_path):
    path = tmp_path / "log.csv"
    lines = [f"u{u},i{i},{n % 37 + 1},{45_000 + n}" for u, i, _, n in EVENTS]
    path.write_text("\n".join(["user,item,plays,day", *lines]))
    said = "\n".join(inspection.inspect(str(path)).lines)
    assert "not read: plays, day. A count or a rating is a threshold by" in said
    assert "'day' looks like times in days of a spreadsheet" in said


def test_a_day_and_month_that_cannot_be_told_apart_are_asked_for_by_a_flag(tmp_path):
    path = tmp_path / "log.csv"
    lines = [f"u{u},i{i},0{n % 9 + 1}/0{n % 7 + 1}/2024" for u, i, _, n in EVENTS]
    path.write_text("\n".join(["user,item,date", *lines]))
    with pytest.raises(ConfigError, match="--timestamp_format='%d/%m/%Y'"):
        inspection.inspect(str(path))
    found = inspection.inspect(str(path), timestamp_format="%d/%m/%Y")
    assert found.config.data.interactions.timestamp_format == "%d/%m/%Y"


def test_columns_and_tables_that_are_named_are_taken(tmp_path):
    path = write(tmp_path, decimal_commas)
    items = tmp_path / "items.csv"
    items.write_text("was;title\n" + "".join(f"w{i};Title {i % 7}\n" for i in range(40)))
    found = inspection.inspect(str(path), items=str(items), columns=Columns(time=""))
    assert found.config.data.item_table.columns == {"item_id": "was"}
    assert found.config.data.item_table.delimiter == ";"
    assert "timestamp" not in found.config.data.interactions.columns
    inspection.write(found.config, tmp_path / "mine.py", str(path))
    with pytest.raises(ConfigError, match="must end in .py"):
        inspection.write(found.config, tmp_path / "mine.json", str(path))
