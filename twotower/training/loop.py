"""The training loop: steps, validations, checkpoints; killed at any moment, it goes on from the
last one to the same end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from twotower.config import Config, TrainingConfig
from twotower.core.errors import ScoreError, TrainingError
from twotower.core.mesh import (
    AXIS,
    REPLICATED,
    compiler_options,
    device_group,
    make_mesh,
    process_part,
    put,
    put_parts,
    shard_map_if_needed,
    shardings,
)
from twotower.pipeline.batches import Batches
from twotower.pipeline.prepare import PreparedData
from twotower.towers.two_tower import Weights
from twotower.training import optimizers
from twotower.training.candidates import count_rows, step_constants
from twotower.training.checkpoint import Checkpoints
from twotower.training.checks import check_batch, check_batch_norm, check_metric, check_miner
from twotower.training.init import abstract_state, init_on
from twotower.training.memory import check_memory
from twotower.training.metrics import StepMetrics, last_good, open_writer
from twotower.training.state import Trainer, TrainState, state_specs
from twotower.training.step import EMBED_BLOCK, train_step

Validate = Callable[[Weights], Mapping[str, float]]
Miner = Callable[[Weights], Any]
RunSteps = Callable[[TrainState, int], tuple[TrainState, Any]]


@dataclasses.dataclass
class EarlyStopping:
    """What the loop remembers from one validation to the next, saved with each checkpoint as JSON.

    `users` and `items`, of the corpus, let a checkpoint be read without the data.
    """

    users: int
    items: int
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
    run = hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()[:16]
    return Checkpoints(
        Path(workdir) / "checkpoints",
        metric=training.metric,
        keep=training.keep_checkpoints,
        run=run,
        read_only=read_only,
    )


def fit(
    trainer: Trainer,
    prepared: PreparedData,
    workdir: Path,
    *,
    validate: Validate | None,
    mine: Miner | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains, from the latest checkpoint of `workdir` on, to the last step or until validation
    stops improving.

    Args:
        validate: weights -> validation metrics, which must hold `config.training.metric`; None
            where nothing is held out.
        mine: weights -> pools of hard negatives, where `config.objective.negatives.mined` asks for
            some.
        mesh: the devices; all of them by default.

    Raises:
        TrainingError: the loss or a gradient is not finite.
        ConfigError: the batch is larger than the data or cannot be divided over the devices, the
            run does not fit into their memory, or the metric is not one that `validate` gives.
    """
    identity, trainer = trainer.config, trainer.scaled_to(prepared.num_examples)
    config, mesh = trainer.config.training, mesh or make_mesh()
    batches = _batches(prepared, config)
    _check(trainer, batches, prepared, mesh, mine)
    if config.steps != identity.training.steps:
        logging.info(
            "%d steps for %d examples: %d were meant for %d.",
            config.steps,
            prepared.num_examples,
            identity.training.steps,
            config.steps_for,
        )
    with open_checkpoints(workdir, identity) as checkpoints:
        state, record = _start(trainer, prepared, checkpoints, mesh)
        start = int(state.step)
        if record.stopped or start >= config.steps:
            logging.info("Training of %s had ended at step %d.", workdir, start)
            return state
        with open_writer(workdir, start=start, steps=config.steps) as writer:
            if validate and not start:
                check_metric(validate(state.weights), config.metric)
            run = _Run(trainer, checkpoints, writer, record, validate, mine, mesh)
            state = run.steps(state, compile_steps(trainer, batches, prepared, mesh))
    best = (
        f"; best {config.metric} {record.best:.4f} at step {record.best_step}" if validate else ""
    )
    logging.info("Training ended at step %d%s.", state.step, best)
    return state


def _batches(prepared: PreparedData, config: TrainingConfig) -> Batches:
    """Returns the batches of training rows or of sequences."""
    return Batches(
        prepared.training_examples(),
        batch_size=config.batch_size,
        seed=config.seed,
        resident_megabytes=config.resident_megabytes,
    )


