"""Requests a second of each client, over all processes of a server.

Each process counts in cells of its own, in memory that all of them map, and adds the cells of the
others: nobody waits for a lock, and none writes what another one has written. A second slides: of
the one before that share counts which the present one has not yet passed.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from pathlib import Path

CELL = 3  # numbers of a cell: its second, the requests in it, those in the second before
BYTES = 8  # of a number


class Rates:
    """The counts of all clients."""

    def __init__(
        self, rate: int, clients: int, *, path: Path | None = None, process: int = 0, count: int = 1
    ):
        """Begins to count.

        Args:
            rate: Requests a second of each client.
            clients: Number of clients.
            path: File that the processes of a server share; None for a single process.
            process: Number of this process.
            count: Number of processes.
        """
        self.rate = rate
        self._process = process
        self._count = count
        size = clients * count * CELL * BYTES
        if path is None:
            memory = mmap.mmap(-1, size)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            # The first of them makes the file; for the others it has this size already.
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            os.close(descriptor)
        # Numbers of eight bytes are written in one step: no other process reads half of one.
        self._cells = memoryview(memory).cast("d")

    def take(self, client: int, now: float | None = None) -> bool:
        """Counts a request, and returns whether it may be answered.

        Args:
            client: Number of the client.
            now: Time in seconds of the clock that all processes of a machine share.
        """
        if now is None:
            now = time.monotonic()
        cells = self._cells
        second = math.floor(now)
        left = 1 - (now - second)
        row = client * self._count * CELL
        own = row + self._process * CELL
        # The clocks of all processes are one, so that a cell says itself how old it is.
        if cells[own] != second:
            before = cells[own + 1] if cells[own] == second - 1 else 0.0
            cells[own] = second
            cells[own + 1] = 0.0
            cells[own + 2] = before
        total = 0.0
        for cell in range(row, row + self._count * CELL, CELL):
            if cells[cell] == second:
                total += cells[cell + 1] + left * cells[cell + 2]
            elif cells[cell] == second - 1:
                total += left * cells[cell + 1]
        # A refused request is not counted: a client that goes on too fast still has its rate.
        if total + 1 > self.rate:
            return False
        cells[own + 1] += 1
        return True
