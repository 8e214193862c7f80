"""Versions of a name come and go while requests hold their own, on the real store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from deltamux.errors import (
    DeltamuxError,
    FailedPrecondition,
    NotFound,
)
from deltamux.store.digest import content_digest

WEIGHTS = "adapter_model.safetensors"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def test_a_swap_leaves_admitted_requests_their_version(store, files):
    source = files.write("a", seed=1)
    await store.catalog.load("a", str(source))
    old = await store.catalog.resolve("a")
    files.write("a", seed=2)
    swapped = await store.catalog.load("a", str(source))
    new = await store.catalog.resolve("a")

    assert (swapped.already_loaded, new.version == swapped.facts.version) == (False, True)
    torch.testing.assert_close(await store.served(old), files.delta(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(await store.served(new), files.delta(2), atol=1e-6, rtol=0)
    rows, _ = store.catalog.page(10)
    assert {(row.version, row.live) for row in rows} == {(old.version, False), (new.version, True)}

    old.release()
    await store.until(lambda: store.engine.cache.tier(old.version) == "disk")
    with pytest.raises(NotFound):
        await store.catalog.resolve(f"a@{old.version}")
    torch.testing.assert_close(await store.served(new), files.delta(2), atol=1e-6, rtol=0)


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
            torch.testing.assert_close(await store.served(lease), files.delta(seed))
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
    torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)


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
    torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)


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
        torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)
        lease.release()
    await unload
    assert store.device.sites.used_bytes == 0
    assert leases[0].version not in store.disk
    assert not Path(leases[0].path).exists()


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
