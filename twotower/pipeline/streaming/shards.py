"""Files of records, in the ArrayRecord format, any of which is read by its number.

```
shards.json             layout and number of the records, and the size of every file
00000.array_record ...  one record an example, as many a file as make about a gigabyte
```

The manifest is written last. A write that was killed goes on with the files that are missing.
"""

from __future__ import annotations

import functools
import importlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twotower.core.errors import FolderError, echo
from twotower.core.files import atomic, read_json
from twotower.core.install import extra
from twotower.core.progress import progress
from twotower.pipeline.streaming.layout import Records

MANIFEST = "shards.json"
# Of a format or a layout that differs, the records are written again.
VERSION = 1
# Bytes of a chunk, which is what is read of a file at least, and the records that it holds at most.
# A chunk for each record of some dozen bytes took four times the room, 50 bytes of memory a record
# and, read in any order, twice the time. Compressed they are hardly smaller.
_CHUNK_BYTES = 2048
_CHUNK_RECORDS = 16
# Nothing beyond what is asked for, since records are read in shuffled order.
_READER = "readahead_buffer_size:0"
# Bytes that are read at once. The default of a mebibyte is meant for reading in order.
_READ_BYTES = 4096
_FILE_BYTES = 2**30
# Records that are encoded together.
_BLOCK = 2**13

_CURE = "Delete the folder: the records are then written again."


