"""Builds the gRPC servers: services, interceptor, health, reflection, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_reflection.v1alpha import reflection

from deltamux.config import FrontendConfig
from deltamux.errors import StartupError
from deltamux.frontend import limits
from deltamux.frontend.adapters_service import AdapterService
from deltamux.frontend.control_service import ControlService
from deltamux.frontend.defaults import GenerationDefaults
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.health import NAME as HEALTH
from deltamux.frontend.health import Health
from deltamux.frontend.inference_service import InferenceService
from deltamux.frontend.interceptors import CallInterceptor
from deltamux.frontend.tokenizer import Tokenizer
from deltamux.metrics import Metrics
from deltamux.store.catalog.catalog import Catalog
from deltamux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name

OPTIONS = (
    ("grpc.max_receive_message_length", limits.MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", limits.MAX_RESPONSE_BYTES),
    ("grpc.max_concurrent_streams", limits.MAX_STREAMS),
    # A port in use is an error, not a port shared with another server.
    ("grpc.so_reuseport", 0),
    # Idle connections are probed, and clients may probe as often as theirs do by default.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # One that probes more often twice is sent away: GOAWAY, ENHANCE_YOUR_CALM.
    ("grpc.http2.max_ping_strikes", 2),
)


@dataclass(frozen=True)
class Servers:
    """The public listener, the admin one where configured, and the ports that they got."""

    public: grpc.aio.Server
    port: int
    admin: grpc.aio.Server | None
    admin_port: int | None
    health: Health

    async def start(self) -> None:
        for server in self._all:
            await server.start()

    async def stop(self, grace: float | None) -> None:
        """Takes no new calls, and cancels those that still run after `grace` seconds."""
        for server in self._all:
            await server.stop(grace)

    @property
    def _all(self) -> tuple[grpc.aio.Server, ...]:
        return (self.public,) if self.admin is None else (self.public, self.admin)


async def build_servers(
    config: FrontendConfig,
    engine: EngineClient,
    catalog: Catalog,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    metrics: Metrics,
) -> Servers:
    """Binds the ports (0 picks a free one); the servers are not started, health NOT_SERVING.

    Raises StartupError when a port is taken.
    """
    health = Health((INFERENCE, ADAPTERS, CONTROL))
    public = _server(metrics)
    inference = InferenceService(
        engine, catalog, tokenizer, defaults, metrics, config.default_deadline
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, public)
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(engine), public)
    await health.register(public)
    admin, names = None, [INFERENCE, CONTROL]
    if config.admin_port is not None:
        admin = _server(metrics)
        await health.register(admin)
        _reflect(config, admin, [ADAPTERS])
    else:
        names.append(ADAPTERS)
    adapters = AdapterService(catalog, config.default_deadline)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, admin or public)
    _reflect(config, public, names)
    admin_port = None if admin is None else _bind(admin, config.host, config.admin_port or 0)
    return Servers(public, _bind(public, config.host, config.port), admin, admin_port, health)


def _server(metrics: Metrics) -> grpc.aio.Server:
    interceptor = CallInterceptor(metrics, measured=f"/{INFERENCE}/")
    return grpc.aio.server(interceptors=[interceptor], options=OPTIONS)


def _reflect(config: FrontendConfig, server: grpc.aio.Server, services: Sequence[str]) -> None:
    if config.reflection:
        names = (*services, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound: int = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise StartupError(f"cannot listen on {address}: is the port taken?")
    return bound
