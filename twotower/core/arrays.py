"""NumPy arrays padded to few shapes, so that few programs are compiled, and samples of their
rows."""

from __future__ import annotations

import numpy as np


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least `n`; 1 for 0.

    >>> [next_power_of_two(n) for n in (0, 1, 3, 4)]
    [1, 1, 4, 4]
    """
    # Shapes that are powers of two cost at most twice the work, and a program for each doubling
    # alone.
    return 1 << max(0, n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `n`.

    >>> [round_up(n, 8) for n in (0, 1, 8, 9)]
    [0, 8, 8, 16]
    """
    # Floor division of the negated number rounds up, without the rounding of floats.
    return -(-n // multiple) * multiple


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """Returns `array` with rows of zeros appended up to `size` rows."""
    # Rows alone grow; callers pass over the added ones by their number, not by their value.
    widths = [(0, 0)] * array.ndim
    widths[0] = (0, size - len(array))
    return np.pad(array, widths)


def pad_pairs(
    rows: np.ndarray, columns: np.ndarray, size: int, *, num_columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads the pairs (row, column) of a scatter with pairs that it drops.

    Args:
        rows: int [E].
        columns: int [E], below `num_columns`.
        size: Number of pairs to return, at least E.
        num_columns: Width of the array that is written to. Padding points at this column, which
            lies outside of it: a scatter with mode="drop" passes over it.

    Returns:
        (rows, columns), int32 [size] each.
    """
    # Row 0 with a column past the end: no real pair can be hit, whatever the row.
    missing = size - len(rows)
    rows = np.pad(rows, (0, missing))
    columns = np.pad(columns, (0, missing), constant_values=num_columns)
    # JAX computes with int32 indices; int64 ones would be converted at every call.
    return rows.astype(np.int32), columns.astype(np.int32)


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` of the rows, evenly spaced from the first to the last.

    >>> evenly_spaced(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    # Spread rather than drawn: the same sample each time, from every part of an ordered list.
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows[chosen.astype(int)]
