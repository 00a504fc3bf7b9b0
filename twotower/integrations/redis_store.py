"""Vectors and recommendations shared between processes through Redis, which may be away at any
moment.

```
NAME:current                   {"version": of the bundle, "width": D}, when all vectors are there
NAME:VERSION:user:ID           a vector: D little-endian float32
NAME:VERSION:item:ID           likewise
NAME:VERSION:list:K:SEEN:ID    a list of recommendations, JSON
```

Every key has a time to live, so that keys of an older bundle go by themselves.
"""

from __future__ import annotations

import datetime
import decimal
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from twotower.core.errors import ConfigError, StoreError
from twotower.core.files import content_digest
from twotower.core.install import extra
from twotower.index.base import check_vectors
from twotower.integrations.embedding_history import Block
from twotower.retrieval.retriever import Recommendation, Recommendations, Retriever

if TYPE_CHECKING:  # an extra, which is not always installed
    from redis import Redis

DAY = 86_400  # seconds
KEYS_PER_ROUND_TRIP = 2_000  # the client holds the commands of a round trip in memory
PUBLISH_TIMEOUT = 10.0  # seconds; a batch job may wait where a server may not
# Widest vectors that are read: a reader makes room before it sees a vector.
MAX_WIDTH = 65_536
# Values of display columns that JSON has no form for: how they become text, and are read from it.
_KIND = "__kind"
_VALUES: Mapping[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    "date": (datetime.date.isoformat, datetime.date.fromisoformat),
    "datetime": (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "time": (datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (
        lambda value: str(value // datetime.timedelta(microseconds=1)),
        lambda text: datetime.timedelta(microseconds=int(text)),
    ),
    "Decimal": (str, decimal.Decimal),
    "bytes": (bytes.hex, bytes.fromhex),
}
# A colon would mix the keys of two models.
_NAME = re.compile(r"[\w.-]{1,64}")


class RedisStore:
    """Vectors in Redis. Reading finds nothing while Redis is away; publishing raises.

    Args:
        url: redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// with TLS, or unix://PATH.
        name: Name of the model, which the keys begin with, so that several models share a server.
        timeout: Longest wait of a read, in seconds.
        retry_after: Time for which Redis is left alone after it did not answer, in seconds.

    Raises:
        ConfigError: The extra redis is missing, or the name or the URL cannot be used.
    """

    def __init__(
        self, url: str, *, name: str = "twotower", timeout: float = 0.05, retry_after: float = 1.0
    ):
        with extra("redis", "Redis"):
            import redis
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"name={name!r} must be of 1 to 64 letters, digits, '.', '_' and '-'."
            )
        self.name = name
        self._errors = redis.RedisError
        self._retry_after = retry_after
        # Times are those of the monotonic clock: the time of day may be set back meanwhile.
        self._away_until = -np.inf
        self._client = _connect(url, timeout)
        # A client of its own: publishing may wait longer, and its errors are raised.
        self._publisher = _connect(url, PUBLISH_TIMEOUT)
        self._is_away = False

    def publish(
        self, version: str, sides: Mapping[str, Iterable[Block]], *, ttl: int = DAY
    ) -> dict[str, int]:
        """Writes vectors, and makes them the current ones when all are written.

        Until then readers find the older ones.

        Args:
            version: Version of the bundle, see `bundle_version`.
            sides: Blocks of ids [n] and vectors, float [n, D], of "user" and "item".
            ttl: Time to live of all keys, in seconds.

        Returns:
            The number of vectors of each side.

        Raises:
            StoreError: Redis is away, full, or refuses; the older vectors stay current.
        """
        counts = dict.fromkeys(sides, 0)
        width = 0
        try:
            for side, blocks in sides.items():
                for ids, vectors in blocks:
                    # Little-endian, whatever the machines of writer and reader are.
                    vectors = check_vectors(vectors, what=side).astype("<f4")
                    width = vectors.shape[1]
                    keys = [self._key(version, side, entity) for entity in ids.to_pylist()]
                    for start in range(0, len(keys), KEYS_PER_ROUND_TRIP):
                        part = slice(start, start + KEYS_PER_ROUND_TRIP)
                        self._write(zip(keys[part], vectors[part]), ttl)
                    counts[side] += len(keys)
            # Last, and in one key: readers never find a version that is not whole.
            current = json.dumps({"version": version, "width": width})
            self._publisher.set(f"{self.name}:current", current, ex=ttl)
        except self._errors as error:
            raise StoreError(
                f"Redis did not take the vectors, and the older ones stay current: {error}"
            ) from error
        return counts

    def vectors(self, side: str, ids: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Reads the current vectors of users or items.

        Args:
            side: "user" or "item".
            ids: Ids of the entities, n of them.

        Returns:
            Vectors float32 [n, D] and whether each id has one, bool [n]. An id without one has a
            row of zeros, and D is 0 where there are none at all or Redis is away.
        """
        current = self.current()
        values = None
        # Redis refuses MGET without keys.
        if current is not None and len(ids):
            keys = [self._key(current["version"], side, entity) for entity in ids]
            values = self.try_call(lambda client: client.mget(keys))
        if current is None or values is None:
            return np.zeros((len(ids), 0), np.float32), np.zeros(len(ids), bool)
        size = 4 * current["width"]  # bytes
        # A value of another length is not ours: it counts as missing, not as an error.
        has_vector = np.array([value is not None and len(value) == size for value in values])
        zeros = bytes(size)
        joined = b"".join(value if ok else zeros for value, ok in zip(values, has_vector))
        vectors = np.frombuffer(joined, "<f4").reshape(len(ids), -1)
        # A copy: the array over the bytes could not be written to.
        return vectors.astype(np.float32), has_vector

    def user_vector(self, version: str, user: str, width: int) -> np.ndarray | None:
        """Reads the vector of a user that was published for one version; None where there is none,
        or Redis is away.

        Args:
            version: Version of the bundle, see `bundle_version`.
            user: Id of the user.
            width: Width of the vectors.
        """
        key = self._key(version, "user", user)
        value = self.try_call(lambda client: client.get(key))
        # A value of another length is not ours.
        if value is None or len(value) != 4 * width:
            return None
        return np.frombuffer(value, "<f4").astype(np.float32)

    def current(self) -> dict[str, Any] | None:
        """Reads the version and width of the current vectors; None where there are none, or Redis
        is away."""
        value = self.try_call(lambda client: client.get(f"{self.name}:current"))
        # Anybody may write to Redis: what is not ours is no version, rather than an error.
        try:
            current = json.loads(value or b"null")
            version, width = current["version"], current["width"]
        except (KeyError, RecursionError, TypeError, ValueError):
            return None
        # Memory is reserved by the width.
        if type(version) is str and type(width) is int and 0 < width <= MAX_WIDTH:
            return {"version": version, "width": width}
        return None

    def try_call(self, call: Callable[[Redis], Any]) -> Any:
        """Returns `call(client)`, or None while Redis is away.

        Redis is tried once, and then left alone for `retry_after` seconds, so that a server without
        it does not wait with every request.
        """
        if time.monotonic() < self._away_until:
            return None
        try:
            answer = call(self._client)
        except self._errors as error:
            self._away_until = time.monotonic() + self._retry_after
            # Said once, not with every request.
            if not self._is_away:
                logging.warning("Redis is away, going on without it: %s", error)
            self._is_away = True
            return None
        if self._is_away:
            logging.info("Redis is back.")
        self._is_away = False
        return answer

    def list_key(self, version: str, user: Any, k: int, *, exclude_seen: bool) -> bytes:
        """Returns the key of a list of recommendations; arguments are those of `recommend`."""
        return self._key(version, f"list:{k}:{int(exclude_seen)}", user)

    def _key(self, version: str, kind: str, name: Any) -> bytes:
        # The id last: whatever is in it, no two keys are the same. It may be half a character,
        # which a request can hold.
        return f"{self.name}:{version}:{kind}:{name}".encode("utf-8", "surrogatepass")

    def _write(self, pairs: Iterable[tuple[bytes, np.ndarray]], ttl: int) -> None:
        """Writes vectors in one round trip."""
        # No transaction: nobody reads them before `publish` names their version, and one would
        # stop the server for all of them at once.
        pipeline = self._publisher.pipeline(transaction=False)
        for key, vector in pairs:
            pipeline.set(key, vector.tobytes(), ex=ttl)
        pipeline.execute()


class CachedRetriever:
    """A retriever whose lists are kept in Redis for a while, and answered from there.

    Args:
        retriever: Retriever that makes the lists.
        store: Store that keeps them.
        ttl: Time to live of a list, in seconds. After a change to a live index lists are made anew.
    """

    def __init__(self, retriever: Retriever, store: RedisStore, *, ttl: int = 60):
        self.retriever = retriever
        self.store = store
        self.ttl = ttl
        self._version = bundle_version(retriever)

    def recommend(self, user: Any, k: int = 10, *, exclude_seen: bool = True) -> Recommendations:
        """Recommends as `Retriever.recommend` does for an id."""
        # The number of changes is a part of the key: no list outlives a change of the items.
        version = f"{self._version}.{self.retriever.changes}"
        key = self.store.list_key(version, user, k, exclude_seen=exclude_seen)
        recommended = _from_json(self.store.try_call(lambda client: client.get(key)))
        if recommended is None:
            recommended = self.retriever.recommend(user, k=k, exclude_seen=exclude_seen)
            value = _to_json(recommended)
            self.store.try_call(lambda client: client.set(key, value, ex=self.ttl))
        return recommended


def bundle_version(retriever: Retriever) -> str:
    """Returns a hash of all that is in a bundle: weights, items, users and index.

    Raises:
        StoreError: The bundle was never written.
    """
    # The manifest has the digest of every file.
    if not retriever.bundle.manifest:
        raise StoreError(
            "a bundle that was not written has no version; export it, and load it from its folder."
        )
    return content_digest(retriever.bundle.manifest)[:16]


def _connect(url: str, timeout: float) -> Redis:
    """Returns a client; it connects when it is first used."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # The client's own retries may wait for seconds, while a server answers without Redis in a
    # millisecond.
    options = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
    }
    try:
        return redis.Redis.from_url(url, **options)
    except ValueError as error:
        # The rest of the URL may hold a password.
        scheme = url.partition("://")[0]
        raise ConfigError(
            f"the Redis URL that begins with {scheme!r} cannot be used: {error}"
        ) from None


def _to_json(recommended: Recommendations) -> str:
    """Returns a list as JSON, which `_from_json` reads."""
    items = [(item.item_id, item.score, dict(item.display)) for item in recommended]
    content = {"known": recommended.known, "items": items}
    return json.dumps(content, ensure_ascii=False, default=_write_value)


def _write_value(value: Any) -> dict[str, str]:
    """Returns a value of a display column that JSON has no form for, as its kind and a text."""
    # By the class itself: a datetime is a date too.
    kind = type(value).__name__
    if kind not in _VALUES:
        raise TypeError(f"display columns of {kind} cannot be kept in Redis.")
    write, _ = _VALUES[kind]
    return {_KIND: kind, "value": write(value)}


def _read_value(content: dict[str, Any]) -> Any:
    """Returns the value that `_write_value` wrote; any other JSON object as it is."""
    if _KIND not in content:
        return content
    _, read = _VALUES[content[_KIND]]
    return read(content["value"])


def _from_json(value: bytes | None) -> Recommendations | None:
    """Reads the list that `_to_json` wrote; None where it is anything else."""
    try:
        content = json.loads(value or b"null", object_hook=_read_value)
        items = [
            Recommendation(str(item), float(score), dict(display))
            for item, score, display in content["items"]
        ]
        return Recommendations(items, known=bool(content["known"]))
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError):
        return None
