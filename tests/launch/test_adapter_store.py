"""The front end's half of the adapter store, on an engine that is not there."""

import pytest

from deltamux.config import StoreConfig
from deltamux.errors import FailedPrecondition
from deltamux.frontend.engine_client import EngineClient
from deltamux.launch.adapter_store import AdapterStore
from deltamux.metrics import Metrics


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
