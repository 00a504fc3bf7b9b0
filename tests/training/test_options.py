"""Options of the objective: which go together, what is refused and how it is told, and parts of a
batch that add up."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.conformance import tiny
from tests.training.shop import small_config
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.training import step as step_module
from twotower.training.checks import check_batch_norm
from twotower.training.state import resolve_kinds

pytestmark = pytest.mark.slow

# What these tests cost is compiling; code that is not optimised comes to the same numbers but for
# rounding.
FAST = {"compiler_options": {"xla_backend_optimization_level": 0}}
TOWERS = {"layers": (16,), "dropout": 0.3}
BATCH = tiny.batch()
LABELLED = {"loss": "binary_cross_entropy", "label": "liked"}


@pytest.mark.parametrize(
    "objective,training,message",
    [
        (
            {"loss": "binary_cross_entropy"},
            {},
            "learns from labels, and config.objective.label is empty: name the column",
        ),
        (
            {"negatives": {"explicit": 4}},
            {},
            "explicit=4 draws from rows whose label is 0, and config.objective.label is empty",
        ),
        (
            LABELLED | {"negatives": {"queue": 64}},
            {},
            "has sources that loss='binary_cross_entropy' .* never uses",
        ),
        ({"negatives": {"in_batch": False, "uniform": 0}}, {}, "has no source: set in_batch=True"),
        (
            {},
            {"accumulate": 4},
            "accumulate=4 with loss='softmax': .* not the larger batch .* raise .*batch_size=64",
        ),
        (
            {"negatives": {"frequency": "gaps"}},
            {},
            "frequency='gaps' is not known; did you mean 'gap'",
        ),
        (
            {"heads": {"like": {"label": "liked", "combine": "add"}}},
            {},
            "config.objective.heads.like.combine=.add. is not known",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_data_is_read(
    objective, training, message
):
    with pytest.raises(ConfigError, match=message):
        resolve_kinds(small_config(objective=objective, training=training))


@pytest.mark.parametrize(
    "values,message",
    [
        ({"training": {"steps_per_dispatch": 7}}, "steps_per_dispatch=7 must be a divisor of 200"),
        (
            {"training": {"batch_size": 10, "accumulate": 3}},
            "accumulate=3 must be a divisor of the batch size 10",
        ),
        (
            {"objective": {"negatives": {"queue": 1000}}},
            "queue=1000 must be a multiple of config.training.batch_size=1024",
        ),
        (
            {"objective": {"negatives": {"catalogue": True, "uniform": 5}}},
            "uniform=5 must be 0 with .*catalogue=True",
        ),
        (
            {"objective": {"negatives": {"mined_ranks": (5, 5)}}},
            "mined_ranks=.5, 5. must be two ranks, the first below the second",
        ),
        ({"objective": {"negatives": {"alpha": -1.0}}}, "alpha=-1.0 must be at least 0"),
        ({"objective": {"weight": 0.0}}, "weight=0.0 must be above 0 where there are no heads"),
        ({"objective": {"pos_weight": 0.0}}, "pos_weight=0.0 must be above 0"),
        (
            {"model": {"user": {"layers": (8, 0)}}},
            "config.model.user.layers=.8, 0. must be widths of at least 1",
        ),
        (
            {"training": {"optimizer": {"weight_decay": -1.0}}},
            "weight_decay=-1.0 must be at least 0",
        ),
        ({"objective": {"calibration": 1.5}}, "calibration=1.5 must be between 0.0 and 1.0"),
        (
            {"model": {"dtype": "float16"}},
            "config.model.dtype='float16' is not known; did you mean 'bfloat16'",
        ),
    ],
)
def test_values_out_of_range_are_refused_at_the_door(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


@pytest.mark.parametrize("section", ["accumulate", "catalogue"])
def test_batch_statistics_need_a_batch_that_is_computed_at_once(section):
    objective = LABELLED if section == "accumulate" else {"negatives": {"catalogue": True}}
    training = {"accumulate": 2} if section == "accumulate" else {}
    tower = {"layers": (16, 16), "batch_norm": True}
    config = small_config(
        objective=objective, training=training, model={"user": tower, "item": tower}
    )
    with pytest.raises(ConfigError, match="batch_norm=True needs a batch that is computed at once"):
        resolve_kinds(config)


@pytest.mark.parametrize(
    "negatives,message",
    [
        ({"uniform": 10_000}, "uniform=10000 is more than the .* items of the corpus"),
        ({"popularity": 10_000}, "popularity=10000 is more than the .* items of the corpus"),
        (
            {"mined": 2, "mined_refresh": 4, "mined_ranks": (10, 10_000)},
            "mined_ranks.* reaches beyond the .* items of the corpus",
        ),
    ],
)
def test_more_items_than_exist_are_refused(make, negatives, message):
    with pytest.raises(ConfigError, match=message):
        make(small_config(objective={"negatives": negatives}))


def run_step(trainer, batch):
    """The state and the metrics after one step; compiled anew, without optimisation."""
    step = jax.jit(lambda s, b: step_module.train_step(s, b, {}, trainer=trainer), **FAST)
    return step(tiny.start(trainer), batch)


def test_parts_of_a_batch_add_up_to_the_whole():
    """Of a loss of single rows: the same loss, gradients and updates, heads and all."""
    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, 2, tiny.B).astype(np.float32) for name in ("liked", "shared")}
    labels["liked"][3] = np.nan
    labels["shared"][::2] = np.nan
    heads = {"share": {"label": "shared", "combine": "concatenate", "layers": (4,)}}
    results = []
    for parts in (1, 4):
        trainer = tiny.build(
            layers=(tiny.D,),
            dropout=0.3,
            objective=LABELLED | {"heads": heads},
            training={"accumulate": parts},
        )
        results.append(run_step(trainer, tiny.batch() | {"labels": labels}))
    whole, parts = results
    assert_close(parts, whole)
    assert {"retrieval/loss", "share/loss"} <= set(whole[1])


def assert_close(results, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results, expected
    )


@pytest.fixture(scope="module")
def at_once():
    """One step of towers with dropout, in float32, with the whole batch embedded at once."""
    return run_step(tiny.build(**TOWERS), BATCH)


def test_bfloat16_is_near_float32_and_keeps_its_parameters_and_vectors(at_once):
    trainer = tiny.build(**TOWERS, model={"dtype": "bfloat16"})
    new, metrics = run_step(trainer, BATCH)
    assert {x.dtype for x in jax.tree.leaves((new.params, new.tables))} == {np.dtype("float32")}
    embed = functools.partial(trainer.model.embed, "user")
    assert jax.eval_shape(embed, new.weights, BATCH["user_features"]).dtype == np.float32
    loss = float(at_once[1]["loss"])
    assert float(metrics["loss"]) != loss
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=0.01)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"objective": {"loss": "bsl"}}, "'bsl' falls without bound .*learn_temperature=False"),
        (
            {"objective": {"loss": "hinge"}},
            "margin=0.0 with loss='hinge' is met by vectors that are all alike",
        ),
        ({"objective": {"calibration": 0.5}}, "calibration=0.5 is not read by loss='softmax'"),
        (
            {"objective": LABELLED | {"symmetric": True}},
            "symmetric=True is not read by loss='binary_cross_entropy'",
        ),
    ],
)
def test_options_that_a_loss_does_not_read_or_cannot_do_with_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve_kinds(from_dict(values))


@pytest.mark.parametrize(
    "negatives,message",
    [
        ({"mined": 4}, "mined_refresh=1000 must be below config.training.steps=1000"),
        (
            {"mined": 4, "mined_refresh": 100, "in_batch": False, "uniform": 0},
            "mined=4 must be beside other sources",
        ),
        (
            {"queue": 1024, "queue_warmup": 5000},
            "queue_warmup=5000 must be below config.training.steps=1000",
        ),
    ],
)
def test_sources_that_would_never_yield_anything_are_refused(negatives, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"objective": {"negatives": negatives}})


def test_many_rows_are_embedded_in_blocks_to_the_same_numbers(at_once, monkeypatch):
    # 16 rows: three blocks, of which the last is not full.
    monkeypatch.setattr(step_module, "EMBED_BLOCK", 6)
    assert_close(run_step(tiny.build(**TOWERS), BATCH), at_once)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"training": {"batch_size": 20_000}},
            "user.batch_norm=True needs .* at most 16,384 rows a device; there are 20,000",
        ),
        (
            {"objective": {"label": "liked", "negatives": {"explicit": 2}}},
            "item.batch_norm=True with mined or explicit",
        ),
    ],
)
def test_a_batch_whose_statistics_would_be_of_blocks_or_of_nothing_is_refused(values, message):
    tower = {"layers": (16, 16), "batch_norm": True}
    config = from_dict({"model": {"user": tower, "item": tower}} | values)
    negatives = dataclasses.replace(config.objective.negatives, uniform=0)
    with pytest.raises(ConfigError, match=message):
        check_batch_norm(config, negatives, 1, max_rows=step_module.EMBED_BLOCK)
