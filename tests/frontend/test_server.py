"""Listeners: ports, the admin's own, reflection."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deltamux.cli import main
from deltamux.config import FrontendConfig
from deltamux.errors import StartupError
from deltamux.frontend.defaults import GenerationDefaults
from deltamux.frontend.server import build_servers
from deltamux.v1 import adapters_pb2, adapters_pb2_grpc, control_pb2


async def listed(channel: grpc.aio.Channel) -> set[str]:
    async def ask():
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    answer = await stub.ServerReflectionInfo(ask()).read()
    return {service.name for service in answer.list_services_response.service}


async def test_server_info_is_what_the_engine_said(harness) -> None:
    info = await harness.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (info.model, info.device, info.dtype) == ("tiny", "cpu", "float32")
    assert (info.max_context_tokens, info.adapter_slots) == (2048, 4)
    assert (info.kv_cache_tokens, list(info.families)) == (16 * 2048, ["lora"])
    assert info.vocab_size == harness.client.info.vocab_size > 0
    assert info.kernel_backend == "torch" and info.version


async def test_everything_is_on_one_port_by_default(harness) -> None:
    assert await listed(harness.channel) == {
        "deltamux.v1.InferenceService",
        "deltamux.v1.AdapterService",
        "deltamux.v1.ControlService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert harness.servers.admin_port is None


async def test_a_taken_port_is_one_clear_error(harness, config, tokenizer) -> None:
    taken = replace(config, port=harness.servers.port)
    arguments = (harness.client, harness.catalog, tokenizer, GenerationDefaults())
    with pytest.raises(StartupError, match=f"127.0.0.1:{taken.port}"):
        await build_servers(taken, *arguments, harness.metrics)


class TestWithAnAdminPort:
    @pytest.fixture
    def config(self, config: FrontendConfig) -> FrontendConfig:
        return replace(config, admin_port=0)

    async def test_adapters_are_administered_there_alone(self, harness) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            await harness.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "deltamux.v1.AdapterService" not in await listed(harness.channel)
        address = f"127.0.0.1:{harness.servers.admin_port}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            await stub.ListAdapters(adapters_pb2.ListAdaptersRequest())
            assert "deltamux.v1.InferenceService" not in await listed(channel)

    async def test_the_command_line_names_the_port_that_is_meant(self, harness, capsys) -> None:
        public, admin = harness.servers.port, harness.servers.admin_port
        for command, port, meant in (
            (["adapters", "list"], public, "administers adapters there"),
            (["bench"], public, "administers adapters there"),
            (["generate", "hello"], admin, "serves all else on --port"),
        ):
            target = f"127.0.0.1:{port}"
            assert await asyncio.to_thread(main, [*command, "--target", target]) == 1
            assert meant in capsys.readouterr().err


class TestWithoutReflection:
    @pytest.fixture
    def config(self, config: FrontendConfig) -> FrontendConfig:
        return replace(config, reflection=False)

    async def test_nothing_is_listed(self, harness) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            await listed(harness.channel)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
