"""The script of BigQuery SQL that filters, orders, codes and divides a log in the warehouse.

Its parts are the templates beside this module. They take names, expressions made by
`twotower.pipeline.engines.warehouse.columns` and numbers; a query of the configuration is a
subquery of its own.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from twotower.config import DataConfig, SplitConfig
from twotower.core.errors import ConfigError
from twotower.data.split import TEST, TRAIN, VALIDATION, held_out_counts
from twotower.pipeline.engines.warehouse.columns import Column, quote
from twotower.pipeline.engines.warehouse.conditions import (
    failed_condition,
    find_texts,
    literal,
)

# Kinds of split that the script has.
_KINDS = ("time", "leave_last_out", "none")
_TEMPLATES = Path(__file__).parent / "templates"
# Patterns of `twotower.core.ids`: whole numbers, words for a missing one, and what is left out.
_IDS = {
    "whole": r"r'^(0|-?[1-9][0-9]*)(\.0+)?$'",
    "missing": r"r'^(?i:nan|none|null|nat|<na>)$'",
    "fraction": r"r'\.0+$'",
}
# A project may begin with a domain and a colon.
_TABLES = re.compile(r"(?:((?:[\w.-]+:)?[\w-]+)\.)?(\w+)\.(\w+)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables that the script leaves, which begin with one name.

    Attributes:
        prefix: PROJECT.DATASET.NAME.
    """

    prefix: str

    @classmethod
    def parse(cls, text: str, project: str) -> Tables:
        """Reads DATASET.NAME or PROJECT.DATASET.NAME.

        Raises:
            ConfigError: It is neither.
        """
        found = _TABLES.fullmatch(text)
        if not found:
            raise ConfigError(
                f"--tables={text!r} must be DATASET.NAME or PROJECT.DATASET.NAME: the engine "
                "bigquery leaves its tables there, such as NAME_rows."
            )
        return cls(f"{found[1] or project}.{found[2]}.{found[3]}")

    def name(self, kind: str) -> str:
        """Returns the full name of a table: "rows", "users", "items", "counts" or "values"."""
        return f"{self.prefix}_{kind}"

    def sql(self, kind: str) -> str:
        """Returns the name of a table as SQL."""
        return quote(self.name(kind))


def divides(split: SplitConfig) -> bool:
    """Returns whether the script divides the rows; else this machine does, when they have come.

    Rows, ties and users are drawn by NumPy's generator, which no SQL has.
    """
    if split.validation_by != "kind" and split.validation > 0:
        return False
    if split.kind == "leave_last_out":
        return split.ties == "file"
    return split.kind in _KINDS


def write_script(
    data: DataConfig,
    split: SplitConfig,
    source: str,
    ids: Mapping[str, str],
    columns: Sequence[Column],
    tables: Tables,
    separators: Mapping[str, str],
) -> str:
    """Returns the script, which a person may read and run as well.

    Args:
        data: Filters of the rows.
        split: Kind of the split.
        source: Table or subquery that has the rows.
        ids: "user_id" and "item_id" -> expression.
        columns: The other columns of the log.
        tables: Tables to leave.
        separators: Columns whose texts are lists, with the text between the members.

    Raises:
        ConfigError: A condition cannot be used.
    """
    by_name = {column.name: column for column in columns}
    typed = [f"{sql} AS {key}" for key, sql in ids.items()]
    typed += [f"{column.sql} AS {column.variable}" for column in columns]
    ordered = ["log_timestamp NULLS LAST", "user_id NULLS LAST", "item_id NULLS LAST"]
    for column in columns:
        ordered += column.sorted
    parts = [
        _fill(
            "source",
            failed_condition=failed_condition(data.where, by_name, separators),
            typed=",\n    ".join(typed),
            source=source,
        ),
        _fill("spellings", side="user", **_IDS),
        _fill("spellings", side="item", **_IDS),
        _fill("order", sorted=",\n      ".join(ordered)),
        _fill("codes", side="user", other="item", table=tables.sql("users")),
        _fill("codes", side="item", other="user", table=tables.sql("items")),
        _fill(
            "conditions",
            users=tables.sql("users"),
            items=tables.sql("items"),
            num_conditions=len(data.where),
        ),
    ]
    texts = [_fill("values", **each._asdict()) for each in find_texts(data.where, by_name)]
    if texts:
        listed = "UNION ALL\n".join(texts)
        parts.append(f"\nCREATE OR REPLACE TABLE {tables.sql('values')} AS\n{listed};\n")
    if data.duplicates != "all":
        function = "MIN" if data.duplicates == "first" else "MAX"
        parts.append(_fill("duplicates", choice=data.duplicates, function=function))
    parts.append("\nSET rows_of_pairs = (SELECT COUNT(*) FROM kept);\n")
    if data.k_core:
        parts.append(_fill("k_core", k=data.k_core))
    parts.append("\nSET num_rows = (SELECT COUNT(*) FROM kept);\n")
    parts.append(_fill("positions"))
    if split.kind == "time" and divides(split):
        parts += _moments(split)
    named = [f"{column.variable} AS {quote(column.name)}" for column in columns]
    parts.append(
        _fill(
            "tables",
            rows=tables.sql("rows"),
            counts=tables.sql("counts"),
            columns=",\n  ".join(named),
            part=_part(split),
            counted=",\n    ".join(_counted(len(data.where), by_name)),
        )
    )
    return "".join(parts)


