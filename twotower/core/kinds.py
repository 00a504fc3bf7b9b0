"""Registries: visible mappings from the names in a configuration to what they stand for.

A user's module may add to them. A kind of one's own can have options: a frozen dataclass, which is
made from a mapping in the configuration and checked like every other section.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from twotower.core.errors import ConfigError, choose
from twotower.core.fields import build
from twotower.core.files import atomic, read_json

T = TypeVar("T")

RECORD = "plugins.json"  # file of a run or a bundle: its plugins, and the kinds that they had

# All registries of this process, so that it can be said what a module has registered.
REGISTRIES: list[Kinds[Any]] = []
# Names of the plugins that are being imported, the innermost last.
_importing: list[str] = []


class Kinds(UserDict[str, T]):
    """The kinds of one part of the library by name.

    Args:
        noun: What the kinds are, in messages: "loss", say.
        kinds: Kinds of the library. One may be given by its address, "package.module:Name": the
            module is imported when the kind is first asked for, so that a bundle loads only what
            it uses.
        options: Frozen dataclasses of the options of those that have some, by name.
        synonyms: Other words for kinds -> the name here, for the message on an unknown name.

    Attributes:
        origins: Names of the kinds that were added -> the module that added each.
        lost: Names of kinds that a run was trained with and that are not here -> the module that
            added each then.

    >>> losses = Kinds("loss", {"softmax": max}, synonyms={"infonce": "softmax"})
    >>> losses.register("least", min)
    >>> losses.choose("least", "config.objective.loss") is min
    True
    >>> losses.choose("infonce", "config.objective.loss")
    Traceback (most recent call last):
    twotower.core.errors.ConfigError: config.objective.loss='infonce' is not known; did you mean \
