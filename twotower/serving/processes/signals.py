"""Signals that ask a server to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hands SIGTERM and Ctrl-C to a function while the block runs.

    Args:
        handler: Function of the number of the signal and the frame that it met.
    """
    # Put back after the block: a process that goes on, such as that of a test, has its own.
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
