"""The log of changes beside a bundle: a change is acknowledged when it is on the disk, and made
again when the bundle is loaded.

```
header:  b"2TOWERCH", the sha256 of the bundle's manifest (32 bytes)
record:  length, crc32 of the payload, crc32 of these eight bytes (uint32 little-endian each),
payload
payload: b"U" + an Arrow stream of item_id, display columns and "__vector", or b"D" + a JSON list of
ids ```
A process that is killed while it writes leaves the beginning of a record at the end of the file: it
was never acknowledged, and is cut off. Anything else that does not fit is damage, and refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.errors import ChangesError

MAGIC = b"2TOWERCH"
HEAD = struct.Struct("<III")
FIRST = len(MAGIC) + 32
VECTOR = "__vector"
LARGEST = 2**30  # bytes of a record


# (items, vectors) to add or replace, or ids to take away
Change = tuple[pa.Table, np.ndarray] | list[str]


def changes_path(bundle: Path, sha256: str) -> Path:
    """The log of the bundle in the folder `bundle` whose manifest says `sha256`."""
    return bundle.parent / f"{bundle.name}.{sha256[:16]}.changes"


def encode_upsert(items: pa.Table, vectors: np.ndarray) -> bytes:
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    table = items.append_column(VECTOR, pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return b"U" + sink.getvalue().to_pybytes()


def encode_delete(ids: Sequence[str]) -> bytes:
    return b"D" + json.dumps(list(ids)).encode()


def decode(payload: bytes) -> Change:
    if payload[:1] == b"D":
        return json.loads(payload[1:])
    table = pa.ipc.open_stream(payload[1:]).read_all()
    column = table[VECTOR].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    return table.drop_columns([VECTOR]), vectors


def read_changes(path: Path, sha256: str) -> tuple[list[bytes], int]:
    """The payloads in the log and the length of the file up to the end of the last whole record.

    Raises:
        ChangesError: the log belongs to another bundle, or is damaged.
    """
    data = path.read_bytes()
    if len(data) < FIRST:  # killed before the first change
        if not (MAGIC + bytes.fromhex(sha256)).startswith(data):
            raise ChangesError(f"{path} is not a log of changes.")
        return [], 0
    if data[: len(MAGIC)] != MAGIC:
        raise ChangesError(f"{path} is not a log of changes.")
    if data[len(MAGIC) : FIRST] != bytes.fromhex(sha256):
        raise ChangesError(f"{path} holds changes to another bundle than the one beside it.")
    payloads, at = [], FIRST
    for payload, end in _records(data, path):
        payloads.append(payload)
        at = end
    return payloads, at


def _records(data: bytes, path: Path) -> Iterator[tuple[bytes, int]]:
    at = FIRST
    while at + HEAD.size <= len(data):
        length, crc, head_crc = HEAD.unpack_from(data, at)
        end = at + HEAD.size + length
        if zlib.crc32(data[at : at + 8]) != head_crc or length > LARGEST:
            raise ChangesError(
                f"{path} is damaged at byte {at}: this is no head of a record. {_REMEDY}"
            )
        if end > len(data):
            break
        payload = data[at + HEAD.size : end]
        if zlib.crc32(payload) != crc:
            raise ChangesError(
                f"{path} is damaged between bytes {at} and {end}: its content is not what was written. {_REMEDY}"
            )
        yield payload, end
        at = end
    if at < len(data):
        logging.warning(
            "%s ends in the middle of a change that was never acknowledged: it is left out.", path
        )


_REMEDY = "Restore the file, or move it away to serve the bundle without its changes."


class ChangeLog:
    """Appends to a log, of which there is one writer in one process.

    Args:
        path: see `changes_path`; made with the first change.
        sha256: of the bundle's manifest.
        end: where the last whole record ends.
    """

    def __init__(self, path: Path, sha256: str, end: int = 0):
        self.path, self._sha256, self.end = path, sha256, end
        self._file: Any = None
        self._broken = ""

    def append(self, payload: bytes) -> None:
        """Returns when the change is on the disk.

        Raises:
            ChangesError: another process writes, or an earlier failure left it unknown what is on
                the disk.
            OSError: the disk refuses; the change is not made, now or after a restart.
        """
        if len(payload) > LARGEST:
            raise ChangesError(
                f"One change may hold {LARGEST:,} bytes, not {len(payload):,}: make several of it."
            )
        if self._broken:
            raise ChangesError(
                f"{self.path} cannot be written any more ({self._broken}). Load the bundle again."
            )
        self._open()
        head = struct.pack("<II", len(payload), zlib.crc32(payload))
        record = head + struct.pack("<I", zlib.crc32(head)) + payload
        try:
            write_all(self._file, record)
        except OSError as error:
            self._cut(str(error))
            raise
        try:
            os.fsync(self._file.fileno())
        except (
            OSError
        ) as error:  # what is on the disk is not known, and asking again would not tell
            self._broken = str(error)
            raise
        self.end += len(record)

    def tail(self, start: int) -> bytes:
        """The records from byte `start` on."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(max(start, FIRST))
            return file.read(self.end - max(start, FIRST)) if self.end > max(start, FIRST) else b""

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        if self._file:
            return
        file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ChangesError(
                f"{self.path} is being written by another process: one process changes a bundle."
            ) from None
        size = file.seek(0, os.SEEK_END)
        if size < self.end or _has_more(file, self.end, size):
            file.close()
            raise ChangesError(
                f"{self.path} was written by another process since it was read. Load the bundle again."
            )
        self._file = file
        if not self.end:
            write_header(file, self._sha256)
            self.end = FIRST
            sync_folder(self.path.parent)
        file.truncate(self.end)
        file.seek(self.end)

    def _cut(self, why: str) -> None:
        """Takes half a record off the end again, so that the next one can be read."""
        try:
            self._file.truncate(self.end)
            self._file.seek(self.end)
        except OSError:
            self._broken = why


def _has_more(file: Any, end: int, size: int) -> bool:
    """Whether something whole follows byte `end`, where this process saw the last record end."""
    if not end:
        return size >= FIRST
    file.seek(end)
    head = file.read(HEAD.size)
    return len(head) == HEAD.size and end + HEAD.size + HEAD.unpack(head)[0] <= size


def write_all(file: Any, data: bytes) -> None:
    """An unbuffered file may take less than it is given."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def write_header(file: Any, sha256: str) -> None:
    file.truncate(0)
    file.seek(0)
    write_all(file, MAGIC + bytes.fromhex(sha256))
    os.fsync(file.fileno())


def write_log(path: Path, sha256: str, records: bytes) -> None:
    """A new log with records of another one, durable and under its name all at once."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(MAGIC + bytes.fromhex(sha256) + records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
