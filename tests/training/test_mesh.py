"""Several devices do what one does: the same numbers, and nothing of table size or [B, C] on the
way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import hlo
from tests.training.divided import Case, differences, make_trainer, mesh_of, on_mesh
from twotower.config import NegativesConfig, TrainingConfig, from_dict
from twotower.core.errors import ConfigError
from twotower.core.mesh import SHARDED, make_mesh, shardings
from twotower.features.inputs import SIDES, TableShape
from twotower.training import checks
from twotower.training.checks import check_batch, check_batch_norm
from twotower.training.init import abstract_state, init_on
from twotower.training.loop import fit
from twotower.training.state import state_specs

pytestmark = pytest.mark.slow

TOWER = {"layers": (8,), "dropout": 0.2}
# The dense optimizer is one that does not blow up the rounding of a gradient which is 0, that of a
# bias before batch norm.
EVERYTHING = {
    # Two layers: a gradient that has passed one batch norm passes another.
    "model": {
        "user": TOWER | {"layers": (8, 8), "batch_norm": True},
        "item": TOWER | {"batch_norm": True},
    },
    "objective": {
        "symmetric": True,
        "margin": 0.1,
        "label": "like",
        "heads": {
            "click": {"label": "click", "combine": "multiply", "weight": 0.5, "pos_weight": 2.0}
        },
        "negatives": {
            "uniform": 5,
            "popularity": 3,
            "queue": 96,
            "mined": 2,
            "mined_refresh": 4,
            "mined_ranks": (2, 8),
            "explicit": 3,
            "frequency": "gap",
        },
    },
    "training": {"optimizer": {"kind": "adagrad"}},
}
# Three devices divide neither the draws, 7, nor the rows of tables. Adam, whose first step is as
# long for a gradient of 1e-8 as for one of 1, is slow.
PLAIN = {
    "model": {"user": TOWER | {"layer_norm": True}, "item": {"layers": (8,)}},
    "objective": {"negatives": {"uniform": 7, "frequency": "sketch"}},
    "training": {
        "tables": {"kind": "lazy_adam", "learning_rate": 0.001},
        "optimizer": {"clip_norm": 0.1},
    },
}
CATALOGUE = {
    "model": {"user": TOWER, "item": TOWER},
    "objective": {"loss": "gbce", "negatives": {"catalogue": True}},
    "training": {"tables": {"kind": "adagrad", "initial_accumulator": 0.1}},
}
# No candidate is shared by the batch, so there is nothing to gather.
HARD = {
    "model": {"user": TOWER, "item": {"layers": (8,)}},
    "objective": {"label": "like", "negatives": {"in_batch": False, "uniform": 0, "explicit": 3}},
    "training": {
        "tables": {"kind": "adagrad", "initial_accumulator": 0.1},
        "optimizer": {"kind": "adagrad"},
    },
}
LABELS = {
    "model": {"user": TOWER, "item": TOWER},
    "objective": {"loss": "binary_cross_entropy", "label": "like", "pos_weight": 3.0},
    "training": {"accumulate": 2},
}


@pytest.mark.parametrize(
    "values, devices",
    [(EVERYTHING, 8), (PLAIN, 3), (CATALOGUE, 4), (HARD, 2), (LABELS, 8)],
    ids=["everything", "plain", "catalogue", "hard", "labels"],
)
def test_several_devices_equal_one_in_float64(values, devices):
    with jax.enable_x64(True):
        case = Case(values, jnp.float64)
        alone = case.steps(1)
        assert all(np.isfinite(step["loss"]) and step["grad_norm"] > 1e-3 for step in alone[1])
        assert set(case.start.tables) <= {
            name.split("'")[1] for name in differences(alone[0].tables, case.start.tables)
        }
        far = differences(case.steps(devices), alone)
        assert not far or max(far.values()) < 1e-10, max(far, key=far.get)


def test_a_fresh_state_is_the_same_on_any_mesh_and_no_device_holds_a_whole_table():
    case = Case(PLAIN, jnp.float32)
    for devices in (3, 8):
        divided = init_on(mesh_of(devices), case.trainer, case.counts)
        assert not differences(case.cut(jax.device_get(divided)), case.start)
    for name, table in (divided.tables | {"slots": divided.table_slots["large"]["m"]}).items():
        assert all(part.data.shape == (len(table) // 8, 8) for part in table.addressable_shards), (
            name
        )
    assert divided.params["log_temperature"].sharding.is_fully_replicated


# A device's part of the table is larger than all blocks of logits together.
ROWS = 2**22
BATCH = 4096
DEVICES = 8


@pytest.fixture(scope="module")
def compiled():
    """(the step on eight devices with a large table, as compiled; its state's shapes)."""
    trainer = make_trainer(
        {
            "model": {side: {"layers": (16, 8), "dropout": 0.1} for side in SIDES},
            "training": {"batch_size": BATCH},
            "objective": {"symmetric": True, "negatives": {"uniform": 512, "queue": BATCH}},
        },
        items=1000,
    )
    tables = trainer.model.tables | {"large": TableShape(rows=ROWS - 5, width=16)}
    trainer = dataclasses.replace(trainer, model=dataclasses.replace(trainer.model, tables=tables))
    mesh = make_mesh(DEVICES)
    state = abstract_state(trainer, mesh)
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=shardings(mesh, SHARDED))
    case = Case(PLAIN, jnp.float32)
    batch = jax.tree.map(lambda x: placed((BATCH, *x.shape[1:]), x.dtype), case.batches[0])
    features = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1000, *x.shape[1:]), x.dtype), case.features["item"]
    )
    step = jax.jit(on_mesh(trainer, mesh), donate_argnums=0)
    return step.lower(state, batch, {"item_features": features}).compile(), state


