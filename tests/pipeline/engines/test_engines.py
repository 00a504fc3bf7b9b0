"""The engines leave one folder, byte for byte; what was stopped goes on."""

import dataclasses
import errno
import os
import re
import signal
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.extras import extra
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.data.sources import delimited, files
from twotower.pipeline import folder as data_folder
from twotower.pipeline.engines import arrays, database, events, pairs, writer
from twotower.pipeline.engines.engine import parse_memory, prepare_folder
from twotower.pipeline.engines.kept import coding, stages
from twotower.pipeline.engines.kept.rows import RowWriter

extra("duckdb", "duckdb")
ITEM = {"item_id": {"type": "string", "embedding_size": 8}}
ID = {"user_id": {"type": "string", "embedding_size": 8}}
HISTORY = {"type": "history", "max_length": 4}
GAPS = HISTORY | {"gaps": 4, "request_gap": True}
FROM_FILES = ("repeated_pairs", "time_order")
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
    "the last rows of users, few of them repeated": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {"duplicates": "first"},
        "split": {
            "kind": "leave_last_out",
            "held_out": 2,
            "validation": 0.1,
            "test": 0.1,
            "accept_leakage": ("future_rows",),
        },
    },
    "rows at random, repeated ones dropped": {
        "features": {"user": {"history": GAPS}, "item": ITEM},
        "data": {"path": "*.repeat.csv"},
        "split": {
            "kind": "random",
            "validation": 0.2,
            "test": 0.2,
            "accept_leakage": ("random_split", "identical_rows"),
        },
    },
    "the last moments of users, few of them repeated": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {"duplicates": "first"},
        "split": {
            "kind": "leave_last_out",
            "ties": "together",
            "accept_leakage": ("future_rows",),
        },
    },
    "ties drawn, labels, some of them missing": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "objective": {"label": "liked"},
        "data": {"duplicates": "first"},
        "split": {
            "kind": "leave_last_out",
            "ties": "drawn",
            "accept_leakage": ("future_rows",),
        },
    },
    "validation by time beside the last rows, which are drawn among ties": {
        "features": {"user": ID, "item": ITEM},
        "data": {"duplicates": "first"},
        "split": {
            "kind": "leave_last_out",
            "ties": "drawn",
            "validation_by": "time",
            "accept_leakage": ("future_rows",),
        },
    },
    "validation by last rows before a moment": {
        "features": {"user": {"history": GAPS}, "item": ITEM},
        "split": {"validation_by": "last", "ties": "drawn"},
    },
    "validation by users, two heads": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "objective": {
            "label": "liked",
            "heads": {"kept": {"label": "kept"}, "liked": {"label": "liked"}},
        },
        "evaluation": {"query": "interaction"},
        "split": {"validation_by": "user"},
    },
    "groups of items, conditions on ids": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "retrieval": {"display": ("title",)},
        "data": {
            "item_group": "kind",
            "item_table": {"path": "items.csv"},
            "where": (
                ("hour", "<", 22),
                ("user_id", "not in", ("7", "nobody")),
                ("item_id", "!=", "k3"),
                ("event", "!=", "cart"),
            ),
        },
    },
    "rows at random, without times": {
        "features": {"user": ID, "item": ITEM},
        "data": {"duplicates": "last", "interactions": {"columns": {"timestamp": ""}}},
        "split": {"kind": "random", "validation": 0.1, "test": 0.2},
    },
    "the last rows of users by the order of the file": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {"duplicates": "first", "interactions": {"columns": {"timestamp": ""}}},
        "split": {"kind": "leave_last_out", "ties": "together", "validation_by": "user"},
    },
    "parts by a column": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {"path": "*.parts.csv", "interactions": {"columns": {"split": "whole"}}},
        "split": {"kind": "fixed", "accept_leakage": ("repeated_pairs", "time_order")},
    },
    "parts by a column, some training rows held out at random": {
        "features": {"user": ID, "item": ITEM},
        "data": {"path": "*.parts.csv", "interactions": {"columns": {"split": "apart"}}},
        "split": {
            "kind": "fixed",
            "validation": 0.3,
            "accept_leakage": ("repeated_pairs", "time_order"),
        },
    },
    "parts by a column, the latest training rows held out": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {
            "path": "*.parts.csv",
            "interactions": {"columns": {"timestamp": "", "split": "apart"}},
        },
        "split": {
            "kind": "fixed",
            "held": "latest",
            "validation": 0.3,
            "accept_leakage": ("repeated_pairs", "time_order"),
        },
    },
    "parts in files of their own": {
        "features": {"user": {"history": HISTORY}, "item": ITEM},
        "data": {
            "path": "a.log.csv",
            "validation": {"path": "e.held.csv"},
            "test": {"path": "f.held.csv"},
            "where": (("split", "!=", "nothing"), ("user_id", "!=", "11")),
        },
        "split": {"kind": "fixed", "accept_leakage": ("repeated_pairs",)},
    },
    "test rows in a file of their own": {
        "features": {"user": ID, "item": ITEM},
        "data": {"path": "a.log.csv", "test": {"path": "f.held.csv"}},
        "split": {"kind": "fixed", "held": "latest", "accept_leakage": FROM_FILES},
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
    labels = ["1", "0", ""]
    for _ in range(700):
        user, item, time = rng.integers(0, (40, 50, 150))
        event = rng.choice(["view", "buy", "cart", ""])
        name = rng.choice([f"{user}", f"{user}.0"])
        columns = [1_600_000_000 + 600 * time, name, f"i\u00e9-{item}", event, time % 24]
        columns += [labels[(user + item) % 3], labels[item % 2]]
        lines.append(",".join(map(str, columns)))
    lines[5] = ",".join(["1600000000", "", "i1", "view", "3", "", "1"])
    lines[9] = ",".join(["1600000000", "7", "", "view", "3", "", "1"])
    lines[300] = "too,few"
    for name, part in (("a", lines[:400]), ("b", lines[400:])):
        text = "\n".join([f"{header},liked,kept", *part])
        (place / f"{name}.log.csv").write_text(f"{text}\n")
    for name, begin in (("e", 1_650_000_000), ("f", 1_700_000_000)):
        rows = []
        for time in range(begin, begin + 60):
            user, item = rng.integers(0, (45, 55))
            # Composed and not, and in another unit.
            rows.append(f"{1000 * time},{user}.00,ie\u0301-{item},view,{time % 24},1,0")
        text = "\n".join([f"{header},liked,kept", *rows, "too,few"])
        (place / f"{name}.held.csv").write_text(f"{text}\n")
    rows = []
    for pair in range(625):
        time = 1_600_000_000 + 60 * (pair % 5)
        rows.append(f"{time},{pair // 25},{pair % 25},view,1")
    # Few rows of which another has user and item: the audit drops those that are held out.
    rows += [f"1600003600,{n},{n},view,1" for n in range(2)]
    (place / "c.repeat.csv").write_text("\n".join([header, *rows, "too,few"]) + "\n")
    names = ["train", "train", "validation", "test"]
    parts = []
    for row in range(300):
        user, item, time = rng.integers(0, (20, 30, 150))
        whole = names[row % 4]
        apart = whole.replace("validation", "train")
        parts.append(f"{1_600_000_000 + 600 * time},{user},{item},view,1,{whole},{apart}")
    (place / "d.parts.csv").write_text("\n".join([f"{header},whole,apart", *parts, "too,few\n"]))
    # Some without a kind, which are groups of their own.
    items = [f"i\u00e9-{item},t{item},{f'k{item % 7}' * (item % 5 > 0)}" for item in range(3, 60)]
    (place / "items.csv").write_text("\n".join(["item_id,title,kind", *items]) + "\n")
    users = [f"{user},c{user % 3}" for user in range(45)]
    (place / "users.csv").write_text("\n".join(["user_id,city", *users]) + "\n")
    return place


@pytest.fixture
def in_pieces(monkeypatch):
    """Pieces so small that a log of a few hundred rows has many."""
    monkeypatch.setattr(delimited, "PIECE", 4000)
    monkeypatch.setattr(database, "BLOCK", 64)
    monkeypatch.setattr(writer, "BLOCK", 64)
    monkeypatch.setattr(coding, "_WAITING", 30)
    monkeypatch.setattr(pairs, "_BUCKET", 100)
    monkeypatch.setattr(arrays, "_BUCKET", 100)
    monkeypatch.setattr(data_folder, "_BATCH", 150)


def config_of(place, case):
    values = {"data": {}, "split": {"validation": 0.1, "test": 0.2}} | case
    data = {"source": "csv", "path": "*.log.csv"} | values["data"]
    data["path"] = str(place / data["path"])
    columns = {"timestamp": "time"} | data.get("interactions", {}).get("columns", {})
    # A column that is named "" is one that the log has not.
    columns = {name: column for name, column in columns.items() if column}
    data["interactions"] = {"columns": columns}
    for name in ("user_table", "item_table"):
        if name in data:
            data[name] = {"path": str(place / data[name]["path"])}
    for name in ("validation", "test"):
        if name in data:
            form = {"timestamp_unit": "ms", "columns": columns}
            data[name] = {"path": str(place / data[name]["path"])} | form
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
        report = prepare_folder(config, folder, engine=engine, memory="400MB", max_bad_rows=3)
        folders.append(content(folder))
    assert report.dropped[0].rows == 1
    in_memory, on_disk = folders
    assert list(in_memory) and in_memory.keys() == on_disk.keys()
    for name, data in in_memory.items():
        assert on_disk[name] == data, name


def test_what_is_whole_is_left_as_it_is(place, tmp_path):
    config = config_of(place, CASES["ids alone"])
    folder = tmp_path / "whole"
    prepare_folder(config, folder, engine="duckdb", max_bad_rows=1)
    written = (folder / data_folder.MANIFEST).stat().st_mtime_ns
    assert prepare_folder(config, folder, engine="memory").rows == 697
    assert (folder / data_folder.MANIFEST).stat().st_mtime_ns == written
    other = config_of(place, CASES["ids alone"] | {"split": {"validation": 0.2, "test": 0.2}})
    with pytest.raises(ConfigError, match="prepared by another configuration: .*validation"):
        prepare_folder(other, folder)


# Where a preparation is killed: in the midst of each stage, and between some.
KILLS = [
    (RowWriter, "write", 3),
    (database.Database, "insert", 4),
    (data_folder.TableWriter, "write", 5),
    (stages.Stages, "drop", 1),
    (stages.Stages, "finish", 1),
    (arrays.ArrayFile, "write", 9),
    (events.Scatter, "add", 2),
    (data_folder, "finish", 1),
]


def test_what_was_killed_goes_on(place, in_pieces, tmp_path, caplog):
    config = config_of(place, CASES["histories with times, a context"])
    options = {"engine": "duckdb", "max_bad_rows": 1, "memory": "400MB"}
    folder = tmp_path / "killed"
    for owner, name, call in KILLS:
        kill_in(owner, name, call, lambda: prepare_folder(config, folder, **options))
        assert not data_folder.is_whole(folder)
    # As of another configuration, whose arrays are more.
    (folder / "099.npy").write_bytes(b"half")
    # All that is left to do is the manifest.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(database, "open_database", _stop)
        prepare_folder(config, folder, **options)
    assert "stopped when the histories are written: it goes on there" in caplog.text
    prepare_folder(config, tmp_path / "whole", **options)
    assert content(folder) == content(tmp_path / "whole")


def kill_in(owner, name, call, work):
    """Does some work in a process of its own, which is killed at a call of a function."""
    child = os.fork()
    if not child:
        whole = getattr(owner, name)
        count = iter(range(1, call))

        def killed(*arguments, **options):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments, **options)

        setattr(owner, name, killed)
        # Whatever else ends the work must not run the rest of the tests a second time.
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (owner, name)


