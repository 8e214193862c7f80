"""The engine's cache against a model of it, with real files, threads and device sites."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamux.errors import DataLoss, FailedPrecondition, Internal
from deltamux.store.digest import content_digest
from deltamux.store.memory.adapter_cache import AdapterCache
from deltamux.store.memory.loader import Loader
from deltamux.wire.messages import AdapterDropped, AdapterFailed, AdapterLoaded, AdapterMoved

Drive = Callable[[AdapterCache, Loader], list[Any]]

# Seconds after which what does not come is a failure.
WAIT = 60.0


@pytest.fixture
def stored(files: Any) -> Callable[..., tuple[str, str]]:
    """Writes the adapter of a seed; returns its digest and folder."""

    def write(seed: int, rank: int = 2) -> tuple[str, str]:
        folder = files.write(f"adapter-{seed}", seed, rank)
        return content_digest(folder), str(folder)

    return write


def placed(cache: AdapterCache, loader: Loader, adapter: tuple[str, str]) -> int:
    """Acquires an adapter as an engine does: asks, sleeps until there is news, asks again."""
    while (slot := cache.acquire(*adapter)) is None:
        assert select.select([loader.fileno()], [], [], WAIT)[0], "asleep for ever"
        cache.poll()
    return slot


def test_an_adapter_comes_from_disk_to_a_slot_and_serves(make_device, files, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache()
    adapter = stored(seed=1)
    assert cache.tier(adapter[0]) == "disk"
    cache.load(*adapter, to_device=True)

    *events, loaded = drive_cache(cache, device.loader)

    assert [(type(e), e.tier) for e in events] == [(AdapterMoved, "host"), (AdapterMoved, "device")]
    assert isinstance(loaded, AdapterLoaded)
    assert (loaded.info.family, loaded.info.rank, loaded.info.parameters) == ("lora", 2, 28)
    slot = cache.acquire(*adapter)
    torch.testing.assert_close(device.delta(slot), files.delta(1), atol=1e-6, rtol=0)


def test_an_adapter_is_leased_only_for_calls_that_it_can_answer(make_device, stored):
    device = make_device(slots=2)
    cache, adapter = device.cache(), stored(seed=1)
    assert cache.acquire(*adapter, "Classify") is None, "nothing is known of it yet"
    placed(cache, device.loader, adapter)
    cache.release(adapter[0])
    with pytest.raises(FailedPrecondition) as caught:
        cache.acquire(*adapter, "Classify")
    assert caught.value.reason == "NO_TASK_HEAD"
    with pytest.raises(Internal):
        cache.release(adapter[0])
    assert cache.acquire(*adapter, "Embed") is not None


def test_leases_are_counted_by_where_the_adapter_was(make_device, stored):
    device = make_device(slots=1)
    cache = device.cache()
    first, second = stored(seed=1), stored(seed=2)
    for adapter in (first, first, second, first):
        placed(cache, device.loader, adapter)
        cache.release(adapter[0])
    assert (cache.misses, cache.host_hits, cache.device_hits) == (2, 1, 1)
    assert cache.device_evictions == 2


def test_first_requests_of_one_adapter_share_one_read(make_device, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache()
    adapter = stored(seed=1)
    assert [cache.acquire(*adapter) for _ in range(500)] == [None] * 500
    placed(cache, device.loader, adapter)
    assert device.reads == [adapter[0]]
    assert {cache.acquire(*adapter) for _ in range(500)} == {0}
    assert cache.misses == 1


def test_a_slow_read_delays_nobody_else(make_device, stored, drive_cache):
    device = make_device(slots=2)
    slow, quick = stored(seed=1), stored(seed=2)
    gate = threading.Event()

    def parse(folder: Path, digest: str) -> Any:
        if digest == slow[0]:
            assert gate.wait(WAIT)
        return device.parse(folder, digest)

    loader = Loader(parse, device.sites.write)
    cache = AdapterCache(device.sites, loader, slots=2, host_bytes=1 << 20)
    assert cache.acquire(*slow) is None
    placed(cache, loader, quick)
    assert cache.acquire(*slow) is None
    gate.set()
    placed(cache, loader, slow)
    loader.close()


def test_64_adapters_over_8_slots_all_serve_themselves(make_device, files, stored, drive_cache):
    device = make_device(slots=8)
    cache = device.cache()
    adapters = {seed: stored(seed, rank=1 + seed % 4) for seed in range(64)}
    waiting = [seed for _ in range(3) for seed in adapters]
    running: list[int] = []
    while waiting or running:
        for seed in list(waiting):
            slot = cache.acquire(*adapters[seed])
            if slot is not None:
                waiting.remove(seed)
                running.append(seed)
                expected = files.delta(seed, 1 + seed % 4)
                torch.testing.assert_close(device.delta(slot), expected, atol=1e-5, rtol=0)
        for seed in running[:4]:
            running.remove(seed)
            cache.release(adapters[seed][0])
        drive_cache(cache, device.loader)
    assert cache.device_evictions >= 56
    assert cache.device_hits + cache.host_hits + cache.misses == 3 * 64


def test_a_leased_slot_is_never_given_away(make_device, files, stored, drive_cache):
    device = make_device(slots=1)
    cache = device.cache()
    first, second = stored(seed=1), stored(seed=2)
    slot = placed(cache, device.loader, first)
    for _ in range(5):
        assert cache.acquire(*second) is None
        drive_cache(cache, device.loader)
        torch.testing.assert_close(device.delta(slot), files.delta(1), atol=1e-6, rtol=0)
    assert cache.acquire(*second) is None
    assert cache.blocked(second[0])
    cache.release(first[0])
    assert placed(cache, device.loader, second) == slot
    torch.testing.assert_close(device.delta(slot), files.delta(2), atol=1e-6, rtol=0)
    assert cache.tier(first[0]) == "host"


def test_a_waited_for_adapter_keeps_its_slot_until_it_is_used(make_device, stored, drive_cache):
    device = make_device(slots=1)
    cache = device.cache()
    first, second = stored(seed=1), stored(seed=2)
    cache.acquire(*first)
    cache.acquire(*second)
    while cache.tier(first[0]) != "device" and cache.tier(second[0]) != "device":
        cache.acquire(*first)
        cache.acquire(*second)
        assert select.select([device.loader.fileno()], [], [], WAIT)[0]
        cache.poll()
    winner, loser = (first, second) if cache.tier(first[0]) == "device" else (second, first)
    assert cache.acquire(*loser) is None
    assert cache.acquire(*winner) == 0


def test_what_blocks_a_request_expires_without_other_news(make_device, stored, drive_cache):
    """An engine with nothing to run sleeps on the descriptor alone."""
    device = make_device(slots=1)
    cache = device.cache()
    gone, waiting = stored(seed=1), stored(seed=2)
    for adapter in (gone, waiting):
        cache.load(*adapter, to_device=False)
    drive_cache(cache, device.loader)
    cache.acquire(*gone)
    while cache.pending_loads:
        assert select.select([device.loader.fileno()], [], [], WAIT)[0]
        cache.poll()
    assert cache.tier(gone[0]) == "device"
    assert cache.acquire(*waiting) is None
    assert cache.blocked(waiting[0])
    placed(cache, device.loader, waiting)


def test_release_without_a_lease_is_a_bug(make_device, stored):
    cache = make_device(slots=1).cache()
    with pytest.raises(Internal):
        cache.release(stored(seed=1)[0])


def test_a_load_that_memory_has_no_room_for_is_refused_alone(make_device, stored, drive_cache):
    """Requests for the same adapter go on waiting."""
    device = make_device(slots=1)
    first, second, third = (stored(seed) for seed in range(3))
    size = device.parse(Path(first[1]), first[0]).host_bytes
    cache = device.cache(host_bytes=size)
    placed(cache, device.loader, first)
    # One waits on the host for the slot, and so another has no room there.
    while cache.acquire(*second) is None and not cache.blocked(second[0]):
        assert select.select([device.loader.fileno()], [], [], WAIT)[0]
        cache.poll()
    assert (cache.tier(second[0]), cache.acquire(*third)) == ("host", None)

    cache.load(*third, to_device=False)
    (refused,) = cache.poll()
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "HOST_MEMORY_FULL")
    assert cache.acquire(*third) is None
    cache.release(first[0])
    assert placed(cache, device.loader, third) == 0


def test_pinned_adapters_stay_and_too_many_pins_are_refused(make_device, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache()
    first, second, third = (stored(seed) for seed in range(3))
    cache.pin(*first, pinned=True)
    cache.load(*second, to_device=True, pinned=True)
    events = drive_cache(cache, device.loader)
    assert [type(e) for e in events].count(AdapterLoaded) == 2

    cache.pin(*third, pinned=True)
    (refused,) = drive_cache(cache, device.loader)
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "ALL_SLOTS_PINNED")
    with pytest.raises(FailedPrecondition) as error:
        placed(cache, device.loader, third)
    assert error.value.reason == "ALL_SLOTS_PINNED"
    assert cache.tier(first[0]) == cache.tier(second[0]) == "device"

    cache.pin(*first, pinned=False)
    cache.load(*third, to_device=True)
    drive_cache(cache, device.loader)
    assert (cache.tier(first[0]), cache.tier(third[0])) == ("host", "device")


def test_an_adapter_larger_than_the_arena_is_refused_with_the_sizes(
    make_device, stored, drive_cache
):
    device = make_device(slots=2, arena_bytes=1 << 10)
    cache = device.cache()
    adapter = stored(seed=1, rank=64)
    cache.load(*adapter, to_device=True)
    failed = drive_cache(cache, device.loader)[-1]
    assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "ADAPTER_TOO_LARGE")
    assert str(device.sites.capacity_bytes) in failed.message


def test_an_adapter_larger_than_the_host_cache_is_refused(make_device, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache(host_bytes=100)
    cache.load(*stored(seed=1), to_device=False)
    (failed,) = drive_cache(cache, device.loader)
    assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "ADAPTER_TOO_LARGE")


def test_a_failed_load_is_remembered_for_requests_and_retried_later(
    make_device, stored, drive_cache
):
    device = make_device(slots=2)
    now = 0.0
    cache = AdapterCache(
        device.sites, device.loader, slots=2, host_bytes=1 << 20, clock=lambda: now
    )
    digest, folder = stored(seed=1)
    weights = Path(folder) / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))

    assert cache.acquire(digest, folder) is None
    (failed,) = drive_cache(cache, device.loader)
    assert isinstance(failed, AdapterFailed)
    weights.write_bytes(sound)
    for _ in range(100):
        with pytest.raises(DataLoss):
            cache.acquire(digest, folder)
    assert device.reads == []
    now = 5.0
    assert placed(cache, device.loader, (digest, folder)) == 0


def test_an_explicit_load_retries_at_once(make_device, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache()
    digest, folder = stored(seed=1)
    cache.load(digest, f"{folder}-gone", to_device=False)
    (failed,) = drive_cache(cache, device.loader)
    assert failed.code == "DATA_LOSS"
    cache.load(digest, folder, to_device=False)
    assert isinstance(drive_cache(cache, device.loader)[-1], AdapterLoaded)


def test_drop_waits_for_the_last_lease(make_device, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache()
    adapter = stored(seed=1)
    placed(cache, device.loader, adapter)
    placed(cache, device.loader, adapter)
    cache.drop(adapter[0])
    cache.release(adapter[0])
    assert drive_cache(cache, device.loader) == []
    cache.release(adapter[0])
    assert select.select([device.loader.fileno()], [], [], WAIT)[0], "nothing wakes the engine"
    assert cache.poll() == [AdapterDropped(adapter[0])]
    assert (cache.tier(adapter[0]), device.sites.used_bytes) == ("disk", 0)


def test_a_drop_of_the_unknown_is_answered(make_device):
    cache = make_device(slots=1).cache()
    cache.drop("0" * 64)
    assert cache.poll() == [AdapterDropped("0" * 64)]


def test_answers_of_one_digest_come_in_the_order_of_asking(make_device, stored, drive_cache):
    device = make_device(slots=2)
    cache = device.cache()
    digest, folder = stored(seed=1)
    cache.load(digest, folder, to_device=True)
    cache.load(digest, folder, to_device=False)
    cache.drop(digest)
    cache.load(digest, folder, to_device=True)
    events = [e for e in drive_cache(cache, device.loader) if not isinstance(e, AdapterMoved)]
    kinds = [AdapterFailed, AdapterFailed, AdapterDropped, AdapterLoaded]
    assert [type(e) for e in events] == kinds
    assert cache.tier(digest) == "device"


def test_host_memory_gives_way_by_bytes_to_the_newest(make_device, stored, drive_cache):
    device = make_device(slots=1)
    size = 2 * (8 + 6) * 4
    cache = device.cache(host_bytes=2 * size)
    first, second, third = (stored(seed) for seed in range(3))
    for adapter in (first, second, third):
        cache.load(*adapter, to_device=False)
        events = drive_cache(cache, device.loader)
    assert [cache.tier(a[0]) for a in (first, second, third)] == ["disk", "host", "host"]
    assert AdapterMoved(first[0], "disk", events[0].info) in events
    assert cache.host_evictions == 1


@pytest.mark.parametrize("part", ["bytes_of", "reserve"])
def test_lack_of_memory_on_the_engines_thread_fails_that_load_alone(
    make_device, files, stored, drive_cache, monkeypatch, part
):
    """Whoever had to leave for it has really left, and everybody can come back."""
    device = make_device(slots=1)
    cache = device.cache()
    adapters = {seed: stored(seed) for seed in (1, 2)}
    cache.load(*adapters[1], to_device=True)
    drive_cache(cache, device.loader)
    with monkeypatch.context() as patch:
        patch.setattr(device.sites, part, lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
        cache.load(*adapters[2], to_device=True)
        failed = drive_cache(cache, device.loader)[-1]
    assert isinstance(failed, AdapterFailed)
    assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    for seed, adapter in adapters.items():
        cache.load(*adapter, to_device=True)
        drive_cache(cache, device.loader)
        slot = placed(cache, device.loader, adapter)
        torch.testing.assert_close(device.delta(slot), files.delta(seed), atol=1e-6, rtol=0)
        cache.release(adapter[0])
