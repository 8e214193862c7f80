import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import generate_latest

from deltamux.metrics import Metrics, Resident
from deltamux.wire.messages import AdapterMoved, Stats

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def stats(**counters: float) -> Stats:
    zero = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**zero, **counters})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("base")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"deltamux_{name}", {"model_name": "base", **labels})


def exported(metrics: Metrics) -> dict[str, str]:
    """Type by name, as Prometheus shows it."""
    families = metrics.registry.collect()
    return {f.name + ("_total" if f.type == "counter" else ""): f.type for f in families}


def test_page_lists_exactly_the_series(metrics):
    metrics.watch_residents(lambda: [], lambda: 8)
    listed = re.findall(r"^\| `(deltamux_\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert dict(listed) == exported(metrics)
    assert len(listed) == len(dict(listed))


def test_calls_are_counted_by_code(metrics):
    metrics.request_started()
    metrics.request_started()
    assert value(metrics, "requests_in_flight") == 2
    metrics.request_finished("OK", 0.2)
    metrics.request_finished("NOT_FOUND", 0.1)
    assert value(metrics, "requests_in_flight") == 0
    assert value(metrics, "requests_total", code="OK") == 1
    assert value(metrics, "requests_total", code="NOT_FOUND") == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 2
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(0.3)


def test_tokens_and_latencies(metrics):
    metrics.tokens(prompt=5, generated=3)
    metrics.tokens(prompt=0, generated=2)
    metrics.queue(0.01)
    metrics.first_token(0.02)
    metrics.inter_token(0.003, tokens=2)
    metrics.inter_token(0.025, tokens=1)
    metrics.inter_token(1000.0, tokens=1)
    assert value(metrics, "prompt_tokens_total") == 5
    assert value(metrics, "generation_tokens_total") == 5
    assert value(metrics, "request_queue_seconds_sum") == pytest.approx(0.01)
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(0.02)
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(1000.031)
    assert value(metrics, "inter_token_latency_seconds_count") == 4
    filled = {"0.0025": 0, "0.005": 2, "0.01": 2, "0.025": 3, "300.0": 3, "+Inf": 4}
    for bound, count in filled.items():
        assert value(metrics, "inter_token_latency_seconds_bucket", le=bound) == count


def test_a_step_sets_gauges_and_fills_histograms(metrics):
    metrics.step(
        stats(
            running=3,
            waiting=2,
            kv_blocks_used=5,
            kv_blocks_total=20,
            step_rows=17,
            step_adapters=3,
            step_seconds=0.25,
        )
    )
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "rows_per_step_sum") == 17
    assert value(metrics, "step_seconds_sum") == 0.25
    assert value(metrics, "adapters_per_step_bucket", le="2.0") == 0
    assert value(metrics, "adapters_per_step_bucket", le="3.0") == 1


def test_a_report_without_rows_is_no_step(metrics):
    metrics.step(stats(running=1))
    assert value(metrics, "requests_running") == 1
    assert value(metrics, "adapters_per_step_count") == 0


def test_cache_counters_follow_the_engine_through_its_restart(metrics):
    metrics.step(stats(device_hits=4, host_hits=2, misses=1, device_evictions=1, preemptions=1))
    metrics.step(stats(device_hits=5, host_hits=2, misses=3, device_evictions=2, preemptions=1))
    metrics.engine_lost()
    assert value(metrics, "requests_running") == 0
    metrics.engine_restarted()
    metrics.step(stats(device_hits=1, misses=1, host_evictions=1))
    assert value(metrics, "adapter_cache_hits_total", tier="device") == 6
    assert value(metrics, "adapter_cache_hits_total", tier="host") == 2
    assert value(metrics, "adapter_cache_misses_total", tier="device") == 6
    assert value(metrics, "adapter_cache_misses_total", tier="host") == 4
    assert value(metrics, "adapter_cache_evictions_total", tier="device") == 2
    assert value(metrics, "adapter_cache_evictions_total", tier="host") == 1
    assert value(metrics, "preemptions_total") == 1
    assert value(metrics, "engine_restarts_total") == 1


def test_loads_are_timed_and_evictions_are_not(metrics):
    metrics.adapter_moved(AdapterMoved("d", "host", seconds=0.5))
    metrics.adapter_moved(AdapterMoved("d", "device", seconds=0.1))
    metrics.adapter_moved(AdapterMoved("d", "disk"))
    metrics.load_failed("NO_FAMILY")
    assert value(metrics, "adapter_load_seconds_count", tier="host") == 1
    assert value(metrics, "adapter_load_seconds_sum", tier="device") == pytest.approx(0.1)
    assert value(metrics, "adapter_load_seconds_count", tier="disk") is None
    assert value(metrics, "adapter_load_failures_total", reason="NO_FAMILY") == 1


def test_residents_leave_no_series_behind(metrics):
    residents = [
        Resident("a", "v1", "device", pinned=True),
        Resident("b", "v1", "device", pinned=False),
        Resident("c", "v2", "host", pinned=False),
    ]
    metrics.watch_residents(lambda: residents, lambda: 8)

    def resident(name: str, version: str, tier: str, pinned: str) -> float | None:
        labels = {"adapter": name, "version": version, "tier": tier, "pinned": pinned}
        return metrics.registry.get_sample_value("deltamux_adapter_resident", labels)

    def slots(state: str) -> float | None:
        return metrics.registry.get_sample_value("deltamux_adapter_slots", {"state": state})

    assert resident("a", "v1", "device", "true") == 1
    assert resident("c", "v2", "host", "false") == 1
    # Two names of one version share a slot.
    assert (slots("occupied"), slots("free")) == (1, 7)
    residents.clear()
    assert resident("a", "v1", "device", "true") is None
    assert b'adapter="a"' not in generate_latest(metrics.registry)
    assert (slots("occupied"), slots("free")) == (0, 8)


def test_served_over_http(metrics):
    metrics.request_started()
    server = metrics.serve("127.0.0.1", 0)
    try:
        with urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as page:
            assert 'deltamux_requests_in_flight{model_name="base"} 1.0' in page.read().decode()
        with pytest.raises(OSError, match="in use"):
            metrics.serve("127.0.0.1", server.server_port)
    finally:
        server.shutdown()
        server.server_close()