'softmax'? Known: least, softmax.
    """

    def __init__(
        self,
        noun: str,
        kinds: Mapping[str, T | str],
        *,
        options: Mapping[str, type] | None = None,
        synonyms: Mapping[str, str] | None = None,
    ):
        super().__init__()
        # Past `__setitem__`, which is for the kinds of others.
        self.data: dict[str, Any] = dict(kinds)
        self.noun = noun
        self.synonyms = dict(synonyms or {})
        self.origins: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self._shipped = frozenset(kinds)
        self._options = dict(options or {})
        REGISTRIES.append(self)

    def register(self, name: str, kind: T, *, options: type | None = None) -> None:
        """Adds a kind.

        Args:
            name: Name of the kind in the configuration.
            kind: The kind itself.
            options: Frozen dataclass of its options.

        Raises:
            ConfigError: The name is taken by the library or by another module, or the options are
                no frozen dataclass.
        """
        origin = _origin_of(kind)
        known = self.origins.get(name, origin)
        if name in self._shipped:
            raise ConfigError(
                f"The {self.noun} {name!r} is one of the library's own: register yours under "
                "another name."
            )
        # The same module may register a name again: a cell of a notebook is run many times, and an
        # experiment file that is its own plugin is executed as both.
        if known != origin and _file_of(self[name]) != _file_of(kind):
            raise ConfigError(
                f"The {self.noun} {name!r} of {origin} is registered by {known} already: choose "
                "another name."
            )
        if options is not None and not _is_frozen_dataclass(options):
            raise ConfigError(
                f"The options of the {self.noun} {name!r} must be a frozen dataclass, not "
                f"{options!r}: decorate the class with @dataclasses.dataclass(frozen=True)."
            )
        self[name] = kind
        if options is not None:
            self._options[name] = options

    def __getitem__(self, name: str) -> T:
        kind = self.data[name]
        if isinstance(kind, str):
            module, _, attribute = kind.partition(":")
            kind = getattr(importlib.import_module(module), attribute)
            self.data[name] = kind
        return kind

    def name_of(self, kind: T) -> str:
        """Returns the name of a kind, without importing the others."""
        address = f"{_module_of(kind)}:{getattr(kind, '__qualname__', '')}"
        known = self.data.items()
        return next(name for name, other in known if other is kind or other == address)

    def __setitem__(self, name: str, kind: T) -> None:
        # Plain assignment works too, for a kind without options.
        super().__setitem__(name, kind)
        self._options.pop(name, None)
        self.origins[name] = _origin_of(kind)
        self.lost.pop(name, None)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.origins.pop(name, None)
        self._options.pop(name, None)

    def choose(self, name: str, field: str) -> T:
        """Returns the kind of a name.

        Raises:
            ConfigError: There is none; the message names the field, the value and the nearest kind.
        """
        self.check_lost(name, field)
        return choose(self, name, field, synonyms=self.synonyms)

    def check_lost(self, name: str, field: str) -> None:
        """Refuses a kind that a run was trained with, and whose module is not imported now."""
        if name in self.lost and name not in self:
            raise ConfigError(
                f"{field}={name!r} is not known here: the {self.noun} {name!r} was registered by "
                f"{self.lost[name]!r} when this was trained. Import that module first, and name it "
                "in config.plugins of the next training, so that every command imports it."
            )

    def build_options(self, name: str, values: Any, location: str) -> Any:
        """Returns the options of a kind, an instance of the dataclass that it was registered with.

        Args:
            name: Name of the kind.
            values: Mapping of the options in the configuration.
            location: Name of that mapping in messages, such as "config.objective.options".

        Returns:
            None for a kind without options.

        Raises:
            ConfigError: An option is unknown, missing, of a wrong type or out of range.
        """
        cls = self._options.get(name)
        if cls is not None:
            try:
                return build(cls, values, location)
            except ConfigError:
                raise
            except ValueError as error:
                # The user's own check, which need not know the field.
                raise ConfigError(f"{location}: {error}") from error
        if values:
            raise ConfigError(
                f"{location}={dict(values)!r}: the {self.noun} {name!r} has no options of its "
                f"own. Leave {location} empty."
            )
        return None


@contextlib.contextmanager
def importing(plugin: str) -> Iterator[None]:
    """Attributes the kinds that are registered inside the block to a plugin."""
    _importing.append(plugin)
    try:
        yield
    finally:
        _importing.pop()


def note_origins(record: Mapping[str, Any]) -> None:
    """Remembers which module had each kind of a record, for messages on those that are missing."""
    for group in REGISTRIES:
        for name, origin in record["kinds"].get(group.noun, {}).items():
            if name not in group:
                group.lost[name] = origin


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes a record into the folder of a run or a bundle; nothing where it is empty."""
    # Not a file more in runs that have no parts of their own.
    if not any(record.values()):
        return
    with atomic(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of a folder: "plugins" and "kinds", empty where there is none.

    Raises:
        FolderError: It is damaged.
    """
    record: dict[str, Any] = {"plugins": {}, "kinds": {}}
    path = folder / RECORD
    if path.exists():
        record |= read_json(path)
    return record


def _origin_of(kind: Any) -> str:
    """Returns the plugin that is being imported, or the module that defines a kind."""
    if _importing:
        return _importing[-1]
    return _module_of(kind)


def _file_of(kind: Any) -> str | None:
    """Returns the file of the module that defines a kind; None of a notebook."""
    return getattr(sys.modules.get(_module_of(kind)), "__file__", None)


def _module_of(kind: Any) -> str:
    # A tuple such as `Loss` has its function first; its own class is the library's.
    if isinstance(kind, tuple):
        kind = kind[0]
    return getattr(kind, "__module__", None) or "a module without a name"


def _is_frozen_dataclass(cls: Any) -> bool:
    # Compared and hashed by value, so that equal options compile one program.
    return isinstance(cls, type) and dataclasses.is_dataclass(cls) and bool(_params(cls).frozen)


def _params(cls: Any) -> Any:
    return cls.__dataclass_params__
