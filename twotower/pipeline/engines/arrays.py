"""Arrays on the disk that are written in pieces, in order or scattered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Rows of a bucket of scattered values, which is sorted in memory.
_BUCKET = 2**21


class ArrayFile:
    """An array of known type and shape in a file of NumPy, written in pieces.

    Its file has the bytes that `np.save` writes of the whole array.

    Args:
        path: File to write.
        dtype: Type of the array.
        shape: Shape of the array.

    Attributes:
        path: File that is written.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.shape = shape
        # Written by hand, since `np.save` wants the whole array.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": shape,
        }
        self._file: BinaryIO = path.open("wb")
        np.lib.format.write_array_header_1_0(self._file, header)
        # The rows go past the buffer of the file, straight to their places.
        self._file.flush()
        self._start = self._file.tell()
        self._row_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))
        self._next = 0
        self._written = 0

    def append(self, rows: np.ndarray) -> None:
        """Writes rows behind those that were appended before."""
        self.write(self._next, rows)
        self._next += len(rows)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Writes rows from the row `first` on."""
        # As bytes, of which an array without rows has none.
        data = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data
        offset = self._start + first * self._row_bytes
        # A write may end early, as one that fills a disk does.
        while len(data):
            count = os.pwrite(self._file.fileno(), data, offset)
            data = data[count:]
            offset += count
        self._written += len(rows)

    def close(self) -> None:
        """Ends the file.

        Raises:
            ValueError: Other rows were written than the shape has.
        """
        self._file.close()
        # A row too few would be a row of zeros that nobody notices.
        if self._written != self.shape[0]:
            raise ValueError(f"{self._file.name}: {self._written:,} rows of {self.shape[0]:,}.")


class Scatter:
    """Rows of integers that come in any order, each with its position, and are read in order.

    They lie in files of buckets meanwhile, so that one bucket at a time is in memory.

    Args:
        folder: Folder for the files.
        rows: Number of positions.
        width: Numbers in a row, int32.
    """

    def __init__(self, folder: Path, rows: int, width: int):
        folder.mkdir(parents=True)
        self._rows = rows
        self._width = width
        self._paths = [folder / str(number) for number in range(-(-rows // _BUCKET))]

    def add(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows.

        Args:
            positions: Position of each row, int [N].
            rows: int32 [N, width].
        """
        # By buckets first: single rows all over a disk would be a seek each.
        # Small numbers, which are sorted by counting.
        bucket = (positions // _BUCKET).astype(np.uint16)
        order = np.argsort(bucket, kind="stable")
        records = np.empty((len(rows), 1 + self._width), np.int32)
        records[:, 0] = positions[order] % _BUCKET
        records[:, 1:] = rows[order]
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._paths)))
        for path, part in zip(self._paths, np.split(records, ends[:-1]), strict=True):
            if len(part):
                # Opened each time: a long log has more buckets than a process may hold files open.
                with path.open("ab") as file:
                    part.tofile(file)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields all rows in order of their positions, in blocks int32 [M, width]."""
        for number, path in enumerate(self._paths):
            records = np.fromfile(path, np.int32).reshape(-1, 1 + self._width)
            path.unlink()
            size = min(_BUCKET, self._rows - number * _BUCKET)
            block = np.zeros((size, self._width), np.int32)
            block[records[:, 0]] = records[:, 1:]
            yield block
