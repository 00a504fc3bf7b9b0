"""Experiments by name or path: Python files with a function `get_config()`.

A file of one's own is named by its path, a shipped one by its name, from any folder:

    load_config("quickstart")
    load_config("recipes/losses:bpr", training={"steps": 500})
    load_config("experiments/mine.py", **{"training.batch_size": 4096})
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from twotower.config import Config, from_dict, non_defaults
from twotower.core.errors import ConfigError, did_you_mean
from twotower.core.fields import field_types
from twotower.core.install import shipped_folder


def load_config(experiment: str | Path, **overrides: Any) -> Config:
    """Returns the configuration of an experiment.

    Args:
        experiment: Name of a shipped experiment, or path of a file with `get_config()`. What
            follows a colon is handed to that function: "recipes/losses:bpr".
        **overrides: Options to replace, as mappings of a section's options
            (`training={"steps": 500}`) or by dotted names (`**{"training.steps": 500}`).

    Raises:
        ConfigError: There is no such experiment or option (the nearest is named), or a value cannot
            be used.

    >>> config = tt.load_config("quickstart", training={"steps": 500})
    >>> config.training.steps
    500
    """
    return from_dict(read(experiment, overrides))


def read(experiment: str | Path, changes: Mapping[str, Any] | None = None) -> Any:
    """Returns an experiment as the `ConfigDict` of its `get_config()`, with some options replaced.

    An experiment file may itself start from another one by this function.

    Args:
        experiment: Name or path, as in `load_config`.
        changes: Options to replace, as in `load_config`.

    Raises:
        ConfigError: There is no such experiment or option.
    """
    name, colon, argument = str(experiment).partition(":")
    path = find(name)
    module = _execute(path)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config(), which an experiment returns by.")
    # With a bare colon the argument is "", as config_flags hands it over.
    arguments = [argument] if colon else []
    config = module.get_config(*arguments)
    _find_features(config, path.parent)
    config.plugins = tuple(_find_beside(name, path.parent) for name in config.plugins)
    change(config, changes or {})
    return config


def find(name: str) -> Path:
    """Returns the file of an experiment.

    Args:
        name: Name of a shipped experiment, such as "quickstart" or "recipes/losses", or a path.

    Raises:
        ConfigError: There is none; the message names the nearest, and all that are shipped.
    """
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    if path.suffix == ".py" and path.is_file():
        return path
    names = shipped_names()
    # After files: a file of one's own goes before a shipped name.
    if name in names:
        return _configs() / f"{name}.py"
    # By its last part too: who writes "losses" or "configs/quikstart.py" means a shipped one.
    by_last_part = {known.rpartition("/")[2]: known for known in names}
    close = difflib.get_close_matches(path.stem, by_last_part, n=1, cutoff=0.5)
    hint = "."
    if close:
        hint = f"; did you mean {by_last_part[close[0]]!r}?"
    raise ConfigError(
        f"{name!r} is no file with get_config(), and no shipped experiment{hint} Shipped: "
        f"{', '.join(names)}."
    )


def shipped_names() -> list[str]:
    """Returns the names of the shipped experiments, those of recipes last."""
    folder = _configs()
    names = []
    for path in folder.rglob("*.py"):
        if path.stem != "__init__":
            names.append(path.relative_to(folder).with_suffix("").as_posix())
    return sorted(names, key=lambda name: ("/" in name, name))


def change(config: Any, changes: Mapping[str, Any]) -> None:
    """Replaces options of a `ConfigDict`.

    Args:
        config: Whole configuration, changed in place.
        changes: Options, as in `load_config`.

    Raises:
        ConfigError: An option is not known; the message names the nearest.
    """
    # Values are checked when the `Config` is made, with better messages than those of ConfigDict.
    with config.unlocked(), config.ignore_type():
        for name, value in changes.items():
            _change(config, Config, name, value, "config")


def _change(section: Any, cls: type, name: str, value: Any, location: str) -> None:
    name, _, rest = name.partition(".")
    hints = field_types(cls)
    check_option(name, cls, location)
    hint = hints[name]
    location = f"{location}.{name}"
    if dataclasses.is_dataclass(hint):
        if rest:
            value = {rest: value}
        # Options of a section are replaced one by one; a mapping of the user's own, whole.
        if isinstance(value, Mapping):
            for inner, inner_value in value.items():
                _change(section[name], typing.cast(type, hint), inner, inner_value, location)
            return
    elif rest:
        # But an entry that is named leaves the others: "features.user.city" is one feature.
        value = _with_entry(section[name], rest, value, location)
    section[name] = value


def _with_entry(values: Any, name: str, value: Any, location: str) -> dict[str, Any]:
    """Returns a copy of a mapping with one entry replaced or added.

    Args:
        values: Mapping of the user's own, such as the features of a side.
        name: Name of the entry, dotted where it lies in an inner mapping.
        value: New value.
        location: Name of the mapping in messages.
    """
    if not hasattr(values, "items"):
        raise ConfigError(f"{location}={values!r} has no entries, so none named {name!r}.")
    name, _, rest = name.partition(".")
    entries = dict(values.items())
    if rest:
        value = _with_entry(entries.get(name, {}), rest, value, f"{location}.{name}")
    entries[name] = value
    return entries


def check_option(name: str, cls: type, location: str) -> None:
    """Refuses the name of an option that a section does not have.

    Args:
        name: Name of the option.
        cls: Dataclass of the section.
        location: Name of the section in the message.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"{location} has no option {name!r}{hint}")


def changed_options(config: Config) -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and the values of the options that differ from their defaults."""
    changed = non_defaults(dataclasses.asdict(config), dataclasses.asdict(Config()))
    yield from _leaves(changed, Config, "")


def _leaves(values: Mapping[str, Any], cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = field_types(cls)
    for name, value in values.items():
        hint = hints[name]
        # Sections are walked into; a mapping of the user's own is one value.
        if dataclasses.is_dataclass(hint):
            yield from _leaves(value, typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _configs() -> Path:
    return shipped_folder() / "configs"


def _execute(path: Path) -> ModuleType:
    """Returns the module of a Python file, executed anew at each call."""
    name = f"experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # Dataclasses in the file look themselves up by the name of their module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _find_features(config: Any, folder: Path) -> None:
    """Looks for the feature file beside the experiment, where the working folder has none.

    Args:
        config: `ConfigDict`, whose path is replaced in place.
        folder: Folder of the experiment file.
    """
    if config.features.path:
        config.features.path = _find_beside(config.features.path, folder)


def _find_beside(path: str, folder: Path) -> str:
    """Returns the path of a file beside the experiment, where the working folder has none.

    Args:
        path: Path in the configuration; that of a file that is nowhere stays as it is.
        folder: Folder of the experiment file.
    """
    beside = (folder / path).resolve()
    if Path(path).is_absolute() or Path(path).exists() or not beside.is_file():
        return path
    # Relative where that is possible: the path is saved with the run, on every machine alike.
    cwd = Path.cwd()
    if beside.is_relative_to(cwd):
        beside = beside.relative_to(cwd)
    return str(beside)
