"""Kinds of one's own stand beside the library's, and their options are checked like its own."""

import dataclasses
import sys

import pytest

from twotower.core import kinds as module
from twotower.core.errors import ConfigError
from twotower.core.kinds import Kinds, importing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    gamma: float
    power: int = 2


def first(x):
    return x


def second(x):
    return x


@pytest.fixture(autouse=True)
def no_others(monkeypatch):
    """Registries of this test alone: a bundle writes down the kinds of every one there is."""
    monkeypatch.setattr(module, "REGISTRIES", [])


@pytest.fixture
def kinds():
    return Kinds("loss", {"softmax": max, "bpr": min}, synonyms={"info_nce": "softmax"})


def test_a_registered_kind_is_chosen_like_the_others(kinds):
    kinds.register("first", first, options=Options)
    assert kinds.choose("first", "loss") is first
    assert kinds.build_options("first", {"gamma": 1}, "x") == Options(gamma=1.0)
    assert kinds.build_options("softmax", {}, "x") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gama": 1.0}, "x.options has no field 'gama'; did you mean 'gamma'"),
        ({"gamma": "a"}, "x.options.gamma='a' must be of type float, not str"),
        ({"power": 1}, "x.options has no gamma, which Options needs"),
        (3, "x.options=3 must be a mapping"),
    ],
)
def test_wrong_options_are_refused(kinds, values, message):
    kinds.register("first", first, options=Options)
    with pytest.raises(ConfigError, match=message):
        kinds.build_options("first", values, "x.options")


def test_options_of_a_kind_without_any_are_refused(kinds):
    with pytest.raises(ConfigError, match="x.options={'a': 1}: the loss 'bpr' has no options"):
        kinds.build_options("bpr", {"a": 1}, "x.options")


def test_a_kind_given_by_its_address_is_imported_when_it_is_asked_for(kinds, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kind_of_late.py").write_text("def late(x):\n    return x\n")
    kinds = Kinds("loss", {"late": "kind_of_late:late", "softmax": max})
    with pytest.raises(ConfigError, match="Known: late, softmax"):
        kinds.choose("lat", "loss")
    assert "late" in kinds and "kind_of_late" not in sys.modules
    late = kinds.choose("late", "loss")
    assert late is sys.modules["kind_of_late"].late
    assert kinds.get("late") is kinds["late"] is late and late in kinds.values()
    assert kinds.origins == {}


@pytest.mark.parametrize("word", ["InfoNCE", "info-nce", "infonce"])
def test_another_word_for_a_kind_names_it(kinds, word):
    with pytest.raises(ConfigError, match=f"loss='{word}' is not known; did you mean 'softmax'"):
        kinds.choose(word, "loss")


def test_names_are_not_taken_twice(kinds):
    with pytest.raises(ConfigError, match="'bpr' is one of the library's own"):
        kinds.register("bpr", first)
    with importing("mine.losses"):
        kinds.register("first", first)
    # A notebook's cell may run again; another module may not take the name.
    with importing("mine.losses"):
        kinds.register("first", second)
    assert kinds["first"] is second
    with pytest.raises(ConfigError, match="'first' of .* is registered by mine.losses already"):
        kinds.register("first", dataclasses.replace)


def test_the_module_of_a_kind_is_known(kinds):
    kinds["first"] = first
    with importing("mine"):
        kinds.register("second", second)
    assert kinds.origins == {"first": first.__module__, "second": "mine"}
    del kinds["second"]
    assert "second" not in kinds.origins


def test_options_must_be_a_frozen_dataclass(kinds):
    thawed = dataclasses.make_dataclass("Thawed", ["x"])
    with pytest.raises(ConfigError, match="must be a frozen dataclass"):
        kinds.register("first", first, options=thawed)
