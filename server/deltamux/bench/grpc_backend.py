"""A deltamux server, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from deltamux.bench.adapters import generating
from deltamux.bench.backend import BackendError, Progress
from deltamux.bench.workload import PlannedRequest
from deltamux.client import AsyncClient, Client, ClientError, generate_request
from deltamux.v1 import inference_pb2

# Seconds for a call that is not measured.
_PATIENCE = 60.0


class GrpcBackend:
    name = "deltamux"

    def __init__(self, target: str, admin_target: str | None = None) -> None:
        """`admin_target` is where the AdapterService listens when not on `target`."""
        self._target = target
        self._admin_target = admin_target or target
        self._client = AsyncClient(target)

    async def vocab_size(self) -> int:
        with _asked(self._target) as client:
            return client.server_info().vocab_size

    async def adapters(self) -> tuple[str, ...]:
        with _asked(self._admin_target) as client:
            return generating(client)

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


@contextmanager
def _asked(target: str) -> Iterator[Client]:
    """What is asked before anything is measured may block."""
    with Client(target, _PATIENCE) as client:
        try:
            yield client
        except ClientError as error:
            raise BackendError(error.code, error.message) from None
