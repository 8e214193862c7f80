"""Names, on a real disk store, cache, loader and device."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch

from deltamux.errors import (
    AlreadyExists,
    DeltamuxError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from deltamux.store.digest import content_digest

WEIGHTS = "adapter_model.safetensors"


async def test_a_registered_adapter_is_read_at_its_first_request(store, files):
    folder = files.write("a", seed=1)
    store.catalog.register("a", str(folder))
    assert store.catalog.get("a").tier == "remote"
    lease = await store.catalog.resolve("a")
    assert lease.version == content_digest(folder)
    torch.testing.assert_close(await store.served(lease), files.delta(1), atol=1e-6, rtol=0)
    facts = store.catalog.get("a")
    assert (facts.tier, facts.family, facts.rank, facts.active_requests) == ("device", "lora", 2, 1)
    lease.release()
    lease.release()
    assert store.catalog.get("a").active_requests == 0


async def test_files_come_back_to_disk_for_a_request_that_has_not_read_them(store, files):
    version = (await store.catalog.load("a", str(files.write("a", seed=1)))).facts.version
    store.disk.purge(version)
    for has_read in (True, False):
        lease = await store.catalog.resolve("a", lambda digest, has_read=has_read: has_read)
        assert (lease.version, version in store.disk) == (version, not has_read)
        lease.release()


async def test_500_first_requests_cause_one_ingest_and_one_load(store, files, monkeypatch):
    store.catalog.register("a", str(files.write("a", seed=1)))
    ingest = Mock(wraps=store.disk.ingest)
    monkeypatch.setattr(store.disk, "ingest", ingest)

    leases = await asyncio.gather(*(store.catalog.resolve("a") for _ in range(500)))
    await asyncio.gather(*(store.served(lease) for lease in leases))

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


async def test_a_new_name_whose_adapter_is_unfit_stays_unknown(store, files):
    source = files.write("a", seed=1)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
    with pytest.raises(DeltamuxError):
        await store.catalog.load("a", str(source))
    with pytest.raises(NotFound):
        store.catalog.get("a")


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
    torch.testing.assert_close(await store.served(lease), files.delta(0), atol=1e-6, rtol=0)
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
