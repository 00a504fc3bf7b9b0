"""Plugins come from the user's own path, never from a run, and a run knows which it needs."""

import dataclasses
import itertools
import json
import logging
import os
import sys

import pytest

from twotower import plugins
from twotower.config import Config
from twotower.core import kinds
from twotower.core.errors import ConfigError
from twotower.core.kinds import Kinds, write_record
from twotower.training.run import holds_run

SOURCE = """
from twotower.core import kinds

for registry in kinds.REGISTRIES:
    if registry.noun == "toy":
        registry.register("{name}", print)
"""


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A registry of this test alone, and a process without plugins."""
    monkeypatch.setattr(kinds, "REGISTRIES", [])
    registry = Kinds("toy", {"ball": len})
    monkeypatch.setattr(plugins, "REGISTRIES", kinds.REGISTRIES)
    monkeypatch.setattr(plugins, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield registry
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a user."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


SECONDS = itertools.count(1_700_000_000)


def write(path, name="doll"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SOURCE.format(name=name))
    # Python takes a module of the same second and length for the one that it has compiled.
    second = next(SECONDS)
    os.utime(path, (second, second))


def save(run, names):
    run.mkdir(exist_ok=True)
    plugins.import_plugins(names, run)
    write_record(run, plugins.make_record(names))


def test_a_file_and_a_module_of_the_working_folder_are_imported(folder, toys):
    write(folder / "parts.py")
    write(folder / "mine_of_a_test" / "toys.py", "kite")
    plugins.import_plugins(("parts.py", "mine_of_a_test.toys"), folder / "run")
    assert toys.origins == {"doll": "parts.py", "kite": "mine_of_a_test.toys"}


@pytest.mark.parametrize("name", ["run/evil.py", "run.evil", "run/../run/evil.py", "link.py"])
def test_code_in_the_folder_of_a_run_is_refused_and_never_executed(name, folder, toys):
    run = folder / "run"
    write(run / "evil.py")
    (folder / "link.py").symlink_to(run / "evil.py")
    with pytest.raises(ConfigError, match="lies inside the run"):
        plugins.import_plugins((name,), run)
    assert not toys.origins


def test_a_package_in_a_run_is_not_executed_either(folder, toys):
    write(folder / "run" / "__init__.py")
    write(folder / "run" / "evil.py")
    with pytest.raises(ConfigError, match="lies inside the run"):
        plugins.import_plugins(("run.evil",), folder / "run")
    assert not toys.origins


def test_a_run_in_the_working_folder_is_no_way_around(folder, toys, monkeypatch):
    run = folder / "run"
    write(run / "evil_of_a_test.py")
    monkeypatch.chdir(run)
    path = list(sys.path)
    with pytest.raises(ConfigError, match="no module 'evil_of_a_test'"):
        plugins.import_plugins(("evil_of_a_test",), run)
    assert sys.path == path
    # As `python -m` has it.
    sys.path.insert(0, "")
    with pytest.raises(ConfigError, match="lies inside the run"):
        plugins.import_plugins(("evil_of_a_test",), run)
    assert not toys.origins


def test_a_file_is_found_where_it_was_from_any_folder(folder, toys, tmp_path, monkeypatch):
    write(folder / "parts.py")
    save(folder / "run", ("parts.py",))
    plugins._imported.clear()
    del toys["doll"]
    monkeypatch.chdir(tmp_path)
    plugins.import_plugins(("parts.py",), folder / "run")
    assert "doll" in toys


@pytest.mark.parametrize(
    ("file", "name"), [("parts.py", "parts.py"), ("gone_of_a_test.py", "gone_of_a_test")]
)
def test_a_missing_plugin_is_told_with_what_it_had_registered(file, name, folder, toys):
    write(folder / file)
    save(folder / "run", (name,))
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=f"'{name}' had registered the toy 'doll'"):
        sys.modules.pop("gone_of_a_test", None)
        plugins.import_plugins((name,), folder / "run")


def test_a_kind_that_its_module_no_longer_has_is_told_with_the_module(folder, toys):
    write(folder / "parts.py")
    save(folder / "run", ("parts.py",))
    del toys["doll"]
    write(folder / "parts.py", "kite")
    plugins.import_plugins(("parts.py",), folder / "run")
    with pytest.raises(ConfigError, match="toy='doll' .* was registered by 'parts.py'"):
        toys.choose("doll", "toy")


def test_a_change_is_said(folder, toys, caplog):
    write(folder / "parts.py")
    save(folder / "run", ("parts.py",))
    with caplog.at_level(logging.WARNING):
        plugins.import_plugins(("parts.py",), folder / "run")
        assert not caplog.records
        write(folder / "parts.py", "kite")
        plugins.import_plugins(("parts.py",), folder / "run")
    assert "'parts.py'" in caplog.text and "has changed since" in caplog.text


def test_an_experiment_that_is_its_own_plugin_registers_twice(folder, toys):
    write(folder / "mine.py")
    plugins._execute(folder / "mine.py")
    plugins.import_plugins(("mine.py",), folder / "run")
    assert "doll" in toys


def test_a_kind_that_no_plugin_has_is_said(toys, caplog):
    toys["doll"] = test_a_change_is_said
    with caplog.at_level(logging.WARNING):
        plugins.warn_of_kinds_outside_plugins({"toy": "ball"}, ())
        assert not caplog.records
        plugins.warn_of_kinds_outside_plugins({"section": {"toys": ["doll"]}}, ())
    assert "The toy 'doll' is registered by" in caplog.text


def test_a_run_without_own_parts_has_no_record(folder):
    save(folder / "run", ())
    assert list((folder / "run").iterdir()) == []


def test_a_run_goes_on_where_its_version_lacked_an_option_and_not_with_other_plugins(tmp_path):
    config = Config()
    old = json.loads(config.to_json())
    del old["plugins"], old["objective"]["options"], old["model"]["user"]["options"]
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert holds_run(tmp_path, config)
    with pytest.raises(ConfigError, match=r"config.plugins was \[\] and is now \['parts.py'\]"):
        holds_run(tmp_path, dataclasses.replace(config, plugins=("parts.py",)))


def test_plugins_are_part_of_the_identity_only_where_there_are_some():
    assert Config().identity() == {}
    assert Config(plugins=("parts.py",)).identity() == {"plugins": ("parts.py",)}
