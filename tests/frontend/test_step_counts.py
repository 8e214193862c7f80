"""What a step costs the front end: messages, and how often its tasks are woken.

Counted, not timed. A number that grows is a question: what does the step get for it?
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Generator
from dataclasses import replace
from typing import Any

import pytest

from deltamux.config import FrontendConfig
from deltamux.frontend.engine_client import EngineClient
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import FirstToken, Progress, Sampling, Stopping, Submit

STREAMS, STEPS = 256, 5
RECEIVER = EngineClient._read.__qualname__
# What gRPC runs a call in. It goes on when there are tokens, and when their message is written.
CALL, OF_A_MESSAGE = "_handle_exceptions", 2


class Counted(Coroutine[Any, Any, Any]):
    """A coroutine that counts, under its name, how often it goes on."""

    def __init__(self, inner: Coroutine[Any, Any, Any], wakeups: Counter[str]) -> None:
        self._inner, self._wakeups = inner, wakeups

    def send(self, value: Any) -> Any:
        self._wakeups[getattr(self._inner, "__qualname__", "")] += 1
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self._inner.__await__())


@pytest.fixture(autouse=True)
async def wakeups() -> Counter[str]:
    """Of the tasks that begin from now on."""
    counts: Counter[str] = Counter()
    asyncio.get_running_loop().set_task_factory(
        lambda loop, inner, **options: asyncio.Task(Counted(inner, counts), loop=loop, **options)
    )
    return counts


@pytest.fixture
def config(config: FrontendConfig) -> FrontendConfig:
    return replace(config, max_waiting_requests=STREAMS)


async def test_a_step_wakes_the_receiver_once_and_is_one_message_a_stream(harness, wakeups) -> None:
    output = v1.OutputOptions(return_token_ids=True)
    request = v1.GenerateRequest(token_ids=v1.TokenIds(ids=[5]), output=output)
    calls = [harness.inference.Generate(request, timeout=60) for _ in range(STREAMS)]
    keys = [(await harness.engine.receive(Submit)).request_id for _ in calls]
    first = FirstToken(0.0, 0.0, "")
    harness.engine.step(*(Progress(key, 0, (6,), first=first) for key in keys))
    for call in calls:
        await call.read()
    wakeups.clear()
    for token in range(7, 7 + STEPS):
        harness.engine.step(*(Progress(key, 0, (token,)) for key in keys))
        messages = [await call.read() for call in calls]
        assert [list(message.token_ids) for message in messages] == [[token]] * STREAMS
    assert wakeups[RECEIVER] == STEPS
    # The writes of the messages before may end only after they were read.
    assert 0 < wakeups[CALL] - STREAMS <= OF_A_MESSAGE * STREAMS * STEPS
    for call in calls:
        call.cancel()


async def test_who_is_steps_behind_gets_their_tokens_at_once(harness) -> None:
    told = asyncio.Event()
    harness.client.on_adapter_moved = lambda moved: told.set()
    async with harness.client.admit("r") as stream:
        stream.submit(Submit(stream.key, (1,), Sampling(), Stopping(max_tokens=9)))
        for token in range(STEPS):
            harness.engine.step(Progress(stream.key, 0, (token,)))
        harness.engine.loaded("d" * 64)
        await told.wait()
        assert (await anext(stream)).token_ids == tuple(range(STEPS))
