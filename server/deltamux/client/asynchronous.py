"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltamux.client.answer import Answer, added_up
from deltamux.client.blocking import DEFAULT_TARGET
from deltamux.client.error import ClientError, translated
from deltamux.client.requests import load_adapter_request
from deltamux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)


class AsyncClient:
    """What `Client` is for plain functions; many calls share its one connection."""

    def __init__(self, target: str = DEFAULT_TARGET, timeout: float | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._timeout = timeout
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

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

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        request = control_pb2.GetServerInfoRequest()
        info: control_pb2.GetServerInfoResponse = await self._call(
            self._control.GetServerInfo, request
        )
        return info

    async def list_adapters(self) -> list[adapters_pb2.Adapter]:
        """All adapters that the server knows, page after page."""
        adapters: list[adapters_pb2.Adapter] = []
        request = adapters_pb2.ListAdaptersRequest()
        while True:
            page = await self._call(self._adapters.ListAdapters, request)
            adapters.extend(page.adapters)
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    async def load_adapter(
        self, name: str, source: str, *, pinned: bool = False, upto: str = "device"
    ) -> adapters_pb2.Adapter:
        """Registers `source`, a folder on the server, and loads it up to disk, host or device."""
        request = load_adapter_request(name, source, pinned, upto)
        loaded: adapters_pb2.LoadAdapterResponse = await self._call(
            self._adapters.LoadAdapter, request
        )
        return loaded.adapter

    async def unload_adapter(self, name: str, *, purge: bool = False) -> None:
        request = adapters_pb2.UnloadAdapterRequest(name=name, purge=purge)
        await self._call(self._adapters.UnloadAdapter, request)

    async def pin_adapter(self, name: str, pinned: bool = True) -> adapters_pb2.Adapter:
        request = adapters_pb2.UpdateAdapterRequest(name=name, pinned=pinned)
        updated: adapters_pb2.UpdateAdapterResponse = await self._call(
            self._adapters.UpdateAdapter, request
        )
        return updated.adapter

    async def healthy(self) -> bool:
        """Whether the server says SERVING; False too when nothing answers."""
        try:
            request = health_pb2.HealthCheckRequest()
            reply = await self._call(health_pb2_grpc.HealthStub(self._channel).Check, request)
        except ClientError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

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
