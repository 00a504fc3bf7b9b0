"""The engine "beam" leaves the folder that the others leave, and refuses in their words."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.extras import extra
from tests.pages import ROOT, read_blocks, run_command, shell_lines
from tests.pipeline.engines.test_engines import CASES, HISTORY, ID, ITEM, config_of, content, place
from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.data.sources import delimited, files
from twotower.pipeline.engines.beam import launch, pieces, pipelines
from twotower.pipeline.engines.engine import prepare_folder

extra("apache_beam", "beam", apart=True)
__all__ = ["place"]


@pytest.fixture
def in_pieces(monkeypatch):
    """Pieces and buckets so small that a log of a few hundred rows has many."""
    monkeypatch.setattr(delimited, "PIECE", 4000)
    monkeypatch.setattr(pieces, "_PIECE", 100)
    monkeypatch.setattr(launch, "_BUCKET", 250)
    monkeypatch.setattr(pipelines, "BLOCK", 64)


def leaves_the_same(config, folder, **options):
    """Prepares a log by two engines, and compares all that they leave."""
    found = {}
    for engine in ("memory", "beam"):
        report = prepare_folder(config, folder / engine, engine=engine, **options)
        found[engine] = content(folder / engine)
    assert found["memory"].keys() == found["beam"].keys()
    for name, data in found["memory"].items():
        assert found["beam"][name] == data, name
    return report


def test_a_log_of_text_leaves_the_same_folder(place, in_pieces, tmp_path):
    # Ids in two spellings, rows without one, conditions, kinds of events, a bad row.
    case = CASES["weighted events, conditions, one row a pair"]
    data = case["data"] | {"item_table": {"path": "items.csv"}}
    features = case["features"] | {
        "user": case["features"]["user"] | {"hour": {"type": "float", "column": "hour"}}
    }
    # The first hour that is no whole number comes in the last file of three.
    (tmp_path / "log").mkdir()
    for name in ("a.log.csv", "b.log.csv", "items.csv"):
        shutil.copy(place / name, tmp_path / "log" / name)
    text = "time,user_id,item_id,event,hour,liked,kept\n1600000000,new,i1,view,0.5,1,\n"
    (tmp_path / "log" / "c.log.csv").write_text(text)
    labels = {"objective": {"label": "liked"}, "split": {"validation_by": "time"}}
    config = config_of(tmp_path / "log", case | labels | {"data": data, "features": features})
    report = leaves_the_same(config, tmp_path, max_bad_rows=1)
    reasons = [note.reason for note in report.dropped]
    assert report.dropped[0].rows == 1 and "without user_id" in reasons
    assert not list((tmp_path / "beam").rglob("*beam-*"))


def test_row_groups_of_parquet_leave_the_same_folder(in_pieces, tmp_path):
    rng = np.random.default_rng(0)
    names = np.array([f"{n:032x}" for n in range(30)])
    (tmp_path / "log").mkdir()
    for name, count in (("buy", 0), ("view", 330)):
        users = [bytes.fromhex(value) for value in names[rng.integers(0, 30, count)]]
        table = pa.table(
            {
                "user_id": pa.array(users, pa.binary(16)).cast(pa.uuid()),
                "item_id": pa.array(rng.integers(-9, 9, count), mask=rng.random(count) < 0.1),
                "timestamp": pa.array(
                    1_600_000_000 + 60 * rng.integers(0, 99, count), pa.timestamp("s")
                ),
                "seen": pa.array([[n] for n in range(count)], pa.list_(pa.int16())),
            }
        )
        parquet.write_table(table, tmp_path / "log" / f"{name}.parquet", row_group_size=40)
    event_files = {kind: str(tmp_path / "log" / f"{kind}.*") for kind in ("buy", "view")}
    case = {"features": {"user": ID | {"history": HISTORY}, "item": ITEM}}
    config = config_of(tmp_path, case | {"data": {"source": "parquet"}})
    interactions = dataclasses.replace(TableConfig(), event_files=event_files)
    data = dataclasses.replace(config.data, path="", interactions=interactions)
    config = dataclasses.replace(config, data=data)
    found = pieces.find_pieces(interactions, "parquet")
    assert [piece.first for piece in found] == [0, 0, 120, 240]
    # Messages name rows by their place in the file.
    last = files.read_pieces(
        Path(found[-1].path), interactions, "interactions", "parquet", groups=found[-1].groups
    )
    assert next(last).locate(0) == "row 241"
    leaves_the_same(config, tmp_path)


def test_files_at_an_address_are_pieces_in_the_order_of_a_folder(place):
    for pattern, names in (("/?.*.csv", "abcdef"), ("/b.log.csv", "b")):
        found = pieces.find_pieces(TableConfig(path=f"file://{place}{pattern}"), "csv")
        assert [Path(piece.path).name[0] for piece in found] == list(names)
        # Not a copy of this machine, which workers do not see.
        assert all(piece.path.startswith(f"file://{place}/") for piece in found)
    # As of a folder on a disk, what is no table is left out.
    (place / "_SUCCESS").touch()
    found = pieces.find_pieces(TableConfig(path=f"file://{place}"), "csv")
    assert [piece.path for piece in found] == sorted(
        f"file://{path}" for path in place.glob("*.csv")
    )


def test_bad_rows_are_refused_with_file_and_line(place, tmp_path):
    config = config_of(place, CASES["ids alone"])
    with pytest.raises(ConfigError, match=r"^interactions: .*a\.log\.csv, line 302"):
        prepare_folder(config, tmp_path / "bad", engine="beam", beam_temp=str(tmp_path / "temp"))
    # Nothing is left, here or where the workers were.
    assert not (tmp_path / "bad").exists() and not list((tmp_path / "temp").iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "beam"}, "config.data.source='shop' is not done by --engine=beam"),
        ({"engine": "duckdb", "beam_temp": "x"}, "--beam_temp='x' is of --engine=beam"),
        ({"engine": "beam", "beam_temp": "none://x"}, "--beam_temp: none://x/.* cannot be made"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(place, tmp_path, options, words):
    source = "shop" if options == {"engine": "beam"} else "csv"
    config = config_of(place, CASES["ids alone"] | {"data": {"source": source}})
    with pytest.raises(ConfigError, match=words):
        prepare_folder(config, tmp_path / "undone", **options)


def test_the_command_of_the_guide_runs(tmp_path, monkeypatch):
    page = ROOT / "experiments" / "guides" / "preparing.md"
    block = next(each for each in read_blocks(page) if "--engine=beam" in each.text)
    rows = [f"u{n % 7},i{n % 5},{1_600_000_000 + n}" for n in range(200)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    (command,) = shell_lines(block.text)
    run_command(command.split())
    assert (tmp_path / "prepared" / "shop" / "manifest.json").is_file()
