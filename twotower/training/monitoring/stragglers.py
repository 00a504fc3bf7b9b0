"""Which of several processes the others wait for."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# Seconds without a beat after which a process is called silent: before JAX counts it as
# lost, by default after twenty.
SILENT = 8.0
# A process stands out whose work on a step takes so many times that of the median process, and
# such a share of the step.
_TIMES = 1.5
_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Beat:
    """Heartbeat of a process.

    Attributes:
        process: Number of the process.
        host: Name of its machine.
        number: Number of the beat.
        step: Step that it has come to.
        own: Seconds that it works on a step itself, making its part of the batch.
        waiting: Seconds that it waits for the devices in a step, and so for all other processes.
    """

    process: int
    host: str
    number: int
    step: int
    own: float
    waiting: float

    @property
    def name(self) -> str:
        """Number and machine."""
        return f"Process {self.process} on {self.host}"


def parse_beat(content: Mapping[str, Any]) -> Beat | None:
    """Returns the beat in the content of a file; None where it holds none."""
    try:
        split = content["step_seconds"]
        return Beat(
            process=int(content["process"]),
            host=str(content["host"]),
            number=int(content["beat"]),
            step=int(content["step"]),
            own=float(split.get("input", 0.0)),
            waiting=float(split.get("compute", 0.0)),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def find_slowest(beats: Sequence[Beat]) -> Beat | None:
    """Returns the process that the others wait for; None where none stands out.

    All take the same time for a step, since the devices exchange gradients in it. The one that all
    wait for is the one that works longest before it waits itself. A device that is slow is not seen
    from its host: that takes a profile.
    """
    if len(beats) < 2:
        return None
    slowest = max(beats, key=lambda beat: beat.own)
    others = [beat.own for beat in beats if beat is not slowest]
    step = slowest.own + slowest.waiting
    stands_out = slowest.own > _TIMES * statistics.median(others) and slowest.own > _SHARE * step
    return slowest if stands_out else None


def format_slowest(beat: Beat) -> str:
    """Returns a sentence on the process that the others wait for."""
    step = beat.own + beat.waiting
    return (
        f"{beat.name} is the slowest: it works {1000 * beat.own:.1f} of the {1000 * step:.1f} ms "
        "of a step on its part of the batch, and the others wait for it."
    )


class Watcher:
    """Memory of the beats of the other processes, by the clock of this one alone.

    Args:
        process: Number of this process.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        # Process -> number of its last beat, and when that was first seen.
        self._seen: dict[int, tuple[int, float]] = {}
        self._said = ""

    def look(self, beats: Sequence[Beat], now: float) -> str:
        """Returns a sentence where something is new to say, else "".

        Args:
            beats: Latest beats of all processes.
            now: Seconds of a clock that is never set.
        """
        said = ""
        for beat in beats:
            number, since = self._seen.get(beat.process, (-1, now))
            # By the number of the beat and this machine's clock: other machines' times need not
            # agree with it.
            if number != beat.number:
                self._seen[beat.process] = (beat.number, now)
            elif now - since > SILENT and beat.process != self._process:
                said = (
                    f"{beat.name} has been silent since step {beat.step}: the others wait for it."
                )
        # One sentence at a time: a process that is silent explains that all are slow.
        if not said:
            slowest = find_slowest(beats)
            said = format_slowest(slowest) if slowest else ""
        # The times differ from look to look: said once of each process.
        key = said.partition(":")[0]
        is_new = key != self._said
        self._said = key
        return said if is_new else ""
