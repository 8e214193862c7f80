"""When a refused client is asked to come back, and which limit it is told of."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from deltamux.frontend import retry
from deltamux.frontend.retry import LONGEST, SHORTEST, UNKNOWN, RetryDelays
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import (
    AdapterFailed,
    LoadAdapter,
    RequestFailed,
    Stats,
    StepDone,
    Submit,
)

# After a step of 0.2 s in which five rows were computed.
BUSY = Stats(1, 0, 1, 100, 0, 0, 0, 5, 1, 0.2, 0, 0, 0, 0, 0)
IDLE = msgspec.structs.replace(BUSY, waiting=8, step_rows=0, step_seconds=1e-5)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: 1.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_full_queue_needs_a_step_for_each_that_waits(exact) -> None:
    delays = RetryDelays()
    assert delays.when_full(8) == UNKNOWN
    delays.stepped(0.1)
    assert delays.when_full(8) == pytest.approx(0.8)
    assert delays.when_full(0) == SHORTEST
    assert delays.when_full(100_000) == LONGEST


def test_one_slow_step_does_not_rule_and_a_slow_engine_does(exact) -> None:
    delays = RetryDelays()
    for _ in range(100):
        delays.stepped(0.1)
    delays.stepped(2.0)
    assert delays.when_full(10) < 3
    for _ in range(100):
        delays.stepped(2.0)
    assert delays.when_full(10) > 19


def test_a_start_takes_as_long_as_the_one_before(exact) -> None:
    clock = Clock()
    delays = RetryDelays(clock)
    delays.starting()
    assert delays.when_starting() == UNKNOWN
    clock.now = 12.0
    delays.started()
    clock.now = 100.0
    delays.starting()
    assert delays.when_starting() == 12.0
    clock.now = 110.0
    assert delays.when_starting() == 2.0
    clock.now = 150.0
    assert delays.when_starting() == SHORTEST


def test_those_refused_together_do_not_come_back_together() -> None:
    delays = RetryDelays()
    delays.stepped(0.1)
    drawn = [delays.when_full(10) for _ in range(200)]
    assert len(set(drawn)) > 100
    assert 0.8 <= min(drawn) < 0.85 and 1.15 < max(drawn) <= 1.2


async def test_the_queue_and_the_steps_of_the_engine_decide(harness, refusal, exact) -> None:
    calls = [
        harness.inference.Generate(v1.GenerateRequest(text="x", request_id=f"r{i}"))
        for i in range(8)
    ]
    for _ in calls:
        await harness.engine.receive(Submit)
    # A step without rows tells nothing of how long one takes.
    for stats in (BUSY, IDLE):
        harness.engine.send(StepDone((), stats))
    await harness.until(lambda: harness.sample("requests_waiting") == IDLE.waiting)
    got = await refusal(harness.collect(v1.GenerateRequest(text="x")))
    assert (got.reason, got.retry_after) == ("QUEUE_FULL", pytest.approx(8 * 0.2))
    for call in calls:
        call.cancel()


async def test_what_the_engine_says_of_waiting_reaches_the_client(harness, refusal) -> None:
    call = asyncio.create_task(harness.collect(v1.GenerateRequest(text="x")))
    submit = await harness.engine.receive(Submit)
    words = ("RESOURCE_EXHAUSTED", "HOST_MEMORY_FULL", "host memory is full of adapters in use")
    harness.engine.send(RequestFailed(submit.request_id, *words, retry_after=1.5))
    got = await refusal(call)
    assert (got.reason, got.retry_after, got.quotas) == (words[1], 1.5, ("adapter-host-bytes",))


async def test_what_the_engine_says_of_a_load_reaches_its_caller(harness) -> None:
    load = asyncio.create_task(harness.client.load("d" * 64, "", to_device=True, pinned=False))
    command = await harness.engine.receive(LoadAdapter)
    harness.engine.send(AdapterFailed(command.digest, "RESOURCE_EXHAUSTED", "R", "full", 1.5))
    with pytest.raises(Exception) as caught:
        await load
    assert caught.value.retry_after == 1.5


async def test_other_errors_name_no_quota(harness, refusal) -> None:
    got = await refusal(harness.collect(v1.GenerateRequest(text="x", adapter="unknown")))
    assert (got.code, got.quotas) == ("NOT_FOUND", ())
