"""Sends a workload open loop and times every answer from the moment it was due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deltamux.bench.backend import Backend, BackendError
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


class Driver:
    """Plays plans against one server; `on_done` is called after every answer."""

    def __init__(
        self, backend: Backend, on_done: Callable[[Outcome], None] = lambda outcome: None
    ) -> None:
        self._backend = backend
        self._on_done = on_done

    async def play(self, plan: list[PlannedRequest]) -> list[Outcome]:
        """Runs the whole plan and returns its outcomes in the order of the plan."""
        start = time.perf_counter()
        return await asyncio.gather(*(self._serve(request, start) for request in plan))

    async def _serve(self, request: PlannedRequest, start: float) -> Outcome:
        due = start + request.due
        await asyncio.sleep(due - time.perf_counter())
        outcome = Outcome(request.adapter, request.due, len(request.prompt))
        try:
            await self._consume(request, due, outcome)
        except BackendError as error:
            outcome.error = error.code
        outcome.latency = time.perf_counter() - due
        self._on_done(outcome)
        return outcome

    async def _consume(self, request: PlannedRequest, due: float, outcome: Outcome) -> None:
        last = due
        async for progress in self._backend.generate(request):
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
