"""Labels of the interactions: 1, 0, or missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from twotower.config import ObjectiveConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.data.contract import Use
from twotower.data.interactions import describe


def label_columns(objective: ObjectiveConfig) -> dict[str, str]:
    """Returns the columns of the log that are labels.

    Returns:
        Column -> field of the configuration that names it, the first of several.

    Raises:
        ConfigError: A head names no column.
    """
    fields = {}
    # An empty label of the objective means that all rows are positives; one of a head, a mistake.
    if objective.label:
        fields["config.objective.label"] = objective.label
    for name, head in objective.heads.items():
        fields[f"config.objective.heads.{name}.label"] = head.label
    columns: dict[str, str] = {}
    for field, column in fields.items():
        if not column:
            raise ConfigError(
                f"{field}='' must name the column of the interactions that holds the head's label."
            )
        # Several heads may share a column: it is read once.
        columns.setdefault(column, field)
    return columns


def label_uses(objective: ObjectiveConfig) -> dict[str, Use]:
    """Returns the columns of the log that are read as labels."""
    return {column: Use("label", field) for column, field in label_columns(objective).items()}


def check_labels(rows: pa.Table, train: pa.Table, columns: Mapping[str, str]) -> None:
    """Refuses labels that nothing can be learned from.

    Args:
        rows: All interactions that the filters keep.
        train: Interactions of training.
        columns: Result of `label_columns`.

    Raises:
        ConfigError: A column does not exist, holds a value that is not 0, 1, true, false or
            missing, or has one label alone in training.
    """
    for column, field in columns.items():
        table = f"{field}={column!r}: the interactions table"
        check_fields({column: field}, rows.column_names, table)
        check_label_values(rows, column, field)
        # Training rows alone: a label that first occurs later cannot be learned.
        labels = read_labels(train, columns)[column]
        check_label_counts(
            column, field, len(labels), [int((labels == value).sum()) for value in (0, 1)]
        )


def check_label_counts(column: str, field: str, total: int, counts: Sequence[int]) -> None:
    """Refuses labels of training rows of which one is never there.

    Args:
        column: Column of the labels.
        field: Field of the configuration that names it.
        total: Number of training rows.
        counts: Rows with label 0, and with label 1.

    Raises:
        ConfigError: No row has one of them.
    """
    for value, count in enumerate(counts):
        if not count:
            raise ConfigError(
                f"{field}={column!r}: of {total:,} training rows none has label {value} "
                f"({total - sum(counts):,} have none at all), so there is nothing to tell apart. "
                "Name another column, or let config.data.where keep such rows."
            )


def read_labels(table: pa.Table, columns: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Returns labels that have passed `check_labels`.

    Returns:
        Column -> float32 [N], NaN where the label is missing.
    """
    labels = {}
    for column in columns:
        # Missing labels become NaN, which training masks.
        values = table[column].cast(pa.float32()).to_numpy()
        labels[column] = values.astype(np.float32)
    return labels


def check_label_values(rows: pa.Table, column: str, field: str, first: int = 0) -> None:
    """Refuses a column that holds anything but labels, and names the first such row.

    Args:
        rows: Interactions that are kept, or some of them.
        column: Column of the labels.
        field: Field of the configuration that names it.
        first: Number of rows that are kept before these.
    """
    values = rows[column]
    if _is_numeric(values.type):
        numbers = values.cast(pa.float64())
        is_label = pc.or_(pc.is_in(numbers, pa.array([0.0, 1.0, None])), pc.is_nan(numbers))
        is_bad = pc.invert(is_label)
    else:
        # Text is not guessed at: "0" may be a code.
        is_bad = pc.is_valid(values)
    row = pc.index(pc.fill_null(is_bad, False), True).as_py()
    # -1 where there is none.
    if row >= 0:
        raise ConfigError(
            f"{field}={column!r}: {values[row].as_py()!r} in row {first + row + 1:,} of the "
            f"interactions that are kept ({describe(rows, row)}) is no label. Labels are numbers 0 "
            "and 1, true and false, or missing; leave other rows out by config.data.where."
        )


def _is_numeric(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold labels."""
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    # A column without any value has the type null.
    return is_number or pa.types.is_boolean(kind) or pa.types.is_null(kind)