@dataclasses.dataclass
class _Run:
    """What happens between steps."""

    trainer: Trainer
    checkpoints: Checkpoints
    writer: Any
    record: EarlyStopping
    validate: Validate | None
    mine: Miner | None
    mesh: Mesh

    def steps(self, state: TrainState, run_steps: RunSteps) -> TrainState:
        config = self.trainer.config.training
        meter = StepMetrics(self.writer, self.checkpoints, config.batch_size, config.log_every)
        with jax.transfer_guard("disallow"):
            for step in range(int(state.step), config.steps, config.steps_per_dispatch):
                state = self._mined(state, step, meter)
                state, metrics = run_steps(state, step)
                done = step + config.steps_per_dispatch
                meter.launched(done, metrics)
                if done % config.validate_every and done < config.steps:
                    continue
                # A checkpoint must not hold what a step made NaN, so this one step is waited for.
                meter.read()
                with jax.transfer_guard("allow"):
                    state = self._validate_and_save(state)
                meter.resume()
                if self.record.stopped:
                    break
        meter.flush()
        return state

    def _mined(self, state: TrainState, step: int, meter: StepMetrics) -> TrainState:
        """The state with fresh pools of hard negatives, when it is time for them."""
        negatives = self.trainer.sampling.config
        if not negatives.mined or not step or step % negatives.mined_refresh:
            return state
        # A loss that is not finite is told as such, before its vectors are refused for it.
        meter.read()
        with jax.transfer_guard("allow"):
            pools = put(self.mesh, self.mine(state.weights), REPLICATED)
        meter.resume()
        return state.replace(negatives=state.negatives | {"mined": pools})

    def _validate_and_save(self, state: TrainState) -> TrainState:
        config, step, record = self.trainer.config.training, int(state.step), self.record
        try:
            values = dict(self.validate(state.weights)) if self.validate else {}
        except ScoreError as error:  # the parameters are no longer finite
            raise TrainingError(
                f"Validation failed at step {step}: {error} {last_good(self.checkpoints)}"
            ) from error
        value = values.get(config.metric)
        record.update(step, value, config.patience)
        if value is not None:
            plateau = optimizers.update_plateau(state.opt_state["plateau"], value, config.schedule)
            state = state.replace(
                opt_state=state.opt_state | {"plateau": put(self.mesh, plateau, REPLICATED)}
            )
            shown = {config.metric: f"{value:.4f}", "best": f"{record.best:.4f}"}
            self.writer.write(
                step, {f"validation/{name}": x for name, x in values.items()}, show=shown
            )
        self.checkpoints.save(step, state, record=dataclasses.asdict(record), metrics=values)
        return state


def compile_steps(
    trainer: Trainer, batches: Batches, prepared: PreparedData, mesh: Mesh
) -> RunSteps:
    """(state, step) -> (state after `steps_per_dispatch` steps, metrics of each), with the state
    donated.

    Batches are gathered on the device where the data is resident; otherwise each process gathers
    its own rows of each.
    """
    count, group = trainer.config.training.steps_per_dispatch, device_group(mesh)
    resident = None if batches.resident is None else put(mesh, batches.resident, REPLICATED)
    catalogue = step_constants(trainer.sampling, prepared, mesh, resident)

    def one(state: TrainState, part: Any, data: Any, catalogue: Any) -> tuple[TrainState, Any]:
        batch = part if data is None else batches.gather(data, part)
        return train_step(state, batch, catalogue, trainer=trainer, group=group)

    def several(state: TrainState, parts: Any, data: Any, catalogue: Any) -> tuple[TrainState, Any]:
        if count > 1:
            return jax.lax.scan(lambda state, part: one(state, part, data, catalogue), state, parts)
        state, metrics = one(state, jax.tree.map(lambda x: x[0], parts), data, catalogue)
        return state, jax.tree.map(lambda x: x[None], metrics)

    specs, parts = state_specs(abstract_state(trainer, mesh)), PartitionSpec(None, AXIS)
    out = shardings(mesh, (specs, REPLICATED))
    jitted = jax.jit(
        shard_map_if_needed(
            mesh, several, (specs, parts, REPLICATED, REPLICATED), (specs, REPLICATED)
        ),
        donate_argnums=0,
        out_shardings=out,
        compiler_options=compiler_options(mesh),
    )
    size = trainer.config.training.batch_size
    own = process_part(mesh, size)

    def load(step: int) -> Any:
        indices = [batches.indices(step + i)[own] for i in range(count)]
        host = (
            np.stack(indices)
            if resident is not None
            else jax.tree.map(lambda *x: np.stack(x), *map(batches.load, indices))
        )
        return put_parts(mesh, host, parts, size, axis=1)

    return lambda state, step: jitted(state, load(step), resident, catalogue)


def _check(
    trainer: Trainer, batches: Batches, prepared: PreparedData, mesh: Mesh, mine: Miner | None
) -> None:
    """Refuses what cannot run on `mesh`, before anything is allocated."""
    config, negatives = trainer.config, trainer.sampling.config
    check_batch(config.training, mesh)
    check_batch_norm(config, negatives, mesh.size, max_rows=EMBED_BLOCK)
    check_miner(negatives, mine is not None)
    data = sum(x.nbytes for x in jax.tree.leaves(batches.resident))
    drawn = trainer.sampling.needs_features and not data
    features = (
        sum(x.nbytes for x in jax.tree.leaves(dict(prepared.features["item"]))) if drawn else 0
    )
    check_memory(
        mesh, abstract_state(trainer, mesh), {"training data": data, "item features": features}
    )


def _start(
    trainer: Trainer, prepared: PreparedData, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, EarlyStopping]:
    latest = checkpoints.latest()
    if latest is None:
        return init_on(mesh, trainer, count_rows(prepared)), EarlyStopping(*trainer.corpus[:2])
    state, record = checkpoints.restore(latest, abstract_state(trainer, mesh))
    logging.info("Resuming at step %d.", latest)
    return state, EarlyStopping(**record)
