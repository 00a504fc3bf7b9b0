"""The feature specification: shapes that load as they are, and errors that name the culprit."""

import json
import re

import pytest

from twotower.config import FeaturesConfig
from twotower.core.errors import ConfigError
from twotower.features.categorical import StringFeature, StringsFeature
from twotower.features.spec import FEATURES, FeatureSpec, from_mappings, load_spec

VECTORS = {"type": "pretrained", "path": "v.parquet"}
ALL_KINDS = {
    "user": {
        "user_id": {
            "type": "string",
            "embedding_size": 64,
            "min_count": 2,
            "oov_rows": 4,
            "oov_rate": 0.05,
        },
        "clock": {"type": "timestamp", "column": "timestamp", "parts": ["hour", "weekday"]},
        "age": {"type": "int", "boundaries": [18, 25.5, 40]},
        "history": {
            "type": "history",
            "reads": ["item_id", "genres"],
            "weights": {"buy": 10, "view": 1.0},
            "half_life": 7,
        },
    },
    "item": {
        "item_id": {"type": "string"},
        "genres": {"type": "strings", "separator": "|", "max_length": 4, "table": "genres"},
        "genre": {"type": "string", "table": "genres"},
        "year": {"type": "int", "normalize": True},
        "price": {"type": "float", "log": True, "embedding_size": 4},
        "title": {"type": "text", "words": [1, 2], "characters": [3], "buckets": 5000},
        "clip": VECTORS | {"column": "item_id", "projection": 8},
        "bert": {
            "type": "pretrained",
            "path": "v.npy",
            "ids": "ids.txt",
            "frozen": False,
            "missing": "zeros",
        },
        "minilm": {
            "type": "sentence",
            "column": "title",
            "model": "folder",
            "cache": "$CACHE",
            "embedding_size": 0,
        },
    },
}


def item(**fields):
    return from_mappings({"item": {"x": fields}}).item["x"]


def test_the_embedding_layers_shape_loads_as_it_is(tmp_path):
    path = tmp_path / "features.json"
    path.write_text(
        json.dumps(
            {
                "user_embedding_layers": {"user_id": {"type": "string", "embedding_size": 64}},
                "item_embedding_layers": {
                    "item_id": {"type": "string", "embedding_size": 48},
                    "price": {"type": "float", "embedding_size": 8},
                },
            }
        )
    )
    spec = load_spec(FeaturesConfig(path=str(path)))
    assert spec.user["user_id"] == StringFeature(side="user", name="user_id", embedding_size=64)
    assert [f.embedding_size for f in spec.item.values()] == [48, 8]


