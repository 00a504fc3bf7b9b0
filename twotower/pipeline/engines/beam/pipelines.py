"""The two pipelines: one reads the log, the other gives its rows the codes of their ids.

Elements are blocks of rows as bytes, never single rows, and keys are buckets of ids. All that a
worker runs can be imported: nothing of the process that launches it is sent along.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.pipeline.engines.beam import ids
from twotower.pipeline.engines.beam.library import apache_beam
from twotower.pipeline.engines.beam.pieces import Piece, PieceReader
from twotower.pipeline.engines.beam.store import Store, from_bytes, to_bytes
from twotower.pipeline.engines.database import BLOCK


def run_reading(pieces: Sequence[Piece], reader: PieceReader, options: Any) -> None:
    """Reads all pieces of a log.

    It leaves in the store the rows, "blocks.json" with what is known of them, and "ids.json" with
    the names of the files of distinct ids: [column, name].

    Args:
        pieces: Pieces of the log.
        reader: What a worker does with one.
        options: Options of the pipeline.
    """
    beam = apache_beam()
    with beam.Pipeline(options=options) as pipeline:
        read = (
            pipeline
            | "pieces" >> beam.Create(list(pieces))
            # Or the runner may read them all on the machine that lists them.
            | "spread" >> beam.Reshuffle()
            | "read" >> beam.FlatMap(_read, reader).with_outputs("block", "ids")
        )
        names = (
            read["ids"]
            | "merge ids" >> beam.CombinePerKey(_merged)
            | "write ids" >> beam.Map(_write_ids, reader.store)
        )
        _write_list(read["block"], "blocks", reader.store)
        _write_list(names, "ids", reader.store)


def _read(piece: Piece, reader: PieceReader) -> Iterator[Any]:
    tagged = apache_beam().pvalue.TaggedOutput
    for tag, value in reader.read(piece):
        yield tagged(tag, value)


def _merged(tables: Iterable[bytes]) -> bytes:
    """Returns the distinct ids of blocks as one table, also before they leave their worker."""
    return to_bytes(ids.merge(map(from_bytes, tables)))


def _write_ids(element: tuple[tuple[str, int, str], bytes], store: Store) -> tuple[str, str]:
    (column, _, _), table = element
    name = f"ids-{uuid.uuid4().hex}.arrow"
    store.write_table(name, from_bytes(table))
    return column, name


def _write_list(elements: Any, name: str, store: Store) -> None:
    """Writes the elements of a collection into one file of JSON."""
    beam = apache_beam()
    # Names that reach this end are of workers that came to theirs: a try that failed leaves files
    # that nobody reads.
    _ = (
        elements
        | f"gather {name}.json" >> beam.combiners.ToList()
        | f"write {name}.json" >> beam.Map(_write_json, name, store)
    )


def _write_json(content: Any, name: str, store: Store) -> None:
    store.write_json(f"{name}.json", content)


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows as they were read.

    Attributes:
        name: File of the store.
        first: Position of the first row in the log.
    """

    name: str
    first: int


def codes_file(column: str, bucket: int) -> str:
    """Returns the file with the codes of a bucket of ids."""
    return f"codes-{column}-{bucket}.arrow"


def run_joining(
    blocks: Sequence[Block],
    schema: pa.Schema,
    store: Store,
    buckets: int,
    options: Any,
) -> None:
    """Gives rows the codes of their users and items.

    It leaves in the store the rows, and "log.json" with the names of their files.

    Args:
        blocks: Rows as they were read.
        schema: Schema to which all blocks are cast.
        store: Folder with the rows and the codes of all buckets.
        buckets: Number of buckets.
        options: Options of the pipeline.
    """
    beam = apache_beam()
    with beam.Pipeline(options=options) as pipeline:
        rows = (
            pipeline
            | "blocks" >> beam.Create(list(blocks))
            | "spread" >> beam.Reshuffle()
            | "by user" >> beam.FlatMap(_read_block, schema, store, buckets)
            | "of a user" >> beam.GroupByKey()
            | "join users" >> beam.FlatMap(_join_users, store, buckets)
            | "of an item" >> beam.GroupByKey()
            | "join items" >> beam.FlatMap(_join_items, store)
        )
        _write_list(rows, "log", store)


def _read_block(
    block: Block, schema: pa.Schema, store: Store, buckets: int
) -> Iterator[tuple[int, bytes]]:
    rows = store.read_table(block.name)
    # Large whole numbers are rounded, as they are where all of the column is read at once.
    rows = rows.cast(schema, safe=False)
    positions = pa.array(block.first + np.arange(len(rows)))
    rows = rows.add_column(0, "position", positions)
    for bucket, some in ids.split_by_hash(rows, "u", buckets):
        yield bucket, to_bytes(some)


def _join_users(
    element: tuple[int, Iterable[bytes]], store: Store, buckets: int
) -> Iterator[tuple[int, bytes]]:
    for rows in _joined(element, "u", store):
        for bucket, some in ids.split_by_hash(rows, "i", buckets):
            yield bucket, to_bytes(some)


def _join_items(element: tuple[int, Iterable[bytes]], store: Store) -> Iterator[str]:
    for rows in _joined(element, "i", store):
        name = f"log-{uuid.uuid4().hex}.arrow"
        store.write_table(name, rows)
        yield name


def _joined(element: tuple[int, Iterable[bytes]], column: str, store: Store) -> Iterator[pa.Table]:
    """Yields the rows of a bucket with codes in the place of ids, in large blocks."""
    bucket, blocks = element
    codes = store.read_table(codes_file(column, bucket))
    for rows in _gathered(blocks):
        yield ids.join_codes(rows, column, codes)


def _gathered(blocks: Iterable[bytes]) -> Iterator[pa.Table]:
    """Yields rows that come in small blocks in large ones, without holding them all."""
    tables: list[pa.Table] = []
    count = 0
    for block in blocks:
        tables.append(from_bytes(block))
        count += len(tables[-1])
        if count >= BLOCK:
            yield pa.concat_tables(tables)
            tables = []
            count = 0
    if tables:
        yield pa.concat_tables(tables)
