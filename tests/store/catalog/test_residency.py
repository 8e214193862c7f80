"""What disk and engine hold of a content: copies, their damage, pins; on the real store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltamux.errors import (
    DataLoss,
    FailedPrecondition,
)

WEIGHTS = "adapter_model.safetensors"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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
    torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)
    assert first.facts.version in store.disk


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
        await store.served(lease)
    await store.until(lambda: store.catalog.get("a").tier == "host")
    torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)


async def test_damage_with_no_source_left_is_data_loss(store, files):
    source = files.write("a", seed=1)
    loaded = await store.catalog.load("a", str(source), upto="disk")
    flip_bit(store.disk.path(loaded.facts.version) / WEIGHTS)
    (source / WEIGHTS).unlink()
    lease = await store.catalog.resolve("a")
    for _ in range(2):
        with pytest.raises(DataLoss):
            await store.served(lease)


async def test_a_copy_evicted_from_disk_is_made_anew(store, files):
    version = (
        await store.catalog.load("a", str(files.write("a", seed=1)), upto="disk")
    ).facts.version
    store.disk.purge(version)
    lease = await store.catalog.resolve("a")
    assert lease.version == version
    torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("evicted", [False, True])
async def test_after_a_restart_of_the_engine_pins_are_restored(store, files, make_device, evicted):
    for name in ("a", "b"):
        await store.catalog.load(name, str(files.write(name, seed=ord(name))))
    pinned = await store.catalog.pin("a", True)
    if evicted:
        store.disk.purge(pinned.version)
    device = make_device(slots=2)
    store.engine.replace(device.cache(), device.loader)
    store.catalog.engine_lost()
    assert [row.tier for row in store.catalog.page(9)[0]] == ["disk", "disk"]
    await store.catalog.engine_restarted()
    assert (store.catalog.get("a").tier, store.catalog.get("a").pinned) == ("device", True)
    assert store.catalog.get("b").tier == "disk"
