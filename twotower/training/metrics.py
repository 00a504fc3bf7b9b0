"""Metrics of training: read from the device while the next steps run, averaged, and written as JSON
lines, TensorBoard events, and a progress bar or log lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging

from twotower.core import progress
from twotower.core.errors import TrainingError
from twotower.core.files import atomic
from twotower.training.checkpoint import Checkpoints

METRICS = "metrics.jsonl"  # file of the metrics in the folder of a run
# start: reading data and compiling; input: the host makes a batch and moves it; compute: the host
# waits for the devices; other: mining hard negatives, and writing profiles.
Phase = Literal["start", "input", "compute", "checkpoint", "validation", "other"]


@runtime_checkable
class Writer(Protocol):
    """Writer of metrics by step; a context that closes its files."""

    def __enter__(self) -> Writer: ...

    def __exit__(self, *exception: object) -> None: ...

    def advance(self) -> None:
        """Shows one step more."""
        ...

    def write(self, step: int, values: Mapping[str, float], *, show: Mapping[str, str]) -> None:
        """Writes one line of metrics.

        Args:
            step: Number of steps done.
            values: Metrics by name.
            show: Metrics to display, as text, until they are replaced.
        """
        ...


def recovery_hint(checkpoints: Checkpoints) -> str:
    """Returns the end of an error message: the checkpoint to go on from, and the cure."""
    # A save in progress is of a good state, and must not be cut off by the error.
    checkpoints.wait()
    latest = checkpoints.latest()
    origin = "There is no checkpoint before it."
    if latest:
        origin = f"The last good checkpoint is {checkpoints.folder / str(latest)}."
    return f"{origin} Lower the learning rates, or set config.training.optimizer.clip_norm."


@runtime_checkable
class Watch(Protocol):
    """Watches a training while it runs, and changes nothing in it.

    `twotower.training.monitoring.monitor.Monitor` is one.
    """

    def during(self, phase: Phase) -> contextlib.AbstractContextManager[Any]:
        """Lets the time of a block belong to a phase."""
        ...

    def start_profile(self, step: int) -> None:
        """Begins a profile if it is time.

        Args:
            step: Number of steps done.
        """
        ...

    def until_edge(self, step: int) -> list[int]:
        """Returns the numbers of steps to the ends of a profile, which no dispatch may cross."""
        ...

    def note(self, step: int, metrics: StepMetrics) -> None:
        """Notes a dispatch.

        Args:
            step: Last step of the dispatch.
            metrics: Metrics of the steps.
        """
        ...

    def note_save(self, step: int) -> None:
        """Notes that a checkpoint was saved at a step."""
        ...

    def measure(self, steps: int) -> dict[str, float]:
        """Returns figures on the time since the last call.

        Args:
            steps: Number of steps in that time.
        """
        ...


class Unwatched:
    """A watch that sees nothing."""

    def during(self, phase: Phase) -> contextlib.AbstractContextManager[Any]:
        del phase
        return contextlib.nullcontext()

    def start_profile(self, step: int) -> None:
        del step

    def until_edge(self, step: int) -> list[int]:
        del step
        return []

    def note(self, step: int, metrics: StepMetrics) -> None:
        del step, metrics

    def note_save(self, step: int) -> None:
        del step

    def measure(self, steps: int) -> dict[str, float]:
        del steps
        return {}


UNWATCHED = Unwatched()


class StepMetrics:
    """Metrics of steps, read after the launch of the next dispatch, averaged and written.

    Args:
        writer: Writer of the averages.
        checkpoints: Checkpoints of the run, which an error names the last of.
        batch_size: Number of examples in a step.
        log_every: Number of steps between two lines.
        measure: Function from the number of steps of a line to further figures of it, by name.

    Attributes:
        seconds_a_step: Time of a step in the dispatch that was read last; 0 before the second one,
            as the first compiles.
    """

    def __init__(
        self,
        writer: Writer,
        checkpoints: Checkpoints,
        batch_size: int,
        log_every: int,
        measure: Callable[[int], Mapping[str, float]],
    ) -> None:
        self._writer = writer
        self._checkpoints = checkpoints
        self._batch_size = batch_size
        self._log_every = log_every
        self._measure = measure
        self.seconds_a_step = 0.0
        # The dispatch that the device works on: its last step, its metrics, its number of steps.
        self._pending: tuple[int, Mapping[str, jax.Array], int] | None = None
        # Metrics of the steps since the last line.
        self._window: list[dict[str, float]] = []
        # The rate is measured from the first dispatch read on, so that compiling does not count.
        self._since: float | None = None
        self._timed_steps = 0
        self._read_at = 0.0
        self._step = 0
        self._warned = False

    def launch(self, step: int, metrics: Mapping[str, jax.Array], count: int) -> None:
        """Reads the metrics of the dispatch before, and keeps those of the one that runs now.

        Args:
            step: Last step of the dispatch.
            metrics: Metrics of its steps, [K] each, of which the first ones are read.
            count: Number of its steps.
        """
        # One dispatch behind: the device has the next steps to do while the host waits here.
        self.read()
        self._pending = (step, metrics, count)

    def resume(self) -> None:
        """Leaves the time since the last reading, such as a validation's, out of the rate."""
        if self._since is not None:
            paused = time.perf_counter() - self._read_at
            self._since += paused
            self._read_at += paused

    def flush(self) -> None:
        """Writes the last line when training ends between two lines."""
        self.read()
        if self._window:
            self._write()

    def read(self) -> None:
        """Waits for the dispatch that runs now, and takes its metrics into account.

        Raises:
            TrainingError: Its loss or a gradient is not finite.
        """
        if self._pending is None:
            return
        last, metrics, count = self._pending
        self._pending = None
        # One transfer for all metrics of all steps, and the only wait for the device.
        values = {name: np.asarray(x) for name, x in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._timed_steps += count
            self.seconds_a_step = (now - self._read_at) / count
        self._read_at = now
        for i in range(count):
            self._step = last - count + 1 + i
            self._add({name: float(x[i]) for name, x in values.items()})

    def _add(self, values: dict[str, float]) -> None:
        """Adds a step to the window, and writes a line every `log_every` steps."""
        loss = values["loss"]
        # The loss of this step may still be finite when its gradient is not.
        norm = values["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"The loss is {loss} and the norm of the gradient {norm} at step {self._step}. "
                f"{recovery_hint(self._checkpoints)}"
            )
        if norm == 0 and not self._warned:
            self._warned = True
            logging.warning(
                "Step %d has no gradient at all: no row of its batch has a weight, a label or a "
                "negative to learn from. With a batch of one user, say, every other item is "
                "another positive of that user.",
                self._step,
            )
        self._writer.advance()
        self._window.append(values)
        if self._step % self._log_every == 0:
            self._write()

    def _write(self) -> None:
        """Writes the means of the window and begins a new one."""
        # Every step has the same metrics.
        names = self._window[0]
        means = {}
        for name in names:
            means[name] = float(np.mean([step[name] for step in self._window]))
        show = {"loss": f"{means['loss']:.4f}"}
        if self._timed_steps and self._since is not None:
            seconds = self._read_at - self._since
            means["examples_per_second"] = self._batch_size * self._timed_steps / seconds
            show["examples/s"] = f"{means['examples_per_second']:,.0f}"
        measured = self._measure(len(self._window))
        if "mfu" in measured:
            show["mfu"] = f"{measured['mfu']:.1%}"
        self._writer.write(self._step, means | dict(measured), show=show)
        self._window = []
        self._since = self._read_at
        self._timed_steps = 0


class MetricWriter:
    """Writer to `metrics.jsonl` and `tensorboard/` of a run, and to a progress bar or the log.

    Args:
        workdir: Folder of the run.
        start: Step that the run goes on from; lines of later steps, left by a killed process, are
            removed.
        steps: Number of steps of the whole run.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int) -> None:
        path = Path(workdir) / METRICS
        _truncate(path, start)
        self._lines = path.open("a", encoding="utf-8")
        self._events = _Events(path.parent / "tensorboard", start)
        self._bar = progress.bar(
            total=steps,
            initial=start,
            unit="step",
            # In a log file every update of a bar would be a line.
            disable=not progress.has_screen(),
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._events.close()
        self._lines.close()

    def advance(self) -> None:
        """See `Writer`."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float], *, show: Mapping[str, str]) -> None:
        """See `Writer`."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        # A killed process leaves whole lines, up to the last one.
        self._lines.flush()
        self._events.write(step, values)
        self._shown |= show
        self._bar.set_postfix(self._shown)
        if self._bar.disable:
            shown = ", ".join(f"{name} {value}" for name, value in show.items())
            logging.info("step %d: %s", step, shown)


class _Events:
    """File of TensorBoard, written by the caller's own thread.

    `SummaryWriter` has a thread, which ends at the first error of the disk without a word; training
    would then wait for it for ever.

    Args:
        folder: Folder of the files, one for each start of the run.
        start: Step that the run goes on from.
    """

    def __init__(self, folder: Path, start: int) -> None:
        # Imported by training alone: loading a run to serve it needs no TensorBoard.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        # Generated while it is imported: type checkers do not see its classes.
        messages: Any = event_pb2
        self._new_event = messages.Event
        self._scalar = summary.scalar
        folder.mkdir(parents=True, exist_ok=True)
        # The number of the process, as a run may go on twice in a second.
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        # TensorBoard hides the events of later steps, which a killed process left.
        if start:
            log = messages.SessionLog(status=messages.SessionLog.START)
            self._writer.write_event(self._new_event(step=start + 1, session_log=log))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        for name, value in values.items():
            scalar = self._scalar(name, value)
            event = self._new_event(wall_time=time.time(), step=step, summary=scalar)
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class SilentWriter:
    """Writer of nothing, on all processes but the first."""

    def __enter__(self) -> SilentWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def advance(self) -> None:
        """See `Writer`."""

    def write(self, step: int, values: Mapping[str, float], *, show: Mapping[str, str]) -> None:
        """See `Writer`."""


def open_writer(workdir: Path, *, start: int, steps: int) -> Writer:
    """Returns the writer of a run; on all processes but the first, one that writes nothing.

    Args:
        workdir: Folder of the run.
        start: Step that the run goes on from.
        steps: Number of steps of the whole run.
    """
    # All processes have the same metrics, and would write the same lines.
    if jax.process_index() > 0:
        return SilentWriter()
    return MetricWriter(workdir, start=start, steps=steps)


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics that the training of a run has written, each with its "step".

    The last line may be half written, and is then left out; others that cannot be read are left out
    with a warning.

    Args:
        workdir: Folder of the run.
    """
    path = Path(workdir) / METRICS
    if not path.exists():
        return []
    # A disk that was not unmounted may leave any bytes.
    text = path.read_bytes().decode("utf-8", "replace")
    lines = []
    damaged = 0
    # Behind the last line's end comes nothing, or a line that was being written.
    for line in text.split("\n")[:-1]:
        values = _parse(line)
        if values is None:
            damaged += 1
        else:
            lines.append(values)
    if damaged:
        logging.warning("%s: %d lines cannot be read, and are left out.", path, damaged)
    return lines


def _parse(line: str) -> dict[str, Any] | None:
    """Returns the metrics of a line; None where it is not one of ours."""
    try:
        values = json.loads(line)
    except (RecursionError, ValueError):
        return None
    if isinstance(values, dict) and type(values.get("step")) is int:
        return values
    return None


def _truncate(path: Path, start: int) -> None:
    """Keeps the whole lines of steps up to `start`, and removes all others."""
    # A killed process may have left lines of later steps, and half a line.
    if not path.exists():
        return
    kept = [line for line in read_lines(path.parent) if line["step"] <= start]
    # A process killed here leaves the old file or the new one, never half of either.
    with atomic(path) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary.write_text(text, encoding="utf-8")
