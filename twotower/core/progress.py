"""Progress of long work: a bar on a terminal, a line in the log now and then otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

T = TypeVar("T")


def progress(
    blocks: Iterable[T], *, total: int, what: str, unit: str = "blocks", seconds: float = 30.0
) -> Iterator[T]:
    """Yields the blocks of some work, and shows how far it has come.

    Args:
        blocks: Parts of the work.
        total: Number of blocks. A single one is over before a bar could be read, so nothing is
            shown.
        what: Name of the work, in a word or two.
        unit: Name of the blocks.
        seconds: Seconds between lines of the log without a terminal; shorter work logs nothing.
    """
    # Short work in a server or a test stays silent.
    if total <= 1:
        yield from blocks
    elif sys.stderr.isatty():
        # On standard error, so that output that is piped elsewhere stays clean; `leave` would keep
        # the bar.
        yield from tqdm.tqdm(
            blocks, total=total, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True
        )
    else:
        yield from _log_progress(blocks, total, what, unit, seconds)


def _log_progress(
    blocks: Iterable[T], total: int, what: str, unit: str, seconds: float
) -> Iterator[T]:
    # The monotonic clock: the time of day may be set back meanwhile.
    logged = time.monotonic()
    for done, block in enumerate(blocks):
        if time.monotonic() - logged > seconds:
            logged = time.monotonic()
            logging.info("%s: %d of %d %s.", what, done, total, unit)
        yield block