def test_no_collective_and_no_temporary_is_of_table_size(compiled):
    program = hlo.read(compiled[0].as_text())
    step, state = compiled
    shard = ROWS // DEVICES * 16
    assert all(shape.size < shard / 4 for found in program.collectives() for shape in found.shapes)
    memory = step.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * shard
    held = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
    )
    assert memory.alias_size_in_bytes == held  # all of the state is updated in place
    # What is as large as the device's part of the table is that part itself, on its way through.
    made = {
        line.kind for line in program.instructions for shape in line.shapes if shape.size >= shard
    }
    assert not made & {
        "copy",
        "broadcast",
        "add",
        "multiply",
        "select",
        "convert",
        "transpose",
        "concatenate",
        "dot",
    }, made


def test_no_array_holds_the_scores_and_the_sweep_is_alone(compiled):
    program = hlo.read(compiled[0].as_text())
    candidates = BATCH + 512 + BATCH
    held = {shape.dims for shape in program.shapes() if {candidates, BATCH} & set(shape.dims[1:])}
    assert any(dims[-1] == candidates for dims in held)  # a block of the sweep
    most = max(dims[0] for dims in held if len(dims) == 2 and dims[-1] in (candidates, BATCH))
    assert most <= 256 < BATCH // DEVICES
    assert program.looped and not [found for found in program.collectives() if found.in_loop]


def test_a_step_has_the_collectives_that_it_should(compiled):
    """A table: ids and gradients gathered, rows scattered; vectors gathered and their gradients
    scattered, ids beside them, for both directions; ids of the batch for the queue, and its
    vectors; the sums of weights, and one of all the rest."""
    found = [collective.kind for collective in hlo.read(compiled[0].as_text()).collectives()]
    tables = 3
    expected = {
        "all-gather": 2 * tables + 2 * 2 + 2 + 1,
        "reduce-scatter": tables + 2,
        "all-reduce": 2,
    }
    assert {kind: found.count(kind) for kind in set(found)} == expected


@pytest.mark.usefixtures("all_devices")
def test_all_devices_take_part_where_no_number_is_named():
    assert make_mesh().size == 8


def test_a_number_of_devices_that_does_not_divide_them_is_refused():
    with pytest.raises(
        ConfigError, match="--devices=3 must divide the 8 devices here.* Choose one of 1, 2, 4, 8"
    ):
        make_mesh(3)
    with pytest.raises(ConfigError, match="--devices=16 must divide"):
        make_mesh(16)


def test_a_batch_that_cannot_be_divided_is_refused_and_offered_two_ways():
    with pytest.raises(
        ConfigError,
        match="batch_size=100 cannot .* over 8 devices: choose 96 or 104, or --devices=4",
    ):
        check_batch(TrainingConfig(batch_size=100), make_mesh(8))
    with pytest.raises(ConfigError, match="batch_size=3 .* choose 8, or --devices=1"):
        check_batch(TrainingConfig(batch_size=3), make_mesh(8))
    check_batch(TrainingConfig(batch_size=96, accumulate=4), make_mesh(8))
    with pytest.raises(
        ConfigError,
        match="accumulate=8 must divide the 12 rows of .*batch_size=96 that each of 8 devices has",
    ):
        check_batch(TrainingConfig(batch_size=96, accumulate=8), make_mesh(8))


def test_draws_that_batch_norm_would_see_filled_up_are_refused():
    def check(draws, devices, **item):
        tower = {"layers": (8,), **item}
        config = from_dict({"model": {"user": {"layers": (8,)}, "item": tower}})
        check_batch_norm(config, NegativesConfig(uniform=draws), devices, max_rows=10_000)

    check(8, 8, batch_norm=True)
    check(7, 8)
    with pytest.raises(
        ConfigError,
        match="uniform=7 and popularity=0 draw 7 .* over 4 .* Draw 4 in all, or choose layer_norm",
    ):
        check(7, 4, batch_norm=True)


def test_too_little_memory_is_refused_with_the_arithmetic_before_anything_is_allocated(
    make, prepared, tmp_path, monkeypatch
):
    from tests.training.shop import small_config
    from twotower.training import loop

    trainer, *_ = make(small_config())
    monkeypatch.setattr(checks, "_free_bytes", lambda mesh: 20_000)
    monkeypatch.setattr(loop, "init_on", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ConfigError) as error:
        fit(trainer, prepared, tmp_path, validate=None, mesh=make_mesh(8))
    words = str(error.value)
    # 1,024 rows of 16 numbers and one of the accumulator, 4 bytes each, on 8 devices: 8.5 KiB.
    assert "user.user_id (1,024 x 16) with its optimizer's state, divided over 8: 8.5 KiB" in words
    assert (
        "on each of 8 devices, and 19.5 KiB is free" in words
        and "training data" in words
        and "devices (about" in words
    )


def test_every_array_of_the_state_has_a_rule():
    state = abstract_state(make_trainer(EVERYTHING), make_mesh(1))
    specs = state_specs(state)
    assert specs.tables["both"] == specs.table_slots["both"]["accumulator"] == SHARDED
    with pytest.raises(ValueError, match="No rule of the sharding covers 'tables/both'"):
        state_specs(state, (("^(step|params)", SHARDED),))
