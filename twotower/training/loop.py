"""The training loop: steps, validations, checkpoints. A run killed at any moment goes on from its
last checkpoint to the same end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from twotower.config import Config, TrainingConfig
from twotower.core.errors import PreemptedError, ScoreError, TrainingError
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
from twotower.pipeline.batches import Batch, Batches, enough_capacity
from twotower.towers.two_tower import Weights
from twotower.training.candidates import TrainingData, count_rows, step_constants
from twotower.training.checkpoint import Checkpoints
from twotower.training.checks import (
    check_batch,
    check_batch_norm,
    check_memory,
    check_metric,
    check_miner,
    format_bytes,
)
from twotower.training.init import abstract_state, init_on
from twotower.training.metrics import (
    UNWATCHED,
    StepMetrics,
    Watch,
    Writer,
    open_writer,
    recovery_hint,
)
from twotower.training.optimizers import StepScalars
from twotower.training.processes import Preemption
from twotower.training.state import Trainer, TrainState, state_specs
from twotower.training.step import EMBED_BLOCK, Metrics, train_step

if TYPE_CHECKING:
    from twotower.pipeline.streaming.stream import Stream

# Weights -> validation metrics by name.
Validate = Callable[[Weights], Mapping[str, float]]
# (step, validation metrics of it), called when its checkpoint is saved; `EndedEarly`, or any other
# exception, ends the run.
OnValidation = Callable[[int, Mapping[str, float]], None]
# Weights -> pools of hard negatives; see `twotower.objectives.negatives`.
Miner = Callable[[Weights], Mapping[str, np.ndarray]]
# (state, its step, greatest number of steps) -> the state after one dispatch, the metrics of its
# steps, [K] each, and how many those are: the first ones of K. The step is a number, since reading
# it from the state would wait for the device.
RunSteps = Callable[[TrainState, int, int], tuple[TrainState, Metrics, int]]
# Options of the training -> its examples as a stream.
OpenStream = Callable[[TrainingConfig], "Stream"]
# (step that the run goes on from, number of all steps) -> what watches the training, to be entered.
OpenWatch = Callable[[int, int], contextlib.AbstractContextManager[Watch]]
# (data on the devices, indices) -> batch.
GatherBatch = Callable[[Mapping[str, Any], Any], Batch]

# Greatest number of steps in a dispatch that is chosen here, and the seconds that one takes at
# most: SIGTERM is answered after two.
MAX_STEPS = 32
MAX_SECONDS = 0.25


class EndedEarly(Exception):
    """Ends a run that promises nothing; raised by an `OnValidation`."""


@dataclasses.dataclass
class EarlyStopping:
    """The best validation so far and the place in the data, saved with each checkpoint as JSON.

    Attributes:
        users: Number of users, which lets a checkpoint be read without the data.
        items: Number of items of the corpus, likewise.
        best: Greatest value of the metric.
        best_step: First step that had it.
        waited: Number of validations since `best_step`.
        stopped: Whether training ends for lack of improvement.
        next_example: Position in the stream of examples that the next step begins at, on any number
            of processes; None in a checkpoint that was made without one.
    """

    users: int
    items: int
    best: float = -math.inf
    best_step: int = 0
    waited: int = 0
    stopped: bool = False
    next_example: int | None = None

    def update(self, step: int, value: float, patience: int) -> None:
        """Takes a validation into account.

        Args:
            step: Step of the validation.
            value: Metric of the validation.
            patience: Number of validations without improvement after which training stops; 0 never
                stops it.
        """
        # Of equal values the first one stays the best, as in `checkpoint.best_step`.
        if value > self.best:
            self.best = value
            self.best_step = step
            self.waited = 0
        else:
            self.waited += 1
        self.stopped = bool(patience) and self.waited >= patience

    def advance(self, examples: int) -> None:
        """Moves the place in the data on by a number of examples."""
        assert self.next_example is not None, "fit knows where a run begins"
        self.next_example += examples


def open_checkpoints(workdir: Path, config: Config, *, read_only: bool = False) -> Checkpoints:
    """Opens the checkpoints of the run in a folder.

    Args:
        workdir: Folder of the run.
        config: Configuration of the run, before its steps are scaled to the data.
        read_only: Whether to leave the folder as it is.
    """
    # Checkpoints know the run that they belong to: a copied folder of another run is refused.
    identity = json.dumps(config.identity(), sort_keys=True)
    return Checkpoints(
        Path(workdir) / "checkpoints",
        metric=config.training.metric,
        keep=config.training.keep_checkpoints,
        run=hashlib.sha256(identity.encode()).hexdigest()[:16],
        read_only=read_only,
    )


def unwatched(start: int, steps: int) -> contextlib.AbstractContextManager[Watch]:
    """Opens a watch that sees nothing."""
    del start, steps
    return contextlib.nullcontext(UNWATCHED)


def fit(
    trainer: Trainer,
    data: TrainingData,
    workdir: Path,
    *,
    validate: Validate | None,
    open_stream: OpenStream | None = None,
    mine: Miner | None = None,
    on_validation: OnValidation | None = None,
    mesh: Mesh | None = None,
    open_watch: OpenWatch = unwatched,
) -> TrainState:
    """Trains from the latest checkpoint of a run on, to the last step or until validation stops
    improving.

    Args:
        trainer: Model, loss and optimizers.
        data: Prepared data.
        workdir: Folder of the run.
        validate: Function from weights to validation metrics, which must hold
            `config.training.metric`; None without validation rows.
        open_stream: Function that opens the stream of the examples, required by
            `config.training.input` = "stream".
        mine: Function from weights to pools of hard negatives, required by
            `config.objective.negatives.mined`.
        on_validation: Function that is told of each validation, such as one that ends a run that
            promises nothing.
        mesh: Devices of the run; all of them by default.
        open_watch: Function that opens what watches the training.

    Returns:
        The state at the end.

    Raises:
        PreemptedError: The process was asked to end by SIGTERM, and has saved where it was.
        TrainingError: The loss or a gradient is not finite.
        ConfigError: The batch cannot be divided over the devices, the run does not fit into their
            memory, or `validate` does not measure the metric.
    """
    # The configuration before it is scaled: the run stays the same when its data grows.
    identity = trainer.config
    mesh = mesh or make_mesh()
    trainer = trainer.scaled_to(data.num_examples, devices=mesh.size)
    config = trainer.config.training
    if config.input == "stream":
        assert open_stream is not None, "a stream is opened by who knows its shards"
        batches = open_stream(config)
    else:
        batches = make_batches(data, config)
    check_run(trainer, batches, data, mesh, has_miner=mine is not None)
    _log_steps(identity.training, config, data.num_examples)
    _log_input(config, batches)
    with open_checkpoints(workdir, identity) as checkpoints:
        state, progress = _restore_or_init(trainer, data, checkpoints, mesh)
        start = int(state.step)
        if progress.next_example is None:
            progress.next_example = start * config.batch_size
        if progress.stopped or start >= config.steps:
            logging.info("Training of %s had ended at step %d.", workdir, start)
            return state
        writing = open_writer(workdir, start=start, steps=config.steps)
        watching = open_watch(start, config.steps)
        with writing as writer, Preemption() as preemption, watching as watch:
            # Nothing is said for so long at no other time.
            logging.info("Compiling: seconds for a small model, minutes for a large one ...")
            # A validation of the fresh model, so that a misspelt metric costs seconds.
            if validate and not start:
                check_metric(validate(state.weights), config.metric)
            run = _Run(
                trainer=trainer,
                checkpoints=checkpoints,
                writer=writer,
                progress=progress,
                preemption=preemption,
                validate=validate,
                mine=mine,
                on_validation=on_validation,
                mesh=mesh,
                watch=watch,
            )
            with open_steps(
                trainer, batches, data, mesh, watch, start, progress.next_example
            ) as run_steps:
                state = run.run_to_end(state, run_steps)
    best = ""
    if validate:
        best = f"; best {config.metric} {progress.best:.4f} at step {progress.best_step}"
    logging.info("Training ended at step %d%s.", state.step, best)
    if validate and progress.best == 0:
        logging.warning(
            "The best validation %s is 0: no right answer was found in any list. Either none can "
            "be (the report of the data, above and in data/report.json, says how many), or the "
            "model has learned nothing: compare it with popularity by evaluate --baselines before "
            "it is used.",
            config.metric,
        )
    return state


def make_batches(data: TrainingData, config: TrainingConfig) -> Batches:
    """Returns the batches of the training examples, gathered on the device or on the host."""
    return Batches(
        data.training_examples(),
        batch_size=config.batch_size,
        seed=config.seed,
        resident_megabytes=config.resident_limit,
    )


def _log_input(config: TrainingConfig, batches: Batches | Stream) -> None:
    """Logs where batches come from, and why."""
    reason = f"config.training.input={config.input!r}"
    if not isinstance(batches, Batches):
        size = format_bytes(batches.shards.num_bytes)
        rows_are = f"are streamed from {len(batches.records):,} records, {size} in all"
    elif batches.resident is not None:
        rows_are = f"lie on the device, {format_bytes(batches.num_bytes)}"
    else:
        rows_are = f"are gathered on the host from {format_bytes(batches.num_bytes)}"
    limit = f"config.training.resident_megabytes={config.resident_megabytes}"
    if config.input == "auto" and rows_are.startswith("lie"):
        reason = f"no more than {limit}"
    elif config.input == "auto":
        reason = (
            f"more than {limit}; for data beyond memory, or for several machines, "
            "config.training.input='stream' reads the part of each process alone"
        )
    logging.info("The training examples %s: %s.", rows_are, reason)


def check_run(
    trainer: Trainer, batches: Batches | Stream, data: TrainingData, mesh: Mesh, *, has_miner: bool
) -> None:
    """Refuses a run that the devices of a mesh cannot train, before anything is allocated.

    Raises:
        ConfigError: The batch cannot be divided, batch normalisation would count padding, there is
            no miner for mined negatives, or memory is short.
    """
    config = trainer.config
    sampling = trainer.sampling
    check_batch(config.training, mesh)
    check_batch_norm(config, sampling.config, mesh.size, max_rows=EMBED_BLOCK)
    check_miner(sampling.config, has_miner)
    data_bytes = 0
    if isinstance(batches, Batches):
        data_bytes = _bytes(batches.resident)
    # The resident data holds the item features already.
    feature_bytes = 0
    if sampling.needs_features and not data_bytes:
        feature_bytes = _bytes(dict(data.features["item"]))
    resident = {"training data": data_bytes, "item features": feature_bytes}
    check_memory(mesh, abstract_state(trainer, mesh), resident)


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _log_steps(config: TrainingConfig, scaled: TrainingConfig, examples: int) -> None:
    """Logs the number of steps if it is not the configured one."""
    if config.passes:
        logging.info(
            "%d steps for %g passes over %d examples, a validation every %d.",
            scaled.steps,
            config.passes,
            examples,
            scaled.validate_every,
        )
    elif scaled.steps != config.steps:
        logging.info(
            "%d steps for %d examples: %d were meant for %d.",
            scaled.steps,
            examples,
            config.steps,
            config.steps_for,
        )


def _restore_or_init(
    trainer: Trainer, data: TrainingData, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, EarlyStopping]:
    """Returns the state and the progress of the latest checkpoint, or fresh ones."""
    latest = checkpoints.latest()
    if latest is None:
        progress = EarlyStopping(trainer.corpus.users, trainer.corpus.items)
        return init_on(mesh, trainer, count_rows(data)), progress
    # Onto the shardings of this mesh, which may have another number of devices than the run had.
    state, record = checkpoints.restore(latest, abstract_state(trainer, mesh))
    logging.info("Resuming at step %d.", latest)
    return state, EarlyStopping(**record)


@dataclasses.dataclass
class _Run:
    """The parts of a run in progress, and its work between steps."""

    trainer: Trainer
    checkpoints: Checkpoints
    writer: Writer
    progress: EarlyStopping
    preemption: Preemption
    validate: Validate | None
    mine: Miner | None
    on_validation: OnValidation | None
    mesh: Mesh
    watch: Watch

    def run_to_end(self, state: TrainState, run_steps: RunSteps) -> TrainState:
        """Runs all further steps; each validation is followed by a checkpoint.

        Raises:
            PreemptedError: The process was asked to end.
        """
        config = self.trainer.config.training
        metrics = StepMetrics(
            self.writer, self.checkpoints, config.batch_size, config.log_every, self.watch.measure
        )
        step = int(state.step)
        dispatches = 0
        # The first ones are of one step and its time is measured.
        most = config.steps_per_dispatch or 1
        # An implicit transfer would make every step wait for the host: here it is an error.
        with jax.transfer_guard("disallow"):
            while step < config.steps:
                if self._is_time_to_mine(step):
                    # Read first, so that a loss that is not finite is reported as such, before its
                    # vectors are refused.
                    metrics.read()
                    state = self._with_mined_negatives(state)
                    metrics.resume()
                self.watch.start_profile(step)
                state, launched, count = run_steps(state, step, min(most, self._until_event(step)))
                step += count
                self.progress.advance(count * config.batch_size)
                dispatches += 1
                metrics.launch(step, launched, count)
                self.watch.note(step, metrics)
                if not config.steps_per_dispatch:
                    most = min(2 * most, _steps_in_time(metrics.seconds_a_step))
                is_preempted = self.preemption.is_due(dispatches)
                is_validated = not step % config.validate_every or step >= config.steps
                if not (is_validated or is_preempted):
                    continue
                # A checkpoint must not hold a NaN: the metrics of its own step are read first.
                metrics.read()
                with jax.transfer_guard("allow"):
                    if is_validated:
                        state = self._validate_and_save(state)
                    else:
                        self._save(step, state, {})
                metrics.resume()
                if self.progress.stopped or step >= config.steps:
                    break
                if is_preempted:
                    metrics.flush()
                    self._end_early(step)
        metrics.flush()
        self._wait_for_save()
        return state

    def _until_event(self, step: int) -> int:
        """Returns the number of steps to the next one that is followed by work of the host."""
        config = self.trainer.config.training
        negatives = self.trainer.sampling.config
        periods = [config.validate_every, config.log_every]
        if negatives.mined:
            periods.append(negatives.mined_refresh)
        waits = [period - step % period for period in periods]
        waits += self.watch.until_edge(step)
        return min(config.steps - step, *waits)

    def _is_time_to_mine(self, step: int) -> bool:
        """Returns whether hard negatives are due: never before the first step, since a fresh model
        ranks at random."""
        negatives = self.trainer.sampling.config
        return bool(negatives.mined) and step > 0 and step % negatives.mined_refresh == 0

    def _with_mined_negatives(self, state: TrainState) -> TrainState:
        """Returns the state with fresh pools of hard negatives."""
        assert self.mine is not None, "check_run refuses a run that has no miner and needs one"
        with jax.transfer_guard("allow"), self.watch.during("other"):
            pools = put(self.mesh, self.mine(state.weights), REPLICATED)
        return state.replace(negatives=state.negatives | {"mined": pools})

    def _validate_and_save(self, state: TrainState) -> TrainState:
        """Validates, moves the plateau schedule on and saves; returns the state that was saved."""
        config = self.trainer.config.training
        step = int(state.step)
        with self.watch.during("validation"):
            values = self._validation(state.weights, step)
        value = values.get(config.metric)
        if value is not None:
            # Before the save: the checkpoint must hold the progress and the schedule after this
            # validation.
            self.progress.update(step, value, config.patience)
            state = self._with_schedule_after(state, value)
            shown = {
                f"validation {config.metric}": f"{value:.4f}",
                "best": f"{self.progress.best:.4f}",
            }
            named = {f"validation/{name}": x for name, x in values.items()}
            self.writer.write(step, named, show=shown)
        self._save(step, state, values)
        if self.on_validation is not None:
            self.on_validation(step, values)
        return state

    def _save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        record = dataclasses.asdict(self.progress)
        with self.watch.during("checkpoint"):
            self.checkpoints.save(step, state, record=record, metrics=metrics)
        self.watch.note_save(step)

    def _wait_for_save(self) -> None:
        with self.watch.during("checkpoint"):
            self.checkpoints.wait()

    def _end_early(self, step: int) -> NoReturn:
        """Ends a run that was asked to end, once its checkpoint is whole."""
        self._wait_for_save()
        raise PreemptedError(
            f"SIGTERM: the run was saved at step {step}, in {self.checkpoints.folder / str(step)}. "
            "The same command goes on from there."
        )

    def _validation(self, weights: Weights, step: int) -> dict[str, float]:
        """Returns the validation metrics; none without validation rows."""
        if self.validate is None:
            return {}
        try:
            return dict(self.validate(weights))
        except ScoreError as error:
            # Scores are refused when the parameters are no longer finite.
            raise TrainingError(
                f"Validation failed at step {step}: {error} {recovery_hint(self.checkpoints)}"
            ) from error

    def _with_schedule_after(self, state: TrainState, value: float) -> TrainState:
        """Returns the state with the plateau schedule moved on by a validation."""
        after = self.trainer.optimizers.after_validation(state.opt_state, value)
        if "plateau" not in after:
            return state
        # Back onto the devices of the run: the compiled step takes its state in one sharding only.
        plateau = put(self.mesh, after["plateau"], REPLICATED)
        return state.replace(opt_state=after | {"plateau": plateau})


def _steps_in_time(seconds_a_step: float) -> int:
    """Returns the number of steps that a dispatch may have; 1 before a step has been measured."""
    if not seconds_a_step:
        return 1
    return max(1, min(MAX_STEPS, int(MAX_SECONDS / seconds_a_step)))


@contextlib.contextmanager
def open_steps(
    trainer: Trainer,
    batches: Batches | Stream,
    data: TrainingData,
    mesh: Mesh,
    watch: Watch,
    start: int,
    next_example: int,
) -> Iterator[RunSteps]:
    """Yields a function that runs the steps from `start` on, and ends what reads ahead of them.

    Args:
        trainer: Model, loss and optimizers.
        batches: Training batches.
        data: Prepared data, of which the constants of a step are made.
        mesh: Devices of the run.
        watch: What watches the training.
        start: Number of steps done.
        next_example: Position of the first example of a stream.
    """
    if isinstance(batches, Batches):
        yield compile_steps(trainer, batches, data, mesh, watch)
        return
    config = trainer.config.training
    constants = _constants(trainer, data, mesh, None)
    program = jit_steps(trainer, mesh, None, 1)
    parts = PartitionSpec(None, AXIS)
    number = put(mesh, np.int32(1), REPLICATED)
    event_capacity = 0
    # A process knows the events of its own part alone, and all processes run one shape: of several
    # each row has a window.
    if jax.process_count() == 1 and _reads_spans(trainer, mesh):
        event_capacity = batches.records.span_capacity(config.batch_size // mesh.size)

    def to_devices(batch: Batch) -> Any:
        first = jax.tree.map(lambda x: x[None], batch)
        return put_parts(mesh, first, parts, axis=1)

    reading = batches.batches(
        next_example,
        config.steps - start,
        part=process_part(mesh, config.batch_size),
        put=to_devices,
        event_capacity=event_capacity,
        devices=mesh.size,
    )
    try:
        with reading as read:

            def run(state: TrainState, step: int, most: int) -> tuple[TrainState, Metrics, int]:
                del step, most  # one step after the other
                with watch.during("input"):
                    batch = next(read)
                state, metrics = program(state, batch, None, constants, number)
                return state, metrics, 1

            yield run
    finally:
        logging.info(
            "This process read %s examples, %s.",
            f"{batches.shards.records_read:,}",
            format_bytes(batches.shards.bytes_read),
        )


def _constants(
    trainer: Trainer, data: TrainingData, mesh: Mesh, resident: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns what steps read and never change; see `step_constants`."""
    constants = step_constants(trainer.sampling, data, mesh, resident)
    scalars = StepScalars.build(trainer.config.training)
    return constants | {"scalars": put(mesh, scalars, REPLICATED)}


