"""A shop of a few users and items without files: a trainer, its state and its step, on any number
of devices."""

import contextlib
import functools

import jax
import numpy as np

from twotower.config import from_dict
from twotower.core.mesh import (
    REPLICATED,
    SHARDED,
    device_group,
    make_mesh,
    put,
    shard_map_if_needed,
    shardings,
)
from twotower.features.inputs import Input, TableShape
from twotower.objectives.alias import popularity_table
from twotower.towers.two_tower import TwoTower
from twotower.training import step_losses
from twotower.training.candidates import CorpusSize
from twotower.training.init import abstract_state, init_on
from twotower.training.state import Trainer, state_specs
from twotower.training.step import train_step

U = 24
N = 40
B = 16
D = 4
OOV = 2
PLAIN = {
    "optimizer": {"kind": "sgd", "learning_rate": 0.02},
    "tables": {"kind": "sgd", "learning_rate": 0.1},
}


def build(*, oov_rate=0.0, layers=(), dropout=0.0, model=None, objective=None, training=None):
    """A trainer of ids alone, by plain gradient descent, which hides no factor. Items from 30 on
    have no training row."""
    inputs = {
        side: {"id": Input(table=side, oov_rate=oov_rate, oov_rows=OOV)}
        for side in ("user", "item")
    }
    tables = {
        "user": TableShape(rows=U + OOV + 1, width=D),
        "item": TableShape(rows=N + OOV + 1, width=D),
    }
    towers = {side: {"layers": layers, "dropout": dropout} for side in inputs}
    config = from_dict(
        {
            "model": towers | (model or {}),
            "objective": {"negatives": {"uniform": 0}} | (objective or {}),
            "training": {"batch_size": B} | PLAIN | (training or {}),
        }
    )
    return Trainer.build(
        config, TwoTower.build_from(config.model, inputs, tables), CorpusSize(U, N, N - 30)
    )


def counts(seed=0):
    """Training rows of users and items, in no order."""
    rng = np.random.default_rng(seed)
    item = np.append(rng.permutation(2.0 ** (np.arange(30) % 7)), np.zeros(N - 30)).astype(
        np.float32
    )
    return {
        "user": np.full(U, item.sum() / U, np.float32),
        "item": item,
        "rows": np.float32(item.sum()),
    }


def batch(seed=0, users=None, items=None):
    """B rows; users and items come twice, near and far apart."""
    rng = np.random.default_rng(seed)
    user = np.asarray(rng.integers(0, U // 2, B) if users is None else users, np.int32)
    item = np.asarray(rng.integers(0, 20, B) if items is None else items, np.int32)
    return {
        "user": user,
        "item": item,
        "weight": rng.uniform(0.5, 2, B).astype(np.float32),
        "labels": {"l": np.ones(B, np.float32)},
        "user_features": {"id": user + OOV + 1},
        "item_features": {"id": item + OOV + 1},
    }


def catalogue(trainer):
    """What `train_step` needs of the corpus: features, popularity, and five explicit negatives of
    each user."""
    config = trainer.sampling.config
    found = {}
    if trainer.sampling.needs_features:
        found["item_features"] = {"id": np.arange(N, dtype=np.int32) + OOV + 1}
    if config.popularity:
        found["popularity"] = popularity_table(counts()["item"], config.alpha)
    if config.explicit:
        items = np.stack([np.random.default_rng(u).permutation(N)[:5] for u in range(U)]).astype(
            np.int32
        )
        found["explicit"] = {"items": items, "sizes": np.full(U, 5, np.int32)}
    return found


@functools.cache
def start(trainer, devices=1):
    """A fresh state on a mesh of the first devices."""
    return init_on(make_mesh(devices), trainer, counts())


@functools.cache
def plain():
    """In-batch negatives alone; vectors are rows of tables."""
    return build()


@functools.cache
def mixed():
    """Candidates of every kind that is drawn; vectors are rows of tables."""
    return build(
        objective={"label": "l", "negatives": {"uniform": 8, "popularity": 8, "explicit": 3}}
    )


@functools.cache
def everything():
    """All that may differ between devices: draws, a queue, estimates, dropped ids and units, dense
    layers."""
    negatives = {"uniform": 12, "popularity": 8, "explicit": 3, "queue": 2 * B, "frequency": "gap"}
    return build(
        oov_rate=0.3, layers=(D,), dropout=0.3, objective={"label": "l", "negatives": negatives}
    )


@functools.cache
def step(trainer, devices=1):
    """(state, batch) -> (state, metrics, heard), compiled once.

    Heard is what the loss is told, without vectors: "own", of each query: the id and log count of
    its positive, its user, its weight and its hard negatives; and "shared": the candidates.
    """
    mesh = make_mesh(devices)
    specs = state_specs(abstract_state(trainer, mesh))
    given = put(mesh, catalogue(trainer), REPLICATED)

    def one(state, rows, given):
        heard = []
        with _listening(heard):
            return *train_step(
                state, rows, given, trainer=trainer, group=device_group(mesh)
            ), heard[0]

    out = (specs, REPLICATED, {"own": SHARDED, "shared": REPLICATED})
    jitted = jax.jit(
        shard_map_if_needed(mesh, one, (specs, SHARDED, REPLICATED), out),
        out_shardings=shardings(mesh, out),
    )
    return lambda state, rows: jitted(state, put(mesh, rows, SHARDED), given)


@contextlib.contextmanager
def _listening(heard):
    original = step_losses.streaming_softmax

    def listen(inputs, options, **kernel_options):
        own = {
            "ids": inputs.positives.ids,
            "log_count": inputs.positives.log_expected_count,
            "query_ids": inputs.query_ids,
            "weights": inputs.weights,
        }
        hard = inputs.hard
        if hard is not None:
            own |= {"hard": hard.ids, "hard_log_count": hard.log_expected_count}
        shared = inputs.candidates._asdict()
        del shared["vectors"]
        heard.append({"own": own, "shared": shared})
        return original(inputs, options, **kernel_options)

    step_losses.streaming_softmax = listen
    try:
        yield
    finally:
        step_losses.streaming_softmax = original


def loss_by_hand(state, heard, log_count=None):
    """The weighted mean loss of what was heard of a step from `state`, one pair after the other in
    float64, from table rows.

    Args:
        log_count: id -> log expected count, in the place of what was heard.
    """
    heard = jax.tree.map(np.asarray, heard)
    table = {
        side: _unit(np.asarray(state.tables[side], np.float64)[OOV + 1 :])
        for side in ("user", "item")
    }
    own = heard["own"]
    shared = heard["shared"]
    temperature = np.exp(float(state.params["log_temperature"]))
    losses = []
    for b, (item, user) in enumerate(zip(own["ids"], own["query_ids"])):

        def logit(i, heard, user=user):
            return table["user"][user] @ table["item"][i] / temperature - (
                log_count(i) if log_count else heard
            )

        negative = (shared["ids"] >= 0) & (shared["ids"] != item) & (shared["query_ids"] != user)
        pairs = [*zip(shared["ids"][negative], shared["log_expected_count"][negative])]
        pairs += [*zip(own["hard"][b], own["hard_log_count"][b])] if "hard" in own else []
        logits = [logit(i, count) for i, count in pairs if i not in (item, -1)]
        positive = logit(item, own["log_count"][b])
        losses.append(np.logaddexp.reduce([positive, *logits]) - positive)
    return np.average(losses, weights=own["weights"])


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
