"""The items of shards that other processes hold: a router's index, and its vectors.

They stand in a bundle in the place of the index and the item vectors, neither of which a router has
in memory. A shard knows its items by their rows in it; here they are rows of the whole.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import ArrayLike

from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError
from twotower.index.base import (
    RemoteSearch,
    check_queries,
    check_scores,
    empty_lists,
    list_length,
)
from twotower.index.shards.divided import find_rows, merge_lists, rows_of_whole, rows_within

# (column, operator, value) each; see `twotower.retrieval.live.conditions`.
Conditions = tuple[tuple[str, str, Any], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ShardQuery:
    """A search among the items of one shard.

    Attributes:
        queries: Query vectors, float32 [B, D].
        k: Length of the lists.
        exclude: Rows of the shard that must not come back, one list a query.
        where: Conditions that items must satisfy.
        only: Rows of the shard that may come back, int [M]; None for all.
        cosine: Whether cosines rank in the place of dot products.
    """

    queries: np.ndarray
    k: int
    exclude: Ragged
    where: Conditions = ()
    only: np.ndarray | None = None
    cosine: bool = False


class Shards(Protocol):
    """The shards of a bundle in other processes."""

    def search(
        self, queries: Sequence[ShardQuery]
    ) -> Sequence[tuple[np.ndarray, np.ndarray] | None]:
        """Returns what each shard finds: scores [B, M] and its rows [B, M], -1 where none is.

        Args:
            queries: Query of each shard.

        Returns:
            None in the place of a shard that does not answer in time.
        """
        ...

    def vectors(self, rows: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Returns the vectors of rows of each shard, float32 [M_s, D] each.

        Args:
            rows: Rows of each shard, int [M_s] each.
        """
        ...


class RemoteIndex(RemoteSearch):
    """The search among the items of all shards, with the contract of `Index.search`.

    Attributes:
        kind: "shards".
        num_items: Number of items of all shards.
        dim: Width of the vectors.
        normalized: Whether the vectors have length 1.
    """

    kind = "shards"

    def __init__(self, shards: Shards, rows: Sequence[np.ndarray], dim: int, *, normalized: bool):
        """Joins shards.

        Args:
            shards: Shards in other processes.
            rows: Rows of each shard's items in the whole, int64 [N_s] each, rising.
            dim: Width of the vectors.
            normalized: Whether the vectors have length 1.
        """
        self._shards = shards
        self._rows = rows
        self.num_items = sum(map(len, rows))
        self.dim = dim
        self.normalized = normalized

    def search(self, queries: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best items of each query, best first; see `Index.search`."""
        return self.search_items(check_queries(queries, self.dim), k)

    def search_items(
        self,
        queries: np.ndarray,
        k: int,
        *,
        exclude: Ragged | None = None,
        where: Sequence[tuple[str, str, Any]] = (),
        only: np.ndarray | None = None,
        popularity_weight: float = 0.0,
        cosine: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best items that may come back; see `Snapshot.search`.

        Raises:
            ConfigError: The weight of popularity is not 0.
        """
        # The scale of that coordinate is one of all items, which a shard does not see.
        if popularity_weight:
            raise ConfigError(
                f"popularity_weight={popularity_weight} is not answered by shards in processes of "
                "their own. Leave it out, or serve the bundle in one process."
            )
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        k = list_length(k, self.num_items)
        if not k:
            return empty_lists(len(queries), 0)
        if exclude is None:
            exclude = Ragged.empty(len(queries))
        # Each shard gets what concerns its own items, by its own rows.
        asked = []
        for rows in self._rows:
            own_only = None
            if only is not None:
                _, own_only = find_rows(only, rows)
            own = rows_within(exclude, rows)
            asked.append(ShardQuery(queries, k, own, tuple(where), own_only, cosine))
        # In front, so that there is a list to merge where no shard answers in time.
        lists = [empty_lists(len(queries), k)]
        for rows, found in zip(self._rows, self._shards.search(asked), strict=True):
            # The others answer: a list of most items is better than none.
            if found is not None:
                scores, own_rows = found
                lists.append((scores, rows_of_whole(own_rows, rows)))
        scores, best = merge_lists(k, lists)
        check_scores(scores)
        return scores, best

    def save(self, folder: str | os.PathLike) -> NoReturn:
        """Refuses: the shards have the index."""
        raise NotImplementedError("The index is in the shards.")


class RemoteVectors:
    """Item vectors [N, D] that shards hold, read by rows."""

    dtype = np.dtype(np.float32)

    def __init__(self, shards: Shards, rows: Sequence[np.ndarray], dim: int):
        """Joins shards.

        Args:
            shards: Shards in other processes.
            rows: Rows of each shard's items in the whole, int64 [N_s] each, rising.
            dim: Width of the vectors.
        """
        self._shards = shards
        self._rows = rows
        self.shape = (sum(map(len, rows)), dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        # As an array has it, for whoever reads blocks.
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        # A number, a list or a matrix of rows: shards are asked for a list.
        wanted = rows.reshape(-1)
        vectors = np.zeros((len(wanted), self.shape[1]), np.float32)
        if len(wanted):
            matches = [find_rows(wanted, own) for own in self._rows]
            parts = self._shards.vectors([own_rows for _, own_rows in matches])
            for (is_inside, _), found in zip(matches, parts, strict=True):
                vectors[is_inside] = found
        return vectors.reshape(*rows.shape, self.shape[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        # NumPy would ask for all vectors, and all shards for all that they have.
        raise ConfigError("A router has no item vectors: the shards have them.")
