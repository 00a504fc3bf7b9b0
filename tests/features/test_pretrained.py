"""Vectors from files and columns: the right one for each id, and every way in which they can be
wrong."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from tests.features.encoder_shop import assert_same, fitted, shop
from twotower.config import DataConfig, TableConfig
from twotower.core.errors import ConfigError
from twotower.data.contract import Contract
from twotower.data.sources.frames import read_table
from twotower.data.sources.load import load_dataset
from twotower.data.tables import apply_contract
from twotower.features.encoder import Encoder
from twotower.features.fit import fit_encoder
from twotower.features.inputs import Input
from twotower.features.pretrained import parse_vectors
from twotower.features.spec import from_mappings


def write_vectors(folder, kind, ids, vectors):
    """The fields of a feature that reads these vectors."""
    path = folder / f"v.{kind}"
    fields = {"type": "pretrained", "column": "item_id", "path": str(path)}
    if kind == "npy":
        np.save(path, vectors)
        (folder / "ids.txt").write_text("\n".join(ids))
        return fields | {"ids": str(folder / "ids.txt")}
    pq.write_table(pa.table({"id": ids, "vector": list(map(list, vectors))}), path)
    return fields


def vectors_of(count=30, width=4):
    ids = [f"i{n}" for n in range(count)]
    vectors = np.random.default_rng(0).normal(size=(count, width))
    return ids, vectors.astype(np.float32)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_frozen_vectors_are_those_of_the_file(tmp_path, kind):
    ids, vectors = vectors_of()
    fields = write_vectors(tmp_path, kind, ids, vectors) | {"projection": 6}
    encoder = fitted({"item": {"clip": fields}})
    assert encoder.inputs["item"]["clip"] == Input(width=4, projection=6)
    assert "item.clip" not in encoder.tables
    encoded = encoder.encode("item", pa.table({"item_id": ["i7", "i0", "new", None]}))["clip"]
    np.testing.assert_array_equal(encoded, [vectors[7], vectors[0], np.zeros(4), np.zeros(4)])
    encoder.save(tmp_path / "encoder")
    (tmp_path / f"v.{kind}").unlink()
    loaded = Encoder.load(tmp_path / "encoder")
    _, _, items = shop()
    assert_same(loaded.encode("item", items), encoder.encode("item", items))


def test_trained_vectors_start_from_the_file(tmp_path):
    ids, vectors = vectors_of()
    fields = write_vectors(tmp_path, "npy", ids, vectors)
    fields |= {"frozen": False, "oov_rows": 2, "table": "clip"}
    encoder = fitted({"item": {"clip": fields}})
    rows = encoder.encode("item", pa.table({"item_id": ["i7", "i0", "new", None]}))["clip"]
    table = encoder.tables["clip"]
    assert encoder.inputs["item"]["clip"] == Input(table="clip", oov_rows=2)
    assert (table.rows, table.width) == (33, 4)
    expected = [vectors[7], vectors[0], np.zeros(4), np.zeros(4)]
    np.testing.assert_array_equal(table.initial[rows], expected)
    assert rows[2] in (1, 2) and rows[3] == 0


def test_missing_vectors_are_counted_and_named(tmp_path):
    ids, vectors = vectors_of(27)
    fields = write_vectors(tmp_path, "npy", ids, vectors)
    message = (
        "has no vector for 3 of 30 ids in column 'item_id', the first 'i27', 'i28', 'i29'; add"
    )
    with pytest.raises(ConfigError, match=message):
        fitted({"item": {"clip": fields}})
    encoder = fitted({"item": {"clip": fields | {"missing": "zeros"}}})
    encoded = encoder.encode("item", pa.table({"item_id": ["i1", "i28"]}))["clip"]
    np.testing.assert_array_equal(encoded, [[*vectors[1], 0], [0, 0, 0, 0, 1]])
    assert encoder.inputs["item"]["clip"].width == 5


IDS, VECTORS = vectors_of()
ONE_NAN = np.where(np.arange(30)[:, None] == 3, np.float32(np.nan), VECTORS)


@pytest.mark.parametrize(
    "kind, ids, vectors, extra, message",
    [
        (
            "npy",
            IDS,
            VECTORS,
            {"embedding_size": 8},
            r"holds vectors of width 4, but embedding_size=8",
        ),
        (
            "parquet",
            IDS,
            VECTORS,
            {"embedding_size": 8},
            r"holds vectors of width 4, but embedding_size=8",
        ),
        ("npy", IDS[:-1], VECTORS, {}, r"holds 30 vectors for 29 ids"),
        ("npy", [*IDS[:-1], "i0"], VECTORS, {}, r"holds 1 ids more than once, the first 'i0'"),
        ("parquet", [*IDS[:-1], "i0"], VECTORS, {}, r"holds 1 ids more than once, the first 'i0'"),
        ("parquet", [*IDS[:-1], None], VECTORS, {}, r"holds 1 vectors without an id"),
        ("npy", IDS, VECTORS[:, 0], {}, r"holds float32 of shape \(30,\)"),
        ("npy", IDS, ONE_NAN, {}, r"NaN or infinity in 1 vectors, the first in row 3"),
        ("npy", IDS, np.array([["x"]] * 30), {}, r"holds <U1 of shape"),
        ("npy", IDS, VECTORS.astype(object), {}, r"v.npy cannot be read: .*allow_pickle=False"),
        (
            "parquet",
            IDS,
            [*VECTORS[:-1], [1.0]],
            {},
            r"the vector in row 29 has width 1, that in row 0 has 4",
        ),
        ("parquet", IDS, VECTORS, {"id_column": "ids"}, r"has no field 'ids'; did you mean 'id'\?"),
        (
            "parquet",
            IDS,
            VECTORS,
            {"vector_column": "id"},
            r"column 'id' is of type string, not lists of numbers",
        ),
        ("parquet", IDS, VECTORS, {"path": "nowhere.parquet"}, r"nowhere.parquet cannot be read"),
    ],
)
def test_broken_vector_files_are_refused(tmp_path, kind, ids, vectors, extra, message):
    fields = write_vectors(tmp_path, kind, ids, vectors) | extra
    with pytest.raises(ConfigError, match=message) as error:
        fitted({"item": {"clip": fields}})
    assert str(error.value).startswith("features.item.clip")


def in_column(vectors, form="lists"):
    """The shop, with the vectors in a column of its items; None is a missing one."""
    train, users, items = shop()
    if form == "json":
        vectors = [json.dumps(vector) if vector else "" for vector in vectors]
    return train, users, items.append_column("clip", pa.array(vectors))


@pytest.mark.parametrize("form", ["lists", "json"])
@pytest.mark.parametrize("frozen", [True, False])
def test_vectors_of_a_column_are_those_of_a_file(tmp_path, form, frozen):
    ids, vectors = vectors_of()
    fields = {"projection": 6, "frozen": frozen}
    tables = in_column([[float(x) for x in vector] for vector in vectors], form)
    encoder = fitted({"item": {"clip": fields | {"type": "pretrained"}}}, tables)
    from_file = write_vectors(tmp_path, "parquet", ids, vectors) | fields
    other = fitted({"item": {"clip": from_file}}, tables)
    items = tables[2]
    assert encoder.inputs == other.inputs
    assert_same(encoder.encode("item", items), other.encode("item", items))
    if not frozen:
        one, two = (e.tables["item.clip"] for e in (encoder, other))
        np.testing.assert_array_equal(one.initial, two.initial)
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert again.spec == encoder.spec
    assert_same(again.encode("item", items), encoder.encode("item", items))


def test_new_rows_bring_their_vectors_or_have_none():
    spec = {"item": {"clip": {"type": "pretrained", "missing": "zeros"}}}
    encoder = fitted(spec, in_column([[1.0, 2.0]] * 29 + [None]))
    rows = pa.Table.from_pylist([{"clip": None}, {"clip": [3, 4]}, {"clip": []}])
    assert encoder.encode("item", rows)["clip"].tolist() == [[0, 0, 1], [3, 4, 0], [0, 0, 1]]
    assert encoder.encode("item", pa.table({"item_id": ["i1"]}))["clip"].tolist() == [[0, 0, 1]]
    with pytest.raises(ConfigError, match="features.item.clip: the vector in row 1 has width 3"):
        encoder.encode("item", pa.table({"clip": [[1.0, 2.0, 3.0]]}))


def test_rows_without_a_vector_are_said_with_their_share(caplog):
    tables = in_column([[1.0, 2.0]] * 9 + [None] * 6 + [[3.0, 4.0]] * 15)
    said = r"column 'clip' has no vector in 6 of 30 rows \(20.0%\), the first in row 10"
    with pytest.raises(ConfigError, match=said + "; add them, or set missing to 'zeros'"):
        fitted({"item": {"clip": {"type": "pretrained"}}}, tables)
    trained = {"type": "pretrained", "missing": "zeros", "frozen": False, "oov_rows": 2}
    with caplog.at_level("WARNING", logger="absl"):
        encoder = fitted({"item": {"clip": trained}}, tables)
    assert re.search(said, caplog.text)
    rows = encoder.encode("item", tables[2])["clip"]
    initial = encoder.tables["item.clip"].initial
    assert not initial[rows[9:15]].any() and initial[rows[15]].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("vectors", "extra", "message"),
    [
        ([[1.0, 2.0]] * 29 + [[1.0]], {}, "the vector in row 30 has width 1; all must be 2 wide"),
        (
            [[1.0, 2.0]] * 30,
            {"embedding_size": 4},
            "the vector in row 1 has width 2; all must be 4 wide",
        ),
        ([[1.0, 2.0]] * 29 + [[1.0, np.nan]], {}, "NaN or infinity .* 1 of 30 rows.* in row 30"),
        ([[1.0, 2.0]] * 29 + [[1.0, None]], {}, "NaN or infinity .* in row 30"),
        (["[1, 2]"] * 29 + ["i3"], {}, "'i3' in row 30 is not a list of numbers such as"),
        (["[1, 2]"] * 29 + ["[1 2]"], {}, "in row 30 is not a list of numbers"),
        (["17"] * 30, {}, "'17' in row 1 is not a list.*ids, name the file of their vectors"),
        ([1.5] * 30, {}, "a column of type double holds no vectors"),
        ([None] * 30, {"missing": "zeros"}, "no vector in 30 of 30 rows .*; name the column"),
        (["[1, 2]"] * 30, {"ids": "ids.txt"}, "ids='ids.txt' must be left out without a path"),
        (["[1, 2]"] * 30, {"vector_column": "clip"}, "vector_column='clip' must be left out"),
    ],
)
def test_columns_without_proper_vectors_are_refused(vectors, extra, message):
    with pytest.raises(ConfigError, match=message) as error:
        fitted({"item": {"clip": {"type": "pretrained"} | extra}}, in_column(vectors))
    assert str(error.value).startswith("features.item.clip")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_vectors_come_through_a_file_of_the_table(tmp_path, form):
    vectors = [[0.1, -2.0], [3e-4, 5.5], [1.0, 0.0]]
    (tmp_path / "log.csv").write_text("user_id,item_id\nu,a\nu,b\nv,c\n")
    items = {"item_id": ["a", "b", "c"], "vector": vectors}
    path = tmp_path / f"items.{form}"
    if form == "csv":
        items["vector"] = [json.dumps(vector) for vector in vectors]
        csv.write_csv(pa.table(items), path)
    else:
        pq.write_table(pa.table(items), path)
    log = TableConfig(path=str(tmp_path / "log.csv"))
    config = DataConfig(source="csv", interactions=log, item_table=TableConfig(path=str(path)))
    data = load_dataset(config)
    spec = from_mappings({"item": {"vector": {"type": "pretrained"}}})
    encoder = fit_encoder(spec, data.interactions, users=data.users, items=data.items)
    encoded = encoder.encode("item", data.items)["vector"]
    np.testing.assert_array_equal(encoded, np.float32(vectors))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_vectors_come_through_a_frame(library):
    frames = pytest.importorskip(library)
    vectors = np.float32([[0.1, -2.0], [3e-4, 5.5]])
    for column in (list(vectors), vectors.tolist()):
        frame = frames.DataFrame({"item_id": ["a", "b"], "vector": column})
        table, origin = read_table(frame, TableConfig(), "items")
        items, _ = apply_contract(
            table, TableConfig(), "item_table", origin=origin, contract=Contract()
        )
        parsed, missing = parse_vectors(items["vector"], "vector", width=2)
        np.testing.assert_array_equal(parsed, vectors)
        assert not missing.any()
