"""Sources of negatives, each with the expected number of times that it yields a candidate.

Draws are with replacement and duplicates stay: a candidate drawn twice counts twice, and its
expected count says so. The draws of a step are a function of its key alone, or of one key for each
row of the batch: they are the same however the batch is divided over devices.

Hard negatives come from pools, one for each user, built on the host: {"items": int32 [U, P],
"sizes": int32 [U]}. The first "sizes" items of a row are in use, the others are -1. The shape of
mined pools never changes, so that a step is traced once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from twotower.core.arrays import pair_keys
from twotower.objectives.alias import AliasTable
from twotower.pipeline.batches import InteractionRows

# A function of ids [...]: log of the expected number of times that a source yields each in a step,
# float32 [...].
LogExpectedCount = Callable[[jax.Array], jax.Array]

Pools = dict[str, np.ndarray]

# Greatest number of items in a user's explicit pool.
MAX_EXPLICIT_ITEMS = 64


def mixed_log_expected_count(
    ids: Int[Array, "*S"], sources: Sequence[LogExpectedCount]
) -> Float[Array, "*S"]:
    """Returns the log of the expected number of times that all sources of a step together yield
    each id: their expected counts summed.

    It is the same for a candidate whichever source it came from, and for a positive. 0, a count of
    1, where no source ever yields an id: such a candidate was added once, by hand.
    """
    if not sources:
        return jnp.zeros(ids.shape)
    # Summed in logs, where no count is too small.
    log_counts = jnp.stack([source(ids) for source in sources])
    total = jax.nn.logsumexp(log_counts, axis=0)
    return jnp.where(jnp.isneginf(total), 0.0, total)


def uniform(key: jax.Array, num: int, items: int) -> Int[Array, "S"]:
    """Draws `num` of the ids [0, items), each as likely."""
    return jax.random.randint(key, (num,), 0, items, jnp.int32)


def uniform_log_expected_count(ids: Int[Array, "*S"], num: int, items: int) -> Float[Array, "*S"]:
    """Returns the log of the expected count of `uniform`, num / items for every id."""
    return jnp.full(ids.shape, jnp.log(num / items))


def popularity(key: jax.Array, num: int, table: AliasTable) -> Int[Array, "S"]:
    """Draws `num` ids by a `popularity_table`, whose `log_expected_count` belongs to them."""
    return table.draw(key, num)


def init_queue(size: int, dim: int) -> dict[str, Array]:
    """Makes an empty queue of past item vectors (cross-batch memory, Wang et al., CVPR 2020, arXiv
    1912.06798).

    Returns:
        {"vectors": [Q, D], "ids", "owners", "step": int32 [Q]}; "owners" are query ids, and "step"
        is the step that an entry was made in, -1 for none. The keys are those of checkpoints.
    """
    queue = {"vectors": jnp.zeros((size, dim))}
    # Arrays of their own, though equal: a state is donated, and a buffer can be donated only once.
    for name in ("ids", "owners", "step"):
        queue[name] = jnp.full(size, -1, jnp.int32)
    return queue


def push(
    queue: dict[str, Array],
    vectors: Float[Array, "B D"],
    ids: Int[Array, "B"],
    query_ids: Int[Array, "B"],
    step: Int[Array, ""],
) -> dict[str, Array]:
    """Returns the queue with the batch of a step instead of its oldest entries.

    Args:
        queue: The queue, see `init_queue`.
        vectors: Item vectors of the batch.
        ids: Their ids; negative for a row that is no candidate.
        query_ids: Identity (user) of the query that each item is a positive of.
        step: Number of the step, which alone decides which entries are replaced.
    """
    size = len(queue["ids"])
    batch = len(ids)
    # Whole batches are one slice that never wraps around: it is written in place.
    if size % batch:
        raise ValueError(f"A queue of {size} entries does not take whole batches of {batch}.")
    start = step % (size // batch) * batch
    new = {
        "vectors": vectors,
        "ids": ids,
        "owners": query_ids,
        "step": jnp.full(batch, step, jnp.int32),
    }
    return {
        # In the type of the queue, whatever the arithmetic is in: a state keeps its types.
        name: jax.lax.dynamic_update_slice_in_dim(old, new[name].astype(old.dtype), start, 0)
        for name, old in queue.items()
    }


def queue_candidates(
    queue: dict[str, Array], step: Int[Array, ""], *, warmup: int = 0, age: int = 0
) -> tuple[Float[Array, "Q D"], tuple[Int[Array, "Q"], Int[Array, "Q"]], Float[Array, ""]]:
    """Returns the entries of the queue as candidates of a step.

    Args:
        queue: The queue, see `init_queue`.
        step: Number of the step.
        warmup: Steps before any entry is used: at first vectors change too fast.
        age: Steps after which an entry is no longer used; 0 never.

    Returns:
        Vectors; ids and query ids, -1 where an entry is not used: empty, too old, or not of the
        past; and the number of entries in use, as the number of draws in expected counts.
    """
    used = _is_used(queue["step"], step, warmup, age)
    # Masked by id, since shapes are static: unused entries stay among the candidates, as padding.
    ids = jnp.where(used, queue["ids"], -1)
    query_ids = jnp.where(used, queue["owners"], -1)
    return queue["vectors"], (ids, query_ids), used.sum().astype(jnp.float32)


def _is_used(
    made: Int[Array, "Q"], step: Int[Array, ""], warmup: int, age: int
) -> Bool[Array, "Q"]:

    used = (made >= 0) & (made < step) & (step >= warmup)
    if not age:
        return used
    return used & (step - made <= age)


def draw_pool(
    keys: Key[Array, "B"], pools: Any, users: Int[Array, "B"], num: int
) -> tuple[Int[Array, "B H"], Float[Array, "B H"]]:
    """Draws hard negatives of each query from the pool of its user, with replacement.

    Args:
        keys: Random key of each row, folded from its number in the whole batch.
        pools: {"items": int32 [U, P], the first "sizes" (int32 [U]) of each row in use}; see
            `build_pools`.
        users: User of each query.
        num: H, negatives of each query.

    Returns:
        Ids, and the log of the expected number of times that the pool yields each; -1 and 0 for an
        empty pool.
    """
    size = jnp.where(users >= 0, pools["sizes"][users], 0)[:, None]

    def draw_bits(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, (num,), jnp.uint32)

    # The remainder of 32 bits favours the first items by one part in 2^32 / size, and costs half of
    # `randint`.
    divisor = jnp.maximum(size, 1).astype(jnp.uint32)
    column = (jax.vmap(draw_bits)(keys) % divisor).astype(jnp.int32)
    items = jnp.take_along_axis(pools["items"][users], column, axis=1)
    ids = jnp.where(size > 0, items, -1)
    return ids, pool_log_expected_count(pools, users, ids, num)


def pool_log_expected_count(
    pools: Any, users: Int[Array, "B"], ids: Int[Array, "B H"], num: int
) -> Float[Array, "B H"]:
    """Returns the log of the expected number of times that `num` draws from the pool of each user
    yield each id, whichever source the id came from.

    H / size for ids in the pool, -inf outside of it; 0 for id -1. For a query with hard negatives
    from two pools, sum over both. Shared candidates are not looked up in the query's pool, which
    would take [B, C]. So an item in a pool weighs more than its share, at most twice, as is the
    purpose of hard negatives.
    """
    # [B, H, P], small: pools have some hundred items at most.
    occurrences = (pools["items"][users][:, None, :] == ids[:, :, None]).sum(-1)
    size = jnp.maximum(pools["sizes"][users], 1)[:, None]
    return jnp.where(ids >= 0, jnp.log(occurrences * (num / size)), 0.0)


def empty_pools(users: int, size: int) -> Pools:
    """Makes pools without items, with room for `size` of each user."""
    return {"items": np.full((users, size), -1, np.int32), "sizes": np.zeros(users, np.int32)}


def build_pools(users: np.ndarray, items: np.ndarray, *, num_users: int, size: int) -> Pools:
    """Makes pools of the first `size` distinct items of each user.

    Args:
        users: Users of the pairs, int [M], in any order.
        items: Items of the pairs, int [M], the first choice of a user before the next.
        num_users: U.
        size: P.
    """
    pools = empty_pools(num_users, size)
    # Position of the first occurrence of each pair: the order of choice decides which ones are
    # kept.
    _, first = np.unique(pair_keys(users, items), return_index=True)
    # By user, and within a user in the order of the pairs.
    first = first[np.lexsort((first, users[first]))]
    users = users[first]
    items = items[first]
    column = np.arange(len(users)) - np.searchsorted(users, users)
    kept = column < size
    pools["items"][users[kept], column[kept]] = items[kept]
    pools["sizes"][:] = np.minimum(np.bincount(users, minlength=num_users), size)
    return pools


def explicit_pools(
    rows: InteractionRows, label: np.ndarray, *, num_users: int, size: int = MAX_EXPLICIT_ITEMS
) -> Pools:
    """Makes pools of the items that each user was shown and did not take: those of its latest rows
    whose label is 0.

    An item that the user took in another training row (label 1) is left out.

    Args:
        rows: Training rows.
        label: Label of each row, float32 [N]: 1, 0, or NaN where missing.
        num_users: U.
        size: Greatest number of items of a user; P is less if no user has as many.
    """
    if rows.timestamp is None:
        order = np.arange(len(rows))
    else:
        order = np.argsort(rows.timestamp, kind="stable")
    keys = pair_keys(rows.user, rows.item)
    # An item outside the corpus has -1. NaN labels are neither 0 nor 1.
    refused = (label == 0) & (rows.item >= 0) & ~np.isin(keys, keys[label == 1])
    latest = order[refused[order]][::-1]
    # The user is the upper half of a pair's key; see `pair_keys`.
    users_of_pairs = np.unique(keys[latest]) >> 32
    longest = int(np.bincount(users_of_pairs, minlength=1).max(initial=1))
    size = min(size, max(longest, 1))
    return build_pools(rows.user[latest], rows.item[latest], num_users=num_users, size=size)
