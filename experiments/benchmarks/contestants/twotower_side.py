"""This library."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.contestants.turn import (
    ACCUMULATOR,
    EXPANSION,
    HIDDEN,
    INTERACTIONS,
    ITEMS,
    RATE,
    TEMPERATURE,
    USERS,
    WIDTH,
    fastest,
    interactions,
    sequences,
    serve,
    table_ids,
    table_targets,
)


def tables(*, kind: str, rows: int, batch: int) -> tuple[Callable[[int], None], str]:
    """Steps of one table: look up, a pointwise loss, its gradient, the optimizer's update.
    "dense_adam" is optax's."""
    import jax
    import jax.numpy as jnp
    import optax

    from twotower.kernels.sparse_update import apply_gradients
    from twotower.kernels.table_optimizers import TABLE_OPTIMIZERS
    from twotower.towers.embeddings import init_table, lookup

    targets = jnp.asarray(table_targets(batch))

    def loss_of(found: jax.Array) -> jax.Array:
        return jax.nn.softplus(-(found * targets).sum(-1)).mean()

    def sparse(state: Any, ids: jax.Array) -> Any:
        table, slots, step = state
        grads = jax.grad(loss_of)(lookup(table, ids))
        return *apply_gradients(TABLE_OPTIMIZERS[kind], table, slots, ids, grads, 0.05, step)[
            :2
        ], step + 1

    def dense(state: Any, ids: jax.Array) -> Any:
        table, slots, step = state
        grads = jax.grad(lambda table: loss_of(table[ids]))(table)
        updates, slots = optax.adam(0.001).update(grads, slots)
        return optax.apply_updates(table, updates), slots, step + 1

    def init() -> Any:
        table = init_table(jax.random.key(0), rows, WIDTH)
        slots = (
            optax.adam(0.001).init(table)
            if kind == "dense_adam"
            else TABLE_OPTIMIZERS[kind].init(table, 0.1)
        )
        return table, slots, jnp.int32(0)

    state = [jax.jit(init)()]
    jitted = jax.jit(dense if kind == "dense_adam" else sparse, donate_argnums=0)
    ids = itertools.cycle([jnp.asarray(x, jnp.int32) for x in table_ids(rows, batch)])

    def run(repeats: int) -> None:
        for _ in range(repeats):
            state[0] = jitted(state[0], next(ids))
        jax.block_until_ready(state[0])

    return run, f"jax {jax.__version__}"


def step(*, batch: int, tuned: bool, quick: bool) -> tuple[Callable[[int], None], str]:
    """Passes over the data by the compiled steps of `fit`, with the corrections that peers lack: as
    the default options run them, or a pass a dispatch in the faster type."""
    return _faster(functools.partial(_passes, batch), tuned, quick)


def _faster(
    make: Callable[[bool, str], Callable[[int], None]], tuned: bool, quick: bool
) -> tuple[Callable[[int], None], str]:
    """Returns the run of the type that "auto" takes, or of the faster type."""
    import jax

    from twotower.kernels.dense import fastest_dtype
    from twotower.runtime import keep_freed_memory

    # As every command does; what the environment sets is left.
    keep_freed_memory()
    dtypes = ("float32", "bfloat16") if tuned else (fastest_dtype(),)
    makes = {dtype: functools.partial(make, tuned, dtype) for dtype in dtypes}
    best, run = fastest(makes, rounds=3 if quick else 5)
    return run, f"jax {jax.__version__}, {best}"


def _passes(batch: int, tuned: bool, dtype: str) -> Callable[[int], None]:
    steps, tower = INTERACTIONS // batch, {"layers": (HIDDEN, WIDTH)}
    model = {
        "user": tower,
        "item": tower,
        "temperature": TEMPERATURE,
        "learn_temperature": False,
        "dtype": dtype,
    }
    config = {
        "model": model,
        "objective": {"negatives": {"uniform": 0}},
        "training": {
            "batch_size": batch,
            "steps": steps,
            "validate_every": steps,
            "steps_per_dispatch": steps if tuned else 0,
            "optimizer": {"kind": "adagrad", "learning_rate": RATE},
            "tables": {
                "kind": "adagrad",
                "learning_rate": RATE,
                "initial_accumulator": ACCUMULATOR,
            },
        },
    }
    users, items = (x - 1 for x in interactions())
    return _fit(config, {"user": USERS, "item": ITEMS}, users, items, WIDTH)


