"""Plans of trainings: a trace against formulas by hand and prepared data, and the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experiments.commands import error_of, output_of
from tests.training import shop
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.features.inputs import SIDES
from twotower.training.init import init_state
from twotower.training.planning.costs import Cost, Target, read_cost
from twotower.training.planning.peaks import CHIPS, SUSTAINED
from twotower.training.planning.plan import (
    Plan,
    find_cures,
    format_plan,
    make_plan,
    memory_parts,
    planned_trainer,
)
from twotower.training.planning.shapes import parse_values, planned_shapes, prepared_shapes

D = 8
B = 256
N = 4  # devices
USERS = 5_000
ITEMS = 3_000
ROWS = 100_000


def table(feature, width=D):
    return {feature: {"type": "string", "embedding_size": width}}


def make_config(width=D, **overrides):
    """Two tables of ids, and towers of two dense layers: the model of
    `experiments.benchmarks.scaling`."""
    towers = {side: {"layers": (2 * width, width)} for side in SIDES}
    values = {
        "features": {side: table(f"{side}_id", width) for side in SIDES},
        "model": towers,
        "objective": {"negatives": {"uniform": 0}},
        "training": {"batch_size": B},
    }
    return from_dict(values | overrides)


def shapes_of(config, users=USERS, items=ITEMS, rows=ROWS):
    return planned_shapes(config, users=users, items=items, rows=rows, values={})


@pytest.fixture(scope="module")
def plan():
    config = make_config()
    return make_plan(config, shapes_of(config), devices=N, kind="h100")


def test_products_and_exchanged_bytes_are_those_of_the_formulas(plan):
    # See the docstring of `experiments.benchmarks.scaling`, which compiled programs obey.
    kernels = 8 * D * D
    dense = kernels + 6 * D + 1
    assert plan.cost.flops == 6 * B / N * (B * D + kernels)
    sent = (N - 1) / N * (24 * B * D + 16 * B + 8 * (dense + 3))
    # A compiler drops one of two equal scalars.
    assert 0 <= plan.cost.sent - sent <= 8


def test_state_and_batch_take_the_bytes_of_their_shapes(plan):
    # Rows of padding and of unknown ids, to a multiple of 1,024: 5 and 3 times that.
    rows = 5 * 1024 + 3 * 1024
    assert plan.memory["tables"] == rows * D * 4 / N
    assert plan.memory["slots of the table optimizer"] == rows * 4 / N
    kernels = 8 * D * D
    dense = 4 * (kernels + 6 * D + 1)
    # Parameters and two moments of Adam, and the counters of both.
    assert plan.memory["dense parameters and their optimizer"] == 3 * dense + 4 + 4
    assert plan.memory["frequencies"] == 4 * ITEMS + 4
    assert plan.memory["batch"] == B / N * 5 * 4
    # Rows of 12 bytes, and an id of each user and item.
    assert plan.memory["data"] == ROWS * 12 + (USERS + ITEMS) * 4


def test_planned_shapes_are_those_of_prepared_data(prepared):
    config = prepared.config
    counts = {"users": len(prepared.users), "items": len(prepared.items)}
    values = {}
    for feature in prepared.encoder.spec:
        vocabulary = prepared.encoder.fitted[feature.key].vocabulary
        if vocabulary is not None:
            values[feature.column] = len(vocabulary.values)
    planned = planned_shapes(config, **counts, rows=len(prepared.train), values=values)
    exact = prepared_shapes(prepared)
    assert planned.batch == exact.batch
    assert planned.item_features == exact.item_features
    assert planned.inputs == exact.inputs
    assert planned.data == exact.data
    for name, shape in exact.tables.items():
        assert (planned.tables[name].rows, planned.tables[name].width) == (shape.rows, shape.width)


def test_state_of_a_plan_is_that_of_a_training_to_the_byte(prepared):
    trainer = shop.build_trainer(prepared, prepared.config)
    counts = {"user": len(prepared.users), "item": len(prepared.items)}
    counts = {side: jax.ShapeDtypeStruct((size,), "float32") for side, size in counts.items()}
    counts["rows"] = jax.ShapeDtypeStruct((), "float32")
    # The way of one device, which `abstract_state` does not take.
    state = jax.eval_shape(lambda counts: init_state(trainer, counts), counts)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    parts = memory_parts(trainer, prepared_shapes(prepared), 1, Cost())
    beside = ("data", "arrays of the corpus", "batch", "activations and gradients")
    beside = (*beside, "blocks of the loss")
    assert sum(count for name, count in parts.items() if name not in beside) == whole


def test_cost_of_a_loop_of_products():
    def run(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    x = jax.ShapeDtypeStruct((32, 16), "float32")
    kernels = jax.ShapeDtypeStruct((5, 16, 16), "float32")
    cost = read_cost(jax.make_jaxpr(run)(x, kernels), Target())
    assert cost.flops == 5 * 2 * 32 * 16 * 16
    # Each round reads x and a kernel, writes the product, reads it and writes the new x.
    assert cost.moved == 5 * 4 * (4 * 32 * 16 + 16 * 16)
    assert cost.sent == 0
    # The product of a round: x is written over.
    assert cost.blocks == 4 * 32 * 16


def test_cost_of_rows_is_that_of_rows_not_of_their_table():
    def update(table, rows, values):
        return table.at[rows].add(values, mode="drop", unique_indices=True)

    table = jax.ShapeDtypeStruct((100_000, 16), "float32")
    values = jax.ShapeDtypeStruct((32, 16), "float32")
    rows = jax.ShapeDtypeStruct((32,), "int32")
    traced = jax.make_jaxpr(update)(table, rows, values)
    cost = read_cost(traced, Target(), donated=1)
    assert cost.moved < 10 * 4 * 32 * 16
    assert cost.peak < 4 * 32 * 16
    # The table is not copied because it is donated.
    assert read_cost(jax.make_jaxpr(lambda x: x + 1)(table), Target()).peak == 4 * 100_000 * 16
    assert read_cost(jax.make_jaxpr(lambda x: x + 1)(table), Target(), donated=1).peak == 0


def test_time_and_price_by_hand(plan):
    cost = Cost(flops=1e12, moved=1e9, sent=1e9)
    chip = CHIPS["ironwood"]
    half = chip.flops / 2 * SUSTAINED
    by_hand = Plan(
        plan.config,
        dataclasses.replace(plan.shapes, examples=10 * B + 1),
        devices=8,
        kind="ironwood",
        memory={"tables": 96 * 2**30},
        cost=cost,
        times={"compute": cost.flops / half, "memory": 1e-3, "network": 2e-3},
        dim=D,
    )
    assert by_hand.bound == "network"
    assert by_hand.step_seconds == pytest.approx(2e-3 + max(1e-3, 1e12 / half))
    # The last batch goes on in the next epoch.
    assert by_hand.steps == 11
    assert by_hand.chips == 4
    assert by_hand.epoch_price(36.0) == pytest.approx(4 * 11 * by_hand.step_seconds / 100)
    assert not by_hand.fits


def test_times_are_costs_over_sustained_peaks(plan):
    chip = CHIPS["h100"]
    # Products in float32 are TensorFloat-32's, of half the peak; four GPUs share a host.
    assert plan.times == {
        "compute": plan.cost.flops / (chip.flops / 2 * SUSTAINED),
        "memory": plan.cost.moved / (chip.bandwidth * SUSTAINED),
        "network": plan.cost.sent / (chip.network * SUSTAINED),
    }
    assert chip.ring(8) == chip.network and chip.ring(16) == chip.far_network
    assert CHIPS["v5p"].ring(512) == CHIPS["v5p"].network


def test_what_does_not_fit_says_on_how_many_devices_it_does():
    config = make_config(width=128)
    shapes = shapes_of(config, users=10**9, items=10**8, rows=10**11)
    few = make_plan(config, shapes, devices=4, kind="v6e")
    assert not few.fits
    cure = next(cure for cure in find_cures(few) if cure.startswith("--devices="))
    devices = int(cure.partition("=")[2].partition(":")[0])
    parts = {name: count for name, count in few.memory.items()}
    for name in ("tables", "slots of the table optimizer"):
        parts[name] *= 4 / devices
    enough = dataclasses.replace(few, memory=parts, devices=devices)
    assert enough.fits
    for name in ("tables", "slots of the table optimizer"):
        parts[name] *= 2
    assert not enough.fits, "half as many would do"
    text = format_plan(few, price=2.0)
    assert "DOES NOT FIT" in text and f"--devices={devices}" in text and "is streamed" in text


def test_commands_and_their_mistakes():
    sizes = ("--users=4e3", "--items=2_500", "--rows=1e5")
    flags = ("--config=quickstart", "--kind=v5p")
    text = output_of("plan", *flags, *sizes, "--devices=8", "--price=3", "--values=brand=30")
    assert "4,000 users" in text and "Price: " in text and "fits" in text
    wrong = {
        ("--kind=v5q", *sizes): "v5p",
        sizes[:2]: "--rows=0",
        (*sizes, "--devices=3"): "cannot be divided evenly over 3 devices",
        (*sizes, "--values=town=3"): "--values",
    }
    for given, expected in wrong.items():
        assert expected in error_of("plan", *flags, *given)


def test_values_are_pairs():
    assert parse_values(["city=1e3", "brand=7"]) == {"city": 1000, "brand": 7}
    with pytest.raises(ConfigError, match="--values=city"):
        parse_values(["city"])


@pytest.mark.parametrize("fields", [{}, {"path": "a.npy", "ids": "a.txt", "frozen": False}])
def test_shapes_that_data_alone_knows_are_refused(fields):
    pretrained = {"type": "pretrained"} | fields
    features = {"item": table("item_id") | {"picture": pretrained}}
    with pytest.raises(ConfigError, match="features.item.picture.*--workdir"):
        shapes_of(make_config(features=features))


@pytest.mark.slow
def test_sequences_are_planned_as_packed_rows():
    history = {"type": "history", "max_length": 7}
    config = make_config(
        features={"user": {"history": history}, "item": table("item_id")},
        model={"user": {"layers": ()}, "item": {"layers": ()}, "history": {"kind": "causal"}},
        training={"batch_size": 16, "examples": "sequences"},
    )
    shapes = shapes_of(config)
    assert shapes.examples == ROWS // 8
    trainer = planned_trainer(config, shapes, backend="cpu")
    assert trainer.sampling.batch_size == 16 * 8
    plan = make_plan(config, shapes, devices=2, kind="b200")
    assert plan.cost.flops > 6 * 128 * 128 * D / 2
    assert np.isfinite(plan.step_seconds)
