"""The rows of a log on the disk as they were read, before they are put into a database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.core.arrow import join_chunks
from twotower.data.contract import KEYS
from twotower.pipeline.engines.kept.coding import IdCodes, read_tables


class RowWriter:
    """Writes blocks of rows, and the distinct ids of all of them.

    Args:
        folder: Folder for the files, without any of them.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._codes = {key: IdCodes(_tables_path(folder, key)) for key in KEYS}
        self._schema: pa.Schema | None = None
        self._number = 0
        self._file: pa.OSFile | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def write(self, rows: pa.Table, failed: np.ndarray) -> None:
        """Writes a block.

        Args:
            rows: Rows with user_id, item_id and further columns, each block with the same ones.
            failed: Number of the first condition that each row fails, int16 [N].
        """
        numbers = [pa.array(self._codes[key].add(rows[key])) for key in KEYS]
        others = rows.drop_columns(list(KEYS))
        arrays = [*numbers, pa.array(failed), *map(join_chunks, others.columns)]
        # Names of our own, since a column may be called "failed" as well.
        names = [*KEYS, "failed", *(f"c{number}" for number in range(others.num_columns))]
        batch = pa.record_batch(arrays, names)
        if batch.schema != self._schema:
            self._begin(batch.schema)
        assert self._writer is not None
        self._writer.write_batch(batch)

    def _begin(self, schema: pa.Schema) -> None:
        """Begins a file, since those before have another type of some column."""
        self._close()
        self._schema = schema
        self._file = pa.OSFile(str(self._folder / f"{self._number:03}.rows"), "wb")
        self._writer = pa.ipc.new_stream(self._file, schema)
        self._number += 1

    def _close(self) -> None:
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()

    def finish(self) -> dict[str, list[int]]:
        """Ends the files, and returns the number of distinct ids of each block by key."""
        self._close()
        for key, codes in self._codes.items():
            ids = codes.finish()
            with pa.OSFile(str(_ids_path(self._folder, key)), "wb") as file:
                table = pa.table({"id": ids})
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
        return {key: codes.sizes for key, codes in self._codes.items()}


class WrittenRows:
    """The rows that a `RowWriter` has written.

    Args:
        folder: Folder of the files.
        sizes: Number of distinct ids of each block by key.
    """

    def __init__(self, folder: Path, sizes: dict[str, list[int]]):
        self._folder = folder
        self._sizes = sizes

    @property
    def files(self) -> list[Path]:
        """Files that hold the rows."""
        others = [_ids_path(self._folder, key) for key in KEYS]
        others += [_tables_path(self._folder, key) for key in KEYS]
        return [*self._row_files(), *others]

    def _row_files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.rows"))

    def ids(self, key: str) -> pa.ChunkedArray:
        """Returns the distinct ids as they were read, in order of first appearance."""
        with pa.OSFile(str(_ids_path(self._folder, key))) as file:
            return pa.ipc.open_file(file).read_all()["id"]

    def first_row(self, key: str, code: int) -> int:
        """Returns the position of the first row that has an id."""
        first = 0
        for block, codes in self.blocks():
            rows = np.flatnonzero(codes[key] == code)
            if len(rows):
                return first + int(rows[0])
            first += len(block)
        raise ValueError(f"No row has the {key} of code {code}.")

    def blocks(self) -> Iterator[tuple[pa.Table, dict[str, np.ndarray]]]:
        """Yields the rows in blocks: "failed" and the further columns under the names c0, c1, ...,
        and key -> code of the id of each, int32 [N], -1 of a missing one."""
        tables = {
            key: read_tables(_tables_path(self._folder, key), self._sizes[key]) for key in KEYS
        }
        for path in self._row_files():
            with pa.OSFile(str(path)) as file:
                for batch in pa.ipc.open_stream(file):
                    codes = {}
                    for key in KEYS:
                        # The last one for those that are missing, whose number is -1.
                        table = np.append(next(tables[key]), np.int32(-1))
                        codes[key] = table[batch[key].to_numpy()]
                    block = pa.Table.from_batches([batch])
                    yield block.drop_columns(list(KEYS)), codes


def _ids_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.distinct"


def _tables_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.numbers"
