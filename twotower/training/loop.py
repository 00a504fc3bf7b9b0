"""The training loop: steps, validations, checkpoints; killed at any moment, it goes on from the last one to the same end."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from twotower.config import Config
from twotower.data.batches import Batches, gather
from twotower.data.prepare import Prepared
from twotower.towers.two_tower import Weights
from twotower.training import optimizers
from twotower.training.checkpoint import Checkpoints, abstract_like
from twotower.training.state import TrainState
from twotower.training.step import Trainer, init_state, train_step
from twotower.training.writer import MetricWriter
from twotower.validation import ConfigError

Validate = Callable[[Weights], Mapping[str, float]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the last good checkpoint."""


@dataclasses.dataclass
class Record:
    """What the loop remembers from one validation to the next, saved with each checkpoint as JSON."""

    best: float = -math.inf
    best_step: int = 0
    waited: int = 0
    stopped: bool = False

    def update(self, step: int, value: float | None, patience: int) -> None:
        if value is None:
            return
        if value > self.best:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        self.stopped = bool(patience) and self.waited >= patience


def open_checkpoints(workdir: Path, config: Config, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of the run in `workdir`; see `Checkpoints`."""
    training = config.training
    run = hashlib.sha256(json.dumps(config.trained(), sort_keys=True).encode()).hexdigest()[:16]
    return Checkpoints(
        Path(workdir) / "checkpoints", metric=training.metric, keep=training.keep_checkpoints, run=run, read_only=read_only
    )


def abstract_state(trainer: Trainer, num_users: int, num_items: int) -> TrainState:
    """The shapes of a state, without allocating it."""
    shapes = {"user": (num_users,), "item": (num_items,), "rows": ()}
    counts = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    return abstract_like(jax.eval_shape(functools.partial(init_state, trainer), counts))


def fit(trainer: Trainer, prepared: Prepared, workdir: Path, *, validate: Validate | None) -> TrainState:
    """Trains, from the latest checkpoint of `workdir` on, to the last step or until validation stops improving.

    Args:
        validate: weights -> validation metrics, which must hold `config.training.metric`; None where nothing is held out.

    Raises:
        TrainingError: the loss or a gradient is not finite.
        ConfigError: the batch is larger than the data, or the metric is not one that `validate` gives.
    """
    config = trainer.config.training
    batches = Batches(
        prepared.train, prepared.features, batch_size=config.batch_size, seed=config.seed,
        resident_megabytes=config.resident_megabytes,
    )  # fmt: skip
    with open_checkpoints(workdir, trainer.config) as checkpoints:
        state, record = _start(trainer, prepared, checkpoints)
        start = int(state.step)
        if record.stopped or start >= config.steps:
            logging.info("Training of %s had ended at step %d.", workdir, start)
            return state
        with MetricWriter(workdir, start=start, steps=config.steps) as writer:
            meter = _Meter(writer, checkpoints, config.batch_size, config.log_every)
            if validate and not start:
                _check_metric(validate(state.weights), config.metric)
            step_fn = compile_step(trainer, batches)
            with jax.transfer_guard("disallow"):
                for step in range(start, config.steps):
                    state, metrics = step_fn(state, step)
                    meter.launched(step + 1, metrics)
                    if (step + 1) % config.validate_every and step + 1 < config.steps:
                        continue
                    # A checkpoint must not hold what a step made NaN, so this one step is waited for.
                    meter.read()
                    with jax.transfer_guard("allow"):
                        state = _validate_and_save(trainer, state, record, checkpoints, writer, validate)
                    meter.resume()
                    if record.stopped:
                        break
            meter.flush()
    best = f"; best {config.metric} {record.best:.4f} at step {record.best_step}" if validate else ""
    logging.info("Training ended at step %d%s.", state.step, best)
    return state


def compile_step(trainer: Trainer, batches: Batches) -> Callable[[TrainState, int], tuple[TrainState, Any]]:
    """(state, step) -> (state, metrics), with the state donated; batches gathered on the device where they are resident."""
    if batches.resident is None:
        jitted = jax.jit(functools.partial(train_step, trainer=trainer), donate_argnums=0)
        return lambda state, step: jitted(state, jax.device_put(batches.load(step)))

    def resident_step(state: TrainState, data: Any, index: jax.Array) -> tuple[TrainState, Any]:
        return train_step(state, gather(data, index), trainer=trainer)

    resident = jax.device_put(batches.resident)
    jitted = jax.jit(resident_step, donate_argnums=0)
    return lambda state, step: jitted(state, resident, jax.device_put(batches.indices(step)))


def count_rows(prepared: Prepared) -> dict[str, Any]:
    """Training rows of each user, of each item of the corpus, and in all: `TrainState.frequency`."""
    sizes = {"user": len(prepared.users), "item": len(prepared.items)}
    counts = {side: np.bincount(getattr(prepared.train, side), minlength=n) for side, n in sizes.items()}
    return {side: x.astype(np.float32) for side, x in counts.items()} | {"rows": np.float32(len(prepared.train))}


def _start(trainer: Trainer, prepared: Prepared, checkpoints: Checkpoints) -> tuple[TrainState, Record]:
    latest = checkpoints.latest()
    if latest is None:
        state = jax.jit(functools.partial(init_state, trainer))(count_rows(prepared))
        return state, Record()
    abstract = abstract_state(trainer, len(prepared.users), len(prepared.items))
    state, record = checkpoints.restore(latest, abstract)
    logging.info("Resuming at step %d.", latest)
    return state, Record(**record)


def _check_metric(values: Mapping[str, float], metric: str) -> None:
    """Asked before the first step, so that a misspelt metric does not cost an hour."""
    if metric not in values:
        raise ConfigError(f"config.training.metric={metric!r} is not measured. Measured: {', '.join(values)}.")


def _validate_and_save(
    trainer: Trainer, state: TrainState, record: Record, checkpoints: Checkpoints, writer: MetricWriter,
    validate: Validate | None,
) -> TrainState:  # fmt: skip
    config, step = trainer.config.training, int(state.step)
    try:
        values = dict(validate(state.weights)) if validate else {}
    except ValueError as error:  # vectors that cannot be ranked: the parameters are no longer finite
        raise TrainingError(f"Validation failed at step {step}: {error} {_last_good(checkpoints)}") from error
    value = values.get(config.metric)
    record.update(step, value, config.patience)
    if value is not None:
        plateau = optimizers.update_plateau(state.opt_state["plateau"], value, config.schedule)
        state = state.replace(opt_state=state.opt_state | {"plateau": plateau})
        shown = {config.metric: f"{value:.4f}", "best": f"{record.best:.4f}"}
        writer.write(step, {f"validation/{name}": x for name, x in values.items()}, show=shown)
    checkpoints.save(step, state, record=dataclasses.asdict(record), metrics=values)
    return state


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    latest = checkpoints.latest()
    where = f"The last good checkpoint is {checkpoints.folder / str(latest)}." if latest else "There is no checkpoint before it."
    return f"{where} Lower the learning rates, or set config.training.optimizer.clip_norm."


class _Meter:
    """Reads the metrics of a step after the next one was launched, averages them and writes them."""

    def __init__(self, writer: MetricWriter, checkpoints: Checkpoints, batch_size: int, log_every: int) -> None:
        self._writer, self._checkpoints = writer, checkpoints
        self._batch_size, self._log_every = batch_size, log_every
        self._pending: tuple[int, Any] | None = None
        self._window: list[dict[str, float]] = []
        # The rate is measured from the first step read on, so that compiling does not count.
        self._since, self._timed, self._read_at, self._step = 0.0, -1, 0.0, 0

    def launched(self, step: int, metrics: Any) -> None:
        self.read()
        self._pending = (step, metrics)

    def resume(self) -> None:
        """Validations do not count against the rate of training."""
        self._since += time.perf_counter() - self._read_at

    def flush(self) -> None:
        """Writes what is left when training ends between two lines."""
        self.read()
        if self._window:
            self._write()

    def read(self) -> None:
        if self._pending is None:
            return
        (self._step, metrics), self._pending = self._pending, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise TrainingError(
                f"The loss is {values['loss']} and the norm of the gradient {values['grad_norm']} at step {self._step}. "
                f"{_last_good(self._checkpoints)}"
            )
        self._writer.advance()
        self._window.append(values)
        self._read_at, self._timed = time.perf_counter(), self._timed + 1
        self._since = self._since if self._timed else self._read_at
        if self._step % self._log_every == 0:
            self._write()

    def _write(self) -> None:
        means = {name: float(np.mean([w[name] for w in self._window])) for name in self._window[0]}
        show = {"loss": f"{means['loss']:.4f}"}
        if self._timed:
            means["examples_per_second"] = self._batch_size * self._timed / (self._read_at - self._since)
            show["examples/s"] = f"{means['examples_per_second']:,.0f}"
        self._writer.write(self._step, means, show=show)
        self._window, self._since, self._timed = [], self._read_at, 0
