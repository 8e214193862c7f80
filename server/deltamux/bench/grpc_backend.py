"""A deltamux server, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from deltamux.bench.backend import BackendError, Progress
from deltamux.bench.workload import PlannedRequest
from deltamux.client import AsyncClient, ClientError, generate_request
from deltamux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
)


class GrpcBackend:
    name = "deltamux"

    def __init__(self, target: str, admin_target: str | None = None) -> None:
        """`admin_target` is where the AdapterService listens when not on `target`."""
        self._target = target
        self._admin_target = admin_target or target
        self._client = AsyncClient(target)

    async def vocab_size(self) -> int:
        async with _channel(self._target) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            info = await stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=10)
            return int(info.vocab_size)

    async def adapters(self) -> tuple[str, ...]:
        """Following the pages of the list."""
        names: list[str] = []
        async with _channel(self._admin_target) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            token = ""
            while True:
                request = adapters_pb2.ListAdaptersRequest(page_size=1000, page_token=token)
                page = await stub.ListAdapters(request, timeout=30)
                names += [adapter.name for adapter in page.adapters if adapter.live]
                token = page.next_page_token
                if not token:
                    return tuple(names)

    async def generate(self, request: PlannedRequest) -> AsyncIterator[Progress]:
        message = generate_request(
            request.prompt,
            adapter=request.adapter,
            max_tokens=request.max_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        try:
            async for response in self._client.stream(message):
                hot = None
                if response.HasField("served_by"):
                    tier = response.served_by.tier
                    hot = not request.adapter or tier == inference_pb2.TIER_DEVICE
                yield Progress(len(response.token_ids), hot)
        except ClientError as error:
            raise BackendError(error.code, error.message) from None

    async def aclose(self) -> None:
        await self._client.close()


@asynccontextmanager
async def _channel(target: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            raise BackendError(error.code().name, error.details() or "") from None
