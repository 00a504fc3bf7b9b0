"""The engine "duckdb": prepares a log that is larger than memory.

Its rows are read, filtered and divided in a database on the disk, of which
`twotower.pipeline.engines.writer` makes the folder.
"""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config
from twotower.features.spec import load_spec
from twotower.pipeline.engines.bad_rows import check_bad_rows, with_bad_rows
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.divide import split_log
from twotower.pipeline.engines.log import Log, read_log
from twotower.pipeline.engines.rows import filter_log
from twotower.pipeline.engines.supported import check_supported
from twotower.pipeline.engines.writer import write_folder
from twotower.pipeline.event_weights import with_event_weights


def prepare_on_disk(
    config: Config, folder: Path, memory: int, max_bad_rows: int | None = None
) -> None:
    """Prepares a log into a folder, of whose rows only blocks are in memory.

    Args:
        config: Configuration whose data, split, features and labels are prepared.
        folder: Folder to write to, with the folder `SCRATCH` in it.
        memory: Memory in bytes that the process keeps to, as long as users and items leave room.
        max_bad_rows: Number of rows with other fields than the header that may be left out; None
            for what `bad_rows` of the tables says.

    Raises:
        ConfigError: The data cannot be used, or an option is not done here.
        OSError: The disk is full.
    """
    spec = with_event_weights(load_spec(config.features), config)
    # Before the first row is read: a log that needs this engine is read for hours.
    check_supported(config, spec, "duckdb")

    def bring(database: Database) -> Log:
        log = read_log(database, with_bad_rows(config, max_bad_rows), spec, folder)
        # Before anything is filtered or written.
        check_bad_rows(log.dataset.dropped, max_bad_rows)
        log = filter_log(database, log, config.data)
        return split_log(database, log, config.split)

    write_folder(bring, config, spec, folder, memory)
