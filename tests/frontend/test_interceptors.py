"""What arrives below the level of messages: never UNKNOWN, never the server's own words."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltamux.errors import DeadlineExceeded, InvalidArgument
from deltamux.frontend.interceptors import CallInterceptor
from deltamux.frontend.limits import MAX_REQUEST_BYTES
from deltamux.frontend.status import rich_status
from deltamux.frontend.tokenizer import Tokenizer
from deltamux.metrics import Metrics
from deltamux.v1 import inference_pb2 as v1

METHODS = (
    "/deltamux.v1.InferenceService/Generate",
    "/deltamux.v1.InferenceService/Classify",
    "/deltamux.v1.AdapterService/LoadAdapter",
    "/deltamux.v1.ControlService/GetServerInfo",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
STREAMED = ("Generate", "Watch", "ServerReflectionInfo")


def nested(depth: int) -> bytes:
    """Unknown groups inside each other."""
    return b"\x7b" * depth + b"\x7c" * depth


GARBAGE = {
    "noise": b"\xff\xfe\xfd\xfc",
    "truncated": v1.GenerateRequest(text="hello").SerializeToString()[:-2],
    "not UTF-8": b"\x0a\x02\xc3\x28",
    "too deep": nested(200),
}


async def raw_call(harness, method: str, message: bytes):
    """Sends bytes as they are and reads one answer."""
    if method.endswith("ServerReflectionInfo"):
        call = harness.channel.stream_stream(method)(iter_of(message))
        return await call.read()
    if method.endswith(STREAMED):
        return await harness.channel.unary_stream(method)(message).read()
    return await harness.channel.unary_unary(method)(message)


async def iter_of(message: bytes):
    yield message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("garbage", [name for name in GARBAGE if name != "not UTF-8"])
async def test_garbage_is_an_invalid_argument(harness, refusal, method: str, garbage: str) -> None:
    got = await refusal(raw_call(harness, method, GARBAGE[garbage]))
    assert (got.code, got.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
    assert "DecodeError" not in got.message and "class" not in got.message


async def test_text_that_is_not_utf8_is_an_invalid_argument(harness, refusal) -> None:
    got = await refusal(raw_call(harness, METHODS[0], GARBAGE["not UTF-8"]))
    assert (got.code, got.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


async def test_unknown_fields_are_ignored(harness) -> None:
    harness.engine.answer_all()
    unknown = b"\xf8\x7f\x01" * 10_000
    message = v1.GenerateRequest(text="hi").SerializeToString() + unknown
    answer = await raw_call(harness, METHODS[0], message)
    assert "hi".startswith(v1.GenerateResponse.FromString(answer).text or "?")


async def test_an_empty_message_is_a_message(harness) -> None:
    assert await raw_call(harness, "/deltamux.v1.ControlService/GetServerInfo", b"")


async def test_unknown_methods_are_unimplemented(harness) -> None:
    for method in ("/deltamux.v1.InferenceService/Nothing", "/nothing.At/All"):
        with pytest.raises(grpc.RpcError) as caught:
            await harness.channel.unary_unary(method)(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_messages_over_the_limit_exhaust_it(harness) -> None:
    huge = v1.GenerateRequest(text="a" * (MAX_REQUEST_BYTES + 1))
    with pytest.raises(grpc.RpcError) as caught:
        await harness.collect(huge)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_compressed_bomb_exhausts_it_too(harness) -> None:
    bomb = v1.GenerateRequest(text="\0" * (16 << 20))
    assert len(zlib.compress(bomb.SerializeToString())) < MAX_REQUEST_BYTES // 10
    call = harness.inference.Generate(bomb, compression=grpc.Compression.Gzip)
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_over_the_limit_exhausts_it(harness) -> None:
    call = harness.inference.Generate(v1.GenerateRequest(text="a"), metadata=[("x", "y" * 40_000)])
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bug_shows_a_number_and_hides_its_words(
    harness, refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self, text):
        raise ValueError("secret /etc/path")

    monkeypatch.setattr(Tokenizer, "encode", broken)
    with structlog.testing.capture_logs() as events:
        got = await refusal(harness.collect(v1.GenerateRequest(text="hi")))
    assert (got.code, got.reason) == ("INTERNAL", "INTERNAL")
    incident = got.message.removeprefix("internal error; id=")
    assert len(incident) == 16 and "secret" not in got.message
    logged = next(event for event in events if event["event"] == "internal error")
    assert logged["incident"] == incident and logged["exc_info"]


class Gone:
    """The context of a call whose client has left, which gRPC has not noticed yet."""

    async def abort_with_status(self, status: grpc.Status) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


async def test_a_client_that_has_left_is_no_error() -> None:
    async def late(request: v1.EmbedRequest, context: Gone) -> None:
        raise DeadlineExceeded("the deadline has passed")

    async def continuation(details: SimpleNamespace) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(late, v1.EmbedRequest.FromString)

    interceptor = CallInterceptor(Metrics("tiny"), measured="/deltamux")
    handler = await interceptor.intercept_service(
        continuation, SimpleNamespace(method="/deltamux/Embed")
    )
    assert await handler.unary_unary(b"", Gone()) is None


async def test_one_event_a_call_without_its_prompt(harness) -> None:
    harness.engine.answer_all()
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as events:
        request = v1.GenerateRequest(request_id="r1", text="a secret prompt")
        await harness.collect(request)
    (event,) = [event for event in events if event["event"] == "call"]
    assert event["method"] == "Generate" and event["code"] == "OK"
    assert event["request_id"] == "r1" and event["tokens"] == len("a secret prompt")
    assert event["seconds"] > 0
    assert "secret" not in str(events)


async def test_a_name_cannot_forge_a_line_of_the_log(harness, refusal) -> None:
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as events:
        await refusal(harness.collect(v1.GenerateRequest(text="a", adapter="x\n\x1b[2J forged")))
    (event,) = [event for event in events if event["event"] == "call"]
    assert event["code"] == "INVALID_ARGUMENT" and event["reason"] == "INVALID_ADAPTER_NAME"
    assert event["adapter"] == "x\\n\\x1b[2J forged"


async def test_health_tells_of_each_service(harness, refusal) -> None:
    stub = health_pb2_grpc.HealthStub(harness.channel)
    for name in ("", "deltamux.v1.InferenceService", "deltamux.v1.ControlService"):
        response = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    await harness.servers.health.set_serving(False)
    response = await stub.Check(health_pb2.HealthCheckRequest())
    assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_long_message_fits_the_trailers() -> None:
    status = rich_status(InvalidArgument("é" * 100_000))
    assert sum(len(value) for _, value in status.trailing_metadata) < 8192
    assert len(status.details.encode()) < 8192
