"""InferenceService: one Generate call from its message to its last token; the others beside it."""

from __future__ import annotations

import grpc
from structlog.contextvars import bind_contextvars

from deltamux.errors import Cancelled
from deltamux.frontend import validation
from deltamux.frontend.adapter_tokenizers import AdapterTokenizers
from deltamux.frontend.call import Call, Calls
from deltamux.frontend.defaults import GenerationDefaults
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.pooled_calls import PooledCalls
from deltamux.frontend.reply import Reply
from deltamux.frontend.request_stream import RequestStream
from deltamux.frontend.tokenizer import Prompt, Tokenizer
from deltamux.metrics import Metrics
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.catalog.lease import Lease
from deltamux.v1 import inference_pb2 as v1
from deltamux.v1 import inference_pb2_grpc
from deltamux.wire.messages import Submit


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
        self._tokenizers = AdapterTokenizers(tokenizer)
        self._calls = Calls(engine, catalog, self._tokenizers, default_deadline)
        self._pooled = PooledCalls(self._calls, self._tokenizers, metrics)
        self._defaults = defaults
        self._metrics = metrics

    async def Generate(
        self, request: v1.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        async with self._calls.begin(request, context, validation.check_request) as call:
            await self._generate(call, context)

    async def Classify(
        self, request: v1.ClassifyRequest, context: grpc.aio.ServicerContext
    ) -> v1.ClassifyResponse:
        return await self._pooled.classify(request, context)

    async def Embed(
        self, request: v1.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> v1.EmbedResponse:
        return await self._pooled.embed(request, context)

    async def _generate(
        self, call: Call[v1.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> None:
        reply: Reply | None = None
        try:
            async with self._calls.admit(call) as (stream, lease):
                tokenizer = await self._tokenizers.of(lease)
                prompt = await _prompt(call, tokenizer)
                reply = self._reply(call, prompt, lease, tokenizer)
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

    def _submission(
        self, call: Call[v1.GenerateRequest], prompt: Prompt, lease: Lease | None, key: str
    ) -> Submit:
        request = call.request
        return Submit(
            request_id=key,
            prompt=prompt.token_ids,
            sampling=self._defaults.sampling(request),
            stopping=self._defaults.stopping(request.stopping, len(prompt.token_ids), call.info),
            n=request.sampling.n or 1,
            priority=request.priority,
            adapter=lease.version if lease else "",
            adapter_path=lease.path if lease else "",
            cache_salt=request.cache_salt,
            deadline=call.remaining,
        )

    def _reply(
        self,
        call: Call[v1.GenerateRequest],
        prompt: Prompt,
        lease: Lease | None,
        tokenizer: Tokenizer,
    ) -> Reply:
        return Reply(
            call.request,
            call.request_id,
            prompt,
            call.served_by(lease),
            tokenizer,
            self._metrics,
            call.started,
        )


async def _prompt(call: Call[v1.GenerateRequest], tokenizer: Tokenizer) -> Prompt:
    request, field = call.request, call.request.WhichOneof("input")
    if field == "text":
        prompt = await tokenizer.encode(request.text)
    elif field == "chat":
        prompt = await tokenizer.encode_chat(request.chat.messages)
    else:
        ids = tuple(request.token_ids.ids)
        echoed = request.output.echo
        prompt = Prompt(tokenizer.decode(ids, skip_special_tokens=False) if echoed else "", ids)
    validation.check_prompt(request, prompt.token_ids, call.info, field)
    return prompt


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