def write(
    records: Records,
    folder: Path,
    *,
    part: int = 0,
    parts: int = 1,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Writes the files of a folder that are missing, or every so many of them.

    Args:
        records: Examples of a pass.
        folder: Folder that is named by all that decides the records.
        part: Number of this process among those that write together.
        parts: Number of these processes. The first one calls `finish` when all have written.
        file_bytes: Size of a file, about.
    """
    for number, (start, stop) in enumerate(_files(records, file_bytes)):
        path = folder / _file_name(number)
        if number % parts != part or path.exists():
            continue
        # A file is there whole or not at all: whoever goes on writes those that are missing.
        with atomic(path) as temporary:
            _write_file(records, temporary, start, stop)
    if parts == 1:
        finish(records, folder, file_bytes=file_bytes)


def finish(records: Records, folder: Path, *, file_bytes: int = _FILE_BYTES) -> None:
    """Writes the manifest of a folder whose files have all been written."""
    files = []
    for number, (start, stop) in enumerate(_files(records, file_bytes)):
        path = folder / _file_name(number)
        entry = {"file": path.name, "records": stop - start, "bytes": path.stat().st_size}
        files.append(entry)
    content = {
        "version": VERSION,
        "layout": records.layout.describe(),
        "records": len(records),
        "files": files,
    }
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Returns whether a folder holds all shards of an example set."""
    return (folder / MANIFEST).is_file()


class Shards:
    """The records of a folder, read by their numbers, from any thread.

    Args:
        folder: Folder that `write` wrote to.
        records: Examples that are to be read.

    Attributes:
        num_bytes: Size of all files.
        num_files: Number of files.
        records_read: Number of records read so far.
        bytes_read: Their bytes.

    Raises:
        FolderError: A file is missing or cut, or the records have another layout.
    """

    def __init__(self, folder: Path, records: Records) -> None:
        self._folder = folder
        manifest = read_json(folder / MANIFEST)
        expected = (VERSION, records.layout.describe(), len(records))
        found = tuple(manifest.get(name) for name in ("version", "layout", "records"))
        if found != expected:
            raise FolderError(f"{folder} holds other records than this run reads. {_CURE}")
        self._files = _read_files(folder, manifest, len(records))
        # Sizes alone, as of prepared data: hashes would read all of it before the first step.
        for entry in self._files:
            _check_size(folder / entry["file"], entry["bytes"])
        counts = [entry["records"] for entry in self._files]
        # The first record of each file.
        self._starts = np.cumsum([0, *counts])[:-1]
        self.num_bytes = sum(entry["bytes"] for entry in self._files)
        self.num_files = len(self._files)
        self.records_read = 0
        self.bytes_read = 0
        # Threads count together, and adding to a number is more than one operation.
        self._lock = threading.Lock()
        # Opened when they are first read from: a run may have thousands of files.
        self._reader = functools.cache(self._open)

    def read(self, numbers: np.ndarray) -> list[bytes]:
        """Returns some records, in the order of their numbers int [B].

        Raises:
            FolderError: A record is damaged.
        """
        files = np.searchsorted(self._starts, numbers, side="right") - 1
        order = np.argsort(files, kind="stable")
        positions = numbers - self._starts[files]
        read: list[bytes] = []
        for file in np.unique(files):
            # One call for all: it takes 2 microseconds a record.
            read += self._read_file(int(file), positions[files == file].tolist())
        if self.num_files > 1:
            by_file = read.copy()
            for position, record in zip(order.tolist(), by_file):
                read[position] = record
        with self._lock:
            self.records_read += len(read)
            self.bytes_read += sum(map(len, read))
        return read

    def _read_file(self, file: int, positions: list[int]) -> list[bytes]:
        try:
            return self._reader(file).read(positions)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            path = self._folder / self._files[file]["file"]
            raise FolderError(f"{path} is damaged ({reason}). {_CURE}") from error

    def _open(self, file: int) -> Any:
        path = self._folder / self._files[file]["file"]
        return _array_record().ArrayRecordReader(
            str(path), options=_READER, file_reader_buffer_size=_READ_BYTES
        )


def _write_file(records: Records, path: Path, start: int, stop: int) -> None:
    in_chunk = min(max(1, _CHUNK_BYTES // _mean_bytes(records)), _CHUNK_RECORDS)
    options = f"group_size:{in_chunk},uncompressed"
    writer = _array_record().ArrayRecordWriter(str(path), options)
    blocks = range(start, stop, _BLOCK)
    try:
        for first in progress(blocks, total=len(blocks), what="Writing records"):
            encoded = records.encode(first, min(first + _BLOCK, stop))
            content = encoded.content.tobytes()
            begin = 0
            for end in encoded.ends.tolist():
                writer.write(content[begin:end])
                begin = end
    finally:
        writer.close()


def _read_files(folder: Path, manifest: Mapping[str, Any], records: int) -> list[dict[str, Any]]:
    """Returns the entries of the files in a manifest.

    Args:
        folder: Folder of the manifest.
        manifest: Its content.
        records: Number of records of all files together.

    Raises:
        FolderError: An entry is none; the message names its field.
    """
    files = manifest.get("files")
    path = folder / MANIFEST
    if not isinstance(files, list):
        raise FolderError(f"{path}: files={echo(files)} is no list of files. {_CURE}")
    total = 0
    for number, entry in enumerate(files):
        for field, kind in (("file", str), ("records", int), ("bytes", int)):
            value = entry.get(field) if isinstance(entry, dict) else None
            # A name alone: a path would lead out of the folder. A bool is an int in Python.
            is_right = type(value) is kind
            if not is_right or (kind is str and value != _file_name(number)):
                name = f"files[{number}].{field}"
                raise FolderError(f"{path}: {name}={echo(value)} is not what was written. {_CURE}")
        total += entry["records"]
    if total != records:
        raise FolderError(f"{path}: files have {total:,} records, not {records:,}. {_CURE}")
    return files


def _files(records: Records, file_bytes: int) -> list[tuple[int, int]]:
    """Returns the first record of each file and one after its last one."""
    count = len(records)
    size = max(1, file_bytes // _mean_bytes(records))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _mean_bytes(records: Records) -> int:
    """Returns the size of a record, at least 1, by the first ones: all processes find the same."""
    ends = records.encode(0, min(_BLOCK, len(records))).ends
    return max(1, int(ends[-1]) // len(ends))


def _file_name(number: int) -> str:
    return f"{number:05}.array_record"


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise FolderError(f"{path} is missing. {_CURE}")
    if path.stat().st_size != size:
        raise FolderError(
            f"{path} is cut: it has {path.stat().st_size:,} bytes, not {size:,}. {_CURE}"
        )


def _array_record() -> Any:
    with extra("stream", "config.training.input='stream'"):
        # By name, since the compiled module has no stubs.
        return importlib.import_module("array_record.python.array_record_module")
