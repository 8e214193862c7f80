"""Every Prometheus series of the server; docs/metrics.md lists them one by one."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from deltamux.wire.messages import AdapterMoved, Stats

_LATENCY = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
)
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_ADAPTERS = (*range(17), 24, 32, 48, 64, 128)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Resident:
    """An adapter that is in memory now."""

    name: str
    version: str
    # "host" or "device".
    tier: str
    pinned: bool


# Called from the exporter's thread at every scrape: it returns a snapshot.
Residents = Callable[[], Iterable[Resident]]


class Exporter(Protocol):
    """What `Metrics.serve` returns: a running HTTP server."""

    server_port: int

    def shutdown(self) -> None: ...
    def server_close(self) -> None: ...


class Metrics:
    """The series of one server, in a registry of their own.

    The adapter is no label of any histogram: the number of series is bounded by the size of the
    caches, not by the size of the catalog.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._last: Stats | None = None
        self._declare_requests()
        self._declare_engine()
        self._declare_adapters()

    def _declare_requests(self) -> None:
        self._in_flight = self._gauge("requests_in_flight", "Calls that have not ended.")
        self._requests = self._counter("requests", "Calls that have ended, by status.", "code")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were read.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the call to its first token.", _LATENCY
        )
        self._inter_token = _InterToken(self._model_name)
        self.registry.register(self._inter_token)
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From the call to its end.", _LATENCY
        )
        self._queue = self._histogram(
            "request_queue_seconds", "From the call to its first step.", _LATENCY
        )

    def _declare_engine(self) -> None:
        self._running = self._gauge("requests_running", "Choices that take part in steps.")
        self._waiting = self._gauge("requests_waiting", "Choices that wait for a step.")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Share of KV blocks in use, 0 to 1.")
        self._preemptions = self._counter("preemptions", "Choices that lost their KV blocks.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens whose KV blocks were found."
        )
        self._restarts = self._counter("engine_restarts", "Times that the engine was replaced.")
        self._step_seconds = self._histogram("step_seconds", "Duration of a step.", _STEP)
        self._step_rows = self._histogram("rows_per_step", "Tokens computed in a step.", _ROWS)
        self._step_adapters = self._histogram(
            "adapters_per_step", "Different adapters that shared a step.", _ADAPTERS
        )

    def _declare_adapters(self) -> None:
        self._hits = self._counter("adapter_cache_hits", "Lookups that found it there.", "tier")
        self._misses = self._counter("adapter_cache_misses", "Lookups that did not.", "tier")
        self._evictions = self._counter("adapter_cache_evictions", "Adapters put out.", "tier")
        self._load_seconds = self._histogram(
            "adapter_load_seconds", "Time to bring an adapter to this tier.", _LATENCY, "tier"
        )
        self._load_failures = self._counter(
            "adapter_load_failures", "Loads that failed, by the error's reason.", "reason"
        )

    def watch_residents(self, residents: Residents, slots: Callable[[], int]) -> None:
        """Exports the adapters that `residents` names at each scrape, out of `slots` places."""
        self.registry.register(_Residency(residents, slots))

    def serve(self, host: str, port: int) -> Exporter:
        """Answers GET /metrics on a thread of its own; port 0 picks a free one."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server

    def request_started(self) -> None:
        self._in_flight.inc()

    def request_finished(self, code: str, seconds: float) -> None:
        """`code`: the name of the gRPC status, "OK" included."""
        self._in_flight.dec()
        self._requests.labels(self._model_name, code).inc()
        self._end_to_end.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """As many tokens, each of them so long after the one before."""
        self._inter_token.observe(seconds, tokens)

    def queue(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def tokens(self, prompt: int, generated: int) -> None:
        self._prompt_tokens.inc(prompt)
        self._generated.inc(generated)

    def step(self, stats: Stats) -> None:
        """Takes in what the engine says after a step."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
        if stats.step_rows:
            self._step_seconds.observe(stats.step_seconds)
            self._step_rows.observe(stats.step_rows)
            self._step_adapters.observe(stats.step_adapters)
        self._count_cache(stats)
        self._last = stats

    def _count_cache(self, stats: Stats) -> None:
        def grown(counter: str) -> int:
            before = getattr(self._last, counter) if self._last else 0
            return int(getattr(stats, counter)) - int(before)

        host_hits, misses = grown("host_hits"), grown("misses")
        self._preemptions.inc(grown("preemptions"))
        self._prefix_queries.inc(grown("prefix_queries"))
        self._prefix_hits.inc(grown("prefix_hits"))
        self._hits.labels(self._model_name, "device").inc(grown("device_hits"))
        self._hits.labels(self._model_name, "host").inc(host_hits)
        self._misses.labels(self._model_name, "device").inc(host_hits + misses)
        self._misses.labels(self._model_name, "host").inc(misses)
        self._evictions.labels(self._model_name, "device").inc(grown("device_evictions"))
        self._evictions.labels(self._model_name, "host").inc(grown("host_evictions"))

    def engine_lost(self) -> None:
        """The engine's gauges fall to zero and its totals begin again."""
        self._last = None
        for gauge in (self._running, self._waiting, self._kv_usage):
            gauge.set(0)

    def engine_restarted(self) -> None:
        self._restarts.inc()

    def adapter_moved(self, moved: AdapterMoved) -> None:
        if moved.seconds > 0:
            self._load_seconds.labels(self._model_name, moved.tier).observe(moved.seconds)

    def load_failed(self, reason: str) -> None:
        self._load_failures.labels(self._model_name, reason).inc()

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"deltamux_{name}", text, ["model_name"], registry=self.registry)
        return gauge.labels(self._model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        names = ["model_name", *labels]
        counter = Counter(f"deltamux_{name}", text, names, registry=self.registry)
        return counter if labels else counter.labels(self._model_name)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        names = ["model_name", *labels]
        registry = self.registry
        histogram = Histogram(f"deltamux_{name}", text, names, registry=registry, buckets=buckets)
        return histogram if labels else histogram.labels(self._model_name)


class _InterToken(Collector):
    """The histogram that every token enters: those of a message at once, and without a lock.

    One thread fills it, the exporter's reads it.
    """

    _NAME = "deltamux_inter_token_latency_seconds"
    _BOUNDS = (*_LATENCY, math.inf)

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._counts = [0] * len(self._BOUNDS)
        self._sum = 0.0

    def observe(self, seconds: float, tokens: int) -> None:
        self._counts[bisect_left(self._BOUNDS, seconds)] += tokens
        self._sum += seconds * tokens

    def collect(self) -> Iterator[Metric]:
        histogram = HistogramMetricFamily(
            self._NAME, "Between two tokens of one choice.", labels=["model_name"]
        )
        bounds = map(floatToGoString, self._BOUNDS)
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        histogram.add_metric([self._model_name], buckets, self._sum)
        yield histogram


class _Residency(Collector):
    """Read at each scrape, so that an evicted adapter leaves no stale series behind."""

    def __init__(self, residents: Residents, slots: Callable[[], int]) -> None:
        self._residents = residents
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        residents = list(self._residents())
        resident = GaugeMetricFamily(
            "deltamux_adapter_resident",
            "1 for each adapter in memory.",
            labels=["adapter", "version", "tier", "pinned"],
        )
        for adapter in residents:
            pinned = str(adapter.pinned).lower()
            resident.add_metric([adapter.name, adapter.version, adapter.tier, pinned], 1)
        yield resident
        # Two names of one version share its slot.
        yield self._slot_states(len({a.version for a in residents if a.tier == "device"}))

    def _slot_states(self, occupied: int) -> Metric:
        slots = GaugeMetricFamily(
            "deltamux_adapter_slots", "Device places for adapters.", labels=["state"]
        )
        slots.add_metric(["occupied"], occupied)
        slots.add_metric(["free"], max(self._slots() - occupied, 0))
        return slots
