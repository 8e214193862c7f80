"""InferenceService: one Generate call from its message to its last token."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

import grpc
from structlog.contextvars import bind_contextvars

from deltamux.errors import Cancelled, Unimplemented
from deltamux.frontend import validation
from deltamux.frontend.deadline import deadline
from deltamux.frontend.defaults import GenerationDefaults
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.printable import printable
from deltamux.frontend.reply import Reply
from deltamux.frontend.request_stream import RequestStream
from deltamux.frontend.tokenizer import Prompt, Tokenizer
from deltamux.metrics import Metrics
from deltamux.store.catalog import Catalog, Lease
from deltamux.v1 import inference_pb2 as v1
from deltamux.v1 import inference_pb2_grpc
from deltamux.wire.messages import Ready, Submit


@dataclass(frozen=True)
class Call:
    """A Generate request that passed the first checks."""

    request: v1.GenerateRequest
    request_id: str
    # What the engine was when the call came.
    info: Ready
    # That the call may take, counted from its start.
    seconds: float
    # On time.perf_counter's clock.
    started: float


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves requests of the base and of the catalog's adapters."""

    def __init__(
        self,
        engine: EngineClient,
        catalog: Catalog,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        metrics: Metrics,
        default_deadline: float,
    ) -> None:
        """`default_deadline`: seconds for a call that brings no deadline."""
        self._engine = engine
        self._catalog = catalog
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._metrics = metrics
        self._default_deadline = default_deadline

    async def Generate(
        self, request: v1.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        started = time.perf_counter()
        request_id = request.request_id or uuid.uuid4().hex
        bind_contextvars(request_id=printable(request_id), adapter=printable(request.adapter))
        info = self._engine.require_ready()
        validation.check_request(request, info)
        async with deadline(context, self._default_deadline) as seconds:
            await self._generate(Call(request, request_id, info, seconds, started), context)

    async def _generate(self, call: Call, context: grpc.aio.ServicerContext) -> None:
        reply: Reply | None = None
        try:
            async with (
                self._engine.admit(call.request_id) as stream,
                self._leased(call.request.adapter) as lease,
            ):
                prompt = await self._prompt(call)
                reply = self._reply(call, prompt, lease)
                stream.submit(self._submission(call, prompt, lease, stream.key))
                await _relay(stream, reply, context)
        except Cancelled:
            if reply is not None:
                for response in reply.cancelled():
                    await context.write(response)
            raise
        finally:
            if reply is not None:
                reply.record_tokens()
                bind_contextvars(tokens=reply.tokens)

    @asynccontextmanager
    async def _leased(self, reference: str) -> AsyncIterator[Lease | None]:
        """Holds one version of the adapter for as long as the request needs it; None: the base."""
        if not reference:
            yield None
            return
        lease = await self._catalog.resolve(reference)
        try:
            bind_contextvars(adapter=lease.name, version=lease.version)
            yield lease
        finally:
            lease.release()

    async def _prompt(self, call: Call) -> Prompt:
        request, field = call.request, call.request.WhichOneof("input")
        if field == "text":
            prompt = await self._tokenizer.encode(request.text)
        elif field == "chat":
            prompt = await self._tokenizer.encode_chat(request.chat.messages)
        else:
            prompt = self._tokens_as_prompt(request)
        validation.check_prompt(prompt.token_ids, call.info, field)
        return prompt

    def _tokens_as_prompt(self, request: v1.GenerateRequest) -> Prompt:
        ids = tuple(request.token_ids.ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=False) if request.output.echo else ""
        return Prompt(text, ids)

    def _submission(self, call: Call, prompt: Prompt, lease: Lease | None, key: str) -> Submit:
        request = call.request
        return Submit(
            request_id=key,
            prompt=prompt.token_ids,
            sampling=validation.resolve_sampling(request, self._defaults),
            stopping=validation.resolve_stopping(
                request.stopping, self._defaults, len(prompt.token_ids), call.info
            ),
            n=request.sampling.n or 1,
            priority=request.priority,
            adapter=lease.version if lease else "",
            adapter_path=str(lease.path) if lease else "",
            cache_salt=request.cache_salt,
            deadline=call.seconds - (time.perf_counter() - call.started),
        )

    def _reply(self, call: Call, prompt: Prompt, lease: Lease | None) -> Reply:
        served_by = v1.ServedBy(
            model=call.info.model,
            adapter=lease.name if lease else "",
            version=lease.version if lease else "",
        )
        return Reply(
            call.request,
            call.request_id,
            prompt,
            served_by,
            self._tokenizer,
            self._metrics,
            call.started,
        )

    async def Classify(
        self, request: v1.ClassifyRequest, context: grpc.aio.ServicerContext
    ) -> NoReturn:
        raise Unimplemented("task heads are not served", reason="CLASSIFY")

    async def Embed(self, request: v1.EmbedRequest, context: grpc.aio.ServicerContext) -> NoReturn:
        raise Unimplemented("embeddings are not served", reason="EMBED")


async def _relay(stream: RequestStream, reply: Reply, context: grpc.aio.ServicerContext) -> None:
    """Sends progress on as it comes, until every choice has finished."""
    async for progress in stream:
        response = reply.take(progress)
        if response is not None:
            if response.HasField("finish"):
                stream.cancel_choice(response.index)
            await context.write(response)
        if reply.finished:
            return
