"""Traps of the sampling-bias correction: its sign, its place, what it is of, and what it leaves
out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance import tiny
from twotower.config import ObjectiveConfig, from_dict
from twotower.core.mesh import SINGLE_DEVICE
from twotower.kernels.loss_inputs import Candidates, LossInputs, LossOptions, Positives
from twotower.kernels.streaming_softmax import streaming_softmax
from twotower.objectives.alias import alias_table, popularity_table
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.losses import LOSSES, bind_constants
from twotower.objectives.negatives import (
    mixed_log_expected_count,
    uniform,
    uniform_log_expected_count,
)
from twotower.training import candidates as sources_module
from twotower.training.candidates import CorpusSize, NegativeSampling

pytestmark = pytest.mark.slow

D = 5
T = 0.4


@functools.partial(jax.jit, static_argnames=("loss", "temperature"))
def _loss(query, items, ids, log_count, *, positive_count=0.0, loss="softmax", temperature=T):
    """Of one query whose answer is the first of the items."""
    ids = ids.astype(jnp.int32)
    inputs = LossInputs(
        query[None],
        jnp.zeros(1, jnp.int32),
        jnp.ones(1),
        Positives(items[:1], ids[:1], jnp.full(1, positive_count)),
        Candidates(items, ids, jnp.full(len(ids), -1, jnp.int32), log_count),
        scale=1 / temperature,
    )
    return streaming_softmax(
        inputs, LossOptions(bind_constants(LOSSES[loss], ObjectiveConfig(), 9))
    )


def _full_softmax_gradients(query, items):
    """Of -log p(item 0) by the query and by all items, in NumPy."""
    logits = items @ query / T
    p = np.exp(logits - np.logaddexp.reduce(logits))
    return (p @ items - items[0]) / T, (p - np.eye(len(items))[0])[:, None] * query[None, :] / T


def _popular_draws():
    """A query, items, ids in which item i stands n_i times (0, the answer, once), and n."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(7, D))
    times = np.array([1, 40, 1, 12, 3, 25, 2])
    return items[0] / 2 + items[1] / 3, items, np.repeat(np.arange(7), times), times


def _sampled_gradients(query, items, ids, log_count, **options):
    """Of the loss on the draws `ids`, by the query and by all items."""

    def of(query, items):
        return _loss(query, items[ids], ids, log_count, **options)

    return jax.jit(jax.grad(of, (0, 1)))(jnp.asarray(query), jnp.asarray(items))


