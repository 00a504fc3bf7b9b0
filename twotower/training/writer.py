"""Metrics as they come: JSON lines, TensorBoard events, and a bar or log lines for whoever
watches."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import tqdm
from absl import logging

from twotower.core.files import atomic


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