def test_both_shapes_and_both_doors_are_one_specification(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECS", str(tmp_path))
    (tmp_path / "f.json").write_text(
        json.dumps({"user_embedding_layers": ALL_KINDS["user"], "item": ALL_KINDS["item"]})
    )
    assert (
        load_spec(FeaturesConfig(path="$SPECS/f.json"))
        == load_spec(FeaturesConfig(**ALL_KINDS))
        == from_mappings(ALL_KINDS)
    )


def test_a_side_left_out_is_its_id():
    assert load_spec(FeaturesConfig()) == from_mappings({"user": {"user_id": {"type": "string"}}})


def test_defaults_of_column_and_table():
    spec = from_mappings(ALL_KINDS)
    assert spec.user["user_id"].column == "user_id" and spec.user["user_id"].table == "user.user_id"
    assert spec.user["clock"].column == "timestamp" and spec.user["clock"].table == "user.clock"
    assert spec.item["genres"].table == spec.item["genre"].table == "genres"
    assert (
        spec.item["price"].table == ""
        and spec.item["clip"].table == ""
        and spec.item["bert"].table == "item.bert"
    )


def test_every_kind_is_known_and_survives_json():
    spec = from_mappings(ALL_KINDS)
    assert {type(feature) for feature in spec} == set(FEATURES.values())
    assert from_mappings(json.loads(json.dumps(spec.to_dict()))) == spec


def test_numbers_without_a_table_have_no_dense_layer_unless_asked():
    assert item(type="int").embedding_size == 8 and item(type="int").has_table
    assert (
        item(type="int", normalize=True).embedding_size == 0
        and not item(type="int", normalize=True).has_table
    )
    assert item(type="int", normalize=True, embedding_size=8).embedding_size == 8


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"type": "strng"}, r"features.item.x.type='strng' is not known; did you mean 'string'\?"),
        ({"type": ["string"]}, r"features.item.x.type=.*is not known"),
        ({}, r"features.item.x=\{\} must be a mapping with a type: one of string, strings"),
        (
            {"type": "string", "embeding_size": 4},
            r"x has no field 'embeding_size'; did you mean 'embedding_size'\?",
        ),
        ({"type": "string", "separator": "|"}, r"features.item.x has no field 'separator'"),
        ({"type": "string", "name": "y"}, r"features.item.x has no field 'name'"),
        (
            {"type": "string", "embedding_size": "64"},
            r"features.item.x.embedding_size='64' must be of type int, not str",
        ),
        (
            {"type": "string", "embedding_size": 0},
            r"features.item.x.embedding_size=0 must be at least 1",
        ),
        ({"type": "string", "min_count": 0}, r"features.item.x.min_count=0 must be at least 1"),
        ({"type": "string", "oov_rows": 0}, r"features.item.x.oov_rows=0 must be at least 1"),
        (
            {"type": "string", "oov_rate": 1.0},
            r"features.item.x.oov_rate=1.0 must be at least 0 and below 1",
        ),
        ({"type": "string", "oov_rate": float("nan")}, r"features.item.x.oov_rate=nan must be"),
        ({"type": "strings", "max_length": 0}, r"features.item.x.max_length=0 must be at least 1"),
        ({"type": "int", "buckets": 1}, r"features.item.x.buckets=1 must be at least 2"),
        (
            {"type": "int", "boundaries": [2, 1]},
            r"x.boundaries=\(2.0, 1.0\) must be finite and strictly increasing",
        ),
        (
            {"type": "int", "boundaries": [float("inf")]},
            r"features.item.x.boundaries=\(inf,\) must be finite and",
        ),
        (
            {"type": "int", "boundaries": [1], "normalize": True},
            r"x.boundaries=\(1.0,\) must be empty when normalize",
        ),
        (
            {"type": "int", "embedding_size": -1},
            r"features.item.x.embedding_size=-1 must be at least 1",
        ),
        ({"type": "float", "table": "t"}, r"features.item.x.table='t' must be left out"),
        ({"type": "text", "buckets": 1}, r"features.item.x.buckets=1 must be at least 2"),
        (
            {"type": "text", "words": [], "characters": []},
            r"features.item.x.words=\(\) must be one or more lengths",
        ),
        (
            {"type": "text", "characters": [3, 3]},
            r"features.item.x.characters=\(3, 3\) must be distinct lengths",
        ),
        (
            {"type": "text", "words": [0]},
            r"features.item.x.words=\(0,\) must be distinct lengths from 1 to 8",
        ),
        (
            VECTORS | {"path": "v.csv"},
            r"features.item.x.path='v.csv' must be a .npy or .parquet file",
        ),
        (
            VECTORS | {"path": "v.npy"},
            r"features.item.x.ids='' must be the file with the id of each row",
        ),
        (
            VECTORS | {"ids": "ids.txt"},
            r"features.item.x.ids='ids.txt' must be empty for a .parquet file",
        ),
        (
            VECTORS | {"missing": "zero"},
            r"features.item.x.missing='zero' is not known; did you mean 'zeros'\?",
        ),
        (VECTORS | {"projection": -1}, r"features.item.x.projection=-1 must be at least 0"),
        (
            {"type": "sentence", "model": " "},
            r"features.item.x.model=' ' must be a folder or the name of a model",
        ),
        ({"type": "sentence", "cache": ""}, r"features.item.x.cache='' must be a folder"),
        (
            {"type": "sentence", "embedding_size": -1},
            r"features.item.x.embedding_size=-1 must be at least 0",
        ),
        ({"type": "sentence", "table": "t"}, r"features.item.x.table='t' must be left out"),
        (
            {"type": "timestamp", "parts": ["hours"]},
            r"features.item.x.parts='hours' is not known; did you mean 'hour'\?",
        ),
        (
            {"type": "timestamp", "parts": ["age", "age"]},
            r"x.parts=\('age', 'age'\) must be one or more different",
        ),
        ({"type": "timestamp", "unit": "min"}, r"features.item.x.unit='min' is not known"),
        (
            {"type": "timestamp", "age_buckets": 0},
            r"features.item.x.age_buckets=0 must be at least 1",
        ),
    ],
    ids=str,
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        item(**fields)


