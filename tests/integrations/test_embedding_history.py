"""The history: what was put in comes out, whoever reads it; a repeat changes nothing, a failure
leaves nothing."""

import dataclasses
import datetime
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.extras import extra
from twotower.core.errors import ConfigError, HistoryError, QueryError
from twotower.integrations.embedding_history import (
    EmbeddingHistory,
    Version,
    make_version,
    parse_date,
    vector_blocks,
)
from twotower.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DAY = datetime.date(2026, 11, 25)


def version(run="shop", date=DAY, **values):
    return Version(
        **{"run_date": date, "run_id": run, "experiment_id": "e", "model_version": "m"} | values
    )


def block(rows, width=4, seed=0, prefix="e"):
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return pa.array([f"{prefix}{n}" for n in range(rows)]), vectors


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def history(tmp_path):
    return EmbeddingHistory(tmp_path / "history")


def test_what_is_read_is_what_was_appended_block_by_block(history):
    blocks = [
        block(70, seed=1, prefix="a"),
        block(50, seed=2, prefix="b"),
        block(1, seed=3, prefix="ü,"),
    ]
    history.append(version(), {"item": blocks})
    stored = history.find("item", "2026-11-25/shop")
    ids, vectors = history.read(stored)
    assert (stored.version, stored.rows, stored.width) == (version(), 121, 4)
    assert ids.to_pylist() == [one for part, _ in blocks for one in part.to_pylist()]
    np.testing.assert_array_equal(vectors, np.concatenate([part for _, part in blocks]))


def test_a_table_is_partitioned_by_date_with_who_and_what_beside_each_vector(history):
    history.append(version(), {"item": [block(3)], "user": [block(2)]})
    history.append(
        version("other", DAY + datetime.timedelta(1), experiment_id="f", model_version="n"),
        {"item": [block(3, 8)]},
    )
    table = history.dataset("item").to_table(
        filter=ds.field("run_date") == DAY + datetime.timedelta(1)
    )
    assert table.column_names == [
        "run_id",
        "experiment_id",
        "model_version",
        "entity_id",
        "vector",
        "run_date",
    ]
    assert table.drop_columns("vector").to_pylist()[2] == {
        "run_id": "other",
        "experiment_id": "f",
        "model_version": "n",
        "entity_id": "e2",
        "run_date": datetime.date(2026, 11, 26),
    }
    assert table["vector"].type == pa.list_(pa.float32()) and len(table["vector"][0]) == 8
    assert sorted(files(history.folder)) == [
        "item_embeddings/run_date=2026-11-25/run-shop.parquet",
        "item_embeddings/run_date=2026-11-26/run-other.parquet",
        "user_embeddings/run_date=2026-11-25/run-shop.parquet",
    ]
    assert [one.version.name for one in history.files("item")] == [
        "2026-11-25/shop",
        "2026-11-26/other",
    ]


def test_vectors_have_no_dictionary(history):
    history.append(version(), {"item": [block(100)]})
    group = pq.ParquetFile(history.find("item", "2026-11-25/shop").path).metadata.row_group(0)
    columns = {
        group.column(n).path_in_schema.split(".")[0]: group.column(n)
        for n in range(group.num_columns)
    }
    dictionaries = {
        name for name, column in columns.items() if "DICTIONARY" in str(column.encodings)
    }
    assert dictionaries == {"run_id", "experiment_id", "model_version"}


def test_duckdb_reads_what_pyarrow_wrote(history):
    duckdb = extra("duckdb", "dev")
    history.append(version(), {"item": [block(30)]})
    history.append(version(date=DAY + datetime.timedelta(1)), {"item": [block(20, seed=1)]})
    pattern = f"{history.folder}/item_embeddings/*/*.parquet"
    query = (
        f"SELECT run_date, entity_id, vector FROM read_parquet('{pattern}') "
        "WHERE run_date = DATE '2026-11-26' ORDER BY 2"
    )
    found = duckdb.sql(query).fetchall()
    ids, vectors = history.read(history.find("item", "2026-11-26/shop"))
    expected = sorted(zip(ids.to_pylist(), vectors.tolist()))
    assert found == [(DAY + datetime.timedelta(1), name, vector) for name, vector in expected]


