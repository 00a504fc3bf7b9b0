"""A re-ranker of the user's own: it has so much time for a list, which goes out without it else."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

import numpy as np
from absl import logging

from twotower.retrieval.rerank import Candidates, Reranking

SECONDS_BETWEEN = 60  # between two lines of the log on failures
# Reason why a list went out by its scores.
Failure = Literal["late", "busy", "failed"]


class Hook:
    """A re-ranker that may fail without harm.

    It runs in a thread of its own, one list at a time, and is called by threads that may wait for
    it, never by that of the event loop. Where it is late it goes on, and the lists that are made
    meanwhile do not wait for it.

    Attributes:
        multiple: Number of candidates, in multiples of the length of a list.
        failures: Number of lists that went out by their scores, by the reason.
        report: Function that is told of each of them.
    """

    def __init__(self, reranking: Reranking, seconds: float):
        """Starts without work.

        Args:
            reranking: Re-ranker with its options.
            seconds: Time for one list, that in which it waits for its turn included.
        """
        self.multiple = reranking.config.multiple
        self.failures: collections.Counter[Failure] = collections.Counter()
        self.report: Callable[[Failure], None] = lambda _: None
        self._choose: Callable[[Candidates, int], np.ndarray] = reranking
        self._name = reranking.config.kind
        self._seconds = seconds
        self._queue: queue.SimpleQueue[tuple[Future[np.ndarray], Candidates, int]]
        self._queue = queue.SimpleQueue()
        # A daemon, which a server that is told to stop does not wait for; a pool's threads it would
        # wait for, however long the re-ranker takes.
        threading.Thread(target=self._work, name="rerank", daemon=True).start()
        # The list that took longer than its time, until it is made.
        self._late: Future[np.ndarray] | None = None
        self._lock = threading.Lock()  # of the counter

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        """Returns the positions of all candidates: up to `k` chosen ones, then the others in order.

        Where the re-ranker fails that is the order of the scores.
        """
        chosen = self._ask(candidates, k)
        taken = set(chosen)
        rest = [row for row in range(len(candidates.scores)) if row not in taken]
        return [*chosen, *rest]

    def _ask(self, candidates: Candidates, k: int) -> list[int]:
        """Returns the positions that the re-ranker chooses; none where it fails."""
        late = self._late
        # A thread cannot be ended: all lists behind the late one would wait in its queue.
        if late is not None and not late.done():
            return self._fail("busy", "is still at an earlier list")
        asked: Future[np.ndarray] = Future()
        self._queue.put((asked, candidates, k))
        try:
            return asked.result(self._seconds).tolist()
        except TimeoutError as error:
            if asked.cancel():
                return self._fail("busy", "was at other lists for too long")
            # Its own errors may be of that type.
            if asked.done() and asked.exception() is error:
                return self._fail("failed", f"raised {error!r}")
            self._late = asked
            return self._fail("late", f"took more than {1_000 * self._seconds:g} ms")
        except Exception as error:
            return self._fail("failed", f"raised {error!r}")

    def _work(self) -> None:
        """Makes one list after another, for as long as the process lives."""
        while True:
            asked, candidates, k = self._queue.get()
            # Nobody waits for one that was given up before its turn.
            if not asked.set_running_or_notify_cancel():
                continue
            try:
                asked.set_result(self._choose(candidates, k))
            # Of any kind: without its thread all lists would be late from now on.
            except BaseException as error:
                asked.set_exception(error)

    def _fail(self, failure: Failure, words: str) -> list[int]:
        # Threads call it, and adding to a number is more than one operation.
        with self._lock:
            self.failures[failure] += 1
        self.report(failure)
        logging.log_every_n_seconds(
            logging.ERROR,
            "--rerank=%s %s: the list went out by its scores, as %s did so far.",
            SECONDS_BETWEEN,
            self._name,
            words,
            f"{self.failures.total():,}",
        )
        return []
