"""What every call of the inference service goes through: checks, deadline, place, lease."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
from structlog.contextvars import bind_contextvars

from deltamux.frontend.adapter_tokenizers import AdapterTokenizers
from deltamux.frontend.deadline import deadline
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.printable import printable
from deltamux.frontend.request_stream import RequestStream
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.catalog.lease import Lease
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Ready

Request = TypeVar("Request", v1.GenerateRequest, v1.ClassifyRequest, v1.EmbedRequest)


@dataclass(frozen=True)
class Call(Generic[Request]):
    """A request that passed the first checks."""

    request: Request
    request_id: str
    # What the engine was when the call came.
    info: Ready
    # That the call may take, counted from its start.
    seconds: float
    # On time.perf_counter's clock.
    started: float

    @property
    def remaining(self) -> float:
        """Seconds that the call still has."""
        return self.seconds - (time.perf_counter() - self.started)

    def served_by(self, lease: Lease | None) -> v1.ServedBy:
        return v1.ServedBy(
            model=self.info.model,
            adapter=lease.name if lease else "",
            version=lease.version if lease else "",
        )


class Calls:
    """Begins calls and finds them a place in the engine."""

    def __init__(
        self,
        engine: EngineClient,
        catalog: Catalog,
        tokenizers: AdapterTokenizers,
        default_deadline: float,
    ) -> None:
        """`default_deadline`: seconds for a call that brings no deadline."""
        self._engine = engine
        self._catalog = catalog
        self._tokenizers = tokenizers
        self._default_deadline = default_deadline

    @asynccontextmanager
    async def begin(
        self,
        request: Request,
        context: grpc.aio.ServicerContext,
        check: Callable[[Request, Ready], None],
    ) -> AsyncIterator[Call[Request]]:
        """The call, while its time lasts; `check` raises for a request that cannot be served."""
        started = time.perf_counter()
        request_id = request.request_id or uuid.uuid4().hex
        bind_contextvars(request_id=printable(request_id), adapter=printable(request.adapter))
        info = self._engine.require_ready()
        check(request, info)
        async with deadline(context, self._default_deadline) as seconds:
            yield Call(request, request_id, info, seconds, started)

    @asynccontextmanager
    async def admit(self, call: Call[Request]) -> AsyncIterator[tuple[RequestStream, Lease | None]]:
        """A place in the queue, and the adapter for as long as it is needed; None: the base."""
        async with (
            self._engine.admit(call.request_id) as stream,
            self._leased(call.request.adapter) as lease,
        ):
            yield stream, lease

    @asynccontextmanager
    async def _leased(self, reference: str) -> AsyncIterator[Lease | None]:
        if not reference:
            yield None
            return
        lease = await self._catalog.resolve(reference, self._tokenizers.has_read)
        try:
            bind_contextvars(adapter=lease.name, version=lease.version)
            yield lease
        finally:
            lease.release()
