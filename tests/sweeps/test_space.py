"""The space of a sweep: what it may name, and how a mistake in it is refused."""

import json

import pytest

from twotower.config import Config
from twotower.core.errors import ConfigError
from twotower.sweeps.space import Choices, Range, describe_edges, read_space, with_options

RATE = "training.tables.learning_rate"


def test_a_file_of_json_or_python_and_a_mapping_are_read_alike(tmp_path):
    source = {
        RATE: {"low": 1e-3, "high": 0.1, "log": True},
        "training.steps": {"low": 10, "high": 90, "step": 20},
        # Of an option that takes any number whole ends are not a range of whole numbers.
        "training.optimizer.clip_norm": {"low": 1, "high": 2},
        "training.batch_size": [32, 64],
        "model.user": [{"layers": [8]}, {"dropout": 0.5}],
    }
    (tmp_path / "a.json").write_text(json.dumps(source))
    (tmp_path / "a.py").write_text(f"SPACE = {source!r}")
    space = read_space(source, Config())
    for name in ("a.json", "a.py"):
        assert read_space(tmp_path / name, Config()) == space
    # As flags are written.
    assert read_space({f"config.{name}": of for name, of in source.items()}, Config()) == space
    assert space[RATE] == Range(1e-3, 0.1, log=True)
    assert space["training.steps"] == Range(10, 90, step=20, whole=True)
    assert space["training.optimizer.clip_norm"] == Range(1, 2)
    assert space["training.batch_size"] == Choices({32: 32, 64: 64})
    user = space["model.user"]
    assert isinstance(user, Choices)
    labels = user.values
    assert list(labels) == ['{"layers": [8]}', '{"dropout": 0.5}']
    config = with_options(Config(), {"model.user": labels['{"layers": [8]}'], RATE: 0.02})
    assert (config.model.user.layers, config.training.tables.learning_rate) == ((8,), 0.02)
    assert config.model.user.dropout == Config().model.user.dropout


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "names no option"),
        ({"training.batch_sise": [1]}, "no option 'batch_sise'; did you mean 'batch_size'"),
        ({"training.batch_size": [32, "many"]}, "training.batch_size.*'many'"),
        ({"training.batch_size": [-1]}, "training.batch_size.*-1"),
        ({"training.batch_size": []}, "has no choice"),
        ({"training.batch_size": 64}, "must be a list of choices, or a range"),
        ({RATE: {"low": 1e-3, "hihg": 0.1}}, "no 'hihg'; did you mean 'high'"),
        ({RATE: {"low": 1e-3}}, "high=None must be a number"),
        ({RATE: {"low": 1.0, "high": 0.1}}, "low=1.0 must be below high=0.1"),
        ({RATE: {"low": 0, "high": 0.1, "log": True}}, "low=0 must be above 0"),
        ({RATE: {"low": 1e-3, "high": 0.1, "log": "yes"}}, "log='yes'"),
        ({RATE: {"low": 1, "high": 2, "log": True, "step": 1}}, "step=1.*without log"),
        ({"training.seed": [0, 1]}, "training.seed cannot be swept: --seeds"),
        ({"split.test": [0.1, 0.2]}, "split.test cannot be swept"),
        ({"model.user": [{}], "model.user.dropout": [0.1]}, "an option of model.user"),
    ],
)
def test_a_mistake_is_refused_with_its_cure(source, message):
    with pytest.raises(ConfigError, match=message):
        read_space(source, Config())


def test_a_file_that_is_none_is_refused_by_its_name(tmp_path):
    for name, text, message in (
        ("gone.json", None, "no such file"),
        ("bad.json", "{", "no JSON"),
        ("list.json", "[1]", "the file must be a mapping"),
        ("bare.py", "OTHER = 1", "SPACE must be a mapping"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=f"{name}.*{message}"):
            read_space(tmp_path / name, Config())


def test_a_best_value_at_an_end_of_its_range_is_said():
    space = {"a": Range(1e-4, 1e-1, log=True), "b": Range(0, 100), "c": Choices({1: 1})}
    assert describe_edges(space, {"a": 1e-2, "b": 50, "c": 1}) == []
    low, high = describe_edges(space, {"a": 1.05e-4, "b": 99, "c": 1})
    # The share of a logarithmic range is that of its logarithms.
    assert "a=0.000105 lies at the lower end" in low and "b=99 lies at the upper end" in high
