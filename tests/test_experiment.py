"""Experiments by name from any folder, with options replaced, or refused with the nearest name."""

import json
from pathlib import Path

import pytest

from twotower.config import from_dict
from twotower.core import install
from twotower.core.errors import ConfigError
from twotower.experiment import load_config, read, shipped_names
from twotower.features.spec import load_spec

ROOT = Path(__file__).parents[1]
MINE = """
import dataclasses

from twotower.experiment import read


@dataclasses.dataclass
class Mine:  # dataclasses look their module up
    steps: int = 7


def get_config(steps=Mine().steps):
    config = read("quickstart", {"training.steps": int(steps), "training.validate_every": 1})
    config.features.path = "mine.json"
    return config
"""


@pytest.fixture
def mine(tmp_path):
    """An experiment file with its features beside it."""
    path = tmp_path / "files" / "mine.py"
    path.parent.mkdir()
    path.write_text(MINE)
    features = {"item": {"item_id": {"type": "string", "embedding_size": 4}}}
    (path.parent / "mine.json").write_text(json.dumps(features))
    return path


def test_a_shipped_name_and_its_path_are_the_same(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_config("quickstart") == load_config("experiments/configs/quickstart.py")
    assert load_config("recipes/losses:bpr").objective.loss == "bpr"


def test_every_shipped_file_has_a_name():
    files = (ROOT / "experiments" / "configs").rglob("*.py")
    assert len(shipped_names()) == sum(path.stem != "__init__" for path in files)


@pytest.mark.parametrize(
    "overrides",
    [
        {"training": {"steps": 500, "schedule": {"kind": "plateau"}}},
        {"training.steps": 500, "training.schedule.kind": "plateau"},
        {"training": {"steps": 500, "schedule.kind": "plateau"}},
    ],
)
def test_options_are_replaced_one_by_one(overrides):
    expected = read("quickstart")
    expected.training.steps = 500
    expected.training.schedule.kind = "plateau"
    assert load_config("quickstart", **overrides) == from_dict(expected)


def test_a_mapping_of_the_user_is_replaced_whole():
    features = {"item_id": {"type": "string"}}
    config = load_config("recipes/shop", **{"features.item": features})
    assert config.features.item == features
    assert config.features.user == load_config("recipes/shop").features.user


def test_an_entry_that_is_named_leaves_the_others():
    """One feature changed must not drop the rest of them."""
    whole = load_config("movielens_100k")
    changes = {"features.user.age": {"type": "int", "buckets": 4}}
    changes["features.user.gender.embedding_size"] = 3
    features = load_config("movielens_100k", **changes).features.user
    expected = dict(whole.features.user)
    expected["age"] = {"type": "int", "buckets": 4}
    expected["gender"] = {"type": "string", "embedding_size": 3}
    assert {name: dict(feature) for name, feature in features.items()} == expected
    with pytest.raises(ConfigError, match=r"config.features.user.age.type='int' has no entries"):
        load_config("movielens_100k", **{"features.user.age.type.kind": 1})


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("quikstart", {}, "did you mean 'quickstart'? Shipped: "),
        ("experiments/configs/loses.py", {}, "did you mean 'recipes/losses'?"),
        ("quickstart", {"training.step": 1}, "config.training has no option 'step'; did you mean"),
        ("quickstart", {"trainig": {"steps": 1}}, "config has no option 'trainig'; did you mean"),
        ("quickstart", {"training.steps": "many"}, "config.training.steps='many' must be of type"),
    ],
)
def test_what_is_not_known_gets_the_nearest(name, overrides, message):
    with pytest.raises(ConfigError) as refused:
        load_config(name, **overrides)
    assert message in str(refused.value)


def test_a_file_of_ones_own_finds_its_features_from_any_folder(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(mine)
    # As a command started in this folder would name it, so that a run has no path of one machine.
    assert config.features.path == "files/mine.json" and config.training.steps == 7
    assert list(load_spec(config.features).item) == ["item_id"]
    monkeypatch.chdir(ROOT)
    config = load_config(f"{mine}:9")
    assert load_spec(config.features).item["item_id"] and config.training.steps == 9


def test_a_file_without_get_config_is_named(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("steps = 1\n")
    with pytest.raises(ConfigError, match="empty.py has no function get_config"):
        load_config(path)


def test_commands_are_named_as_they_are_given_here(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert install.command("train", "--workdir=x") == "python -m experiments.train --workdir=x"
    assert install.install_line("plots") == "pip install -e '.[plots]'"
    monkeypatch.chdir(tmp_path)
    assert install.command("train", "--workdir=x") == "twotower train --workdir=x"
    assert install.install_line("plots") == f"pip install -e '{ROOT}[plots]'"
    monkeypatch.setattr(install, "checkout", lambda: None)
    assert install.install_line("plots") == "pip install 'twotower[plots]'"
