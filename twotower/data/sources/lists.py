"""Pair files ("user item" a line) and user-list files ("user item item ..." a line), as papers pass
them on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from twotower.config import TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.sources import files as tables


def read_pairs(config: TableConfig, name: str) -> pa.Table:
    """user_id and item_id of lines of two words, in the order of the file; empty lines are passed
    over."""
    return _read(config, name, pairs=True)


def read_user_lists(config: TableConfig, name: str) -> pa.Table:
    """user_id and item_id of lines of a user and that user's items; a user without items has no
    rows."""
    return _read(config, name, pairs=False)


def _read(config: TableConfig, name: str, *, pairs: bool) -> pa.Table:
    parts = [
        _rows(path, name, config.encoding, pairs=pairs)
        for path in tables.find(config.path, name, "csv")
    ]
    table = pa.concat_tables(parts)
    if not len(table):
        raise ConfigError(
            f"{name}: {config.path} has no rows; config.data.{name}.path must name a file with data."
        )
    return table


def _rows(path: object, name: str, encoding: str, *, pairs: bool) -> pa.Table:
    with pa.input_stream(str(path), compression="detect") as stream:
        try:
            text = stream.read().decode(encoding)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}: {path} is not {encoding}: {error}; set config.data.{name}.encoding."
            ) from error
    lines = pa.array(text.splitlines(), pa.string())
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines))
    lengths = pc.list_value_length(words).to_numpy(zero_copy_only=False).copy()
    flat = words.flatten()
    # An empty line is one empty word.
    lengths[pc.equal(pc.list_element(words, 0), "").to_numpy(zero_copy_only=False)] = 0
    flat = flat.filter(pc.not_equal(flat, ""))
    if pairs and np.any(bad := (lengths != 2) & (lengths != 0)):
        row = int(np.flatnonzero(bad)[0])
        raise ConfigError(
            f"{name}: {path}, line {row + 1}: {lines[row].as_py()[:80]!r} is not one pair 'user item'."
        )
    first = np.cumsum(lengths) - lengths
    is_item = np.ones(len(flat), bool)
    is_item[first[lengths > 0]] = False
    users = np.repeat(first, np.maximum(lengths - 1, 0))
    return pa.table(
        {"user_id": flat.take(pa.array(users)), "item_id": flat.filter(pa.array(is_item))}
    )
