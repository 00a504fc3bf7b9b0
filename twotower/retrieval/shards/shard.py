"""One shard of a divided bundle: its own items, and nothing of users or towers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twotower.config import from_dict
from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError
from twotower.core.files import check_files, current_version
from twotower.index.base import Index
from twotower.retrieval.bundle import (
    bundle_errors,
    indexed_vectors,
    load_part,
    lost_index_files,
    read_items,
    read_manifest,
    shard_name,
)
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.retrieval.live.log import check_unchanged
from twotower.retrieval.live.snapshot import Snapshot
from twotower.retrieval.shards.remote import ShardQuery

WARMED_LENGTHS = (10, 100)  # lists that are searched before a shard says it is ready
WARMED_EXCLUSIONS = 1_024  # items up to which a warm search leaves some out


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """The items of one shard.

    Attributes:
        number: Number of the shard, from 0.
        count: Number of shards of the bundle.
        manifest: Manifest of the bundle.
        index: Index over the shard's items.
        snapshot: The items, as they were exported.
    """

    number: int
    count: int
    manifest: Mapping[str, Any]
    index: Index
    snapshot: Snapshot

    @classmethod
    def load(cls, folder: str | os.PathLike, number: int) -> Shard:
        """Reads one shard of a bundle: its folder, config.json and manifest.json alone.

        Args:
            folder: Folder of the bundle.
            number: Number of the shard, from 0.

        Raises:
            BundleError: The bundle, or the shard, is not whole.
            ConfigError: The bundle is not divided so, or has been changed since its export.
        """
        home = Path(folder).absolute()
        with bundle_errors(home):
            files = current_version(home)
            manifest = read_manifest(files)
            count = manifest.get("shards", 0)
            if not 0 <= number < count:
                has = f"{count} shards, from 0 on" if count else "no shards"
                raise ConfigError(
                    f"--shard={number}: {home} has {has}. `twotower export --shards=S` divides a "
                    "bundle."
                )
            # Shards do not read the log of changes: their answers would be of the export.
            check_unchanged(files, manifest)
            part = shard_name(number)
            lost = lost_index_files(files, manifest)
            names = [name for name in manifest["files"] if name.startswith(f"{part}/")]
            # Not the rest of the bundle: a machine of one shard need not hold the others.
            read = ["config.json", *(name for name in names if name not in lost)]
            check_files(files, {name: manifest["files"][name] for name in read})
            config = from_dict(json.loads((files / "config.json").read_text(encoding="utf-8")))
            vectors, items, counts = read_items(files / part, config)
            indexed = indexed_vectors(config, vectors, counts)
            index = load_part(files, part, manifest, lost, indexed)
        # A catalogue that never changes, for its snapshot has all conditions and exclusions.
        catalogue = LiveCatalogue.build(index, vectors, items, counts)
        return cls(number, count, manifest, index, catalogue.snapshot)

    def search(self, query: ShardQuery) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best items of the shard: scores [B, L] and their rows int64 [B, L], -1 where
        there are no more."""
        return self.snapshot.search(
            query.queries,
            query.k,
            exclude=query.exclude,
            where=query.where,
            only=query.only,
            cosine=query.cosine,
        )

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of rows of the shard, float32 [M, D]."""
        return self.snapshot.vectors(rows)

    def warm(self) -> None:
        """Searches once for lists of each usual length, so that no request waits for a compiler."""
        query = np.eye(1, self.manifest["dim"], dtype=np.float32)
        for k in WARMED_LENGTHS:
            excluded = 0
            while excluded <= min(WARMED_EXCLUSIONS, len(self.snapshot)):
                rows = np.arange(excluded, dtype=np.int32)
                self.search(ShardQuery(query, k, Ragged.one(rows)))
                # Powers of two, for which exact search is compiled.
                excluded = max(1, 2 * excluded)
