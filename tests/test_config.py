"""The configuration: whole at the door, or refused with the field, the value and what would be
right."""

import dataclasses
import json

import ml_collections
import pytest

from twotower.config import Config, SplitConfig, TowerConfig, defaults, from_dict
from twotower.core.errors import ConfigError

CHANGED = {
    "data": {
        "source": "csv",
        "where": [["rating", ">=", 4], ["event", "in", ["buy"]]],
        "interactions": {
            "path": "a.csv",
            "columns": {"user_id": "CustomerID"},
            "names": ["a", "b"],
        },
    },
    "features": {"user": {"user_id": {"type": "string", "embedding_size": 64}}},
    "model": {"user": {"layers": [128, 64]}, "temperature": 0.1},
    "training": {"optimizer": {"learning_rate": 0.01}, "tables": {"kind": "sgd"}, "steps": 7},
    "evaluation": {"ks": [5]},
}


def nested(field: str, value) -> dict:
    for name in reversed(field.split(".")):
        value = {name: value}
    return value


def message_of(values) -> str:
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    return str(error.value)


def test_what_is_not_given_keeps_its_one_default():
    assert from_dict({}) == Config() == from_dict(defaults())
    config = from_dict(CHANGED)
    assert config.model.user == TowerConfig(layers=(128, 64)) and config.model.item == TowerConfig()
    assert config.data.interactions.names == ("a", "b") and config.data.interactions.columns == {
        "user_id": "CustomerID"
    }
    assert config.data.where == (("rating", ">=", 4), ("event", "in", ["buy"]))
    assert config.training.steps == 7 and config.training.batch_size == Config().training.batch_size


@pytest.mark.parametrize(
    "wrap",
    [dict, ml_collections.ConfigDict, ml_collections.FrozenConfigDict],
    ids=lambda w: w.__name__,
)
def test_a_mapping_of_any_kind_gives_the_same_configuration(wrap):
    values = {
        **CHANGED,
        "data": {**CHANGED["data"], "where": ()},
    }  # a frozen ConfigDict turns inner lists to tuples
    assert from_dict(wrap(values)) == from_dict(values)


def test_json_and_back_is_the_same_configuration():
    for config in (Config(), from_dict(CHANGED)):
        again = from_dict(json.loads(config.to_json()))
        assert again == config and again.to_json() == config.to_json()


def test_a_configuration_can_be_changed_field_by_field_from_its_defaults():
    values = defaults()
    values.training.steps = 3
    values.split.kind = "random"
    assert from_dict(values) == dataclasses.replace(
        Config(),
        training=dataclasses.replace(Config().training, steps=3),
        split=SplitConfig(kind="random"),
    )


@pytest.mark.parametrize(
    "field, nearest",
    [
        ("trainning", "training"),
        ("training.batchsize", "batch_size"),
        ("split.accept_leak", "accept_leakage"),
        ("training.optimizer.learning_rat", "learning_rate"),
        ("data.interactions.delimeter", "delimiter"),
        ("model.user.layer", "layers"),
    ],
)
def test_an_unknown_field_is_refused_with_its_place_and_the_nearest_one(field, nearest):
    message = message_of(nested(field, 1))
    parent, _, name = f"config.{field}".rpartition(".")
    assert message.startswith(f"{parent} has no field {name!r}; did you mean {nearest!r}? Known: ")


def test_an_unknown_field_like_no_other_lists_those_there_are():
    message = message_of({"split": {"zzzz": 1}})
    assert "did you mean" not in message and all(
        field.name in message for field in dataclasses.fields(SplitConfig)
    )


