"""Commands and their replies, over the real socket."""

from __future__ import annotations

import asyncio

import pytest

from deltamux.errors import FailedPrecondition, Unavailable
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    DropAdapter,
    LoadAdapter,
    PinAdapter,
)

DIGEST = "d" * 64


async def test_commands_on_one_digest_wait_for_each_other(harness) -> None:
    first = asyncio.create_task(harness.client.load(DIGEST, "/p", False, False))
    second = asyncio.create_task(harness.client.pin(DIGEST, "/p", True))
    third = asyncio.create_task(harness.client.drop(DIGEST))
    await harness.engine.receive(LoadAdapter)
    assert not harness.engine.received()
    harness.engine.loaded(DIGEST)
    assert (await first).family == "lora"
    await harness.engine.receive(PinAdapter)
    harness.engine.loaded(DIGEST)
    await second
    await harness.engine.receive(DropAdapter)
    assert not third.done()
    harness.engine.send(AdapterDropped(DIGEST))
    await third


async def test_the_reply_to_a_caller_that_left_is_not_the_next_ones(harness) -> None:
    gone = asyncio.create_task(harness.client.load(DIGEST, "/p", True, False))
    await harness.engine.receive(LoadAdapter)
    gone.cancel()
    await asyncio.wait({gone})
    following = asyncio.create_task(harness.client.pin(DIGEST, "/p", True))
    harness.engine.send(AdapterFailed(DIGEST, "INVALID_ARGUMENT", "OLD", "of the first"))
    await harness.engine.receive(PinAdapter)
    harness.engine.send(AdapterFailed(DIGEST, "FAILED_PRECONDITION", "NEW", "of the second"))
    with pytest.raises(FailedPrecondition, match="of the second"):
        await following


async def test_the_engines_end_answers_every_command(harness) -> None:
    running = asyncio.create_task(harness.client.load(DIGEST, "/p", True, False))
    await harness.engine.receive(LoadAdapter)
    queued = asyncio.create_task(harness.client.drop(DIGEST))
    await asyncio.sleep(0)
    harness.client.fail_all(Unavailable("gone", reason="ENGINE_LOST"))
    for call in (running, queued):
        with pytest.raises(Unavailable):
            await call
    await harness.restart_engine()
    after = asyncio.create_task(harness.client.load(DIGEST, "/p", True, False))
    await harness.engine.receive(LoadAdapter)
    harness.engine.loaded(DIGEST)
    await after
