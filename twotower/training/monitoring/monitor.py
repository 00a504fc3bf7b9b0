"""All that watches a training while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from absl import logging

from twotower.training.metrics import Phase, StepMetrics
from twotower.training.monitoring.goodput import format_ledger
from twotower.training.monitoring.heartbeat import Heartbeat
from twotower.training.monitoring.phases import Phases
from twotower.training.monitoring.profile import Profiler

# Phases of which a line of metrics has the seconds of a step.
_OF_STEP: tuple[Phase, ...] = ("input", "compute", "checkpoint", "validation")


@dataclasses.dataclass(frozen=True)
class Monitoring:
    """What is watched in a training.

    Attributes:
        kind: Kind of the devices, whose peaks are compared with, a key of
            `twotower.training.planning.peaks.CHIPS`; "" takes that of the devices, if it is known.
        profile_steps: First and last step of a profile; None for no profile.
        rates: Function from the seconds of a step to what it reaches of the devices' peaks, see
            `twotower.training.monitoring.rates`; None where these are not known.
    """

    kind: str = ""
    profile_steps: tuple[int, int] | None = None
    rates: Callable[[float], Mapping[str, float]] | None = None


# What every training shows.
NOT_ASKED = Monitoring()


class Monitor:
    """The `Watch` of one start of a training; a context.

    Args:
        workdir: Folder of the run.
        monitoring: What is watched.
        phases: Clock of the training.
        start: Step that the run goes on from.
        steps: Number of steps of the whole run.
    """

    def __init__(
        self, workdir: Path, monitoring: Monitoring, phases: Phases, start: int, steps: int
    ) -> None:
        self._phases = phases
        self._profiler = Profiler(workdir, monitoring.profile_steps)
        self._heartbeat = Heartbeat(workdir, phases, start=start, steps=steps)
        self._rates = monitoring.rates
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Monitor:
        self._open.enter_context(self._heartbeat)
        self._open.enter_context(self._profiler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if error is None:
            logging.info("%s", format_ledger(self._heartbeat.ledger))

    def during(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """Lets the time of a block belong to a phase."""
        return self._phases.during(phase)

    def start_profile(self, step: int) -> None:
        """Begins a profile if it is time.

        Args:
            step: Number of steps done.
        """
        self._profiler.start_before(step)

    def until_edge(self, step: int) -> list[int]:
        """Returns the numbers of steps to the ends of a profile, which no dispatch may cross."""
        return self._profiler.until_edge(step)

    def note_save(self, step: int) -> None:
        """Notes that a checkpoint was saved at a step."""
        self._heartbeat.note_save(step)

    def note(self, step: int, metrics: StepMetrics) -> None:
        """Notes a dispatch, and ends a profile that it was the last one of.

        Args:
            step: Last step of the dispatch.
            metrics: Metrics of the steps, which know when the devices have done them.
        """
        # The first dispatch compiles.
        self._phases.switch("compute")
        self._heartbeat.note(step)
        if not self._profiler.ends_at(step):
            return
        # The devices may be steps behind the host: a profile that ends now would miss them.
        metrics.read()
        with self._phases.during("other"):
            self._profiler.stop()
        metrics.resume()

    def measure(self, steps: int) -> dict[str, float]:
        """Returns figures on the time since the last call.

        Args:
            steps: Number of steps in that time.
        """
        spent = self._phases.since_last()
        values = {}
        for name in _OF_STEP:
            values[f"step_seconds/{name}"] = spent[name] / steps
        values["goodput"] = self._heartbeat.ledger.goodput
        # Steps that were compiled in that time took none of it.
        if self._rates is not None and not spent["start"]:
            seconds = (spent["input"] + spent["compute"]) / steps
            rates = self._rates(seconds)
            self._heartbeat.note_rates(rates)
            values |= rates
        return values
