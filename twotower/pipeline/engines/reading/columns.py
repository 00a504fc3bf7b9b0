"""The columns of a log that lies in several files, as a database has them."""

from __future__ import annotations

import base64

import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.data.contract import KEYS


class Columns:
    """The columns of a log, which all of its files have in the same order and types.

    Args:
        engine: Name of the engine, for messages.
        divided_by: Option that divides the log by its times, which it must have then; empty for
            none.

    Attributes:
        schema: Schema of the rows under our names, with ids as the files have them.
        names: Column that is no id -> its column in the database.
    """

    def __init__(self, engine: str, divided_by: str = ""):
        self._engine = engine
        self._divided_by = divided_by
        self.schema: pa.Schema = pa.schema([])
        self.names: dict[str, str] = {}

    def begin(self, schema: pa.Schema, path: str) -> None:
        """Takes the columns of the first rows.

        Args:
            schema: Schema of the rows.
            path: Path of their file, for messages.

        Raises:
            ConfigError: Rows lack the times that divide them, or have values that a database would
                change.
        """
        for field in schema:
            # UUIDs are known as ids, which become text.
            kind = field.type.storage_type if _is_uuid_id(field) else field.type
            if not _is_kept(kind):
                raise ConfigError(
                    f"interactions: the column {field.name!r} of {path} is of type {field.type}, "
                    f"which --engine={self._engine} does not keep: write it with another type, "
                    "leave it out, or use --engine=memory."
                )
        self.schema = schema
        others = [name for name in schema.names if name not in KEYS]
        # Names of their own: those of the files may differ by their case alone.
        self.names = {name: f"c{number}" for number, name in enumerate(others)}
        # Told at the first rows: a log that needs such an engine is read for long.
        if "timestamp" not in self.names and self._divided_by:
            raise ConfigError(
                f"{self._divided_by} needs a column 'timestamp', and {path} has none: name it by "
                "config.data.interactions.columns={'timestamp': ...}, or set "
                "config.split.kind='leave_last_out' (the last rows of each user, by the order of "
                "the file) or 'random', with validation_by='kind'."
            )

    def widen(self, schema: pa.Schema, path: str, *, is_text: bool) -> list[str]:
        """Takes the columns of further rows.

        Args:
            schema: Schema of the rows.
            path: Path of their file, for messages.
            is_text: Whether that is a file of text.

        Returns:
            The columns that were of whole numbers so far, and are not any more.

        Raises:
            ConfigError: They are others than those before.
        """
        if schema.equals(self.schema):
            return []
        # A database has one table: filling columns in would be a second way to join files.
        if schema.names != self.schema.names:
            raise ConfigError(
                f"interactions: {path} has the columns {', '.join(schema.names)}, and the files "
                f"before {', '.join(self.names)}: use --engine=memory, which fills what is missing."
            )
        widened = []
        for name in schema.names:
            before = self.schema.field(name).type
            now = schema.field(name).type
            # Of text what follows may be no whole number; files of Parquet chose their types.
            is_number = name == "weight" or (is_text and name not in KEYS)
            is_joined = is_number and {before, now} == {pa.int64(), pa.float64()}
            if before != now and not is_joined:
                raise ConfigError(
                    f"interactions: the column {name!r} is {now} in {path}, and {before} in the "
                    "files before: write it with one type, or use --engine=memory."
                )
            # Whole numbers until the first that is none.
            if before == pa.int64() and now == pa.float64():
                number = self.schema.names.index(name)
                self.schema = self.schema.set(number, pa.field(name, now))
                widened.append(name)
        return widened


def _is_uuid_id(field: pa.Field) -> bool:
    return field.name in KEYS and field.type == pa.uuid()


def _is_kept(kind: pa.DataType) -> bool:
    """Returns whether values of a type come out of the database as they went in."""
    lost = (
        pa.types.is_decimal256,
        pa.types.is_float16,
        pa.types.is_duration,
        pa.types.is_interval,
        lambda kind: isinstance(kind, pa.BaseExtensionType),
    )
    if any(is_lost(kind) for is_lost in lost):
        return False
    # Those of lists and structs, which are nested to any depth.
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    # A dictionary inside of another column does not come back as one.
    return all(_is_kept(each) and not pa.types.is_dictionary(each) for each in inner)


def schema_to_text(schema: pa.Schema) -> str:
    """Returns a schema as text, for JSON."""
    return base64.b64encode(schema.serialize()).decode()


def schema_from_text(text: str) -> pa.Schema:
    """Returns the schema of `schema_to_text`."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
