"""What the positives of a step are compared with: items drawn, embedded beside them, and brought
together from all devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from twotower.config import Config, NegativesConfig
from twotower.core.mesh import REPLICATED, SINGLE_DEVICE, DeviceGroup, put
from twotower.kernels.sparse_update import PADDING
from twotower.objectives import negatives
from twotower.objectives.alias import popularity_table
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.pools import explicit_pools
from twotower.pipeline.batches import Batch
from twotower.pipeline.prepare import PreparedData
from twotower.training.checks import check_negatives, uses_negatives


class CorpusSize(NamedTuple):
    """How much there is.

    Attributes:
        users: U.
        items: N.
        unseen: items without a training row.
    """

    users: int
    items: int
    unseen: int


@dataclasses.dataclass(frozen=True)
class NegativeSampling:
    """Which negatives a step has and what they need; static.

    Attributes:
        config: with `uniform` decided.
        batch_size: B of all devices; of packed sequences, the places of all rows.
        items: N.
        corrected: whether log expected counts are subtracted; else they are all 0.
    """

    config: NegativesConfig
    batch_size: int
    items: int
    corrected: bool

    @classmethod
    def build(
        cls, config: Config, loss: Any, corpus: CorpusSize, *, places: int = 1
    ) -> NegativeSampling:
        """What `config` asks for.

        Args:
            places: of a row of the batch, see `twotower.pipeline.sequences`.

        Raises:
            ConfigError: there are fewer items than are asked for.
        """
        objective, batch = config.objective, config.training.batch_size * places
        if not uses_negatives(objective):
            return cls(NegativesConfig(in_batch=False, uniform=0), batch, corpus.items, False)
        uniform = objective.negatives.uniform
        if uniform < 0:
            needed = corpus.unseen and not objective.negatives.catalogue
            uniform = min(-(-batch // 4), corpus.items) if needed else 0
        chosen = dataclasses.replace(objective.negatives, uniform=uniform)
        check_negatives(chosen, items=corpus.items, batch_size=batch)
        return cls(chosen, batch, corpus.items, objective.logq and loss.corrects)

    @property
    def hard(self) -> int:
        """H."""
        return self.config.mined + self.config.explicit

    @property
    def candidates(self) -> int:
        """How many each query is compared with."""
        config = self.config
        if config.catalogue:
            return self.items + self.hard
        return (
            self.batch_size * config.in_batch
            + config.uniform
            + config.popularity
            + config.queue
            + self.hard
        )

    @property
    def needs_features(self) -> bool:
        """Whether steps embed items that are not in their batch."""
        config = self.config
        return bool(config.uniform or config.popularity or config.catalogue or self.hard)


class SampledItems(NamedTuple):
    """Items of a step beside the batch's own, on one device; id -1: none.

    Attributes:
        shared: candidates of all queries, this device's part of them.
        hard: of each query alone.
        hard_log_count: log of the expected number of times the query's pools yield each.
    """

    shared: Int[Array, "S"]
    hard: Int[Array, "B H"]
    hard_log_count: Float[Array, "B H"]

    @property
    def ids(self) -> Int[Array, "M"]:
        return jnp.concatenate([self.shared, self.hard.ravel()])


def draw(
    sources: NegativeSampling,
    batch: Batch,
    given: Mapping[str, Any],
    key: jax.Array,
    group: DeviceGroup,
) -> SampledItems:
    """The items drawn for one step: whole draws are a function of the key, rows of the batch have
    keys of their own, so that every division over devices draws the same.

    Args:
        given: "mined" and "explicit" pools and the "popularity" table, as far as `sources` uses
            them.
    """
    config, shared = sources.config, []
    if config.catalogue:
        shared.append(jnp.arange(sources.items, dtype=jnp.int32))
    if config.uniform:
        shared.append(negatives.uniform(jax.random.fold_in(key, 0), config.uniform, sources.items))
    if config.popularity:
        shared.append(
            negatives.popularity(jax.random.fold_in(key, 1), config.popularity, given["popularity"])
        )
    ids = jnp.concatenate([*shared, jnp.zeros(0, jnp.int32)])
    ids = group.part(jnp.pad(ids, (0, -len(ids) % group.size), constant_values=-1))
    rows = len(batch["user"])
    pools = [
        (given[name], count)
        for name, count in (("mined", config.mined), ("explicit", config.explicit))
        if count
    ]
    hard = [jnp.zeros((rows, 0), jnp.int32)]
    for i, (pool, count) in enumerate(pools):
        keys = row_keys(jax.random.fold_in(key, 2 + i), group.row_numbers(rows))
        hard.append(negatives.draw_pool(keys, pool, batch["user"], count)[0])
    found = jnp.concatenate(hard, axis=1)
    # An item of one pool may be in the other: its counts are summed.
    counts = [
        negatives.pool_log_expected_count(pool, batch["user"], found, count)
        for pool, count in pools
    ]
    return SampledItems(
        ids,
        found,
        jax.nn.logsumexp(jnp.stack(counts), axis=0) if counts else jnp.zeros(found.shape),
    )


def row_keys(key: jax.Array, places: Int[Array, "B"]) -> jax.Array:
    """A key for each row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, places)


