"""Requests from plain arguments; what is None takes the server's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from deltamux.v1 import adapters_pb2, inference_pb2

# Of a chat: its `role` and its `content`.
Message = Mapping[str, str]


def generate_request(
    prompt: str | Sequence[int] | Sequence[Message],
    *,
    adapter: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> inference_pb2.GenerateRequest:
    """One choice for a text, token ids or the messages of a chat; what is None takes the model's
    default.

    `ignore_eos` goes on to `max_tokens` whatever is generated.
    """
    request = inference_pb2.GenerateRequest(
        adapter=adapter,
        sampling=inference_pb2.SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        ),
        stopping=inference_pb2.StoppingCriteria(
            max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos
        ),
        output=inference_pb2.OutputOptions(return_token_ids=True),
    )
    if any(isinstance(part, Mapping) for part in prompt):
        messages = cast(Sequence[Message], prompt)
        request.chat.messages.extend(inference_pb2.Chat.Message(**m) for m in messages)
    else:
        _fill(request, cast(str | Sequence[int], prompt))
    return request


def classify_request(
    prompt: str | Sequence[int], *, adapter: str, text_pair: str = ""
) -> inference_pb2.ClassifyRequest:
    """For a text, or two where the head was trained on pairs, or token ids."""
    request = inference_pb2.ClassifyRequest(adapter=adapter, text_pair=text_pair)
    _fill(request, prompt)
    return request


def embed_request(
    prompt: str | Sequence[int],
    *,
    adapter: str = "",
    pooling: str | None = None,
    normalize: bool | None = None,
) -> inference_pb2.EmbedRequest:
    """`pooling` is "mean", "last" or "first"."""
    request = inference_pb2.EmbedRequest(adapter=adapter)
    if normalize is not None:
        request.normalize = normalize
    if pooling is not None:
        request.pooling = inference_pb2.EmbedRequest.Pooling.Value(f"POOLING_{pooling.upper()}")
    _fill(request, prompt)
    return request


def load_adapter_request(
    name: str, source: str, pinned: bool, upto: str
) -> adapters_pb2.LoadAdapterRequest:
    """`upto` is "disk", "host" or "device"."""
    tier = inference_pb2.Tier.Value(f"TIER_{upto.upper()}")
    return adapters_pb2.LoadAdapterRequest(name=name, source=source, pinned=pinned, upto=tier)


def _fill(
    request: inference_pb2.GenerateRequest
    | inference_pb2.ClassifyRequest
    | inference_pb2.EmbedRequest,
    prompt: str | Sequence[int],
) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    else:
        # Also an empty prompt is one of token ids.
        request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=prompt))
