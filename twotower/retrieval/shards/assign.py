"""The shard of an item: a hash of its id.

Item `id` is in shard `hash64(id) % shards`, where `twotower.features.vocabulary.hash64` hashes the
UTF-8 bytes of the id, the same in every process and on every machine. A new item has the shard of
its id, whatever else is in the corpus, and shards differ in size by chance alone.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.features.vocabulary import hash64


def shards_of(ids: pa.ChunkedArray, shards: int) -> np.ndarray:
    """Returns the shard of each item, int64 [N].

    Args:
        ids: Ids of the items, texts.
        shards: Number of shards.
    """
    hashes = [hash64(chunk.cast(pa.large_string())) for chunk in ids.chunks]
    joined = np.concatenate([np.zeros(0, np.uint64), *hashes])
    return (joined % np.uint64(shards)).astype(np.int64)


def rows_of_shards(ids: pa.ChunkedArray, shards: int) -> list[np.ndarray]:
    """Returns the rows of the items of each shard, int64 [N_s] each, rising.

    Args:
        ids: Ids of the items, texts.
        shards: Number of shards.

    Raises:
        ConfigError: There are more shards than items.
    """
    # An empty shard would be a process that serves nothing.
    if shards > max(len(ids), 1):
        raise ConfigError(
            f"--shards={shards} are more than the {len(ids)} items: some would be empty. Name "
            "fewer."
        )
    of_item = shards_of(ids, shards)
    return [np.flatnonzero(of_item == number) for number in range(shards)]