def _stop(*_, **__):
    raise KeyboardInterrupt


def test_held_out_rows_of_another_time_are_another_preparation(place):
    case = CASES["parts in files of their own"]
    # A file that the configuration does not name by itself.
    data = case["data"] | {"test": {"path": "f.h*.csv"}}
    config = config_of(place, case | {"data": data})
    key = stages.key_of(config, "duckdb", 1)
    assert key == stages.key_of(config, "duckdb", 1)
    os.utime(place / "f.held.csv", (0, 0))
    assert key != stages.key_of(config, "duckdb", 1)


@pytest.mark.parametrize("change", ["configuration", "log", "refused"])
def test_what_has_changed_begins_anew(place, tmp_path, monkeypatch, change):
    case = CASES["ids alone"]
    for name in ("a.log.csv", "b.log.csv"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    options = {"engine": "duckdb", "max_bad_rows": 1}
    folder = tmp_path / "stopped"
    error = ConfigError("as it is") if change == "refused" else KeyboardInterrupt()
    with monkeypatch.context() as patched:

        def stop(*_, **__):
            raise error

        # The last step before the manifest.
        patched.setattr(writer.data_folder, "finish", stop)
        with pytest.raises(type(error)):
            prepare_folder(config_of(tmp_path, case), folder, **options)
    # A log that was refused once is of no use to anybody.
    assert folder.exists() == (change != "refused")
    if change == "log":
        os.utime(tmp_path / "b.log.csv", (0, 0))
    if change == "configuration":
        case = case | {"split": {"validation": 0.2, "test": 0.1}}
    with monkeypatch.context() as patched:
        patched.setattr(files, "read_pieces", _stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(config_of(tmp_path, case), folder, **options)
    assert not folder.exists()


def test_a_full_disk_is_told_in_one_line(place, tmp_path, monkeypatch):
    config = config_of(place, CASES["ids alone"])
    options = {"engine": "duckdb", "max_bad_rows": 1}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(arrays.os, "pwrite", full)
        with pytest.raises(OSError, match="the disk is full. Make room. .*goes on with what is"):
            prepare_folder(config, tmp_path / "full", **options)
    # What no later try reads again is gone: there is room.
    assert not list((tmp_path / "full").glob("*.npy"))
    monkeypatch.setattr(files, "read_pieces", _stop)
    prepare_folder(config, tmp_path / "full", **options)
    monkeypatch.undo()
    prepare_folder(config, tmp_path / "whole", **options)
    assert content(tmp_path / "full") == content(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["memory", "duckdb"])
@pytest.mark.parametrize("allowed", [None, 0])
def test_bad_rows_are_refused_with_file_and_line(place, tmp_path, engine, allowed):
    config = config_of(place, CASES["ids alone"])
    with pytest.raises(ConfigError, match=r"a\.log\.csv, line 302"):
        prepare_folder(config, tmp_path / "bad", engine=engine, max_bad_rows=allowed)


def test_short_rows_are_padded_in_their_places(in_pieces, tmp_path):
    lines = []
    for row in range(400):
        line = f"{1_600_000_000 + row},u{row % 7},i{row % 11},view,{row}"
        # Some of the last piece too, behind its last whole row.
        if row % 37 == 3 or row > 397:
            line = line.rpartition(",view")[0]
        lines.append(line)
    lines[200] += ",,"
    text = "\n".join(["time,user_id,item_id,event,hour", *lines])
    (tmp_path / "a.log.csv").write_text(f"{text}\n")
    case = CASES["rows at random, without times"]
    data = case["data"] | {"duplicates": "all"}
    leaks = {"accept_leakage": ("repeated_pairs", "identical_rows")}
    config = config_of(tmp_path, case | {"data": data, "split": case["split"] | leaks})
    table = dataclasses.replace(config.data.interactions, bad_rows="pad")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, interactions=table))
    for engine in ("memory", "duckdb"):
        report = prepare_folder(config, tmp_path / engine, engine=engine)
        assert report.rows == 400 and not report.dropped
    assert content(tmp_path / "memory") == content(tmp_path / "duckdb")


