"""Estimators of how often an id stands in a batch: counted before training, or as training goes.

Estimates are arrays of the train state, hence of the checkpoint, so a resumed run corrects as
before. A step reads them first and updates them afterwards: its batch must not change its own
correction. Ids are hashed by integer arithmetic on the device, the same in every process and on
every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from twotower.core.arrays import multiply_shift

Arrays = dict[str, Any]

# Rate of the moving averages: about the last 200 appearances of an id decide.
INTERVAL_RATE = 0.01
# Hash functions of a sketch.
SKETCH_DEPTH = 4
# Least and greatest width; at four bytes a counter the greatest sketch takes 16 MiB.
SKETCH_WIDTHS = (2**10, 2**20)
# Number of rows after which all counters are halved: far from overflow.
SKETCH_ROWS = 2**31


class Frequency(NamedTuple):
    """An estimator of the number of times an id stands in a batch.

    Attributes:
        init: (training rows of each of N ids, training rows in all) -> arrays.
        log_expected_count: (arrays, ids, draws) -> log of the expected number of times each id is
            among `draws` drawn rows, of the shape of `ids`; finite for any id, negative ones too.
            `draws` may be traced; 0 gives -inf.
        update: (arrays, ids [B] of all devices, step) -> arrays after that batch; negative ids are
            rows without an id.
        learns: Whether `update` does anything.
    """

    init: Callable[..., Arrays]
    log_expected_count: Callable[[Arrays, Any, Any], Any]
    update: Callable[[Arrays, Any, Any], Arrays]
    learns: bool


def _log(draws: Any) -> Float[Array, ""]:
    # Draws may be a Python number, or the traced number of queue entries in use.
    return jnp.log(jnp.asarray(draws, jnp.float32))


def init_exact(counts: Any, rows: Any) -> Arrays:
    """Makes an estimator from counts, which stay as they are."""
    # The number of rows is kept as well: summing the counts would cost N at every step.
    return {"counts": jnp.asarray(counts, jnp.float32), "rows": jnp.asarray(rows, jnp.float32)}


def exact_log_expected_count(
    arrays: Arrays, ids: Int[Array, "*S"], draws: Any
) -> Float[Array, "*S"]:
    """Returns log(draws * count / rows), in logs so that nothing is floored; an id that training
    never saw has one pseudo-count."""
    counts = jnp.maximum(arrays["counts"][ids], 1.0)
    return jnp.log(counts) - jnp.log(arrays["rows"]) + _log(draws)


def init_intervals(counts: Any, rows: Any, *, rate: float = INTERVAL_RATE) -> Arrays:
    """Makes an estimator that has seen nothing; "start" is the step that counts as the first one.

    Args:
        counts: Counts of N ids, of which only N matters.
        rows: Not used.
        rate: Alpha, the rate of the moving averages.
    """
    shape = (len(counts),)
    # Names of the arrays are those in checkpoints; "gaps" are intervals, in steps.
    return {
        # Step of the last appearance; -1 for none.
        "last": jnp.full(shape, -1, jnp.int32),
        "gaps": jnp.zeros(shape),
        "times": jnp.zeros(shape),
        "step": jnp.int32(-1),
        "batch": jnp.float32(0),
        "items": jnp.float32(len(counts)),
        "rate": jnp.float32(rate),
        "start": jnp.int32(0),
    }


def interval_log_expected_count(
    arrays: Arrays, ids: Int[Array, "*S"], draws: Any
) -> Float[Array, "*S"]:
    r"""Estimates from the average number of steps between two appearances of an id (Yi et al.,
    RecSys 2019, Algorithms 2 and 3).

    .. math:: B \leftarrow (1 - \alpha) B + \alpha (t - A), \quad A \leftarrow t, \quad \hat p = 1 /
    \max_i B_i

    There p is the probability that a batch holds the id at all, and is used as if an id never stood
    in a batch twice. A popular one does, up to B times at intervals of 1, where 1 / B stays at 1.
    So the average number of times an id stands in the batches that hold it is kept beside the
    average interval: by the renewal-reward theorem, times / interval is the expected count in a
    batch, duplicates included, and with no duplicates it is 1 / B. Both averages are kept as
    decayed sums, s <- (1 - alpha) s + x: their quotient equals that of the moving averages and
    needs no initial value to be forgotten.

    The interval since the last appearance, still open, is added: it alone shows that an id stopped
    coming, and with it the first estimates are appearances over steps. An id never seen counts as
    if seen once, just now, and among N ids as no likelier than all of them alike.
    """
    rows = _interval_rows(arrays, ids)
    last = arrays["last"].at[rows].get(mode="fill", fill_value=-1)
    times = arrays["times"].at[rows].get(mode="fill", fill_value=0)
    intervals = arrays["gaps"].at[rows].get(mode="fill", fill_value=0)
    steps = (arrays["step"] + 1).astype(jnp.float32)
    is_seen = last >= 0
    # Masked before the division too: 0 / 0 would be computed for ids never seen.
    rates = times / jnp.where(is_seen, intervals + (arrays["step"] - last), 1)
    unseen = 1 / jnp.maximum(steps * arrays["batch"], arrays["items"])
    # Before the first batch its size is 0, and no id is seen.
    share = jnp.where(is_seen, rates / jnp.maximum(arrays["batch"], 1), unseen)
    return jnp.log(share) + _log(draws)


def update_intervals(arrays: Arrays, ids: Int[Array, "B"], step: Int[Array, ""]) -> Arrays:
    """Returns the arrays after the batch of `step`; duplicates are one appearance of an id."""
    # A run grown from another begins its estimates anew, at a step above 0.
    step = step - arrays["start"]
    rows = _interval_rows(arrays, ids)
    keep = 1 - arrays["rate"]
    old = {name: arrays[name].at[rows].get(mode="clip") for name in ("last", "gaps", "times")}
    # Duplicates all write one value, so their order does not matter. What is written depends on
    # what was read: else XLA could write first, and would read from a copy of the whole array.
    new = {
        "last": jnp.maximum(old["last"], step),
        "gaps": keep * old["gaps"] + (step - old["last"]),
        "times": keep * old["times"] + _multiplicity(rows),
    }
    written = {name: arrays[name].at[rows].set(x, mode="drop") for name, x in new.items()}
    return arrays | written | {"step": jnp.asarray(step, jnp.int32), "batch": jnp.float32(ids.size)}


def _interval_rows(arrays: Arrays, ids: Int[Array, "*S"]) -> Int[Array, "*S"]:
    """Returns the rows of ids in the arrays of intervals; past the end for negative ids."""
    # Not -1, which would wrap around to the last row.
    return jnp.where(ids >= 0, ids, len(arrays["last"]))


def init_sketch(
    counts: Any,
    rows: Any,
    *,
    width: int = 0,
    depth: int = SKETCH_DEPTH,
    halve_at: int = SKETCH_ROWS,
) -> Arrays:
    """Makes a sketch that has counted nothing.

    Args:
        counts: Counts of N ids, of which only N matters.
        rows: Not used.
        width: Counters a hash function, a power of two; 0 takes as many as there are ids, within
            `SKETCH_WIDTHS`.
        depth: Hash functions.
        halve_at: Rows after which all counters are halved, so that old rows count less and nothing
            overflows.
    """
    low, high = SKETCH_WIDTHS
    width = width or min(max(1 << (len(counts) - 1).bit_length(), low), high)
    return {
        "counts": jnp.zeros((depth, width), jnp.uint32),
        "rows": jnp.uint32(0),
        "multipliers": _multipliers(depth),
        "items": jnp.float32(len(counts)),
        "halve_at": jnp.uint32(halve_at),
    }


def sketch_log_expected_count(
    arrays: Arrays, ids: Int[Array, "*S"], draws: Any
) -> Float[Array, "*S"]:
    """Estimates from a count-min sketch (Cormode and Muthukrishnan 2005): the least of an id's
    counters, never below its true count.

    An id never seen has one pseudo-count, and among N ids is no likelier than all of them alike.
    """
    slots = _slots(arrays, ids.ravel())
    counts = _least_counts(arrays, slots).astype(jnp.float32)
    rows = arrays["rows"].astype(jnp.float32)
    total = jnp.where(counts > 0, rows, jnp.maximum(rows, arrays["items"]))
    logs = jnp.log(jnp.maximum(counts, 1)) - jnp.log(total) + _log(draws)
    return logs.reshape(ids.shape)


def update_sketch(arrays: Arrays, ids: Int[Array, "B"], step: Any) -> Arrays:
    """Returns the sketch after a batch, by conservative update (Estan and Varghese 2002): counters
    rise no further than they must.

    All ids of a batch are added to the sketch as it was before it, each with the number of times it
    stands there. Of two ids that share a counter the greater sum is kept, which is at least the
    true count of either, so nothing is ever underestimated.
    """
    slots = _slots(arrays, ids)
    sums = _least_counts(arrays, slots) + _multiplicity(ids).astype(jnp.uint32)
    sums = jnp.broadcast_to(sums, slots.shape)
    depth = jnp.arange(len(slots))[:, None]
    # A maximum, so that duplicates and ids that share a counter may be written in any order.
    counts = arrays["counts"].at[depth, slots].max(sums, mode="drop")
    rows = arrays["rows"] + jnp.uint32(ids.size)

    def halve(x: jax.Array) -> jax.Array:
        # Rounded up, so that an id that was seen stays seen.
        return x - x // 2

    def halve_both(counts: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return halve(counts), halve(rows)

    def keep_both(counts: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return counts, rows

    is_full = rows >= arrays["halve_at"]
    counts, rows = jax.lax.cond(is_full, halve_both, keep_both, counts, rows)
    return arrays | {"counts": counts, "rows": rows}


def _least_counts(arrays: Arrays, slots: Int[Array, "d M"]) -> UInt32[Array, "M"]:
    depth = jnp.arange(len(slots))[:, None]
    return arrays["counts"].at[depth, slots].get(mode="fill", fill_value=0).min(0)


def _slots(arrays: Arrays, ids: Int[Array, "M"]) -> Int[Array, "d M"]:
    """Returns the counters of ids, one by each hash function; past the end for negative ids.

    Over the choice of the functions, two ids share a counter of one with probability at most
    2 / width.
    """
    width = arrays["counts"].shape[1]
    bits = width.bit_length() - 1
    hashed = multiply_shift(ids.astype(jnp.uint32)[None], arrays["multipliers"][:, None], bits)
    slots = hashed.astype(jnp.int32)
    return jnp.where(ids[None] >= 0, slots, width)


def _multipliers(depth: int) -> UInt32[Array, "d"]:
    """Returns odd numbers, always the same ones."""
    # Even ones would lose a bit of every id. The seed is fixed: every process makes its own.
    numbers = np.random.default_rng(0).integers(0, 2**32, depth, dtype=np.uint32)
    return jnp.asarray(numbers | np.uint32(1))


def _multiplicity(values: Int[Array, "M"]) -> Int[Array, "M"]:
    """Returns the number of times that each value stands among all."""
    # By sorting: a comparison of all pairs would take [M, M].
    ordered = jnp.sort(values)
    first = jnp.searchsorted(ordered, values)
    end = jnp.searchsorted(ordered, values, side="right")
    return (end - first).astype(jnp.int32)


def _keep(arrays: Arrays, ids: Int[Array, "B"], step: Any) -> Arrays:
    """Returns the arrays of exact counts, which no batch changes."""
    return arrays


# By the names that `config.objective.negatives.frequency` takes.
FREQUENCIES = {
    "exact": Frequency(init_exact, exact_log_expected_count, _keep, learns=False),
    "gap": Frequency(init_intervals, interval_log_expected_count, update_intervals, learns=True),
    "sketch": Frequency(init_sketch, sketch_log_expected_count, update_sketch, learns=True),
}