def write_export(tables: Tables, address: str) -> str:
    """Returns the statements that write the rows and the codes as Parquet.

    Args:
        tables: Tables that the script leaves.
        address: Folder of a bucket, gs://BUCKET/FOLDER.
    """
    parts = []
    # The name of a user in it is for those who read the bucket.
    address = re.sub(r"^gs://[^@/]*@", "gs://", address)
    for kind in ("rows", "users", "items"):
        # BigQuery puts the number of a file in the place of the star.
        uri = literal(f"{address}/{kind}-*.parquet")
        parts.append(_fill("export", uri=uri, table=tables.sql(kind)))
    return "".join(parts)


def _fill(template: str, **values: object) -> str:
    text = (_TEMPLATES / f"{template}.sql").read_text(encoding="utf-8")
    # Strictly: a name without a value would be sent as it is.
    return string.Template(text).substitute(values)


def _moments(split: SplitConfig) -> list[str]:
    """Returns the statements that find the moments which divide the log."""
    # For its refusal of shares that leave nothing to train on.
    held_out_counts(0, split)
    # Test first: validation ends where it begins.
    shares = {"test_begin": split.test, "validation_begin": split.validation}
    parts = []
    for variable, share in shares.items():
        if share > 0:
            parts.append(_fill("moment", variable=variable, share=literal(str(float(share)))))
    return parts


def _part(split: SplitConfig) -> str:
    """Returns the number of the part of a row; see `twotower.data.split`."""
    if not divides(split):
        return "CAST(NULL AS INT64)"
    if split.kind == "time":
        # Where a share rounds to no row the moment is null, and no row is later.
        return (
            f"CASE WHEN log_timestamp >= test_begin THEN {TEST} "
            f"WHEN log_timestamp >= validation_begin THEN {VALIDATION} ELSE {TRAIN} END"
        )
    shares = ((TEST, split.test), (VALIDATION, split.validation))
    parts = [part for part, share in shares if share > 0]
    if split.kind == "none" or not parts:
        return str(TRAIN)
    later = "(ROW_NUMBER() OVER (PARTITION BY user_code ORDER BY position DESC) - 1)"
    cases = [
        f"WHEN DIV({later}, {split.held_out}) = {number} THEN {part}"
        for number, part in enumerate(parts)
    ]
    has_enough = f"COUNT(*) OVER (PARTITION BY user_code) > {2 * split.held_out}"
    return f"IF({has_enough}, CASE {' '.join(cases)} ELSE {TRAIN} END, {TRAIN})"


def _counted(num_conditions: int, columns: Mapping[str, Column]) -> list[str]:
    """Returns the counts of rows that a report tells, over the whole log."""
    has_both = "user_id IS NOT NULL AND item_id IS NOT NULL"
    counted = [
        "COUNT(*) AS rows_of_source",
        "COUNT(user_id) AS rows_with_user",
        f"COUNTIF({has_both}) AS rows_with_both",
    ]
    for number in range(num_conditions):
        counted.append(f"COUNTIF({has_both} AND failed_condition = {number}) AS failed_{number}")
    counted.append(
        f"COUNTIF({has_both} AND failed_condition = {num_conditions} AND log_timestamp IS NULL) "
        "AS rows_without_time"
    )
    if "weight" in columns and columns["weight"].type == pa.float64():
        weight = columns["weight"].variable
        counted.append(f"COUNTIF({weight} < 0 OR IS_INF({weight})) AS bad_weights")
    return counted
