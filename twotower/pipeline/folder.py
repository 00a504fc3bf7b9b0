"""Prepared data in a folder, from which all commands but the first training read it.

```
manifest.json    version, what the data was made from, a hash of all tables and arrays, and of every
                 other file its size
users.arrow  items.arrow  train.arrow  validation.arrow  test.arrow
                 the tables with all columns as they were read, mapped into memory
NNN.npy          the encoded arrays, mapped likewise; the manifest names them
report.json      facts about the data for people; see `twotower.data.report`
encoder/         of a folder that runs share, the encoder; a run has its own beside `data/`
```

Histories are flat arrays of events with the offsets of users, and spans of them: nothing is padded.
The manifest is written last and all at once, so that a folder without one was never finished and is
written again. A run that shares the data of another folder has a manifest that names it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.config import Config, DataConfig, SplitConfig
from twotower.core.arrow import join_chunks
from twotower.core.errors import ConfigError, FolderError
from twotower.core.fields import build, differences
from twotower.core.files import atomic, content_digest, digest, read_json
from twotower.data.dataset import TruePreferences
from twotower.data.interactions import PARTS, Split
from twotower.data.report import DataReport
from twotower.features.encoder import Encoder
from twotower.features.history import read_arrays
from twotower.features.spec import from_mappings, load_spec
from twotower.pipeline.batches import SPANS, InteractionRows
from twotower.pipeline.event_weights import with_event_weights
from twotower.pipeline.histories import Histories
from twotower.pipeline.labels import label_columns
from twotower.pipeline.prepare import PreparedData, pack_sequences

MANIFEST = "manifest.json"
FORMAT = "twotower-prepared-data"
VERSION = 1
TABLES = ("users", "items", *PARTS)
# Nested mappings with arrays as leaves.
Tree = Mapping[str, Any]
# Rows of a table that are written at once.
_BATCH = 2**22


def save(prepared: PreparedData, folder: Path) -> None:
    """Writes prepared data into a folder.

    Files that another process has mapped are replaced, not changed.

    Args:
        prepared: Data to write.
        folder: Folder to write to; it is made if there is none.
    """
    for name, table in _tables(prepared).items():
        with atomic(folder / table_file(name)) as temporary:
            with TableWriter(temporary, table.schema) as writer:
                writer.write(table)
    tree = arrays_of(prepared)
    arrays = describe_arrays(tree)
    for entry, (_, array) in zip(arrays, _leaves(tree), strict=True):
        with atomic(folder / entry["file"]) as temporary:
            with temporary.open("wb") as opened:
                np.save(opened, array, allow_pickle=False)
    # Before the manifest, which says that all is there.
    if prepared.report is not None:
        prepared.report.save(folder)
    rows = {part: len(getattr(prepared, part)) for part in PARTS}
    finish(
        folder,
        prepared.config,
        prepared.encoder,
        rows=rows,
        arrays=arrays,
        has_catalogue=prepared.has_catalogue,
    )


def table_file(name: str) -> str:
    """Returns the file of a table: users, items, or a part of the split."""
    return f"{name}.arrow"


def describe_arrays(tree: Tree) -> list[dict[str, Any]]:
    """Returns path, file, type and shape of the arrays of prepared data, as the manifest has them.

    Args:
        tree: Nested mappings as `arrays_of` returns them; an array may be anything that has its
            dtype and shape.
    """
    described = []
    for number, (path, array) in enumerate(_leaves(tree)):
        # Numbers, since features and columns may have names that no file can have.
        entry = {
            "path": path,
            "file": f"{number:03}.npy",
            "dtype": str(array.dtype),
            "shape": array.shape,
        }
        described.append(entry)
    return described


def finish(
    folder: Path,
    config: Config,
    encoder: Encoder,
    *,
    rows: Mapping[str, int],
    arrays: Sequence[Mapping[str, Any]],
    has_catalogue: bool,
) -> None:
    """Writes the manifest of a folder that holds all tables and arrays, which makes it whole.

    Args:
        folder: Folder with the files.
        config: Configuration that the data was prepared for.
        encoder: Encoder of the data.
        rows: Number of rows of each part.
        arrays: Description of each array, see `describe_arrays`.
        has_catalogue: Whether items have a table of their own.
    """
    files = [table_file(name) for name in TABLES]
    files += [entry["file"] for entry in arrays]
    content = {
        "made_from": _made_from(config, encoder),
        # By the hash of the training rows: data and encoder of two runs look alike.
        "fitted_on": encoder.fitted_on,
        "has_catalogue": has_catalogue,
        "rows": rows,
        "arrays": arrays,
        "files": {file: (folder / file).stat().st_size for file in files},
        # Of the bytes alone: it is the same whatever wrote them, and when.
        "content": content_digest({file: digest(folder / file) for file in files}),
    }
    _write_manifest(folder, content)


def content_of(folder: Path) -> str:
    """Returns the SHA-256 of all tables and arrays; empty for a folder of an earlier version."""
    return _read_manifest(resolve(folder)).get("content", "")


def load(folder: Path, config: Config, encoder: Encoder) -> PreparedData:
    """Returns the prepared data of a folder, with its arrays and tables mapped into memory.

    Args:
        folder: Folder that `save` or `share` wrote to.
        config: Configuration of the run.
        encoder: Encoder of the run.

    Raises:
        FolderError: The folder is not whole, of another version, or of another encoder.
    """
    folder = resolve(folder)
    manifest = _read_manifest(folder)
    _check_files(folder, manifest["files"])
    if manifest["fitted_on"] != encoder.fitted_on:
        raise FolderError(
            f"{folder} holds other training rows than the encoder of the run was fitted on: it is "
            "the data of another run. Restore it, or train again in a new folder."
        )
    tables = {name: map_table(folder / f"{name}.arrow") for name in TABLES}
    tree: dict[str, Any] = {}
    for entry in manifest["arrays"]:
        put(tree, entry["path"], _map_array(folder / entry["file"], entry))
    histories = _load_histories(tree.get("histories"), encoder)
    # Missing where the parts follow each other in the file.
    positions = tree.get("file_positions")
    if positions is not None:
        positions = tuple(positions[part] for part in PARTS)
    truth = None
    if "truth" in tree:
        truth = TruePreferences(**tree["truth"])
    rows = {part: _load_rows(tree[part], histories, part) for part in PARTS}
    return PreparedData(
        config=config,
        users=tables["users"],
        items=tables["items"],
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        encoder=encoder,
        features={side: tree["features"].get(side, {}) for side in ("user", "item")},
        truth=truth,
        raw=Split(*(tables[part] for part in PARTS), file_positions=positions),
        histories=histories,
        # Made anew: it depends on the seed and on options of training, which runs of one folder
        # differ in.
        packing=pack_sequences(config, histories),
        has_catalogue=manifest["has_catalogue"],
        report=DataReport.load(folder),
    )


def is_whole(folder: Path) -> bool:
    """Returns whether a folder holds prepared data, or names another one that should."""
    return (folder / MANIFEST).is_file()


def is_own(name: str) -> bool:
    """Returns whether a file or folder of this name is one of those in a folder of data."""
    tables = "|".join(TABLES)
    own = rf"\d{{3,}}\.npy|({tables})\.arrow|report\.json|encoder|shards|\..*\.tmp"
    return re.fullmatch(own, name) is not None


def forget(folder: Path) -> None:
    """Makes prepared data count as unfinished, so that it is written again."""
    # The manifest alone: arrays that another process has mapped stay readable.
    (folder / MANIFEST).unlink(missing_ok=True)


def share(folder: Path, shared: Path) -> None:
    """Makes `folder` stand for the prepared data of another folder.

    Args:
        folder: Folder of the data of a run.
        shared: Folder that `save` wrote to.

    Raises:
        FolderError: `folder` stands for other data already.
    """
    sha256 = _read_manifest(shared)["sha256"]
    if is_whole(folder):
        before = _read_manifest(folder)
        # A run that goes on must go on with its data, wherever that was moved to.
        if before.get("shared_sha256", before["sha256"]) != sha256:
            raise FolderError(
                f"{shared} is not the prepared data that the run in {folder.parent} was begun "
                "with: leave out --data, or train in a new folder."
            )
    try:
        # Relative, so that both folders can be moved together.
        path = os.path.relpath(shared.resolve(), folder.resolve())
    except ValueError:  # on another drive
        path = str(shared.resolve())
    _write_manifest(folder, {"shared": path, "shared_sha256": sha256})


def resolve(folder: Path) -> Path:
    """Returns the folder that holds the arrays of prepared data: itself, or the one it names.

    Raises:
        FolderError: The folder that it names is missing, or holds other data than it did.
    """
    manifest = _read_manifest(folder)
    if "shared" not in manifest:
        return folder
    shared = Path(os.path.normpath(folder.resolve() / manifest["shared"]))
    cure = f"Put it back, or name its new place: train ... --data=FOLDER (see {folder / MANIFEST})."
    if not is_whole(shared):
        raise FolderError(f"{shared}, the prepared data that the run shares, is missing. {cure}")
    # The same place may hold other data by now, which the encoder does not know.
    if _read_manifest(shared)["sha256"] != manifest["shared_sha256"]:
        raise FolderError(
            f"{shared}, the prepared data that the run shares, was written again since. {cure}"
        )
    return shared


def check_fits(folder: Path, config: Config) -> None:
    """Refuses prepared data that was made by another configuration.

    Args:
        folder: Folder of prepared data.
        config: Configuration of a run that is to share it.

    Raises:
        ConfigError: Fields of data, split, features or labels differ; the message names them.
    """
    manifest = _read_manifest(resolve(folder))
    before = manifest["made_from"]
    # With the options that the version which wrote it did not have yet.
    before["data"] = dataclasses.asdict(build(DataConfig, before["data"], "config.data"))
    before["split"] = dataclasses.asdict(build(SplitConfig, before["split"], "config.split"))
    before["features"] = from_mappings(before["features"]).to_dict()
    now = _made_from(config, None)
    changed = differences(_as_json(before), _as_json(now), "config")
    if changed:
        raise ConfigError(
            f"--data={folder} was prepared by another configuration: {'; '.join(changed)}. Name "
            "another folder, which is then prepared anew."
        )


def digest_of(config: Config) -> str:
    """Returns a hash of all of a configuration that decides its prepared data.

    Runs of one hash can share a folder.
    """
    return content_digest(_as_json(_made_from(config, None)))


def load_encoder(folder: Path) -> Encoder:
    """Returns the encoder of prepared data: in its folder, or beside it in that of its run."""
    folder = resolve(folder)
    # A folder that runs share belongs to none of them, and has an encoder of its own.
    own = folder / "encoder"
    if not own.is_dir():
        own = folder.parent / "encoder"
    return Encoder.load(own)


def _made_from(config: Config, encoder: Encoder | None) -> dict[str, Any]:
    """Returns all of a configuration that decides the arrays, as JSON."""
    # The weights of events are part of the arrays of a history.
    if encoder is None:
        spec = with_event_weights(load_spec(config.features), config)
    else:
        spec = encoder.spec
    return {
        "data": dataclasses.asdict(config.data),
        "split": dataclasses.asdict(config.split),
        "features": spec.to_dict(),
        # Labels alone of all that the objective says: they are read from the rows.
        "labels": sorted(label_columns(config.objective)),
    }


def _as_json(content: Any) -> Any:
    # A tuple is a list there: both sides are compared as they are written.
    return json.loads(json.dumps(content))


def _tables(prepared: PreparedData) -> dict[str, pa.Table]:
    tables = {"users": prepared.users, "items": prepared.items}
    return tables | {part: getattr(prepared.raw, part) for part in PARTS}


def arrays_of(prepared: PreparedData) -> Tree:
    """Returns the arrays of prepared data by the names of its fields."""
    tree: dict[str, Any] = {"features": prepared.features}
    for part in PARTS:
        rows: InteractionRows = getattr(prepared, part)
        # The spans are stored once, with the histories.
        context = {name: x for name, x in rows.context.items() if name != SPANS}
        tree[part] = vars(rows) | {"context": context}
    if prepared.raw.file_positions is not None:
        tree["file_positions"] = dict(zip(PARTS, prepared.raw.file_positions))
    if prepared.truth is not None:
        tree["truth"] = vars(prepared.truth)
    if prepared.histories is not None:
        names = ("events", "offsets", "orders", "spans", "times")
        tree["histories"] = {name: getattr(prepared.histories, name) for name in names}
    return tree


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the arrays of nested mappings with their paths; None is no array."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        elif value is not None:
            yield (*path, name), value


def put(tree: dict[str, Any], path: list[str], array: Any) -> None:
    """Puts an array into nested mappings, at a path of `_leaves`."""
    *above, name = path
    for key in above:
        tree = tree.setdefault(key, {})
    tree[name] = array


def _load_rows(arrays: Tree, histories: Histories | None, part: str) -> InteractionRows:
    context = dict(arrays.get("context", {}))
    if histories is not None:
        context[SPANS] = histories.spans[part]
    return InteractionRows(
        user=arrays["user"],
        item=arrays["item"],
        weight=arrays["weight"],
        timestamp=arrays.get("timestamp"),
        context=context,
        labels=arrays.get("labels", {}),
    )


def _load_histories(arrays: Tree | None, encoder: Encoder) -> Histories | None:
    feature = encoder.spec.history
    if arrays is None or feature is None:
        return None
    # What is read of an item is of the encoder, not of the rows.
    reads = read_arrays(feature, encoder.fitted[feature.key])
    return Histories(feature=feature, reads=reads, **arrays)


class TableWriter:
    """Writes a table in pieces, into a file that does not depend on how it was cut into them.

    Args:
        path: File to write.
        schema: Schema of the table.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        # Arrow files have one dictionary a column, whatever the chunks have.
        options = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema, options=options)
        self._schema = schema
        self._pieces: list[pa.Table] = []
        self._rows = 0

    def write(self, piece: pa.Table) -> None:
        """Adds rows at the end."""
        self._pieces.append(piece)
        self._rows += len(piece)
        while self._rows >= _BATCH:
            self._write_batch(_BATCH)

    def _write_batch(self, rows: int) -> None:
        joined = pa.concat_tables(self._pieces)
        columns = [_one_chunk(column) for column in joined.slice(0, rows).columns]
        batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        self._writer.write_batch(batch)
        self._pieces = [joined.slice(rows)]
        self._rows -= rows

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None and self._rows:
                self._write_batch(self._rows)
            self._writer.close()
        finally:
            self._file.close()


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array of which no byte is left to chance."""
    values = join_chunks(column)
    # A copy: a slice is written with some of the bytes behind it, and whatever lies under a missing
    # value.
    return values.take(pa.array(np.arange(len(values))))


def map_table(path: Path) -> pa.Table:
    """Returns a table of a folder, mapped into memory."""
    # Mapped: columns that nothing reads never take memory.
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _map_array(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """Returns an array mapped into memory, for reading.

    Raises:
        FolderError: It is not the one that the manifest describes.
    """
    # An empty file cannot be mapped.
    mode = "r" if np.prod(entry["shape"]) else None
    # Without the class `memmap`, which costs time at each indexing.
    array = np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
    if str(array.dtype) != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise FolderError(f"{path} is corrupt: it holds {array.dtype} {array.shape}. {_CURE}")
    return array


_CURE = "Delete the folder: the data is then prepared again from its source."


def _check_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """Refuses a folder of which a file is missing or was cut."""
    # Sizes alone: hashes of all arrays would take longer than everything else at the start.
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise FolderError(f"{path} is missing. {_CURE}")
        if path.stat().st_size != size:
            raise FolderError(
                f"{path} is corrupt: it has {path.stat().st_size:,} bytes, not {size:,}. {_CURE}"
            )


def _write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    manifest = {"format": FORMAT, "version": VERSION, **content}
    # Of itself, so that a manifest that was edited by hand is told apart.
    manifest["sha256"] = content_digest(manifest)
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FolderError(f"{folder} holds no prepared data: it has no {MANIFEST}.")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise FolderError(f"{path} is not the manifest of prepared data.")
    if manifest.get("version") != VERSION:
        raise FolderError(
            f"{path} has version {manifest.get('version')!r}; this twotower reads {VERSION}. "
            f"{_CURE}"
        )
    if manifest.get("sha256") != content_digest(manifest):
        raise FolderError(f"{path} was changed after it was written. {_CURE}")
    return manifest
