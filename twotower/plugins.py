"""Plugins: modules of the user's that register kinds of losses, towers, features and the like.

`config.plugins` names them, as modules ("mine.losses") or as files ("parts.py"). They are imported
before training, and by whatever opens a run afterwards, always from the user's own path: the
working folder, the Python path, or the file that was imported when the run was trained. A plugin
that lies inside the folder of the run is refused: to open a run of somebody else never executes
code that came with it. A bundle holds no code, and loading one imports nothing.

A run keeps a record beside its configuration, plugins.json: each plugin with its file and its
SHA-256, and the kinds that were registered, each with the plugin that had it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from absl import logging

from twotower.config import Config, from_dict
from twotower.core.errors import ConfigError, FolderError
from twotower.core.files import content_digest, digest, read_json
from twotower.core.install import command
from twotower.core.kinds import REGISTRIES, importing, note_origins, read_record


class Plugin(NamedTuple):
    """A plugin that was imported.

    Attributes:
        file: File of the module, or of the package's `__init__`.
        sha256: Hash of the file, or of all Python files of the package.
    """

    file: Path
    sha256: str


# The plugins of this process by their names in configurations.
_imported: dict[str, Plugin] = {}


def import_plugins(names: Sequence[str], folder: Path) -> None:
    """Imports the plugins of a run, and says what has changed since it was trained.

    Args:
        names: Option `config.plugins`.
        folder: Folder of the run; it may be new.

    Raises:
        ConfigError: A plugin is not found, or lies inside the folder of the run.
    """
    record = read_record(folder)
    for name in names:
        known = record["plugins"].get(name, {})
        _import_plugin(name, folder, known.get("file", ""), _kinds_of(name, record))
        # Figures may change with the code: the user should know, and decides.
        if known and known.get("sha256") != _imported[name].sha256:
            logging.warning(
                "config.plugins: %r (%s) has changed since %s was trained with it.",
                name,
                _imported[name].file,
                folder,
            )
    note_origins(record)


def config_path(workdir: Path) -> Path:
    """Returns the file that holds the configuration of a run."""
    return workdir / "config.json"


def run_of(folder: Path) -> Path | None:
    """Returns the folder of the run that a folder is, or is a checkpoint of; None of others."""
    is_checkpoint = folder.parent.name == "checkpoints" and folder.name.isdigit()
    workdir = folder.parent.parent if is_checkpoint else folder
    # A bundle has a config.json too, but no checkpoints.
    is_run = config_path(workdir).exists() and (workdir / "checkpoints").exists()
    return workdir if is_run else None


def load_config(workdir: Path | str) -> Config:
    """Returns the configuration of a run, after its plugins were imported.

    Raises:
        ConfigError: The folder is no run, its configuration is damaged, or a plugin is missing.
    """
    path = config_path(Path(workdir))
    if not path.exists():
        line = command("train", "--config=quickstart", f"--workdir={workdir}")
        raise ConfigError(
            f"--workdir={workdir} is no run: it has no config.json. Train one first: {line}"
        )
    config = from_dict(read_config(path))
    # Before anything looks for a kind that they register.
    import_plugins(config.plugins, path.parent)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of a configuration's file, which is a mapping of sections."""
    try:
        return read_json(path)
    except FolderError as error:
        raise ConfigError(f"{error} Restore it, or delete the folder and train again.") from None


def make_record(names: Sequence[str], *, files: bool = True) -> dict[str, Any]:
    """Returns the plugins of a run, and all kinds that are not the library's.

    Args:
        names: Option `config.plugins`.
        files: Whether to name the files of the plugins, which are those of this machine.
    """
    plugins: dict[str, dict[str, str]] = {}
    for name in names:
        plugin = _imported[name]  # whoever trains or opens a run has imported its plugins
        plugins[name] = {"sha256": plugin.sha256}
        if files:
            plugins[name]["file"] = str(plugin.file)
    kinds = {}
    for group in REGISTRIES:
        if group.origins:
            kinds[group.noun] = dict(group.origins)
    return {"plugins": plugins, "kinds": kinds}


def warn_of_kinds_outside_plugins(values: Any, names: Sequence[str]) -> None:
    """Says which kinds of a configuration no other process will know.

    Args:
        values: The configuration, as nested mappings.
        names: Option `config.plugins`.
    """
    used = set(_texts(values))
    for group in REGISTRIES:
        for name, origin in group.origins.items():
            if name in used and not any(_is_of(origin, plugin) for plugin in names):
                logging.warning(
                    "The %s %r is registered by %s, which config.plugins does not name: another "
                    "process, such as an export, will not know it. Name its module or its file in "
                    "config.plugins.",
                    group.noun,
                    name,
                    origin,
                )


