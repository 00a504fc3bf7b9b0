"""Prepares a log into a folder that runs share, by one of several engines.

All engines leave the same folder, byte for byte; `twotower.pipeline.folder` says what it holds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from twotower.config import Config
from twotower.core.errors import ConfigError, choose
from twotower.core.files import discard, exclusive, explain_full_disk
from twotower.data.report import DataReport
from twotower.pipeline import folder as data_folder
from twotower.pipeline.engines.bad_rows import check_bad_rows, with_bad_rows
from twotower.pipeline.engines.beam.launch import prepare_on_beam
from twotower.pipeline.engines.kept.stages import SCRATCH, key_of
from twotower.pipeline.engines.on_disk import prepare_on_disk
from twotower.pipeline.engines.unfinished import preparing
from twotower.pipeline.engines.warehouse.bring import prepare_in_warehouse
from twotower.pipeline.prepare import prepare
from twotower.pipeline.streaming.prepared import write_shards
from twotower.pipeline.streaming.stream import check_installed

# Options that one engine alone reads.
_READ_BY = {
    "tables": "bigquery",
    "export": "bigquery",
    "beam_options": "beam",
    "beam_temp": "beam",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def prepare_folder(
    config: Config,
    folder: Path,
    *,
    engine: str = "memory",
    memory: str = "4GB",
    max_bad_rows: int | None = None,
    tables: str = "",
    export: str = "",
    beam_options: str = "",
    beam_temp: str = "",
) -> DataReport | None:
    """Prepares the log that a configuration names into a folder, with its encoder, and with the
    shards of a training that streams.

    A folder that is whole already is left as it is. One that was left half-way, by a kill or a full
    disk, is gone on with where the engine has stages, if neither the configuration nor the files
    have changed; else it counts as empty.

    Args:
        config: Configuration whose data, split, features and labels are prepared.
        folder: Folder to write to; it is made if there is none.
        engine: Kind of engine.
        memory: Memory that engines keep to which hold no rows in it, such as "4GB".
        max_bad_rows: Number of rows with other fields than the header that may be left out; None
            for what `bad_rows` of the tables says.
        tables: DATASET.NAME, the beginning of the names of the tables that the engine "bigquery"
            leaves.
        export: Folder of a bucket, by way of which the engine "bigquery" hands its rows over; empty
            for pages of its own interface.
        beam_options: Options of the pipelines of the engine "beam", as on a command line.
        beam_temp: Folder or address that all its workers see, for what they hand to each other; by
            default one in `folder`.

    Returns:
        Facts about the data; None where the folder keeps none.

    Raises:
        BusyError: Another process prepares the folder.
        ConfigError: The data or an option cannot be used, or the folder holds the data of another
            configuration, or other files.
        OSError: The disk is full.
    """
    # Both before the folder is locked: a mistake should leave no folder behind.
    run = choose(_ENGINES, engine, "--engine")
    options = Options(parse_memory(memory), max_bad_rows, tables, export, beam_options, beam_temp)
    _check_options(engine, options)
    if config.training.input == "stream":
        check_installed()
    again = "Then give the same command again: it goes on with what is whole."
    with explain_full_disk(folder, again), exclusive(folder, "prepare"):
        # Looked at under the lock: another process may have finished it meanwhile.
        if data_folder.is_whole(folder):
            data_folder.check_fits(folder, config)
            # Of a preparation that was killed between its last two steps.
            discard(folder / SCRATCH)
        else:
            with preparing(folder, key_of(config, engine, max_bad_rows)):
                run(config, folder, options)
        if config.training.input == "stream":
            encoder = data_folder.load_encoder(folder)
            write_shards(data_folder.load(folder, config, encoder), folder)
    return DataReport.load(folder)


def parse_memory(text: str) -> int:
    """Returns a number of bytes that is written as people do.

    >>> parse_memory("4GB"), parse_memory("512 MB"), parse_memory("1GiB")
    (4000000000, 512000000, 1073741824)

    Raises:
        ConfigError: It is no such number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found:
        raise ConfigError(f"--memory={text!r} must be a number of bytes, such as 4GB or 512MB.")
    number, unit, binary = found.groups()
    # Of 1,000 where people write GB, of 1,024 where they write GiB.
    factor = _UNITS[unit]
    if binary:
        factor = 1024 ** list(_UNITS).index(unit)
    return int(float(number) * factor)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of engines; see `prepare_folder`."""

    memory: int
    max_bad_rows: int | None
    tables: str
    export: str
    beam_options: str
    beam_temp: str


def _check_options(engine: str, options: Options) -> None:
    """Refuses options that the engine does not read."""
    if engine == "bigquery" and options.max_bad_rows is not None:
        raise ConfigError(
            f"--max_bad_rows={options.max_bad_rows} is of files of text, and --engine=bigquery "
            "reads tables: leave it out."
        )
    for name, reader in _READ_BY.items():
        value = getattr(options, name)
        if value and engine != reader:
            raise ConfigError(f"--{name}={value!r} is of --engine={reader}: leave it out.")


def _prepare_in_memory(config: Config, folder: Path, options: Options) -> None:
    """Prepares a log that fits into memory, whatever that is."""
    prepared = prepare(with_bad_rows(config, options.max_bad_rows))
    if prepared.report is not None:
        check_bad_rows(prepared.report.dropped, options.max_bad_rows)
    prepared.encoder.save(folder / "encoder")
    # As it was given: a run that shares the folder compares its own with it.
    data_folder.save(dataclasses.replace(prepared, config=config), folder)


def _prepare_on_disk(config: Config, folder: Path, options: Options) -> None:
    prepare_on_disk(config, folder, options.memory, options.max_bad_rows)


def _prepare_in_warehouse(config: Config, folder: Path, options: Options) -> None:
    prepare_in_warehouse(
        config, folder, options.memory, tables=options.tables, export=options.export
    )


def _prepare_on_beam(config: Config, folder: Path, options: Options) -> None:
    prepare_on_beam(
        config,
        folder,
        options.memory,
        options.max_bad_rows,
        pipeline=options.beam_options,
        temp=options.beam_temp,
    )


_ENGINES: dict[str, Callable[[Config, Path, Options], None]] = {
    "memory": _prepare_in_memory,
    "duckdb": _prepare_on_disk,
    "bigquery": _prepare_in_warehouse,
    "beam": _prepare_on_beam,
}
