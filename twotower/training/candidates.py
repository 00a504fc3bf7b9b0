"""Candidates of a step: the items sampled for it, their expected counts, and the candidates of all
devices; with the arrays of the whole corpus that a step reads for that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from twotower.config import Config, NegativesConfig
from twotower.core.arrays import count_values
from twotower.core.mesh import REPLICATED, SINGLE_DEVICE, DeviceGroup, put
from twotower.features.inputs import Input
from twotower.kernels.loss_inputs import Loss
from twotower.kernels.sparse_update import PADDING
from twotower.objectives import negatives
from twotower.objectives.alias import AliasTable, popularity_table
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.losses import PointwiseLoss
from twotower.objectives.negatives import LogExpectedCount, explicit_pools
from twotower.pipeline.batches import Batch, Examples, Features, InteractionRows
from twotower.training.checks import check_negatives, uses_negatives


class CorpusSize(NamedTuple):
    """Numbers of users and items.

    Attributes:
        users: Number of users, U.
        items: Number of items in the corpus, N.
        unseen: Number of items without a training row.
    """

    users: int
    items: int
    unseen: int


@dataclasses.dataclass(frozen=True)
class NegativeSampling:
    """Sources of negatives of a step; static under `jit`.

    Attributes:
        config: Configured sources, with the number of uniform draws decided.
        batch_size: Number of rows of the batch over all devices, B; of packed sequences, the
            number of positions in all rows.
        items: Number of items in the corpus, N.
        corrected: Whether log expected counts are subtracted from logits; else they are all 0.
    """

    config: NegativesConfig
    batch_size: int
    items: int
    corrected: bool

    @classmethod
    def build(
        cls,
        config: Config,
        loss: Loss | PointwiseLoss,
        corpus: CorpusSize,
        *,
        positions: int = 1,
    ) -> NegativeSampling:
        """Returns the sampling of a configuration.

        Args:
            config: Configuration of the run.
            loss: Retrieval loss of the run, or the function of a pointwise one, which has no
                negatives.
            corpus: Sizes of the corpus.
            positions: Number of positions in a row of the batch; see
                `twotower.pipeline.sequences`.

        Raises:
            ConfigError: The corpus has fewer items than the sources draw.
        """
        objective = config.objective
        # A position of a packed row is a positive, hence a row of the loss.
        batch_size = config.training.batch_size * positions
        if not uses_negatives(objective) or not isinstance(loss, Loss):
            no_source = NegativesConfig(in_batch=False, uniform=0)
            return cls(no_source, batch_size, corpus.items, corrected=False)
        uniform = objective.negatives.uniform
        if uniform < 0:
            uniform = 0
            # Items that no row trains would never be a negative of anything: as many as a quarter
            # of the batch are drawn from all, so that they learn to be unlikely.
            if corpus.unseen and not objective.negatives.catalogue:
                uniform = min(-(-batch_size // 4), corpus.items)
        sources = dataclasses.replace(objective.negatives, uniform=uniform)
        check_negatives(sources, items=corpus.items, batch_size=batch_size)
        corrected = objective.logq and loss.corrects
        return cls(sources, batch_size, corpus.items, corrected)

    @property
    def hard(self) -> int:
        """Number of hard negatives of each query, H."""
        return self.config.mined + self.config.explicit

    @property
    def candidates(self) -> int:
        """Number of items that each query is compared with."""
        config = self.config
        # Every item is a candidate once: in-batch and shared sources would only repeat some.
        if config.catalogue:
            return self.items + self.hard
        shared = config.uniform + config.popularity + config.queue
        return self.batch_size * config.in_batch + shared + self.hard

    @property
    def needs_features(self) -> bool:
        """Whether a step embeds items that are not in its batch."""
        config = self.config
        return bool(config.uniform or config.popularity or config.catalogue or self.hard)


class SampledItems(NamedTuple):
    """Items of a step beside the batch's own, on one device; id -1 for padding.

    Attributes:
        shared: Candidates of all queries, this device's part of them.
        hard: Hard negatives of each query alone.
        hard_log_count: Log of the expected number of times that the query's pools yield each.
    """

    shared: Int[Array, "S"]
    hard: Int[Array, "B H"]
    hard_log_count: Float[Array, "B H"]

    @property
    def ids(self) -> Int[Array, "M"]:
        """All of the items, in the order in which a step embeds them."""
        return jnp.concatenate([self.shared, self.hard.ravel()])


def sample_items(
    sampling: NegativeSampling,
    batch: Batch,
    arrays: Mapping[str, Any],
    key: jax.Array,
    group: DeviceGroup,
) -> SampledItems:
    """Draws the items of one step.

    Shared draws are a function of the key, and each row of the batch has a key of its own, so that
    the draws are the same however the batch is divided over devices.

    Args:
        sampling: Sources of negatives.
        batch: This device's part of the batch.
        arrays: "mined" and "explicit" pools and the "popularity" table, if `sampling` uses them.
        key: Random key of the step.
        group: Devices of the step.
    """
    config = sampling.config
    # Never an empty list, which cannot be concatenated.
    shared = [jnp.zeros(0, jnp.int32)]
    if config.catalogue:
        shared.append(jnp.arange(sampling.items, dtype=jnp.int32))
    if config.uniform:
        # A number for each source, so that adding one leaves the draws of the others as they were.
        uniform_key = jax.random.fold_in(key, 0)
        shared.append(negatives.uniform(uniform_key, config.uniform, sampling.items))
    if config.popularity:
        popularity_key = jax.random.fold_in(key, 1)
        table = arrays["popularity"]
        shared.append(negatives.popularity(popularity_key, config.popularity, table))
    ids = jnp.concatenate(shared)
    # Filled up with -1 to a multiple of the devices, each of which then takes its part.
    ids = group.part(jnp.pad(ids, (0, -len(ids) % group.size), constant_values=-1))
    hard, hard_log_count = _sample_hard(config, batch["user"], arrays, key, group)
    return SampledItems(ids, hard, hard_log_count)


def _sample_hard(
    config: NegativesConfig,
    users: Int[Array, "B"],
    arrays: Mapping[str, Any],
    key: jax.Array,
    group: DeviceGroup,
) -> tuple[Int[Array, "B H"], Float[Array, "B H"]]:
    """Draws hard negatives from the pools of each query's user.

    Returns:
        Their ids, and the log of the expected number of times that the user's pools yield each.
    """
    counts = {"mined": config.mined, "explicit": config.explicit}
    pools = [(arrays[name], count) for name, count in counts.items() if count]
    rows = group.row_numbers(len(users))
    parts = [jnp.zeros((len(users), 0), jnp.int32)]
    for i, (pool, count) in enumerate(pools):
        # Keys 0 and 1 are those of the shared draws.
        keys = row_keys(jax.random.fold_in(key, 2 + i), rows)
        ids, _ = negatives.draw_pool(keys, pool, users, count)
        parts.append(ids)
    hard = jnp.concatenate(parts, axis=1)
    if not pools:
        return hard, jnp.zeros(hard.shape)
    # An item of one pool may be in the other as well: its expected counts are summed.
    log_counts = [
        negatives.pool_log_expected_count(pool, users, hard, count) for pool, count in pools
    ]
    return hard, jax.nn.logsumexp(jnp.stack(log_counts), axis=0)


def row_keys(key: jax.Array, rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """Returns a random key for each row, a function of the row's number in the whole batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def take_features(
    item_features: Mapping[str, Array], inputs: Mapping[str, Input], ids: Int[Array, "M"]
) -> dict[str, jax.Array]:
    """Returns the encoded features of items; padding for id -1, so that no table row learns from
    an item that is none.

    Args:
        item_features: Encoded features of the corpus, [N, ...] each.
        inputs: Inputs of the item tower by feature.
        ids: Rows of the corpus.
    """

    def take(name: str, values: Array) -> jax.Array:
        # -1 would take the last item; its dense features are read as those of item 0, and masked as
        # an id.
        taken = values[jnp.maximum(ids, 0)]
        if not inputs[name].table:
            return taken
        exists = (ids >= 0).reshape(-1, *[1] * (taken.ndim - 1))
        return jnp.where(exists, taken, PADDING)

    return {name: take(name, values) for name, values in item_features.items()}


