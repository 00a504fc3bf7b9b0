"""Progress of long work: a bar on a terminal, a line in the log now and then otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

T = TypeVar("T")


def progress(blocks: Iterable[T], *, total: int, what: str, seconds: float = 30.0) -> Iterator[T]:
    """Yields the blocks of some work, and shows how far it has come.

    Args:
        blocks: The parts of the work.
        total: The number of blocks. A single one is over before a bar could be read, so nothing is
            shown.
        what: The name of the work, in a word or two.
        seconds: The time between lines of the log, where there is no terminal; shorter work logs
            nothing.
    """
    if total <= 1:
        yield from blocks
    elif sys.stderr.isatty():
        yield from tqdm.tqdm(blocks, total=total, desc=what, leave=False, dynamic_ncols=True)
    else:
        yield from _log_progress(blocks, total, what, seconds)


def _log_progress(blocks: Iterable[T], total: int, what: str, seconds: float) -> Iterator[T]:
    logged = time.monotonic()
    for done, block in enumerate(blocks):
        if time.monotonic() - logged > seconds:
            logged = time.monotonic()
            logging.info("%s: %d of %d blocks.", what, done, total)
        yield block
