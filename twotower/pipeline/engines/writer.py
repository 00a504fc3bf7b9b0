"""Writes the folder of a log whose rows, divided into parts, lie in a database.

It is what all engines end with that keep no rows in memory: each brings its rows into the database
in its own way, and the folder is the same. Rows pass through memory in blocks; what is kept is of
users and items: their tables, vocabularies and counts. Columns of the log that a feature reads (the
context of a query) are fitted as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.config import Config
from twotower.core.arrays import index_type
from twotower.core.arrow import join_chunks
from twotower.core.codes import codes_and_values, positions
from twotower.core.fields import check_fields
from twotower.core.progress import progress
from twotower.data.contract import Contract
from twotower.data.interactions import PARTS
from twotower.features.encoder import Encoder
from twotower.features.fit import fit_encoder
from twotower.features.history import log_weights
from twotower.features.inputs import HISTORY_WEIGHT
from twotower.features.spec import FeatureSpec
from twotower.pipeline import folder as data_folder
from twotower.pipeline.batches import InteractionRows
from twotower.pipeline.describe import describe_numbers, refuse_one_id
from twotower.pipeline.engines.arrays import ArrayFile
from twotower.pipeline.engines.database import BLOCK, Database, open_database
from twotower.pipeline.engines.events import (
    EventBlock,
    HistoryFiles,
    history_shapes,
    write_histories,
)
from twotower.pipeline.engines.kept.stages import SCRATCH, Stages
from twotower.pipeline.engines.log import Log
from twotower.pipeline.engines.rows import SqlNumbers, check_log_labels
from twotower.pipeline.event_weights import check_any_weight, check_event_weights, check_kinds
from twotower.pipeline.histories import check_columns
from twotower.pipeline.labels import label_columns
from twotower.pipeline.prepare import check_labels_are_hidden, columns_of_users, encode_rows


def write_folder(
    bring: Callable[[Database], Log],
    config: Config,
    spec: FeatureSpec,
    folder: Path,
    memory: int,
) -> None:
    """Writes the tables, the report, the encoder, the arrays and the manifest of a log.

    Args:
        bring: Function that brings the rows of the log into the table `log` of an empty database,
            with the column `part` that `twotower.pipeline.engines.divide.split_log` adds, and
            returns the log.
        config: Configuration of the run.
        spec: Features of the run.
        folder: Folder to write to, with the folder `SCRATCH` in it.
        memory: Memory in bytes that the process keeps to, as long as users and items leave room.

    Raises:
        ConfigError: The data cannot be used.
        OSError: The disk is full.
    """
    stages = Stages(folder)
    state = stages.find("tables")
    if state is None:
        with open_database(folder / SCRATCH, memory) as database:
            # Closed in between: its memory goes back before arrays are written.
            parts = _write_log(database, bring(database), config, spec, folder)
        _keep(parts, stages, folder)
        # As many bytes as the tables have themselves.
        stages.drop("rows")
    else:
        parts = _find(state, folder)
    _encode(parts, stages, config, spec, folder, memory)


@dataclasses.dataclass(frozen=True)
class _Divided:
    """A log whose parts are tables in the folder.

    Attributes:
        users: Table of all users.
        items: Table of the corpus.
        item_ids: Ids of items by code, also of those outside of the corpus.
        contract: Forms in which the log writes ids, times and numbers.
        has_catalogue: Whether items have a table of their own.
        total: Number of rows that were divided.
        sizes: Rows of each part.
        user_rows: Row of the users table of each code, int32.
        item_rows: Row of the corpus of each code, -1 outside of it, int32.
        user_counts: Rows of each user in each part, int64 [3, U], by row of the users table.
    """

    users: pa.Table
    items: pa.Table
    item_ids: pa.Array
    contract: Contract
    has_catalogue: bool
    total: int
    sizes: Sequence[int]
    user_rows: np.ndarray
    item_rows: np.ndarray
    user_counts: np.ndarray


# Fields of `_Divided` that are arrays, in files of these names.
_ARRAYS = ("user_rows", "item_rows", "user_counts")


def _keep(parts: _Divided, stages: Stages, folder: Path) -> None:
    """Marks the tables as whole, with all that is known of their rows."""
    scratch = folder / SCRATCH
    files = [folder / data_folder.table_file(name) for name in data_folder.TABLES]
    # With the report, which is not made again.
    files += [path for path in folder.glob("report.json")]
    files += [_positions_file(folder, part) for part in PARTS]
    for name in _ARRAYS:
        files.append(scratch / f"{name}.npy")
        np.save(files[-1], getattr(parts, name), allow_pickle=False)
    ids = pa.table({"item_id": parts.item_ids})
    files.append(scratch / "item_ids.arrow")
    with data_folder.TableWriter(files[-1], ids.schema) as writer:
        writer.write(ids)
    state = {
        "contract": parts.contract.to_dict(),
        "has_catalogue": parts.has_catalogue,
        "total": parts.total,
        "sizes": list(parts.sizes),
    }
    stages.finish("tables", files, state)


def _find(state: Mapping[str, Any], folder: Path) -> _Divided:
    """Returns what `_keep` has kept, by the state that it has left."""
    scratch = folder / SCRATCH
    arrays = {name: np.load(scratch / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
    tables = {}
    for name in ("users", "items"):
        tables[name] = data_folder.map_table(folder / data_folder.table_file(name))
    ids = data_folder.map_table(scratch / "item_ids.arrow")
    return _Divided(
        item_ids=join_chunks(ids["item_id"]),
        contract=Contract.from_dict(state["contract"]),
        has_catalogue=state["has_catalogue"],
        total=state["total"],
        sizes=state["sizes"],
        **tables,
        **arrays,
    )


def _positions_file(folder: Path, part: str) -> Path:
    return folder / SCRATCH / f"{part}.positions"


def _write_log(
    database: Database, log: Log, config: Config, spec: FeatureSpec, folder: Path
) -> _Divided:
    """Checks and describes a divided log, and writes its tables."""
    numbers = SqlNumbers(database, log, config, folder / SCRATCH)
    log = _checked(log, numbers, config)
    check_log_labels(database, log, label_columns(config.objective))
    dataset = log.dataset
    if not dataset.has_catalogue:
        # Training rows alone: an item that test rows bring could not have been recommended.
        is_trained = numbers.item_counts[0] > 0
        code = positions(dataset.items["item_id"], log.ids["item_id"])
        items = dataset.items.filter(pa.array(is_trained[code]))
        dataset = dataclasses.replace(dataset, items=items)
        log = dataclasses.replace(log, dataset=dataset)
    check_fields(
        dict.fromkeys(config.retrieval.display),
        dataset.items.column_names,
        "config.retrieval.display: the items table",
    )
    # Codes are those of all ids of the log, rows those of the ids that are left.
    user_rows = positions(pa.chunked_array([log.ids["user_id"]]), dataset.users["user_id"])
    item_rows = positions(pa.chunked_array([log.ids["item_id"]]), dataset.items["item_id"])
    # Only now, since the corpus follows from the counts themselves.
    numbers.user_rows = user_rows
    numbers.item_rows = item_rows
    user_counts = np.zeros((3, len(dataset.users)), np.int64)
    has_row = user_rows >= 0
    user_counts[:, user_rows[has_row]] = numbers.user_counts[:, has_row]
    _write_tables(database, log, folder)
    # From the file, of which the description reads the columns of features alone.
    train = data_folder.map_table(folder / data_folder.table_file("train"))
    report = describe_numbers(config, spec, dataset, numbers, train)
    report.save(folder)
    return _Divided(
        users=dataset.users,
        items=dataset.items,
        item_ids=log.ids["item_id"],
        contract=dataset.contract,
        has_catalogue=dataset.has_catalogue,
        total=numbers.num_rows,
        sizes=numbers.part_rows,
        user_rows=user_rows,
        item_rows=item_rows,
        user_counts=user_counts,
    )


def _checked(log: Log, numbers: SqlNumbers, config: Config) -> Log:
    """Refuses rows that can only be a mistake; returns the log with what was found odd."""
    for key, count in (("user_id", numbers.num_users), ("item_id", numbers.num_items)):
        if count == 1:
            counts = numbers.user_counts if key == "user_id" else numbers.item_counts
            code = int(counts.sum(axis=0).argmax())
            value = log.ids[key][code].as_py()
            side = key.removesuffix("_id")
            refuse_one_id(side, value, numbers.num_rows, config.data.accept)
    if not config.data.event_weights:
        return log
    # Refused where there are no kinds at all.
    check_event_weights(log.schema.empty_table().select(log.schema.names), config.data)
    warnings = check_kinds(numbers.count_kinds(), config.data)
    dataset = log.dataset
    dataset = dataclasses.replace(dataset, warnings=(*dataset.warnings, *warnings))
    return dataclasses.replace(log, dataset=dataset)


def _write_tables(database: Database, log: Log, folder: Path) -> None:
    """Writes the tables of the folder, and beside each part the positions of its rows."""
    for name, table in (("users", log.dataset.users), ("items", log.dataset.items)):
        path = folder / data_folder.table_file(name)
        with data_folder.TableWriter(path, table.schema) as writer:
            writer.write(table)
    others = "".join(f", {column}" for column in log.columns.values())
    first = 0
    total = database.value("SELECT count(*) FROM log")
    writers = []
    position_files = []
    # All parts at once: the rows come in the order of the source, once.
    for part in PARTS:
        path = folder / data_folder.table_file(part)
        writers.append(data_folder.TableWriter(path, log.schema))
        position_files.append(open(_positions_file(folder, part), "wb"))
    sql = f"SELECT u, i{others}, part FROM log ORDER BY position"
    for block in database.blocks(sql, total, "writing rows"):
        number = block["part"].to_numpy()
        rows = log.rows(block.drop_columns(["part"]))
        for part, (writer, file) in enumerate(zip(writers, position_files, strict=True)):
            of_part = np.flatnonzero(number == part)
            if len(of_part):
                writer.write(rows.take(pa.array(of_part)))
                # The order of the file, by which equal times are ordered.
                (first + of_part).astype(index_type(total)).tofile(file)
        first += len(rows)
    for writer, file in zip(writers, position_files, strict=True):
        # After an error they stay open: the folder is not whole, and the next try clears it.
        writer.__exit__(None, None, None)
        file.close()


def _encode(
    parts: _Divided,
    stages: Stages,
    config: Config,
    spec: FeatureSpec,
    folder: Path,
    memory: int,
) -> None:
    """Fits the encoder to the training rows of the folder, and writes its arrays."""
    train = data_folder.map_table(folder / data_folder.table_file("train"))
    if stages.find("encoder") is None:
        encoder = fit_encoder(spec, train, users=parts.users, items=parts.items)
        encoder = dataclasses.replace(encoder, contract=parts.contract)
        encoder.save(folder / "encoder")
        stages.finish("encoder", [folder / "encoder"], {})
    else:
        encoder = Encoder.load(folder / "encoder")
    check_labels_are_hidden(encoder, label_columns(config.objective))
    # Of its columns and types alone: arrays are described before a row is encoded.
    empty = train.slice(0, 0)
    # Before the database takes its share of the memory.
    del train
    # Users and items fit into memory, and so do their features.
    features = {
        "user": encoder.encode("user", parts.users, columns_of_users(encoder)),
        "item": encoder.encode("item", parts.items),
    }
    described = data_folder.describe_arrays(_array_shapes(parts, config, encoder, features, empty))
    are_encoded = stages.find("arrays") is not None
    if encoder.spec.history is None:
        if not are_encoded:
            _write_arrays(None, parts, stages, config, encoder, described, features, folder)
    elif stages.find("histories") is None:
        with open_database(folder / SCRATCH, memory) as database:
            if are_encoded:
                # The events alone: a database of a try that was stopped is not trusted.
                _write_rows(database, parts, config, encoder, None, folder)
            else:
                _write_arrays(database, parts, stages, config, encoder, described, features, folder)
            files = _open_files(described, folder, of_histories=True)
            _write_events(database, parts, encoder, files["histories"], folder / SCRATCH)
            stages.finish("histories", _close_files(files), {})
    data_folder.finish(
        folder,
        config,
        encoder,
        rows=dict(zip(PARTS, parts.sizes)),
        arrays=described,
        has_catalogue=parts.has_catalogue,
    )


def _write_arrays(
    database: Database | None,
    parts: _Divided,
    stages: Stages,
    config: Config,
    encoder: Encoder,
    described: Sequence[Mapping[str, Any]],
    features: Mapping[str, Mapping[str, np.ndarray]],
    folder: Path,
) -> None:
    """Writes all arrays but those of histories; see `_write_rows`."""
    files = _open_files(described, folder, of_histories=False)
    for side, arrays in features.items():
        for name, values in arrays.items():
            files["features"][side][name].append(values)
    _write_rows(database, parts, config, encoder, files, folder)
    stages.finish("arrays", _close_files(files), {})


def _open_files(
    described: Sequence[Mapping[str, Any]], folder: Path, *, of_histories: bool
) -> dict[str, Any]:
    """Opens the files of arrays, by the names that lead to them.

    Args:
        described: Description of all arrays, see `twotower.pipeline.folder.describe_arrays`.
        folder: Folder of the files.
        of_histories: Whether to open those of histories, or all others.
    """
    files: dict[str, Any] = {}
    for entry in described:
        path = list(entry["path"])
        if (path[0] == "histories") == of_histories:
            # Of its whole size, since histories are written at any place of their files.
            file = ArrayFile(folder / entry["file"], np.dtype(entry["dtype"]), entry["shape"])
            data_folder.put(files, path, file)
    return files


def _close_files(files: Mapping[str, Any]) -> list[Path]:
    paths = []
    for file in _files(files):
        file.close()
        paths.append(file.path)
    return paths


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Type and shape of an array."""

    dtype: np.dtype
    shape: tuple[int, ...]


