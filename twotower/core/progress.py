"""Progress of long work: a bar on a terminal and in a notebook, else a line in the log now and
then."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

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
    elif has_screen():
        # On standard error, so that output that is piped elsewhere stays clean; `leave` would keep
        # the bar.
        yield from bar(blocks, total=total, desc=what, unit=f" {unit}", leave=False)
    else:
        yield from _log_progress(blocks, total, what, unit, seconds)


def has_screen() -> bool:
    """Returns whether somebody looks at a bar: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def bar(blocks: Iterable[Any] | None = None, **options: Any) -> tqdm.tqdm:
    """Returns a bar of tqdm, in a notebook one of the notebook's own.

    Args:
        blocks: Parts of the work; None for a bar that is moved by hand.
        **options: Arguments of `tqdm.tqdm`.
    """
    kind: type[tqdm.tqdm] = tqdm.tqdm
    if _in_notebook() and importlib.util.find_spec("ipywidgets"):
        # Imported there alone: without a notebook it warns.
        from tqdm.notebook import tqdm_notebook

        kind = tqdm_notebook
    return kind(blocks, dynamic_ncols=True, **options)


def _in_notebook() -> bool:
    """Returns whether the process is the kernel of a notebook."""
    # Nobody who has not imported IPython is in one.
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell = ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


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
