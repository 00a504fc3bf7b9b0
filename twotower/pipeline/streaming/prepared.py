"""The shards of prepared data, beside its arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from twotower.core.files import atomic, content_digest, discard, read_json
from twotower.pipeline import folder as data_folder
from twotower.pipeline.prepare import PreparedData
from twotower.pipeline.streaming import shards

# File beside shards that tells what they are made from.
_MADE_FROM = "made_from.json"


def _made_from(prepared: PreparedData, data: Path) -> dict[str, Any]:
    """Returns all that decides the records of prepared data, as JSON."""
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
    return made_from


def _folder_of(made_from: Mapping[str, Any], data: Path) -> Path:
    return data_folder.resolve(data) / "shards" / content_digest(made_from)[:12]


def _discard_stale(shards_folder: Path, made_from: Mapping[str, Any]) -> None:
    """Deletes shards of data that the folder no longer holds, or of another version.

    Those of another packing of the same data belong to other runs that share it.

    Args:
        shards_folder: Folder of all shards of the data.
        made_from: What those of the data as it is now are made from.
    """
    for path in shards_folder.glob(f"*/{_MADE_FROM}"):
        before = read_json(path)
        if any(before.get(name) != made_from[name] for name in ("version", "content")):
            logging.info("%s: shards of data that is no longer here are deleted.", path.parent)
            # The record last: a folder that was deleted in part is deleted the next time.
            for other in path.parent.iterdir():
                if other != path:
                    discard(other)
            discard(path.parent)


def write_shards(prepared: PreparedData, data: Path) -> Path:
    """Writes the shards of prepared data that are missing, in all processes together, and returns
    their folder.

    Args:
        prepared: The data.
        data: Its folder, or one that names it.
    """
    made_from = _made_from(prepared, data)
    folder = _folder_of(made_from, data)
    first = jax.process_index() == 0
    if first:
        _discard_stale(folder.parent, made_from)
    is_whole = shards.is_whole(folder)
    if jax.process_count() > 1:
        # What the first one sees: the others must not wait for a writing that does not begin.
        is_whole = bool(multihost_utils.broadcast_one_to_all(np.int32(is_whole)))
    if is_whole:
        return folder
    records = prepared.training_records()
    if first:
        # First: shards that are never finished are told apart as well.
        with atomic(folder / _MADE_FROM) as temporary:
            temporary.write_text(json.dumps(made_from) + "\n", encoding="utf-8")
        logging.info("Writing %d %s to %s ...", len(records), records.name, folder)
    # Each process writes every so many files: the first alone would let the others wait.
    shards.write(records, folder, part=jax.process_index(), parts=jax.process_count())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all shards are written")
        if first:
            shards.finish(records, folder)
        multihost_utils.sync_global_devices("the shards are whole")
    return folder