def _array_shapes(
    parts: _Divided,
    config: Config,
    encoder: Encoder,
    features: Mapping[str, Mapping[str, np.ndarray]],
    empty: pa.Table,
) -> dict[str, Any]:
    """Returns type and shape of all arrays, in the order in which a folder has them."""
    nobody = np.zeros(0, np.int32)
    event_weights = config.data.weight_by_event()
    labels = label_columns(config.objective)
    rows = encode_rows(empty, nobody, nobody, encoder, labels, event_weights)
    # Of no row it cannot be told whether rows have times.
    has_times = "timestamp" in empty.column_names
    rows = dataclasses.replace(rows, timestamp=np.zeros(0, np.int64))
    leaves = _leaves_of(rows)
    if not has_times:
        leaves.pop("timestamp")
    tree: dict[str, Any] = {"features": features}
    for name, size in zip(PARTS, parts.sizes, strict=True):
        tree[name] = _sized(leaves, size)
        # As a part in memory has no times where it has no rows.
        if not size:
            tree[name].pop("timestamp", None)
    position = np.zeros(0, index_type(parts.total))
    tree["file_positions"] = {
        name: _Shape(position.dtype, (size,)) for name, size in zip(PARTS, parts.sizes)
    }
    feature = encoder.spec.history
    if feature is not None:
        check_columns(feature, empty, has_times=has_times)
        events: dict[str, np.dtype] = {f"{feature.name}/{feature.reads[0]}": np.dtype(np.int32)}
        if feature.is_weighted:
            events[HISTORY_WEIGHT] = np.dtype(np.float32)
        num_users = len(parts.users)
        shapes = history_shapes(feature, events, num_users, parts.sizes)
        tree["histories"] = _shaped(shapes)
    return tree


