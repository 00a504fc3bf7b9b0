"""Readers of pair files ("user item" a line) and user-list files ("user item item ..." a line).

Many papers publish their logs in these forms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.config import TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.sources import files


def read_pairs(config: TableConfig, name: str) -> pa.Table:
    """Reads lines of two words as user_id and item_id, in the order of the file.

    Empty lines are skipped.
    """
    return _read(config, name, pairs=True)


def read_user_lists(config: TableConfig, name: str) -> pa.Table:
    """Reads lines of a user and that user's items as user_id and item_id.

    A user without items has no rows.
    """
    return _read(config, name, pairs=False)


def _read(config: TableConfig, name: str, *, pairs: bool) -> pa.Table:
    paths = files.find_files(config.path, name, "csv")
    parts = [_read_file(path, name, config.encoding, pairs=pairs) for path in paths]
    table = pa.concat_tables(parts)
    if not len(table):
        raise ConfigError(
            f"{name}: {config.path} has no rows; config.data.{name}.path must name a file with "
            "data."
        )
    return table


def _read_file(path: Path, name: str, encoding: str, *, pairs: bool) -> pa.Table:
    """Reads one file with Arrow's functions on whole columns, without a loop over lines."""
    # Whole files at once: such logs are small, and Arrow's functions work on columns.
    with pa.input_stream(str(path), compression="detect") as stream:
        try:
            text = stream.read().decode(encoding)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}: {path} is not {encoding}: {error}; set config.data.{name}.encoding."
            ) from error
    lines = pa.array(text.splitlines(), pa.string())
    words_of_line = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines))
    counts = pc.list_value_length(words_of_line)
    # A copy, since Arrow's own buffer cannot be written to.
    lengths = counts.to_numpy(zero_copy_only=False).copy()
    # One flat array of words, in which a line is known by its first word and its length.
    words = words_of_line.flatten()
    # Arrow splits an empty line into one empty word.
    is_empty = pc.equal(pc.list_element(words_of_line, 0), "")
    lengths[is_empty.to_numpy(zero_copy_only=False)] = 0
    words = words.filter(pc.not_equal(words, ""))
    if pairs:
        _check_pairs(lengths, lines, f"{name}: {path}")
    # Position of the first word of each line among all words.
    first_word = np.cumsum(lengths) - lengths
    is_item = np.ones(len(words), bool)
    is_item[first_word[lengths > 0]] = False
    # The first word of a line is its user, once for each item.
    users = np.repeat(first_word, np.maximum(lengths - 1, 0))
    return pa.table(
        {"user_id": words.take(pa.array(users)), "item_id": words.filter(pa.array(is_item))}
    )


def _check_pairs(lengths: np.ndarray, lines: pa.Array, location: str) -> None:
    """Refuses a line that has words, but not two.

    Args:
        lengths: Number of words of each line, int [lines].
        lines: Text of each line.
        location: Name of the table and its file, for the message.
    """
    bad = np.flatnonzero((lengths != 2) & (lengths != 0))
    if bad.size:
        line = int(bad[0])
        # Cut: a whole list of items would fill the screen.
        text = lines[line].as_py()[:80]
        raise ConfigError(f"{location}, line {line + 1}: {text!r} is not one pair 'user item'.")
