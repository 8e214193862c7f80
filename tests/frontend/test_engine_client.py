"""Commands and their replies, over the real socket."""

from __future__ import annotations

import asyncio

import pytest

from deltamux.errors import FailedPrecondition, StartupError, Unavailable
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterMoved,
    Cancel,
    DropAdapter,
    LoadAdapter,
    PinAdapter,
    Sampling,
    StartupFailed,
    Stopping,
    Submit,
)

DIGEST = "d" * 64


def submission(key: str) -> Submit:
    return Submit(key, (1,), Sampling(), Stopping(max_tokens=1))


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


async def test_moves_and_failures_are_passed_on(harness) -> None:
    moves, failures = [], []
    harness.client.on_adapter_moved = moves.append
    harness.client.on_adapter_failed = failures.append
    harness.engine.loaded(DIGEST)
    failed = AdapterFailed(DIGEST, "DATA_LOSS", "DATA_LOSS", "damaged")
    harness.engine.send(failed)
    async with asyncio.timeout(10):
        while not failures:
            await asyncio.sleep(0.001)
    assert [(move.digest, move.tier) for move in moves] == [(DIGEST, "device")]
    assert isinstance(moves[0], AdapterMoved) and failures == [failed]


async def test_an_engine_that_cannot_start_says_why(harness) -> None:
    harness.client.fail_all(Unavailable("gone"))
    harness.engine.close()
    harness.engine = harness.connect()
    harness.engine.send(StartupFailed("no such model"))
    with pytest.raises(StartupError, match="no such model"):
        await harness.client.ready()
    with pytest.raises(Unavailable):
        harness.client.admit("r")


async def test_a_failure_reaches_a_task_that_waits_for_something_else(harness) -> None:
    entered, forever = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        async with harness.client.admit("r") as stream:
            stream.submit(submission(stream.key))
            entered.set()
            await forever.wait()

    task = asyncio.create_task(call())
    await entered.wait()
    harness.client.fail_all(Unavailable("gone", reason="ENGINE_LOST"))
    with pytest.raises(Unavailable, match="gone"):
        await task
    assert task.cancelling() == 0


async def test_a_cancelled_task_stays_cancelled_when_the_engine_dies_too(harness) -> None:
    entered = asyncio.Event()

    async def call() -> None:
        async with harness.client.admit("r"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await entered.wait()
    task.cancel()
    harness.client.fail_all(Unavailable("gone"))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_leaving_before_submitting_says_nothing_to_the_engine(harness) -> None:
    async with harness.client.admit("r"):
        pass
    async with harness.client.admit("r") as stream:
        stream.submit(submission(stream.key))
    assert (await harness.engine.receive(Submit)).request_id == stream.key
    assert (await harness.engine.receive(Cancel)).request_id == stream.key
    assert not harness.engine.received()
