"""The protocol of an index, and the checks that every kind makes of its input.

ScaNN answers a query that is not finite with arbitrary items and no error, so every kind checks its
queries before it searches.
"""

from __future__ import annotations

import abc
import numbers
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from twotower.config import RetrievalConfig
from twotower.core.arrays import Ragged
from twotower.core.arrow import as_matrix
from twotower.core.errors import ConfigError, QueryError, echo

TUNING_QUERIES = 2_000  # user vectors that an index is tuned and measured on, both together


@runtime_checkable
class Index(Protocol):
    """Item vectors that can be searched for those of greatest dot product.

    Attributes:
        kind: Key of `twotower.index.build.KINDS`.
        num_items: Number of vectors, N.
        dim: Width of the vectors, D.
        normalized: Whether the vectors have length 1, so that a query of length 0 is a mistake.
    """

    kind: str
    num_items: int
    dim: int
    normalized: bool

    def search(self, queries: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (nearly) best items of each query, best first.

        Args:
            queries: float [Q, D], finite.
            k: Length of the lists.

        Returns:
            (scores float32 [Q, L], rows int32 [Q, L]), where L is `k`, or the number of items if
            that is less; score -inf and row -1 where fewer than L items were found.

        Raises:
            QueryError: A query is of the wrong width, not finite, or zero where vectors are
                normalised.
            ConfigError: `k` is no whole number, or below 1.
        """
        ...

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Writes everything that cannot be built from the vectors in a moment.

        Returns:
            Settings to keep in index.json: "kind", "num_items", "dim", "normalized" and all else
            that loading needs.
        """
        ...


class LibraryIndex(Index, Protocol):
    """An index that another library builds and searches."""

    @classmethod
    def build(
        cls,
        vectors: ArrayLike,
        config: RetrievalConfig,
        *,
        kind: str,
        queries: ArrayLike,
        normalized: bool = False,
        popularity: np.ndarray | None = None,
        leaves_per_root: int | None = None,
    ) -> Index:
        """Builds the index, the same each time, and finds how hard it must search.

        Args:
            vectors: float [N, D], finite.
            config: Recall that the index must reach, usual length of the lists, and how a graph is
                built.
            kind: Key of `twotower.index.build.LIBRARIES`.
            queries: float [Q, D], user vectors to tune on.
            normalized: Whether the vectors have length 1.
            popularity: Popularity of each item, [N], for the recall of each decile; see
                `twotower.index.tuning.tune`.
            leaves_per_root: Leaves of a tree, or lists of an inverted file, in multiples of the
                square root of N; the kind's usual multiple by default. A graph has none.
        """
        ...

    @classmethod
    def load(cls, folder: str | os.PathLike, info: dict[str, Any]) -> Index:
        """Returns the index that `save` wrote.

        Args:
            folder: Folder of the index.
            info: Content of its index.json.

        Raises:
            BadIndexError: It cannot be read.
            ImportError: The library is missing.
        """
        ...

    @staticmethod
    def import_library(kind: str) -> Any:
        """Returns the library's module.

        Raises:
            ImportError: It is missing; the message names what to do.
        """
        ...


# By these two it is told what is divided, and where its items are: the modules that divide an index
# and ask other processes are loaded for the few bundles that need them.


class ShardedIndex(abc.ABC):
    """What an index in shards has beside an `Index`; see `twotower.index.shards.divided`.

    Attributes:
        parts: Index of each shard.
        rows: Rows of each shard's items in the whole, int64 [N_s] each, rising.
        is_exact: Whether all shards compare all their items.
    """

    dim: int
    normalized: bool
    parts: tuple[Index, ...]
    rows: tuple[np.ndarray, ...]
    is_exact: bool

    @abc.abstractmethod
    def search(
        self, queries: ArrayLike, k: int, *, exclude: Ragged | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (nearly) best items of each query, best first; see `Index.search`.

        Args:
            queries: float [Q, D], finite.
            k: Length of the lists.
            exclude: Rows that must not come back, one list a query; of exact shards alone.
        """


class RemoteSearch(abc.ABC):
    """What an index has beside an `Index` where other processes hold its items and their
    columns."""

    @abc.abstractmethod
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
        """Returns the best items that may come back, as
        `twotower.retrieval.live.snapshot.Snapshot.search` does.

        Args:
            queries: Query vectors, float32 [B, D].
            k: Length of the lists.
            exclude: Rows that must not come back, one list a query.
            where: Conditions that items must satisfy, (column, operator, value) each.
            only: Rows that may come back, int [M]; None for all.
            popularity_weight: Factor of an item's log count in its score.
            cosine: Whether cosines rank in the place of dot products.
        """


def empty_lists(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores of -inf and rows of -1, [Q, k] each."""
    scores = np.full((num_queries, k), -np.inf, np.float32)
    rows = np.full((num_queries, k), -1, np.int32)
    return scores, rows


def check_k(k: object, name: str = "k") -> int:
    """Returns a list length as an integer of Python.

    Args:
        k: Length.
        name: Name of it in messages.

    Raises:
        ConfigError: It is no whole number, or below 1.
    """
    # NumPy's integers too, of which asking takes a microsecond; a boolean is one for Python alone.
    if type(k) is not int and (isinstance(k, bool) or not isinstance(k, numbers.Integral)):
        raise ConfigError(
            f"{name}={echo(k)} must be a whole number of at least 1, not of type "
            f"{type(k).__name__!r}."
        )
    k = int(k)
    if k < 1:
        raise ConfigError(f"{name}={echo(k)} must be at least 1.")
    return k


def list_length(k: object, num_items: int) -> int:
    """Returns the length that lists of `k` among `num_items` items can have.

    Room is made for lists of that length: `k` alone may be anything that somebody types.

    Raises:
        ConfigError: `k` is no whole number, or below 1.
    """
    return min(check_k(k), num_items)


def check_scores(scores: np.ndarray) -> None:
    """Refuses NaN, which finite vectors give where products overflow to both infinities."""
    if np.isnan(scores).any():
        raise QueryError(
            "Scores overflow float32 to NaN; they cannot be ranked. The vectors are too long."
        )


def check_vectors(vectors: ArrayLike, *, what: str) -> np.ndarray:
    """Returns `vectors` as contiguous float32 [N, D].

    Args:
        vectors: float [N, D].
        what: Name of one of them in the message, such as "item".

    Raises:
        QueryError: The shape is another, or a vector is not finite; the message names the first.
    """
    # The one copy, where it is needed at all: every kind below takes contiguous float32.
    try:
        vectors = as_matrix(vectors)
    except ValueError as error:
        raise QueryError(f"{what} vectors must be rows of as many numbers each: {error}.") from None
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise QueryError(
            f"{what} vectors must be of shape [rows, width], not {list(vectors.shape)}."
        )
    # ScaNN ends the process on such vectors.
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise QueryError(
            f"{what} vector {int(finite.argmin())} is not finite "
            f"({int((~finite).sum())} of {len(vectors)} are not)."
        )
    return vectors


def check_queries(queries: ArrayLike, dim: int, *, normalized: bool = False) -> np.ndarray:
    """Returns `queries` as float32 [Q, D], and refuses those that have no best items.

    Args:
        queries: float [Q, D].
        dim: Width of the item vectors.
        normalized: Whether the item vectors have length 1.

    Raises:
        QueryError: The width is not `dim`, a query is not finite, or is zero although vectors are
            normalised.
    """
    # Nearly all queries take this way out; the checks below find the words for the others.
    if isinstance(queries, np.ndarray) and _passes_quick_check(queries, dim):
        return queries
    queries = check_vectors(queries, what="query")
    if queries.shape[1] != dim:
        raise QueryError(f"query vectors are {queries.shape[1]} wide; the items are {dim} wide.")
    # It scores all items alike: any list would be right, which hides what went wrong before.
    zero = ~queries.any(axis=1)
    if normalized and zero.any():
        raise QueryError(
            f"query vector {int(zero.argmax())} is zero although vectors are normalised."
        )
    return queries


def _passes_quick_check(queries: np.ndarray, dim: int) -> bool:
    """Whether one pass over the queries finds nothing wrong; if it does, they may still be fine.

    The pass takes a fraction of the time of a search. A sum of squares is NaN or infinite where a
    number is, and 0 for a vector of zeros.
    """
    # Another type or layout needs a copy, which `check_vectors` makes.
    if queries.dtype != np.float32 or not queries.flags.c_contiguous:
        return False
    if queries.ndim != 2 or queries.shape[1] != dim:
        return False
    # For one query a dot product costs less than the three calls below.
    if len(queries) == 1:
        return bool(0.0 < np.vdot(queries, queries) < np.inf)
    squares = np.einsum("qd,qd->q", queries, queries)
    return bool(((squares > 0.0) & (squares < np.inf)).all())


class Build(NamedTuple):
    """A way to build an index.

    Attributes:
        kind: Key of `twotower.index.build.KINDS`.
        leaves_per_root: Leaves in multiples of the square root of the number of items; None takes
            the kind's usual multiple.
    """

    kind: str
    leaves_per_root: int | None = None

    def __str__(self) -> str:
        if self.leaves_per_root is None:
            return self.kind
        return f"{self.kind} ({self.leaves_per_root} leaves for each of the root of N)"
