"""The step: its gradients against dense autodiff, what it touches, what it compiles to."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import shop
from twotower.core.errors import ConfigError
from twotower.core.mesh import SINGLE_DEVICE
from twotower.features.inputs import SIDES
from twotower.kernels.sparse_update import apply_gradients
from twotower.kernels.table_optimizers import TABLE_OPTIMIZERS
from twotower.towers.two_tower import Weights
from twotower.training.init import init_state
from twotower.training.optimizers import StepScalars
from twotower.training.step import gather_gradients, gather_ids, lookup_all, oov_dropout, train_step

pytestmark = pytest.mark.slow

# The batch's own negatives alone, so that an oracle needs no draws.
IN_BATCH = {"negatives": {"uniform": 0}}
PLATEAU = {
    "optimizer": {"kind": "sgd"},
    "tables": {"kind": "sgd"},
    "schedule": {"kind": "plateau"},
}


def small_config(**overrides):
    return shop.small_config(**{"objective": IN_BATCH} | overrides)


def _step(state, batch, *, trainer):
    constants = {"scalars": StepScalars.build(trainer.config.training)}
    return shop.jit_step(trainer)(state, batch, constants)


def _bytes(shape):
    return shape.size * shape.dtype.itemsize


def _softmax(queries, answers, ids, query_ids, counts, rows, temperature):
    """Each query's answer among all answers: items that are no other positive of its owner and not
    its own again."""
    logits = (
        queries @ answers.T / temperature
        - jnp.log(len(ids) * jnp.maximum(counts[ids], 1) / rows)[None]
    )
    same = (ids[None] == ids[:, None]) | (query_ids[None] == query_ids[:, None])
    kept = jnp.where(same & ~jnp.eye(len(ids), dtype=bool), -jnp.inf, logits)
    return jax.nn.logsumexp(kept, axis=1) - jnp.diagonal(logits)


def _dense_gradients(trainer, state, batch):
    """The gradient of whole tables by autodiff through `table[ids]`: the oracle."""

    def loss(params, tables):
        weights = Weights(params, tables, state.batch_stats)
        user, item = (
            trainer.model.embed(side, weights, batch[f"{side}_features"]) for side in SIDES
        )
        counts = state.frequency
        temperature = trainer.model.temperature(params)
        rows = counts["item"]["rows"]
        counts = {side: x["counts"] for side, x in counts.items()}
        losses = _softmax(
            user, item, batch["item"], batch["user"], counts["item"], rows, temperature
        )
        if trainer.config.objective.symmetric:
            other = _softmax(
                item, user, batch["user"], batch["item"], counts["user"], rows, temperature
            )
            losses = (losses + other) / 2
        return jnp.sum(losses * batch["weight"]) / batch["weight"].sum()

    # Jitted, since its operations one by one would be compiled one by one.
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(state.params, state.tables)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_step_equals_dense_optimizers_on_whole_tables(make, symmetric):
    config = small_config(
        training={
            "tables": {"kind": "adagrad", "learning_rate": 10.0, "initial_accumulator": 0.1},
            "optimizer": {"kind": "sgd"},
        },
        objective=IN_BATCH | {"symmetric": symmetric},
    )
    trainer, state, batch = make(config)
    # No id is dropped, so that the oracle sees the same rows.
    inputs = {
        s: {n: dataclasses.replace(i, oov_rate=0.0) for n, i in trainer.model.inputs[s].items()}
        for s in SIDES
    }
    trainer = dataclasses.replace(trainer, model=dataclasses.replace(trainer.model, inputs=inputs))
    loss, (grads, table_grads) = _dense_gradients(trainer, state, batch)
    table_grads = {name: g.at[0].set(0.0) for name, g in table_grads.items()}
    dense = optax.adagrad(10.0, initial_accumulator_value=0.1, eps=1e-12)
    updates, _ = dense.update(table_grads, dense.init(state.tables))
    new, metrics = _step(state, batch, trainer=trainer)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for name, table in optax.apply_updates(state.tables, updates).items():
        np.testing.assert_allclose(new.tables[name], table, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(table - state.tables[name]).max() > 1e-3
    expected = jax.tree.map(lambda p, g: p - 1e-3 * g, state.params, grads)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), new.params, expected)
    assert metrics["grad_norm"] > 0


def test_a_table_shared_by_both_towers_is_updated_once_with_the_sum(make):
    trainer, state, batch = make(small_config())
    model = trainer.model
    shared = {
        s: {
            n: dataclasses.replace(i, table="shared") for n, i in model.inputs[s].items() if i.table
        }
        for s in SIDES
    }
    model = dataclasses.replace(model, inputs=shared)
    features = {
        "user": {"user_id": jnp.array([3, 5, 0])},
        "item": {"item_id": jnp.array([5, 7, 5])},
    }
    shared["user"] = {"user_id": shared["user"]["user_id"]}
    shared["item"] = {"item_id": shared["item"]["item_id"]}
    ids = gather_ids(model, features, SINGLE_DEVICE)
    rows = lookup_all(
        model, {"shared": jnp.arange(16.0).reshape(8, 2)}, features, ids, SINGLE_DEVICE
    )
    assert rows["user"]["user_id"][:, 0].tolist() == [6, 10, 0] and rows["item"]["item_id"][
        :, 0
    ].tolist() == [10, 14, 10]
    grads = {"user": {"user_id": jnp.ones((3, 2))}, "item": {"item_id": jnp.full((3, 2), 10.0)}}
    given = gather_gradients(model, grads, SINGLE_DEVICE)
    table, _, _ = apply_gradients(
        TABLE_OPTIMIZERS["sgd"], jnp.zeros((1024, 2)), {}, ids["shared"], given["shared"], 1.0, 0
    )
    assert {int(r): float(-table[r, 0]) for r in np.flatnonzero(table[:, 0])} == {
        3: 1.0,
        5: 21.0,
        7: 10.0,
    }


def test_rates_and_seeds_are_arguments_of_one_program(make):
    """Trials of a sweep that differ in these alone compile once."""
    programs = set()
    for seed, table_rate, rate, decay in ((0, 0.1, 1e-3, 0.0), (7, 0.3, 2e-2, 0.1)):
        optimizer = {"kind": "adamw", "learning_rate": rate, "weight_decay": decay}
        tables = {"learning_rate": table_rate}
        config = small_config(training={"seed": seed, "tables": tables, "optimizer": optimizer})
        trainer, state, batch = make(config)
        scalars = StepScalars.build(config.training)
        step = jax.jit(functools.partial(train_step, trainer=trainer))
        programs.add(step.lower(state, batch, {"scalars": scalars}).as_text())
    assert len(programs) == 1


def test_rows_that_the_batch_does_not_use_keep_their_bits(make):
    trainer, state, batch = make(small_config())
    new, _ = _step(state, batch, trainer=trainer)
    for side in SIDES:
        for name, i in trainer.model.inputs[side].items():
            if i.table:
                before = np.asarray(state.tables[i.table])
                after = np.asarray(new.tables[i.table])
                changed = np.flatnonzero((before != after).any(-1))
                used = np.unique(batch[f"{side}_features"][name])
                assert changed.size and 0 not in changed
                assert set(changed) <= set(used) | set(range(1, i.oov_rows + 1))


def test_the_compiled_step_holds_no_array_of_table_size(make, prepared):
    trainer, _, batch = make(small_config())
    rows = 307_200
    tables = {
        n: dataclasses.replace(t, rows=rows) if n == "user.user_id" else t
        for n, t in trainer.model.tables.items()
    }
    trainer = dataclasses.replace(trainer, model=dataclasses.replace(trainer.model, tables=tables))
    counts = {
        "user": jnp.ones(len(prepared.users)),
        "item": jnp.ones(len(prepared.items)),
        "rows": jnp.float32(9.0),
    }
    state = jax.eval_shape(functools.partial(init_state, trainer), counts)
    compiled = (
        jax.jit(functools.partial(train_step, trainer=trainer), donate_argnums=0)
        .lower(state, batch, {})
        .compile()
    )
    memory = compiled.memory_analysis()
    table_bytes = _bytes(state.tables["user.user_id"])
    assert memory.temp_size_in_bytes < table_bytes / 4
    # Every byte of the tables and of their accumulators is updated in place.
    assert memory.alias_size_in_bytes >= sum(
        _bytes(x) for x in jax.tree.leaves((state.tables, state.table_slots))
    )
    copies = re.findall(
        rf"= \S*\[{rows},\d+\]\S* (copy|broadcast|add|multiply)\(", compiled.as_text()
    )
    assert not copies


def test_only_the_share_of_weights_matters(make):
    trainer, state, batch = make(small_config())
    doubled = _step(state, batch | {"weight": batch["weight"] * 2}, trainer=trainer)[1]["loss"]
    np.testing.assert_allclose(doubled, _step(state, batch, trainer=trainer)[1]["loss"], rtol=1e-6)


def test_rows_without_weight_count_for_nothing(make):
    trainer, state, batch = make(
        small_config(objective={"negatives": {"uniform": 8, "in_batch": False}})
    )
    catalogue = {"item_features": {name: x[:40] for name, x in batch["item_features"].items()}}
    trainer = dataclasses.replace(trainer, sampling=dataclasses.replace(trainer.sampling, items=40))
    catalogue["scalars"] = StepScalars.build(trainer.config.training)
    step = shop.jit_step(trainer)
    half = batch | {"weight": batch["weight"].at[32:].set(0.0)}
    # In the place of the rows that have no weight, those that have one.
    others = jax.tree.map(lambda x: jnp.concatenate([x[:32], x[:32]]), batch)
    others["weight"] = half["weight"]
    assert np.any(others["user"] != batch["user"])
    np.testing.assert_allclose(
        step(state, half, catalogue)[1]["loss"],
        step(state, others, catalogue)[1]["loss"],
        rtol=1e-5,
    )
    nothing = step(state, batch | {"weight": jnp.zeros(64)}, catalogue)
    assert nothing[1]["loss"] == 0 and nothing[1]["grad_norm"] == 0


def test_dropped_ids_become_out_of_vocabulary_rows_all_of_them(key):
    from twotower.features.inputs import Input

    inputs = {"id": Input(table="t", oov_rate=0.25, oov_rows=4), "kept": Input(table="t")}
    ids = jnp.concatenate([jnp.arange(5, 4005, dtype=jnp.int32), jnp.zeros(50, jnp.int32)])
    dropped = oov_dropout(inputs, {"id": ids, "kept": ids}, jax.random.split(key, len(ids)))
    changed = np.asarray(dropped["id"] != ids)
    assert 0.2 < changed[:4000].mean() < 0.3 and not changed[4000:].any()
    assert set(np.asarray(dropped["id"])[changed].tolist()) == {1, 2, 3, 4}
    np.testing.assert_array_equal(dropped["kept"], ids)


def test_the_temperature_stays_within_bounds_and_is_free_to_return(make):
    optimizer = {"kind": "sgd", "learning_rate": 1e6}
    trainer, state, batch = make(small_config(training=PLATEAU | {"optimizer": optimizer}))
    new, _ = _step(state, batch, trainer=trainer)
    assert any(np.isclose(trainer.model.temperature(new.params), bound) for bound in (0.01, 1.0))
    # Random vectors are far too sure of themselves at T = 0.01: the gradient leads back inside, and
    # must not be clipped away.
    at_bound = state.replace(params=state.params | {"log_temperature": jnp.log(jnp.float32(0.01))})
    back, _ = _step(at_bound, batch, trainer=trainer)
    assert back.params["log_temperature"] > at_bound.params["log_temperature"]


def test_dropout_and_dropped_ids_differ_from_step_to_step(make):
    still = {"tables": {"learning_rate": 0.0}, "optimizer": {"learning_rate": 0.0}}
    config = small_config(model={"user": {"layers": (16,), "dropout": 0.5}}, training=still)
    trainer, state, batch = make(config)
    first = _step(state, batch, trainer=trainer)
    again = _step(state, batch, trainer=trainer)
    assert first[1]["loss"] == again[1]["loss"]
    # At rate 0 only the randomness of the next step is another.
    assert _step(first[0], batch, trainer=trainer)[1]["loss"] != first[1]["loss"]


def test_weight_decay_of_an_optimizer_that_has_none_is_refused(make):
    with pytest.raises(ConfigError, match="weight_decay=0.1 needs kind='adamw', not 'adam'"):
        make(small_config(training={"optimizer": {"weight_decay": 0.1}}))


def test_a_fixed_temperature_is_not_trained(make):
    trainer, state, batch = make(small_config(model={"learn_temperature": False}))
    new, _ = _step(state, batch, trainer=trainer)
    assert jax.grad(lambda p: trainer.model.temperature(p))(state.params)["log_temperature"] == 0
    assert new.params["log_temperature"] == state.params["log_temperature"]


def test_weight_decay_spares_all_but_kernels(make):
    config = small_config(
        training={"optimizer": {"kind": "adamw", "learning_rate": 1.0, "weight_decay": 0.5}}
    )
    trainer, state, _ = make(config)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = trainer.optimizers.dense.update(zeros, state.opt_state["dense"], state.params)
    moved = {
        jax.tree_util.keystr(p): bool(jnp.any(u != 0))
        for p, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {name: name.endswith("['kernel']") for name in moved} == moved


def test_batch_norm_and_dropout_act_in_training_alone(make):
    tower = {"layers": (16, 16), "batch_norm": True, "dropout": 0.5, "layer_norm": True}
    trainer, state, batch = make(small_config(model={"user": tower, "item": {"layers": (16,)}}))
    new, _ = _step(state, batch, trainer=trainer)
    mean = jax.tree.leaves(new.batch_stats["user"])
    assert any(jnp.any(a != b) for a, b in zip(mean, jax.tree.leaves(state.batch_stats["user"])))
    embed = jax.jit(functools.partial(trainer.model.embed, "user", new.weights))
    features = batch["user_features"]
    one = embed({name: x[:1] for name, x in features.items()})
    np.testing.assert_allclose(embed(features)[:1], one, atol=1e-5)


@pytest.mark.parametrize(
    "kind,warmup,expected",
    [
        ("constant", 0, {0: 1, 99: 1}),
        ("constant", 10, {0: 0, 5: 0.5, 10: 1, 99: 1}),
        ("cosine", 0, {0: 1, 50: 0.5, 100: 0}),
    ],
)
def test_schedules(make, kind, warmup, expected):
    trainer, _, _ = make(
        small_config(training={"steps": 100, "schedule": {"kind": kind, "warmup_steps": warmup}})
    )
    for step, factor in expected.items():
        np.testing.assert_allclose(trainer.optimizers.schedule(jnp.int32(step)), factor, atol=1e-6)


def test_the_schedule_scales_tables_and_dense_parameters_alike(make):
    trainer, state, batch = make(small_config(training=PLATEAU))
    full, _ = _step(state, batch, trainer=trainer)
    plateau = state.opt_state["plateau"]._replace(scale=jnp.float32(0.5))
    half, _ = _step(
        state.replace(opt_state=state.opt_state | {"plateau": plateau}), batch, trainer=trainer
    )
    for part in ("params", "tables"):
        whole = jax.tree.map(lambda a, b: a - b, getattr(full, part), getattr(state, part))
        halved = jax.tree.map(lambda a, b: a - b, getattr(half, part), getattr(state, part))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 2, b, atol=1e-6), whole, halved)


def test_clipping_bounds_the_dense_gradient(make):
    trainer, state, batch = make(
        small_config(
            training={"optimizer": {"kind": "sgd", "learning_rate": 1.0, "clip_norm": 1e-3}}
        )
    )
    new, _ = _step(state, batch, trainer=trainer)
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, new.params, state.params))
    assert moved <= 1.001e-3


@pytest.mark.parametrize(
    "section,fields,message",
    [
        ("objective", {"loss": "sofmax"}, "config.objective.loss='sofmax'.*did you mean 'softmax'"),
        ("training", {"optimizer": {"kind": "adm"}}, "config.training.optimizer.kind='adm'"),
        ("training", {"tables": {"kind": "adagrd"}}, "did you mean 'adagrad'"),
        ("training", {"schedule": {"kind": "cosin"}}, "did you mean 'cosine'"),
    ],
)
def test_unknown_kinds_name_the_nearest(prepared, make, section, fields, message):
    with pytest.raises(ConfigError, match=message):
        make(small_config(**{section: fields}))


def test_towers_of_different_widths_are_refused(make):
    with pytest.raises(
        ConfigError, match="user tower gives vectors of width 16, the item tower of width 8"
    ):
        make(small_config(model={"item": {"layers": (8,)}}))
