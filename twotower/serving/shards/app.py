"""The server of one shard, which answers routers alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from absl import logging
from starlette.applications import Starlette

from twotower.core.errors import ConfigError
from twotower.retrieval.shards.shard import Shard
from twotower.serving.access import Access
from twotower.serving.answers import Answers
from twotower.serving.app import Endpoint, Service
from twotower.serving.errors import RequestError
from twotower.serving.limits import Limits
from twotower.serving.shards import types

TOKEN = "TWOTOWER_SHARD_TOKEN"  # variable of the token that routers send to shards
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ShardApp(Service):
    """The server of one shard.

    Attributes:
        shard: The items.
        version: Version of the bundle, as in answers of the API.
    """

    def __init__(self, shard: Shard, *, access: Access, limits: Limits):
        """Prepares the server, which is ready some time after its start.

        Args:
            shard: The items.
            access: Tokens.
            limits: Bounds.
        """
        super().__init__(access=access, limits=limits)
        self.shard = shard
        # That of the API: router and shards are of one bundle if it is the same.
        self.version = Answers.version_of(shard.manifest)
        self.set_endpoints(
            [
                Endpoint(
                    self,
                    "shard_search",
                    "POST /v1/shard/search",
                    "The best items of the shard.",
                    lambda search, _: self._search(search),
                    request=types.Search,
                    answer=types.FoundItems,
                ),
                Endpoint(
                    self,
                    "shard_vectors",
                    "POST /v1/shard/vectors",
                    "The vectors of items of the shard.",
                    lambda sent, _: self._vectors(sent),
                    request=types.GetVectors,
                    answer=types.FoundVectors,
                ),
                Endpoint(
                    self,
                    "shard_info",
                    "GET /v1/shard/info",
                    "What the shard is.",
                    lambda *_: types.ShardInfo(
                        self.version, shard.number, shard.count, len(shard.snapshot)
                    ),
                    answer=types.ShardInfo,
                ),
                *self.make_probes(),
            ]
        )

    @contextlib.asynccontextmanager
    async def live(self, app: Starlette) -> AsyncIterator[None]:
        """The life of the server between its start and its end."""
        del app
        task = asyncio.create_task(self._prepare())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def set_gauges(self) -> None:
        """Tells the counters what is so now."""
        super().set_gauges()
        self.metrics.items.set(len(self.shard.snapshot))

    async def _prepare(self) -> None:
        start = time.perf_counter()
        try:
            # In a thread: probes are answered meanwhile.
            await asyncio.to_thread(self.shard.warm)
        except Exception:
            logging.exception("The shard could not be made ready.")
            self.status = "it could not be made ready; its log says why"
            return
        gc.collect()
        # As of any server, see `App.prepare`: what stays is no garbage.
        gc.freeze()
        # Told to stop meanwhile, it stays out.
        if self.status == "starting":
            self.status = "ok"
            logging.info("Ready after %.1f s.", time.perf_counter() - start)

    def _search(self, search: types.Search) -> types.FoundItems:
        self._check(search.version)
        shard = self.shard
        query = types.read_query(search, shard.manifest["dim"], len(shard.snapshot))
        scores, rows = shard.search(query)
        return types.FoundItems(
            scores.astype(types.VECTOR).tobytes(), rows.astype(types.ROW).tobytes()
        )

    def _vectors(self, sent: types.GetVectors) -> types.FoundVectors:
        self._check(sent.version)
        vectors = self.shard.vectors(types.read_rows(sent, len(self.shard.snapshot)))
        return types.FoundVectors(vectors.astype(types.VECTOR).tobytes())

    def _check(self, version: str) -> None:
        """Refuses a router of another version, whose rows mean other items."""
        if version != self.version:
            raise RequestError(
                409,
                f"The shard has version {self.version} of the bundle, and the router {version}.",
                cure="Start the shards again, and then the routers.",
            )


def read_access(host: str, environment: Mapping[str, str]) -> Access:
    """Returns who may ask a shard: whoever has its token or, without one, this machine.

    Args:
        host: Address at which it answers.
        environment: Environment variables.

    Raises:
        ConfigError: Other machines reach it, and there is no token.
    """
    token = environment.get(TOKEN)
    if token is None:
        # A shard gives its items' vectors to whoever asks: nobody else shall reach it by mistake.
        if host not in LOOPBACK:
            raise ConfigError(
                f"--host={host} --shard: other machines reach it, and {TOKEN} is not set. Set it "
                "here and for the routers: openssl rand -hex 32"
            )
        return Access({})
    try:
        return Access({"read": token})
    except ConfigError as error:
        raise ConfigError(str(error).replace("--tokens: a token of 'read'", TOKEN)) from None


def make_shard_app(
    folder: Path, number: int, *, host: str, limits: Limits, environment: Mapping[str, str]
) -> ShardApp:
    """Loads a shard, and returns its server.

    Args:
        folder: Folder of the bundle.
        number: Number of the shard.
        host: Address at which it answers.
        limits: Bounds.
        environment: Environment variables.

    Raises:
        TwotowerError: The shard cannot be read, or has no token and needs one.
    """
    access = read_access(host, environment)
    return ShardApp(Shard.load(folder, number), access=access, limits=limits)
