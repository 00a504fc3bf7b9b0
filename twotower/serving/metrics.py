"""What a server counts, in the form of Prometheus.

Several processes of one server keep their counters in files, so that whichever is asked tells those
of all, and those of a process that has died.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from twotower.serving.lists.hook import Failure
    from twotower.serving.monitoring.served import Figures
    from twotower.serving.shards.router import Why
    from twotower.serving.types import Source

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # names the folder of the files; read at import
# What a gauge is over several processes; "live" leaves out those that have died.
Mode = Literal["livemax", "livesum", "livemin", "sum"]
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SERVED = {
    "drift": "Population stability index of the last scores against the bundle's own users'.",
    "coverage": "Share of the items in the last lists.",
    "concentration": "Share of the last lists that the most shown hundredth of the items has.",
}
# Seconds: from an answer of the index alone to one that nobody waits for.
BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class _NewSeconds:
    """Times of requests that the library was not told yet.

    Attributes:
        total: Their sum in seconds.
        counts: Number of them in each of `BUCKETS`, and of those that are longer.
    """

    __slots__ = ("counts", "total")

    def __init__(self):
        self.total = 0.0
        self.counts = [0] * (len(BUCKETS) + 1)


class _Seconds(Histogram):
    """A histogram that takes many times at once: each one alone costs it three locks."""

    def add(self, new: _NewSeconds) -> None:
        """Counts times as `observe` counts each of them."""
        self._sum.inc(new.total)
        for bucket, count in zip(self._buckets, new.counts):
            if count:
                bucket.inc(count)


class Metrics:
    """The counters of one server, in a registry of their own.

    Attributes:
        batches: Sizes of the batches of requests that were answered together.
        shadows_skipped: Requests that the shadow did not answer, as too many waited.
        shadows_failed: Requests that the shadow failed on.
        short: Lists with fewer items than were asked for.
        shed: Requests that were refused because too many were waiting.
        empty: Lists without any item.
        limited: Requests that were refused because their client had sent too many.
        events: Events that were accepted.
        items: Number of items now.
        changes: Number of changes since the bundle was written.
        waiting: Number of requests that were accepted and are not answered yet.
        processes: Number of processes that answer.
        ready: 1 where the server is ready.
        impressions_lost: Number of answers that are not in the log of impressions.
    """

    def __init__(self):
        # The global one of the library refuses a second server in a process, such as tests make.
        self._registry = CollectorRegistry()
        self._make_counters()
        self._make_gauges()
        self._seconds = _Seconds(
            "twotower_request_seconds",
            "Time from the request to its answer.",
            ["endpoint", "version"],
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.batches = Histogram(
            "twotower_batch_requests",
            "Requests that were answered together.",
            buckets=BATCHES,
            registry=self._registry,
        )
        self._overlaps = Histogram(
            "twotower_shadow_overlap",
            "Share of the items of a real list in that of the shadow.",
            ["version"],
            buckets=SHARES,
            registry=self._registry,
        )
        # Counted here, and told the library now and then: its counters take a lock each time.
        self._new_requests: dict[tuple[str, int, str], int] = {}
        self._new_seconds: dict[tuple[str, str], _NewSeconds] = {}
        self._new_items: dict[tuple[str, str], int] = {}

    def _make_counters(self) -> None:
        """Makes the counters, which only rise."""

        def make(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"twotower_{name}", text, labels, registry=self._registry)

        self._requests = make("requests", "Requests.", "endpoint", "status", "version")
        self._sources = make("recommended_items", "Items in answers.", "source", "version")
        self.short = make("short_lists", "Lists with fewer items than were asked for.")
        self.empty = make("empty_lists", "Lists without any item.")
        self._cached = make(
            "user_cache_requests",
            "Users with new events, by whether their vector was kept.",
            "result",
        )
        self.shadows_skipped = make(
            "shadow_skipped_requests", "Requests that the shadow did not answer under load."
        )
        self.shadows_failed = make("shadow_failed_requests", "Requests that the shadow failed on.")
        self.shed = make("shed_requests", "Requests refused under load.")
        self.limited = make(
            "limited_requests", "Requests refused as their client had sent too many."
        )
        self.events = make("events", "Events that were accepted.")
        self._rerank_failures = make(
            "rerank_failures", "Lists that went out without the re-ranker of --rerank.", "why"
        )
        self._shard_failures = make(
            "shard_failures", "Requests of a router that a shard did not answer.", "shard", "why"
        )

    def _make_gauges(self) -> None:
        """Makes the gauges, each with what it is over several processes."""

        def make(name: str, text: str, mode: Mode, *labels: str) -> Gauge:
            return Gauge(
                f"twotower_{name}", text, labels, multiprocess_mode=mode, registry=self._registry
            )

        # The greatest value of the processes that live.
        self.items = make("items", "Items now.", "livemax")
        self.changes = make("changes", "Changes since the bundle was written.", "livemax")
        self._share = make(
            "version_share", "Share of the users that a version answers.", "livemax", "version"
        )
        self._age = make(
            "version_age_seconds", "Time since the export of a version.", "livemax", "version"
        )
        self._figures = {
            name: make(f"served_{name}", text, "livemax", "version")
            for name, text in SERVED.items()
        }
        # Each process has a queue of its own, so that together they hold the sum.
        self.waiting = make(
            "waiting_requests", "Requests that were accepted and are not answered yet.", "livesum"
        )
        self.processes = make("processes", "Processes that answer.", "livesum")
        # One process that is not ready is enough to say so.
        self.ready = make("ready", "Whether the server is ready.", "livemin")
        self._shards_up = make("shard_up", "Whether a shard answers.", "livemin", "shard")
        # Also of processes that have died: what is lost stays lost.
        self.impressions_lost = make("impressions_lost", "Answers that are not in the log.", "sum")

    def count_rerank_failure(self, why: Failure) -> None:
        """Counts a list that went out by its scores, as its re-ranker failed."""
        self._rerank_failures.labels(why).inc()

    def count_shard_failure(self, shard: int, why: Why) -> None:
        """Counts a request that a shard did not answer."""
        self._shard_failures.labels(str(shard), why).inc()

    def set_shards(self, count: int, missing: Collection[int]) -> None:
        """Tells which of a router's shards answer."""
        for shard in range(count):
            self._shards_up.labels(str(shard)).set(shard not in missing)

    def count_request(self, endpoint: str, status: int, version: str, seconds: float) -> None:
        """Counts a request that was answered.

        Args:
            endpoint: Name of the endpoint.
            status: Status of the answer.
            version: Version that answered; "" where it is of none, or of several.
            seconds: Time from the request to its answer.
        """
        key = endpoint, status, version
        self._new_requests[key] = self._new_requests.get(key, 0) + 1
        new = self._new_seconds.get((endpoint, version))
        if new is None:
            new = self._new_seconds[endpoint, version] = _NewSeconds()
        new.total += seconds
        new.counts[bisect.bisect_left(BUCKETS, seconds)] += 1

    def count_items(self, source: Source, version: str, found: int) -> None:
        """Counts the items of a list that have one source."""
        key = source, version
        self._new_items[key] = self._new_items.get(key, 0) + found

    def count_cached(self, hits: int, misses: int) -> None:
        """Counts users with new events, whose vector was kept or made."""
        self._cached.labels("hit").inc(hits)
        self._cached.labels("miss").inc(misses)

    def set_version(self, version: str, share: float, age: float) -> None:
        """Tells the share and the age in seconds of a version; a share of 0 of one that is gone."""
        self._share.labels(version).set(share)
        self._age.labels(version).set(age)

    def set_figures(self, version: str, figures: Figures) -> None:
        """Tells what a version has served lately."""
        for name, value in figures._asdict().items():
            # A figure that is not known yet keeps the value before, if any, rather than a gap.
            if not math.isnan(value):
                self._figures[name].labels(version).set(value)

    def count_shadow(self, version: str, overlap: float) -> None:
        """Counts a list of the shadow by its share of the real one's items."""
        self._overlaps.labels(version).observe(overlap)

    def tell(self) -> None:
        """Tells the library what was counted since the last call."""
        for (endpoint, status, version), count in self._new_requests.items():
            self._requests.labels(endpoint, str(status), version).inc(count)
        for (source, version), count in self._new_items.items():
            self._sources.labels(source, version).inc(count)
        for (endpoint, version), new in self._new_seconds.items():
            self._seconds.labels(endpoint, version).add(new)
        self._new_requests.clear()
        self._new_items.clear()
        self._new_seconds.clear()

    def format(self) -> bytes:
        """Returns all of them in the text format of Prometheus."""
        self.tell()
        # A single process has its counters in memory alone.
        if MULTIPROCESS not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
