"""Growth of a trained run to a larger vocabulary: known rows, their optimizer's state and all else
stay as they were, and new rows are made.

Before the first further step every score of known users and items is unchanged, to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from twotower.config import Config, TrainingConfig
from twotower.core.errors import ConfigError, choose
from twotower.core.files import LOCK, atomic, discard
from twotower.core.mesh import host_mesh
from twotower.data.dataset import Dataset
from twotower.features.encoder import Encoder
from twotower.features.fit import extend_encoder
from twotower.features.inputs import SIDES, Input
from twotower.features.vocabulary import Vocabulary
from twotower.pipeline import folder as data_folder
from twotower.pipeline.prepare import PreparedData, prepare
from twotower.plugins import import_plugins
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import CorpusSize, corpus_size, count_rows
from twotower.training.init import abstract_state, init_on
from twotower.training.loop import EarlyStopping, open_checkpoints
from twotower.training.run import (
    UNFINISHED,
    claim,
    config_path,
    data_path,
    encoder_folder,
    find_step,
    load_config,
    local_folder,
    with_known_dtype,
    write_alone,
)
from twotower.training.state import Trainer, TrainState

# File in the folder of a run that has grown: the run and the step that it goes on from.
GROWN = "grown.json"
# Number of known rows whose mean is a new row made from content.
NEIGHBOURS = 10
# Number of new rows that are compared with all known ones at once.
_BLOCK = 256
# Sections that must not change: they decide the shapes and the scores.
_FIXED_SECTIONS = ("features", "model")


def grow(
    config: Config,
    source: Path | str,
    workdir: Path | str,
    *,
    new_rows: str,
    checkpoint: str = "latest",
    dataset: Dataset | None = None,
    passes: float = 0.0,
) -> None:
    """Makes a run that goes on from a checkpoint of another run; `train` then continues it.

    Args:
        config: Configuration of the new run: that of `source` but for the data, and more steps.
        source: Folder of the run to go on from.
        workdir: Folder of the new run, new or empty.
        new_rows: Way to make the rows of new values, a key of `NEW_ROWS`.
        checkpoint: "best", "latest" or a step of `source`.
        dataset: The new log, in the place of the one that the configuration names.
        passes: Further passes over the new training rows, which decide `config.training.steps`; 0
            leaves them as they are.

    Raises:
        ConfigError: The configurations do not fit together, or `workdir` is not empty.
        CheckpointError: There is no such checkpoint.
    """
    make_rows = choose(NEW_ROWS, new_rows, "--new_rows")
    source = local_folder(source)
    workdir = local_folder(workdir)
    before = load_config(source)
    config = with_known_dtype(config, source)
    import_plugins(config.plugins, workdir)
    _check_configs(before, config, workdir)
    encoder = Encoder.load(encoder_folder(source))
    state, step = _restore(source, before, encoder, checkpoint)
    _check_step(config, step)
    # The old encoder is extended, not fitted anew: known values keep their rows.
    extend = functools.partial(extend_encoder, encoder)
    if dataset is None:
        prepared = prepare(config, fit=extend, contract=encoder.contract)
    else:
        # Of the run itself: its file of features need not be there any more.
        prepared = prepare(
            config,
            dataset=dataset,
            spec=encoder.spec,
            fit=extend,
        )
    if passes:
        config = _with_further_passes(config, step, passes, prepared.num_examples)
        prepared = dataclasses.replace(prepared, config=config)
    model = TwoTower.build(config.model, prepared.encoder)
    trainer = Trainer.build(config, model, corpus_size(prepared))
    steps = trainer.scaled_to(prepared.num_examples).config.training.steps
    if step >= steps:
        raise ConfigError(
            f"config.training.steps={steps} counts from the beginning, and the checkpoint is of "
            f"step {step}: set it to {step} plus the number of further steps, with "
            "config.training.steps_for=0 and config.training.passes=0."
        )
    # On the host: growing needs memory, not an accelerator.
    fresh = init_on(host_mesh(), trainer, count_rows(prepared))
    if trainer.sampling.config.frequency != "exact":
        logging.info("The estimates of frequency begin anew: the old ones are of the old corpus.")
    state = migrate(OldRun(state, encoder), fresh, prepared, make_rows)
    # The best validation begins anew too: it was measured on other rows.
    progress = EarlyStopping(trainer.corpus.users, trainer.corpus.items)
    with write_alone(workdir, "grow"):
        _make_room(workdir)
        (workdir / UNFINISHED).touch()
        prepared.encoder.save(encoder_folder(workdir))
        data_folder.save(prepared, data_path(workdir))
        with open_checkpoints(workdir, config) as checkpoints:
            checkpoints.save(step, state, record=dataclasses.asdict(progress), metrics={})
        _write_origin(workdir, source, step)
        # Last: a process killed before leaves no run that would train from fresh weights.
        claim(workdir, config)
        (workdir / UNFINISHED).unlink()
    logging.info("%s goes on from step %d of %s.", workdir, step, source)


def _write_origin(workdir: Path, source: Path, step: int) -> None:
    """Writes down where a grown run comes from."""
    origin = {"source": os.path.relpath(source, workdir), "step": step}
    with atomic(workdir / GROWN) as temporary:
        temporary.write_text(json.dumps(origin) + "\n", encoding="utf-8")


class OldRun(NamedTuple):
    """The state and the encoder of the run to grow from.

    Attributes:
        state: State of its checkpoint, on the host.
        encoder: Encoder of its training.
    """

    state: TrainState
    encoder: Encoder


class Addition(NamedTuple):
    """New rows of a table.

    Attributes:
        table: Name of the table.
        side: Side of a feature that reads the table through a vocabulary: "user" or "item".
        feature: Name of that feature.
        rows: Rows of the new values.
    """

    table: str
    side: str
    feature: str
    rows: range


def migrate(
    old_run: OldRun, fresh: TrainState, prepared: PreparedData, make_rows: MakeRows
) -> TrainState:
    """Returns a state of the larger vocabulary with all that the old run has learned.

    Args:
        known: State and encoder of the old run.
        fresh: Fresh state of the larger vocabulary.
        prepared: New data.
        make_rows: Function that makes the rows of new values, one of `NEW_ROWS`.
    """
    old = old_run.state
    _check_alike("params", old.params, fresh.params)
    _check_alike("opt_state", old.opt_state["dense"], fresh.opt_state["dense"])
    uses = _vocabulary_uses(prepared.encoder)
    tables = {}
    slots = {}
    for name, table in fresh.tables.items():
        count = old_run.encoder.tables[name].rows
        shape = prepared.encoder.tables[name]
        tables[name] = _overlay(old.tables[name], table, count)
        # Rows of pretrained vectors are not made: they are those of the new file.
        if shape.rows > count and shape.initial is None:
            side, feature = uses[name]
            addition = Addition(name, side, feature, range(count, shape.rows))
            tables[name][count : shape.rows] = make_rows(old_run, prepared, addition)
        # New rows have fresh slots: their first steps are as large as any row's first steps.
        slots[name] = {
            part: _overlay(old.table_slots[name][part], slot, count)
            for part, slot in fresh.table_slots[name].items()
        }
    state = fresh.replace(
        step=old.step,
        params=old.params,
        batch_stats=old.batch_stats,
        opt_state=_carry_optimizers(old, fresh),
        tables=tables,
        table_slots=slots,
        frequency=_restart_frequency(old, fresh),
    )
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, fresh)


def _carry_optimizers(old: TrainState, fresh: TrainState) -> dict[str, Any]:
    """Returns the state of the optimizers, with the rates that the plateau schedule has
    reached."""
    opt_state = {"dense": old.opt_state["dense"]}
    if "plateau" in fresh.opt_state:
        # Its best value was measured on other rows, and is forgotten.
        plateau = fresh.opt_state["plateau"]
        if "plateau" in old.opt_state:
            plateau = plateau._replace(scale=old.opt_state["plateau"].scale)
        opt_state["plateau"] = plateau
    return opt_state


def _restart_frequency(old: TrainState, fresh: TrainState) -> dict[str, Any]:
    """Returns fresh estimates of frequency, which begin at the step to go on from."""
    frequency = {}
    for side, estimates in fresh.frequency.items():
        frequency[side] = estimates
        # Intervals are counted from the first step of the new run.
        if "start" in estimates:
            frequency[side] = estimates | {"start": old.step}
    return frequency


def _check_alike(part: str, old: Any, fresh: Any) -> None:
    """Refuses dense parameters, or their optimizer's state, of other shapes."""
    old_shapes = jax.tree.map(lambda x: x.shape, old)
    fresh_shapes = jax.tree.map(lambda x: x.shape, fresh)
    if old_shapes != fresh_shapes:
        raise ConfigError(
            f"The {part} of the run to grow from are not those of this configuration: "
            "config.objective.loss, its heads and config.training.optimizer must stay as they were."
        )


