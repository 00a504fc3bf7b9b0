"""Content of a file by its first bytes, whatever its name: text, JSON, Parquet, or what it is."""

from __future__ import annotations

import dataclasses
import gzip
import re
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import pyarrow as pa

from twotower.core.errors import ConfigError

Kind = Literal["csv", "json", "parquet"]

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "csv": (".csv", ".tsv", ".txt", ".dat", ".data", ".tab", ".psv"),
    "json": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
}
# Arrow decompresses by these.
COMPRESSED = (".gz", ".bz2", ".zst")
FIRST_BYTES = 1 << 16  # bytes in which header and delimiter are looked for
# Marks at the beginning of a text, the longest first, and the encodings that they stand for.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8"),
)
_EXCEL = (
    "save it as CSV (UTF-8) in the spreadsheet, or read it by pandas.read_excel and hand the frame "
    "to tt.fit"
)
# First bytes of files that are not read -> their name, and what to do.
_OTHERS = (
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet of Excel", _EXCEL),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV or Parquet"),
    (b"ARROW1", "an Arrow or Feather file", "write it as Parquet, or hand a frame to tt.fit"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"\x89HDF", "an HDF5 file", "write the table as Parquet"),
    (b"\x80\x04", "a pickle of Python", "write the frame by to_parquet"),
    (b"\x80\x05", "a pickle of Python", "write the frame by to_parquet"),
    (b"%PDF", "a PDF", "name the file with the data"),
    (b"<!DOCTYPE", "a web page", "download the data itself"),
    (b"<html", "a web page", "download the data itself"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
)


# Errors of damaged archives, and of kinds that Python does not know.
_UNPACKING = (OSError, EOFError, zlib.error, RuntimeError, NotImplementedError, ValueError)


@dataclasses.dataclass(frozen=True)
class Content:
    """A file, or the one file in an archive.

    Attributes:
        path: Path of the file, for messages too.
        kind: Kind of its content.
        data: Its bytes, where they were unpacked already; None to read them from the path.
    """

    path: Path
    kind: Kind
    data: bytes | None = None

    def head(self) -> bytes:
        """Returns the first bytes, uncompressed."""
        if self.data is not None:
            return self.data[:FIRST_BYTES]
        return _read(self.path, FIRST_BYTES)

    def whole(self) -> bytes:
        """Returns all bytes, uncompressed."""
        if self.data is not None:
            return self.data
        return _read(self.path)


def look(path: Path, name: str, default: Kind) -> Content:
    """Returns the content of a file, unpacked where Arrow does not do that by itself.

    Args:
        path: Path of the file.
        name: Name of the table in the configuration, for messages.
        default: Kind of a file of text whose name does not tell.

    Raises:
        ConfigError: It is empty, or of a kind that is not read; the message says which.
    """
    with open(path, "rb") as file:
        first = file.read(512)
    # Before Arrow sees it, which reports an empty file in different words by kind.
    if not first:
        raise ConfigError(
            f"{name}: {path} is empty (0 bytes); config.data.{name}.path must name a file with "
            "data."
        )
    # Before the name is looked at: files of Parquet lie in folders under any name.
    if first.startswith(b"PAR1"):
        return Content(path, "parquet")
    if first.startswith(b"PK\x03\x04"):
        return _unzip(path, name, default)
    # Arrow decompresses by the suffix, which this file has not.
    if first.startswith(b"\x1f\x8b") and path.suffix.lower() != ".gz":
        try:
            data = gzip.decompress(path.read_bytes())
        except _UNPACKING as error:
            raise ConfigError(f"{name}: {path} cannot be unpacked: {error}.") from error
        return Content(path, _kind_of(path.name, data, default), data)
    for mark, words, cure in _OTHERS:
        if first.startswith(mark):
            raise ConfigError(f"{name}: {path} is {words}, which is not read: {cure}.")
    kind = kind_of_name(path.name)
    # Of compressed texts too, to which the first bytes above do not belong.
    if kind != "parquet" and not (kind is None and default == "parquet"):
        kind = _kind_of(path.name, _read(path, FIRST_BYTES), default)
    return Content(path, kind or default)


def kind_of_name(name: str) -> Kind | None:
    """Returns the kind of a file by its suffix; None for one that says nothing."""
    bare = name.lower()
    # The kind is told by the suffix before: "log.csv.gz".
    for suffix in COMPRESSED:
        bare = bare.removesuffix(suffix)
    for kind, suffixes in SUFFIXES.items():
        if bare.endswith(suffixes):
            return kind
    return None


def marked_encoding(head: bytes) -> str:
    """Returns the encoding that the first bytes of a text are the mark of; empty for none."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    return ""


def bad_line(content: Content, encoding: str) -> str:
    """Returns the first line that is not of an encoding, for a message; empty if all are."""
    data = content.whole()
    try:
        # All of it, since the first bad byte may be in the last line.
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        shown = data[max(error.start - 20, 0) : error.end + 20]
        return f"line {line} is not {encoding}: {shown!r}"
    return ""


def _read(path: Path, size: int | None = None) -> bytes:
    """Returns the bytes of a file, uncompressed.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        # Arrow's own stream: it knows the compressions that its readers know.
        with pa.input_stream(str(path), compression="detect") as stream:
            return stream.read(size)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _kind_of(name: str, head: bytes, default: Kind) -> Kind:
    encoding = marked_encoding(head) or "utf-8"
    # Bytes in other encodings do not matter here: JSON is told by its first characters of ASCII.
    text = head.decode(encoding, errors="replace").lstrip("\ufeff \r\n\t")
    # No header of a file of fields begins so.
    if re.match(r'\{\s*"|\[\s*[{\]]', text):
        return "json"
    kind = kind_of_name(name)
    if kind == "parquet" or kind is None:
        return default
    return kind


def _unzip(path: Path, name: str, default: Kind) -> Content:
    """Returns the only file of a zip.

    Raises:
        ConfigError: It is a spreadsheet, or has several files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # A zip of one file is that file; one of several would need a choice.
            members = [member for member in archive.namelist() if _is_member(member)]
            if "xl/workbook.xml" in members:
                raise ConfigError(
                    f"{name}: {path} is a spreadsheet of Excel, which is not read: {_EXCEL}."
                )
            if len(members) != 1:
                listed = ", ".join(members[:10])
                raise ConfigError(
                    f"{name}: {path} is a zip of {len(members)} files: {listed}. Unpack it, "
                    f"and let config.data.{name}.path name one of them."
                )
            data = archive.read(members[0])
    except (zipfile.BadZipFile, *_UNPACKING) as error:
        raise ConfigError(f"{name}: {path} cannot be unpacked: {error}.") from error
    if data.startswith(b"PAR1"):
        return Content(path, "parquet", data)
    return Content(path, _kind_of(members[0], data[:FIRST_BYTES], default), data)


def _is_member(name: str) -> bool:
    """Returns whether a member of a zip is a file of data."""
    # Macs add a shadow of each file.
    return not name.endswith("/") and not name.startswith("__MACOSX/")
