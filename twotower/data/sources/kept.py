"""Rows that a run keeps in its own folder, so that it needs nothing outside of it.

A path "run:NAME" of `config.data` is a file below `data/rows` of the run's folder, wherever that is
moved to. `twotower.api.fit` keeps the tables it is given there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.config import DataConfig, TableConfig
from twotower.core.errors import ConfigError
from twotower.core.files import atomic

PREFIX = "run:"
TABLES = ("interactions", "user_table", "item_table", "validation", "test")  # of `config.data`


def rows_folder(workdir: Path) -> Path:
    """Returns the folder of the rows that a run keeps."""
    return workdir / "data" / "rows"


def locate(config: DataConfig, workdir: Path | None) -> DataConfig:
    """Returns the options with the paths of kept rows inside the folder of a run.

    Args:
        config: Options of the data.
        workdir: Folder of the run; None where there is none.

    Raises:
        ConfigError: A kept table is named and there is no such file, or no run.
    """
    tables = {}
    for name in TABLES:
        table: TableConfig = getattr(config, name)
        if not table.path.startswith(PREFIX):
            continue
        field = f"config.data.{name}.path={table.path!r}"
        if workdir is None:
            raise ConfigError(f"{field} names rows in the folder of a run, and there is no run.")
        path = rows_folder(workdir) / table.path.removeprefix(PREFIX)
        if not path.exists():
            raise ConfigError(
                f"{field}: the run in {workdir} keeps no such rows ({path} is missing). Such a "
                "path is for rows that tt.fit has put there; name a file of your own."
            )
        tables[name] = dataclasses.replace(table, path=str(path))
    return dataclasses.replace(config, **tables)


def keep(tables: Mapping[str, pa.Table], workdir: Path) -> None:
    """Writes tables into the folder of a run, one Parquet file each.

    Args:
        tables: Tables by their names in `config.data`, with our names and types of columns.
        workdir: Folder of the run.
    """
    for name, table in tables.items():
        with atomic(rows_folder(workdir) / f"{name}.parquet") as temporary:
            pq.write_table(_with_typed_times(table), temporary)


def has_kept(tables: Mapping[str, pa.Table], workdir: Path) -> bool:
    """Returns whether a run keeps exactly these tables."""
    folder = rows_folder(workdir)
    names = {path.stem for path in folder.glob("*.parquet")}
    # A table more or less is another log.
    if names != set(tables):
        return False
    for name, table in tables.items():
        kept = pq.read_table(folder / f"{name}.parquet")
        # Parquet keeps no dictionaries and chunks of its own: the values are what counts.
        if not kept.equals(_with_typed_times(table)):
            return False
    return True


def _with_typed_times(table: pa.Table) -> pa.Table:
    """Returns rows with times of a type that says so: options give the unit of requests instead."""
    if "timestamp" not in table.column_names:
        return table
    # Parquet has no type of seconds.
    times = table["timestamp"].cast(pa.timestamp("s")).cast(pa.timestamp("ms"))
    return table.set_column(table.column_names.index("timestamp"), "timestamp", times)