def _overlay(old: Any, fresh: Any, count: int) -> np.ndarray:
    """Returns the first `count` rows of an old array, and those of a fresh one after them."""
    # A copy: arrays of JAX cannot be written to.
    rows = np.array(fresh)
    rows[:count] = old[:count]
    return rows


# (old run, new data, rows to make) -> [new rows, E].
MakeRows = Callable[[OldRun, PreparedData, Addition], np.ndarray]


def rows_from_oov(old_run: OldRun, prepared: PreparedData, addition: Addition) -> np.ndarray:
    """Returns, for each new value, the out-of-vocabulary row that it had in the old run: it scores
    as it did when unknown."""
    new = _vocabulary(prepared.encoder, addition.side, addition.feature)
    old = _vocabulary(old_run.encoder, addition.side, addition.feature)
    # A vocabulary lists its values in the order of their rows, the first known one at `first`.
    values = new.values[addition.rows.start - new.first : addition.rows.stop - new.first]
    return np.asarray(old_run.state.tables[addition.table])[old.rows(values)]


def rows_from_mean(old_run: OldRun, prepared: PreparedData, addition: Addition) -> np.ndarray:
    """Returns, for every new value, the mean of the known rows."""
    first = _vocabulary(old_run.encoder, addition.side, addition.feature).first
    table = np.asarray(old_run.state.tables[addition.table])
    rows = table[first : addition.rows.start]
    return np.broadcast_to(rows.mean(0), (len(addition.rows), rows.shape[1]))


