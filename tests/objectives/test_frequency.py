"""Estimates of how often an id is drawn: right on skewed streams, under duplicates, for ids never
seen, and bounded in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.objectives.frequency import FREQUENCIES, _slots, init_intervals, init_sketch

pytestmark = pytest.mark.slow

N, B = 300, 128
EXACT, GAP, SKETCH = FREQUENCIES["exact"], FREQUENCIES["gap"], FREQUENCIES["sketch"]


@pytest.fixture(scope="module")
def zipf():
    """(probabilities of N ids, the popular ones anywhere; 800 batches of B, in which popular ids
    stand many times)."""
    rng = np.random.default_rng(0)
    share = rng.permutation(1 / np.arange(1, N + 1))
    share /= share.sum()
    return share, rng.choice(N, (800, B), p=share).astype(np.int32)


def run(estimator, arrays, batches, first=0):
    update = jax.jit(estimator.update)
    for step, ids in enumerate(batches, first):
        arrays = update(arrays, jnp.asarray(ids, jnp.int32), jnp.int32(step))
    return arrays


def fresh(estimator, size=N, **options):
    init = functools.partial({GAP: init_intervals, SKETCH: init_sketch}[estimator], **options)
    return init(np.zeros(size, np.float32), np.float32(0))


def expected(estimator, arrays, ids, draws):
    return np.exp(
        np.asarray(
            jax.jit(estimator.log_expected_count)(arrays, jnp.asarray(ids, jnp.int32), draws),
            np.float64,
        )
    )


def test_counted_exactly_in_logs_without_a_floor():
    """1e8 rows of one id and one row of another among 1e9: 18.4 nats apart, in float32 too."""
    counts, rows = np.array([1e8, 1.0, 0.0]), 1e9
    arrays = EXACT.init(counts, rows)
    got = EXACT.log_expected_count(arrays, jnp.arange(3), 4096)
    np.testing.assert_allclose(got, np.log(4096 / rows) + np.log([1e8, 1, 1]), atol=1e-5)
    assert EXACT.update(arrays, jnp.arange(3), 0) is arrays and not EXACT.learns


@pytest.mark.parametrize("name", ["gap", "sketch"])
def test_the_estimate_converges_to_the_true_expected_count(name, zipf):
    share, batches = zipf
    estimator = FREQUENCIES[name]
    arrays = run(estimator, fresh(estimator), batches)
    ratio = expected(estimator, arrays, np.arange(N), B) / (B * share)
    # Of an id drawn n times the share is known to 1 / sqrt(n); moving averages forget, so for gaps
    # n is at most 200.
    known = np.minimum(share * batches.size, 200 if name == "gap" else np.inf)
    assert np.abs((ratio - 1) * np.sqrt(known)).max() < 5
    assert abs(np.average(ratio, weights=known) - 1) < 0.02
    # The most popular id stands in a batch 20 times; a probability of being in it at all could not
    # say so.
    assert expected(estimator, arrays, [share.argmax()], B)[0] == pytest.approx(
        B * share.max(), rel=0.1
    )


@pytest.mark.parametrize("name", ["gap", "sketch"])
def test_draws_other_than_the_batch_scale_the_count(name, zipf):
    estimator = FREQUENCIES[name]
    arrays = run(estimator, fresh(estimator), zipf[1][:20])
    ids = np.arange(N).reshape(3, -1)
    once, thrice = expected(estimator, arrays, ids, B), expected(estimator, arrays, ids, 3 * B)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5)
    assert once.shape == ids.shape
    assert (expected(estimator, arrays, ids, jnp.float32(0)) == 0).all()


@pytest.mark.parametrize("name", ["gap", "sketch"])
def test_ids_never_seen_are_defined(name):
    """As likely as all before anything is known; afterwards as if seen once, and never likelier
    than an id that was."""
    estimator = FREQUENCIES[name]
    arrays = fresh(estimator)
    np.testing.assert_allclose(expected(estimator, arrays, np.arange(N), B), B / N, rtol=1e-5)
    arrays = run(estimator, arrays, np.tile(np.arange(B), (10, 1)))
    seen, unseen, nothing = expected(estimator, arrays, [0, N - 1, -1], B)
    assert seen == pytest.approx(1, rel=1e-4)
    assert unseen == pytest.approx(0.1, rel=1e-4) and nothing == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", ["gap", "sketch"])
def test_rows_without_an_id_are_drawn_and_counted_for_nobody(name):
    estimator = FREQUENCIES[name]
    batch = np.r_[np.zeros(4), np.full(4, -1)]
    arrays = run(estimator, fresh(estimator, 8), np.tile(batch, (10, 1)))
    assert expected(estimator, arrays, [0], 8)[0] == pytest.approx(4)
    np.testing.assert_allclose(expected(estimator, arrays, [7, -1], 8), 0.1, rtol=1e-5)


def test_without_duplicates_the_gap_estimate_is_that_of_the_paper():
    """Algorithm 2 of Yi et al. (2019) as it is printed, once its initial value is forgotten."""
    rate, rng = 0.3, np.random.default_rng(1)
    last, gap = np.zeros(8), np.full(8, 100.0)
    batches = np.stack([rng.choice(8, 3, replace=False) for _ in range(300)])
    for step, ids in enumerate(batches, 1):
        gap[ids] = (1 - rate) * gap[ids] + rate * (step - last[ids])
        last[ids] = step
    arrays = run(GAP, fresh(GAP, 8, rate=rate), batches)
    np.testing.assert_allclose(
        expected(GAP, arrays, ids, 3), 1 / gap[ids], rtol=1e-5
    )  # of those whose gap is not open


def test_an_id_that_stands_in_a_batch_many_times_is_expected_that_often():
    """Id 0 five times in every batch, id 1 four times in every third: the average gap alone would
    say 1 and 1 / 3."""
    often, rarely = [0, 0, 2, 0, 0, 0, 3, 4, 5], [0, 1, 0, 1, 0, 1, 0, 1, 0]
    arrays = run(GAP, fresh(GAP, 9), [rarely, often, often] * 20 + [rarely])
    assert expected(GAP, arrays, [0], 9)[0] == pytest.approx(5, rel=1e-5)
    assert expected(GAP, arrays, [1], 9)[0] == pytest.approx(4 / 3, rel=0.05)


def test_an_id_that_stopped_coming_fades():
    arrays = run(GAP, fresh(GAP, 4), [[0, 1]] * 10 + [[1, 2]] * 90)
    gone, stayed = expected(GAP, arrays, [0, 1], 2)
    assert gone == pytest.approx(0.1, rel=0.1) and stayed == pytest.approx(1, rel=1e-5)


def test_the_sketch_counts_duplicates_and_is_exact_where_nothing_collides(zipf):
    batches = zipf[1][:50]
    arrays = run(SKETCH, fresh(SKETCH), batches)
    counts = np.bincount(batches.ravel(), minlength=N)
    np.testing.assert_allclose(
        expected(SKETCH, arrays, np.arange(N), batches.size)[counts > 0],
        counts[counts > 0],
        rtol=1e-5,
    )


def test_a_crowded_sketch_never_underestimates_and_rises_no_further_than_it_must():
    """Ids of an open vocabulary, up to 2^31, in a sketch far smaller than they are many."""
    rng = np.random.default_rng(2)
    names = rng.integers(0, 2**31, 2000)
    stream = names[np.minimum(rng.zipf(1.3, (60, B)) - 1, len(names) - 1)]
    arrays = run(SKETCH, fresh(SKETCH, width=256), stream)
    ids, counts = np.unique(stream, return_counts=True)
    got = expected(SKETCH, arrays, ids, stream.size)
    assert (got > counts * (1 - 1e-5)).all()
    slots = np.asarray(_slots(arrays, jnp.asarray(stream.ravel(), jnp.int32)))
    plain = np.stack([np.bincount(row, minlength=256) for row in slots])
    least = plain[
        np.arange(len(slots))[:, None], np.asarray(_slots(arrays, jnp.asarray(ids, jnp.int32)))
    ].min(0)
    assert (got < least * (1 + 1e-5)).all() and (got - counts).sum() < 0.6 * (least - counts).sum()


def test_counters_are_integers_beyond_what_float32_counts():
    arrays = fresh(SKETCH, 4)
    arrays |= {"counts": arrays["counts"] + jnp.uint32(2**24), "rows": jnp.uint32(2**24)}
    arrays = run(SKETCH, arrays, [[0]] * 3)
    assert int(arrays["counts"].max()) == 2**24 + 3 and int(arrays["rows"]) == 2**24 + 3


def test_a_full_sketch_is_halved_and_says_the_same():
    stream = [[0, 0, 0, 1]] * 16
    arrays = run(SKETCH, fresh(SKETCH, 4, halve_at=64), stream)
    assert int(arrays["rows"]) == 32
    np.testing.assert_allclose(expected(SKETCH, arrays, [0, 1], 4), [3, 1], rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 7, 1024, 2**16])
def test_few_ids_share_a_place(stride):
    """Over the hash functions no more than 2 / width of the pairs do, whatever the distance between
    ids."""
    arrays, ids = fresh(SKETCH, width=2048, depth=16), np.arange(1000) * stride
    slots = np.asarray(_slots(arrays, jnp.asarray(ids, jnp.int32)))
    shared = np.stack([np.bincount(row, minlength=2048) for row in slots])
    assert shared.shape == (16, 2048) and (shared * (shared - 1)).sum(1).mean() <= 2 / 2048 * len(
        ids
    ) * (len(ids) - 1)


@pytest.mark.parametrize("name", ["gap", "sketch"])
def test_an_update_touches_the_rows_of_the_batch_alone(name):
    """No copy of arrays that are as long as there are items: temporary memory is that of a
    batch."""
    estimator, items = FREQUENCIES[name], 2**20
    arrays = jax.eval_shape(
        estimator.init,
        jax.ShapeDtypeStruct((items,), "float32"),
        jax.ShapeDtypeStruct((), "float32"),
    )
    ids, step = jax.ShapeDtypeStruct((B,), "int32"), jax.ShapeDtypeStruct((), "int32")
    compiled = jax.jit(estimator.update, donate_argnums=0).lower(arrays, ids, step).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < items


def test_gaps_count_from_the_step_that_the_estimates_begin_at():
    """As after growing, when training is far from its first step and nothing has been seen yet."""
    estimator, batches = (
        FREQUENCIES["gap"],
        np.random.default_rng(0).integers(0, 20, (30, 8)).astype(np.int32),
    )
    early = late = estimator.init(jnp.ones(20), jnp.float32(20))
    late = late | {"start": jnp.int32(4000)}
    for step, ids in enumerate(batches):
        early = estimator.update(early, jnp.asarray(ids), jnp.int32(step))
        late = estimator.update(late, jnp.asarray(ids), jnp.int32(4000 + step))
    ids = jnp.arange(20)
    np.testing.assert_array_equal(
        estimator.log_expected_count(early, ids, 8), estimator.log_expected_count(late, ids, 8)
    )
