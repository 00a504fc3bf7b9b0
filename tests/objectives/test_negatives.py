"""Each source of negatives against what it says of itself: drawn many times, counted, compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.draws import IDS, TRIALS, N, agree, count, disagree
from twotower.config import NegativesConfig
from twotower.core.errors import ConfigError
from twotower.objectives import negatives
from twotower.objectives.alias import alias_table, popularity_table
from twotower.objectives.frequency import FREQUENCIES
from twotower.pipeline.batches import Batches, InteractionExamples, InteractionRows
from twotower.training.checks import check_negatives

pytestmark = pytest.mark.slow

B = 32
EXACT = FREQUENCIES["exact"]


def make_rows(counts):
    """Training rows in which item i stands counts[i] times."""
    item = (
        np.random.default_rng(0)
        .permutation(np.repeat(np.arange(len(counts)), counts))
        .astype(np.int32)
    )
    return InteractionRows(
        np.arange(len(item), dtype=np.int32), item, np.ones(len(item), np.float32), None, {}
    )


def make_batches(rows):
    examples = InteractionExamples(rows, {"user": {}, "item": {}})
    return Batches(examples, batch_size=B, seed=0, resident_megabytes=1)


@pytest.fixture(scope="module")
def counts():
    """Training rows of N items, in no order of popularity; items 3 and 5 have none."""
    counts = np.random.default_rng(1).permutation(np.r_[0, 200, 100, np.arange(1, N - 2)])
    counts[[3, *np.flatnonzero(counts == 0)]] = counts[[*np.flatnonzero(counts == 0), 3]]
    counts[5] = 0
    return counts


def in_batch_source(counts, draws=B):
    arrays = EXACT.init(counts, counts.sum())
    return lambda ids: EXACT.log_expected_count(arrays, ids, draws)


def test_uniform():
    observed = count(lambda key: negatives.uniform(key, 24, N))
    agree(negatives.uniform_log_expected_count(IDS, 24, N), observed)
    disagree(negatives.uniform_log_expected_count(IDS, 23, N), observed)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_popularity_of_items_in_any_order(counts, alpha):
    table = popularity_table(counts, alpha)
    weights = np.where(counts > 0, counts.astype(float) ** alpha, 0)
    stated = table.log_expected_count(IDS, 24)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(stated, np.log(24 * weights / weights.sum()), atol=1e-5)
    observed = count(lambda key: negatives.popularity(key, 24, table))
    agree(stated, observed)
    by_rank = np.empty(N)  # what a sampler would state that takes ids for ranks
    by_rank[:] = np.asarray(stated)[np.argsort(-counts)]
    disagree(by_rank, observed)
    assert observed[3] == observed[5] == 0


@pytest.mark.parametrize(
    "weights",
    [
        [2.0],
        [1, 1, 1],
        [0, 0, 3, 1],
        [1e9, 1, 1, 1],
        np.random.default_rng(0).pareto(0.7, 999),
        1 / np.arange(1, 5000) ** 1.5,
    ],
    ids=["one", "equal", "zeros", "far apart", "heavy tail", "sorted"],
)
def test_alias_tables_hold_the_weights_they_were_built_of(weights):
    weights = np.asarray(weights, float)
    table = alias_table(weights)
    share = weights / weights.sum()
    cells = np.asarray(table.threshold, np.float64) / 2**32
    from_cells = (cells + np.bincount(table.alias, 1 - cells, len(weights))) / len(weights)
    np.testing.assert_allclose(np.exp(table.log_probability), from_cells, rtol=1e-5)
    np.testing.assert_allclose(from_cells, share, rtol=1e-5 if len(weights) != 4 else 2, atol=1e-9)
    assert from_cells.sum() == pytest.approx(1)


def test_the_coin_of_a_rare_id_is_finer_than_a_float32():
    """A float32 coin has steps of 2^-23: an id whose share of a cell is 2^-28 would come 32 times
    too often."""
    weights = np.r_[2.0**-28, 2.0**-60, np.ones(62)]
    table = alias_table(weights)
    assert (
        int(table.threshold[0]) == 17 and int(table.threshold[1]) == 1
    )  # of 2^32; the cells of ids are a 64th of all
    # What cannot be had as finely is stated as it is drawn, and never 0.
    np.testing.assert_allclose(
        table.log_probability[:2], np.log([17 / 64, 1 / 64]) - 32 * np.log(2), rtol=1e-6
    )


def test_in_batch_is_what_the_batches_hold(counts):
    """Over whole passes through the rows each item stands as often as stated, to the row."""
    rows = make_rows(counts)
    batches, passes = make_batches(rows), 3 * B
    steps = passes * len(rows) // B
    observed = np.bincount(
        np.concatenate([rows.item[batches.indices(step)] for step in range(steps)]), minlength=N
    )
    stated, seen = np.exp(in_batch_source(counts)(IDS)), counts > 0
    np.testing.assert_allclose(observed[seen], stated[seen] * steps, rtol=1e-5)
    np.testing.assert_allclose(
        stated[~seen], B / counts.sum(), rtol=1e-5
    )  # one pseudo-count, and not 0


def test_mixed_sources_add_up(counts):
    """A popular item comes from all three; what one of them alone says is wrong for every
    candidate."""
    rows, table = make_rows(counts), popularity_table(counts, 0.75)
    batches = make_batches(rows)
    in_batch = np.concatenate([rows.item[batches.indices(step)] for step in range(TRIALS)])
    observed = np.bincount(in_batch, minlength=N) + count(
        lambda key: jnp.concatenate(
            [
                negatives.uniform(key, 16, N),
                negatives.popularity(jax.random.fold_in(key, 1), 24, table),
            ]
        )
    )
    sources = (
        in_batch_source(counts),
        functools.partial(negatives.uniform_log_expected_count, num=16, items=N),
        functools.partial(table.log_expected_count, num=24),
    )
    seen = counts > 0
    stated = np.asarray(negatives.mixed_log_expected_count(IDS, sources))
    agree(stated[seen], observed[seen])
    # Items without rows come from one source, but have their pseudo-count in another.
    np.testing.assert_allclose(np.exp(stated[~seen]), 16 / N + B / counts.sum(), rtol=1e-5)
    for source in sources:
        disagree(np.asarray(source(IDS))[seen], observed[seen])


def test_an_id_that_no_source_yields_is_there_once():
    """A positive without rows, among popular items alone; and with no source at all."""
    table = popularity_table(np.array([3, 0]), 1.0)
    sources = [functools.partial(table.log_expected_count, num=4)]
    got = negatives.mixed_log_expected_count(jnp.arange(2), sources)
    np.testing.assert_allclose(got, [np.log(4), 0], rtol=1e-6)
    assert not negatives.mixed_log_expected_count(jnp.zeros((2, 3), jnp.int32), []).any()


def test_duplicates_stay(counts):
    """Expected counts are those of draws with replacement, so nothing may be removed."""
    samples = np.asarray(
        negatives.popularity(jax.random.key(0), 500, popularity_table(counts, 1.0))
    )
    assert samples.shape == (500,) and len(np.unique(samples)) <= N


def push(queue, step, ids=None):
    batch = (
        jnp.arange(4, dtype=jnp.int32) + 4 * step if ids is None else jnp.asarray(ids, jnp.int32)
    )
    return negatives.push(queue, jnp.ones((4, 2)) * step, batch, batch + 1000, jnp.int32(step))


def used(queue, step, **options):
    vectors, (ids, query_ids), count = negatives.queue_candidates(queue, jnp.int32(step), **options)
    ids, query_ids = np.asarray(ids), np.asarray(query_ids)
    assert (query_ids[ids >= 0] == ids[ids >= 0] + 1000).all() and (query_ids[ids < 0] == -1).all()
    np.testing.assert_array_equal(np.asarray(vectors)[ids >= 0, 0], ids[ids >= 0] // 4)
    assert count == (ids >= 0).sum()
    return sorted(set((ids[ids >= 0] // 4).tolist()))


def test_the_queue_holds_the_latest_steps():
    queue = negatives.init_queue(12, 2)
    assert used(queue, 0) == []
    for step in range(5):
        queue = push(queue, step)
        assert used(queue, step + 1) == list(range(max(0, step - 2), step + 1))
    assert queue["step"].tolist() == [3] * 4 + [4] * 4 + [2] * 4


def test_the_queue_is_not_used_before_its_warm_up_nor_beyond_its_age():
    queue = functools.reduce(push, range(3), negatives.init_queue(12, 2))
    assert used(queue, 3, warmup=4) == [] and used(queue, 3, warmup=3) == [0, 1, 2]
    assert used(queue, 3, age=2) == [1, 2] and used(queue, 5, age=2) == []


def test_entries_of_the_future_are_no_candidates():
    """Steps 3 to 5 were made and then undone by a return to the checkpoint of step 4."""
    queue = functools.reduce(push, range(6), negatives.init_queue(24, 2))
    assert used(queue, 4) == [0, 1, 2, 3]


def test_rows_that_are_no_candidates_count_as_drawn():
    queue = push(negatives.init_queue(8, 2), 0, [0, -1, 1, -1])
    _, (ids, _), count = negatives.queue_candidates(queue, jnp.int32(1))
    assert ids.tolist() == [0, -1, 1, -1, -1, -1, -1, -1] and count == 4


def test_the_queue_is_as_often_an_item_as_it_states(counts):
    """Three batches of the past, and the one of the step: four times as many draws."""
    rows = make_rows(counts)
    batches, queue = make_batches(rows), negatives.init_queue(3 * B, 1)
    step_fn, steps = jax.jit(negatives.push), 300
    observed = np.zeros(N)
    for step in range(steps + 3):
        item = jnp.asarray(rows.item[batches.indices(step)])
        _, (ids, _), draws = negatives.queue_candidates(queue, jnp.int32(step), warmup=3)
        if step >= 3:
            both = np.r_[np.asarray(item), np.asarray(ids)]
            observed += np.bincount(both, minlength=N)
            assert draws == 3 * B
        queue = step_fn(queue, jnp.zeros((B, 1)), item, item, jnp.int32(step))
    stated = np.asarray(in_batch_source(counts, 4 * B)(IDS))
    ratio = observed[counts > 0] / (np.exp(stated[counts > 0]) * steps)
    assert (
        np.abs(ratio - 1).max() < 0.1
        and abs(np.average(ratio, weights=counts[counts > 0]) - 1) < 0.005
    )


def test_a_queue_that_takes_no_whole_batches_is_refused():
    with pytest.raises(ValueError, match="10 entries does not take whole batches of 4"):
        push(negatives.init_queue(10, 2), 0)


def test_corrected_popular_negatives_give_the_gradient_of_the_full_softmax(counts):
    """How far logits are pushed down, in expectation: right with log E subtracted, wrong with it
    added or left out."""
    counts, table = np.maximum(counts, 1), popularity_table(np.maximum(counts, 1), 1.0)
    scores, draws = np.random.default_rng(4).normal(size=N), 1000
    stated = np.asarray(table.log_expected_count(IDS, draws), np.float64)
    full = np.exp(scores) / np.exp(scores).sum()
    keys = jax.random.split(jax.random.key(6), 300)
    samples = np.asarray(
        jax.jit(jax.vmap(lambda key: negatives.popularity(key, draws, table)))(keys)
    )
    times = np.stack([np.bincount(row, minlength=N) for row in samples])

    def error(correction):
        weights = times * np.exp(scores - correction)
        weights[:, 0] = np.exp(
            scores[0]
        )  # the positive: its own draws are masked, it is there once
        return np.abs((weights / weights.sum(1, keepdims=True)).mean(0) - full).max()

    assert error(stated) < 0.003
    assert error(-stated) > 0.1 and error(0 * stated) > 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"uniform": 41}, "uniform=41 is more than the 40 items of the corpus: .* catalogue=True"),
        (
            {"popularity": 41},
            "popularity=41 is more than the 40 items of the corpus: .* catalogue=True",
        ),
        ({"queue": 100}, "queue=100 must be a multiple of the batch size 32, such as 96"),
        ({"mined": 2, "mined_ranks": (10, 41)}, "reaches beyond the 40 items"),
        ({"mined": 6, "mined_ranks": (10, 15)}, "mined=6 is more than the 5 items of a pool"),
    ],
)
def test_what_cannot_be_had_is_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"config\.objective\.negatives\..*{message}"):
        check_negatives(NegativesConfig(**fields), items=40, batch_size=32)


def test_as_many_as_there_are_is_not_too_many():
    config = NegativesConfig(
        uniform=40, popularity=40, queue=96, mined=30, mined_ranks=(10, 40), explicit=5
    )
    check_negatives(config, items=40, batch_size=32)


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        ([1, -2, 3], 1.0, "item 1 is -2.0: it must be finite and at least 0"),
        ([1, np.nan], 1.0, "item 1 is nan"),
        ([0, 0], 1.0, "all 2, is 0: nothing can be drawn"),
        ([1, 2], -1.0, r"alpha=-1.0 must be at least 0"),
        ([1, 2], np.nan, r"alpha=nan must be at least 0"),
    ],
)
def test_weights_that_nothing_can_be_drawn_by_are_refused(counts, alpha, message):
    with pytest.raises(ConfigError, match=message):
        popularity_table(np.array(counts, float), alpha)