def whole_step(*, rows: int) -> tuple[Callable[[int], None], str]:
    """Dispatches of eight steps of a model of two tables of `rows`, of half the width so that they
    fit beside another's."""
    config = {
        "objective": {"symmetric": True, "negatives": {"uniform": 0}},
        "training": {"batch_size": 1024, "steps": 8, "validate_every": 8, "steps_per_dispatch": 8},
    }
    users, items = (table_ids(rows, 2**15, 2) - 1).astype("int32")
    import jax

    sizes = {"user": rows, "item": rows}
    return _fit(config, sizes, users, items, WIDTH // 2), f"jax {jax.__version__}"


def _fit(
    config: Any, sizes: dict[str, int], users: Any, items: Any, width: int
) -> Callable[[int], None]:
    """Repeats all compiled steps of `fit` on ids alone, in as few dispatches as it may."""
    import jax
    import numpy as np

    from twotower.config import from_dict
    from twotower.core.mesh import make_mesh
    from twotower.features.inputs import Input, TableShape
    from twotower.pipeline.batches import Batches, InteractionExamples, InteractionRows
    from twotower.towers.two_tower import TwoTower
    from twotower.training.candidates import CorpusSize
    from twotower.training.init import init_on
    from twotower.training.loop import compile_steps
    from twotower.training.state import Trainer

    config, mesh = from_dict(config), make_mesh()
    training = config.training
    inputs = {side: {"id": Input(table=f"{side}.id")} for side in sizes}
    shapes = {f"{side}.id": TableShape(rows=rows + 1, width=width) for side, rows in sizes.items()}
    model = TwoTower.build_from(config.model, inputs, shapes)
    trainer = Trainer.build(config, model, CorpusSize(sizes["user"], sizes["item"], 0))
    rows = InteractionRows(users, items, np.ones(len(users), np.float32), None, {})
    features = {
        side: {"id": np.arange(1, rows + 1, dtype=np.int32)} for side, rows in sizes.items()
    }
    examples = InteractionExamples(rows, features)
    batches = Batches(examples, batch_size=training.batch_size, seed=0, resident_megabytes=1000)
    counts = {
        side: np.bincount(x, minlength=sizes[side]).astype(np.float32)
        for side, x in (("user", users), ("item", items))
    }
    counts["rows"] = np.asarray(len(users), np.float32)
    state = [init_on(mesh, trainer, counts)]
    # Of the prepared data only the corpus' popularity and features would be asked for, by negatives
    # that are not used.
    no_data: Any = None
    run_steps = compile_steps(trainer, batches, no_data, mesh)
    position = itertools.count()

    def run(repeats: int) -> None:
        for _ in range(repeats):
            step = next(position) * training.steps
            end = step + training.steps
            while step < end:
                state[0], _, count = run_steps(state[0], step, end - step)
                step += count
        jax.block_until_ready(state[0])

    return run


def sequence(
    *, length: int, batch: int, tuned: bool, quick: bool
) -> tuple[Callable[[int], None], str]:
    """Steps of the configuration of MovieLens-1M with a smaller, plain model, on users who fill
    their rows."""
    return _faster(functools.partial(_sequence_steps, length, batch), tuned, quick)


def _sequence_steps(length: int, batch: int, tuned: bool, dtype: str) -> Callable[[int], None]:
    del tuned  # nothing gains from more steps a dispatch here
    import tempfile
    from pathlib import Path

    import jax

    from experiments.configs import movielens_1m_sequential
    from twotower.config import from_dict
    from twotower.core.mesh import make_mesh
    from twotower.pipeline.batches import Batches
    from twotower.pipeline.prepare import prepare
    from twotower.towers.two_tower import TwoTower
    from twotower.training.candidates import corpus_size, count_rows
    from twotower.training.init import init_on
    from twotower.training.loop import compile_steps
    from twotower.training.state import Trainer

    config = movielens_1m_sequential.get_config()
    config.split.validation = config.split.test = 0.0
    config.split.accept_leakage = ("repeated_pairs",)
    config.features.user["history"]["max_length"] = length
    config.features.item["item_id"]["embedding_size"] = WIDTH
    config.model.history.block, config.model.history.expansion, config.model.dtype = (
        "sasrec",
        EXPANSION,
        dtype,
    )
    config.training.batch_size, config.training.crop = batch, "last"
    with tempfile.TemporaryDirectory() as folder:
        config.data.path = str(Path(folder) / "pairs.txt")
        Path(config.data.path).write_text(
            "".join(f"{u} {i}\n" for u, row in enumerate(sequences(length)) for i in row)
        )
        prepared = prepare(from_dict(config))
    trainer = Trainer.build(
        prepared.config,
        TwoTower.build(prepared.config.model, prepared.encoder),
        corpus_size(prepared),
    )
    examples = prepared.training_examples()
    batches = Batches(examples, batch_size=batch, seed=0, resident_megabytes=1000)
    mesh = make_mesh()
    state = [init_on(mesh, trainer, count_rows(prepared))]
    run_steps, position = compile_steps(trainer, batches, prepared, mesh), itertools.count()

    def run(repeats: int) -> None:
        for _ in range(repeats):
            state[0], *_ = run_steps(state[0], next(position), 1)
        jax.block_until_ready(state[0])

    return run


if __name__ == "__main__":
    serve({"tables": tables, "step": step, "whole_step": whole_step, "sequence": sequence})
