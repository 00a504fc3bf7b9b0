"""Lists of users read from files, and lists of items as text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from twotower.core.errors import ConfigError
from twotower.retrieval.retriever import Recommendation

WIDEST = 48  # characters of a column


def read_ids(path: Path) -> list[str]:
    """The user ids in a file: at least one.

    Raises:
        ConfigError: the file is not there, cannot be read, or holds no id.
    """
    if not path.is_file():
        raise ConfigError(f"--users={path} is not a file.")
    try:
        ids = _read_ids(path)
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise ConfigError(f"--users={path} cannot be read: {error}.") from error
    if not ids:
        raise ConfigError(f"--users={path} holds no user id.")
    return ids


def _read_ids(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    elif path.suffix == ".csv" or path.name.endswith(".csv.gz"):
        as_text = pyarrow.csv.ConvertOptions(column_types={"user_id": "string"})
        table = pyarrow.csv.read_csv(path, convert_options=as_text)
    else:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line and line != "user_id"]
    if "user_id" not in table.column_names:
        raise ConfigError(
            f"--users={path} has no column 'user_id'; it has: {', '.join(table.column_names)}."
        )
    return [str(user) for user in table["user_id"].to_pylist() if user is not None]


def format_items(items: Sequence[Recommendation], *, ranked: bool = True) -> str:
    """A table: rank, item, display columns, score."""
    if not items:
        return "  (nothing)"
    columns = list(items[0].display)
    head = [*(["rank"] if ranked else []), "item", *columns, *(["score"] if ranked else [])]
    rows = [
        [
            *([str(rank)] if ranked else []),
            item.item_id,
            *(_text(item.display[name]) for name in columns),
            *([f"{item.score:.4f}"] if ranked else []),
        ]
        for rank, item in enumerate(items, 1)
    ]
    widths = [max(_width(cell) for cell in column) for column in zip(head, *rows)]
    return "\n".join(
        "  " + "  ".join(_fill(cell, width) for cell, width in zip(row, widths))
        for row in [head, *rows]
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = (
        f"{value:.2f}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _fill(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """Cells on a terminal: wide letters take two, marks that sit on others none."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )
