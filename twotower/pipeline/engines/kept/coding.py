"""Codes of ids that come in blocks, of which only the distinct ones are held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.core.arrow import join_chunks

# Ids that may wait for their codes, at least.
_WAITING = 2**20


class IdCodes:
    """Distinct ids, in order of first appearance, and the codes of blocks of ids.

    A block gets numbers of its own first, and a table from these to the codes: the tables are made
    for many blocks at once, whose distinct ids are then hashed a second time and no more often.

    Args:
        path: File for the tables, which have as many numbers as the blocks have distinct ids.

    Attributes:
        sizes: Distinct ids of each block.
    """

    def __init__(self, path: Path):
        self._path = path
        self.sizes: list[int] = []
        self._kind: pa.DataType | None = None
        self._known: pa.Array | None = None
        self._waiting: list[pa.Array] = []
        self._count = 0

    def add(self, ids: pa.ChunkedArray) -> np.ndarray:
        """Returns the numbers of a block's ids within the block, int32 [N]; -1 of a missing one.

        All blocks have ids of one type.
        """
        self._kind = ids.type
        column = join_chunks(ids)
        if isinstance(column, pa.ExtensionArray):
            # Arrow hashes the bytes of a UUID alone.
            column = column.storage
        coded = column.dictionary_encode()
        self._waiting.append(coded.dictionary)
        self.sizes.append(len(coded.dictionary))
        self._count += len(coded.dictionary)
        # As many as are known already: each id is then hashed twice on average, not once a block.
        if self._count > max(_WAITING, 0 if self._known is None else len(self._known)):
            self._assign()
        return coded.indices.fill_null(-1).to_numpy().astype(np.int32, copy=False)

    def finish(self) -> pa.Array:
        """Returns the distinct ids by code, and completes the file."""
        self._assign()
        known = self._known
        assert known is not None and self._kind is not None
        if isinstance(self._kind, pa.BaseExtensionType):
            known = pa.ExtensionArray.from_storage(self._kind, known)
        return known

    def _assign(self) -> None:
        """Gives the ids that wait their codes."""
        lists = self._waiting
        if self._known is not None:
            lists = [self._known, *lists]
        chunks = []
        for ids in lists:
            numbers = pa.array(np.arange(len(ids), dtype=np.int32))
            chunks.append(pa.DictionaryArray.from_arrays(numbers, ids))
        unified = pa.chunked_array(chunks).unify_dictionaries()
        with self._path.open("ab") as file:
            # The known ids keep their codes, since they come first.
            for chunk in unified.chunks[len(lists) - len(self._waiting) :]:
                chunk.indices.to_numpy().astype(np.int32, copy=False).tofile(file)
        self._known = unified.chunk(0).dictionary
        self._waiting = []
        self._count = 0


def read_tables(path: Path, sizes: list[int]) -> Iterator[np.ndarray]:
    """Yields the codes of each block's ids, int32 [D], by their numbers within the block.

    Args:
        path: File that `IdCodes` has written.
        sizes: Distinct ids of each block.
    """
    with path.open("rb") as file:
        for size in sizes:
            yield np.fromfile(file, np.int32, size)
