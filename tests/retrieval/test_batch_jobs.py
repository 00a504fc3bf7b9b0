"""Jobs in parts against what one call gives; killed, shared and mistaken ones."""

import json
import os
import shutil
import signal
import subprocess
import sys

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.core.errors import ConfigError
from twotower.retrieval.batch.jobs import Tasks, embed_all, recommend_all, write_parts
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow


def parts(folder):
    return sorted(path.name for path in folder.glob("part-*"))


def read(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def check_same_files(folder, other):
    """Compares the parts of two jobs, and what stands beside them."""
    assert parts(folder) == parts(other) and len(parts(folder)) > 1
    for name in parts(folder):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for end in ("job", "manifest"):
        files = [path.with_name(f"{path.name}_{end}.json") for path in (folder, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), end


@pytest.mark.parametrize("devices", [1, 8])
def test_vectors_of_all_users_and_items(run, retriever, tmp_path, devices):
    for task in (1, 0):  # two processes, in any order
        embed_all(run, tmp_path, devices=devices, tasks=Tasks(task, 2), part=50)
    for side, ids, vectors in (
        ("user", retriever.bundle.users["user_id"], retriever.bundle.user_vectors),
        ("item", retriever.bundle.items["item_id"], retriever.bundle.vectors),
    ):
        table = read(tmp_path / f"{side}s")
        assert table[f"{side}_id"].to_pylist() == ids.to_pylist()
        found = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        np.testing.assert_allclose(found, vectors, atol=1e-6)
        assert table.schema.field("vector").type == pa.list_(pa.float32(), 16)
        assert len(parts(tmp_path / f"{side}s")) == -(-len(ids) // 50)
    # As one process writes it, byte for byte.
    if devices == 1:
        embed_all(run, tmp_path / "one", devices=1, part=50)
        for side in ("users", "items"):
            check_same_files(tmp_path / side, tmp_path / "one" / side)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"devices": 1},
        {"approximate": True},
        {"exclude_seen": False},
        {"rerank": "caps:column=category,max_items=1"},
    ],
)
def test_lists_of_all_users(exported, retriever, tmp_path, options):
    recommend_all(exported, tmp_path / "lists", 5, part=100, **options)
    lists = {name: options[name] for name in ("exclude_seen", "rerank") if name in options}
    expected = retriever.recommend_many(retriever.bundle.users["user_id"].to_pylist(), k=5, **lists)
    found = read(tmp_path / "lists")
    assert found["user_id"].to_pylist() == expected["user_id"].to_pylist() and found["rank"].equals(
        expected["rank"]
    )
    np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), atol=1e-6)
    assert (
        np.mean(np.array(found["item_id"].to_pylist()) == np.array(expected["item_id"].to_pylist()))
        > 0.999
    )
    # As one process writes them, byte for byte.
    if not options:
        for task in (1, 0):
            recommend_all(exported, tmp_path / "shared", 5, part=100, tasks=Tasks(task, 2))
        check_same_files(tmp_path / "shared", tmp_path / "lists")


def numbers(rows):
    return pa.table({"n": np.arange(rows.start, rows.stop)})


def test_parts_that_are_there_are_not_made_again(tmp_path):
    asked = []
    make = lambda rows: asked.append(rows) or numbers(rows)  # noqa: E731
    for expected in (4, 0):
        asked.clear()
        write_parts(tmp_path / "out", {"job": "n"}, 31, make, tasks=Tasks(), part=8)
        assert len(asked) == expected
    (tmp_path / "out" / "part-000002.parquet").unlink()
    write_parts(tmp_path / "out", {"job": "n"}, 31, make, tasks=Tasks(), part=8)
    assert [rows.start for rows in asked] == [16] and read(tmp_path / "out")[
        "n"
    ].to_pylist() == list(range(31))


def test_the_manifest_comes_last_and_stays_as_long_as_all_parts_are_there(tmp_path):
    manifest = tmp_path / "out_manifest.json"

    def work(task):
        write_parts(tmp_path / "out", {"job": "n"}, 31, numbers, tasks=Tasks(task, 2), part=8)

    work(1)
    assert not manifest.exists() and len(parts(tmp_path / "out")) == 2
    work(0)
    content = json.loads(manifest.read_text())
    assert content["rows"] == 31 and content["job"] == {"job": "n"}
    assert list(content["parts"].values()) == [8, 8, 8, 7]
    whole = manifest.read_bytes()
    (tmp_path / "out" / "part-000001.parquet").unlink()
    work(0)
    assert not manifest.exists()
    work(1)
    assert manifest.read_bytes() == whole


def test_another_job_does_not_go_on_in_the_same_folder(tmp_path):
    write_parts(tmp_path / "out", {"job": "n", "k": 3}, 31, numbers, tasks=Tasks(), part=8)
    with pytest.raises(ConfigError, match="holds another job .k 3, not 4"):
        write_parts(tmp_path / "out", {"job": "n", "k": 4}, 31, numbers, tasks=Tasks(), part=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="holds files"):
        write_parts(tmp_path / "other", {}, 31, numbers, tasks=Tasks(), part=8)
    with pytest.raises(ConfigError, match=r"--task=2 must lie in \[0, 2\)"):
        Tasks(2, 2)


def test_the_parts_are_a_folder_that_any_reader_takes(tmp_path):
    out = tmp_path / "lists"
    write_parts(out, {"job": "n"}, 31, numbers, tasks=Tasks(), part=8)
    assert json.loads((tmp_path / "lists_job.json").read_text())["rows"] == 31
    read = {
        "pandas": pandas.read_parquet(out)["n"].tolist(),
        "polars": polars.read_parquet(out)["n"].to_list(),
        "duckdb": [
            row[0] for row in duckdb.sql(f"from read_parquet('{out}/*') order by n").fetchall()
        ],
        "pyarrow": pq.read_table(out)["n"].to_pylist(),
    }
    assert read == dict.fromkeys(read, list(range(31)))
    # Where the parts are deleted, so is the job.
    shutil.rmtree(out)
    write_parts(out, {"job": "another"}, 31, numbers, tasks=Tasks(), part=8)


KILLED = """if True:
    import sys, time
    from pathlib import Path
    import numpy as np, pyarrow as pa
    from twotower.retrieval.batch.jobs import Tasks, write_parts
    def make(rows):
        print(rows.start, flush=True)
        return pa.table({"n": np.arange(rows.start, rows.stop)})
    write_parts(Path(sys.argv[1]), {"job": "n"}, 20_000, make, tasks=Tasks(), part=100)
"""


def test_a_killed_job_goes_on_to_the_same_end(tmp_path):
    out = tmp_path / "out"
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True
    )
    for line in job.stdout:
        if int(line) > 500:
            os.kill(job.pid, signal.SIGKILL)
            break
    job.stdout.read()
    job.wait()
    done = len(parts(out))
    assert 5 <= done < 200
    made = []
    write_parts(
        out,
        {"job": "n"},
        20_000,
        lambda rows: made.append(1) or numbers(rows),
        tasks=Tasks(),
        part=100,
    )
    assert len(made) == 200 - done and read(out)["n"].to_pylist() == list(range(20_000))


def test_changes_to_the_bundle_are_in_the_lists(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "bundle")
    retriever = Retriever.load(folder)
    user = retriever.bundle.users["user_id"][0].as_py()
    retriever.upsert([{"item_id": "new"}], vectors=retriever.bundle.user_vectors[:1])
    recommend_all(folder, tmp_path / "lists", 1)
    assert (
        dict(zip(*read(tmp_path / "lists").select(["user_id", "item_id"]).to_pydict().values()))[
            user
        ]
        == "new"
    )
