"""Stages of a preparation that are whole on the disk, from which the next try goes on after a kill.

Each has a file of its own beside the rows, `.preparing/STAGE.json`, which is written last and all
at once: it lists the files of the stage, with their sizes, and holds what the next stage needs to
know. What no stage lists is deleted when a folder is prepared again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from twotower import __version__
from twotower.config import Config, TableConfig
from twotower.core.errors import ConfigError
from twotower.core.files import atomic, content_digest, discard, read_json, sync_files
from twotower.core.remote.copies import list_tables
from twotower.core.remote.objects import is_remote
from twotower.data.sources import files as sources
from twotower.data.sources.content import Kind
from twotower.pipeline import folder as data_folder

# Folder inside the prepared one for what is on the disk meanwhile. It marks all files beside it as
# those of a preparation that has not ended.
SCRATCH = ".preparing"
# Stage -> words for what is whole then, in the order of the work.
STAGES = {
    "rows": "the log is read",
    "tables": "the tables are written",
    "encoder": "the encoder is fitted",
    "arrays": "the rows are encoded",
    "histories": "the histories are written",
}
_KEY = "key.json"
_TABLES = ("interactions", "user_table", "item_table", "validation", "test")


class Stages:
    """The stages of the preparation of one folder.

    Args:
        folder: Folder that is being prepared.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._scratch = folder / SCRATCH

    def find(self, stage: str) -> dict[str, Any] | None:
        """Returns what a stage has left for the next ones; None where it is not whole."""
        mark = self._scratch / f"{stage}.json"
        if not mark.is_file():
            return None
        content = read_json(mark)
        for name, size in content["files"].items():
            path = self._folder / name
            # One that was cut or deleted by hand since.
            if not path.is_file() or path.stat().st_size != size:
                return None
        return content["state"]

    def finish(self, stage: str, files: Iterable[Path], state: Mapping[str, Any]) -> None:
        """Marks a stage as whole.

        Args:
            stage: One of `STAGES`.
            files: Files of the stage, below the folder; of a folder, all that is in it.
            state: Values of JSON that the next stages need.
        """
        sizes = {}
        for path in files:
            # Before the mark: a power cut must not leave a mark without the bytes.
            sync_files(path)
            members = path.rglob("*") if path.is_dir() else [path]
            for member in members:
                if member.is_file():
                    name = str(member.relative_to(self._folder))
                    sizes[name] = member.stat().st_size
        with atomic(self._scratch / f"{stage}.json") as temporary:
            temporary.write_text(json.dumps({"files": sizes, "state": state}), encoding="utf-8")

    def drop(self, stage: str) -> None:
        """Deletes a stage that nothing needs any more, so that its disk is free."""
        files = self._files(stage)
        # The mark first: without it the files are nobody's.
        discard(self._scratch / f"{stage}.json")
        for path in files:
            if path.is_relative_to(self._scratch):
                discard(path)

    def last(self) -> str | None:
        """Returns the last stage that is whole; None where none is."""
        whole = [stage for stage in STAGES if self.find(stage) is not None]
        return whole[-1] if whole else None

    def begin(self, key: str) -> None:
        """Makes the folder ready for another try: what stages have left of the same key stays.

        Args:
            key: Hash of all that decides what is prepared.
        """
        kept = set()
        if self._read_key() == key:
            kept = set(self._all_files())
        self.clear(kept)
        self._scratch.mkdir(exist_ok=True)
        with atomic(self._scratch / _KEY) as temporary:
            temporary.write_text(json.dumps({"key": key}), encoding="utf-8")

    def end(self) -> None:
        """Deletes what belongs to no whole stage, after an error; all where none is whole."""
        self.clear(set(self._all_files()))

    def clear(self, kept: set[Path] | None = None) -> None:
        """Deletes all that preparations write, but for some files.

        Args:
            kept: Files to keep; by default none.
        """
        kept = kept or set()
        for path in self._folder.iterdir():
            if data_folder.is_own(path.name):
                _discard_but(path, kept)
        # The mark of them all last: killed here, the rest still counts as unfinished.
        _discard_but(self._scratch, kept)

    def _read_key(self) -> str | None:
        path = self._scratch / _KEY
        return read_json(path).get("key") if path.is_file() else None

    def _files(self, stage: str) -> list[Path]:
        mark = self._scratch / f"{stage}.json"
        if not mark.is_file():
            return []
        return [self._folder / name for name in read_json(mark)["files"]]

    def _all_files(self) -> Iterator[Path]:
        """Yields the files of whole stages and their marks; none where no stage is whole."""
        is_any = False
        for stage in STAGES:
            if self.find(stage) is not None:
                is_any = True
                yield self._scratch / f"{stage}.json"
                yield from self._files(stage)
        if is_any:
            yield self._scratch / _KEY


def _discard_but(path: Path, kept: set[Path]) -> None:
    """Deletes a file, or a folder but for some files in it."""
    if path.is_dir() and any(file.is_relative_to(path) for file in kept):
        for member in path.iterdir():
            _discard_but(member, kept)
    elif path not in kept:
        discard(path)


def key_of(config: Config, engine: str, max_bad_rows: int | None) -> str:
    """Returns the hash of all that decides what is prepared: the configuration, and sizes and times
    of the files that it names.

    No two are equal where rows do not come from files, which alone have a time.

    Args:
        config: Configuration of the run.
        engine: Kind of engine.
        max_bad_rows: Number of bad rows that may be left out.
    """
    content: dict[str, Any] = {
        "version": __version__,
        "engine": engine,
        "max_bad_rows": max_bad_rows,
        "made_from": data_folder.digest_of(config),
        # Of these the report, which is in the folder.
        "evaluation": dataclasses.asdict(config.evaluation),
        "display": list(config.retrieval.display),
    }
    if engine == "bigquery":
        # A file of this machine may have the name of the table.
        return secrets.token_hex(32)
    try:
        content["files"] = dict(_stamps_of(config))
    except (ConfigError, OSError):
        # What is wrong with them is told when they are read.
        content["files"] = secrets.token_hex(16)
    return content_digest(json.loads(json.dumps(content, default=str)))


def _stamps_of(config: Config) -> Iterator[tuple[str, list[int]]]:
    """Yields the files of the tables and of the features, each with its size and time."""
    data = config.data
    for name in _TABLES:
        table: TableConfig = getattr(data, name)
        if name == "interactions" and data.path:
            table = dataclasses.replace(table, path=data.path)
        # The log always: without files this is refused.
        if name == "interactions" or table.path or table.event_files:
            kind = "parquet" if data.source in ("parquet", "arrow", "pq") else "csv"
            for pattern in table.event_files.values() or [table.path]:
                yield from _stamps_of_pattern(pattern, name, kind)
    # Such as pretrained vectors, of any feature.
    for value in _texts(dataclasses.asdict(data), config.features):
        path = Path(os.path.expanduser(os.path.expandvars(value)))
        if value and path.is_file():
            yield str(path), _stamp(path)


def _stamps_of_pattern(pattern: str, name: str, kind: Kind) -> Iterator[tuple[str, list[int]]]:
    # Not copied for that: workers may be the only ones that read them.
    if is_remote(pattern):
        address, objects = list_tables(pattern, f"config.data.{name}.path")
        for each in objects:
            yield f"{address}/{each.name}", [each.size, each.modified]
        return
    for path in sources.find_files(pattern, name, kind):
        yield str(path), _stamp(path)


def _texts(*values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(*value.values())
        elif isinstance(value, (list, tuple)):
            yield from _texts(*value)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
