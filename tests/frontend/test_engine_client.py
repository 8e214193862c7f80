"""The engine's life and its requests, over the real socket."""

from __future__ import annotations

import asyncio

import pytest

from deltamux.errors import StartupError, Unavailable
from deltamux.frontend.request_stream import RequestStream
from deltamux.wire.messages import (
    AdapterFailed,
    AdapterMoved,
    Cancel,
    Progress,
    Sampling,
    StartupFailed,
    Stopping,
    Submit,
)

DIGEST = "d" * 64


def submission(key: str) -> Submit:
    return Submit(key, (1,), Sampling(), Stopping(max_tokens=1))


async def test_moves_and_failures_are_passed_on(harness) -> None:
    moves, failures = [], []
    harness.client.on_adapter_moved = moves.append
    harness.client.on_adapter_failed = failures.append
    harness.engine.loaded(DIGEST)
    failed = AdapterFailed(DIGEST, "DATA_LOSS", "DATA_LOSS", "damaged")
    harness.engine.send(failed)
    await harness.until(lambda: failures)
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


async def test_a_failure_right_behind_progress_reaches_who_is_held_up_with_that(harness) -> None:
    """The reader has only been woken when it comes, and goes on to write to a stalled client."""
    streams: list[RequestStream] = []

    async def call() -> None:
        async with harness.client.admit("r") as stream:
            stream.submit(submission(stream.key))
            streams.append(stream)
            async for _ in stream:
                await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await harness.until(lambda: streams)
    streams[0].push(Progress("", 0, (5,)))
    harness.client.fail_all(Unavailable("gone", reason="ENGINE_LOST"))
    with pytest.raises(Unavailable, match="gone"):
        await asyncio.wait_for(task, 5)


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
