"""A small model of everything at once, and its steps on a mesh: what the tests of meshes
compare."""

import functools
from typing import Any

import jax
import numpy as np

from twotower.config import Config, from_dict
from twotower.core.arrays import pad_rows
from twotower.core.mesh import (
    AXIS,
    REPLICATED,
    SHARDED,
    device_group,
    make_mesh,
    put,
    shard_map_if_needed,
)
from twotower.features.inputs import SIDES, Input, TableShape
from twotower.objectives.alias import popularity_table
from twotower.towers.two_tower import TwoTower
from twotower.training.candidates import CorpusSize
from twotower.training.init import abstract_state, init_on
from twotower.training.state import Trainer, state_specs
from twotower.training.step import train_step

USERS = 40
ITEMS = 30
BATCH = 48
# Compiling is what these tests cost; code that is not optimised comes to the same numbers but for
# rounding.
FAST = {"xla_backend_optimization_level": 0}
# "both" is read by both towers: the items of a history, and the item itself. "large" is looked for
# by sorting ids.
TABLES = {"person": 70, "both": 50, "large": 70_000}
INPUTS = {
    "user": {
        "id": Input(table="person", oov_rate=0.3, oov_rows=3),
        "past": Input(table="both", length=4),
        "age": Input(width=2, projection=3),
    },
    "item": {
        "id": Input(table="both", oov_rate=0.2, oov_rows=2),
        "words": Input(table="large", length=3),
        "price": Input(width=1),
    },
}


def make_trainer(values: dict[str, Any], items: int = ITEMS) -> Trainer:
    """The trainer of a configuration; the batch is of `BATCH` rows where it says nothing else."""
    values = values | {"training": {"batch_size": BATCH} | values.get("training", {})}
    config: Config = from_dict(values)
    shapes = {name: TableShape(rows=rows, width=8) for name, rows in TABLES.items()}
    return Trainer.build(
        config, TwoTower.build_from(config.model, INPUTS, shapes), CorpusSize(USERS, items, 0)
    )


