"""Bad rows of text files: how many may be left out, and which were."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from twotower.config import Config, TableConfig
from twotower.core.errors import ConfigError
from twotower.data.dataset import Dropped
from twotower.data.sources.load import SKIPPED

_TABLES = ("interactions", "user_table", "item_table", "validation", "test")


def with_bad_rows(config: Config, max_bad_rows: int | None) -> Config:
    """Returns the configuration by which rows are read where some bad ones may be left out."""
    if max_bad_rows is None:
        return config
    tables = {}
    for name in _TABLES:
        table: TableConfig = getattr(config.data, name)
        # A number that may be left out asks for leaving out; "skip" and "pad" are left as they are.
        if table.bad_rows == "refuse":
            tables[name] = dataclasses.replace(table, bad_rows="skip")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **tables))


def check_bad_rows(dropped: Iterable[Dropped], max_bad_rows: int | None) -> None:
    """Refuses more bad rows than may be left out, with the first of them.

    Args:
        dropped: Notes on the rows that were left out.
        max_bad_rows: Number that may be; None for any.

    Raises:
        ConfigError: There are more.
    """
    # Rows without ids and the like are no bad rows.
    notes = [note for note in dropped if note.reason.endswith(SKIPPED)]
    count = sum(note.rows for note in notes)
    if max_bad_rows is None or count <= max_bad_rows:
        return
    # Some of them alone, as many as each note kept.
    locations = [location for note in notes for location in note.locations]
    raise ConfigError(
        f"{count:,} rows have other fields than the header, more than --max_bad_rows="
        f"{max_bad_rows}: {'; '.join(locations)}. Mend them, or allow more."
    )
