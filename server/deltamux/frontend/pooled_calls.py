"""Classify and Embed: one prompt in, one answer made of its hidden states out."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping
from typing import Literal

import grpc

from deltamux.errors import ResourceExhausted
from deltamux.frontend import limits, tiers, validation
from deltamux.frontend.adapter_tokenizers import AdapterTokenizers
from deltamux.frontend.call import Call, Calls, Request
from deltamux.frontend.tokenizer import Prompt
from deltamux.metrics import Metrics
from deltamux.store.catalog.lease import Lease
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Classify, Embed, Pooled, Ready, Sampling, Stopping, Submit

# A score is three fields with their tags and lengths, beside the label.
_BYTES_OF_SCORE = 16


class PooledCalls:
    """The calls that generate no tokens."""

    def __init__(self, calls: Calls, tokenizers: AdapterTokenizers, metrics: Metrics) -> None:
        self._calls = calls
        self._tokenizers = tokenizers
        self._metrics = metrics

    async def classify(
        self, request: v1.ClassifyRequest, context: grpc.aio.ServicerContext
    ) -> v1.ClassifyResponse:
        async with self._calls.begin(request, context, validation.check_classify) as call:
            pooled, served_by, usage = await self._pooled(call, Classify(), request.text_pair)
            _check_size(pooled)
            # Thousands of messages: other calls go on meanwhile.
            positions = await asyncio.to_thread(_positions, pooled)
            return v1.ClassifyResponse(
                request_id=call.request_id, positions=positions, served_by=served_by, usage=usage
            )

    async def embed(
        self, request: v1.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> v1.EmbedResponse:
        async with self._calls.begin(request, context, validation.check_embed) as call:
            pooled, served_by, usage = await self._pooled(call, _wanted(request, call.info))
            return v1.EmbedResponse(
                request_id=call.request_id,
                embedding=array("f", pooled.numbers),
                served_by=served_by,
                usage=usage,
            )

    async def _pooled(
        self, call: Call[Request], pooling: Classify | Embed, pair: str = ""
    ) -> tuple[Pooled, v1.ServedBy, v1.Usage]:
        async with self._calls.admit(call) as (stream, lease):
            prompt = await self._prompt(call, lease, pair)
            stream.submit(
                Submit(
                    request_id=stream.key,
                    prompt=prompt.token_ids,
                    sampling=Sampling(),
                    stopping=Stopping(max_tokens=1),
                    adapter=lease.version if lease else "",
                    adapter_path=lease.path if lease else "",
                    deadline=call.remaining,
                    pooling=pooling,
                    token_types=prompt.token_types if call.info.tells_pairs_apart else (),
                )
            )
            progress = await anext(stream)
        assert progress.pooled is not None and progress.first is not None
        served_by, tokens = call.served_by(lease), len(prompt.token_ids)
        served_by.tier = tiers.NUMBERS[progress.first.tier]
        self._metrics.queue(progress.first.queue)
        self._metrics.tokens(tokens, 0)
        return progress.pooled, served_by, v1.Usage(prompt_tokens=tokens)

    async def _prompt(self, call: Call[Request], lease: Lease | None, pair: str) -> Prompt:
        request = call.request
        field = request.WhichOneof("input")
        if field == "text":
            prompt = await (await self._tokenizers.of(lease)).encode(request.text, pair)
        else:
            prompt = Prompt("", tuple(request.token_ids.ids))
        validation.check_prompt(request, prompt.token_ids, call.info, field, answer=0)
        return prompt


_POOLINGS: Mapping[int, Literal["first", "last", "mean"]] = {
    v1.EmbedRequest.POOLING_FIRST: "first",
    v1.EmbedRequest.POOLING_LAST: "last",
    v1.EmbedRequest.POOLING_MEAN: "mean",
}


def _wanted(request: v1.EmbedRequest, engine: Ready) -> Embed:
    """The checked request, with the usual pooling of such a model where it is left open."""
    pooling = _POOLINGS.get(request.pooling, "last" if engine.generates else "mean")
    return Embed(pooling, request.normalize if request.HasField("normalize") else True)


def _check_size(pooled: Pooled) -> None:
    """Before a response is made that could not be sent."""
    rows = len(pooled.scores) // (len(pooled.labels) * 4)
    size = rows * sum(len(label.encode()) + _BYTES_OF_SCORE for label in pooled.labels)
    if size > limits.MAX_RESPONSE_BYTES:
        raise ResourceExhausted(
            f"the scores of {rows} tokens for {len(pooled.labels)} labels take {size} bytes; "
            f"a response has at most {limits.MAX_RESPONSE_BYTES}",
            reason="RESPONSE_TOO_LARGE",
        )


def _positions(pooled: Pooled) -> list[v1.ClassifyResponse.Scores]:
    logits, scores, labels = array("f", pooled.numbers), array("f", pooled.scores), pooled.labels
    return [
        v1.ClassifyResponse.Scores(
            scores=(
                v1.ClassifyResponse.Score(
                    label=label, score=scores[start + place], logit=logits[start + place]
                )
                for place, label in enumerate(labels)
            )
        )
        for start in range(0, len(logits), len(labels))
    ]