def test_a_repeat_changes_nothing_and_a_new_model_replaces_the_run_of_that_date_alone(history):
    history.append(version(), {"item": [block(10)], "user": [block(10)]})
    history.append(version("other"), {"item": [block(5)]})
    before = files(history.folder)
    history.append(version(), {"item": [block(10)], "user": [block(10)]})
    assert files(history.folder) == before
    history.append(version(model_version="newer"), {"item": [block(7)]})
    after = files(history.folder)
    changed = {name for name in before if before[name] != after[name]}
    assert (
        changed == {"item_embeddings/run_date=2026-11-25/run-shop.parquet"}
        and after.keys() == before.keys()
    )
    assert history.find("item", "2026-11-25/shop").rows == 7


NAN = (pa.array(["a", "b"]), np.array([[1, 2, 3, 4], [1, np.nan, 3, 4]], np.float32))


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (NAN, QueryError, "item vectors of 2026-11-25/shop vector 1 is not finite"),
        (block(3, width=5), HistoryError, "5 wide after others that are 4 wide"),
        ((pa.array(["a"]), np.ones((2, 4))), HistoryError, "1 ids for 2 vectors"),
        ((pa.array(["a", None]), np.ones((2, 4))), HistoryError, "1 ids for 2 vectors"),
    ],
)
def test_what_cannot_be_kept_leaves_the_history_as_it_was(history, bad, error, message):
    history.append(version(), {"user": [block(4)], "item": [block(4)]})
    before = files(history.folder)
    with pytest.raises(error, match=message):
        history.append(version(), {"user": [block(9)], "item": [block(9), bad]})
    assert files(history.folder) == before


KILLED = """
import datetime, os, signal, sys
import numpy as np, pyarrow as pa
from twotower.integrations.embedding_history import EmbeddingHistory, Version

def blocks():
    yield pa.array(["a"] * 70_000), np.ones((70_000, 8), np.float32)
    os.kill(os.getpid(), signal.SIGKILL)

one = Version(
    run_date=datetime.date(2026, 11, 25), run_id="shop", experiment_id="e", model_version="m"
)
EmbeddingHistory(sys.argv[1]).append(one, {"item": blocks()})
"""


def test_a_process_that_is_killed_leaves_nothing_that_is_read_and_the_next_cleans_up(history):
    history.append(version("other"), {"item": [block(3)]})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(history.folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert killed.returncode == -signal.SIGKILL and len(files(history.folder)) == 2
    assert [one.version.run_id for one in history.files("item")] == ["other"] and history.dataset(
        "item"
    ).count_rows() == 3
    history.append(version(), {"item": [block(4)]})
    assert len(files(history.folder)) == 2 and history.dataset("item").count_rows() == 7


def test_a_run_without_vectors_is_kept_too(history):
    history.append(version(), {"item": [], "user": [block(0)]})
    for side in ("item", "user"):
        ids, vectors = history.read(history.find(side, "2026-11-25/shop"))
        assert len(ids) == len(vectors) == 0


def test_a_file_of_something_else_or_a_damaged_one_is_named(history):
    history.append(version(), {"item": [block(100)]})
    path = history.find("item", "2026-11-25/shop").path
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        HistoryError, match=r"run-shop\.parquet is no file of the history, or is damaged"
    ):
        history.files("item")
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(HistoryError, match=r"run-shop\.parquet is no file of the history"):
        history.files("item")
    history.append(version(), {"item": [block(100)]})
    path.rename(path.with_name("run-other.parquet"))
    with pytest.raises(
        HistoryError, match="was moved or renamed: it holds the vectors of 2026-11-25/shop"
    ):
        history.files("item")


@pytest.mark.parametrize("run", ["", "a/b", "../a", "a b", "x" * 51, "a\n"])
def test_a_run_id_that_could_leave_its_folder_is_refused(run):
    with pytest.raises(HistoryError, match="must be of 1 to 50 letters"):
        version(run)


def test_a_run_id_of_dots_stays_in_its_folder_and_is_read(history):
    history.append(version(".."), {"item": [block(1)]})
    assert list(files(history.folder)) == ["item_embeddings/run_date=2026-11-25/run-...parquet"]
    assert history.dataset("item").count_rows() == 1


