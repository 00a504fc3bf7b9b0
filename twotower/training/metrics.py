"""The metrics of steps, read when the next ones are under way, averaged and written; and the stop
when one is not finite."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from twotower.core.errors import TrainingError
from twotower.core.files import atomic
from twotower.training.checkpoint import Checkpoints


def last_good(checkpoints: Checkpoints) -> str:
    """Where to go on from, for an error message."""
    checkpoints.wait()
    latest = checkpoints.latest()
    where = (
        f"The last good checkpoint is {checkpoints.folder / str(latest)}."
        if latest
        else "There is no checkpoint before it."
    )
    return f"{where} Lower the learning rates, or set config.training.optimizer.clip_norm."


class StepMetrics:
    """Reads the metrics of a dispatch after the next one was launched, averages them and writes
    them."""

    def __init__(
        self, writer: Any, checkpoints: Checkpoints, batch_size: int, log_every: int
    ) -> None:
        self._writer, self._checkpoints = writer, checkpoints
        self._batch_size, self._log_every = batch_size, log_every
        self._pending: tuple[int, Any] | None = None
        self._window: list[dict[str, float]] = []
        # The rate is measured from the first dispatch read on, so that compiling does not count.
        self._since: float | None = None
        self._timed, self._read_at, self._step = 0, 0.0, 0
        self._told = False

    def launched(self, step: int, metrics: Any) -> None:
        """`metrics` [K] of the K steps up to `step` are on their way."""
        self.read()
        self._pending = (step, metrics)

    def resume(self) -> None:
        """Validations do not count against the rate of training."""
        if self._since is not None:
            paused = time.perf_counter() - self._read_at
            self._since, self._read_at = self._since + paused, self._read_at + paused

    def flush(self) -> None:
        """Writes what is left when training ends between two lines."""
        self.read()
        if self._window:
            self._write()

    def read(self) -> None:
        """Waits for what was launched."""
        if self._pending is None:
            return
        (last, metrics), self._pending = self._pending, None
        values = {name: np.asarray(x) for name, x in jax.device_get(metrics).items()}
        count = len(values["loss"])
        self._read_at = time.perf_counter()
        if self._since is None:
            self._since = self._read_at
        else:
            self._timed += count
        for i in range(count):
            self._step = last - count + 1 + i
            self._add({name: float(x[i]) for name, x in values.items()})

    def _add(self, values: dict[str, float]) -> None:
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise TrainingError(
                f"The loss is {values['loss']} and the norm of the gradient {values['grad_norm']} at step {self._step}. "
                f"{last_good(self._checkpoints)}"
            )
        if values["grad_norm"] == 0 and not self._told:
            self._told = True
            logging.warning(
                "Step %d has no gradient at all: no row of its batch has a weight, a label or a negative to learn from. With a "
                "batch of one user, say, every other item is another positive of that user.",
                self._step,
            )
        self._writer.advance()
        self._window.append(values)
        if self._step % self._log_every == 0:
            self._write()

    def _write(self) -> None:
        means = {name: float(np.mean([w[name] for w in self._window])) for name in self._window[0]}
        show = {"loss": f"{means['loss']:.4f}"}
        if self._timed:
            means["examples_per_second"] = (
                self._batch_size * self._timed / (self._read_at - self._since)
            )
            show["examples/s"] = f"{means['examples_per_second']:,.0f}"
        self._writer.write(self._step, means, show=show)
        self._window, self._since, self._timed = [], self._read_at, 0


class MetricWriter:
    """Writes to `metrics.jsonl` and `tensorboard/` of a run, and shows progress; a context that
    closes them.

    Args:
        workdir: the run.
        start: the step that the run goes on from; lines of later steps, left by a killed process,
            are removed.
        steps: of the whole run.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int) -> None:
        from tensorboardX import SummaryWriter

        path = Path(workdir) / "metrics.jsonl"
        _truncate(path, start)
        self._lines = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(path.parent / "tensorboard"), purge_step=start + 1 if start else None
        )
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._events.close()
        self._lines.close()

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float], *, show: Mapping[str, str]) -> None:
        """One line of metrics.

        Args:
            show: the few to display, as text, until they are replaced.
        """
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._shown |= show
        self._bar.set_postfix(self._shown)
        if self._bar.disable:
            logging.info("step %d: %s", step, ", ".join(f"{k} {v}" for k, v in show.items()))


class _Silent:
    """What the processes write that are not the first."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def advance(self) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float], *, show: Mapping[str, str]) -> None:
        pass


def open_writer(workdir: Path, *, start: int, steps: int) -> MetricWriter | _Silent:
    """A writer on the first process, and on the others one that writes nothing: all of them know
    the same metrics."""
    return _Silent() if jax.process_index() else MetricWriter(workdir, start=start, steps=steps)


def _truncate(path: Path, start: int) -> None:
    """Keeps the whole lines of steps up to `start`: a killed process may have left later ones, and
    half a line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > start:
            break
        kept.append(line)
    with atomic(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
