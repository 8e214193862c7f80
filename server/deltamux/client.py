"""A small gRPC client, blocking and asyncio, over the generated stubs of `deltamux.v1`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltamux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

DEFAULT_TARGET = "127.0.0.1:8000"


class ClientError(Exception):
    """A call that failed: `code` is the gRPC status by name, `reason` the server's stable word."""

    def __init__(self, code: str, reason: str, message: str) -> None:
        super().__init__(message or code)
        self.code = code
        self.reason = reason
        self.message = message or code


@dataclass(frozen=True)
class Answer:
    """One choice of a request, complete."""

    text: str
    token_ids: tuple[int, ...]
    # "stop", "length" or "cancelled".
    finish: str
    prompt_tokens: int
    completion_tokens: int
    served_by: inference_pb2.ServedBy
    timing: inference_pb2.Timing


def generate_request(
    prompt: str | Sequence[int],
    *,
    adapter: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> inference_pb2.GenerateRequest:
    """One choice for a text, or for token ids; what is None takes the model's default."""
    request = inference_pb2.GenerateRequest(
        adapter=adapter,
        sampling=inference_pb2.SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        ),
        stopping=inference_pb2.StoppingCriteria(max_tokens=max_tokens, stop=stop),
        output=inference_pb2.OutputOptions(return_token_ids=True),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


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
            raise _translated(error) from None
        finally:
            call.cancel()

    def generate(self, request: inference_pb2.GenerateRequest) -> Answer:
        """The first choice, complete."""
        answer = _Collected()
        for response in self.stream(request):
            answer.add(response)
        return answer.complete()

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        request = control_pb2.GetServerInfoRequest()
        return cast(
            control_pb2.GetServerInfoResponse, self._call(self._control.GetServerInfo, request)
        )

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
        tier = inference_pb2.Tier.Value(f"TIER_{upto.upper()}")
        request = adapters_pb2.LoadAdapterRequest(
            name=name, source=source, pinned=pinned, upto=tier
        )
        loaded = self._call(self._adapters.LoadAdapter, request)
        return cast(adapters_pb2.Adapter, loaded.adapter)

    def unload_adapter(self, name: str, *, purge: bool = False) -> None:
        request = adapters_pb2.UnloadAdapterRequest(name=name, purge=purge)
        self._call(self._adapters.UnloadAdapter, request)

    def pin_adapter(self, name: str, pinned: bool = True) -> adapters_pb2.Adapter:
        request = adapters_pb2.UpdateAdapterRequest(name=name, pinned=pinned)
        updated = self._call(self._adapters.UpdateAdapter, request)
        return cast(adapters_pb2.Adapter, updated.adapter)

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
            raise _translated(error) from None


class AsyncClient:
    """Asyncio client of the inference service; many calls share its one connection."""

    def __init__(self, target: str = DEFAULT_TARGET, timeout: float | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._timeout = timeout
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def stream(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The responses as they come; closing the iterator cancels the request."""
        call = self._inference.Generate(request, timeout=self._timeout)
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise _translated(error) from None
        finally:
            call.cancel()

    async def generate(self, request: inference_pb2.GenerateRequest) -> Answer:
        """The first choice, complete."""
        answer = _Collected()
        async for response in self.stream(request):
            answer.add(response)
        return answer.complete()

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


class _Collected:
    """Adds up the responses of a stream."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._finish = ""
        self._usage = inference_pb2.Usage()
        self._timing = inference_pb2.Timing()
        self._served_by = inference_pb2.ServedBy()

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        if response.index == 0:
            self._text.append(response.text)
            self._token_ids.extend(response.token_ids)
            if response.HasField("finish"):
                reason = inference_pb2.Finish.Reason.Name(response.finish.reason)
                self._finish = reason.removeprefix("REASON_").lower()
        if response.HasField("served_by"):
            self._served_by = response.served_by
        if response.HasField("usage"):
            self._usage = response.usage
        if response.HasField("timing"):
            self._timing = response.timing

    def complete(self) -> Answer:
        return Answer(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish=self._finish,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            served_by=self._served_by,
            timing=self._timing,
        )


def _translated(error: grpc.RpcError) -> ClientError:
    """The status, and the reason of its google.rpc.ErrorInfo where the server sent one."""
    reason = ""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            reason = info.reason
    return ClientError(error.code().name, reason, error.details() or "")
