"""A small generated shop, encoded; trainers for it, and their programs, each compiled once."""

import dataclasses
import functools
import json

import jax

from twotower.config import from_dict
from twotower.pipeline.prepare import prepare
from twotower.towers.two_tower import TwoTower
from twotower.training import init, loop
from twotower.training.candidates import corpus_size
from twotower.training.optimizers import DENSE
from twotower.training.state import Trainer
from twotower.training.step import train_step

FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 16},
        "city": {"type": "string", "embedding_size": 4},
    },
    "item": {
        "item_id": {"type": "string", "embedding_size": 16},
        "title": {"type": "text", "embedding_size": 8, "buckets": 500},
        "price": {"type": "float"},
    },
}
# For runs of whole processes, where what is embedded does not matter.
TINY_FEATURES = {
    "user": {"user_id": {"type": "string", "embedding_size": 8}},
    "item": {"item_id": {"type": "string", "embedding_size": 8}},
}


# Options of `config.training` that no program reads: some decide an argument of `jit_steps`.
OF_THE_LOOP = (
    "input",
    "keep_checkpoints",
    "log_every",
    "metric",
    "passes",
    "patience",
    "resident_megabytes",
    "steps_for",
    "steps_per_dispatch",
    "validate_every",
)


def small_config(**overrides):
    """The configuration of a run of seconds; `training={...}` and the like replace single
    fields."""
    values = {
        "data": {"source": "shop", "num_interactions": 3000},
        "features": FEATURES,
        "model": {"user": {"layers": (16,)}, "item": {"layers": (16,)}},
        "training": {"batch_size": 64, "steps": 12, "validate_every": 4, "log_every": 2},
    }
    for section, fields in overrides.items():
        values[section] = values.get(section, {}) | fields
    return from_dict(values)


@functools.cache
def prepared_shop():
    """The data of `small_config`, which tests only read."""
    return prepare(small_config())


def build_trainer(prepared, config):
    model = TwoTower.build(config.model, prepared.encoder)
    return Trainer.build(config, model, corpus_size(prepared))


def make_batches(prepared, config):
    return loop.make_batches(prepared, config.training)


def program_key(trainer):
    """All that decides the programs of a trainer, by value: of tables their shapes."""
    training = dataclasses.asdict(trainer.config.training)
    for name in OF_THE_LOOP:
        del training[name]
    if training["schedule"]["kind"] == "constant":
        del training["steps"]
    # Arguments of all programs (see `StepScalars`), but of an optimizer of one's own.
    if training["optimizer"]["kind"] not in DENSE.origins:
        del training["seed"], training["tables"]["learning_rate"]
        del training["optimizer"]["learning_rate"], training["optimizer"]["weight_decay"]
    sections = (trainer.config.model, trainer.config.objective)
    options = json.dumps([training, *map(dataclasses.asdict, sections)], sort_keys=True)
    inputs = {side: list(inputs.items()) for side, inputs in trainer.model.inputs.items()}
    return options, repr(inputs), table_shapes(trainer), trainer.corpus, trainer.sampling


def table_shapes(trainer):
    """All that decides the program which draws the tables of a trainer."""
    tables = trainer.model.tables
    pretrained = [name for name, t in tables.items() if t.initial is not None]
    assert not pretrained, "the rows of pretrained tables would be part of the key"
    return repr({name: (t.rows, t.width, t.norm) for name, t in tables.items()})


def cached_by_program(build, key_of=program_key):
    """(trainer, ...) -> a program, built once for all trainers of one key."""
    programs = {}

    @functools.wraps(build)
    def cached(trainer, *rest):
        key = key_of(trainer), *map(_gather_key, rest)
        if key not in programs:
            programs[key] = build(trainer, *rest)
        return programs[key]

    return cached


def _gather_key(x):
    """What tells a mesh, or the method that gathers a batch, from another one."""
    if isinstance(x, functools.partial):
        return _gather_key(x.func), *sorted(x.keywords.items())
    if not hasattr(x, "__self__"):
        return x
    examples = x.__self__._examples
    return type(examples), getattr(examples, "_history_length", 0)


@cached_by_program
def jit_step(trainer):
    """(state, batch, constants with the `StepScalars`) -> (state, metrics), one step on one
    device."""
    return jax.jit(functools.partial(train_step, trainer=trainer))


jit_steps = cached_by_program(loop.jit_steps)
jit_around = cached_by_program(init.jit_around)
jit_tables = cached_by_program(init.jit_tables, table_shapes)


def share(patch):
    """Lets `fit` and `init_on` take the programs of an earlier training, where they are the same,
    until `patch` is undone."""
    patch.setattr(loop, "jit_steps", jit_steps)
    patch.setattr(init, "jit_tables", jit_tables)
    patch.setattr(init, "jit_around", jit_around)
