"""A re-ranker of the user's own: it has so much time for a list, which goes out without it else."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
from absl import logging

from twotower.retrieval.rerank import Candidates, Reranking

SECONDS_BETWEEN = 60  # between two lines of the log on failures
# Reason why a list went out by its scores.
Failure = Literal["late", "busy", "failed"]


class Hook:
    """A re-ranker that may fail without harm.

    It runs in a thread of its own, one list at a time. Where it is late it goes on, and the lists
    that are made meanwhile do not wait for it.

    Attributes:
        failures: Number of lists that went out by their scores, by the reason.
        report: Function that is told of each of them.
    """

    def __init__(self, reranking: Reranking, seconds: float):
        """Starts without work.

        Args:
            reranking: Re-ranker with its options.
            seconds: Time for one list.
        """
        self.failures: collections.Counter[Failure] = collections.Counter()
        self.report: Callable[[Failure], None] = lambda _: None
        self._choose: Callable[[Candidates, int], np.ndarray] = reranking
        self._name = reranking.config.kind
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rerank")
        self._last: Future[np.ndarray] | None = None

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        """Returns the positions of up to `k` candidates, best first; none where it fails."""
        # A thread cannot be ended: all lists behind the late one would wait in its queue.
        if self._last is not None and not self._last.done():
            return self._fail("busy", "is still at an earlier list")
        self._last = self._thread.submit(self._choose, candidates, k)
        try:
            # In which the server waits, and all others with it: the time of a hook is short for
            # that.
            return self._last.result(self._seconds).tolist()
        except TimeoutError as error:
            # Its own errors may be of that type.
            if not self._last.done():
                return self._fail("late", f"took more than {1_000 * self._seconds:g} ms")
            return self._fail("failed", f"raised {error!r}")
        except Exception as error:
            return self._fail("failed", f"raised {error!r}")

    def _fail(self, failure: Failure, words: str) -> list[int]:
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