def log_expected_count(
    sampling: NegativeSampling,
    frequency: dict[str, Any],
    popularity: AliasTable | None,
    queued: int | Float[Array, ""],
    ids: Int[Array, "..."],
    own: jax.Array | None = None,
) -> Float[Array, "..."]:
    """Returns the log of the number of times that the sources of a step are expected to yield each
    id, summed over the sources; 0 if the loss is not corrected.

    Args:
        sampling: Sources of negatives.
        frequency: State of the frequency estimator of items.
        popularity: Table that popular items are drawn from; None without that source.
        queued: Number of entries of the queue in use.
        ids: Items of any shape.
        own: Log of the expected counts that a source of one query alone adds, of the shape of
            `ids`.
    """
    config = sampling.config
    if not sampling.corrected:
        return jnp.zeros(ids.shape)
    sources: list[LogExpectedCount] = []
    if config.catalogue:
        # Every item once, whatever the batch holds.
        sources.append(lambda ids: jnp.zeros(ids.shape))
    elif config.in_batch or config.queue:
        estimator = FREQUENCIES[config.frequency]
        # Rows of the batch and of the queue are draws from the same training rows.
        draws = sampling.batch_size * config.in_batch + queued
        sources.append(lambda ids: estimator.log_expected_count(frequency, ids, draws))
    if config.uniform:
        num = config.uniform
        items = sampling.items
        sources.append(lambda ids: negatives.uniform_log_expected_count(ids, num, items))
    if popularity is not None and config.popularity:
        sources.append(lambda ids: popularity.log_expected_count(ids, config.popularity))
    if own is not None:
        sources.append(lambda ids: own)
    # Padding is looked up as item 0; its logit is masked by its id.
    return negatives.mixed_log_expected_count(jnp.maximum(ids, 0), sources)


