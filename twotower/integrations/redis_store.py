"""Vectors and recommendations shared between processes through Redis, which may be away at any
moment.

```
NAME:current                                     {"version": of the bundle, "width": D}, written when all vectors are there
NAME:VERSION:user:ID   NAME:VERSION:item:ID      a vector: D little-endian float32
NAME:VERSION:list:K:SEEN:ID                      a list of recommendations, JSON
```

Every key has a time to live, so that what belonged to an older bundle goes by itself.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from twotower.core.errors import ConfigError, StoreError, extra
from twotower.core.files import content_digest
from twotower.index.base import check_vectors
from twotower.integrations.embedding_history import Block
from twotower.retrieval.retriever import Recommendation, Recommendations, Retriever

DAY = 86_400
PIPELINE = 2_000  # keys written in one round trip
PUBLISH_TIMEOUT = 10.0  # seconds; a batch job may wait where a server may not


class RedisStore:
    """Vectors in Redis. Reading finds nothing while Redis is away; publishing raises.

    Args:
        url: redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// with TLS, or unix://PATH.
        name: of the model; the keys begin with it, so that several models share a server.
        timeout: seconds that a read waits.
        retry_after: seconds for which Redis is not asked again after it did not answer.
    """

    def __init__(
        self, url: str, *, name: str = "twotower", timeout: float = 0.05, retry_after: float = 1.0
    ):
        with extra("redis", "Redis"):
            import redis
        if not re.fullmatch(r"[\w.-]{1,64}", name):  # a colon would mix the keys of two models
            raise ConfigError(
                f"name={name!r} must be of 1 to 64 letters, digits, '.', '_' and '-'."
            )
        self.name, self._errors, self._retry_after, self._away_until = (
            name,
            redis.RedisError,
            retry_after,
            -np.inf,
        )
        self._client, self._publisher = (
            _connect(url, seconds) for seconds in (timeout, PUBLISH_TIMEOUT)
        )
        self._is_away = False

    def publish(
        self, version: str, sides: Mapping[str, Iterable[Block]], *, ttl: int = DAY
    ) -> dict[str, int]:
        """Writes vectors, and makes them the current ones when all are written: until then readers
        find the older.

        Args:
            version: of the bundle, see `bundle_version`.
            sides: "user", "item" -> blocks of ids and float [n, D].
            ttl: seconds that all of it lives.

        Returns:
            How many vectors of each side.

        Raises:
            StoreError: Redis is away, full, or refuses; what was current still is.
        """
        counts, width = dict.fromkeys(sides, 0), 0
        try:
            for side, blocks in sides.items():
                for ids, vectors in blocks:
                    vectors = check_vectors(vectors, what=side).astype("<f4")
                    width, keys = (
                        vectors.shape[1],
                        [self._key(version, side, one) for one in ids.to_pylist()],
                    )
                    for start in range(0, len(keys), PIPELINE):
                        self._write(
                            zip(keys[start : start + PIPELINE], vectors[start : start + PIPELINE]),
                            ttl,
                        )
                    counts[side] += len(keys)
            self._publisher.set(
                f"{self.name}:current", json.dumps({"version": version, "width": width}), ex=ttl
            )
        except self._errors as error:
            raise StoreError(
                f"Redis did not take the vectors, and the older ones stay current: {error}"
            ) from error
        return counts

    def vectors(self, side: str, ids: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The current vectors of users or items.

        Returns:
            (float32 [n, D], bool [n]): a row of zeros and False for an id without a vector, and D =
            0 where there are none at all or Redis is away.
        """
        current = self.current()
        none = np.zeros((len(ids), 0), np.float32), np.zeros(len(ids), bool)
        if current is None or not len(ids):
            return none
        keys = [self._key(current["version"], side, one) for one in ids]
        found = self.ask(lambda client: client.mget(keys))
        if found is None:
            return none
        size = 4 * current["width"]
        held = np.array([value is not None and len(value) == size for value in found])
        joined = b"".join(value if ok else bytes(size) for value, ok in zip(found, held))
        return np.frombuffer(joined, "<f4").reshape(len(ids), -1).astype(np.float32), held

    def current(self) -> dict[str, Any] | None:
        """The version and width of the vectors that are current; None where nothing is, or Redis is
        away."""
        value = self.ask(lambda client: client.get(f"{self.name}:current"))
        try:
            held = json.loads(value or b"null")
            return {"version": str(held["version"]), "width": int(held["width"])}
        except (KeyError, TypeError, ValueError):
            return None

    def ask(self, call: Callable[[Any], Any]) -> Any:
        """`call(client)`, or None while Redis is away: it is tried once, and then not for
        `retry_after` seconds."""
        if time.monotonic() < self._away_until:
            return None
        try:
            answer = call(self._client)
        except self._errors as error:
            self._away_until = time.monotonic() + self._retry_after
            if not self._is_away:
                logging.warning("Redis is away, going on without it: %s", error)
            self._is_away = True
            return None
        if self._is_away:
            logging.info("Redis is back.")
        self._is_away = False
        return answer

    def list_key(self, version: str, user: Any, k: int, *, exclude_seen: bool) -> bytes:
        return self._key(version, f"list:{k}:{int(exclude_seen)}", user)

    def _key(self, version: str, kind: str, name: Any) -> bytes:
        # The id last: whatever is in it, no two keys are the same. It may be half a character,
        # which a request can hold.
        return f"{self.name}:{version}:{kind}:{name}".encode("utf-8", "surrogatepass")

    def _write(self, pairs: Iterable[tuple[bytes, np.ndarray]], ttl: int) -> None:
        pipeline = self._publisher.pipeline(transaction=False)
        for key, vector in pairs:
            pipeline.set(key, vector.tobytes(), ex=ttl)
        pipeline.execute()