@pytest.mark.parametrize("engine", ["memory", "duckdb"])
def test_training_rows_without_any_weight_are_refused(tmp_path, engine):
    lines = [f"{1_600_000_000 + row},u{row % 3},i{row % 4},{row // 60}" for row in range(100)]
    (tmp_path / "a.log.csv").write_text("\n".join(["time,user_id,item_id,worth", *lines]) + "\n")
    columns = {"data": {"interactions": {"columns": {"weight": "worth"}}}}
    config = config_of(tmp_path, CASES["ids alone"] | columns | {"split": {"test": 0.4}})
    with pytest.raises(ConfigError, match="weight is 0 in every training row"):
        prepare_folder(config, tmp_path / engine, engine=engine)


@pytest.mark.parametrize("engine", ["memory", "duckdb"])
@pytest.mark.parametrize(
    ("label", "words"),
    [("", "none has label 0 .50 have none at all"), ("2", "2.* in row 2 of .* is no label")],
)
def test_labels_that_teach_nothing_are_refused(tmp_path, engine, label, words):
    values = ["1", label] * 50
    lines = [f"{1_600_000_000 + n},u{n % 3},i{n % 4},{value}" for n, value in enumerate(values)]
    (tmp_path / "a.log.csv").write_text("\n".join(["time,user_id,item_id,liked", *lines]) + "\n")
    labels = {
        "objective": {"label": "liked"},
        "split": {"kind": "none", "validation": 0, "test": 0},
    }
    config = config_of(tmp_path, CASES["ids alone"] | labels)
    with pytest.raises(ConfigError, match=words):
        prepare_folder(config, tmp_path / engine, engine=engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"item_table": {"path": "*.log.csv"}}}, "the file of the log"),
        ({"data": {"source": "shop"}}, "config.data.source='shop'"),
    ],
)
def test_what_an_engine_does_not_do_is_refused_by_name(place, tmp_path, change, words):
    config = config_of(place, CASES["ids alone"] | change)
    with pytest.raises(ConfigError, match=f"{re.escape(words)}.* --engine=memory"):
        prepare_folder(config, tmp_path / "undone", engine="duckdb")