def gather_candidates(
    vectors: Sequence[jax.Array],
    ids: Sequence[jax.Array],
    query_ids: Sequence[jax.Array],
    group: DeviceGroup,
) -> tuple[Float[Array, "C D"], Int[Array, "C"], Int[Array, "C"]]:
    """Returns all devices' candidates: vectors, ids, and the query that each is a positive of.

    The parts are concatenated before they are gathered, all three alike, so that what belongs
    together stays together.
    """
    # An empty array is gathered by no collective.
    if not sum(map(len, ids)):
        group = SINGLE_DEVICE
    # One collective for both.
    both = jnp.stack([jnp.concatenate(ids), jnp.concatenate(query_ids)], axis=1)
    both = group.all_gather(both)
    # `gather` passes gradients back to the device that each vector came from; ids have none.
    return group.gather(jnp.concatenate(vectors)), both[:, 0], both[:, 1]


@runtime_checkable
class TrainingData(Protocol):
    """Parts of the prepared data that training reads; see
    `twotower.pipeline.prepare.PreparedData`."""

    @property
    def config(self) -> Config:
        """Configuration that the data was prepared by."""
        ...

    @property
    def users(self) -> Sized:
        """All users, U rows."""
        ...

    @property
    def items(self) -> Sized:
        """Items of the corpus, N rows."""
        ...

    @property
    def train(self) -> InteractionRows:
        """Training rows."""
        ...

    @property
    def features(self) -> Features:
        """Encoded features of users [U, ...] and items [N, ...]."""
        ...

    @property
    def num_positions(self) -> int:
        """Number of positions in a pass: rows, or all slots of packed sequences, filled or not."""
        ...

    def target_rates(self) -> np.ndarray | None:
        """Returns the expected number of times that a pass has each training row as a target
        [rows]; None means once."""
        ...

    @property
    def num_examples(self) -> int:
        """Number of examples in a pass: rows, or packed rows of whole sequences."""
        ...

    def training_examples(self) -> Examples:
        """Returns the examples that batches are made of."""
        ...


def step_constants(
    sampling: NegativeSampling, data: TrainingData, mesh: Mesh, resident: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the arrays of the corpus that steps read and never change, on every device.

    Args:
        sampling: Sources of negatives, which decide the arrays.
        data: Prepared data.
        mesh: Devices of the run.
        resident: Training data that is on the devices already; None if batches come from the host.

    Returns:
        "item_features" {name: [N, ...]}, "popularity" (an alias table) and "explicit" (pools of
        hard negatives), as far as they are used.
    """
    config = sampling.config
    constants: dict[str, Any] = {}
    if sampling.needs_features:
        # The resident data has the same features: they are not put on the devices twice.
        if resident:
            constants["item_features"] = resident["item_features"]
        else:
            constants["item_features"] = put(mesh, dict(data.features["item"]), REPLICATED)
    if config.popularity:
        table = popularity_table(count_rows(data)["item"], config.alpha)
        constants["popularity"] = put(mesh, table, REPLICATED)
    # Of training rows alone: what a user disliked later is not known yet.
    if config.explicit:
        labels = data.train.labels[data.config.objective.label]
        pools = explicit_pools(data.train, labels, num_users=len(data.users))
        constants["explicit"] = put(mesh, pools, REPLICATED)
    return constants


def count_rows(data: TrainingData) -> dict[str, np.ndarray]:
    """Returns the number of training rows of each user ("user", [U]), of each item of the corpus
    ("item", [N]) and in all ("rows"), float32.

    With packed sequences these are the expected numbers of times that a pass has each as a target,
    and in all the number of positions of a pass, filled or not.
    """
    sizes = {"user": len(data.users), "item": len(data.items)}
    # None, and every row counts once, unless the examples are sequences.
    rates = data.target_rates()
    counts = {"rows": np.asarray(data.num_positions, np.float32)}
    for side, size in sizes.items():
        ids = getattr(data.train, side)
        if rates is None:
            rows = count_values(ids, size)
        else:
            rows = np.bincount(ids, rates, minlength=size)
        counts[side] = rows.astype(np.float32)
    return counts


def corpus_size(data: TrainingData) -> CorpusSize:
    """Returns the sizes of the corpus."""
    # By targets: an item that all crops leave out is never one, and learns as little.
    unseen = int((count_rows(data)["item"] == 0).sum())
    return CorpusSize(len(data.users), len(data.items), unseen)