def rows_from_content(old_run: OldRun, prepared: PreparedData, addition: Addition) -> np.ndarray:
    """Returns, for each new value, the mean row of the known users or items that are nearest to it
    by all their other features.

    Raises:
        ConfigError: They have no other features.
    """
    side = addition.side
    feature = addition.feature
    features = prepared.features[side]
    ids = features.get(feature)
    if ids is None or ids.ndim != 1:
        logging.info(
            "Rows of %s begin as out-of-vocabulary rows: %s has no single value of it.",
            addition.table,
            side,
        )
        return rows_from_oov(old_run, prepared, addition)
    others = {
        name: spec
        for name, spec in old_run.encoder.inputs[side].items()
        if name != feature and name in features
    }
    if not others:
        raise ConfigError(
            f"--new_rows=content compares {side}s by their features other than {feature!r}, and "
            "there are none: choose oov or mean."
        )
    content = content_vectors(others, old_run.state.tables, features)
    first_new = addition.rows.start
    first_known = _vocabulary(old_run.encoder, side, feature).first
    has_known = np.flatnonzero((ids >= first_known) & (ids < first_new))
    has_new = np.flatnonzero(ids >= first_new)
    # The user or item of each new value.
    entities = np.zeros(len(addition.rows), np.int64)
    entities[ids[has_new] - first_new] = has_new
    table = np.asarray(old_run.state.tables[addition.table])
    count = min(NEIGHBOURS, len(has_known))
    means = []
    # By blocks: all scores at once would take [new, known].
    for block in np.array_split(entities, -(-len(entities) // _BLOCK)):
        scores = content[block] @ content[has_known].T
        # Unordered, as a mean needs no order.
        nearest = np.argpartition(-scores, count - 1, axis=1)[:, :NEIGHBOURS]
        means.append(table[ids[has_known[nearest]]].mean(1))
    return np.concatenate(means)


NEW_ROWS: Mapping[str, MakeRows] = {
    "oov": rows_from_oov,
    "mean": rows_from_mean,
    "content": rows_from_content,
}


def content_vectors(
    inputs: Mapping[str, Input], tables: Mapping[str, Any], features: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns vectors float32 [M, F] of norm 1: for each feature its trained row (the mean of
    several) or its numbers, scaled to norm 1.

    Args:
        inputs: Inputs of the features to compare by.
        tables: Trained tables.
        features: Encoded features, [M, ...] each.
    """

    def column(name: str, spec: Input) -> np.ndarray:
        values = features[name]
        if not spec.table:
            return values
        rows = np.asarray(tables[spec.table])
        # A value that is new here is unknown to the old table.
        ids = np.where(values < len(rows), values, 0)
        if ids.ndim == 1:
            return rows[ids]
        count = (ids > 0).sum(1, keepdims=True)
        return rows[ids].sum(1) / np.maximum(count, 1)

    # Each feature of norm 1, so that no wide or long one decides alone.
    columns = [_unit(column(name, spec)) for name, spec in inputs.items()]
    return _unit(np.concatenate(columns, axis=1))


def _unit(x: np.ndarray) -> np.ndarray:
    # A row of zeros stays zero.
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _vocabulary(encoder: Encoder, side: str, feature: str) -> Vocabulary:
    """Returns the vocabulary of a feature that has one."""
    vocabulary = encoder.fitted[side, feature].vocabulary
    assert vocabulary is not None, f"{side} feature {feature} has no vocabulary"
    return vocabulary


def _vocabulary_uses(encoder: Encoder) -> dict[str, tuple[str, str]]:
    """Returns the first feature (side, name) with a vocabulary that reads each table."""
    uses: dict[str, tuple[str, str]] = {}
    for side in SIDES:
        for name, spec in encoder.inputs[side].items():
            # A history reads the tables of the items' own features.
            if spec.history_length or not spec.table:
                continue
            if encoder.fitted[side, name].vocabulary is not None:
                uses.setdefault(spec.table, (side, name))
    return uses


def _restore(
    source: Path, config: Config, encoder: Encoder, checkpoint: str
) -> tuple[TrainState, int]:
    """Returns a state, in the memory of this machine, and its step.

    The numbers of users and items are read from the checkpoint itself, without the old data.
    """
    with open_checkpoints(source, config, read_only=True) as checkpoints:
        step = find_step(checkpoints, checkpoint, source)
        progress = EarlyStopping(**checkpoints.record(step))
        corpus = CorpusSize(progress.users, progress.items, unseen=0)
        trainer = Trainer.build(config, TwoTower.build(config.model, encoder), corpus)
        state, _ = checkpoints.restore(step, abstract_state(trainer, host_mesh()))
    return jax.device_get(state), step


def _check_configs(before: Config, config: Config, workdir: Path) -> None:
    """Refuses a folder in use, and changes of what the old state depends on."""
    _leftovers(workdir)  # looked at again when the folder is locked
    for section in _FIXED_SECTIONS:
        if getattr(before, section) != getattr(config, section):
            raise ConfigError(
                f"config.{section} differs from that of the run to grow from: only data and "
                "training may change."
            )
    for part in ("tables", "optimizer"):
        # Rates may change: the state of an optimizer does not depend on them.
        if getattr(before.training, part).kind != getattr(config.training, part).kind:
            raise ConfigError(
                f"config.training.{part}.kind differs from that of the run to grow from, whose "
                "state is kept."
            )


def _with_further_passes(config: Config, step: int, passes: float, examples: int) -> Config:
    """Returns a configuration whose steps are so many passes beyond a step."""
    further = dataclasses.replace(
        config.training, steps=TrainingConfig().steps, steps_for=0, passes=passes
    ).scaled_to(examples)
    training = dataclasses.replace(further, steps=step + further.steps)
    return dataclasses.replace(config, training=training)


def _leftovers(workdir: Path) -> list[Path]:
    """Returns what a growth that was killed has left in a folder; refuses anything else."""
    others = []
    if workdir.exists():
        others = [path for path in workdir.iterdir() if path.name != LOCK]
    is_unfinished = (workdir / UNFINISHED).exists() and not config_path(workdir).exists()
    if others and not is_unfinished:
        raise ConfigError(
            f"--workdir={workdir} must be a new or empty folder: the new run is made there."
        )
    return others


def _make_room(workdir: Path) -> None:
    """Empties a folder of what a growth that was killed has left."""
    for path in _leftovers(workdir):
        # In the end the mark itself: killed here, the folder is still known as unfinished.
        if path.name != UNFINISHED:
            discard(path)


def _check_step(config: Config, step: int) -> None:
    """Refuses a number of steps a dispatch that does not divide the step to go on from."""
    dispatch = config.training.steps_per_dispatch
    # 0 ends dispatches wherever they must.
    if dispatch and step % dispatch:
        raise ConfigError(
            f"config.training.steps_per_dispatch={dispatch} must divide {step}, the step to go on "
            "from."
        )
