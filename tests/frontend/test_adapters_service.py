"""The life of adapters over the wire, on the real catalog."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deltamux.v1 import adapters_pb2 as v1
from deltamux.v1 import inference_pb2
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    Cancel,
    DropAdapter,
    FirstToken,
    LoadAdapter,
    PinAdapter,
    Submit,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's two files; what is in them only the engine cares about."""
    return make_folder(tmp_path / "adapter", b"one")


def make_folder(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def load(name: str, folder: Path, **fields: object) -> v1.LoadAdapterRequest:
    return v1.LoadAdapterRequest(name=name, source=str(folder), **fields)


def generate(adapter: str, text: str = "hi") -> inference_pb2.GenerateRequest:
    stopping = inference_pb2.StoppingCriteria(max_tokens=64)
    return inference_pb2.GenerateRequest(text=text, adapter=adapter, stopping=stopping)


async def test_an_adapter_lives(harness, refusal, folder: Path) -> None:
    harness.engine.answer_all(tier="host")
    loaded = await harness.adapters.LoadAdapter(load("team/a", folder, pinned=True))
    adapter = loaded.adapter
    assert not loaded.already_loaded
    assert (adapter.name, len(adapter.version), adapter.family) == ("team/a", 64, "lora")
    assert (adapter.tier, adapter.pinned, adapter.live) == (inference_pb2.TIER_DEVICE, True, True)
    assert (adapter.rank, adapter.parameters, adapter.note) == (4, 100, "a note")
    assert (adapter.host_bytes, adapter.device_bytes) == (1000, 2000)
    assert adapter.source == str(folder)
    again = await harness.adapters.LoadAdapter(load("team/a", folder))
    assert again.already_loaded and again.adapter == adapter
    got = await harness.adapters.GetAdapter(v1.GetAdapterRequest(name="team/a"))
    assert got.adapter == adapter
    messages = await harness.collect(generate(f"team/a@{adapter.version[:8]}"))
    assert messages[0].served_by == inference_pb2.ServedBy(
        model="tiny", adapter="team/a", version=adapter.version, tier=inference_pb2.TIER_HOST
    )
    unpinned = await harness.adapters.UpdateAdapter(
        v1.UpdateAdapterRequest(name="team/a", pinned=False)
    )
    assert not unpinned.adapter.pinned
    await harness.adapters.UnloadAdapter(v1.UnloadAdapterRequest(name="team/a", purge=True))
    for call in (
        harness.adapters.GetAdapter(v1.GetAdapterRequest(name="team/a")),
        harness.adapters.UnloadAdapter(v1.UnloadAdapterRequest(name="team/a")),
        harness.adapters.UpdateAdapter(v1.UpdateAdapterRequest(name="team/a", pinned=True)),
        harness.collect(generate("team/a")),
    ):
        missing = await refusal(call)
        assert (missing.code, missing.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


async def test_a_request_carries_its_adapter_to_the_engine(harness, folder: Path) -> None:
    harness.catalog.register("a", str(folder))
    call = harness.inference.Generate(generate("a"))
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert len(submit.adapter) == 64
    stored = Path(submit.adapter_path) / "adapter_model.safetensors"
    assert stored.read_bytes() == b"one"


async def test_one_in_memory_whose_copy_has_left_the_disk_is_served(harness, tmp_path) -> None:
    """Its first request looks for a tokenizer beside it."""
    harness.engine.answer_all()
    # The disk tier of these tests has room for one of them.
    for name in ("a", "b"):
        folder = make_folder(tmp_path / name, name.encode() * 600_000)
        await harness.adapters.LoadAdapter(load(name, folder))
    for name in ("a", "b", "a"):
        assert (await harness.collect(generate(name)))[-1].HasField("usage")


async def test_a_swap_is_for_new_requests_only(harness, tmp_path: Path, folder: Path) -> None:
    first = asyncio.ensure_future(harness.adapters.LoadAdapter(load("a", folder)))
    command = await harness.engine.receive(LoadAdapter)
    harness.engine.loaded(command.digest)
    old = (await first).adapter.version
    running = asyncio.create_task(harness.collect(generate("a")))
    submit = await harness.engine.receive(Submit)

    swap = asyncio.ensure_future(
        harness.adapters.LoadAdapter(load("a", make_folder(tmp_path / "next", b"two")))
    )
    command = await harness.engine.receive(LoadAdapter)
    harness.engine.loaded(command.digest)
    new = (await swap).adapter.version
    later = harness.inference.Generate(generate("a"))
    assert (await harness.engine.receive(Submit)).adapter == new != old == submit.adapter
    later.cancel()
    assert await harness.engine.receive(Cancel)
    assert not [m for m in harness.engine.received() if isinstance(m, DropAdapter)]
    harness.engine.say(submit, [5], finish="length", first=FirstToken(0, 0, "device"))
    assert (await running)[0].served_by.version == old
    assert (await harness.engine.receive(DropAdapter)).digest == old


async def test_unload_waits_for_the_last_request(harness, refusal, folder: Path) -> None:
    harness.catalog.register("a", str(folder))
    running = asyncio.create_task(harness.collect(generate("a")))
    submit = await harness.engine.receive(Submit)
    unload = asyncio.ensure_future(
        harness.adapters.UnloadAdapter(v1.UnloadAdapterRequest(name="a"))
    )
    while (await _active(harness)) is not None:
        await asyncio.sleep(0.001)
    assert (await refusal(harness.collect(generate("a")))).code == "NOT_FOUND"
    assert not [m for m in harness.engine.received() if isinstance(m, DropAdapter)]
    harness.engine.say(submit, [5], finish="length", first=FirstToken(0, 0, "device"))
    await running
    drop = await harness.engine.receive(DropAdapter)
    assert not unload.done()
    harness.engine.send(AdapterDropped(drop.digest))
    await unload


async def _active(harness) -> int | None:
    listed = await harness.adapters.ListAdapters(v1.ListAdaptersRequest())
    return next((adapter.active_requests for adapter in listed.adapters), None)


async def test_a_refusal_of_the_engine_is_the_loads_own(harness, refusal, folder: Path) -> None:
    call = asyncio.create_task(refusal(harness.adapters.LoadAdapter(load("a", folder))))
    command = await harness.engine.receive(LoadAdapter)
    harness.engine.send(
        AdapterFailed(command.digest, "FAILED_PRECONDITION", "SHAPE_MISMATCH", "of another base")
    )
    got = await call
    assert (got.code, got.reason) == ("FAILED_PRECONDITION", "SHAPE_MISMATCH")
    assert got.message == "of another base"
    listed = await harness.adapters.ListAdapters(v1.ListAdaptersRequest())
    assert not listed.adapters


async def test_another_digest_than_expected_is_refused(harness, refusal, folder: Path) -> None:
    got = await refusal(harness.adapters.LoadAdapter(load("a", folder, expect_version="0" * 64)))
    assert (got.code, got.reason) == ("INVALID_ARGUMENT", "DIGEST_MISMATCH")


async def test_lists_come_in_pages(harness, folder: Path) -> None:
    for number in range(5):
        harness.catalog.register(f"a{number}", str(folder))
    names, token, pages = [], "", 0
    while True:
        page = await harness.adapters.ListAdapters(
            v1.ListAdaptersRequest(page_size=2, page_token=token)
        )
        names += [adapter.name for adapter in page.adapters]
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert names == [f"a{number}" for number in range(5)] and pages == 3
    nearer = await harness.adapters.ListAdapters(
        v1.ListAdaptersRequest(at_least=inference_pb2.TIER_HOST)
    )
    assert not nearer.adapters


async def test_pins_reach_the_engine(harness, folder: Path) -> None:
    harness.catalog.register("a", str(folder))
    call = asyncio.ensure_future(
        harness.adapters.UpdateAdapter(v1.UpdateAdapterRequest(name="a", pinned=True))
    )
    command = await harness.engine.receive(PinAdapter)
    assert command.pinned
    harness.engine.loaded(command.digest)
    assert (await call).adapter.pinned


async def test_tenants_and_traffic_are_not_served(harness, refusal, folder: Path) -> None:
    for call, reason in (
        (harness.adapters.LoadAdapter(load("a", folder, tenant="t")), "TENANT"),
        (harness.adapters.UpdateAdapter(v1.UpdateAdapterRequest(name="a", tenant="t")), "TENANT"),
        (
            harness.adapters.UpdateAdapter(v1.UpdateAdapterRequest(name="a", traffic={"v": 1.0})),
            "TRAFFIC",
        ),
    ):
        got = await refusal(call)
        assert (got.code, got.reason) == ("UNIMPLEMENTED", reason)


async def test_a_name_that_none_can_have_is_refused_by_its_own_field(harness, refusal) -> None:
    adapters, bad = harness.adapters, "../up"
    for call in (
        adapters.LoadAdapter(v1.LoadAdapterRequest(name=bad, source="/a")),
        adapters.UnloadAdapter(v1.UnloadAdapterRequest(name=bad)),
        adapters.GetAdapter(v1.GetAdapterRequest(name=bad)),
        adapters.UpdateAdapter(v1.UpdateAdapterRequest(name=bad, pinned=True)),
    ):
        got = await refusal(call)
        assert (got.reason, got.fields) == ("INVALID_ADAPTER_NAME", ("name",))
