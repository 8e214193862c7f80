"""ControlService: what a router or an operator asks of one server."""

from __future__ import annotations

import grpc

import deltamux
from deltamux.frontend import validation
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.limits import MAX_ABORT_IDS
from deltamux.v1 import control_pb2 as v1
from deltamux.v1 import control_pb2_grpc


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Answers from what the engine said when it was ready."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def GetServerInfo(
        self, request: v1.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> v1.GetServerInfoResponse:
        info = self._engine.require_ready()
        return v1.GetServerInfoResponse(
            version=deltamux.__version__,
            model=info.model,
            device=info.device,
            dtype=info.dtype,
            max_context_tokens=validation.context_tokens(info),
            vocab_size=info.vocab_size,
            adapter_slots=info.adapter_slots,
            kv_cache_tokens=info.kv_cache_tokens,
            families=info.families,
            kernel_backend=info.kernel_backend,
        )

    async def Abort(
        self, request: v1.AbortRequest, context: grpc.aio.ServicerContext
    ) -> v1.AbortResponse:
        most = MAX_ABORT_IDS
        validation.check(len(request.request_ids) <= most, "request_ids", f"at most {most} ids")
        self._engine.abort(request.request_ids)
        return v1.AbortResponse()
