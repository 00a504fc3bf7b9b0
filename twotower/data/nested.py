"""Fields of structs, and of JSON objects written as text, as columns of their own."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.json

from twotower.core.arrow import pc
from twotower.data.columns import BadValue, first_value, value_to_text


def expand_objects(table: pa.Table, *, required: set[str]) -> pa.Table:
    """Replaces each column of structs or JSON objects by columns `column.field`.

    Args:
        table: The table as it was read.
        required: Columns whose fields are asked for. In these a value that is no JSON object is an
            error, while another column of which only some values are objects stays text.

    Raises:
        BadValue: A value of a required column is no JSON object.
    """
    expanded: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_string(column.type) and _is_object(first_value(column)):
            try:
                column = _parse(column)
            except BadValue:
                if name in required:
                    raise
        expanded |= _fields(name, column)
    return pa.table(expanded)


def _fields(name: str, column: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """Returns the fields of a column of structs by their names, those of nested structs too."""
    if not pa.types.is_struct(column.type):
        return {name: column}
    fields: dict[str, pa.ChunkedArray] = {}
    for field, values in zip(column.type, column.flatten(), strict=True):
        fields |= _fields(f"{name}.{field.name}", values)
    return fields


def _is_object(text: str | None) -> bool:
    if text is None or not text.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _parse(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns JSON objects as structs, null as a struct of nulls.

    Types of a field that differ between rows become text.
    """
    one_line = pc.replace_substring_regex(column, r"[\r\n]+", " ")
    lines = pc.fill_null(one_line, "{}").to_pylist()
    # A line is an object for Arrow's reader.
    # One more object than there are rows: Arrow refuses text in which no object has a field.
    text = "\n".join([*lines, '{"": null}']).encode()
    options = pyarrow.json.ReadOptions(block_size=len(text) + 1, use_threads=False)
    try:
        table = pyarrow.json.read_json(io.BytesIO(text), read_options=options)
        if len(table) != len(lines) + 1:
            raise pa.ArrowInvalid("a value holds several objects")
    except pa.ArrowInvalid:
        return _parse_one_by_one(lines)
    # Without the empty name, which came with the additional object.
    names = [name for name in table.column_names if name]
    table = table.select(names).slice(0, len(lines)).combine_chunks()
    return pa.chunked_array([table.to_struct_array().combine_chunks()])


def _parse_one_by_one(lines: list[str]) -> pa.ChunkedArray:
    """Parses with Python's parser, which is slower and accepts fields of several types."""
    objects = []
    for row, line in enumerate(lines):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise BadValue(row, line, "a JSON object")
        objects.append(value)
    names = dict.fromkeys(name for value in objects for name in value)
    arrays = {name: _array([value.get(name) for value in objects]) for name in names}
    return pa.chunked_array([pa.StructArray.from_arrays(list(arrays.values()), list(arrays))])


def _array(values: list) -> pa.Array:
    """Returns values of one type as that type.

    Values of several types become text, or lists of text where all are lists.
    """
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if not all(value is None or isinstance(value, list) for value in values):
            return pa.array([value_to_text(value) for value in values], pa.string())
    lists = [value and [value_to_text(part) for part in value] for value in values]
    return pa.array(lists, pa.list_(pa.string()))