def _leaves_of(rows: InteractionRows) -> dict[str, Any]:
    return vars(rows) | {"context": dict(rows.context), "labels": dict(rows.labels)}


def _sized(tree: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns type and shape of arrays as they are of `size` rows."""
    sized = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            sized[name] = _sized(value, size)
        else:
            sized[name] = _Shape(value.dtype, (size, *value.shape[1:]))
    return sized


def _shaped(tree: Mapping[str, Any]) -> dict[str, Any]:
    shaped = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            shaped[name] = _shaped(value)
        else:
            shaped[name] = _Shape(*value)
    return shaped


def _files(tree: Mapping[str, Any]) -> Iterator[ArrayFile]:
    for value in tree.values():
        if isinstance(value, ArrayFile):
            yield value
        else:
            yield from _files(value)


def _write_rows(
    database: Database | None,
    parts: _Divided,
    config: Config,
    encoder: Encoder,
    files: Mapping[str, Any] | None,
    folder: Path,
) -> None:
    """Writes the arrays of the rows of all parts, and makes the table `events` of them.

    Args:
        database: Database to make the table in; None where there are no histories.
        parts: The log.
        config: Configuration of the run.
        encoder: Fitted encoder.
        files: Files of the arrays; None where they are written already.
        folder: Folder with the tables of the parts.
    """
    event_weights = config.data.weight_by_event()
    labels = label_columns(config.objective)
    events = None
    if database is not None:
        events = _EventTable(database, parts, encoder)
    position_type = np.dtype(index_type(parts.total))
    joined = 0
    # Part after part, as the arrays of a part and its table have one order.
    for part, size in zip(PARTS, parts.sizes, strict=True):
        blocks = _blocks_of_file(folder / data_folder.table_file(part))
        total = -(-size // BLOCK)
        has_weight = False
        written = open(_positions_file(folder, part), "rb")
        for rows in progress(blocks, total=total, what=f"encoding {part}", seconds=10.0):
            # The file has the codes of the log: no id is looked up again.
            user = parts.user_rows[codes_and_values(rows["user_id"])[0]]
            item_codes, _ = codes_and_values(rows["item_id"])
            item = parts.item_rows[item_codes]
            encoded = encode_rows(rows, user, item, encoder, labels, event_weights)
            has_weight |= bool(encoded.weight.any())
            position = np.fromfile(written, position_type, len(rows))
            if files is not None:
                _append(files[part], _leaves_of(encoded))
                files["file_positions"][part].append(position)
            if events is not None:
                number = joined + np.arange(len(rows))
                events.add(rows, encoded, item_codes, position, number)
            joined += len(rows)
        written.close()
        if part == "train":
            check_any_weight(has_weight)


class _EventTable:
    """The table `events`: of each row what a history needs, so that no more is sorted.

    Args:
        database: Database to make it in.
        parts: The log.
        encoder: Fitted encoder, with a history.
    """

    def __init__(self, database: Database, parts: _Divided, encoder: Encoder):
        feature = encoder.spec.history
        assert feature is not None
        vocabulary = encoder.fitted["user", feature.name].require_vocabulary()
        self._rows_of_items = vocabulary.rows(parts.item_ids)
        self._database = database
        self._encoder = encoder
        # Four bytes a row less, where they suffice.
        number = "BIGINT" if parts.total >= 2**31 else "INTEGER"
        database.run(
            f"CREATE TABLE events (u INTEGER, t BIGINT, place {number}, joined {number}, "
            "item INTEGER, w FLOAT)"
        )

    def add(
        self,
        rows: pa.Table,
        encoded: InteractionRows,
        item_codes: np.ndarray,
        position: np.ndarray,
        joined: np.ndarray,
    ) -> None:
        """Adds rows.

        Args:
            rows: Rows of a part.
            encoded: The same as arrays.
            item_codes: Code of the item of each.
            position: Position of each in the file.
            joined: Position of each among the rows of all parts.
        """
        weights = _log_weights(self._encoder, rows, encoded.timestamp)
        items = self._rows_of_items[item_codes]
        # Without times the order is that of the source, and each row a moment of its own.
        time = position.astype(np.int64) if encoded.timestamp is None else encoded.timestamp
        columns = [encoded.user, time, position, joined, items]
        names = ["u", "t", "place", "joined", "item", "w"]
        self._database.insert("events", pa.table([*map(pa.array, columns), weights], names))


def _log_weights(encoder: Encoder, rows: pa.Table, time: np.ndarray | None) -> pa.Array:
    """Returns the logs of the weights of rows as events; null where they have none."""
    feature = encoder.spec.history
    assert feature is not None
    if not feature.is_weighted:
        return pa.nulls(len(rows), pa.float32())
    events = rows["event"] if "event" in rows.column_names else None
    fitted = encoder.fitted["user", feature.name]
    return pa.array(log_weights(feature, fitted, len(rows), events, time))


def _append(files: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            # A folder has no entry for features or labels that there are none of.
            _append(files.get(name, {}), value)
        # None of a column that the log does not have.
        elif value is not None:
            files[name].append(value)


def _blocks_of_file(path: Path) -> Iterator[pa.Table]:
    """Yields the rows of a table of the folder, read and not mapped."""
    with pa.OSFile(str(path)) as file:
        # Read, since pages of a mapped file count as memory of the process.
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            # Batches of the file are larger than what is encoded at once.
            for start in range(0, len(batch), BLOCK):
                yield pa.Table.from_batches([batch.slice(start, BLOCK)])


def _write_events(
    database: Database,
    parts: _Divided,
    encoder: Encoder,
    files: Mapping[str, Any],
    scratch: Path,
) -> None:
    """Writes the histories of all rows."""
    feature = encoder.spec.history
    assert feature is not None
    total = sum(parts.sizes)
    sql = "SELECT u, t, joined, item, w FROM events ORDER BY u, t, place"
    blocks = database.blocks(sql, total, "histories")
    write_histories(
        # Item and weight first; gaps between events are made from their times later.
        _event_blocks(blocks, list(files["events"])[: 2 if feature.is_weighted else 1]),
        HistoryFiles(**files),
        feature,
        parts.user_counts,
        parts.sizes,
        scratch / "spans",
    )


def _event_blocks(blocks: Iterator[pa.Table], names: list[str]) -> Iterator[EventBlock]:
    for block in blocks:
        user, time, joined, *events = [column.to_numpy() for column in block.columns]
        yield EventBlock(user, time, joined, dict(zip(names, events, strict=False)))
