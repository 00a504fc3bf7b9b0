"""Fields of structs, and of JSON objects written as text, as columns of their own."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.json

from twotower.core.arrow import BadValue, pc


def expand_objects(table: pa.Table, *, required: set[str]) -> pa.Table:
    """Replaces each column of structs or JSON objects by columns `column.field`.

    Args:
        table: Raw table.
        required: Columns whose fields the configuration names. A value of these that is no JSON
            object is an error, while any other column with such a value stays text.

    Raises:
        BadValue: A value of a required column is no JSON object.
    """
    expanded: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        column = table[name]
        # The first value tells most columns of text apart without parsing all of them.
        if pa.types.is_string(column.type) and _is_object(first_value(column)):
            try:
                column = _parse(column)
            except BadValue:
                # Other columns may hold objects by chance.
                if name in required:
                    raise
        expanded |= _fields(name, column)
    return pa.table(expanded)


def _fields(name: str, column: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """Returns the fields of a column of structs by their names, those of nested structs too."""
    if not pa.types.is_struct(column.type):
        return {name: column}
    fields: dict[str, pa.ChunkedArray] = {}
    # `flatten` also turns the fields of a null struct into nulls.
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
    # Line breaks between the parts of an object are white space in JSON.
    one_line = pc.replace_substring_regex(column, r"[\r\n]+", " ")
    lines = pc.fill_null(one_line, "{}").to_pylist()
    # Arrow's reader takes one object a line. One more object than there are rows: Arrow refuses
    # text in which no object has a field.
    text = "\n".join([*lines, '{"": null}']).encode()
    # One block and one thread: types are inferred by block, and rows must keep their order.
    options = pyarrow.json.ReadOptions(block_size=len(text) + 1, use_threads=False)
    try:
        table = pyarrow.json.read_json(io.BytesIO(text), read_options=options)
        if len(table) != len(lines) + 1:
            raise pa.ArrowInvalid("a value holds several objects")
    except pa.ArrowInvalid:
        return _parse_one_by_one(lines)
    # Without the empty name, which came with the additional object.
    names = [name for name in table.column_names if name]
    rows = table.select(names).slice(0, len(lines))
    structs = rows.combine_chunks().to_struct_array()
    return pa.chunked_array([structs.combine_chunks()])


def _parse_one_by_one(lines: list[str]) -> pa.ChunkedArray:
    """Returns JSON objects as structs like `_parse`, by Python's parser.

    It is slower, and accepts fields of several types.
    """
    objects = []
    for row, line in enumerate(lines):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise BadValue(line, "is not a JSON object", row)
        objects.append(value)
    # A dict rather than a set: names keep the order in which they first appear.
    names = list(dict.fromkeys(name for value in objects for name in value))
    arrays = []
    for name in names:
        arrays.append(array_of_values([value.get(name) for value in objects]))
    return pa.chunked_array([pa.StructArray.from_arrays(arrays, names)])


def array_of_values(values: list) -> pa.Array:
    """Returns values of one type as that type.

    Values of several types become text, or lists of text where all are lists.
    """
    try:
        # Arrow infers one type for all values, or fails.
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if not all(value is None or isinstance(value, list) for value in values):
            return pa.array([value_to_text(value) for value in values], pa.string())
    lists = []
    for value in values:
        # Null and the empty list stay as they are.
        lists.append(value and [value_to_text(part) for part in value])
    return pa.array(lists, pa.list_(pa.string()))


def first_value(column: pa.ChunkedArray) -> str | None:
    """Returns the first value that is not null, or None without one."""
    row = pc.index(pc.is_valid(column), True).as_py()
    if row < 0:
        return None
    return column[row].as_py()


def value_to_text(value: object) -> str | None:
    """Returns text as it is, None as None, and any other value as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)
