"""The client against a gRPC server of the contract whose answers are written down here."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from deltamux.client import (
    AsyncClient,
    Client,
    ClientError,
    classify_request,
    embed_request,
    generate_request,
)
from deltamux.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVED_BY = inference_pb2.ServedBy(model="m", adapter="a", version="v")
ANSWER = [
    inference_pb2.GenerateResponse(text="Hel", token_ids=[1, 2], served_by=SERVED_BY),
    inference_pb2.GenerateResponse(index=1, text="other choice", token_ids=[9]),
    inference_pb2.GenerateResponse(
        text="lo", token_ids=[3], finish=inference_pb2.Finish(reason="REASON_LENGTH")
    ),
    inference_pb2.GenerateResponse(
        usage=inference_pb2.Usage(prompt_tokens=4, completion_tokens=3),
        timing=inference_pb2.Timing(total=0.5),
    ),
]


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.cancelled = threading.Event()

    def Generate(self, request, context) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if request.adapter == "endless":
            context.add_callback(self.cancelled.set)
            while context.is_active():
                yield inference_pb2.GenerateResponse(text="x")
                self.cancelled.wait(0.01)
        elif request.adapter == "unknown":
            details = [any_pb2.Any(), any_pb2.Any()]
            details[0].Pack(error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND"))
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(2500)
            details[1].Pack(retry)
            status = status_pb2.Status(code=5, message="no such adapter", details=details)
            context.abort_with_status(rpc_status.to_status(status))
        else:
            yield from ANSWER

    def Classify(self, request, context) -> inference_pb2.ClassifyResponse:
        self.requests.append(request)
        score = inference_pb2.ClassifyResponse.Score(label="yes", score=0.75, logit=2.0)
        position = inference_pb2.ClassifyResponse.Scores(scores=[score])
        return inference_pb2.ClassifyResponse(positions=[position, position])

    def Embed(self, request, context) -> inference_pb2.EmbedResponse:
        self.requests.append(request)
        if request.adapter:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such adapter")
        return inference_pb2.EmbedResponse(embedding=[0.5, -1.0])


class Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def ListAdapters(self, request, context) -> adapters_pb2.ListAdaptersResponse:
        page = int(request.page_token or 0)
        adapter = adapters_pb2.Adapter(name=f"a{page}")
        token = "" if page == 2 else str(page + 1)
        return adapters_pb2.ListAdaptersResponse(adapters=[adapter], next_page_token=token)

    def LoadAdapter(self, request, context) -> adapters_pb2.LoadAdapterResponse:
        adapter = adapters_pb2.Adapter(
            name=request.name, source=request.source, tier=request.upto, pinned=request.pinned
        )
        return adapters_pb2.LoadAdapterResponse(adapter=adapter)

    def UpdateAdapter(self, request, context) -> adapters_pb2.UpdateAdapterResponse:
        assert request.HasField("pinned")
        adapter = adapters_pb2.Adapter(name=request.name, pinned=request.pinned)
        return adapters_pb2.UpdateAdapterResponse(adapter=adapter)


@pytest.fixture
def server():
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.inference = Inference()
    server.health = health.HealthServicer()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(server.inference, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(Adapters(), server)
    health_pb2_grpc.add_HealthServicer_to_server(server.health, server)
    server.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield server
    server.stop(None).wait()


@pytest.fixture
def client(server):
    with Client(server.target, timeout=20) as client:
        yield client


def test_what_is_not_said_is_not_sent():
    request = generate_request("hello")
    assert not request.sampling.HasField("temperature")
    assert not request.stopping.HasField("max_tokens")
    assert request.text == "hello"


def test_what_is_said_is_sent():
    request = generate_request(
        [1, 2], adapter="a@v", max_tokens=3, temperature=0.0, top_p=0.5, top_k=7, seed=1, stop=["."]
    )
    assert list(request.token_ids.ids) == [1, 2]
    assert request.adapter == "a@v"
    assert request.sampling.HasField("temperature")
    assert (request.sampling.top_p, request.sampling.top_k, request.sampling.seed) == (0.5, 7, 1)
    assert (request.stopping.max_tokens, list(request.stopping.stop)) == (3, ["."])


def test_messages_are_a_chat():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    request = generate_request(messages, adapter="a")
    assert [(m.role, m.content) for m in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]
    assert request.WhichOneof("input") == "chat" and request.adapter == "a"
    with pytest.raises(TypeError):
        generate_request([*messages, "and this?"])


def test_requests_without_tokens_to_generate():
    classify = classify_request("good", adapter="a", text_pair="bad")
    assert (classify.text, classify.adapter, classify.text_pair) == ("good", "a", "bad")
    embed = embed_request([1, 2], adapter="a", pooling="mean", normalize=False)
    assert (list(embed.token_ids.ids), embed.adapter) == ([1, 2], "a")
    assert embed.pooling == inference_pb2.EmbedRequest.POOLING_MEAN
    assert embed.HasField("normalize") and not embed.normalize
    plain = embed_request("a")
    assert not plain.HasField("normalize")
    assert plain.pooling == inference_pb2.EmbedRequest.POOLING_UNSPECIFIED


def check(answer) -> None:
    assert (answer.text, answer.token_ids, answer.finish) == ("Hello", (1, 2, 3), "length")
    assert (answer.prompt_tokens, answer.completion_tokens) == (4, 3)
    assert answer.served_by == SERVED_BY
    assert answer.timing.total == 0.5


def test_answer_is_the_first_choice_complete(client):
    check(client.generate(generate_request("hi", adapter="a")))


async def test_asyncio_calls_share_a_connection(server):
    async with AsyncClient(server.target, timeout=20) as client:
        answers = await asyncio.gather(*(client.generate(generate_request("hi")) for _ in range(8)))
    for answer in answers:
        check(answer)


def check_scores(positions) -> None:
    assert [[(s.label, s.score, s.logit) for s in scores] for scores in positions] == [
        [("yes", 0.75, 2.0)],
        [("yes", 0.75, 2.0)],
    ]


def test_scores_and_embeddings(client):
    check_scores(client.classify(classify_request("hi", adapter="a")))
    assert client.embed(embed_request("hi")) == [0.5, -1.0]
    with pytest.raises(ClientError, match="no such adapter"):
        client.embed(embed_request("hi", adapter="a"))


async def test_asyncio_scores_and_embeddings(server):
    async with AsyncClient(server.target, timeout=20) as client:
        check_scores(await client.classify(classify_request("hi", adapter="a")))
        assert await client.embed(embed_request("hi")) == [0.5, -1.0]
        with pytest.raises(ClientError, match="no such adapter"):
            await client.embed(embed_request("hi", adapter="a"))


def test_error_carries_code_reason_and_message(client):
    with pytest.raises(ClientError, match="no such adapter") as caught:
        client.generate(generate_request("hi", adapter="unknown"))
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert caught.value.retry_after == 2.5


async def test_asyncio_error_carries_code_reason_and_message(server):
    async with AsyncClient(server.target, timeout=20) as client:
        with pytest.raises(ClientError, match="no such adapter") as caught:
            await client.generate(generate_request("hi", adapter="unknown"))
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


def test_leaving_a_stream_cancels_the_call(server, client):
    stream = client.stream(generate_request("hi", adapter="endless"))
    next(stream)
    stream.close()
    assert server.inference.cancelled.wait(20)


async def test_leaving_an_asyncio_stream_cancels_the_call(server):
    async with AsyncClient(server.target, timeout=20) as client:
        stream = client.stream(generate_request("hi", adapter="endless"))
        await anext(stream)
        await stream.aclose()
        assert await asyncio.to_thread(server.inference.cancelled.wait, 20)


def test_adapters_of_all_pages_are_listed(client):
    assert [adapter.name for adapter in client.list_adapters()] == ["a0", "a1", "a2"]


def test_administration(client):
    loaded = client.load_adapter("a", "/folder", pinned=True, upto="host")
    assert (loaded.source, loaded.pinned, loaded.tier) == ("/folder", True, inference_pb2.TIER_HOST)
    assert not client.pin_adapter("a", pinned=False).pinned
    with pytest.raises(ClientError) as caught:
        client.unload_adapter("a")
    assert caught.value.code == "UNIMPLEMENTED"


async def test_asyncio_administration(server):
    server.health.set("", health_pb2.HealthCheckResponse.SERVING)
    async with AsyncClient(server.target, timeout=20) as client:
        assert await client.healthy()
        assert [adapter.name for adapter in await client.list_adapters()] == ["a0", "a1", "a2"]
        loaded = await client.load_adapter("a", "/folder", pinned=True, upto="host")
        assert (loaded.source, loaded.pinned) == ("/folder", True)
        assert loaded.tier == inference_pb2.TIER_HOST
        assert not (await client.pin_adapter("a", pinned=False)).pinned
        for unserved in (client.unload_adapter("a"), client.server_info()):
            with pytest.raises(ClientError) as caught:
                await unserved
            assert caught.value.code == "UNIMPLEMENTED"


def test_healthy_means_serving(server, client):
    server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not client.healthy()
    server.health.set("", health_pb2.HealthCheckResponse.SERVING)
    assert client.healthy()


def test_nobody_there_is_unhealthy_and_unavailable():
    with Client("127.0.0.1:1", timeout=20) as client:
        assert not client.healthy()
        with pytest.raises(ClientError) as caught:
            client.server_info()
        assert caught.value.code == "UNAVAILABLE"


def test_an_empty_prompt_of_token_ids_is_one():
    assert generate_request([]).WhichOneof("input") == "token_ids"
