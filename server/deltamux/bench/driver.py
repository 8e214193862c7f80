"""Sends a workload open loop and times every answer from the moment it was due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from deltamux.bench.backend import Backend, BackendError, Progress
from deltamux.bench.workload import PlannedRequest


@dataclass
class Outcome:
    """One request's measurements, in seconds from its due time.

    A server that falls behind delays the sending of nothing here, so waiting counts in full
    (no coordinated omission).
    """

    adapter: str
    due: float
    prompt_tokens: int
    # The adapter was on the device when the request was admitted, as the base always is; None:
    # the server does not say.
    hot: bool | None = None
    output_tokens: int = 0
    first_token: float = 0.0
    latency: float = 0.0
    # Gaps between token messages, a message's gap shared by its tokens.
    inter_token: list[float] = field(default_factory=list)
    # Empty, or the code of the BackendError that ended it.
    error: str = ""
    # What it said.
    message: str = ""


async def play(
    backend: Backend,
    plan: Sequence[PlannedRequest],
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The outcomes of the whole plan, in its order; `on_done` is told of each when it is there."""
    start = time.perf_counter()

    async def served(request: PlannedRequest) -> Outcome:
        outcome = await _served(backend, request, start + request.due)
        on_done(outcome)
        return outcome

    return await asyncio.gather(*map(served, plan))


async def _served(backend: Backend, request: PlannedRequest, due: float) -> Outcome:
    await asyncio.sleep(due - time.perf_counter())
    outcome = Outcome(request.adapter, request.due, len(request.prompt))
    try:
        await _consume(backend.generate(request), due, outcome)
    except BackendError as error:
        outcome.error, outcome.message = error.code, str(error)
    outcome.latency = time.perf_counter() - due
    return outcome


async def _consume(answer: AsyncIterator[Progress], due: float, outcome: Outcome) -> None:
    last = due
    async for progress in answer:
        now = time.perf_counter()
        if progress.hot is not None:
            outcome.hot = progress.hot
        count = progress.tokens
        if count == 0:
            continue
        if outcome.output_tokens == 0:
            outcome.first_token = now - due
            outcome.inter_token += [0.0] * (count - 1)
        else:
            outcome.inter_token += [(now - last) / count] * count
        outcome.output_tokens += count
        last = now
