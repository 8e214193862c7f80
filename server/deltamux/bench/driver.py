"""Sends a workload open loop over gRPC and times every answer from the moment it was due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from deltamux.bench.workload import PlannedRequest
from deltamux.v1 import inference_pb2 as pb
from deltamux.v1 import inference_pb2_grpc as rpc


@dataclass
class Outcome:
    """One request's measurements, in seconds from its due time.

    A server that falls behind delays the sending of nothing here, so waiting counts in full
    (no coordinated omission).
    """

    adapter: str
    due: float
    prompt_tokens: int
    # The adapter was on the device when the request was admitted; the base counts as hot.
    hot: bool = True
    output_tokens: int = 0
    first_token: float = 0.0
    latency: float = 0.0
    # Gaps between token messages, a message's gap shared by its tokens.
    inter_token: list[float] = field(default_factory=list)
    # Empty, or the gRPC status code that ended it.
    error: str = ""


class Driver:
    """Plays plans against one server; `on_done` is called after every answer."""

    def __init__(self, target: str, on_done: Callable[[Outcome], None] | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._stub = rpc.InferenceServiceStub(self._channel)
        self._on_done = on_done or (lambda outcome: None)

    async def __aenter__(self) -> Driver:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

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
        except grpc.aio.AioRpcError as error:
            outcome.error = error.code().name
        outcome.latency = time.perf_counter() - due
        self._on_done(outcome)
        return outcome

    async def _consume(self, request: PlannedRequest, due: float, outcome: Outcome) -> None:
        last = due
        async for response in self._stub.Generate(_message(request)):
            now = time.perf_counter()
            if response.HasField("served_by") and request.adapter:
                outcome.hot = response.served_by.tier == pb.TIER_DEVICE
            count = len(response.token_ids)
            if count == 0:
                continue
            if outcome.output_tokens == 0:
                outcome.first_token = now - due
                outcome.inter_token += [0.0] * (count - 1)
            else:
                outcome.inter_token += [(now - last) / count] * count
            outcome.output_tokens += count
            last = now


def _message(request: PlannedRequest) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        adapter=request.adapter,
        token_ids=pb.TokenIds(ids=request.prompt),
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingCriteria(max_tokens=request.max_tokens, ignore_eos=True),
        output=pb.OutputOptions(return_token_ids=True),
    )