class Case:
    """Steps of one trainer on any number of devices, from one state and on the same batches.

    Args:
        dtype: of every array of real numbers.
    """

    def __init__(self, values: dict[str, Any], dtype: Any):
        self.trainer = make_trainer(values)
        self.dtype = dtype
        rng = np.random.default_rng(3)
        self.features = {
            side: _features(rng, side, {"user": USERS, "item": ITEMS}[side]) for side in SIDES
        }
        # Few users and items, so that a batch holds each of them several times; some rows weigh
        # nothing.
        self.batches = [self._batch(rng) for _ in range(4)]
        rows = {"user": rng.integers(1, 9, USERS), "item": rng.integers(1, 9, ITEMS), "rows": 200}
        self.counts = {name: np.float32(x) for name, x in rows.items()}
        self.catalogue = self._catalogue(rng)
        self.start = self._start()

    def _batch(self, rng: np.random.Generator) -> dict[str, Any]:
        user, item = (rng.integers(0, n, BATCH).astype(np.int32) for n in (USERS, ITEMS))
        own = {
            side: {name: x[ids] for name, x in self.features[side].items()}
            for side, ids in (("user", user), ("item", item))
        }
        labels = {name: rng.choice([0.0, 1.0, np.nan], BATCH) for name in ("click", "like")}
        weight = rng.choice([0.0, 0.5, 1.0, 2.0], BATCH)
        batch = {"user": user, "item": item, "weight": weight, "labels": labels}
        return self.cast(batch | {f"{side}_features": own[side] for side in SIDES})

    def _catalogue(self, rng: np.random.Generator) -> dict[str, Any]:
        config = self.trainer.sampling.config
        found = {}
        if self.trainer.sampling.needs_features:
            found["item_features"] = self.features["item"]
        if config.popularity:
            found["popularity"] = popularity_table(self.counts["item"], config.alpha)
        if config.explicit:
            found["explicit"] = pools(rng, 5)
        return self.cast(found)

    def cast(self, tree: Any) -> Any:
        """Real numbers as `dtype`."""
        return jax.tree.map(
            lambda x: (
                np.asarray(x, self.dtype) if np.issubdtype(np.result_type(x), np.floating) else x
            ),
            tree,
        )

    def _start(self) -> Any:
        """A fresh state, with pools of hard negatives where there would be none yet."""
        state = jax.device_get(init_on(make_mesh(1), self.trainer, self.counts))
        if "mined" in state.negatives:
            low, high = self.trainer.sampling.config.mined_ranks
            state = state.replace(
                negatives=state.negatives | {"mined": pools(np.random.default_rng(5), high - low)}
            )
        return self.cast(state)

    def state(self, mesh: Any) -> Any:
        """The state at the beginning on `mesh`."""
        shapes = abstract_state(self.trainer, mesh)
        # Rows of zeros where the devices do not divide the rows of tables.
        start = jax.tree.map(
            lambda x, like: pad_rows(x, like.shape[0]) if x.shape != like.shape else x,
            self.start,
            shapes,
        )
        return jax.tree.map(lambda x, spec: put(mesh, x, spec), start, state_specs(start))

    def cut(self, state: Any) -> Any:
        """A state but for the rows that were appended to its tables, all of them zero."""

        def cut(x: np.ndarray, like: np.ndarray) -> np.ndarray:
            if x.shape == like.shape:
                return x
            assert not x[len(like) :].any()
            return x[: len(like)]

        return jax.tree.map(cut, state, self.start)

    def steps(self, devices: int, count: int = 3) -> tuple[Any, list[Any]]:
        """The state after some steps on so many devices, and the metrics of each, as NumPy
        arrays."""
        mesh = mesh_of(devices)
        metrics = []
        state = self.state(mesh)
        run = jax.jit(on_mesh(self.trainer, mesh), donate_argnums=0, compiler_options=FAST)
        catalogue = put(mesh, self.catalogue, REPLICATED)
        for batch in self.batches[:count]:
            state, found = run(state, put(mesh, batch, SHARDED), catalogue)
            metrics.append(jax.device_get(found))
        return self.cut(jax.device_get(state)), metrics


def mesh_of(devices: int) -> Any:
    """The mesh of the first devices, also of a number that does not divide those of the tests."""
    return jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), (AXIS,))


def on_mesh(trainer: Trainer, mesh: Any) -> Any:
    """(state, batch, catalogue) -> (state, metrics), one step on `mesh`."""
    specs = state_specs(abstract_state(trainer, mesh))
    one = functools.partial(train_step, trainer=trainer, group=device_group(mesh))
    return shard_map_if_needed(mesh, one, (specs, SHARDED, REPLICATED), (specs, REPLICATED))


def pools(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    """Pools of hard negatives, some of them empty."""
    sizes = rng.integers(0, size + 1, USERS).astype(np.int32)
    items = np.argsort(rng.random((USERS, ITEMS)), axis=1)[:, :size].astype(np.int32)
    return {"items": np.where(np.arange(size) < sizes[:, None], items, -1), "sizes": sizes}


def _features(rng: np.random.Generator, side: str, count: int) -> dict[str, np.ndarray]:
    def of(i: Input) -> np.ndarray:
        if not i.table:
            return rng.normal(size=(count, i.width)).astype(np.float32)
        ids = rng.integers(0, TABLES[i.table], (count, i.length) if i.length else count)
        return ids.astype(np.int32)

    return {name: of(i) for name, i in INPUTS[side].items()}


def differences(got: Any, expected: Any) -> dict[str, float]:
    """Path -> largest difference of an array, of those that differ, beside 1 or the largest of
    these numbers."""
    found = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        a = np.asarray(a)
        b = np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype, jax.tree_util.keystr(path)
        unequal = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        if unequal.any():
            scale = max(1.0, float(np.abs(b[unequal]).max()))
            found[jax.tree_util.keystr(path)] = (
                float(np.abs(a[unequal].astype(np.float64) - b[unequal]).max()) / scale
            )
    return found
