"""Refusals that the configuration alone cannot decide: they need registries, devices or data.

All run before anything is allocated, and those that need no data before it is read. The ranges of
options are in `twotower.config`, rules across its sections in `twotower.config_rules`. The last
check is that a run fits in the memory of its devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from twotower.config import Config, NegativesConfig, ObjectiveConfig, TrainingConfig
from twotower.core.errors import ConfigError, choose
from twotower.core.mesh import AnyMesh
from twotower.kernels.table_optimizers import TABLE_OPTIMIZERS
from twotower.objectives.frequency import FREQUENCIES
from twotower.objectives.losses import (
    LOSSES,
    POINTWISE_LOSS,
    binary_cross_entropy,
    loss_options,
)
from twotower.towers.history import BLOCKS, HISTORIES
from twotower.towers.layers import ACTIVATIONS
from twotower.towers.tower import tower_options
from twotower.training.optimizers import DENSE, SCHEDULES

# Endings and beginnings of the metrics that cannot choose the best checkpoint, which has the
# greatest value.
SMALLER_IS_BETTER = ("/log_loss", "/calibration", "/calibration_error", "/rows")
COUNTS = (
    "never_trained",
    "short_list",
    "gini",
    "average_popularity",
    "popularity_lift",
    "repeated_list",
    "queries",
)


def check_kinds(config: Config) -> None:
    """Refuses unknown kinds, and options that do not go with the kinds chosen.

    Raises:
        ConfigError: The first such option, with the nearest kind or the options it goes with.
    """
    training = config.training
    objective = config.objective
    model = config.model
    # Each dictionary is the one that the kind is looked up in later: a new entry is known at once.
    LOSSES.check_lost(objective.loss, "config.objective.loss")
    known_losses = {**LOSSES, POINTWISE_LOSS: binary_cross_entropy}
    choose(known_losses, objective.loss, "config.objective.loss", synonyms=LOSSES.synonyms)
    # For its refusals alone; what it returns is made once more where the loss is.
    loss_options(objective)
    choose(FREQUENCIES, objective.negatives.frequency, "config.objective.negatives.frequency")
    DENSE.choose(training.optimizer.kind, "config.training.optimizer.kind")
    choose(TABLE_OPTIMIZERS, training.tables.kind, "config.training.tables.kind")
    choose(SCHEDULES, training.schedule.kind, "config.training.schedule.kind")
    HISTORIES.choose(model.history.kind, "config.model.history.kind")
    choose(BLOCKS, model.history.block, "config.model.history.block")
    for side, tower in (("user", model.user), ("item", model.item)):
        choose(ACTIVATIONS, tower.activation, f"config.model.{side}.activation")
        tower_options(tower, f"config.model.{side}")
    # After the kinds: an option of an unknown kind would be called one that nothing reads.
    _check_optimizer(training)
    _check_labels(objective)
    _check_sources(objective)
    _check_parts(config)
    _check_loss(objective, learn_temperature=model.learn_temperature)


def _check_optimizer(training: TrainingConfig) -> None:
    # A decay that no optimizer applies would be a silent option.
    kind = training.optimizer.kind
    decay = training.optimizer.weight_decay
    if decay and kind != "adamw":
        raise ConfigError(
            f"config.training.optimizer.weight_decay={decay} needs kind='adamw', not {kind!r}."
        )
    # Its range is checked here, since other schedules do not read it.
    schedule = training.schedule
    if schedule.kind == "plateau" and not 0 < schedule.factor < 1:
        raise ConfigError(
            f"config.training.schedule.factor={schedule.factor} must be above 0 and below 1 for "
            "kind='plateau': 0.5, say, halves the learning rates each time."
        )


def _check_labels(objective: ObjectiveConfig) -> None:
    """Refuses a loss or a source of negatives that needs labels, without a column of labels."""
    if objective.label:
        return
    if objective.loss == POINTWISE_LOSS:
        raise ConfigError(
            f"config.objective.loss={objective.loss!r} learns from labels, and "
            "config.objective.label is empty: name the column of the interactions that holds 0 or "
            "1, or choose a loss that needs positives alone, such as 'softmax'."
        )
    if objective.negatives.explicit:
        raise ConfigError(
            f"config.objective.negatives.explicit={objective.negatives.explicit} draws from rows "
            "whose label is 0, and config.objective.label is empty: name the column of the "
            "interactions that holds 0 or 1."
        )


def uses_negatives(objective: ObjectiveConfig) -> bool:
    """Returns whether the loss compares a positive with negatives, and is trained at all."""
    # With weight 0 the heads alone are trained.
    return objective.loss != POINTWISE_LOSS and bool(objective.weight)


def _check_sources(objective: ObjectiveConfig) -> None:
    """Refuses negatives that no loss uses, and a loss without any."""
    negatives = objective.negatives
    sources = (
        # -1 decides by the corpus, which is not known yet.
        negatives.uniform > 0,
        negatives.popularity,
        negatives.catalogue,
        negatives.queue,
        negatives.mined,
        negatives.explicit,
    )
    # `in_batch` is left out: it is on by default, also for losses without negatives.
    has_sources = any(sources)
    if has_sources and not uses_negatives(objective):
        raise ConfigError(
            f"config.objective.negatives has sources that loss={objective.loss!r} with "
            f"weight={objective.weight} never uses."
        )
    if uses_negatives(objective) and not has_sources and not negatives.in_batch:
        raise ConfigError(
            "config.objective.negatives has no source: set in_batch=True, or how many to draw by "
            "uniform or popularity, or catalogue=True."
        )


def _check_parts(config: Config) -> None:
    """Refuses a batch in parts for a model or a loss that needs the whole batch at once."""
    training = config.training
    model = config.model
    if training.accumulate > 1 and uses_negatives(config.objective):
        raise ConfigError(
            f"config.training.accumulate={training.accumulate} with "
            f"loss={config.objective.loss!r}: a batch computed in parts has the negatives of one "
            "part, not of the whole, so it is not the larger batch that it seems. The loss is "
            "computed in blocks and never holds [B, C] scores: raise "
            f"config.training.batch_size={training.batch_size} itself; leave accumulate at 1."
        )
    # All items are embedded in blocks, none of which has the statistics of the batch.
    in_parts = training.accumulate > 1 or config.objective.negatives.catalogue
    if in_parts and (model.user.batch_norm or model.item.batch_norm):
        raise ConfigError(
            "config.model with batch_norm=True needs a batch that is computed at once: leave "
            "config.training.accumulate at 1 and config.objective.negatives.catalogue at False, or "
            "choose layer_norm."
        )


def _check_loss(objective: ObjectiveConfig, *, learn_temperature: bool) -> None:
    """Refuses options that the loss does not read, and those without which it learns nothing."""
    name = objective.loss
    loss = LOSSES.get(name)  # None for a pointwise loss
    constants = ()
    if loss is not None:
        constants = loss.constants
    read = {
        "positive_temperature": loss is not None and loss.bilateral,
        "calibration": "calibration" in constants,
        "pos_weight": loss is None,
        "negative_weight": "negative_weight" in constants,
        "margin": loss is not None,
        "symmetric": loss is not None,
    }
    for field, is_read in read.items():
        # A value other than the default was set on purpose.
        value = getattr(objective, field)
        if not is_read and value != getattr(ObjectiveConfig(), field):
            raise ConfigError(
                f"config.objective.{field}={value} is not read by loss={name!r}: leave one of them "
                "out."
            )
    # Its positive stands outside the sum, so that nothing holds the temperature.
    if loss is not None and loss.bilateral and learn_temperature:
        raise ConfigError(
            f"config.objective.loss={name!r} falls without bound as the temperature does: set "
            "config.model.learn_temperature=False."
        )
    # Equal vectors have a loss of `margin`, and of 0 without one.
    if name in ("hinge", "triplet") and not objective.margin:
        raise ConfigError(
            f"config.objective.margin=0.0 with loss={name!r} is met by vectors that are all alike: "
            "set, say, 0.2."
        )


def check_matryoshka(widths: tuple[int, ...], dim: int) -> None:
    """Refuses widths of cut vectors that are equal, or not below that of the vectors.

    Args:
        widths: Option `config.objective.matryoshka`.
        dim: D, width of the vectors.
    """
    # The whole width is always trained, and would count twice.
    in_range = all(0 < width < dim for width in widths)
    if not in_range or len(set(widths)) < len(widths):
        raise ConfigError(
            f"config.objective.matryoshka={widths} must be different widths below that of the "
            f"vectors, {dim}: for example ({dim // 2}, {dim // 4})."
        )


def check_negatives(negatives: NegativesConfig, *, items: int, batch_size: int) -> None:
    """Refuses sources of more items than the corpus or a pool has.

    Args:
        negatives: Sources of negatives, with `uniform` decided.
        items: N, number of items of the corpus.
        batch_size: B, number of rows of a batch over all devices; with packed sequences, of
            positions.
    """

    def check(ok: bool, field: str, cure: str) -> None:
        if not ok:
            value = getattr(negatives, field)
            raise ConfigError(f"config.objective.negatives.{field}={value!r} {cure}")

    for field in ("uniform", "popularity"):
        cure = (
            f"is more than the {items} items of the corpus: draw at most {items}, or take all of "
            "them by catalogue=True."
        )
        check(getattr(negatives, field) <= items, field, cure)
    # The queue takes whole batches; see `objectives.negatives.push`.
    nearest = max(1, round(negatives.queue / batch_size)) * batch_size
    cure = f"must be a multiple of the batch size {batch_size}, such as {nearest}."
    check(negatives.queue % batch_size == 0, "queue", cure)
    if negatives.mined:
        first, last = negatives.mined_ranks
        cure = f"reaches beyond the {items} items of the corpus: end it at {items} or before."
        check(last <= items, "mined_ranks", cure)
        pool = last - first
        cure = (
            f"is more than the {pool} items of a pool: draw at most {pool}, or widen mined_ranks."
        )
        check(negatives.mined <= pool, "mined", cure)


def check_miner(negatives: NegativesConfig, has_miner: bool) -> None:
    """Refuses mined negatives without a function that ranks the items."""
    if negatives.mined and not has_miner:
        raise ConfigError(
            f"config.objective.negatives.mined={negatives.mined} needs a function that ranks "
            "items: pass make_miner (twotower.retrieval.mining.make_miner), as twotower.api.train "
            "does."
        )


def check_batch(training: TrainingConfig, mesh: AnyMesh) -> None:
    """Refuses a batch that cannot be divided evenly over the devices.

    The rows of each device must also be divisible into the parts they are computed in.
    """
    size = training.batch_size
    parts = training.accumulate
    devices = mesh.size
    # All devices run one program of one shape.
    if size % devices:
        below = size // devices * devices
        near = f"{devices}"
        if below:
            near = f"{below} or {below + devices}"
        raise ConfigError(
            f"config.training.batch_size={size} cannot be divided evenly over {devices} devices: "
            f"choose {near}, or --devices={math.gcd(size, devices)}."
        )
    if size // devices % parts:
        raise ConfigError(
            f"config.training.accumulate={parts} must divide the {size // devices} rows of "
            f"config.training.batch_size={size} that each of {devices} devices has."
        )


def check_batch_norm(
    config: Config, negatives: NegativesConfig, devices: int, *, max_rows: int
) -> None:
    """Refuses batch normalisation over a part of a batch, or over padding.

    Args:
        config: Configuration of the run.
        negatives: Sources of negatives, with `uniform` decided.
        devices: Number of devices that divide the batch.
        max_rows: Number of rows that a device embeds at once.
    """
    size = config.training.batch_size
    hard = negatives.mined + negatives.explicit
    samples = negatives.uniform + negatives.popularity
    # The batch's items, the shared samples and the hard negatives are embedded together.
    items = size * (1 + hard) + samples
    # Rounded up: the device with the most decides.
    rows = {"user": size // devices, "item": -(-items // devices)}
    for side, tower in (("user", config.model.user), ("item", config.model.item)):
        if tower.batch_norm and rows[side] > max_rows:
            raise ConfigError(
                f"config.model.{side}.batch_norm=True needs a batch that is embedded at once, at "
                f"most {max_rows:,} rows a device; there are {rows[side]:,}. Choose a smaller "
                "batch, more devices, or layer_norm."
            )
    # What follows is of the items that a step embeds besides those of its rows.
    if not config.model.item.batch_norm:
        return
    if hard:
        raise ConfigError(
            "config.model.item.batch_norm=True with mined or explicit negatives would count the "
            "empty slots of users who have none: choose layer_norm."
        )
    # Samples that cannot be divided are filled up with padding, which would count as items.
    if samples % devices:
        raise ConfigError(
            f"config.objective.negatives.uniform={negatives.uniform} and "
            f"popularity={negatives.popularity} draw {samples} items, which cannot be divided "
            f"evenly over {devices} devices, and batch_norm of the item tower would count the "
            f"padding. Draw {max(samples // devices, 1) * devices} in all, or choose layer_norm."
        )


def check_metric(values: Mapping[str, float], metric: str) -> None:
    """Refuses a metric that cannot choose the best checkpoint.

    Args:
        values: Metrics of a validation; one before the first step lets a misspelt metric cost
            seconds instead of an hour.
        metric: Option `config.training.metric`.
    """
    if metric not in values:
        raise ConfigError(
            f"config.training.metric={metric!r} is not measured. Measured: {', '.join(values)}."
        )
    if metric.endswith(SMALLER_IS_BETTER) or metric.startswith(COUNTS):
        raise ConfigError(
            f"config.training.metric={metric!r} is not larger for a better model; recall@10 is, "
            "say."
        )


def check_memory(mesh: Mesh, state: Any, resident: Mapping[str, int]) -> None:
    """Logs the bytes on each device of a mesh, and refuses a run that needs more than are free.

    Args:
        mesh: Devices of the run.
        state: `TrainState` of `jax.ShapeDtypeStruct` with shardings.
        resident: Name -> bytes that every device holds whole, such as data.

    Raises:
        ConfigError: The run does not fit; the message has the arithmetic.
    """
    sizes = _state_sizes(state, mesh.size)
    sizes |= {name: count for name, count in resident.items() if count}
    # Activations and temporary arrays are left out: their size is known only after compiling.
    needed = bytes_on_each(state) + sum(resident.values())
    devices = "device" if mesh.size == 1 else "devices"
    total = f"{format_bytes(needed)} on each of {mesh.size} {devices}"
    # The largest alone: with a dozen tables nobody reads what each of them takes.
    largest = max(sizes, key=sizes.__getitem__)
    size = format_bytes(sizes[largest])
    logging.info("Memory before activations: %s, of which %s takes %s.", total, largest, size)
    limit = _free_bytes(mesh)
    # Before anything is allocated: an accelerator that runs out says how much, and not of what.
    if limit is not None and needed > limit:
        # As if all of it were divided, which the tables nearly are.
        factor = -(-needed // max(limit, 1))
        parts = "; ".join(f"{name}: {format_bytes(count)}" for name, count in sizes.items())
        raise ConfigError(
            f"The run needs {total}, and {format_bytes(limit)} is free. It holds: {parts}. "
            f"Divide the tables over more devices (about {factor * mesh.size}), choose "
            "config.training.tables.kind='rowwise_adagrad' (one number of state a row), narrower "
            "embeddings (embedding_size) or fewer rows (min_count)."
        )


def fits(mesh: Mesh, state: Any) -> bool:
    """Returns whether each device of a mesh has room for its part of a state; see
    `check_memory`."""
    limit = _free_bytes(mesh)
    return limit is None or bytes_on_each(state) <= limit


def bytes_on_each(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # A replicated array is whole on each device, a sharded one in part.
        part = leaf.sharding.shard_shape(leaf.shape)
        # In int64: a table of 2^31 numbers is no rarity.
        total += int(np.prod(part, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def _state_sizes(state: Any, devices: int) -> dict[str, int]:
    """Returns the bytes on each device of each table, and of each kind of other array."""
    sizes = {}
    divided = f", divided over {devices}" if devices > 1 else ""
    for name, table in state.tables.items():
        rows, width = table.shape
        # Of its own, "table" may be read as its numbers alone: the optimizer's may be twice these.
        title = f"table {name} ({rows:,} x {width}) with its optimizer's state{divided}"
        sizes[title] = bytes_on_each(state.table_slots[name]) + bytes_on_each(table)
    dense = (state.params, state.opt_state, state.batch_stats)
    sizes["dense parameters and their optimizer"] = bytes_on_each(dense)
    sampling = (state.frequency, state.negatives)
    sizes["frequencies and kept negatives"] = bytes_on_each(sampling)
    return sizes


def _free_bytes(mesh: Mesh) -> int | None:
    """Returns the bytes that one device may use; None if the machine does not say."""
    # Devices of other processes cannot be asked for their memory.
    process = jax.process_index()
    devices = [device for device in mesh.devices.flat if device.process_index == process]
    if devices[0].platform != "cpu":
        stats = devices[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    # Devices of a CPU share its memory. "Available" includes the system's cache of files, such as
    # the log that was just read.
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            # In KiB.
            return int(line.split()[1]) * 1024 // len(devices)
    return None


def format_bytes(count: float) -> str:
    """Returns a number of bytes in the unit that suits it."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
