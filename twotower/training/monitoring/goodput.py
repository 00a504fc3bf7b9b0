"""The part of a run's time that moved it on, over all its starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from twotower.core.errors import FolderError
from twotower.training.monitoring.phases import PHASES, PRODUCTIVE

# Saves whose time is remembered, which a run may go back to.
_SAVES = 100
# More than any second or step; Python's dates end there.
_MOST = 2.0**37
# lost: steps that were computed again, as no checkpoint had them; away: from the last sign of a
# process to the next start of training.
SPENT = (*PHASES, "lost", "away")


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Time of a run up to some moment.

    Attributes:
        begun: Time of the first start, in seconds since the epoch.
        starts: Number of starts.
        seconds: Seconds by what they were spent on, `SPENT`.
        saves: Step of a checkpoint -> productive seconds, by phase, that it holds.
    """

    begun: float
    starts: int
    seconds: Mapping[str, float]
    saves: Mapping[int, Mapping[str, float]]

    @property
    def total(self) -> float:
        """Seconds since the first start."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the time that steps took which were not lost."""
        productive = sum(self.seconds[name] for name in PRODUCTIVE)
        return productive / self.total if self.total else 0.0

    def plus(self, spent: Mapping[str, float]) -> Ledger:
        """Returns the ledger with the seconds of the present start."""
        seconds = {name: self.seconds[name] + spent.get(name, 0.0) for name in SPENT}
        return dataclasses.replace(self, seconds=seconds)

    def saved(self, step: int) -> Ledger:
        """Returns the ledger with a checkpoint of a step."""
        productive = {name: self.seconds[name] for name in PRODUCTIVE}
        saves = {**self.saves, step: productive}
        latest = dict(list(saves.items())[-_SAVES:])
        return dataclasses.replace(self, saves=latest)

    def restarted(self, step: int, away: float) -> Ledger:
        """Returns the ledger at the start of another process.

        Args:
            step: Step that it goes on from.
            away: Seconds since the last time that the ledger was written.
        """
        known = [saved for saved in self.saves if saved <= step]
        # What the checkpoint holds that the run goes on from: all later work is done again.
        kept = self.saves[max(known)] if known else dict.fromkeys(PRODUCTIVE, 0.0)
        seconds = dict(self.seconds)
        for name in PRODUCTIVE:
            # Moved from productive to lost, so that the parts still add up to the whole.
            seconds["lost"] += max(seconds[name] - kept[name], 0.0)
            seconds[name] = min(seconds[name], kept[name])
        # Clocks of two machines may differ, and nobody was away for less than nothing.
        seconds["away"] += max(away, 0.0)
        saves = {saved: self.saves[saved] for saved in known}
        return Ledger(self.begun, self.starts + 1, seconds, saves)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a file."""
        return {
            "begun": self.begun,
            "starts": self.starts,
            "goodput": round(self.goodput, 4),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "saves": {str(step): dict(saved) for step, saved in self.saves.items()},
        }


def begin(now: float) -> Ledger:
    """Returns the ledger of a run that starts for the first time.

    Args:
        now: Seconds since the epoch.
    """
    return Ledger(now, 1, dict.fromkeys(SPENT, 0.0), {})


def read_ledger(content: Mapping[str, Any]) -> Ledger | None:
    """Returns the ledger in the content of a file; None where it holds none that can be read."""
    try:
        seconds = {name: check_number(content["seconds"].get(name, 0.0), name) for name in SPENT}
        saves = {}
        for step, saved in content["saves"].items():
            saves[int(step)] = {name: check_number(saved[name], name) for name in PRODUCTIVE}
        begun = check_number(content["begun"], "begun")
        return Ledger(begun, int(content["starts"]), seconds, saves)
    # A file that a person has edited, or another version has written, must not end a training.
    except (AttributeError, FolderError, KeyError, TypeError, ValueError):
        return None


def check_number(value: Any, name: str) -> float:
    """Returns a number of a file that may be damaged.

    Args:
        value: Value that the file has.
        name: Name of the value, for the refusal.

    Raises:
        FolderError: It is no number from 0 up to the seconds of some thousand years.
    """
    # NaN is not within any bounds; one of them in a sum would be there for ever.
    if not isinstance(value, (int, float)) or not 0 <= value < _MOST:
        raise FolderError(f"{name} is {value!r}.")
    return float(value)


def format_ledger(ledger: Ledger) -> str:
    """Returns a sentence on where the time of a run went."""
    parts = []
    for name in SPENT:
        value = ledger.seconds[name]
        # Below that the line would tell 0.0 %.
        if value >= 0.0005 * ledger.total:
            parts.append(f"{name} {value:,.1f} s")
    starts = "1 start" if ledger.starts == 1 else f"{ledger.starts} starts"
    return (
        f"Goodput {ledger.goodput:.1%} of {ledger.total:,.1f} s and {starts}: {', '.join(parts)}."
    )