@pytest.mark.parametrize(
    "field, value, kind",
    [
        ("training.steps", "100", "int"),
        ("training.steps", 1.5, "int"),
        ("training.steps", True, "int"),
        ("training.steps", None, "int"),
        ("model.temperature", "0.1", "float"),
        ("model.temperature", False, "float"),
        ("model.normalize", 1, "bool"),
        ("data.source", 3, "str"),
        ("split", "time", "mapping"),
        ("model.user", 64, "mapping"),
        ("evaluation.ks", 10, "tuple"),
        ("data.interactions.columns", ["user_id"], "Mapping"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_both_types(field, value, kind):
    message = message_of(nested(field, value))
    assert message.startswith(f"config.{field}={value!r} must be") and kind in message


def test_a_wrong_element_of_a_sequence_is_named_by_its_place():
    assert message_of({"model": {"item": {"layers": [64, "32"]}}}).startswith(
        "config.model.item.layers[1]='32'"
    )


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    clip = from_dict({"training": {"optimizer": {"clip_norm": 1}}}).training.optimizer.clip_norm
    assert clip == 1.0 and isinstance(clip, float)


@pytest.mark.parametrize(
    "field, value",
    [
        ("split.validation", -0.1),
        ("split.test", 1.0),
        ("model.user.dropout", 1.5),
        ("model.item.dropout", -1.0),
        ("model.temperature", 0.0),
        ("model.temperature", 2.0),
        ("retrieval.target_recall", 1.01),
        ("training.schedule.factor", -0.5),
        ("data.num_interactions", 10),
        ("training.batch_size", 0),
        ("training.steps", 0),
        ("training.log_every", 0),
        ("training.validate_every", 0),
        ("training.keep_checkpoints", 0),
        ("training.seed", -1),
        ("training.patience", -1),
        ("training.schedule.warmup_steps", -1),
        ("training.optimizer.learning_rate", -1.0),
        ("training.optimizer.clip_norm", -1.0),
        ("training.tables.learning_rate", -0.1),
        ("data.k_core", -1),
        ("data.duplicates", "frist"),
        ("evaluation.query", "users"),
        ("data.interactions.timestamp_unit", "sec"),
        ("evaluation.ks", ()),
        ("evaluation.ks", (10, 0)),
        ("retrieval.index", "scan"),
        ("retrieval.k", 0),
        ("retrieval.hnsw_m", 1),
        ("retrieval.hnsw_ef_construction", 0),
        ("data.interactions.delimiter", ""),
        ("data.item_table.encoding", "utf-9"),
        ("model.temperature", float("nan")),
        ("training.optimizer.learning_rate", float("nan")),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_field_and_the_value(field, value):
    message = message_of(nested(field, value))
    assert f"config.{field}={value!r}" in message and ("must be" in message or "Known:" in message)


def test_the_edges_of_a_range_are_allowed():
    values = {
        "split": {"validation": 0.0, "test": 0.0},
        "model": {"temperature": 0.01},
        "training": {"patience": 0, "steps": 1},
    }
    assert from_dict(values).model.temperature == 0.01


def test_a_range_holds_for_a_configuration_that_is_made_in_code_too():
    with pytest.raises(ConfigError, match=r"^config\.split\.test=2\.0 must be between"):
        SplitConfig(test=2.0)
    with pytest.raises(
        ConfigError, match=r"^config\.data\.duplicates='frist' is not known; did you"
    ):
        dataclasses.replace(Config().data, duplicates="frist")


def test_a_section_that_lies_in_several_places_is_named_by_its_place_or_its_class():
    assert message_of(nested("model.item.layers", [8, 0])).startswith("config.model.item.layers=")
    with pytest.raises(ConfigError, match=r"^TowerConfig\.layers=\(8, 0\) must be widths"):
        TowerConfig(layers=(8, 0))


def test_rules_across_sections_hold_for_a_configuration_that_is_made_in_code_too():
    queue = dataclasses.replace(Config().objective.negatives, queue=1000)
    objective = dataclasses.replace(Config().objective, negatives=queue)
    with pytest.raises(ConfigError, match="queue=1000 must be a multiple of"):
        Config(objective=objective)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"model": {"history": {"kind": "bag"}}},
            "model.history.kind='bag' must be 'causal' or 'gru' with",
        ),
        ({"objective": {"negatives": {"queue": 1024}}}, "negatives.queue=1024 must be 0 with"),
        (
            {
                "objective": {"loss": "binary_cross_entropy", "label": "liked"},
                "training": {"accumulate": 2},
            },
            "training.accumulate=2 must be 1 with",
        ),
        ({"model": {"item": {"batch_norm": True}}}, "item.batch_norm=True must be False with"),
    ],
)
def test_options_that_packed_sequences_cannot_be_trained_with_are_refused(values, message):
    training = values.get("training", {}) | {"examples": "sequences"}
    assert message in message_of(values | {"training": training})


def test_a_crop_needs_sequences():
    assert "crop='random' must be 'last' with" in message_of({"training": {"crop": "random"}})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": 500}, "config.training.steps=500 must be left out (or 1000, the default) with"),
        ({"steps_for": 9}, "config.training.steps_for=9 must be 0 with config.training.passes=3"),
        ({"passes": -1}, "config.training.passes=-1.0 must be between"),
    ],
)
def test_passes_are_refused_beside_a_number_of_steps(training, message):
    assert message in message_of({"training": {"passes": 3} | training})


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_table_of_held_out_rows_needs_a_split_that_keeps_them_apart(name):
    tables = {"data": {name: {"path": "held.csv"}}}
    message = f"config.data.{name}='held.csv' must be empty with config.split.kind='time'"
    assert message_of(tables).startswith(message)
    assert from_dict(tables | {"split": {"kind": "fixed"}}).split.kind == "fixed"


def test_a_mapping_of_sections_is_built():
    config = from_dict({"objective": {"heads": {"click": {"label": "clicked", "weight": 2}}}})
    assert config.objective.heads["click"].weight == 2.0
    with pytest.raises(
        ConfigError,
        match=r"config.objective.heads.click has no field 'wait'; did you mean 'weight'",
    ):
        from_dict({"objective": {"heads": {"click": {"wait": 2}}}})
