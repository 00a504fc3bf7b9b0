"""A trained run taken over to a larger vocabulary: rows, their optimizer's state and all else as
they were, new rows made.

Before the first further step every score of known users and items is what it was, to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from twotower.config import Config
from twotower.core.errors import ConfigError, choose
from twotower.core.mesh import host_mesh
from twotower.features.base import SIDES, Input
from twotower.features.encoder import Encoder
from twotower.pipeline.prepare import PreparedData, prepare
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import CorpusSize, corpus_size, count_rows
from twotower.training.init import abstract_state, init_on
from twotower.training.loop import EarlyStopping, open_checkpoints
from twotower.training.run import claim, load_config, local_folder, step_of
from twotower.training.state import Trainer, TrainState

NEIGHBOURS = 10  # whose rows a row made from content is the mean of
_KEPT = ("features", "model")  # sections that decide the shapes and the scores


def grow(
    config: Config,
    source: Path | str,
    workdir: Path | str,
    *,
    new_rows: str,
    checkpoint: str = "latest",
) -> None:
    """Makes `workdir` a run of `config` that goes on from a checkpoint of the run `source`; `train`
    then continues it.

    Args:
        config: as of `source` but for the data, and more steps.
        new_rows: a key of `NEW_ROWS`.
        checkpoint: "best", "latest" or a step.

    Raises:
        ConfigError: the configurations do not fit together, or `workdir` is not empty.
    """
    make = choose(NEW_ROWS, new_rows, "--new_rows")
    source, workdir = local_folder(source), local_folder(workdir)
    before = load_config(source)
    _check(before, config, workdir)
    old_encoder = Encoder.load(source / "encoder")
    old, step = _restore(source, before, old_encoder, checkpoint)
    if step % config.training.steps_per_dispatch:
        raise ConfigError(
            f"config.training.steps_per_dispatch={config.training.steps_per_dispatch} must divide {step}, the step to go on from."
        )
    prepared = prepare(config, fit=old_encoder.extend)
    trainer = Trainer.build(
        config, TwoTower.build(config.model, prepared.encoder), corpus_size(prepared)
    )
    steps = trainer.scaled_to(prepared.num_examples).config.training.steps
    if step >= steps:
        raise ConfigError(
            f"config.training.steps={steps} counts from the beginning, and the checkpoint is of step {step}: "
            f"set it to {step} and as many as are to follow, with config.training.steps_for=0."
        )
    fresh = init_on(host_mesh(), trainer, count_rows(prepared))
    if trainer.sampling.config.frequency != "exact":
        logging.info(
            "The estimates of frequency begin anew: they were of the rows of the old corpus."
        )
    state = migrate(old, fresh, old_encoder, prepared, make)
    workdir.mkdir(parents=True, exist_ok=True)
    prepared.encoder.save(workdir / "encoder")
    with open_checkpoints(workdir, config) as checkpoints:
        checkpoints.save(
            step, state, record=dataclasses.asdict(EarlyStopping(*trainer.corpus[:2])), metrics={}
        )
    # Last: until the checkpoint is whole this is no run that could be begun from nothing.
    claim(workdir, config)
    logging.info("%s goes on from step %d of %s.", workdir, step, source)


def migrate(
    old: TrainState, fresh: TrainState, encoder: Encoder, prepared: PreparedData, make: NewRows
) -> TrainState:
    """`fresh`, of the grown vocabulary, with everything that `old` knows.

    Args:
        encoder: of `old`.
        make: see `NEW_ROWS`.
    """
    for part in ("params", "opt_state"):
        _check_alike(part, getattr(old, part), getattr(fresh, part))
    uses = _uses(prepared.encoder)
    tables, slots = {}, {}
    for name, table in fresh.tables.items():
        known = encoder.tables[name].rows
        rows = np.array(table)
        rows[:known] = old.tables[name][:known]
        if (
            prepared.encoder.tables[name].rows > known
            and prepared.encoder.tables[name].initial is None
        ):
            added = range(known, prepared.encoder.tables[name].rows)
            rows[added.start : added.stop] = make(name, added, old, encoder, prepared, uses[name])
        tables[name] = rows
        slots[name] = {
            part: _overlaid(old.table_slots[name][part], x, known)
            for part, x in fresh.table_slots[name].items()
        }
    # The plateau's best was measured on other rows.
    opt_state = old.opt_state | {
        "plateau": fresh.opt_state["plateau"]._replace(scale=old.opt_state["plateau"].scale)
    }
    frequency = {
        s: x | ({"start": old.step} if "start" in x else {}) for s, x in fresh.frequency.items()
    }
    state = fresh.replace(
        step=old.step,
        params=old.params,
        batch_stats=old.batch_stats,
        opt_state=opt_state,
        tables=tables,
        table_slots=slots,
        frequency=frequency,
    )
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, fresh)


def _check_alike(part: str, old: Any, fresh: Any) -> None:
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (old, fresh)]
    if jax.tree.structure(old) != jax.tree.structure(fresh) or shapes[0] != shapes[1]:
        raise ConfigError(
            f"The {part} of the run to grow from are not those of this configuration: config.objective.loss, its heads and "
            "config.training.optimizer must stay as they were."
        )


def _overlaid(old: Any, fresh: Any, known: int) -> np.ndarray:
    out = np.array(fresh)
    out[:known] = old[:known]
    return out


# (table, its new rows, old state, old encoder, new data, (side, feature) that reads it) -> [new
# rows, E]
NewRows = Callable[[str, range, TrainState, Encoder, PreparedData, tuple[str, str]], np.ndarray]


def _from_oov(
    name: str,
    added: range,
    old: TrainState,
    encoder: Encoder,
    prepared: PreparedData,
    use: tuple[str, str],
) -> np.ndarray:
    """Each begins as the out-of-vocabulary row that its value had been: what is new scores as it
    did when unknown."""
    return np.asarray(old.tables[name])[
        encoder.fitted[use].vocabulary.rows(_values(prepared, use, added))
    ]


def _from_mean(
    name: str,
    added: range,
    old: TrainState,
    encoder: Encoder,
    prepared: PreparedData,
    use: tuple[str, str],
) -> np.ndarray:
    """All begin as the mean of the known rows."""
    first = encoder.fitted[use].vocabulary.first
    known = np.asarray(old.tables[name])[first : encoder.tables[name].rows]
    return np.broadcast_to(known.mean(0), (len(added), known.shape[1]))


def _from_content(
    name: str,
    added: range,
    old: TrainState,
    encoder: Encoder,
    prepared: PreparedData,
    use: tuple[str, str],
) -> np.ndarray:
    """Each begins as the mean row of the known users or items that are nearest to it by all their
    other features."""
    side, feature = use
    ids = prepared.features[side].get(feature)
    if ids is None or ids.ndim != 1:
        logging.info(
            "Rows of %s begin as out-of-vocabulary rows: %s has no single value of it.", name, side
        )
        return _from_oov(name, added, old, encoder, prepared, use)
    others = {
        n: i
        for n, i in encoder.inputs[side].items()
        if n != feature and n in prepared.features[side]
    }
    if not others:
        raise ConfigError(
            f"--new_rows=content compares {side}s by their features other than {feature!r}, and there are none: choose oov or "
            "mean."
        )
    content = _content(others, old.tables, prepared.features[side])
    known = np.flatnonzero((ids >= encoder.fitted[use].vocabulary.first) & (ids < added.start))
    places = np.zeros(len(added), np.int64)
    new = np.flatnonzero(ids >= added.start)
    places[ids[new] - added.start] = new
    table, out = np.asarray(old.tables[name]), []
    for block in np.array_split(places, -(-len(places) // 256)):
        scores = content[block] @ content[known].T
        nearest = np.argpartition(-scores, min(NEIGHBOURS, len(known)) - 1, axis=1)[:, :NEIGHBOURS]
        out.append(table[ids[known[nearest]]].mean(1))
    return np.concatenate(out)


NEW_ROWS: Mapping[str, NewRows] = {"oov": _from_oov, "mean": _from_mean, "content": _from_content}


def _content(
    others: Mapping[str, Input], tables: Mapping[str, Any], features: Mapping[str, np.ndarray]
) -> np.ndarray:
    """float32 [M, F] of norm 1: the trained rows (mean of several) and the numbers of features,
    each of norm 1."""

    def column(name: str, i: Input) -> np.ndarray:
        if not i.table:
            return features[name]
        rows = np.asarray(tables[i.table])
        # A value that is new here is unknown to the old table.
        ids = np.where(features[name] < len(rows), features[name], 0)
        return (
            rows[ids]
            if ids.ndim == 1
            else rows[ids].sum(1) / np.maximum((ids > 0).sum(1, keepdims=True), 1)
        )

    return _unit(np.concatenate([_unit(column(name, i)) for name, i in others.items()], axis=1))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _values(prepared: PreparedData, use: tuple[str, str], added: range) -> Any:
    vocabulary = prepared.encoder.fitted[use].vocabulary
    return vocabulary.values[added.start - vocabulary.first : added.stop - vocabulary.first]


def _uses(encoder: Encoder) -> dict[str, tuple[str, str]]:
    """Table name -> the first (side, feature) with a vocabulary that reads it."""
    uses: dict[str, tuple[str, str]] = {}
    for side in SIDES:
        for name, i in encoder.inputs[side].items():
            if i.history_length:  # a history reads tables that are the items'
                continue
            fitted = encoder.fitted[side, name]
            if i.table and fitted.vocabulary is not None:
                uses.setdefault(i.table, (side, name))
    return uses


def _restore(source: Path, config: Config, encoder: Encoder, which: str) -> tuple[TrainState, int]:
    """The state, in the memory of this machine; how many users and items it knows is read from the
    checkpoint itself."""
    with open_checkpoints(source, config, read_only=True) as checkpoints:
        step = step_of(checkpoints, which, source)
        record = EarlyStopping(**checkpoints.record(step))
        corpus = CorpusSize(record.users, record.items, unseen=0)
        trainer = Trainer.build(config, TwoTower.build(config.model, encoder), corpus)
        state, _ = checkpoints.restore(step, abstract_state(trainer, host_mesh()))
    return jax.device_get(state), step


def _check(before: Config, config: Config, workdir: Path) -> None:
    if workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(
            f"--workdir={workdir} must be a new or empty folder: the grown run is made there."
        )
    for section in _KEPT:
        if getattr(before, section) != getattr(config, section):
            raise ConfigError(
                f"config.{section} differs from that of the run to grow from: only data and training may change."
            )
    for part in ("tables", "optimizer"):
        if getattr(before.training, part).kind != getattr(config.training, part).kind:
            raise ConfigError(
                f"config.training.{part}.kind differs from that of the run to grow from, whose state is kept."
            )
