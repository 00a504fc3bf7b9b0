"""The shards of prepared data, beside its arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from twotower.core.files import content_digest
from twotower.pipeline import folder as data_folder
from twotower.pipeline.prepare import PreparedData
from twotower.pipeline.streaming import shards


def shard_folder(prepared: PreparedData, data: Path) -> Path:
    """Returns the folder of the shards of prepared data.

    Args:
        prepared: The data.
        data: Its folder, or one that names it.
    """
    training = prepared.config.training
    made_from: dict[str, Any] = {
        "version": shards.VERSION,
        # By content: data that was prepared again alike keeps its shards.
        "content": data_folder.content_of(data),
        "examples": training.examples,
    }
    if prepared.packing is not None:
        # Packing depends on both, and records on the packing.
        made_from |= {"crop": training.crop, "seed": training.seed}
    return data_folder.resolve(data) / "shards" / content_digest(made_from)[:12]


def write_shards(prepared: PreparedData, data: Path) -> Path:
    """Writes the shards of prepared data that are missing, in all processes together, and returns
    their folder.

    Args:
        prepared: The data.
        data: Its folder, or one that names it.
    """
    folder = shard_folder(prepared, data)
    is_whole = shards.is_whole(folder)
    if jax.process_count() > 1:
        # What the first one sees: the others must not wait for a writing that does not begin.
        is_whole = bool(multihost_utils.broadcast_one_to_all(np.int32(is_whole)))
    if is_whole:
        return folder
    records = prepared.training_records()
    first = jax.process_index() == 0
    if first:
        logging.info("Writing %d %s to %s ...", len(records), records.name, folder)
    # Each process writes every so many files: the first alone would let the others wait.
    shards.write(records, folder, part=jax.process_index(), parts=jax.process_count())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all shards are written")
        if first:
            shards.finish(records, folder)
        multihost_utils.sync_global_devices("the shards are whole")
    return folder
