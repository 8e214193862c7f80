"""Clients that open calls and let go of them at once, by the thousand (BI-110)."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from deltamux.demo.server import Server
from deltamux.demo.tasks import TASKS, prompt, unseen_inputs, weights_path
from deltamux.frontend.limits import MAX_STREAMS
from deltamux.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from deltamux.v1 import inference_pb2 as v1

TASK = next(task for task in TASKS if task.name == "rot13")
PATIENCE = 60.0
STREAMS = 3000
# It ends when it is made to.
ENDLESS = v1.GenerateRequest(
    text="on and on\n",
    adapter=TASK.name,
    stopping=v1.StoppingCriteria(max_tokens=60_000, ignore_eos=True),
)

# Frames of HTTP/2, and the error of a connection whose client is too lively.
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7
END_STREAM, END_HEADERS = 0x1, 0x4
CANCEL, ENHANCE_YOUR_CALM = 0x8, 0xB
MAX_CONCURRENT_STREAMS = 0x3
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture(scope="module")
def server(endless_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        f"--model={endless_base}",
        "--device=cpu",
        "--threads=1",
        "--max-waiting-requests=64",
        f"--adapter={TASK.name}={weights_path() / 'adapters' / TASK.name}",
        f"--adapter-cache-dir={tmp_path_factory.mktemp('cache')}",
    ) as running:
        yield running


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A good client's connection."""
    # Channels of the same options to the same address would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.target, options) as channel:
        yield channel


async def answered(channel: grpc.aio.Channel, text: str) -> bool:
    """Rightly, or told to come back because the queue is full; nothing else may happen."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Generate(v1.GenerateRequest(text=prompt(text), adapter=TASK.name), timeout=PATIENCE)
    try:
        answer = "".join([message.text async for message in call])
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
        await asyncio.sleep(0.05)
        return False
    assert answer == TASK.answer(text)
    return True


async def good_traffic(channel: grpc.aio.Channel, until: asyncio.Event) -> None:
    """Goes on until then, and until one answer at least has come."""
    right = 0
    while not right or not until.is_set():
        for text in unseen_inputs(TASK, 4):
            right += await answered(channel, text)


async def at_rest(server: Server, channel: grpc.aio.Channel) -> None:
    """Waits until no call, block or lease is left of the flood."""
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
    gauges = ("requests_in_flight", "requests_running", "requests_waiting", "kv_cache_usage_ratio")
    give_up = time.monotonic() + PATIENCE
    while True:
        # A step after the last of the flood tells what it left.
        await answered(channel, unseen_inputs(TASK, 1)[0])
        metrics = await asyncio.to_thread(server.metrics)
        left = {name: metrics[f"deltamux_{name}"].samples[0].value for name in gauges}
        (adapter,) = (await adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())).adapters
        if not any(left.values()) and not adapter.active_requests:
            break
        assert time.monotonic() < give_up, (left, adapter.active_requests)
        await asyncio.sleep(0.05)
    assert server.process.poll() is None
    assert metrics["deltamux_engine_restarts"].samples[0].value == 0


async def under(flood: asyncio.Future[None], server: Server, channel: grpc.aio.Channel) -> None:
    """Good traffic goes on meanwhile, and all is free afterwards."""
    over = asyncio.Event()
    traffic = asyncio.create_task(good_traffic(channel, over))
    try:
        await asyncio.wait_for(flood, PATIENCE)
    finally:
        over.set()
    await asyncio.wait_for(traffic, PATIENCE)
    await at_rest(server, channel)


async def open_and_cancel(target: str, count: int) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(count // 100):
            calls = [stub.Generate(ENDLESS, timeout=2 * PATIENCE) for _ in range(100)]
            await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()


async def test_thousands_of_calls_opened_and_cancelled(server, channel) -> None:
    await under(asyncio.ensure_future(open_and_cancel(server.target, STREAMS)), server, channel)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes((kind, flags))
        + struct.pack(">I", stream)
        + payload
    )


def field(name: str, value: str) -> bytes:
    """A header as HPACK writes it without table and compression."""
    return b"\0" + b"".join(bytes((len(part),)) + part.encode() for part in (name, value))


HEADER = b"".join(
    field(name, value)
    for name, value in {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/deltamux.v1.InferenceService/Generate",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }.items()
)


def connected(server: Server) -> socket.socket:
    host, port = server.target.split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def reset_rapidly(server: Server, count: int) -> None:
    """Each stream is a complete request and its end, in one write: what CVE-2023-44487 does."""
    request = ENDLESS.SerializeToString()
    message = b"\0" + struct.pack(">I", len(request)) + request
    with connected(server) as connection:
        for first in range(0, count, 50):
            streams = range(2 * first + 1, 2 * (first + 50), 2)
            try:
                connection.sendall(
                    b"".join(
                        frame(HEADERS, END_HEADERS, stream, HEADER)
                        + frame(DATA, END_STREAM, stream, message)
                        + frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
                        for stream in streams
                    )
                )
            except OSError:
                return  # The server has closed the connection, which is its right.


async def test_rapid_reset(server, channel) -> None:
    flood = asyncio.ensure_future(asyncio.to_thread(reset_rapidly, server, STREAMS))
    await under(flood, server, channel)


def answer_to(server: Server, sent: bytes, kind: int) -> bytes:
    """The payload of the first frame of that kind."""
    with connected(server) as connection, connection.makefile("rb") as answers:
        connection.sendall(sent)
        while True:
            header = answers.read(9)
            assert len(header) == 9, "closed without a word"
            payload = answers.read(int.from_bytes(header[:3]))
            if header[3] == kind:
                return payload


async def test_a_ping_flood_ends_its_own_connection_only(server, channel) -> None:
    pings = frame(PING, 0, 0, bytes(8)) * 20
    farewell = await asyncio.to_thread(answer_to, server, pings, GOAWAY)
    assert int.from_bytes(farewell[4:8]) == ENHANCE_YOUR_CALM
    await at_rest(server, channel)


def test_a_connection_is_told_how_many_calls_it_may_have_open(server) -> None:
    settings = dict(struct.iter_unpack(">HI", answer_to(server, b"", SETTINGS)))
    assert settings[MAX_CONCURRENT_STREAMS] == MAX_STREAMS
