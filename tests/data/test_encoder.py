"""The encoder: fitted on training rows alone, the same after a round trip through a folder, missing values in their place."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.config import ConfigError
from twotower.data.encoder import Encoder, Input
from twotower.data.features import from_mappings
from twotower.data.interactions import fingerprint

DAY = 86_400
SPEC = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 8, "oov_rows": 3},
        "age": {"type": "int", "buckets": 4},
        "clock": {"type": "timestamp", "column": "timestamp", "embedding_size": 4},
        "page": {"type": "string", "min_count": 2},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 8, "oov_rate": 0.1},
        "genres": {"type": "strings", "separator": "|", "max_length": 3},
        "tags": {"type": "strings", "max_length": 2, "table": "tags"},
        "brand": {"type": "string", "table": "tags"},
        "stock": {"type": "int", "normalize": True},
        "price": {"type": "float", "log": True, "embedding_size": 5},
        "title": {"type": "text", "buckets": 500, "max_length": 12},
        "listed": {"type": "timestamp", "parts": ["age", "hour"]},
    },
}


def shop(seed=0, users=40, items=30, rows=600):
    """(training rows, users, items): the last users and items have no training row; every tenth value is missing."""
    rng = np.random.default_rng(seed)

    def holes(values):
        return [None if rng.random() < 0.1 else value for value in values]

    train = pa.table({
        "user_id": [f"u{n}" for n in rng.integers(0, users - 5, rows)],
        "item_id": [f"i{n}" for n in rng.zipf(1.5, rows) % (items - 5)],
        "timestamp": rng.integers(0, 400 * DAY, rows),
        "page": holes(rng.choice(["home", "search", "mail"], rows, p=[0.6, 0.3, 0.1]).tolist()),
    })  # fmt: skip
    user_table = pa.table({"user_id": [f"u{n}" for n in range(users)], "age": pa.array(holes(rng.integers(10, 80, users).tolist()))})
    genres = ["action", "drama", "comedy", "war"]
    item_table = pa.table({
        "item_id": [f"i{n}" for n in range(items)],
        "genres": holes(["|".join(rng.choice(genres, rng.integers(0, 5), replace=False)) for _ in range(items)]),
        "tags": holes([rng.choice(["new", "sale", "acme"], rng.integers(0, 3)).tolist() for _ in range(items)]),
        "brand": holes(rng.choice(["acme", "umbrella"], items).tolist()),
        "stock": pa.array(holes(rng.integers(0, 9, items).tolist())),
        "price": pa.array(holes(rng.lognormal(3, 1, items).tolist())),
        "title": holes([f"Shoe number {n} حذاء" for n in range(items)]),
        "listed": pa.array(holes(rng.integers(0, 400 * DAY, items).tolist())),
    })  # fmt: skip
    return train, user_table, item_table


def fitted(spec=SPEC, tables=None):
    train, users, items = tables or shop()
    return Encoder.fit(from_mappings(spec), train, users=users, items=items)


def encode_all(encoder, tables):
    train, users, items = tables
    own = [name for name in encoder.inputs["user"] if name not in encoder.context]
    return encoder.encode("user", users, own) | encoder.encode("user", train, encoder.context) | encoder.encode("item", items)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_inputs_and_tables_say_what_encode_yields():
    encoder, (train, users, items) = fitted(), shop()
    assert encoder.context == ("clock", "page")
    for side, rows in (("user", users), ("item", items)):
        for name, array in encoder.encode(side, rows).items():
            read = encoder.inputs[side][name]
            if read.table:
                assert array.dtype == np.int32
                assert array.shape == ((len(rows), read.length) if read.length else (len(rows),))
                assert array.min() >= 0 and array.max() < encoder.tables[read.table].rows
            else:
                assert array.dtype == np.float32 and array.shape == (len(rows), read.width)
    assert encoder.inputs["item"]["item_id"] == Input(table="item.item_id", oov_rate=0.1, oov_rows=8)
    assert encoder.inputs["item"]["price"] == Input(width=2, projection=5)
    assert encoder.tables.keys() == {r.table for side in encoder.inputs.values() for r in side.values() if r.table}


def test_a_value_counts_once_for_each_training_row_of_its_item():
    train, _, items = shop()
    encoder = fitted()
    genres_of = dict(zip(items["item_id"].to_pylist(), items["genres"].to_pylist(), strict=True))
    counts = Counter(g for i in train["item_id"].to_pylist() for g in (genres_of[i] or "").split("|") if g)
    expected = sorted(counts, key=lambda g: (-counts[g], g))
    assert encoder.fitted["item", "genres"].vocabulary.values.to_pylist() == expected


def test_features_of_one_table_share_one_vocabulary():
    encoder, (_, _, items) = fitted(), shop()
    one = encoder.encode("item", pa.table({"brand": ["acme"], "tags": [["acme"]]}), ["brand", "tags"])
    assert one["brand"][0] == one["tags"][0, 0] > 8
    assert set(encoder.fitted["item", "brand"].vocabulary.values.to_pylist()) >= {"acme", "umbrella", "new", "sale"}
    assert encoder.inputs["item"]["brand"].table == encoder.inputs["item"]["tags"].table == "tags"


def test_fit_depends_on_training_rows_alone():
    """Whatever is changed of users and items without a training row changes nothing."""
    train, users, items = shop()
    encoder = fitted()
    in_train = {"user_id": pc.is_in(users["user_id"], train["user_id"]), "item_id": pc.is_in(items["item_id"], train["item_id"])}
    other_users, other_items = users.filter(in_train["user_id"]), items.filter(in_train["item_id"])
    assert len(other_users) < len(users) and len(other_items) < len(items)
    stranger = {"item_id": ["new"], "genres": ["horror"], "tags": [["x"]], "brand": ["x"], "stock": [10**9], "price": [1e9],
                "title": ["x"], "listed": [10**12]}  # fmt: skip
    other_items = pa.concat_tables([pa.table(stranger, schema=items.schema), other_items])
    again = fitted(tables=(train, other_users, other_items))
    assert again.fitted_on == encoder.fitted_on == fingerprint(train)
    assert_same(encode_all(again, shop()), encode_all(encoder, shop()))


def test_fit_sees_the_training_rows():
    """The test above could not fail if fitting ignored everything."""
    train, users, items = shop()
    less = fitted(tables=(train.slice(0, 50), users, items))
    assert less.fitted_on != fitted().fitted_on
    assert less.fitted["user", "user_id"].vocabulary.size < fitted().fitted["user", "user_id"].vocabulary.size
    assert less.fitted["item", "price"].numbers != fitted().fitted["item", "price"].numbers


def test_the_order_of_rows_changes_no_encoding():
    tables, rng = shop(), np.random.default_rng(3)
    shuffled = fitted(tables=tuple(table.take(pa.array(rng.permutation(len(table)))) for table in tables))
    assert_same(encode_all(shuffled, tables), encode_all(fitted(), tables))


def test_a_saved_encoder_encodes_the_same_bits(tmp_path):
    encoder = fitted()
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert_same(encode_all(again, shop(seed=1)), encode_all(encoder, shop(seed=1)))
    assert (again.spec, again.context, again.fitted_on) == (encoder.spec, encoder.context, encoder.fitted_on)
    assert (again.inputs, again.tables.keys()) == (encoder.inputs, encoder.tables.keys())
    assert {path.suffix for path in (tmp_path / "encoder").iterdir()} == {".json", ".npy"}


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    fitted().save(tmp_path / "encoder")
    fitted({"user": {}, "item": {}}).save(tmp_path / "encoder")
    assert list(Encoder.load(tmp_path / "encoder").inputs["item"]) == ["item_id"]
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_slices_encode_as_the_whole():
    encoder, (_, _, items) = fitted(), shop(items=200)
    whole = encoder.encode("item", items)
    parts = [encoder.encode("item", items.slice(low, 7)) for low in range(0, len(items), 7)]
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_a_column_that_is_lacking_is_missing_everywhere():
    encoder, (train, users, items) = fitted(), shop()
    for side, table in (("user", users), ("item", items)):
        known = table.column_names[0]
        nulls = pa.table({known: table[known]} | {f.column: pa.nulls(len(table)) for f in encoder.spec.side(side).values() if f.column != known})
        assert_same(encoder.encode(side, table.select([known])), encoder.encode(side, nulls))
    nothing = encoder.encode("item", pa.table({"other": ["x", "y"]}))
    assert nothing["item_id"].tolist() == [0, 0] and nothing["genres"].tolist() == [[0, 0, 0]] * 2
    assert nothing["price"].tolist() == [[0, 1]] * 2 and nothing["listed"].tolist() == [[1, 0]] * 2
    assert nothing["title"].tolist() == [[0] * 12] * 2
    assert encoder.encode("user", pa.table({"other": ["x"]}))["age"].tolist() == [1]


def test_unknown_ids_land_on_all_oov_rows_and_on_no_other():
    rows = fitted().encode("user", pa.table({"user_id": [f"stranger{n}" for n in range(300)]}), ["user_id"])["user_id"]
    assert set(rows.tolist()) == {1, 2, 3}


def test_lists_and_delimited_text_are_one():
    encoder = fitted()
    text = pa.table({"genres": ["war|drama", " war |", "", None, "a|b|c|d", "drama"]})
    lists = pa.table({"genres": [["war", "drama"], ["war", None, " "], [], None, ["a", "b", "c", "d"], ["drama"]]})
    ids = encoder.encode("item", text, ["genres"])["genres"]
    np.testing.assert_array_equal(ids, encoder.encode("item", lists, ["genres"])["genres"])
    assert (ids > 0).sum(axis=1).tolist() == [2, 1, 0, 0, 3, 1]
    assert ids[0, 1] == ids[5, 0] and ids[0, 0] == ids[1, 0]


def test_text_without_a_separator_is_refused():
    train, users, items = shop()
    with pytest.raises(ValueError, match=r"features.item.title: column 'title' holds string, not lists; name the separator"):
        fitted({"item": {"title": {"type": "strings"}}})


def test_buckets_are_quantiles_of_the_training_users():
    train, users, _ = shop(users=400, rows=4000)
    encoder = fitted(tables=shop(users=400, rows=4000))
    ages = users.filter(pc.is_in(users["user_id"], train["user_id"]))
    ids = encoder.encode("user", ages, ["age"])["age"]
    missing = ages["age"].is_null().to_numpy()
    assert (ids[missing] == 1).all() and ids[~missing].min() == 2
    assert np.bincount(ids[~missing])[2:].min() > 0.2 * (~missing).sum()
    boundaries = encoder.fitted["user", "age"].numbers["boundaries"]
    values = ages["age"].drop_null().to_numpy()
    assert ids[~missing].tolist() == [2 + sum(b <= v for b in boundaries) for v in values]


def test_given_boundaries_are_taken():
    encoder = fitted({"user": {"age": {"type": "int", "boundaries": [18, 65]}}})
    ids = encoder.encode("user", pa.table({"age": [17, 18, 64, 65, None, -1]}))["age"]
    assert ids.tolist() == [2, 3, 3, 4, 1, 2] and encoder.tables["user.age"].rows == 5


@pytest.mark.parametrize("log", [True, False])
def test_floats_are_normalised_over_training_items(log):
    train, users, items = shop()
    encoder = fitted({"item": {"price": {"type": "float", "log": log}}})
    seen = items.filter(pc.is_in(items["item_id"], train["item_id"]))["price"].drop_null().to_numpy()
    scaled = np.log1p(seen) if log else seen
    values = encoder.encode("item", pa.table({"price": seen}))["price"]
    np.testing.assert_allclose(values[:, 0], (scaled - scaled.mean()) / scaled.std(), rtol=1e-5, atol=1e-6)
    odd = encoder.encode("item", pa.table({"price": [None, float("nan"), float("inf"), -3.0]}))["price"]
    assert odd[:3].tolist() == [[0, 1]] * 3 and odd[3, 1] == 0 and np.isfinite(odd).all()


def test_constant_and_absent_numbers_are_finite():
    train, users, items = shop()
    same = items.set_column(items.column_names.index("price"), "price", pa.array([2.5] * len(items)))
    none = items.set_column(items.column_names.index("price"), "price", pa.nulls(len(items), pa.float64()))
    spec = {"item": {"price": {"type": "float"}, "level": {"type": "int", "column": "price"}}}
    for table, asked in ((same, [2.5, 3.5]), (none, [2.5, 3.5])):
        encoder = fitted(spec, (train, users, table))
        encoded = encoder.encode("item", pa.table({"price": asked}))
        assert np.isfinite(encoded["price"]).all() and encoded["level"].max() < encoder.tables["item.level"].rows


def test_numbers_written_as_text_are_read_and_others_named():
    encoder = fitted({"item": {"price": {"type": "float"}}})
    number = encoder.encode("item", pa.table({"price": [3.5, None, None]}))
    assert_same(encoder.encode("item", pa.table({"price": [" 3.5", "", None]})), number)
    with pytest.raises(ValueError, match="features.item.price: 'cheap' in row 1 is not a number"):
        encoder.encode("item", pa.table({"price": ["3.5", "cheap"]}))
    with pytest.raises(ValueError, match="features.item.price: a column of type list"):
        encoder.encode("item", pa.table({"price": [[1.0]]}))


def test_times_become_hour_weekday_and_age():
    train, users, items = shop()
    newest = pc.max(train["timestamp"]).as_py()
    encoder = fitted({"user": {"clock": {"type": "timestamp", "column": "timestamp", "age_buckets": 5}}})
    monday_at_5 = 4 * DAY + 5 * 3600
    asked = [monday_at_5, newest, newest - 3600, newest - 3 * 3600, newest - 7 * 3600, newest + DAY, None]
    ids = encoder.encode("user", pa.table({"timestamp": asked}))["clock"]
    first = {"hour": 2, "weekday": 2 + 24, "age": 2 + 24 + 7}
    assert ids[0].tolist() == [first["hour"] + 5, first["weekday"], first["age"] + 4]
    assert (ids[1:6, 2] - first["age"]).tolist() == [0, 1, 2, 3, 0]
    assert ids[6].tolist() == [1, 0, 0]
    assert encoder.tables["user.clock"].rows == first["age"] + 5


def test_a_time_is_one_however_it_is_stored():
    encoder = fitted({"item": {"listed": {"type": "timestamp"}}})
    seconds = pa.array([300 * DAY + 7 * 3600, None, 200 * DAY])
    moments = seconds.cast(pa.timestamp("s"))
    stored = [seconds, moments, moments.cast(pa.timestamp("us")), moments.cast(pa.string()), moments.cast(pa.timestamp("ms", "UTC"))]
    encoded = [encoder.encode("item", pa.table({"listed": column}))["listed"].tolist() for column in stored]
    assert all(ids == encoded[0] for ids in encoded)
    with pytest.raises(ValueError, match="features.item.listed: 'soon' in row 0 is not a time"):
        encoder.encode("item", pa.table({"listed": ["soon"]}))


def test_a_missing_column_names_its_nearest():
    with pytest.raises(ConfigError, match=r"features.item.gender reads column 'gender'; the items.*did you mean 'genres'\?"):
        fitted({"item": {"gender": {"type": "string"}}})
    with pytest.raises(ConfigError, match=r"features.user.at reads column 'timestmp'.*did you mean 'timestamp'\?"):
        fitted({"user": {"at": {"type": "timestamp", "column": "timestmp"}}})
    with pytest.raises(ConfigError, match=r"features.item.page reads column 'page'"):
        fitted({"item": {"page": {"type": "string"}}})


def test_tables_that_do_not_fit_the_log_are_refused():
    train, users, items = shop()
    with pytest.raises(ValueError, match="The users table has 1 ids more than once, the first 'u0'"):
        fitted(tables=(train, pa.concat_tables([users, users.slice(0, 1)]), items))
    with pytest.raises(ValueError, match="training rows have a item_id that the items table lacks, the first 'i"):
        fitted(tables=(train, users, items.slice(25)))
    with pytest.raises(ValueError, match="The items table must have a column 'item_id'; columns: genres"):
        fitted(tables=(train, users, items.select(["genres"])))


def test_an_unknown_feature_names_its_nearest():
    with pytest.raises(ConfigError, match=r"The encoder of the item tower has no field 'genre'; did you mean 'genres'\?"):
        fitted().encode("item", shop()[2], ["genre"])


def test_no_rows_encode_to_no_rows():
    encoder, (_, users, items) = fitted(), shop()
    for side, table in (("user", users), ("item", items)):
        for name, array in encoder.encode(side, table.slice(0, 0)).items():
            assert len(array) == 0 and array.shape[1:] == encoder.encode(side, table)[name].shape[1:], name


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm, message", [
    (lambda folder: (folder / "encoder.json").unlink(), "holds no encoder: there is no encoder.json"),
    (lambda folder: (folder / "encoder.json").write_text("{"), "encoder.json is corrupt: it is not JSON"),
    (lambda folder: (folder / "encoder.json").write_bytes(b"\xff\xfe"), "encoder.json is corrupt: it is not JSON"),
    (lambda folder: (folder / "encoder.json").write_text('{"layers": 3}'), "encoder.json was not written by twotower"),
    (lambda folder: (folder / "vocabulary_0_bytes.npy").unlink(), "not a whole encoder: it lacks vocabulary_0_bytes.npy"),
    (lambda folder: flip_a_byte(folder / "vocabulary_0_bytes.npy"), "vocabulary_0_bytes.npy is corrupt"),
    (lambda folder: flip_a_number(folder / "encoder.json"), "encoder.json is corrupt: its sha256"),
    (lambda folder: set_version(folder / "encoder.json"), "has version 99; this twotower reads version 1"),
])  # fmt: skip
def test_a_corrupt_or_foreign_folder_is_refused(tmp_path, harm, message):
    fitted().save(tmp_path / "encoder")
    harm(tmp_path / "encoder")
    with pytest.raises(ValueError, match=message):
        Encoder.load(tmp_path / "encoder")


def flip_a_number(path):
    content = json.loads(path.read_text())
    content["state"]["context"] = []
    path.write_text(json.dumps(content))


def set_version(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def test_a_save_that_dies_leaves_the_old_encoder(tmp_path, monkeypatch):
    encoder = fitted()
    encoder.save(tmp_path / "encoder")

    def die(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", die)
    with pytest.raises(OSError):
        fitted({}).save(tmp_path / "encoder")
    assert Encoder.load(tmp_path / "encoder").spec == encoder.spec


# Pretrained vectors.


def write_vectors(folder, kind, ids, vectors):
    """The fields of a feature that reads these vectors."""
    if kind == "npy":
        np.save(folder / "v.npy", vectors)
        (folder / "ids.txt").write_text("\n".join(ids))
        return {"type": "pretrained", "column": "item_id", "path": str(folder / "v.npy"), "ids": str(folder / "ids.txt")}
    pq.write_table(pa.table({"id": ids, "vector": [list(v) for v in vectors]}), folder / "v.parquet")
    return {"type": "pretrained", "column": "item_id", "path": str(folder / "v.parquet")}


def vectors_of(count=30, width=4):
    return [f"i{n}" for n in range(count)], np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_frozen_vectors_are_those_of_the_file(tmp_path, kind):
    ids, vectors = vectors_of()
    encoder = fitted({"item": {"clip": write_vectors(tmp_path, kind, ids, vectors) | {"projection": 6}}})
    assert encoder.inputs["item"]["clip"] == Input(width=4, projection=6) and "item.clip" not in encoder.tables
    asked = encoder.encode("item", pa.table({"item_id": ["i7", "i0", "new", None]}))["clip"]
    np.testing.assert_array_equal(asked, [vectors[7], vectors[0], np.zeros(4), np.zeros(4)])
    encoder.save(tmp_path / "encoder")
    (tmp_path / f"v.{kind}").unlink()
    assert_same(Encoder.load(tmp_path / "encoder").encode("item", shop()[2]), encoder.encode("item", shop()[2]))


def test_trained_vectors_start_from_the_file(tmp_path):
    ids, vectors = vectors_of()
    fields = write_vectors(tmp_path, "npy", ids, vectors) | {"frozen": False, "oov_rows": 2, "table": "clip"}
    encoder = fitted({"item": {"clip": fields}})
    rows = encoder.encode("item", pa.table({"item_id": ["i7", "i0", "new", None]}))["clip"]
    table = encoder.tables["clip"]
    assert encoder.inputs["item"]["clip"] == Input(table="clip", oov_rows=2)
    assert (table.rows, table.width, table.trainable) == (33, 4, True)
    np.testing.assert_array_equal(table.initial[rows], [vectors[7], vectors[0], np.zeros(4), np.zeros(4)])
    assert rows[2] in (1, 2) and rows[3] == 0


def test_missing_vectors_are_counted_and_named(tmp_path):
    ids, vectors = vectors_of(27)
    fields = write_vectors(tmp_path, "npy", ids, vectors)
    with pytest.raises(ConfigError, match=r"has no vector for 3 of 30 ids in column 'item_id', the first 'i27', 'i28', 'i29'; add"):
        fitted({"item": {"clip": fields}})
    encoder = fitted({"item": {"clip": fields | {"missing": "zeros"}}})
    asked = encoder.encode("item", pa.table({"item_id": ["i1", "i28"]}))["clip"]
    np.testing.assert_array_equal(asked, [[*vectors[1], 0], [0, 0, 0, 0, 1]])
    assert encoder.inputs["item"]["clip"].width == 5


IDS, VECTORS = vectors_of()


@pytest.mark.parametrize("kind, ids, vectors, extra, message", [
    ("npy", IDS, VECTORS, {"embedding_size": 8}, r"holds vectors of width 4, but embedding_size=8"),
    ("parquet", IDS, VECTORS, {"embedding_size": 8}, r"holds vectors of width 4, but embedding_size=8"),
    ("npy", IDS[:-1], VECTORS, {}, r"holds 30 vectors for 29 ids"),
    ("npy", [*IDS[:-1], "i0"], VECTORS, {}, r"holds 1 ids more than once, the first 'i0'"),
    ("parquet", [*IDS[:-1], "i0"], VECTORS, {}, r"holds 1 ids more than once, the first 'i0'"),
    ("parquet", [*IDS[:-1], None], VECTORS, {}, r"holds 1 vectors without an id"),
    ("npy", IDS, VECTORS[:, 0], {}, r"holds float32 of shape \(30,\)"),
    ("npy", IDS, np.where(VECTORS == VECTORS[3, 1], np.nan, VECTORS), {}, r"NaN or infinity in 1 vectors, the first in row 3"),
    ("npy", IDS, np.array([["x"]] * 30), {}, r"holds <U1 of shape"),
    ("npy", IDS, VECTORS.astype(object), {}, r"v.npy cannot be read: .*allow_pickle=False"),
    ("parquet", IDS, [*VECTORS[:-1], [1.0]], {}, r"the vector in row 29 has width 1, that in row 0 has 4"),
    ("parquet", IDS, VECTORS, {"id_column": "ids"}, r"has no field 'ids'; did you mean 'id'\?"),
    ("parquet", IDS, VECTORS, {"vector_column": "id"}, r"column 'id' is of type string, not lists of numbers"),
    ("parquet", IDS, VECTORS, {"path": "nowhere.parquet"}, r"nowhere.parquet cannot be read"),
])  # fmt: skip
def test_broken_vector_files_are_refused(tmp_path, kind, ids, vectors, extra, message):
    fields = write_vectors(tmp_path, kind, ids, vectors) | extra
    with pytest.raises(ConfigError, match=message) as error:
        fitted({"item": {"clip": fields}})
    assert str(error.value).startswith("features.item.clip")
