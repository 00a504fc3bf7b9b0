"""Readers of logs that have no row for each event: pairs, lists of users, baskets and matrices.

Many papers publish their logs as "user item" or "user item item ..." a line; tills write a basket a
line; ratings of a survey are a matrix of users by items.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.config import TableConfig
from twotower.core.arrow import BadValue, pc
from twotower.core.errors import ConfigError
from twotower.data.contract import NumberForm
from twotower.data.sources import content, delimited, files
from twotower.data.tables import Origin

# Options of `TableConfig` that lines of words have no use for.
_OF_COLUMNS = ("names", "columns", "bad_rows", "timestamp_format", "timestamp_unit")
_SHOWN = 80  # characters of a line that a message shows


def read_pairs(config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    """Reads lines of two words as user_id and item_id, in the order of the file.

    Empty lines are skipped.
    """
    return _read(config, name, form="pairs")


def read_user_lists(config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    """Reads lines of a user and that user's items as user_id and item_id.

    A user without items has no rows.
    """
    return _read(config, name, form="user_lists")


def read_baskets(config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    """Reads lines of items as user_id and item_id.

    Each line is the basket of a user of its own, who is named by the number of the line.
    """
    return _read(config, name, form="baskets")


def read_matrix(config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    """Reads a table of users by items as user_id, item_id and rating, user by user.

    The header names the items, after the column of the users. Empty cells and zeros are no rows;
    where all others are 1, there is no rating.
    """
    paths = files.find_files(config.path, name, "csv")
    parts = [_melt(_read_matrix(path, config, name)) for path in paths]
    table, origin = _joined(parts, config, name)
    if "rating" not in table.column_names:
        return table, origin
    # The form of the file says what its cells are.
    form = NumberForm(config.decimal, config.thousands, config.marks)
    try:
        ratings = form.column(table["rating"]).cast(pa.float32())
    except BadValue as error:
        raise ConfigError(f"{name}: {config.path}: the cell {error}") from None
    return table.set_column(table.column_names.index("rating"), "rating", ratings), origin


def _read(config: TableConfig, name: str, *, form: str) -> tuple[pa.Table, Origin]:
    for option in _OF_COLUMNS:
        value = getattr(config, option)
        if value != getattr(TableConfig(), option):
            raise ConfigError(
                f"config.data.{name}.{option}={value!r} changes nothing of lines of users and "
                f"items (source={form!r}): leave it out."
            )
    paths = files.find_files(config.path, name, "csv")
    first = 0
    parts = []
    for path in paths:
        lines = _Lines(path, config, name)
        parts.append(_rows_of(lines, form, first, name))
        # Baskets of several files are different ones.
        first += len(lines.texts)
    return _joined(parts, config, name)


def _joined(parts: list[pa.Table], config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    table = pa.concat_tables(parts, promote_options="permissive")
    if not len(table):
        raise ConfigError(
            f"{name}: {config.path} has no rows; config.data.{name}.path must name a file with "
            "data."
        )
    origin = Origin(
        name=config.path, describe_row=lambda row: f"{config.path}, pair {row + 1}", is_typed=False
    )
    return table, origin


class _Lines:
    """The lines of a file, divided into words.

    Attributes:
        path: Path of the file.
        texts: The lines; empty ones and comments are empty.
        words: All words, one after the other.
        lengths: Number of words of each line, int [lines].
    """

    def __init__(self, path: Path, config: TableConfig, name: str):
        # Whole files at once: such logs are small, and Arrow's functions work on columns.
        found = content.look(path, name, "csv")
        encoding = content.marked_encoding(found.head()) or config.encoding
        try:
            text = found.whole().decode(encoding).lstrip("\ufeff")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name}: {path} is not {encoding}: {error}; set config.data.{name}.encoding."
            ) from error
        lines = text.splitlines()
        for number, line in enumerate(lines):
            is_comment = config.comment and line.startswith(config.comment)
            if number < config.skip_lines or is_comment:
                lines[number] = ""
        self.path = path
        self.texts = lines
        delimiter = _delimiter(config, lines)
        if delimiter != delimited.WHITESPACE:
            logging.info("%s: %s is divided at each %r", name, path, delimiter)
        self.words, self.lengths = _divide(lines, delimiter, config.quoting)


def _delimiter(config: TableConfig, lines: list[str]) -> str:
    """Returns what parts the words of a line.

    That is the configured delimiter. The default one, a comma, is taken where the first line has
    it; in other files it is a tab, a semicolon or a pipe, and where there is none, white space.
    """
    configured = delimited.plain_delimiter(config.delimiter)
    # A delimiter that was set is taken as it is, even where a line has none.
    if configured != TableConfig().delimiter:
        return delimited.WHITESPACE if configured == " " else configured
    first = delimited.first_line(lines, "").strip()
    for separator in (configured, *delimited.SEPARATORS):
        if separator in first:
            return separator
    return delimited.WHITESPACE


def _divide(lines: list[str], delimiter: str, quoting: str) -> tuple[pa.Array, np.ndarray]:
    """Returns all words of lines, and how many each line has: int [lines]."""
    column = pa.array(lines, pa.string())
    if delimiter == delimited.WHITESPACE:
        words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(column))
    # Python's slower parser only where there is a quote: Arrow splits without looking at them.
    elif len(delimiter) == 1 and quoting != "off" and any(quoting in line for line in lines):
        words = pa.array(list(_quoted(lines, delimiter, quoting)), pa.list_(pa.string()))
    else:
        words = pc.split_pattern(column, delimiter)
    line_of_word = pc.list_parent_indices(words)
    flat = pc.utf8_trim_whitespace(words.flatten())
    # A line may end in a delimiter, and an empty line is one empty word to Arrow.
    is_word = pc.not_equal(flat, "")
    counts = np.bincount(line_of_word.filter(is_word).to_numpy(), minlength=len(lines))
    return flat.filter(is_word), counts


def _quoted(lines: list[str], delimiter: str, quoting: str) -> Iterator[list[str]]:
    for line in lines:
        yield from csv.reader([line], delimiter=delimiter, quotechar=quoting) if line else [[]]


def _rows_of(lines: _Lines, form: str, first: int, name: str) -> pa.Table:
    """Returns the rows of the lines of a file.

    Args:
        lines: The lines.
        form: "pairs", "user_lists" or "baskets".
        first: Number of lines before them, by which baskets are told apart.
        name: Name of the table in the configuration, for messages.
    """
    lengths = lines.lengths
    if form == "baskets":
        numbers = np.repeat(np.arange(len(lengths)) + first + 1, lengths)
        return pa.table({"user_id": pa.array(numbers).cast(pa.string()), "item_id": lines.words})
    if form == "pairs":
        _check_pairs(lines, name)
    # Position of the first word of each line among all words.
    first_word = np.cumsum(lengths) - lengths
    is_item = np.ones(len(lines.words), bool)
    is_item[first_word[lengths > 0]] = False
    # The first word of a line is its user, once for each item.
    users = np.repeat(first_word, np.maximum(lengths - 1, 0))
    return pa.table(
        {
            "user_id": lines.words.take(pa.array(users)),
            "item_id": lines.words.filter(pa.array(is_item)),
        }
    )


def _check_pairs(lines: _Lines, name: str) -> None:
    """Refuses lines that have words, but not two."""
    bad = np.flatnonzero((lines.lengths != 2) & (lines.lengths != 0))
    if not bad.size:
        return
    line = int(bad[0])
    others = f" (and {bad.size - 1:,} more such lines)" if bad.size > 1 else ""
    # Cut: a whole list of items would fill the screen.
    text = lines.texts[line][:_SHOWN]
    raise ConfigError(
        f"{name}: {lines.path}, line {line + 1}: {text!r} is not one pair 'user item'{others}. "
        "Lists of items have the source 'user_lists', or 'baskets' where no user is in front; "
        "columns with names, 'csv'."
    )


def _read_matrix(path: Path, config: TableConfig, name: str) -> pa.Table:
    found = content.look(path, name, "csv")
    if found.kind != "csv":
        table, _ = files.read_raw(dataclasses.replace(config, path=str(path)), name, "csv")
        return table
    form = delimited.find_form(found, config, name)
    # By names of our own: a frame of pandas writes none for the column of the users.
    # All of it: thousands of items are a long header.
    text = found.whole().decode(form.encoding, errors="replace").lstrip("\ufeff")
    first = "".join(text.splitlines()[form.skip_lines :][:1])
    header = next(csv.reader([first], delimiter=delimited.arrow_delimiter(form)), [])
    items = [item.strip() for item in header[1:]]
    if len(items) < 2:
        raise ConfigError(
            f"{name}: {path} is no matrix of users by items: its header {first[:_SHOWN]!r} has "
            f"{len(header)} columns."
        )
    # The header is skipped as a line, since its names are given.
    form = dataclasses.replace(form, names=("user_id", *items), skip_lines=form.skip_lines + 1)
    return files.read_file(path, form, name, "csv").table


def _melt(table: pa.Table) -> pa.Table:
    """Returns a row for each cell of a matrix that is neither empty nor zero."""
    users = table[0].cast(pa.string()).combine_chunks()
    masks = []
    cells = []
    for column in table.columns[1:]:
        values = pc.utf8_trim_whitespace(column.cast(pa.string())).combine_chunks()
        is_event = pc.invert(pc.match_substring_regex(values, r"^(0*[.,]?0*|nan|NaN)$"))
        mask = pc.fill_null(is_event, False)
        # A mask and the few cells of each item: all cells as text would take far more than the
        # file.
        masks.append(mask.to_numpy(zero_copy_only=False))
        cells.append(values.filter(mask))
    # [items, users], of which the cells come item by item.
    item_rows, user_rows = np.nonzero(np.array(masks))
    # User by user, as rows of the matrix are; without times this is the order of the log.
    order = pa.array(np.lexsort([item_rows, user_rows]))
    items = pa.array(table.column_names[1:])
    rating = pa.concat_arrays(cells).take(order)
    rows = {
        "user_id": users.take(pa.array(user_rows)).take(order),
        "item_id": items.take(pa.array(item_rows)).take(order),
    }
    # Where all are 1 a cell says that there was an event and no more.
    if not pc.all(pc.match_substring_regex(rating, r"^1([.,]0*)?$")).as_py():
        rows["rating"] = rating
    return pa.table(rows)
