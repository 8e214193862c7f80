"""The client for plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltamux.client.answer import Answer, added_up
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

DEFAULT_TARGET = "127.0.0.1:8000"


class Client:
    """Blocking client.

    with Client("127.0.0.1:8000") as client:
        print(client.generate(generate_request("hello", adapter="upper")).text)

    `timeout` bounds each call, in seconds. Every method raises ClientError.
    """

    def __init__(self, target: str = DEFAULT_TARGET, timeout: float | None = None) -> None:
        self._channel = grpc.insecure_channel(target)
        self._timeout = timeout
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    def stream(
        self, request: inference_pb2.GenerateRequest
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """The responses as they come; closing the iterator cancels the request."""
        call = self._inference.Generate(request, timeout=self._timeout)
        try:
            yield from call
        except grpc.RpcError as error:
            raise translated(error) from None
        finally:
            call.cancel()

    def generate(self, request: inference_pb2.GenerateRequest) -> Answer:
        """The first choice, complete."""
        return added_up(self.stream(request))

    def classify(
        self, request: inference_pb2.ClassifyRequest
    ) -> list[list[inference_pb2.ClassifyResponse.Score]]:
        """The scores of each position: of the one of a sequence head, of all tokens of another."""
        response = self._call(self._inference.Classify, request)
        return [list(position.scores) for position in response.positions]

    def embed(self, request: inference_pb2.EmbedRequest) -> list[float]:
        return list(self._call(self._inference.Embed, request).embedding)

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        request = control_pb2.GetServerInfoRequest()
        info: control_pb2.GetServerInfoResponse = self._call(self._control.GetServerInfo, request)
        return info

    def list_adapters(self) -> list[adapters_pb2.Adapter]:
        """All adapters that the server knows, page after page."""
        adapters: list[adapters_pb2.Adapter] = []
        request = adapters_pb2.ListAdaptersRequest()
        while True:
            page = self._call(self._adapters.ListAdapters, request)
            adapters.extend(page.adapters)
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    def load_adapter(
        self, name: str, source: str, *, pinned: bool = False, upto: str = "device"
    ) -> adapters_pb2.Adapter:
        """Registers `source`, a folder on the server, and loads it up to disk, host or device."""
        request = load_adapter_request(name, source, pinned, upto)
        adapter: adapters_pb2.Adapter = self._call(self._adapters.LoadAdapter, request).adapter
        return adapter

    def unload_adapter(self, name: str, *, purge: bool = False) -> None:
        request = adapters_pb2.UnloadAdapterRequest(name=name, purge=purge)
        self._call(self._adapters.UnloadAdapter, request)

    def pin_adapter(self, name: str, pinned: bool = True) -> adapters_pb2.Adapter:
        request = adapters_pb2.UpdateAdapterRequest(name=name, pinned=pinned)
        adapter: adapters_pb2.Adapter = self._call(self._adapters.UpdateAdapter, request).adapter
        return adapter

    def healthy(self) -> bool:
        """Whether the server says SERVING; False too when nothing answers."""
        try:
            request = health_pb2.HealthCheckRequest()
            reply = self._call(health_pb2_grpc.HealthStub(self._channel).Check, request)
        except ClientError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise translated(error) from None