@pytest.mark.parametrize("option", ["kind", "validation_by"])
def test_a_log_without_times_is_not_divided_by_time(place, tmp_path, option):
    split = {"kind": "random", option: "time"}
    columns = {"data": {"interactions": {"columns": {"timestamp": ""}}}, "split": split}
    config = config_of(place, CASES["ids alone"] | columns)
    with pytest.raises(ConfigError, match=f"config.split.{option}='time' needs a column 'timest"):
        prepare_folder(config, tmp_path / "without", engine="duckdb", max_bad_rows=1)


@pytest.mark.parametrize("engine", ["memory", "duckdb"])
@pytest.mark.parametrize(
    ("column", "split", "words"),
    [
        ("", {}, "'fixed' needs a column 'split' of train"),
        ("hour", {}, r"interactions row 1 \(.*user_id=.*\): split='1' must be one of train, val"),
        ("whole", {"validation_by": "user"}, "the log has some of its own: leave out one"),
        (
            "whole",
            {"accept_leakage": ("repeated_pairs",)},
            r"time_order: 1\d\d held-out .*user_id=",
        ),
    ],
)
def test_a_column_that_names_no_parts_is_refused(place, tmp_path, engine, column, split, words):
    case = CASES["parts by a column"]
    columns = {"columns": {"split": column}}
    data = {"path": "*.parts.csv", "interactions": columns}
    config = config_of(place, case | {"data": data, "split": case["split"] | split})
    with pytest.raises(ConfigError, match=words):
        prepare_folder(config, tmp_path / engine, engine=engine, max_bad_rows=1)