def compile_steps(
    trainer: Trainer,
    batches: Batches,
    data: TrainingData,
    mesh: Mesh,
    watch: Watch = UNWATCHED,
) -> RunSteps:
    """Returns a function that runs the steps of one dispatch.

    Resident data is gathered into batches on the device; otherwise each process gathers its own
    rows of each batch on the host.

    Args:
        trainer: Model, loss and optimizers.
        batches: Training batches.
        data: Prepared data, of which the constants of a step are made.
        mesh: Devices of the run.
        watch: What watches the training.

    Returns:
        The function; see `RunSteps`. The state is donated. Fewer steps than asked for are run where
        the dispatch would be larger than `config.training.steps_per_dispatch`, or its batches of
        different shapes.
    """
    config = trainer.config.training
    capacity = _capacity(config, batches)
    own = process_part(mesh, config.batch_size)
    # [K, B, ...]: steps are not divided, rows are.
    parts = PartitionSpec(None, AXIS)
    resident = None
    if batches.resident is not None:
        resident = put(mesh, batches.resident, REPLICATED)
    constants = _constants(trainer, data, mesh, resident)
    event_capacity = 0
    if _reads_spans(trainer, mesh):
        event_capacity = batches.span_capacity(config.batch_size // mesh.size)

    @functools.cache
    def program(event_capacity: int) -> Callable[..., tuple[TrainState, Metrics]]:
        gather = None
        if resident is not None:
            gather = batches.gather
            if event_capacity:
                gather = functools.partial(batches.gather_spans, num_events=event_capacity)
        return jit_steps(trainer, mesh, gather, capacity)

    def capacity_for(batch: np.ndarray) -> int:
        return event_capacity and enough_capacity(
            event_capacity, batches.num_events(batch, mesh.size)
        )

    def to_devices(indices: list[np.ndarray], event_capacity: int) -> Any:
        if resident is not None:
            # Only indices move to the device, a few KiB a step.
            host = np.stack([batch[own] for batch in indices])
        else:
            devices = len(mesh.local_devices)
            loaded = [
                batches.load(batch[own], event_capacity=event_capacity, parts=devices)
                for batch in indices
            ]
            host = jax.tree.map(lambda *x: np.stack(x), *loaded)
        return put_parts(mesh, host, parts, axis=1)

    def run(state: TrainState, step: int, most: int) -> tuple[TrainState, Metrics, int]:
        with watch.during("input"):
            # A function of the step alone: a resumed run sees the batches that it would have seen.
            indices = [batches.indices(s) for s in range(step, step + min(most, capacity))]
            enough = capacity_for(indices[0])
            # In another program last bits may move: each step takes its own, in any company.
            indices = list(itertools.takewhile(lambda x: capacity_for(x) == enough, indices))
            count = len(indices)
            # One shape for any number of steps; those after `count` are not run.
            indices += indices[-1:] * (capacity - count)
            inputs = to_devices(indices, enough)
            number = put(mesh, np.int32(count), REPLICATED)
        state, metrics = program(enough)(state, inputs, resident, constants, number)
        return state, metrics, count

    return run


def _capacity(config: TrainingConfig, batches: Batches) -> int:
    """Returns the greatest number of steps in a dispatch."""
    if config.steps_per_dispatch:
        return config.steps_per_dispatch
    # Several processes measure different times, but must agree; and of batches from the host each
    # step would wait for those of many.
    if batches.resident is None or jax.process_count() > 1:
        return 1
    return MAX_STEPS


def _reads_spans(trainer: Trainer, mesh: Mesh) -> bool:
    """Returns whether a step reads histories as spans, one after the other.

    A batch that is computed in parts is divided by rows, which spans do not follow.
    """
    training = trainer.config.training
    in_one_part = training.accumulate == 1 and training.batch_size // mesh.size <= EMBED_BLOCK
    return in_one_part and trainer.model.reads_spans


def jit_steps(
    trainer: Trainer, mesh: Mesh, gather: GatherBatch | None, capacity: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted program of one dispatch.

    Args:
        trainer: Model, loss and optimizers.
        mesh: Devices of the run.
        gather: Function that makes a batch of the resident data and indices; None where batches
            come from the host.
        capacity: Greatest number of steps K. One program runs any number of them, so that a
            validation after few steps costs no other one.

    Returns:
        (state, indices or batches [K, B, ...], resident data or None, constants, number of steps)
        -> (state after these steps, their metrics, the first ones of [K]), with the state donated.
    """
    group = device_group(mesh)

    # Traced once for the shapes of its metrics and for its steps.
    @jax.jit
    def run_step(
        state: TrainState, part: Any, data: Any, constants: Any
    ) -> tuple[TrainState, Metrics]:
        batch = part
        if gather is not None:
            batch = gather(data, part)
        return train_step(state, batch, constants, trainer=trainer, group=group)

    def run_dispatch(
        state: TrainState, parts: Any, data: Any, constants: Any, count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        first = jax.tree.map(lambda x: x[0], parts)
        if capacity == 1:
            # A single step needs no loop around it.
            state, metrics = run_step(state, first, data, constants)
            return state, jax.tree.map(lambda x: x[None], metrics)

        def run_one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            part = jax.tree.map(lambda x: x[i], parts)
            state, values = run_step(state, part, data, constants)
            return state, jax.tree.map(lambda all, x: all.at[i].set(x), metrics, values)

        _, shapes = jax.eval_shape(run_step, state, first, data, constants)
        empty = jax.tree.map(lambda x: jnp.zeros(capacity, x.dtype), shapes)
        return jax.lax.fori_loop(0, count, run_one, (state, empty))

    specs = state_specs(abstract_state(trainer, mesh))
    inputs = (specs, PartitionSpec(None, AXIS), REPLICATED, REPLICATED, REPLICATED)
    outputs = (specs, REPLICATED)
    return jax.jit(
        shard_map_if_needed(mesh, run_dispatch, inputs, outputs),
        # Donated, so that a step writes its rows into the tables instead of copying them.
        donate_argnums=0,
        # Named, since the next call takes the state as it comes out of this one.
        out_shardings=shardings(mesh, outputs),
        compiler_options=compiler_options(mesh),
    )
