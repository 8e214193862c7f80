"""Checks every field of a request before anything is allocated for it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from deltamux.errors import FailedPrecondition, InvalidArgument, Unimplemented
from deltamux.frontend import limits
from deltamux.store.catalog.reference import Reference
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Ready

Request = v1.GenerateRequest | v1.ClassifyRequest | v1.EmbedRequest

# Visible ASCII: safe in logs, headers and URLs.
REQUEST_ID = re.compile(rf"[!-~]{{1,{limits.MAX_REQUEST_ID}}}")


def invalid(field: str, message: str, reason: str = "INVALID_ARGUMENT") -> InvalidArgument:
    return InvalidArgument(f"{field}: {message}", reason=reason, field=field)


def check(condition: bool, field: str, message: str) -> None:
    """Raises InvalidArgument naming the field unless the condition holds."""
    if not condition:
        raise invalid(field, message)


def check_request(request: v1.GenerateRequest, engine: Ready) -> None:
    """All that can be said of a Generate request without its tokens."""
    _check_implemented(request)
    _check_names(request.request_id, request.adapter)
    if not engine.generates:
        raise FailedPrecondition("the base model generates no text", reason="NO_GENERATION")
    check(
        len(request.cache_salt.encode()) <= limits.MAX_CACHE_SALT,
        "cache_salt",
        f"at most {limits.MAX_CACHE_SALT} bytes",
    )
    _check_input(request, engine)
    ids_below = _ids_below(request.adapter, engine)
    _check_sampling(request.sampling, ids_below)
    _check_stopping(request.stopping, ids_below)
    if request.output.HasField("logprobs"):
        check(
            request.output.logprobs <= limits.MAX_LOGPROBS,
            "output.logprobs",
            f"at most {limits.MAX_LOGPROBS}",
        )


def check_classify(request: v1.ClassifyRequest, engine: Ready) -> None:
    """All that can be said of a Classify request without its tokens."""
    _check_names(request.request_id, request.adapter)
    if not request.adapter:
        raise FailedPrecondition("the base model has no task head", reason="NO_TASK_HEAD")
    _check_text_or_tokens(request, engine)
    if request.text_pair:
        check(request.WhichOneof("input") == "text", "text_pair", "needs a text before it")
        _check_characters("text_pair", len(request.text) + len(request.text_pair))


def check_embed(request: v1.EmbedRequest, engine: Ready) -> None:
    """All that can be said of an Embed request without its tokens."""
    _check_names(request.request_id, request.adapter)
    _check_text_or_tokens(request, engine)
    known = v1.EmbedRequest.Pooling.values()
    check(request.pooling in known, "pooling", f"{request.pooling} is no kind of pooling")


def _check_names(request_id: str, adapter: str) -> None:
    check_request_id(request_id)
    if adapter:
        Reference.parse(adapter)


def _check_implemented(request: v1.GenerateRequest) -> None:
    if request.HasField("structured"):
        raise Unimplemented("structured output is not served", reason="STRUCTURED_OUTPUT")
    if request.blend:
        raise Unimplemented("blends of adapters are not served", reason="BLEND")


def check_request_id(request_id: str) -> None:
    """Empty is fine: the server mints one."""
    if request_id and not REQUEST_ID.fullmatch(request_id):
        raise invalid(
            "request_id",
            f"1 to {limits.MAX_REQUEST_ID} visible ASCII characters",
            "REQUEST_ID_INVALID",
        )


def _check_input(request: v1.GenerateRequest, engine: Ready) -> None:
    match request.WhichOneof("input"):
        case "text":
            _check_text(request.text)
        case "token_ids":
            check_prompt(request, request.token_ids.ids, engine, "token_ids")
        case "chat":
            _check_chat(request.chat)
        case _:
            raise invalid("input", "one of text, token_ids and chat is needed")


def _check_text_or_tokens(request: v1.ClassifyRequest | v1.EmbedRequest, engine: Ready) -> None:
    match request.WhichOneof("input"):
        case "text":
            _check_text(request.text)
        case "token_ids":
            check_prompt(request, request.token_ids.ids, engine, "token_ids", answer=0)
        case _:
            raise invalid("input", "one of text and token_ids is needed")


def _check_text(text: str) -> None:
    check(bool(text), "text", "the prompt is empty")
    _check_characters("text", len(text))


def _check_chat(chat: v1.Chat) -> None:
    messages = chat.messages
    check(bool(messages), "chat", "there are no messages")
    most = limits.MAX_CHAT_MESSAGES
    check(len(messages) <= most, "chat", f"at most {most} messages")
    _check_characters("chat", sum(len(message.content) for message in messages))
    for message in messages:
        known = ", ".join(sorted(limits.CHAT_ROLES))
        check(message.role in limits.CHAT_ROLES, "chat.role", f"must be one of {known}")


def _check_characters(field: str, characters: int) -> None:
    if characters > limits.MAX_PROMPT_CHARACTERS:
        most = limits.MAX_PROMPT_CHARACTERS
        raise invalid(field, f"more than {most} characters", "PROMPT_TOO_LONG")


def check_prompt(
    request: Request, token_ids: Sequence[int], engine: Ready, field: str, answer: int = 1
) -> None:
    """What can be said once the prompt is tokenized; `answer` tokens must fit behind it."""
    tokens, room = len(token_ids), context_tokens(engine)
    check(tokens > 0, field, "the prompt has no tokens")
    if tokens + answer > room:
        raise invalid(field, f"{tokens} tokens, of a context of {room}", "PROMPT_TOO_LONG")
    _check_token_ids(field, token_ids, _ids_below(request.adapter, engine))


def _ids_below(adapter: str, engine: Ready) -> int:
    """An adapter may have a vocabulary of its own, which the engine knows and checks."""
    return limits.MAX_TOKEN_IDS if adapter else engine.vocab_size


def context_tokens(engine: Ready) -> int:
    """The most tokens, prompt and answer together, that one sequence can have here."""
    return min(engine.max_model_len, engine.kv_cache_tokens)


def _check_token_ids(field: str, ids: Sequence[int], below: int) -> None:
    check(all(token < below for token in ids), field, f"ids must be below {below}")


def _check_number(field: str, value: float, low: float, high: float) -> None:
    inside = math.isfinite(value) and low <= value <= high
    check(inside, field, f"must be between {low:g} and {high:g}")


def _check_sampling(sampling: v1.SamplingParams, ids_below: int) -> None:
    _check_temperature(sampling.temperature)
    if sampling.HasField("top_p"):
        _check_number("sampling.top_p", sampling.top_p, 0, 1)
        check(sampling.top_p > 0, "sampling.top_p", "must be above 0")
    check(sampling.top_k <= limits.MAX_TOP_K, "sampling.top_k", f"at most {limits.MAX_TOP_K}")
    _check_number("sampling.min_p", sampling.min_p, 0, 1)
    if sampling.HasField("repetition_penalty"):
        penalty, most = sampling.repetition_penalty, limits.MAX_REPETITION_PENALTY
        _check_number("sampling.repetition_penalty", penalty, 0, most)
        check(penalty > 0, "sampling.repetition_penalty", "must be above 0")
    most = limits.MAX_ADDITIVE_PENALTY
    _check_number("sampling.presence_penalty", sampling.presence_penalty, -most, most)
    _check_number("sampling.frequency_penalty", sampling.frequency_penalty, -most, most)
    check(sampling.seed <= limits.MAX_SEED, "sampling.seed", f"at most {limits.MAX_SEED}")
    if sampling.HasField("n"):
        check(1 <= sampling.n <= limits.MAX_CHOICES, "sampling.n", f"1 to {limits.MAX_CHOICES}")
    _check_logit_bias(sampling, ids_below)


def _check_temperature(temperature: float) -> None:
    field = "sampling.temperature"
    _check_number(field, temperature, 0, limits.MAX_TEMPERATURE)
    least = limits.MIN_TEMPERATURE
    check(temperature == 0 or temperature >= least, field, f"must be 0, or at least {least:g}")


def _check_logit_bias(sampling: v1.SamplingParams, ids_below: int) -> None:
    field, bias = "sampling.logit_bias", sampling.logit_bias
    most = limits.MAX_LOGIT_BIAS_ENTRIES
    check(len(bias) <= most, field, f"at most {most} entries")
    _check_token_ids(field, list(bias), ids_below)
    for value in bias.values():
        _check_number(field, value, -limits.MAX_LOGIT_BIAS, limits.MAX_LOGIT_BIAS)


def _check_stopping(stopping: v1.StoppingCriteria, ids_below: int) -> None:
    if stopping.HasField("max_tokens"):
        check(stopping.max_tokens > 0, "stopping.max_tokens", "must be at least 1")
    else:
        field = "stopping.ignore_eos"
        check(not stopping.ignore_eos, field, "needs max_tokens, or nothing would end it")
    most = limits.MAX_STOP_STRINGS
    check(len(stopping.stop) <= most, "stopping.stop", f"at most {most} strings")
    for stop in stopping.stop:
        longest = limits.MAX_STOP_STRING
        check(0 < len(stop) <= longest, "stopping.stop", f"1 to {longest} characters each")
    ids, most = stopping.stop_token_ids, limits.MAX_STOP_TOKEN_IDS
    check(len(ids) <= most, "stopping.stop_token_ids", f"at most {most} ids")
    _check_token_ids("stopping.stop_token_ids", ids, ids_below)
