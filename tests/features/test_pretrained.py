"""Vectors from files: the right one for each id, and every way in which a file can be wrong."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.features.encoder_shop import assert_same, fitted, shop
from twotower.core.errors import ConfigError
from twotower.features.base import Input
from twotower.features.encoder import Encoder


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
