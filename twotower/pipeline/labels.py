"""Labels of the interactions: 1, 0, or nothing where nobody knows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from twotower.config import ObjectiveConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.data.interactions import describe

_NUMERIC = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)


def label_columns(objective: ObjectiveConfig) -> dict[str, str]:
    """Column -> the field of the configuration that names it, the first of several.

    Raises:
        ConfigError: a head names no column.
    """
    fields = {"config.objective.label": objective.label} if objective.label else {}
    fields |= {
        f"config.objective.heads.{name}.label": head.label for name, head in objective.heads.items()
    }
    columns: dict[str, str] = {}
    for field, column in fields.items():
        if not column:
            raise ConfigError(
                f"{field}='' must name the column of the interactions that holds the head's label."
            )
        columns.setdefault(column, field)
    return columns


def check_labels(rows: pa.Table, train: pa.Table, columns: dict[str, str]) -> None:
    """Refuses what cannot be learnt from.

    Args:
        rows: all interactions that are left after the filters.
        train: those of training.
        columns: of `label_columns`.

    Raises:
        ConfigError: a column does not exist, holds something other than 0, 1, true, false or
            nothing, or one label alone in training.
    """
    for column, field in columns.items():
        check_fields(
            {column: field}, rows.column_names, f"{field}={column!r}: the interactions table"
        )
        _check_values(rows, column, field)
        known = read_labels(train, columns)[column]
        for value in (0, 1):
            if not (known == value).any():
                missing = f"{np.isnan(known).sum():,} have none at all"
                raise ConfigError(
                    f"{field}={column!r}: of {len(known):,} training rows none has label {value} ({missing}), so there is "
                    "nothing to tell apart. Name another column, or let config.data.where keep such rows."
                )


def read_labels(table: pa.Table, columns: dict[str, str]) -> dict[str, np.ndarray]:
    """Column -> float32 [N], NaN where the label is missing; the columns have passed
    `check_labels`."""
    return {
        column: table[column].cast(pa.float32()).to_numpy().astype(np.float32) for column in columns
    }


def _check_values(rows: pa.Table, column: str, field: str) -> None:
    values = rows[column]
    if any(test(values.type) for test in _NUMERIC):
        number = values.cast(pa.float64())
        bad = pc.invert(pc.or_(pc.is_in(number, pa.array([0.0, 1.0, None])), pc.is_nan(number)))
    else:  # text is not guessed at: "0" may be a code
        bad = pc.is_valid(values)
    row = pc.index(pc.fill_null(bad, False), True).as_py()
    if row >= 0:
        raise ConfigError(
            f"{field}={column!r}: {values[row].as_py()!r} in row {row + 1:,} of the interactions that are kept "
            f"({describe(rows, row)}) is no label. Labels are numbers 0 and 1, true and false, or missing; leave other rows out "
            "by config.data.where."
        )
