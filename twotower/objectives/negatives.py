"""Where candidates come from. Each source states how often it is expected to yield each candidate.

Draws are with replacement and duplicates stay: a candidate drawn twice counts twice, and its
expected count says so. What is
drawn for a step is a function of its key alone, or of one key a row of the batch: however the batch
is divided over devices, the same is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from twotower.objectives.alias import AliasTable

# float32 [...] of ids [...]: log of the expected number of times a source yields each of any ids in
# a step.
LogExpectedCount = Callable[[Any], Any]


class Positives(NamedTuple):
    """The answer of each query.

    Attributes:
        vectors: of the answers.
        ids: what they are; a candidate of the same id is no negative.
        log_expected_count: log of the expected number of times the sources of this step yield the
            answer's id.
    """

    vectors: Float[Array, "B D"]
    ids: Int[Array, "B"]
    log_expected_count: Float[Array, "B"]


class Candidates(NamedTuple):
    """The C things that every query is compared with.

    Attributes:
        ids: what each candidate is; two candidates of one id are the same thing. Negative: padding,
            never compared.
        owners: the query identity (its user) that each candidate is a positive of; negative where
            there is none.
        log_expected_count: log of the expected number of times the sources of this step yield the
            candidate's id.
    """

    ids: Int[Array, "C"]
    owners: Int[Array, "C"]
    log_expected_count: Float[Array, "C"]


class HardNegatives(NamedTuple):
    """Further negatives of each query alone; attributes as above, id negative where there is
    none."""

    vectors: Float[Array, "B H D"]
    ids: Int[Array, "B H"]
    log_expected_count: Float[Array, "B H"]


def mixed_log_expected_count(
    ids: Int[Array, "*S"], sources: Sequence[LogExpectedCount]
) -> Float[Array, "*S"]:
    """Log of the expected number of times all sources of a step together yield each id: their
    expected counts summed.

    It is the same for a candidate whichever source it came from, and for a positive. 0 where no
    source ever yields an id: it is there because it was put there, once.
    """
    if not sources:
        return jnp.zeros(ids.shape)
    total = jax.nn.logsumexp(jnp.stack([source(ids) for source in sources]), axis=0)
    return jnp.where(jnp.isneginf(total), 0.0, total)


def uniform(key: jax.Array, num: int, items: int) -> Int[Array, "S"]:
    """`num` of the ids [0, items), each as likely."""
    return jax.random.randint(key, (num,), 0, items, jnp.int32)


def uniform_log_expected_count(ids: Int[Array, "*S"], num: int, items: int) -> Float[Array, "*S"]:
    """Of `uniform`: num / items, for every id."""
    return jnp.full(ids.shape, jnp.log(num / items))


def popularity(key: jax.Array, num: int, table: AliasTable) -> Int[Array, "S"]:
    """`num` ids as often as `table` says, see `popularity_table`; their count is
    `table.log_expected_count`."""
    return table.draw(key, num)


def init_queue(size: int, dim: int) -> dict[str, Array]:
    """An empty queue of past item vectors (cross-batch memory, Wang et al., CVPR 2020, arXiv
    1912.06798).

    Returns:
        {"vectors": [Q, D], "ids", "owners", "step": int32 [Q]}; "step" is when an entry was made,
        -1 for none.
    """
    # Arrays of their own, though equal: a state is donated, and a buffer can be given away only
    # once.
    return {"vectors": jnp.zeros((size, dim))} | {
        name: jnp.full(size, -1, jnp.int32) for name in ("ids", "owners", "step")
    }


def push(
    queue: dict[str, Array],
    vectors: Float[Array, "B D"],
    ids: Int[Array, "B"],
    owners: Int[Array, "B"],
    step: Int[Array, ""],
) -> dict[str, Array]:
    """The queue with the batch of a step in the place of its oldest.

    Where a batch goes depends on the step alone. An id may be negative: a row that is no candidate.
    """
    size, batch = len(queue["ids"]), len(ids)
    if size % batch:
        raise ValueError(f"A queue of {size} entries does not take whole batches of {batch}.")
    start = step % (size // batch) * batch
    new = {
        "vectors": vectors,
        "ids": ids,
        "owners": owners,
        "step": jnp.full(batch, step, jnp.int32),
    }
    return {
        name: jax.lax.dynamic_update_slice_in_dim(old, new[name].astype(old.dtype), start, 0)
        for name, old in queue.items()
    }


def queue_candidates(
    queue: dict[str, Array], step: Int[Array, ""], *, warmup: int = 0, age: int = 0
) -> tuple[Float[Array, "Q D"], tuple[Int[Array, "Q"], Int[Array, "Q"]], Float[Array, ""]]:
    """The entries as candidates of a step.

    Args:
        warmup: steps before any is used: at first vectors change too fast.
        age: steps after which an entry is no longer used; 0 never.

    Returns:
        Vectors, ids and owners, -1 where an entry is not used: empty, too old, or not of the past;
        and how many rows are used, which is the number of draws that their expected counts are to
        be stated for.
    """
    used = _is_used(queue["step"], step, warmup, age)
    known = tuple(jnp.where(used, queue[name], -1) for name in ("ids", "owners"))
    return queue["vectors"], known, used.sum().astype(jnp.float32)


def _is_used(
    made: Int[Array, "Q"], step: Int[Array, ""], warmup: int, age: int
) -> Bool[Array, "Q"]:
    used = (made >= 0) & (made < step) & (step >= warmup)
    return used & (step - made <= age) if age else used


def draw_pool(
    keys: Key[Array, "B"], pools: Any, users: Int[Array, "B"], num: int
) -> tuple[Int[Array, "B H"], Float[Array, "B H"]]:
    """Hard negatives of each query, drawn from the pool of its user with replacement.

    Args:
        keys: one a row, folded from its number in the whole batch.
        pools: {"items": int32 [U, P], the first "sizes" (int32 [U]) of each row in use}.
        num: H.

    Returns:
        Ids, and log of the expected number of times the pool yields each; -1 and 0 where a pool is
        empty.
    """
    size = jnp.where(users >= 0, pools["sizes"][users], 0)[:, None]
    # The remainder of 32 bits favours the first places by one part in 2^32 / size, and costs half
    # of `randint`.
    bits = jax.vmap(lambda key: jax.random.bits(key, (num,), jnp.uint32))(keys)
    at = (bits % jnp.maximum(size, 1).astype(jnp.uint32)).astype(jnp.int32)
    ids = jnp.where(size > 0, jnp.take_along_axis(pools["items"][users], at, axis=1), -1)
    return ids, pool_log_expected_count(pools, users, ids, num)


def pool_log_expected_count(
    pools: Any, users: Int[Array, "B"], ids: Int[Array, "B H"], num: int
) -> Float[Array, "B H"]:
    """Log of the expected number of times `num` draws from the pool of each user yield each id,
    from wherever it came.

    H / size in the pool, -inf outside; 0 for id -1. For a query with hard negatives from two pools,
    sum over both. That a shared candidate stands in the query's pool as well is not asked: it would
    take [B, C]. So what is in a pool weighs more than its share, at most twice: hard negatives are
    there to weigh more.
    """
    held = (pools["items"][users][:, None, :] == ids[:, :, None]).sum(-1)
    size = jnp.maximum(pools["sizes"][users], 1)[:, None]
    return jnp.where(ids >= 0, jnp.log(held * (num / size)), 0.0)
