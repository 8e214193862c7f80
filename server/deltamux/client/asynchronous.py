"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc
import grpc.aio

from deltamux.client.answer import Answer, added_up
from deltamux.client.blocking import DEFAULT_TARGET
from deltamux.client.error import translated
from deltamux.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """Asyncio client of the inference service; many calls share its one connection."""

    def __init__(self, target: str = DEFAULT_TARGET, timeout: float | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._timeout = timeout
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def stream(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The responses as they come; closing the iterator cancels the request."""
        call = self._inference.Generate(request, timeout=self._timeout)
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise translated(error) from None
        finally:
            call.cancel()

    async def generate(self, request: inference_pb2.GenerateRequest) -> Answer:
        """The first choice, complete."""
        return added_up([response async for response in self.stream(request)])

    async def classify(
        self, request: inference_pb2.ClassifyRequest
    ) -> list[list[inference_pb2.ClassifyResponse.Score]]:
        """The scores of each position: of the one of a sequence head, of all tokens of another."""
        response = await self._call(self._inference.Classify, request)
        return [list(position.scores) for position in response.positions]

    async def embed(self, request: inference_pb2.EmbedRequest) -> list[float]:
        response = await self._call(self._inference.Embed, request)
        return list(response.embedding)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise translated(error) from None