def test_dates_and_places_are_checked(history):
    assert parse_date("2026-11-25", "--run_date") == DAY
    for text in ("2026-11-31", "20261125", "today", "2026-W48-3"):
        with pytest.raises(HistoryError, match=f"--run_date='{text}' must be a date"):
            parse_date(text, "--run_date")
    with pytest.raises(ConfigError, match="history=hdfs://host/x: addresses begin with gs://"):
        EmbeddingHistory("hdfs://host/x")
    with pytest.raises(HistoryError, match="has no item vectors yet"):
        history.dataset("item")
    history.append(version(), {"item": [block(1)]})
    with pytest.raises(
        HistoryError,
        match=r"no item vectors of '2026-11-24/shop' \(DATE/RUN\); the latest are: 2026-11-25/shop",
    ):
        history.find("item", "2026-11-24/shop")
    with pytest.raises(HistoryError, match="the date of DATE/RUN='shop' must be a date"):
        history.find("item", "shop")


def test_the_vectors_of_a_bundle_rank_as_its_retriever_does(history, retriever):
    one = make_version(retriever, run_date=DAY, run_id="shop")
    history.append(one, vector_blocks(retriever, block=16))
    (users, queries), (items, vectors) = (
        history.read(history.find(side, one.name)) for side in ("user", "item")
    )
    assert one.model_version == retriever.bundle.manifest["model_version"]
    unwritten = Retriever(dataclasses.replace(retriever.bundle, manifest={}, folder=None))
    assert make_version(unwritten, run_date=DAY, run_id="shop") == one
    assert users.equals(retriever.bundle.users["user_id"]) and items.equals(
        retriever.bundle.items["item_id"]
    )
    for row in (0, 17, len(users) - 1):
        best = np.argsort(-(vectors @ queries[row]), kind="stable")[:5]
        found = retriever.recommend(users[row].as_py(), k=5, exclude_seen=False)
        assert [item.item_id for item in found] == [items[int(n)].as_py() for n in best]


def test_runs_of_one_configuration_share_an_experiment(retriever):
    def experiment(one=retriever, **values):
        return make_version(one, run_date=DAY, **values).experiment_id

    def changed(**training):
        config = retriever.bundle.config
        config = dataclasses.replace(
            config, training=dataclasses.replace(config.training, **training)
        )
        return Retriever(dataclasses.replace(retriever.bundle, config=config))

    assert (
        experiment(changed(seed=7), run_id="a")
        == experiment(run_id="a")
        != experiment(changed(steps=7), run_id="a")
    )
    assert (
        experiment(run_id="a")
        == experiment(run_id="b")
        != experiment(run_id="a", experiment_id="mine")
        == "mine"
    )


def test_the_command_lists_and_does_one_thing_at_a_time(history):
    def launch(*flags):
        command = [
            sys.executable,
            "-m",
            "experiments.history",
            f"--history={history.folder}",
            *flags,
        ]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)

    history.append(version(), {"item": [block(30)], "user": [block(20)]})
    listed = launch("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split() for line in listed.stdout.splitlines()[1:]] == [
        ["user", "2026-11-25/shop", "e", "m", "20", "4"],
        ["item", "2026-11-25/shop", "e", "m", "30", "4"],
    ]
    wrong = launch("--drift=2026-11-25/shop,2026-11-25/shop", "--list")
    assert (
        wrong.returncode == os.EX_CONFIG
        and "Give one of --append=RUN" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


def test_its_tables_may_have_other_names(tmp_path):
    names = {"user": "two_tower_user_embedding", "item": "two_tower_item_embedding"}
    history = EmbeddingHistory(tmp_path, names)
    history.append(version(), {"item": [block(3)], "user": [block(2)]})
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())
    assert len(history.dataset("user").to_table()) == 2
    # By the names alone: those of another table are not seen.
    assert not EmbeddingHistory(tmp_path).files("user")
    with pytest.raises(HistoryError, match="'a-b' cannot be the table of user vectors"):
        EmbeddingHistory(tmp_path, names | {"user": "a-b"})
    with pytest.raises(HistoryError, match="must differ; both are 'same'"):
        EmbeddingHistory(tmp_path, {"user": "same", "item": "same"})
