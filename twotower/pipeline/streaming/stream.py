"""Shuffled batches of records, read ahead of the steps that take them.

The place in the stream is one number, the example to go on with, as in
`grain.experimental.ElasticIterator`: a run goes on from it with any number of processes that its
batch can be divided over. A process reads the examples of its own part of each batch alone, which
is the part that follows that of the process before: the rows of a batch are the same ones, in the
same order, however many processes there are. (Grain's own iterator deals the rows out in turns.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twotower.config import TrainingConfig
from twotower.core.errors import ConfigError
from twotower.core.install import extra
from twotower.pipeline.batches import Batch, enough_capacity, join_parts
from twotower.pipeline.streaming.layout import Records
from twotower.pipeline.streaming.order import shuffled
from twotower.pipeline.streaming.shards import Shards

_LARGEST_SEED = 2**32
# Each thread reads several steps, up to so many examples or bytes: a call costs as much as to read
# some hundred examples.
_BLOCK_EXAMPLES = 2**13
_BLOCK_BYTES = 2**20
# A step of an accelerator is shorter than the reading of a batch.
_MAX_THREADS = 8


def check_installed() -> None:
    """Refuses a stream before the log is read for it.

    Raises:
        ConfigError: A library that streams are read by is missing.
    """
    with extra("stream", "config.training.input='stream'"):
        for name in ("array_record", "grain"):
            importlib.import_module(name)


@dataclasses.dataclass(frozen=True)
class Stream:
    """An endless stream of examples, one shuffled pass over the records after the other.

    Attributes:
        records: Examples of a pass.
        shards: Their files.
        batch_size: Examples B in a batch of all processes.
        seed: Seed of the shuffles.

    Raises:
        ConfigError: A batch is larger than a pass.
    """

    records: Records
    shards: Shards
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        count = len(self.records)
        if self.batch_size > count:
            raise ConfigError(
                f"config.training.batch_size={self.batch_size} is larger than the data: there are "
                f"{count} {self.records.name}. Choose at most {count}."
            )

    @classmethod
    def open(cls, records: Records, folder: Path, config: TrainingConfig) -> Stream:
        """Returns the stream of a training.

        Args:
            records: Examples of a pass.
            folder: Folder of their shards.
            config: Options of the training, whose batch size and seed are read.
        """
        return cls(records, Shards(folder, records), config.batch_size, config.seed)

    def examples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what stands at some positions of the stream.

        Args:
            positions: int64 [B], from 0.

        Returns:
            The numbers of the examples, int64 [B], and the pass that each stands in, int64 [B].
        """
        count = len(self.records)
        passes, offsets = np.divmod(positions, count)
        numbers = np.empty(len(positions), np.int64)
        # Two passes where the examples cross the end of one.
        for number in np.unique(passes):
            is_here = passes == number
            # As Grain does it: each pass has a seed of its own.
            seed = (self.seed + int(number)) % _LARGEST_SEED
            numbers[is_here] = shuffled(offsets[is_here], count, seed)
        return numbers, passes

    def load(self, positions: np.ndarray) -> Batch:
        """Returns the batch of the examples at some positions of the stream."""
        numbers, passes = self.examples(positions)
        return self.records.decode(self.shards.read(numbers), numbers, passes)

    def load_parts(
        self, positions: np.ndarray, *, event_capacity: int, batches: int, parts: int
    ) -> list[Batch]:
        """Returns batches whose histories lie one after the other.

        Args:
            positions: Positions of the examples of all batches, int64 [batches x B].
            event_capacity: Number of events that each part may have; more where one has more.
            batches: Number of batches.
            parts: Number of equal parts, those of devices, that a batch is divided into.
        """
        numbers, passes = self.examples(positions)
        # One read for all: a call costs as much as to read some hundred examples.
        read = self.shards.read(numbers)
        size = len(positions) // (batches * parts)
        loaded = []
        for first in range(0, len(positions), size * parts):
            starts = range(first, first + size * parts, size)
            own = [slice(start, start + size) for start in starts]
            # One shape for all parts of a batch.
            most = max(self.records.num_events(read[part]) for part in own)
            enough = enough_capacity(event_capacity, most)
            decoded = []
            for part in own:
                decoded.append(
                    self.records.decode(
                        read[part], numbers[part], passes[part], event_capacity=enough
                    )
                )
            loaded.append(join_parts(decoded))
        return loaded

    @contextlib.contextmanager
    def batches(
        self,
        next_example: int,
        steps: int,
        *,
        part: slice,
        put: Callable[[Batch], Any] = lambda batch: batch,
        event_capacity: int = 0,
        devices: int = 1,
    ) -> Iterator[Iterator[Any]]:
        """Yields an iterator over this process's parts of the batches of some steps, which threads
        read ahead until the block ends.

        Args:
            next_example: Position of the first example.
            steps: Number of steps; nothing after them is read.
            part: Rows of each batch that this process takes.
            put: Function that puts a batch where the step reads it, called by the threads.
            event_capacity: Number of events that the histories of each device's rows may have, one
                after the other; 0 for a window of L events for each row.
            devices: Number of devices that the rows are divided over.
        """
        # An extra, which a training without a stream does not need.
        import grain

        block = self._steps_at_once(part.stop - part.start)
        parts = _Blocks(self, next_example, steps, block, part, put, event_capacity, devices)
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        # One block ahead for each thread bounds the memory of batches that wait.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        blocks = grain.MapDataset.source(parts).to_iter_dataset(options)
        # Threads that are left running would go on reading, and putting batches on the device.
        with contextlib.closing(iter(blocks)) as iterator:
            yield itertools.chain.from_iterable(iterator)

    def _steps_at_once(self, rows: int) -> int:
        """Returns the number of steps that are read together, for so many rows of each."""
        num_bytes = self.shards.num_bytes / len(self.records)
        examples = min(_BLOCK_EXAMPLES, int(_BLOCK_BYTES / num_bytes))
        return max(1, examples // rows)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of steps as a source that Grain reads: of each step the part of a batch."""

    stream: Stream
    next_example: int
    steps: int
    block: int
    part: slice
    put: Callable[[Batch], Any]
    event_capacity: int
    devices: int

    def __len__(self) -> int:
        return -(-self.steps // self.block)

    def __getitem__(self, index: int) -> list[Any]:
        start = index * self.block
        # From the number of the block alone: a run goes on anywhere without reading what precedes.
        steps = np.arange(start, min(start + self.block, self.steps))
        rows = np.arange(self.part.start, self.part.stop)
        first = self.next_example + steps * self.stream.batch_size
        positions = (first[:, None] + rows).reshape(-1)
        if self.event_capacity:
            batches = self.stream.load_parts(
                positions,
                event_capacity=self.event_capacity,
                batches=len(steps),
                parts=self.devices,
            )
            return [self.put(batch) for batch in batches]
        # One read for all steps of the block, which are cut apart below.
        batch = self.stream.load(positions)
        parts = []
        for number in range(len(steps)):
            own = slice(number * len(rows), (number + 1) * len(rows))
            parts.append(self.put(jax.tree.map(lambda x, own=own: x[own], batch)))
        return parts