@pytest.mark.trap(1)
def test_draws_by_popularity_give_the_gradient_of_all_items():
    """log Q added favours popular items twice: item i drawn n_i times and stated as n_i gives the
    full softmax's gradient."""
    with jax.enable_x64(True):
        query, items, ids, times = _popular_draws()
        found = _sampled_gradients(query, items, ids, np.log(times[ids]))
        for ours, expected in zip(found, _full_softmax_gradients(query, items)):
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.trap(1)
@pytest.mark.trap(7)
def test_a_step_subtracts_what_its_batch_is_expected_to_hold():
    """The sign in the whole step, and that the correction is not forgotten: against a loop over
    pairs, on by default."""
    trainer = tiny.plain()
    counts = tiny.counts()
    state = tiny.start(trainer)
    _, metrics, heard = tiny.step(trainer)(state, tiny.batch())
    expected = tiny.loss_by_hand(
        state, heard, lambda i: np.log(tiny.B * max(counts["item"][i], 1) / counts["rows"])
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.trap(2)
def test_the_correction_comes_after_the_temperature():
    """(s - log E)/T puts E of 1e-2 and 1e-6 at T = 0.05 184 nats apart: with equal scores they are
    log(1e4) = 9.2 apart."""
    with jax.enable_x64(True):
        of = functools.partial(_loss, np.zeros(D), np.ones((2, D)), np.arange(2), temperature=0.05)
        losses = [of(np.log([1.0, count])) for count in (1e-2, 1e-6)]
        np.testing.assert_allclose(np.diff(np.log(np.expm1(losses))), np.log(1e4), rtol=1e-5)
        np.testing.assert_allclose(
            of(np.zeros(2), positive_count=2.0), np.log1p(np.exp(2.0)), rtol=1e-5
        )


@pytest.mark.trap(3)
def test_no_expected_count_is_floored():
    """A floor of 1e-6 leaves most of a catalogue of millions uncorrected: logs of counts go as far
    down as they must."""
    many = jnp.float32(3e9)
    exact = FREQUENCIES["exact"].init(jnp.array([1.0, 1e6]), many)
    sketch = FREQUENCIES["sketch"].init(jnp.ones(9), many)
    sketch = FREQUENCIES["sketch"].update(sketch, jnp.arange(2, dtype=jnp.int32), 0) | {
        "rows": jnp.uint32(2**31)
    }
    ids = jnp.arange(2, dtype=jnp.int32)
    np.testing.assert_allclose(
        FREQUENCIES["exact"].log_expected_count(exact, ids, 64),
        np.log([64 / 3e9, 64e6 / 3e9]),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        FREQUENCIES["sketch"].log_expected_count(sketch, ids, 64), np.log(64 / 2**31), rtol=1e-5
    )
    np.testing.assert_allclose(uniform_log_expected_count(ids, 2, 10**8), np.log(2e-8), rtol=1e-5)
    rare = popularity_table(np.r_[1e9, 1.0, 10.0], 1.0)
    np.testing.assert_allclose(
        rare.log_expected_count(jnp.arange(3), 1), np.log([1.0, 1e-9, 1e-8]), atol=1e-2
    )
    gap = FREQUENCIES["gap"].init(jnp.ones(4), many)
    for step in (0, 10**8):  # seen once in a hundred million steps of one row
        gap = FREQUENCIES["gap"].update(gap, jnp.full(1, min(step, 1), jnp.int32), jnp.int32(step))
    assert FREQUENCIES["gap"].log_expected_count(gap, jnp.zeros(1, jnp.int32), 1)[0] < np.log(3e-8)


@pytest.mark.trap(4)
@pytest.mark.parametrize("name", FREQUENCIES)
def test_an_item_never_counted_has_a_pseudo_count(name):
    """log 0 gives infinite logits: an id without rows counts as one with a single row, not more,
    and is finite."""
    estimator = FREQUENCIES[name]
    rows = 20.0
    arrays = estimator.init(jnp.array([15.0, 4.0, 1.0, 0.0]), jnp.float32(rows))
    if estimator.learns:
        for step in range(10):
            seen = jnp.array([0, 1 if step % 2 else 0], jnp.int32)
            arrays = estimator.update(
                arrays, jnp.where((step == 9) & (seen == 1), 2, seen), jnp.int32(step)
            )
    found = np.asarray(estimator.log_expected_count(arrays, jnp.arange(4, dtype=jnp.int32), 8))
    assert np.isfinite(found).all() and found[3] <= found[2] < found[0]
    np.testing.assert_allclose(found[3], np.log(8 / rows), rtol=1e-5)


@pytest.mark.trap(4)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "bpr"])
def test_padding_is_masked_before_the_correction(loss):
    """Padding with a count of 0 has an infinite logit: masked, it equals not being there, in value
    and gradient."""
    query, items, _, times = _popular_draws()
    query, items, counts = (np.asarray(x, np.float32) for x in (query, items, np.log(times)))
    of = jax.jit(jax.value_and_grad(functools.partial(_loss, loss=loss), (0, 1)))
    value, short = of(query, items, np.arange(7), counts)
    endless = np.array([-np.inf, np.inf], np.float32)
    padded, long = of(
        query, np.r_[items, items[:2]], np.r_[np.arange(7), -1, -1], np.r_[counts, endless]
    )
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    np.testing.assert_allclose(long[0], short[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(long[1][:7], short[1], rtol=1e-5, atol=1e-6)
    assert not long[1][7:].any()


@pytest.mark.trap(4)
def test_an_item_that_no_source_yields_is_finite():
    """Drawn by popularity alone, an item without rows is never a candidate, but can be an answer:
    its logit stays finite."""
    table = popularity_table(np.array([3.0, 0.0, 1.0]), 1.0)
    found = mixed_log_expected_count(jnp.arange(3), [lambda ids: table.log_expected_count(ids, 4)])
    np.testing.assert_allclose(found, np.log([3.0, 1.0, 1.0]), atol=1e-6)


@pytest.mark.trap(5)
def test_sources_add_up_to_the_counts_that_are_seen():
    """Each source with its own Q is wrong where they mix: what is stated of an id equals how often
    a step holds it."""
    negatives = {"uniform": 8, "popularity": 8, "alpha": 0.5}
    trainer = tiny.build(objective={"negatives": negatives})
    steps = 3000
    counts = tiny.counts()["item"]
    table = popularity_table(tiny.counts()["item"], 0.5)
    rows = {"user": jnp.zeros(tiny.B, jnp.int32)}
    given = {"popularity": table}
    draws = jax.vmap(
        lambda key: (
            sources_module.sample_items(trainer.sampling, rows, given, key, SINGLE_DEVICE).shared
        )
    )
    drawn = np.asarray(jax.jit(draws)(jax.random.split(jax.random.key(0), steps)))
    batches = np.random.default_rng(0).choice(tiny.N, (steps, tiny.B), p=counts / counts.sum())
    seen = np.bincount(np.r_[drawn.ravel(), batches.ravel()], minlength=tiny.N) / steps
    frequency = FREQUENCIES["exact"].init(counts, counts.sum())
    stated = sources_module.log_expected_count(
        trainer.sampling, frequency, table, 0, jnp.arange(tiny.N)
    )
    # Without a row an item is stated with the pseudo-count that it is never drawn by.
    stated = np.exp(stated) - (counts == 0) * tiny.B / counts.sum()
    np.testing.assert_allclose(stated, seen, atol=5 * np.sqrt(seen.max() / steps))
    np.testing.assert_allclose(stated.sum(), 32, rtol=1e-5)


@pytest.mark.trap(5)
def test_a_step_states_one_count_of_an_item_wherever_it_comes_from():
    """The sum in the whole step: as answer, candidate of any source or hard negative; against a
    loop over pairs."""
    trainer = tiny.mixed()
    counts = tiny.counts()
    state = tiny.start(trainer)
    given = tiny.catalogue(trainer)
    _, metrics, heard = tiny.step(trainer)(state, tiny.batch())
    p = counts["item"] ** 0.75 / (counts["item"] ** 0.75).sum()
    shared = np.log(tiny.B * np.maximum(counts["item"], 1) / counts["rows"] + 8 / tiny.N + 8 * p)
    own = heard["own"]
    np.testing.assert_allclose(own["log_count"], shared[own["ids"]], rtol=1e-4)
    known = heard["shared"]["ids"]
    np.testing.assert_allclose(heard["shared"]["log_expected_count"], shared[known], rtol=1e-4)
    pools = given["explicit"]["items"][own["query_ids"]]
    assert (own["hard"][:, :, None] == pools[:, None, :]).any(-1).all()
    np.testing.assert_allclose(
        own["hard_log_count"], np.logaddexp(shared[own["hard"]], np.log(3 / 5)), rtol=1e-4
    )
    np.testing.assert_allclose(metrics["loss"], tiny.loss_by_hand(state, heard), rtol=1e-5)


@pytest.mark.trap(6)
def test_the_positive_that_is_always_there_need_not_be_treated_as_drawn():
    """A positive corrected like a draw is biased: the corrected loss gives the full softmax's
    gradient whatever its count."""
    with jax.enable_x64(True):
        query, items, ids, times = _popular_draws()
        expected = _full_softmax_gradients(query, items)
        for count in (0.0, 3.0):
            found = _sampled_gradients(
                query,
                items,
                ids,
                np.log(times[ids]),
                loss="corrected_softmax",
                positive_count=count,
            )
            for ours, full in zip(found, expected):
                np.testing.assert_allclose(ours, full, rtol=1e-9, atol=1e-12)
        classic = _sampled_gradients(query, items, ids, np.log(times[ids]), positive_count=3.0)
        assert np.abs(classic[0] - expected[0]).max() > 0.05


@pytest.mark.trap(13)
@pytest.mark.trap(31)
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_a_sampler_draws_as_often_as_it_states(order):
    """Duplicates dropped but counted, or ids taken to be sorted by frequency: Q is wrong without an
    error.

    Draws are counted, of an item with half of the mass too, and compared with what is stated and
    with the counts themselves.
    """
    counts = np.r_[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    counts = {
        "rising": counts,
        "falling": counts[::-1],
        "mixed": np.random.default_rng(0).permutation(counts),
    }[order]
    table = popularity_table(counts, 1.0)
    steps = 4000
    num = 6
    drawn = np.asarray(
        jax.vmap(lambda key: table.draw(key, num))(jax.random.split(jax.random.key(1), steps))
    )
    seen = np.bincount(drawn.ravel(), minlength=9) / steps
    np.testing.assert_allclose(seen, num * counts / counts.sum(), atol=5 * np.sqrt(num / steps))
    np.testing.assert_allclose(
        np.exp(table.log_expected_count(jnp.arange(9), num)), num * counts / counts.sum(), rtol=1e-4
    )
    assert seen.max() > 2.5  # more than once a step: what is stated is a count and no probability


@pytest.mark.trap(13)
def test_uniform_draws_are_as_often_as_stated():
    """The same of uniform draws from few items, where duplicates are the rule."""
    drawn = np.asarray(
        jax.vmap(lambda key: uniform(key, 12, 4))(jax.random.split(jax.random.key(2), 2000))
    )
    seen = np.bincount(drawn.ravel(), minlength=4) / 2000
    np.testing.assert_allclose(
        np.exp(uniform_log_expected_count(jnp.arange(4), 12, 4)), seen, rtol=0.06
    )


@pytest.mark.trap(31)
def test_an_alias_table_is_what_it_was_given():
    """Q of a sampler that thinks of another order: the stated probabilities are the weights', id by
    id."""
    weights = np.random.default_rng(0).pareto(1.0, 500)
    np.testing.assert_allclose(
        np.exp(alias_table(weights).log_probability), weights / weights.sum(), rtol=1e-4
    )


@pytest.mark.trap(19)
def test_items_never_clicked_are_negatives_by_default():
    """Only clicked items as negatives leave the others in their random direction: a share of
    uniform draws is the default."""
    default = from_dict({"training": {"batch_size": 50}})
    loss = LOSSES["softmax"]
    assert NegativeSampling.build(default, loss, CorpusSize(9, 1000, 3)).config.uniform == 13
    assert NegativeSampling.build(default, loss, CorpusSize(9, 1000, 0)).config.uniform == 0


@pytest.mark.trap(19)
def test_items_never_clicked_are_trained():
    """In the whole step: rows of items without a training row move."""
    trainer = tiny.mixed()
    state = tiny.start(trainer)
    never = np.flatnonzero(tiny.counts()["item"] == 0) + tiny.OOV + 1
    after, *_ = tiny.step(trainer)(state, tiny.batch())
    moved = (np.asarray(after.tables["item"]) != np.asarray(state.tables["item"])).any(1)
    assert moved[never].mean() > 0.3
