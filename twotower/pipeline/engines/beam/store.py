"""Files of Arrow tables and of JSON that the machines of a pipeline hand to each other."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.pipeline.engines.beam.library import apache_beam

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder that this machine and all workers see, by Beam's own file systems.

    Attributes:
        folder: Path or address of the folder.
    """

    folder: str

    def make(self) -> None:
        """Makes the folder.

        Raises:
            ConfigError: It cannot be made.
        """
        try:
            _file_systems().mkdirs(self.folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--beam_temp: {self.folder} cannot be made: {error}.") from error

    def discard(self) -> None:
        """Deletes the folder with all files."""
        _file_systems().delete([self.folder])

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes a table into a file, which has every type as it is."""
        with self._create(name) as file:
            file.write(to_bytes(table))

    def read_table(self, name: str) -> pa.Table:
        """Returns the table of a file."""
        return from_bytes(self._read(name))

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file of JSON."""
        with self._create(name) as file:
            file.write(json.dumps(content).encode())

    def read_json(self, name: str) -> Any:
        """Returns the content of a file of JSON.

        Raises:
            ConfigError: There is none: the workers do not see this folder.
        """
        path = _file_systems().join(self.folder, name)
        if not _file_systems().exists(path):
            raise ConfigError(
                f"--beam_temp: the workers have left no {path}: name a folder that they and this "
                "machine see, such as gs://BUCKET/tmp."
            )
        return json.loads(self._read(name))

    def _create(self, name: str) -> Any:
        path = _file_systems().join(self.folder, name)
        # By its suffix Beam would take a name for that of a compressed file.
        return _file_systems().create(path, compression_type=_uncompressed())

    def _read(self, name: str) -> bytes:
        path = _file_systems().join(self.folder, name)
        with _file_systems().open(path, compression_type=_uncompressed()) as file:
            return file.read()


def _file_systems() -> Any:
    return apache_beam().io.filesystems.FileSystems


def _uncompressed() -> str:
    return apache_beam().io.filesystem.CompressionTypes.UNCOMPRESSED


def to_bytes(table: pa.Table) -> bytes:
    """Returns a table as bytes, as workers send it to each other."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=_OPTIONS) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.Table:
    """Returns the table of bytes that `to_bytes` made."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