@pytest.mark.parametrize(
    "mappings, message",
    [
        ({"users": {}}, r"features has no field 'users'; did you mean 'user'\?"),
        (
            {"user": {}, "user_embedding_layers": {}},
            r"features has both 'user_embedding_layers' and another key for the",
        ),
        ({"user": ["user_id"]}, r"features.user=\['user_id'\] must be a mapping"),
        (
            {"user": {"user_id": "string"}},
            r"features.user.user_id='string' must be a mapping with a type",
        ),
    ],
    ids=str,
)
def test_nonsense_round_the_features_is_refused(mappings, message):
    with pytest.raises(ConfigError, match=message):
        from_mappings(mappings)


def test_a_list_instead_of_mappings_is_refused(tmp_path):
    (tmp_path / "f.json").write_text("[1]")
    with pytest.raises(
        ConfigError, match=r"features=\[1\] must be a mapping with the keys user and item"
    ):
        load_spec(FeaturesConfig(path=str(tmp_path / "f.json")))


def test_a_file_with_an_unknown_type_is_named_with_the_feature(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{"user_embedding_layers": {"city": {"type": "strng", "embedding_size": 8}}}')
    message = (
        f"{path}: features.user.city.type='strng' is not known; did you mean 'string'? "
        "Known: float, history, int, "
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_spec(FeaturesConfig(path=str(path)))


@pytest.mark.parametrize("content", [None, "{broken"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "f.json"
    if content:
        path.write_text(content)
    with pytest.raises(
        ConfigError, match=re.escape(f"config.features.path={str(path)!r} is not a JSON file")
    ):
        load_spec(FeaturesConfig(path=str(path)))


def test_a_file_and_mappings_together_are_refused():
    with pytest.raises(ConfigError, match="both set"):
        load_spec(FeaturesConfig(path="f.json", user={"user_id": {"type": "string"}}))


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"type": "string", "embedding_size": 16},
            r"b.embedding_size=16 must be 32, as in .*item.a, which shares table='t'",
        ),
        ({"type": "strings", "min_count": 2}, r"item.b.min_count=2 must be 1"),
        ({"type": "string", "oov_rows": 2}, r"item.b.oov_rows=2 must be 8"),
        ({"type": "text"}, r"features.item.a and features.item.b cannot share table='t'"),
        (
            {"type": "int", "embedding_size": 32},
            r"features.item.a and features.item.b cannot share table='t'",
        ),
    ],
    ids=str,
)
def test_features_that_share_a_table_agree_on_it(other, message):
    with pytest.raises(ConfigError, match=message):
        from_mappings(
            {"item": {"a": {"type": "string", "table": "t"}, "b": other | {"table": "t"}}}
        )


def test_text_features_share_a_table_of_one_size():
    shared = {
        "a": {"type": "text", "table": "t"},
        "b": {"type": "text", "table": "t", "words": [2]},
    }
    assert isinstance(from_mappings({"item": shared}), FeatureSpec)
    with pytest.raises(ConfigError, match=r"item.b.buckets=9 must be 65536"):
        from_mappings({"item": shared | {"b": {"type": "text", "table": "t", "buckets": 9}}})


def test_a_feature_may_share_the_own_table_of_another():
    spec = from_mappings({"user": {"latest": {"type": "strings", "table": "item.item_id"}}})
    assert (
        isinstance(spec.user["latest"], StringsFeature)
        and spec.user["latest"].table == spec.item["item_id"].table
    )


def test_sides_are_checked():
    with pytest.raises(ConfigError, match="side='users' is not known; did you mean 'user'"):
        from_mappings({}).side("users")
    with pytest.raises(ConfigError, match="side='shop' must be user or item"):
        StringFeature(side="shop", name="x")
