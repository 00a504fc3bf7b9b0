"""Checks of the contents of a bundle's files.

Their hashes say that the files are those that the manifest names, and not who wrote it: somebody
may have made both by hand. What is read here is therefore looked at before it is believed, and a
size before it is allocated.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.core.errors import BundleError
from twotower.core.ragged import Ragged
from twotower.index.int8 import Int8Vectors, Vectors

ROWS_AT_ONCE = 65_536  # rows of vectors that are looked at together


def check_names(manifest_file: Path, files: object) -> None:
    """Refuses a list of files that is none, or that names files outside the bundle."""
    if not isinstance(files, dict):
        raise BundleError(f"{manifest_file} lists no files. Export again.")
    for name, digest in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(digest, str):
            raise BundleError(
                f"{manifest_file} names {name!r}, which is no file of the bundle. Do not use it."
            )


def read_rows(path: Path, rows: int) -> pa.Table:
    """Reads a Parquet file of a known number of rows."""
    found = pq.read_metadata(path).num_rows
    if found != rows:
        raise BundleError(
            f"{path} differs in length from its vectors ({found}, {rows}). Export again."
        )
    return pq.read_table(path)


def check_ids(path: Path, table: pa.Table, column: str) -> None:
    """Refuses a table whose ids are no texts, are missing, or come twice."""
    if table.column_names.count(column) != 1 or len(set(table.column_names)) != table.num_columns:
        raise BundleError(f"{path} needs each of its columns once, {column!r} too. Export again.")
    ids = table[column]
    if ids.type != pa.string() or ids.null_count:
        raise BundleError(f"{path}: {column!r} must hold a text in each row. Export again.")
    if len(ids.unique()) != len(ids):
        raise BundleError(f"{path}: {column!r} holds an id twice. Export again.")


def check_vectors(path: Path, vectors: Vectors) -> None:
    """Refuses vectors that are not float32, or not finite."""
    if isinstance(vectors, Int8Vectors):
        check_vectors(path.with_name("item_scales.npy"), vectors.scales[:, None])
        return
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise BundleError(f"{path} must hold float32 in two dimensions. Export again.")
    # By blocks: they are mapped into memory, not read.
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        if not np.isfinite(vectors[start : start + ROWS_AT_ONCE]).all():
            raise BundleError(f"{path} holds numbers that are not finite. Export again.")


def check_counts(path: Path, counts: np.ndarray) -> None:
    """Refuses counts that are no whole numbers, or negative."""
    if counts.dtype != np.int64 or counts.ndim != 1 or counts.min(initial=0) < 0:
        raise BundleError(f"{path} must hold a count for each item. Export again.")


def check_lists(folder: Path, seen: Ragged, num_items: int) -> None:
    """Refuses lists of items that do not lie one after the other, or name items there are not."""
    offsets = seen.offsets
    values = seen.values
    is_whole = offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
    if not is_whole or values.dtype != np.int32 or values.ndim != 1:
        raise BundleError(
            f"{folder}: seen_offsets.npy and seen_items.npy hold no lists. Export again."
        )
    is_rising = offsets[0] == 0 and offsets[-1] == len(values) and (np.diff(offsets) >= 0).all()
    if not is_rising:
        raise BundleError(
            f"{folder}: seen_offsets.npy does not divide seen_items.npy. Export again."
        )
    if len(values) and not 0 <= values.min() <= values.max() < num_items:
        raise BundleError(f"{folder}: seen_items.npy names items that there are not. Export again.")


def check_events(path: Path, events: pa.Table | None) -> None:
    """Refuses events whose columns are not those of an export."""
    if events is None:
        return
    # An index of a dictionary, or an offset of a text, may lead out of the file.
    events.validate(full=True)
    for field in events.schema:
        kind = field.type
        is_text = pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)
        wanted = {"timestamp": kind == pa.int64(), "event": is_text or pa.types.is_string(kind)}
        if not wanted.get(field.name, False):
            raise BundleError(
                f"{path}: column {field.name!r} of {kind} is no event's. Export again."
            )
