"""Requests that are answered together, for accelerators.

Those that arrive within a few microseconds, or while others are being answered, become one batch: a
call of a program on a device takes as long for many users as for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

MAX_TOGETHER = 64  # requests of a batch; towers are compiled for each power of two up to it
A = TypeVar("A")  # a request
B = TypeVar("B")  # its answer


class Together(Generic[A, B]):
    """Collects requests of one event loop, and answers them in batches.

    How many may wait is bounded where requests are accepted; see `twotower.serving.limits`.
    """

    def __init__(
        self,
        answer_all: Callable[[Sequence[A]], Sequence[B | Exception]],
        seconds: float,
        count: Callable[[int], None],
    ):
        """Collects nothing yet.

        Args:
            answer_all: Function from requests to the answer of each, or what it is refused by.
            seconds: Time in which requests are collected after the first one.
            count: Function that is told the number of requests in each batch.
        """
        self._answer_all = answer_all
        self._seconds = seconds
        self._count = count
        self._waiting: list[tuple[A, asyncio.Future[B]]] = []
        self._first_at = 0.0

    async def answer(self, request: A) -> B:
        """Returns the answer to a request, or raises what it is refused by."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[B] = loop.create_future()
        if not self._waiting:
            self._first_at = loop.time()
            loop.call_soon(self._look, loop)
        self._waiting.append((request, future))
        return await future

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers those who wait when there are enough, or the first has waited for long enough."""
        # Turn by turn, in which others arrive: timers of the loop are a thousand times as coarse.
        is_full = len(self._waiting) >= MAX_TOGETHER
        if not is_full and loop.time() - self._first_at < self._seconds:
            loop.call_soon(self._look, loop)
            return
        batch = self._waiting[:MAX_TOGETHER]
        del self._waiting[:MAX_TOGETHER]
        # Before the batch, so that the others have their turn whatever becomes of it.
        if self._waiting:
            loop.call_soon(self._look, loop)
        # Nobody waits any more for a request whose client has gone.
        batch = [(request, future) for request, future in batch if not future.done()]
        if not batch:
            return
        self._count(len(batch))
        try:
            answers = self._answer_all([request for request, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
