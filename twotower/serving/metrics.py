"""What a server counts, in the form of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from twotower.serving.types import Source

# Seconds: from an answer of the index alone to one that nobody waits for.
BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """The counters of one server, in a registry of their own.

    Attributes:
        shed: Requests that were refused because too many were waiting.
        events: Events that were accepted.
        items: Number of items now.
        changes: Number of changes since the bundle was written.
        ready: 1 where the server is ready.
    """

    def __init__(self):
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "twotower_requests", "Requests.", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "twotower_request_seconds",
            "Time from the request to its answer.",
            ["endpoint"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._sources = Counter(
            "twotower_recommended_items", "Items in answers.", ["source"], registry=registry
        )
        self._short = Counter(
            "twotower_short_lists", "Lists with fewer items than were asked for.", registry=registry
        )
        self.shed = Counter(
            "twotower_shed_requests", "Requests refused under load.", registry=registry
        )
        self.events = Counter("twotower_events", "Events that were accepted.", registry=registry)
        self.items = Gauge("twotower_items", "Items now.", registry=registry)
        self.changes = Gauge(
            "twotower_changes", "Changes since the bundle was written.", registry=registry
        )
        self.ready = Gauge("twotower_ready", "Whether the server is ready.", registry=registry)
        # Looking a label up takes longer than counting.
        self._by_request: dict[tuple[str, int], Counter] = {}
        self._by_endpoint: dict[str, Histogram] = {}
        self._by_source: dict[str, Counter] = {}

    def count_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        counter = self._by_request.get((endpoint, status))
        if counter is None:
            counter = self._requests.labels(endpoint, str(status))
            self._by_request[endpoint, status] = counter
        counter.inc()
        histogram = self._by_endpoint.get(endpoint)
        if histogram is None:
            histogram = self._seconds.labels(endpoint)
            self._by_endpoint[endpoint] = histogram
        histogram.observe(seconds)

    def count_items(self, source: Source, found: int, wanted: int) -> None:
        """Counts the items of a list."""
        counter = self._by_source.get(source)
        if counter is None:
            counter = self._sources.labels(source)
            self._by_source[source] = counter
        counter.inc(found)
        if found < wanted:
            self._short.inc()

    def format(self) -> bytes:
        """Returns all of them in the text format of Prometheus."""
        return generate_latest(self._registry)
