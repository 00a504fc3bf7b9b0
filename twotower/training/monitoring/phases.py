"""The time of a training, divided by what it was spent on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import get_args

from twotower.training.metrics import Phase

PHASES: tuple[Phase, ...] = get_args(Phase)
# Phases that move a run on.
PRODUCTIVE: tuple[Phase, ...] = ("input", "compute")


class Phases:
    """Clock whose time always belongs to one phase, so that the phases add up to all of it.

    The host makes the next batch while the devices work on the last one. Where the devices take
    longer the host waits for them, and that is "compute"; where making batches takes longer nobody
    waits for the devices, and all of the step is "input".

    Args:
        clock: Function that returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase = "start"
        self._since = clock()
        self._last: dict[str, float] = {}

    def switch(self, phase: Phase) -> None:
        """Lets the time from now on belong to a phase."""
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._since = now
        self._phase = phase

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Lets the time of a block belong to a phase."""
        before = self._phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase up to now."""
        self.switch(self._phase)
        return dict(self._seconds)

    def since_last(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last call of this."""
        now = self.seconds()
        before = self._last
        self._last = now
        return {name: value - before.get(name, 0.0) for name, value in now.items()}
