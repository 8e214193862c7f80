"""The front end's half of the adapter store, on an engine that is not there."""

import asyncio
import threading

import pytest
from prometheus_client import generate_latest

from deltamux.config import StoreConfig
from deltamux.demo.tasks import weights_path
from deltamux.errors import FailedPrecondition
from deltamux.frontend.engine_client import EngineClient
from deltamux.launch import adapter_store
from deltamux.launch.adapter_store import AdapterStore
from deltamux.metrics import Metrics
from deltamux.wire.messages import AdapterMoved


async def test_a_source_that_is_refused_unread_counts_as_a_failed_load(tmp_path):
    metrics = Metrics("m")
    config = StoreConfig({"empty": str(tmp_path)}, cache_dir=tmp_path / "cache")
    store = AdapterStore(config, EngineClient(8, metrics), metrics)
    await store.open()
    with pytest.raises(FailedPrecondition):
        await store.catalog.resolve("empty")
    labels = {"model_name": "m", "reason": "MISSING_CONFIG"}
    failures = metrics.registry.get_sample_value("deltamux_adapter_load_failures_total", labels)
    assert failures == 1
    await store.close()


async def test_a_scrape_while_the_event_loop_is_busy_tells_what_the_one_before_saw(
    tmp_path, monkeypatch
):
    metrics = Metrics("m")
    folder = weights_path() / "adapters" / "rot13"
    config = StoreConfig({"rot13": str(folder)}, cache_dir=tmp_path / "cache")
    store = AdapterStore(config, EngineClient(8, metrics), metrics)
    await store.open()
    lease = await store.catalog.resolve("rot13")
    store.catalog.moved(AdapterMoved(lease.version, "host"))
    seen = await asyncio.to_thread(generate_latest, metrics.registry)
    assert b'adapter="rot13"' in seen
    store.catalog.moved(AdapterMoved(lease.version, "device"))
    monkeypatch.setattr(adapter_store, "SNAPSHOT_SECONDS", 0.0)
    pages = []
    scrape = threading.Thread(target=lambda: pages.append(generate_latest(metrics.registry)))
    scrape.start()
    # Blocks the loop until the scrape has ended.
    scrape.join()
    assert pages == [seen]
    await store.close()
