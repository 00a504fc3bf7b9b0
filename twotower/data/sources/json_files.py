"""Reader of JSON: an object a line, an array of objects, or a mapping of users to their items."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.json as arrow_json

from twotower.config import TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.nested import array_of_values
from twotower.data.sources.content import Content, marked_encoding

_EXACT = 2.0**53  # whole numbers beyond it are not exact as floats
_SHOWN = 80  # characters of a line that a message shows
_KEYS = {"user_id", "item_id"}


def read(content: Content, config: TableConfig, name: str) -> tuple[pa.Table, Callable[[int], str]]:
    """Reads the objects as rows, with the types that JSON gives them.

    Times that are written as text stay text. A field of several types becomes text.

    Args:
        content: The file.
        config: Its options, of which the mapped columns tell a table by columns from users.
        name: Name of the table in the configuration, for messages.

    Returns:
        The table, and a function from the number of a row to its place in the file.

    Raises:
        ConfigError: It is no such JSON.
    """
    head = content.head()
    encoding = marked_encoding(head) or "utf-8"
    text = head.decode(encoding, errors="replace").lstrip("\ufeff \r\n\t")

    def locate(row: int) -> str:
        lines = _decode(content, encoding, name).splitlines()
        numbers = (number for number, line in enumerate(lines, 1) if line.strip())
        return f"line {next(itertools.islice(numbers, row, None))}"

    if text.startswith("{") and _is_line(text):
        # Arrow's parser reads no other encoding.
        if encoding == "utf-8":
            try:
                return _read_lines(content), locate
            except pa.ArrowInvalid:
                # A field of several types, or a bad line, which is told below.
                pass
        return _read_slowly(_decode(content, encoding, name), content, name), locate
    value = _load(_decode(content, encoding, name), content, name)
    table = _table_of(value, config)
    if table is None:
        raise ConfigError(
            f"{name}: {content.path} is JSON of another form than these: an object a line, an "
            "array of objects, columns of equal lengths, or a mapping of users to items such as "
            '{"u1": {"i7": 4.5}} or {"u1": ["i7"]}. It begins with '
            f"{text[:_SHOWN]!r}."
        )
    return table, lambda row: f"row {row + 1}"


def _is_line(text: str) -> bool:
    """Returns whether the first line of a text is one whole object."""
    first, _, rest = text.partition("\n")
    # One line that is the whole file may be a mapping of users.
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return False
    return True


def _read_lines(content: Content) -> pa.Table:
    """Returns the objects of lines by Arrow's parser.

    Raises:
        pa.ArrowInvalid: A field has several types, or numbers that a float does not hold.
    """

    def read(schema: pa.Schema | None) -> pa.Table:
        source: Any = str(content.path) if content.data is None else io.BytesIO(content.data)
        # Objects over several lines are read as a whole, and would hide a broken line.
        options = arrow_json.ParseOptions(explicit_schema=schema, newlines_in_values=False)
        return arrow_json.read_json(source, parse_options=options)

    table = read(None)
    # Text that looks like a time stays text: the contract reads it by its form, and Arrow guesses.
    times = [field.name for field in table.schema if pa.types.is_timestamp(field.type)]
    if times:
        table = read(pa.schema([(name, pa.string()) for name in times]))
    for column in table.columns:
        if not pa.types.is_floating(column.type):
            continue
        # An id beyond 2^53 shares its float with its neighbours.
        if pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py():
            raise pa.ArrowInvalid("digits would be lost")
    return table


def _read_slowly(text: str, content: Content, name: str) -> pa.Table:
    """Returns the objects of lines by Python's parser, which takes fields of several types."""
    objects = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_int=_whole)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            bad.append((number, line))
    if bad:
        number, line = bad[0]
        others = f" (and {len(bad) - 1:,} more such lines)" if len(bad) > 1 else ""
        raise ConfigError(
            f"{name}: {content.path}, line {number}: {line[:_SHOWN]!r} is no JSON object{others}."
        )
    return _rows(objects)


def _decode(content: Content, encoding: str, name: str) -> str:
    try:
        return content.whole().decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: {content.path} is not {encoding}: {error}.") from None


def _load(text: str, content: Content, name: str) -> Any:
    try:
        return json.loads(text, parse_int=_whole)
    except json.JSONDecodeError as error:
        shown = text[max(error.pos - _SHOWN // 2, 0) :][:_SHOWN]
        raise ConfigError(
            f"{name}: {content.path}, line {error.lineno}: no JSON: {error.msg} near {shown!r}."
        ) from None
    # A file can have more levels than the parser's stack.
    except RecursionError:
        raise ConfigError(f"{name}: {content.path} is JSON of too many levels.") from None


def _whole(digits: str) -> int | str:
    """Returns a whole number; one that no int64 holds stays text, digit for digit."""
    return int(digits) if len(digits) < 19 else digits


def _table_of(value: Any, config: TableConfig) -> pa.Table | None:
    """Returns the rows of a JSON value; None for one that has none."""
    if isinstance(value, list):
        return _rows(value) if value and all(isinstance(row, dict) for row in value) else None
    if not isinstance(value, dict) or not value:
        return None
    members = list(value.values())
    only = members[0]
    # {"events": [{...}, ...]}
    if len(members) == 1 and isinstance(only, list) and only and isinstance(only[0], dict):
        return _table_of(only, config)
    if _is_by_column(value, config):
        columns = [list(m.values()) if isinstance(m, dict) else m for m in members]
        return pa.table([array_of_values(column) for column in columns], names=list(value))
    if not any(isinstance(member, (dict, list)) for member in members):
        return _rows([value])
    if all(isinstance(member, (dict, list)) for member in members):
        return _rows(_rows_of_users(value))
    return None


def _is_by_column(value: Mapping[str, Any], config: TableConfig) -> bool:
    """Returns whether a mapping is a table by its columns, as frames of pandas are written."""
    members = list(value.values())
    # pandas numbers the rows of each column from 0; users are hardly called so, all of them.
    if all(isinstance(member, dict) for member in members):
        numbers = [str(i) for i in range(len(members[0]))]
        return all(list(member) == numbers for member in members)
    if all(isinstance(member, list) for member in members):
        # Lists of equal length might be users with as many items: the names of columns decide.
        are_ours = set(value) & (_KEYS | set(config.columns.values()))
        return bool(are_ours) and len({len(member) for member in members}) == 1
    return False


def _rows_of_users(value: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yields the rows of {user: {item: rating}}, {user: [item]} and {user: [{...}]}."""
    for user, items in value.items():
        if isinstance(items, dict):
            for item, rating in items.items():
                fields = rating if isinstance(rating, dict) else {"rating": rating}
                yield {"user_id": user, "item_id": item, **fields}
            continue
        for item in items:
            fields = item if isinstance(item, dict) else {"item_id": item}
            yield {"user_id": user, **fields}


def _rows(objects: Iterable[dict[str, Any]]) -> pa.Table:
    rows = list(objects)
    # A dict rather than a set: names keep the order in which they first appear.
    names = list(dict.fromkeys(name for row in rows for name in row))
    # Objects need not have the same fields.
    columns = [array_of_values([row.get(name) for row in rows]) for name in names]
    return pa.table(columns, names=names)