class CachedRetriever:
    """Recommends as its retriever does, from Redis where an equal question was answered lately.

    Args:
        ttl: seconds that a list lives. Lists of a live index are asked for anew after every change
            to it.
    """

    def __init__(self, retriever: Retriever, store: RedisStore, *, ttl: int = 60):
        self.retriever, self.store, self.ttl = retriever, store, ttl
        self._version = bundle_version(retriever)

    def recommend(self, user: Any, k: int = 10, *, exclude_seen: bool = True) -> Recommendations:
        """As `Retriever.recommend` for an id."""
        version = f"{self._version}.{self.retriever.changes}"
        key = self.store.list_key(version, user, k, exclude_seen=exclude_seen)
        found = _parsed(self.store.ask(lambda client: client.get(key)))
        if found is None:
            found = self.retriever.recommend(user, k=k, exclude_seen=exclude_seen)
            value = _as_json(found)
            self.store.ask(lambda client: client.set(key, value, ex=self.ttl))
        return found


def bundle_version(retriever: Retriever) -> str:
    """A hash of all that is in a bundle: of two bundles with other weights, items, users or index,
    another."""
    if not retriever.bundle.manifest:
        raise StoreError(
            "a bundle that was not written has no version; export it, and load it from its folder."
        )
    return content_digest(retriever.bundle.manifest)[:16]


def _connect(url: str, timeout: float) -> Any:
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
        scheme = url.partition("://")[0]
        raise ConfigError(
            f"the Redis URL that begins with {scheme!r} cannot be used: {error}"
        ) from None


def _as_json(found: Recommendations) -> str:
    items = [(one.item_id, one.score, dict(one.display)) for one in found]
    return json.dumps({"known": found.known, "items": items}, ensure_ascii=False)


def _parsed(value: bytes | None) -> Recommendations | None:
    """The list that `_as_json` wrote; None of anything else."""
    try:
        held = json.loads(value or b"null")
        items = [
            Recommendation(str(item), float(score), dict(display))
            for item, score, display in held["items"]
        ]
        return Recommendations(items, known=bool(held["known"]))
    except (KeyError, TypeError, ValueError):
        return None