def test_memory_is_read_as_people_write_it(place, tmp_path):
    assert parse_memory("1.5 GB") == 1_500_000_000
    config = config_of(place, CASES["ids alone"])
    with pytest.raises(ConfigError, match="--memory='much' must be a number of bytes"):
        prepare_folder(config, tmp_path / "memory", engine="duckdb", memory="much")


def write_parquet(path, **columns):
    """A log of 200 rows with further columns, or others in the place of its own."""
    rows = np.arange(200)
    own = {"time": 1_600_000_000 + 60 * rows, "user_id": rows % 7, "item_id": rows % 11}
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(own | columns), path)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("of", pa.array([np.timedelta64(1, "s")] * 200), "'of' .* is of type duration"),
        ("of", pa.array([["a"]] * 200).cast(pa.list_(pa.dictionary(pa.int32(), "string"))), "'of'"),
        ("of", pa.array([b"0" * 16] * 200, pa.binary(16)).cast(pa.uuid()), "'of' .*uuid"),
        ("user_id", np.arange(200) / 1, "'user_id' is double in .*b.parquet, and int64"),
        ("number", np.arange(200) / 2, "'number' is double in .*b.parquet, and int64"),
    ],
)
def test_types_that_a_database_would_change_are_refused(tmp_path, column, values, words):
    if column != "of":
        write_parquet(tmp_path / "log" / "a.parquet", number=[2**53 + 1] * 200)
    columns = {"number": np.arange(200)} | {column: values}
    write_parquet(tmp_path / "log" / "b.parquet", **columns)
    config = config_of(tmp_path, CASES["ids alone"] | {"data": {"path": "log"}})
    with pytest.raises(ConfigError, match=f"{words}.* --engine=memory"):
        prepare_folder(config, tmp_path / "types", engine="duckdb")


