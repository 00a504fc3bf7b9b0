"""What routers and shards say to each other: arrays as bytes, little-endian, in JSON.

The two are of one version of the package, and this is no part of the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError, echo
from twotower.data.operators import Members
from twotower.retrieval.shards.remote import Conditions, ShardQuery
from twotower.serving.errors import RequestError
from twotower.serving.types import MAX_CONDITIONS, Request

MAX_QUERIES = 4_096  # queries that are searched together
MAX_LENGTH = 100_000  # items of a list: a router asks for more than it shows
MAX_ROWS = 65_536  # rows whose vectors are asked for together
# The order of bytes is written down: router and shard need not run on one kind of processor.
VECTOR = np.dtype("<f4")
ROW = np.dtype("<i4")
OFFSET = np.dtype("<i8")


# Arrays as bytes, which JSON has as base64: numbers as text take several times the room and the
# time.
class Search(Request, kw_only=True):
    """A search among the items of a shard.

    Attributes:
        version: Version of the bundle that the router has.
        count: Number of queries, B.
        queries: float32 [B, D].
        k: Length of the lists.
        offsets: int64 [B + 1], beginning of each query's rows in `exclude`.
        exclude: int32 [M], rows of the shard that must not come back.
        where: (column, operator, value) each.
        only: int32, rows of the shard that may come back; None for all.
        cosine: Whether cosines rank.
    """

    version: str
    count: Annotated[int, Meta(ge=1, le=MAX_QUERIES)]
    queries: bytes
    k: Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
    offsets: bytes
    exclude: bytes
    where: Annotated[list[tuple[str, str, Any]], Meta(max_length=MAX_CONDITIONS)]
    only: bytes | None = None
    cosine: bool = False


class FoundItems(Struct):
    """The lists of a shard.

    Attributes:
        scores: float32 [B, L].
        rows: int32 [B, L], rows of the shard, -1 where there are no more.
    """

    scores: bytes
    rows: bytes


class GetVectors(Request, kw_only=True):
    """A request for the vectors of items.

    Attributes:
        version: Version of the bundle that the router has.
        rows: int32 [M], rows of the shard.
    """

    version: str
    rows: bytes


class FoundVectors(Struct):
    """The vectors of items.

    Attributes:
        vectors: float32 [M, D].
    """

    vectors: bytes


class ShardInfo(Struct):
    """What a shard is.

    Attributes:
        version: Version of its bundle.
        shard: Number of the shard.
        shards: Number of all shards.
        items: Number of its items.
    """

    version: str
    shard: int
    shards: int
    items: int


def write_query(version: str, query: ShardQuery) -> Search:
    """Returns a search as it is sent.

    Args:
        version: Version of the bundle.
        query: Search among the items of one shard.
    """
    only = None if query.only is None else query.only.astype(ROW).tobytes()
    return Search(
        version=version,
        count=len(query.queries),
        queries=query.queries.astype(VECTOR).tobytes(),
        k=query.k,
        offsets=query.exclude.offsets.astype(OFFSET).tobytes(),
        exclude=query.exclude.values.astype(ROW).tobytes(),
        where=[(name, operator, _plain(value)) for name, operator, value in query.where],
        only=only,
        cosine=query.cosine,
    )


def read_query(search: Search, dim: int, size: int) -> ShardQuery:
    """Returns a search that was sent.

    Args:
        search: Search.
        dim: Width of the vectors, D.
        size: Number of the shard's items.

    Raises:
        RequestError: Its arrays do not go together.
    """
    queries = _array(search.queries, VECTOR, "queries")
    offsets = _array(search.offsets, OFFSET, "offsets")
    exclude = _rows(search.exclude, size, "exclude")
    # Checked like a request of anybody: a shard is a server of its own, and a wrong row would read
    # beyond its vectors.
    if len(queries) != search.count * dim:
        raise _mistake("queries", f"they are not {search.count} vectors {dim} wide")
    is_rising = len(offsets) == search.count + 1 and bool((np.diff(offsets) >= 0).all())
    if not is_rising or offsets[0] != 0 or offsets[-1] != len(exclude):
        raise _mistake("offsets", "they do not divide the rows to exclude")
    only = None if search.only is None else _rows(search.only, size, "only")
    where = tuple((name, operator, _value(value)) for name, operator, value in search.where)
    return ShardQuery(
        queries.reshape(search.count, dim),
        search.k,
        Ragged(offsets, exclude),
        where,
        only,
        search.cosine,
    )


def read_rows(sent: GetVectors, size: int) -> np.ndarray:
    """Returns the rows of a request for vectors, int32 [M].

    Args:
        sent: Request.
        size: Number of the shard's items.
    """
    rows = _rows(sent.rows, size, "rows")
    if len(rows) > MAX_ROWS:
        raise _mistake("rows", f"they are more than {MAX_ROWS:,}")
    return rows


def read_lists(answer: bytes, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lists of an answer: scores float32 [B, L] and rows int32 [B, L].

    Args:
        answer: Answer of a shard.
        count: Number of queries, B.
        size: Number of the shard's items.

    Raises:
        ValueError: They are no lists of its items.
    """
    found = msgspec.json.decode(answer, type=FoundItems)
    scores = np.frombuffer(found.scores, VECTOR).reshape(count, -1)
    rows = np.frombuffer(found.rows, ROW).reshape(scores.shape)
    if np.isnan(scores).any():
        raise ValueError("it has scores that are no numbers")
    # Other rows would be items of another shard, or of none.
    if rows.size and not -1 <= rows.min() <= rows.max() < size:
        raise ValueError(f"it has rows that {size} items do not have")
    return scores, rows


def read_vectors(answer: bytes, count: int) -> np.ndarray:
    """Returns the vectors of an answer, float32 [M, D].

    Args:
        answer: Answer of a shard.
        count: Number of rows that were asked for, M >= 1.

    Raises:
        ValueError: They are not so many.
    """
    found = msgspec.json.decode(answer, type=FoundVectors)
    return np.frombuffer(found.vectors, VECTOR).reshape(count, -1)


def _rows(sent: bytes, size: int, field: str) -> np.ndarray:
    rows = _array(sent, ROW, field)
    if len(rows) and not 0 <= rows.min() <= rows.max() < size:
        raise _mistake(field, f"they are not rows of {size} items")
    return rows


def _array(sent: bytes, kind: np.dtype, field: str) -> np.ndarray:
    if len(sent) % kind.itemsize:
        raise _mistake(field, f"they are no numbers of {kind.itemsize} bytes")
    return np.frombuffer(sent, kind)


def _mistake(field: str, problem: str) -> RequestError:
    return RequestError(400, f"{field}: {problem}.", field=field, cure="Ask by a router.")


def _plain(value: Any) -> Any:
    """Returns the value of a condition as JSON has it."""
    if isinstance(value, Members):
        return {"members": _plain(value.values), "separator": value.separator}
    if isinstance(value, tuple):
        return [_plain(member) for member in value]
    return value.item() if isinstance(value, np.generic) else value


def _value(sent: Any) -> Any:
    """Returns the value of a condition that was sent."""
    if isinstance(sent, Mapping):
        return Members(_value(sent["members"]), sent["separator"])
    # JSON knows no tuples, in which conditions hold several values.
    return tuple(sent) if isinstance(sent, list) else sent


def encode(message: Struct, where: Conditions = ()) -> bytes:
    """Returns a message as JSON.

    Raises:
        ConfigError: The value of a condition is of a type that JSON has not.
    """
    try:
        return msgspec.json.encode(message)
    except TypeError as error:
        raise ConfigError(f"where={echo(where)} cannot be asked of shards: {error}.") from None