def _import_plugin(name: str, folder: Path, saved_file: str, kinds: str) -> None:
    """Imports a plugin, unless this process has done so and the file is still the same.

    Args:
        name: Name of a module, or path of a file.
        folder: Folder in which no plugin may lie.
        saved_file: File that the run was trained with, if it is known.
        kinds: Kinds that the plugin had registered, for the message if it is missing.
    """
    if name.endswith(".py"):
        path = _find_file(name, saved_file, kinds)
        _refuse_inside(path, folder, name)
        plugin = Plugin(path, digest(path))
        if _imported.get(name) != plugin:
            with importing(name):
                _execute(path)
            _imported[name] = plugin
        return
    # Checked level by level: to look for "a.b" imports "a".
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        _import_module(".".join(parts[:end]), folder, name, kinds)
    file = sys.modules[name].__file__
    if file is None:
        raise ConfigError(
            f"config.plugins: {name!r} is a folder without an __init__.py: name a module in it."
        )
    # The hash of the code that this process runs, even if the file has changed since.
    if name not in _imported:
        _imported[name] = Plugin(Path(file), _package_digest(Path(file)))


def _import_module(module: str, folder: Path, name: str, kinds: str) -> None:
    """Imports a module from the user's path.

    Args:
        module: Name of the module: that of the plugin, or a package that holds it.
        folder: Folder in which it may not lie.
        name: Name of the plugin.
        kinds: As for `_import_plugin`.
    """
    # A console command, unlike `python -m`, does not look in the working folder. Where that is the
    # run itself, no import of anything may find code in it.
    working_folder = Path.cwd()
    is_known = "" in sys.path or str(working_folder) in sys.path
    if not is_known and not working_folder.resolve().is_relative_to(folder.resolve()):
        sys.path.append(str(working_folder))
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ConfigError(
            f"config.plugins: there is no module {module!r}{_needed_for(name, kinds)} Run the "
            "command in the folder that holds it, or put that folder on PYTHONPATH."
        )
    paths = [*(spec.submodule_search_locations or ())]
    if spec.has_location and spec.origin:
        paths.append(spec.origin)
    for path in paths:
        _refuse_inside(Path(path), folder, name)
    with importing(name):
        importlib.import_module(module)


def _find_file(name: str, saved_file: str, kinds: str) -> Path:
    """Returns the file of a plugin that is named by its path."""
    candidates = [Path(name).expanduser()]
    # The same file as in training, wherever the command runs now.
    if saved_file:
        candidates.insert(0, Path(saved_file))
    for path in candidates:
        if path.is_file():
            return path.resolve()
    # The same one twice, where the command runs in the folder of the training.
    looked_for = ", ".join(dict.fromkeys(str(path.absolute()) for path in candidates))
    raise ConfigError(
        f"config.plugins: there is no file {name!r}{_needed_for(name, kinds)} Looked for: "
        f"{looked_for}. Put it back, or run the command in the folder from which {name!r} leads to "
        "it."
    )


def _needed_for(name: str, kinds: str) -> str:
    """Returns the end of a sentence about a missing plugin."""
    if not kinds:
        return "."
    return f", and the run needs it: {name!r} had registered {kinds}."


def _refuse_inside(path: Path, folder: Path, name: str) -> None:
    """Refuses code that lies in the folder of a run."""
    # Resolved, so that a link out of the folder or into it counts as what it leads to.
    if path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"config.plugins: {name!r} lies inside the run, at {path}. Code that came with a run "
            "is never imported. If it is yours, move it out of the folder, to one on your Python "
            "path."
        )


def _execute(path: Path) -> ModuleType:
    """Returns the module of a file, executed anew."""
    # The folder is part of the name: two experiments may each have a file parts.py.
    folder = content_digest({"folder": str(path.parent)})
    module_name = f"plugin_{path.stem}_{folder[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses in the file look themselves up by the name of their module.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # Half a module must not be taken for a whole one.
        del sys.modules[module_name]
        raise
    return module


def _package_digest(file: Path) -> str:
    """Returns the hash of a module's file, or of all Python files of a package."""
    if file.name != "__init__.py":
        return digest(file)
    paths = sorted(file.parent.rglob("*.py"))
    digests = {str(path.relative_to(file.parent)): digest(path) for path in paths}
    return content_digest(digests)


def _kinds_of(name: str, record: Mapping[str, Any]) -> str:
    """Returns the kinds that a plugin had registered, as words: "the loss 'focal'"."""
    words = []
    for noun, origins in record["kinds"].items():
        for kind, origin in origins.items():
            if _is_of(origin, name):
                words.append(f"the {noun} {kind!r}")
    return ", ".join(words)


def _is_of(origin: str, plugin: str) -> bool:
    """Returns whether a module is a plugin, or lies in a plugin that is a package."""
    # A module that the user imported before has its own name as the origin of its kinds.
    return origin == plugin or origin.startswith(f"{plugin}.")


def _texts(values: Any) -> Iterator[str]:
    """Yields all texts in nested mappings and sequences."""
    if isinstance(values, str):
        yield values
        return
    members: Iterable[Any] = ()
    if isinstance(values, Mapping):
        members = values.values()
    elif isinstance(values, (list, tuple)):
        members = values
    for member in members:
        yield from _texts(member)