def test_times_may_lie_further_apart_than_a_number_says(tmp_path):
    rows = np.arange(200)
    times = np.where(rows % 2, 2**63 - 1 - rows, -(2**63) + rows)
    write_parquet(tmp_path / "log" / "a.parquet", time=times)
    data = {"path": "log", "accept": ("old_times", "future_times")}
    config = config_of(tmp_path, CASES["ids alone"] | {"data": data})
    for engine in ("memory", "duckdb"):
        prepare_folder(config, tmp_path / engine, engine=engine)
    assert content(tmp_path / "memory") == content(tmp_path / "duckdb")


@pytest.mark.parametrize("engine", ["memory", "duckdb"])
def test_times_of_another_unit_are_refused_with_the_unit(tmp_path, engine):
    write_parquet(tmp_path / "log" / "a.parquet", time=1_600_000_000_123 + np.arange(200))
    config = config_of(tmp_path, CASES["ids alone"] | {"data": {"path": "log"}})
    with pytest.raises(ConfigError, match="user_id='0', .*timestamp_unit='ms' .* is 2020-09-13"):
        prepare_folder(config, tmp_path / engine, engine=engine)


@pytest.mark.parametrize("engine", ["memory", "duckdb"])
@pytest.mark.parametrize("names", ["encoder/state.json config.json", "items.arrow"])
def test_a_folder_of_something_else_is_left_as_it_is(place, tmp_path, engine, names):
    # As that of a run, which has an encoder of its own, or of tables with such names.
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    config = config_of(place, CASES["ids alone"])
    with pytest.raises(ConfigError, match="holds '(config|items).*', which no preparation wrote"):
        prepare_folder(config, tmp_path, engine=engine, max_bad_rows=1)
    assert content(tmp_path) == before


def test_a_folder_of_any_name_is_a_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(place, CASES["ids alone"])
    options = {"engine": "duckdb", "max_bad_rows": 1}
    # To DuckDB the beginning of its name is that of an extension, to be downloaded.
    folder = Path("postgres:it's")
    prepare_folder(config, folder, **options)
    assert data_folder.is_whole(tmp_path / folder)
    with pytest.raises(ConfigError, match="has a question mark"):
        prepare_folder(config, Path("a?b"), **options)
    # What a kill behind the manifest leaves is the size of the log.
    (folder / stages.SCRATCH).mkdir()
    prepare_folder(config, folder, **options)
    assert not (folder / stages.SCRATCH).exists()
