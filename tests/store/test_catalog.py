"""Names, versions and leases, on a real disk store, cache, loader and device."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from deltamux.errors import (
    AlreadyExists,
    DataLoss,
    DeltamuxError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from deltamux.store.content import content_digest
from deltamux.store.lease import Lease

WEIGHTS = "adapter_model.safetensors"


async def served(store, lease: Lease) -> torch.Tensor:
    """What the leased adapter adds, computed on the device as a request would."""
    cache = store.engine.cache
    async with asyncio.timeout(10):
        while (slot := cache.acquire(lease.version, lease.path)) is None:
            await asyncio.sleep(0)
            store.engine.poll()
    delta = store.device.delta(slot)
    cache.release(lease.version)
    return delta


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def test_a_registered_adapter_is_read_at_its_first_request(store, files):
    folder = files.write("a", seed=1)
    store.catalog.register("a", str(folder))
    assert store.catalog.get("a").tier == "remote"
    lease = await store.catalog.resolve("a")
    assert lease.version == content_digest(folder)
    torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)
    facts = store.catalog.get("a")
    assert (facts.tier, facts.family, facts.rank, facts.active_requests) == ("device", "lora", 2, 1)
    lease.release()
    lease.release()
    assert store.catalog.get("a").active_requests == 0


async def test_500_first_requests_cause_one_ingest_and_one_load(store, files, monkeypatch):
    store.catalog.register("a", str(files.write("a", seed=1)))
    ingest = Mock(wraps=store.disk.ingest)
    monkeypatch.setattr(store.disk, "ingest", ingest)

    leases = await asyncio.gather(*(store.catalog.resolve("a") for _ in range(500)))
    await asyncio.gather(*(served(store, lease) for lease in leases))

    assert (ingest.call_count, len(store.device.reads)) == (1, 1)
    assert store.catalog.get("a").active_requests == 500
    for lease in leases:
        lease.release()
    assert store.catalog.get("a").active_requests == 0


async def test_a_failing_source_is_read_once_a_while(store, files, monkeypatch):
    now = 0.0
    monkeypatch.setattr(store.catalog, "_clock", lambda: now)
    ingest = Mock(wraps=store.disk.ingest)
    monkeypatch.setattr(store.disk, "ingest", ingest)
    folder = files.write("a", seed=1)
    (folder / WEIGHTS).write_bytes(b"<html>")
    store.catalog.register("a", str(folder))
    outcomes = await asyncio.gather(
        *(store.catalog.resolve("a") for _ in range(100)), return_exceptions=True
    )
    kinds = Counter(type(outcome) for outcome in outcomes)
    assert kinds == {FailedPrecondition: 100}, "the request is not what is wrong"
    assert ingest.call_count == 1
    files.write("a", seed=1)
    with pytest.raises(FailedPrecondition):
        await store.catalog.resolve("a")
    now = 5.0
    (await store.catalog.resolve("a")).release()


async def test_unknown_names_and_versions_are_not_found_with_one_text(store, files):
    await store.catalog.load("a", str(files.write("a", seed=1)))
    texts = set()
    for reference in ("b", f"b@{'0' * 64}", f"a@{'0' * 64}"):
        for call in (store.catalog.resolve, store.catalog.unload):
            with pytest.raises(NotFound) as error:
                await call(reference)
            texts.add(error.value.message.replace(reference, "?"))
        with pytest.raises(NotFound):
            store.catalog.get(reference)
    assert texts == {"adapter '?' is not known"}


async def test_a_version_may_be_named_by_the_beginning_of_its_digest(store, files):
    version = (await store.catalog.load("a", str(files.write("a", seed=1)))).facts.version
    for reference in (f"a@{version}", f"a@{version[:8]}"):
        lease = await store.catalog.resolve(reference)
        assert lease.version == version
        lease.release()


async def test_loading_the_same_content_again_changes_nothing(store, files):
    source = str(files.write("a", seed=1))
    first = await store.catalog.load("a", source)
    again = await store.catalog.load("a", source)
    assert (first.already_loaded, again.already_loaded) == (False, True)
    assert first.facts == again.facts
    assert store.device.reads == [first.facts.version]


async def test_an_unexpected_digest_is_refused(store, files):
    source = files.write("a", seed=1)
    with pytest.raises(InvalidArgument) as error:
        await store.catalog.load("a", str(source), expect_version="0" * 64)
    assert error.value.reason == "DIGEST_MISMATCH"
    with pytest.raises(NotFound):
        store.catalog.get("a")
    await store.catalog.load("a", str(source), expect_version=content_digest(source))


@pytest.mark.parametrize("upto", ["disk", "host", "device"])
async def test_an_adapter_is_loaded_as_far_as_asked(store, files, upto):
    loaded = await store.catalog.load("a", str(files.write("a", seed=1)), upto=upto)
    assert loaded.facts.tier == upto


async def test_a_swap_leaves_admitted_requests_their_version(store, files):
    source = files.write("a", seed=1)
    await store.catalog.load("a", str(source))
    old = await store.catalog.resolve("a")
    files.write("a", seed=2)
    swapped = await store.catalog.load("a", str(source))
    new = await store.catalog.resolve("a")

    assert (swapped.already_loaded, new.version == swapped.facts.version) == (False, True)
    torch.testing.assert_close(await served(store, old), files.delta(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(await served(store, new), files.delta(2), atol=1e-6, rtol=0)
    rows, _ = store.catalog.page(10)
    assert {(row.version, row.live) for row in rows} == {(old.version, False), (new.version, True)}

    old.release()
    await store.until(lambda: store.engine.cache.tier(old.version) == "disk")
    with pytest.raises(NotFound):
        await store.catalog.resolve(f"a@{old.version}")
    torch.testing.assert_close(await served(store, new), files.delta(2), atol=1e-6, rtol=0)


async def test_requests_during_swaps_see_versions_in_order(store, files):
    """A request that starts after a swap was acknowledged never gets what was live before it."""
    source = files.write("a", seed=0)
    versions = [(await store.catalog.load("a", str(source), upto="host")).facts.version]
    acknowledged = 0
    stop = False

    async def client() -> int:
        count = 0
        while not stop:
            floor = acknowledged
            lease = await store.catalog.resolve("a")
            seed = seeds[lease.version]
            assert seed >= floor
            torch.testing.assert_close(await served(store, lease), files.delta(seed))
            lease.release()
            count += 1
            await asyncio.sleep(0)
        return count

    seeds = {versions[0]: 0}
    clients = [asyncio.create_task(client()) for _ in range(4)]
    for seed in range(1, 20):
        seeds[content_digest(files.write("a", seed))] = seed
        await store.catalog.load("a", str(source), upto="host")
        acknowledged = seed
    stop = True
    assert min(await asyncio.gather(*clients)) > 0
    await store.until(lambda: len(store.catalog.page(10)[0]) == 1)


async def test_a_bad_new_version_leaves_the_good_one_live(store, files):
    source = files.write("a", seed=1)
    good = (await store.catalog.load("a", str(source))).facts
    files.write("a", seed=2)
    flip_bit(source / WEIGHTS)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
    with pytest.raises(DeltamuxError):
        await store.catalog.load("a", str(source))
    assert store.catalog.get("a") == good
    lease = await store.catalog.resolve("a")
    torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)


async def test_swapping_back_revives_a_version_that_is_still_leased(store, files):
    source = files.write("a", seed=1)
    await store.catalog.load("a", str(source))
    old = await store.catalog.resolve("a")
    files.write("a", seed=2)
    await store.catalog.load("a", str(source))
    files.write("a", seed=1)
    back = await store.catalog.load("a", str(source))
    assert (back.facts.version, back.facts.live) == (old.version, True)
    old.release()
    await store.until(lambda: len(store.catalog.page(10)[0]) == 1)
    assert store.catalog.page(10)[0][0].version == old.version
    lease = await store.catalog.resolve("a")
    torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)


async def test_a_new_name_whose_adapter_is_unfit_stays_unknown(store, files):
    source = files.write("a", seed=1)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
    with pytest.raises(DeltamuxError):
        await store.catalog.load("a", str(source))
    with pytest.raises(NotFound):
        store.catalog.get("a")


async def test_unload_returns_when_the_last_lease_ends(store, files):
    source = files.write("a", seed=1)
    await store.catalog.load("a", str(source))
    leases = [await store.catalog.resolve("a") for _ in range(3)]
    unload = asyncio.create_task(store.catalog.unload("a", purge=True))
    await asyncio.sleep(0.01)
    with pytest.raises(NotFound):
        await store.catalog.resolve("a")
    for lease in leases:
        assert not unload.done()
        torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)
        lease.release()
    await unload
    assert store.device.sites.used_bytes == 0
    assert leases[0].version not in store.disk
    assert not Path(leases[0].path).exists()


async def test_unload_without_purge_keeps_the_copy(store, files):
    version = (await store.catalog.load("a", str(files.write("a", seed=1)))).facts.version
    await store.catalog.unload("a")
    assert version in store.disk


async def test_content_that_two_names_share_stays_for_the_other(store, files):
    first = await store.catalog.load("a", str(files.write("a", seed=1)))
    second = await store.catalog.load("b", str(files.write("b", seed=1)))
    assert first.facts.version == second.facts.version
    await store.catalog.unload("a", purge=True)
    lease = await store.catalog.resolve("b")
    torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)
    assert first.facts.version in store.disk


async def test_an_old_version_can_be_unloaded_by_its_digest(store, files):
    source = files.write("a", seed=1)
    await store.catalog.load("a", str(source))
    old = await store.catalog.resolve("a")
    files.write("a", seed=2)
    await store.catalog.load("a", str(source))
    unload = asyncio.create_task(store.catalog.unload(f"a@{old.version}"))
    await asyncio.sleep(0.01)
    assert not unload.done()
    old.release()
    await unload
    (await store.catalog.resolve("a")).release()


async def test_a_pinned_adapter_cannot_be_unloaded_and_takes_its_pin_to_the_next_version(
    store, files
):
    source = files.write("a", seed=1)
    await store.catalog.load("a", str(source), pinned=True)
    with pytest.raises(FailedPrecondition) as error:
        await store.catalog.unload("a")
    assert error.value.reason == "ADAPTER_PINNED"
    files.write("a", seed=2)
    swapped = await store.catalog.load("a", str(source))
    assert (swapped.facts.pinned, swapped.facts.tier) == (True, "device")
    assert not (await store.catalog.pin("a", False)).pinned
    await store.catalog.unload("a")


async def test_pins_beyond_the_slots_are_refused(store, files):
    for name in ("a", "b"):
        await store.catalog.load(name, str(files.write(name, seed=ord(name))), pinned=True)
    store.catalog.register("c", str(files.write("c", seed=3)))
    with pytest.raises(FailedPrecondition) as error:
        await store.catalog.pin("c", True)
    assert error.value.reason == "ALL_SLOTS_PINNED"
    assert not store.catalog.get("c").pinned
    await store.catalog.pin("a", False)
    assert (await store.catalog.pin("c", True)).tier == "device"


async def test_a_pin_that_two_names_share_ends_with_the_second(store, files):
    for name in ("a", "b"):
        await store.catalog.load(name, str(files.write(name, seed=1)), pinned=True)
    await store.catalog.pin("a", False)
    for seed in (2, 3):
        await store.catalog.load("c", str(files.write("c", seed)))
    assert store.catalog.get("b").tier == "device"


async def test_a_damaged_copy_is_read_again_from_its_source(store, files):
    loaded = await store.catalog.load("a", str(files.write("a", seed=1)), upto="disk")
    flip_bit(store.disk.path(loaded.facts.version) / WEIGHTS)
    again = await store.catalog.load("a", str(files.write("a", seed=1)))
    assert (again.facts.version, again.facts.tier) == (loaded.facts.version, "device")


async def test_a_copy_found_damaged_by_a_request_heals(store, files):
    version = (
        await store.catalog.load("a", str(files.write("a", seed=1)), upto="disk")
    ).facts.version
    flip_bit(store.disk.path(version) / WEIGHTS)
    lease = await store.catalog.resolve("a")
    with pytest.raises(DataLoss):
        await served(store, lease)
    await store.until(lambda: store.catalog.get("a").tier == "host")
    torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)


async def test_damage_with_no_source_left_is_data_loss(store, files):
    source = files.write("a", seed=1)
    loaded = await store.catalog.load("a", str(source), upto="disk")
    flip_bit(store.disk.path(loaded.facts.version) / WEIGHTS)
    (source / WEIGHTS).unlink()
    lease = await store.catalog.resolve("a")
    for _ in range(2):
        with pytest.raises(DataLoss):
            await served(store, lease)


async def test_a_copy_evicted_from_disk_is_made_anew(store, files):
    version = (
        await store.catalog.load("a", str(files.write("a", seed=1)), upto="disk")
    ).facts.version
    store.disk.purge(version)
    lease = await store.catalog.resolve("a")
    assert lease.version == version
    torch.testing.assert_close(await served(store, lease), files.delta(1), atol=1e-6, rtol=0)


async def test_register_refuses_another_source_for_a_known_name(store, files):
    store.catalog.register("a", "/one")
    store.catalog.register("a", "/one")
    with pytest.raises(AlreadyExists):
        store.catalog.register("a", "/two")


async def test_work_goes_on_when_its_caller_goes_away(store, files):
    load = asyncio.create_task(store.catalog.load("a", str(files.write("a", seed=1))))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await store.until(lambda: "a" in {row.name for row in store.catalog.page(10)[0]})
    await store.until(lambda: store.catalog.get("a").tier == "device")


async def test_loads_and_unloads_of_one_name_may_race(store, files):
    sources = [str(files.write(f"a{seed}", seed)) for seed in range(3)]

    async def load(number: int) -> None:
        await store.catalog.load("a", sources[number % 3], upto="host")

    async def unload() -> None:
        with suppress(NotFound):
            await store.catalog.unload("a")

    await asyncio.gather(*(load(n) if n % 2 else unload() for n in range(40)))
    await store.catalog.load("a", sources[0])
    lease = await store.catalog.resolve("a")
    torch.testing.assert_close(await served(store, lease), files.delta(0), atol=1e-6, rtol=0)
    lease.release()
    await store.until(lambda: len(store.catalog.page(10)[0]) == 1)
    assert len(store.catalog._locks) == 0


async def test_pages_are_ordered_by_name_and_complete(store, files):
    names = [f"n{number:02}" for number in range(25)]
    for name in reversed(names):
        store.catalog.register(name, f"/{name}")
    await store.catalog.load("n07", str(files.write("n07", seed=1)))
    seen, token, pages = [], "", 0
    while True:
        rows, token = store.catalog.page(10, token)
        seen += [row.name for row in rows]
        pages += 1
        if not token:
            break
    assert (seen, pages) == (names, 3)
    assert [row.name for row in store.catalog.page(10, at_least="host")[0]] == ["n07"]


async def test_after_a_restart_of_the_engine_pins_are_restored(store, files, make_device):
    for name in ("a", "b"):
        await store.catalog.load(name, str(files.write(name, seed=ord(name))))
    await store.catalog.pin("a", True)
    device = make_device(slots=2)
    store.engine.replace(device.cache(), device.loader)
    await store.catalog.engine_restarted()
    assert store.catalog.get("a").tier == "device"
    assert store.catalog.get("b").tier == "disk"
