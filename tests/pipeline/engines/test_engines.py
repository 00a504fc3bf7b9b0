"""The engines leave one folder, byte for byte; what stops half-way counts as nothing."""

import numpy as np
import pytest

from tests.extras import extra
from twotower.config import from_dict
from twotower.data.sources import delimited
from twotower.pipeline import folder as data_folder
from twotower.pipeline.engines import arrays, database, on_disk
from twotower.pipeline.engines.engine import prepare_folder

extra("duckdb", "duckdb")
ITEM = {"item_id": {"type": "string", "embedding_size": 8}}
ID = {"user_id": {"type": "string", "embedding_size": 8}}
HISTORY = {"type": "history", "max_length": 4}
GAPS = HISTORY | {"gaps": 4, "request_gap": True}
# Each names what it adds to a log of text that is split by time.
CASES = {
    "ids alone": {"features": {"user": ID, "item": ITEM}},
    "histories with times, a context": {
        "features": {
            "user": ID | {"history": GAPS, "hour": {"type": "int", "column": "hour", "buckets": 3}},
            "item": ITEM,
        },
        "retrieval": {"display": ("title",)},
        "data": {"item_table": {"path": "items.csv"}},
    },
    "weighted events, conditions, one row a pair": {
        "features": {"user": {"history": HISTORY | {"half_life": 0.01}}, "item": ITEM},
        "model": {"history": {"kind": "bag"}},
        "data": {
            "event_weights": {"view": 1, "buy": 5},
            "where": (("hour", "<", 22), ("event", "!=", "cart"), ("event", "!=", "sell")),
            "duplicates": "last",
        },
        "evaluation": {"query": "interaction"},
    },
    "a core of users and items, tables, no test": {
        "features": {
            "user": ID | {"city": {"type": "string", "embedding_size": 4}},
            "item": ITEM,
        },
        "data": {"k_core": 7, "duplicates": "first", "user_table": {"path": "users.csv"}},
        "split": {"test": 0.0},
    },
    "nothing held out, weights": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {"interactions": {"columns": {"weight": "hour"}}},
        "split": {"kind": "none", "validation": 0.0, "test": 0.0},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a log in two files, in no order, whose ids are spelt in several ways, and
    tables of users and items."""
    place = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    header = "time,user_id,item_id,event,hour"
    lines = []
    for _ in range(700):
        user, item, time = rng.integers(0, (40, 50, 150))
        event = rng.choice(["view", "buy", "cart", ""])
        name = rng.choice([f"{user}", f"{user}.0"])
        lines.append(f"{1_600_000_000 + 600 * time},{name},i\u00e9-{item},{event},{time % 24}")
    lines[5] = ",".join(["1600000000", "", "i1", "view", "3"])
    lines[9] = ",".join(["1600000000", "7", "", "view", "3"])
    lines[300] = "too,few"
    for name, part in (("a", lines[:400]), ("b", lines[400:])):
        (place / f"{name}.log.csv").write_text("\n".join([header, *part]) + "\n")
    items = [f"i\u00e9-{item},t{item}" for item in range(3, 60)]
    (place / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    users = [f"{user},c{user % 3}" for user in range(45)]
    (place / "users.csv").write_text("\n".join(["user_id,city", *users]) + "\n")
    return place


@pytest.fixture
def in_pieces(monkeypatch):
    """Pieces so small that a log of a few hundred rows has many."""
    monkeypatch.setattr(delimited, "_PIECE", 4000)
    monkeypatch.setattr(database, "BLOCK", 64)
    monkeypatch.setattr(on_disk, "BLOCK", 64)
    monkeypatch.setattr(arrays, "_BUCKET", 100)
    monkeypatch.setattr(data_folder, "_BATCH", 150)


def config_of(place, case):
    values = {"data": {}, "split": {"validation": 0.1, "test": 0.2}} | case
    data = {"source": "csv", "path": str(place / "*.log.csv")} | values["data"]
    columns = {"timestamp": "time"} | data.get("interactions", {}).get("columns", {})
    data["interactions"] = {"columns": columns}
    for name in ("user_table", "item_table"):
        if name in data:
            data[name] = {"path": str(place / data[name]["path"])}
    return from_dict(values | {"data": data})


def content(folder):
    """The bytes of all files of a folder by name, but for that of its lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", CASES)
def test_the_engines_leave_the_same_folder(place, in_pieces, tmp_path, case):
    config = config_of(place, CASES[case])
    folders = []
    for engine in ("memory", "duckdb"):
        folder = tmp_path / engine
        report = prepare_folder(config, folder, engine=engine, memory="400MB", max_bad_rows=1)
        folders.append(content(folder))
    assert report.dropped[0].places == (f"{place / 'a.log.csv'}, line 302",)
    in_memory, on_disk = folders
    assert list(in_memory) and in_memory.keys() == on_disk.keys()
    for name, data in in_memory.items():
        assert on_disk[name] == data, name