def take_features(
    catalogue: Mapping[str, Any], inputs: Mapping[str, Any], ids: Int[Array, "M"]
) -> dict[str, jax.Array]:
    """The encoded features of items; padding for id -1, so that no table row learns from
    nothing."""

    def of(name: str, values: jax.Array) -> jax.Array:
        found = values[jnp.maximum(ids, 0)]
        return (
            jnp.where((ids >= 0).reshape(-1, *[1] * (found.ndim - 1)), found, PADDING)
            if inputs[name].table
            else found
        )

    return {name: of(name, values) for name, values in catalogue.items()}


def log_expected_count(
    sources: NegativeSampling,
    frequency: Any,
    popularity: Any,
    queued: Any,
    ids: Int[Array, "..."],
    own: jax.Array | None = None,
) -> Float[Array, "..."]:
    """Log of how often the sources of a step yield each id: their expected counts summed; 0 where
    nothing is corrected.

    Args:
        queued: number of entries of the queue in use.
        own: log of the expected counts that a source of one query alone adds, of the shape of
            `ids`.
    """
    config, known = sources.config, jnp.maximum(ids, 0)
    if not sources.corrected:
        return jnp.zeros(ids.shape)
    parts: list[Callable[[jax.Array], jax.Array]] = []
    if config.catalogue:  # every item once
        parts.append(lambda ids: jnp.zeros(ids.shape))
    elif config.in_batch or config.queue:
        draws = sources.batch_size * config.in_batch + queued
        parts.append(
            lambda ids: FREQUENCIES[config.frequency].log_expected_count(frequency, ids, draws)
        )
    if config.uniform:
        parts.append(
            lambda ids: negatives.uniform_log_expected_count(ids, config.uniform, sources.items)
        )
    if config.popularity:
        parts.append(lambda ids: popularity.log_expected_count(ids, config.popularity))
    if own is not None:
        parts.append(lambda ids: own)
    return negatives.mixed_log_expected_count(known, parts)


def gathered(
    vectors: list[jax.Array], ids: list[jax.Array], owners: list[jax.Array], group: DeviceGroup
) -> tuple[Float[Array, "C D"], Int[Array, "C"], Int[Array, "C"]]:
    """All devices' candidates. What goes together is concatenated before it is gathered, ids and
    owners like vectors."""
    if not sum(map(len, ids)):  # no collective of nothing
        group = SINGLE_DEVICE
    known = group.all_gather(jnp.stack([jnp.concatenate(ids), jnp.concatenate(owners)], axis=1))
    return group.gather(jnp.concatenate(vectors)), known[:, 0], known[:, 1]


def step_constants(
    sampling: NegativeSampling, prepared: PreparedData, mesh: Mesh, resident: Any
) -> dict[str, Any]:
    """What the step needs of the corpus; see `train_step`."""
    config, found = sampling.config, {}
    if sampling.needs_features:
        given = (
            resident["item_features"]
            if resident
            else put(mesh, dict(prepared.features["item"]), REPLICATED)
        )
        found["item_features"] = given
    if config.popularity:
        found["popularity"] = put(
            mesh, popularity_table(count_rows(prepared)["item"], config.alpha), REPLICATED
        )
    if config.explicit:
        found["explicit"] = put(mesh, _explicit(prepared), REPLICATED)
    return found


def _explicit(prepared: PreparedData) -> Any:
    labels = prepared.train.labels[prepared.config.objective.label]
    return explicit_pools(prepared.train, labels, num_users=len(prepared.users))


def count_rows(prepared: PreparedData) -> dict[str, np.ndarray]:
    """Training rows of each user, of each item of the corpus, and in all, float32.

    Of sequences, how often a pass has each as a target; "in all" are then the places, filled or
    not, that a pass has.
    """
    sizes, packing = {"user": len(prepared.users), "item": len(prepared.items)}, prepared.packing
    rates, rows = None, len(prepared.train)
    if packing is not None:
        rates, rows = np.zeros(rows), len(packing) * packing.num_slots
        rates[prepared.histories.orders["train"]] = packing.target_rates(len(rates))
    counts = {
        side: np.bincount(getattr(prepared.train, side), rates, minlength=n)
        for side, n in sizes.items()
    }
    return {side: x.astype(np.float32) for side, x in counts.items()} | {"rows": np.float32(rows)}


def corpus_size(prepared: PreparedData) -> CorpusSize:
    """How much there is."""
    return CorpusSize(
        len(prepared.users), len(prepared.items), int((count_rows(prepared)["item"] == 0).sum())
    )
