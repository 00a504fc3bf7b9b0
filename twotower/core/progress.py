"""Progress of long work: a bar on a terminal, a log line now and then otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

T = TypeVar("T")


def progress(blocks: Iterable[T], *, total: int, what: str, seconds: float = 30.0) -> Iterator[T]:
    """Passes `blocks` on.

    Args:
        total: how many there are.
        what: the work, in a word or two.
        seconds: between log lines, where there is no terminal; work shorter than that logs nothing.
    """
    if sys.stderr.isatty():
        yield from tqdm.tqdm(blocks, total=total, desc=what, leave=False, dynamic_ncols=True)
        return
    logged = time.monotonic()
    for done, block in enumerate(blocks):
        if time.monotonic() - logged > seconds:
            logged = time.monotonic()
            logging.info("%s: %d of %d blocks.", what, done, total)
        yield block
