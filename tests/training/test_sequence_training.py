"""Training on sequences: one pass over all positions is the training on every prefix, on one device
and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.pipeline.history_log import write_log
from tests.training.divided import FAST, differences, on_mesh
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.core.mesh import REPLICATED, SHARDED, make_mesh, put
from twotower.objectives.alias import popularity_table
from twotower.pipeline.batches import Batches
from twotower.pipeline.prepare import prepare
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import corpus_size, count_rows
from twotower.training.init import init_on
from twotower.training.loop import fit
from twotower.training.state import Trainer, state_specs
from twotower.training.step import train_step

pytestmark = pytest.mark.slow

L = 16
CATALOGUE = {"catalogue": True, "in_batch": False, "uniform": 0}
MIXED = {"uniform": 7, "popularity": 5}
HISTORY = {"blocks": 1, "heads": 2, "dropout": 0.0, "expansion": 1}
SGD = {
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "tables": {"kind": "sgd", "learning_rate": 0.1},
}


def config_of(
    path,
    *,
    examples="sequences",
    objective=None,
    history=None,
    training=None,
    feature=None,
    rate=0.0,
):
    return from_dict(
        {
            "data": {
                "source": "csv",
                "interactions": {"path": str(path)},
                "accept": ("old_times",),
            },
            "split": {
                "kind": "leave_last_out",
                "accept_leakage": ("repeated_pairs", "identical_rows", "future_rows"),
            },
            "features": {
                "user": {
                    "user_id": {"type": "string", "embedding_size": 4, "oov_rate": rate},
                    "history": {"type": "history", "max_length": L} | (feature or {}),
                },
                "item": {"item_id": {"type": "string", "embedding_size": 8, "oov_rate": rate}},
            },
            "model": {"user": {"layers": (8,)}, "history": HISTORY | (history or {})},
            "objective": objective or {},
            "training": SGD
            | {"examples": examples, "batch_size": 8, "steps": 4, "validate_every": 4}
            | (training or {}),
        }
    )


@functools.cache
def log(folder, times=None):
    return write_log(folder / f"{times}.csv", rows=150, times=times)


def trainer_of(config, prepared):
    model = TwoTower.build(config.model, prepared.encoder)
    return Trainer.build(config, model, corpus_size(prepared))


def prepared_and_trainer(config):
    prepared = prepare(config)
    return prepared, trainer_of(config, prepared)


def catalogue_of(prepared, trainer):
    found = (
        {"item_features": dict(prepared.features["item"])}
        if trainer.sampling.needs_features
        else {}
    )
    if trainer.sampling.config.popularity:
        found["popularity"] = popularity_table(
            count_rows(prepared)["item"], trainer.sampling.config.alpha
        )
    return found


def whole_batch(prepared, rows):
    """All of the training data as one batch."""
    examples = prepared.training_examples()
    batches = Batches(examples, batch_size=rows, seed=0, resident_megabytes=0)
    return batches.load(batches.indices(0))


def one_step(prepared, trainer, rows):
    state = init_on(make_mesh(1), trainer, count_rows(prepared))
    step = jax.jit(functools.partial(train_step, trainer=trainer), compiler_options=FAST)
    return jax.device_get(step(state, whole_batch(prepared, rows), catalogue_of(prepared, trainer)))


@pytest.mark.parametrize(
    "times,objective,history",
    [
        (None, {"negatives": CATALOGUE}, {"block": "ligr", "positions": "rotary"}),
        (30, {"negatives": MIXED, "symmetric": True}, {}),
        (None, {"negatives": CATALOGUE}, {"kind": "gru"}),
    ],
    ids=["full softmax", "ties, mixed, symmetric", "gru"],
)
def test_all_positions_in_one_pass_are_every_prefix_by_itself(
    tmp_path_factory, times, objective, history
):
    path = log(tmp_path_factory.getbasetemp(), times)
    feature = {"gaps": 12, "request_gap": True} if times else {}
    found = {}
    for examples in ("interactions", "sequences"):
        config = config_of(
            path, examples=examples, objective=objective, history=history, feature=feature
        )
        prepared = prepare(config)
        rows = prepared.num_examples
        config = dataclasses.replace(
            config, training=dataclasses.replace(config.training, batch_size=rows)
        )
        found[examples] = one_step(prepared, trainer_of(config, prepared), rows)
    state, metrics = found["sequences"]
    expected, others = found["interactions"]
    np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], others["grad_norm"], rtol=1e-4)
    for part in ("params", "tables"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            getattr(state, part),
            getattr(expected, part),
        )
    assert len(prepared.packing) < len(
        np.unique(prepared.train.user)
    )  # some rows hold several sequences


def test_eight_devices_do_what_one_does(tmp_path_factory):
    objective = {"negatives": MIXED | {"frequency": "gap"}, "symmetric": True}
    config = config_of(
        log(tmp_path_factory.getbasetemp(), 30),
        objective=objective,
        history={"dropout": 0.3},
        rate=0.2,
        training={"batch_size": 8},
        feature={"max_length": 6, "gaps": 6, "request_gap": True},
    )
    prepared, trainer = prepared_and_trainer(config)
    catalogue = catalogue_of(prepared, trainer)
    found = {}
    examples = prepared.training_examples()
    batches = Batches(examples, batch_size=8, seed=0, resident_megabytes=0)
    start = jax.device_get(init_on(make_mesh(1), trainer, count_rows(prepared)))
    for devices in (1, 8):
        mesh = make_mesh(devices)
        state = jax.tree.map(functools.partial(put, mesh), start, state_specs(start))
        run = jax.jit(on_mesh(trainer, mesh), compiler_options=FAST)
        for step in range(2):
            state, metrics = run(
                state,
                put(mesh, batches.load(batches.indices(step)), SHARDED),
                put(mesh, catalogue, REPLICATED),
            )
        found[devices] = jax.device_get((state, metrics))
    worst = differences(found[8], found[1])
    assert max(worst.values(), default=0) < 2e-5, worst


def test_an_empty_place_and_what_has_no_weight_move_nothing(tmp_path_factory):
    config = config_of(
        log(tmp_path_factory.getbasetemp()),
        objective={"negatives": {"uniform": 0}},
        training={"batch_size": 8},
    )
    prepared, trainer = prepared_and_trainer(config)
    batch = whole_batch(prepared, 8)
    empty = batch["user"] < 0
    assert empty.any()
    changed = batch | {"labels": {}, "weight": np.where(empty, 0, batch["weight"])}
    changed["item_features"] = {n: np.where(empty, 5, x) for n, x in batch["item_features"].items()}
    changed["user_features"] = batch["user_features"] | {
        name: np.where(empty, 3, batch["user_features"][name])
        for name in ("history/item_id", "user_id")
    }
    state = init_on(make_mesh(1), trainer, count_rows(prepared))
    step = jax.jit(functools.partial(train_step, trainer=trainer), compiler_options=FAST)
    for got, expected in zip(
        *(jax.tree.leaves(step(state, b, {})) for b in (changed, batch)), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_streamed_rows_are_trained_as_resident_ones(tmp_path_factory, tmp_path):
    path = log(tmp_path_factory.getbasetemp(), 30)
    found = []
    for options in ({}, {"resident_megabytes": 0, "steps_per_dispatch": 2}):
        training = {"crop": "random", "steps": 4} | options
        config = config_of(
            path, training=training, feature={"max_length": 6}, objective={"negatives": CATALOGUE}
        )
        prepared, trainer = prepared_and_trainer(config)
        workdir = tmp_path / str(len(found))
        found.append(
            jax.device_get(fit(trainer, prepared, workdir, validate=None, mesh=make_mesh(1)))
        )
    assert max(differences(*found).values(), default=0) < 1e-5


@pytest.mark.parametrize(
    "values,message",
    [
        (
            {"model": {"history": {"kind": "bidirectional"}}},
            "config.model.history.kind='bidirectional' must be 'causal' or 'gru'",
        ),
        (
            {"objective": {"negatives": {"queue": 1024}}},
            "config.objective.negatives.queue=1024 must be 0",
        ),
        (
            {"model": {"item": {"batch_norm": True}}},
            "config.model.item.batch_norm=True must be False",
        ),
        (
            {"training": {"examples": "interactions", "crop": "random"}},
            "config.training.crop='random' must be 'last'",
        ),
        (
            {"training": {"examples": "sequence"}},
            "config.training.examples='sequence' is not known; did you mean 'sequences'",
        ),
    ],
)
def test_what_does_not_go_with_sequences_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"training": {"examples": "sequences"}} | values)


def test_sequences_without_a_history_are_refused():
    config = from_dict({"data": {"num_interactions": 3000}, "training": {"examples": "sequences"}})
    with pytest.raises(
        ConfigError, match="config.training.examples='sequences' needs a history to be read"
    ):
        prepare(config)
