"""Each bad request gets its own code and reason, over the wire, while good traffic runs beside."""

from __future__ import annotations

import asyncio

import pytest

from deltamux.config import FrontendConfig
from deltamux.errors import Unavailable
from deltamux.frontend import limits
from deltamux.v1 import adapters_pb2, control_pb2
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Submit

NAN, INFINITY = float("nan"), float("inf")
# The harness's engine: 259 token ids, 2048 tokens of context.
VOCABULARY, CONTEXT = 259, 2048


@pytest.fixture
def config() -> FrontendConfig:
    """With room for all requests of this file at once: none is refused for want of a place."""
    return FrontendConfig(model="tiny", port=0, metrics_port=None, max_waiting_requests=256)


def generate(**fields: object) -> v1.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "hi"
    return v1.GenerateRequest(**fields)


def sampling(**fields: object) -> v1.GenerateRequest:
    return generate(sampling=v1.SamplingParams(**fields))


def stopping(**fields: object) -> v1.GenerateRequest:
    return generate(stopping=v1.StoppingCriteria(**fields))


def chat(*turns: tuple[str, str]) -> v1.GenerateRequest:
    messages = [v1.Chat.Message(role=role, content=content) for role, content in turns]
    return generate(chat=v1.Chat(messages=messages))


def tokens(*ids: int) -> v1.GenerateRequest:
    return generate(token_ids=v1.TokenIds(ids=ids))


INVALID = "INVALID_ARGUMENT"
# name: (request, reason, field)
BAD = {
    "no input": (v1.GenerateRequest(), INVALID, "input"),
    "empty text": (generate(text=""), INVALID, "text"),
    "no tokens": (tokens(), INVALID, "token_ids"),
    "no messages": (chat(), INVALID, "chat"),
    "text over the characters": (
        generate(text="a" * (limits.MAX_PROMPT_CHARACTERS + 1)),
        "PROMPT_TOO_LONG",
        "text",
    ),
    "chat over the characters": (
        chat(("user", "a" * limits.MAX_PROMPT_CHARACTERS), ("user", "b")),
        "PROMPT_TOO_LONG",
        "chat",
    ),
    "text over the context": (generate(text="a" * CONTEXT), "PROMPT_TOO_LONG", "text"),
    "chat over the context": (chat(("user", "a" * CONTEXT)), "PROMPT_TOO_LONG", "chat"),
    "tokens over the context": (tokens(*[5] * CONTEXT), "PROMPT_TOO_LONG", "token_ids"),
    "answer over the context": (
        stopping(max_tokens=CONTEXT - 1),
        "CONTEXT_EXCEEDED",
        "stopping.max_tokens",
    ),
    "max_tokens huge": (stopping(max_tokens=2**31 - 1), "CONTEXT_EXCEEDED", "stopping.max_tokens"),
    "max_tokens -1": (stopping(max_tokens=2**32 - 1), "CONTEXT_EXCEEDED", "stopping.max_tokens"),
    "max_tokens 0": (stopping(max_tokens=0), INVALID, "stopping.max_tokens"),
    "min over max": (stopping(max_tokens=3, min_tokens=4), INVALID, "stopping.min_tokens"),
    "ignore_eos for ever": (stopping(ignore_eos=True), INVALID, "stopping.ignore_eos"),
    "token id V": (tokens(5, VOCABULARY), INVALID, "token_ids"),
    "token id -1": (tokens(2**32 - 1), INVALID, "token_ids"),
    "stop token id V": (stopping(stop_token_ids=[VOCABULARY]), INVALID, "stopping.stop_token_ids"),
    "too many stop token ids": (
        stopping(stop_token_ids=[5] * (limits.MAX_STOP_TOKEN_IDS + 1)),
        INVALID,
        "stopping.stop_token_ids",
    ),
    "bias of token V": (sampling(logit_bias={VOCABULARY: 1}), INVALID, "sampling.logit_bias"),
    "bias NaN": (sampling(logit_bias={5: NAN}), INVALID, "sampling.logit_bias"),
    "bias 101": (sampling(logit_bias={5: 101}), INVALID, "sampling.logit_bias"),
    "too many biases": (
        sampling(logit_bias=dict.fromkeys(range(limits.MAX_LOGIT_BIAS_ENTRIES + 1), 1.0)),
        INVALID,
        "sampling.logit_bias",
    ),
    "n 0": (sampling(n=0), INVALID, "sampling.n"),
    "n 9": (sampling(n=limits.MAX_CHOICES + 1), INVALID, "sampling.n"),
    "n 1e6": (sampling(n=10**6), INVALID, "sampling.n"),
    "temperature NaN": (sampling(temperature=NAN), INVALID, "sampling.temperature"),
    "temperature inf": (sampling(temperature=INFINITY), INVALID, "sampling.temperature"),
    "temperature -0.1": (sampling(temperature=-0.1), INVALID, "sampling.temperature"),
    "temperature 1e9": (sampling(temperature=1e9), INVALID, "sampling.temperature"),
    "temperature 1e-6": (sampling(temperature=1e-6), INVALID, "sampling.temperature"),
    "top_p 0": (sampling(top_p=0), INVALID, "sampling.top_p"),
    "top_p 1.1": (sampling(top_p=1.1), INVALID, "sampling.top_p"),
    "top_p NaN": (sampling(top_p=NAN), INVALID, "sampling.top_p"),
    "top_k -2": (sampling(top_k=2**32 - 2), INVALID, "sampling.top_k"),
    "min_p 2": (sampling(min_p=2), INVALID, "sampling.min_p"),
    "min_p NaN": (sampling(min_p=NAN), INVALID, "sampling.min_p"),
    "repetition 0": (sampling(repetition_penalty=0), INVALID, "sampling.repetition_penalty"),
    "repetition 11": (sampling(repetition_penalty=11), INVALID, "sampling.repetition_penalty"),
    "presence 3": (sampling(presence_penalty=3), INVALID, "sampling.presence_penalty"),
    "frequency NaN": (sampling(frequency_penalty=NAN), INVALID, "sampling.frequency_penalty"),
    "seed 2**63": (sampling(seed=2**63), INVALID, "sampling.seed"),
    "logprobs 21": (
        generate(output=v1.OutputOptions(logprobs=limits.MAX_LOGPROBS + 1)),
        INVALID,
        "output.logprobs",
    ),
    "10,000 stop strings": (stopping(stop=["x"] * 10_000), INVALID, "stopping.stop"),
    "a stop string of 1 MB": (stopping(stop=["x" * 2**20]), INVALID, "stopping.stop"),
    "an empty stop string": (stopping(stop=["x", ""]), INVALID, "stopping.stop"),
    "unknown role": (chat(("operator", "hi")), INVALID, "chat.role"),
    "the template refuses": (chat(("assistant", "hi")), "CHAT_REFUSED", "chat"),
    "100,000 messages": (chat(*[("user", "")] * 100_000), INVALID, "chat"),
    "request_id too long": (generate(request_id="x" * 129), "REQUEST_ID_INVALID", "request_id"),
    "request_id ESC": (generate(request_id="a\x1b[2J"), "REQUEST_ID_INVALID", "request_id"),
    "request_id newline": (generate(request_id="a\nb"), "REQUEST_ID_INVALID", "request_id"),
    "salt too long": (generate(cache_salt="é" * 65), INVALID, "cache_salt"),
} | {
    f"adapter {name!r}": (generate(adapter=name), "INVALID_ADAPTER_NAME", "adapter")
    for name in (
        "../x", "/abs", "a/../b", "a%2fb", "..\\x", "~", "C:\\x", ".", "a\nb", "a\x00", "hf://a/b",
        "http://169.254.169.254/", "ünï", "a" * 201, "@" + "0" * 64, "\u202eabc", " a", "a ",
    )
} | {
    f"version {version!r}": (generate(adapter=f"a@{version}"), "INVALID_ADAPTER_VERSION", "adapter")
    for version in ("", "latest", "latest@x", "abc", "0" * 65, "g" * 64)
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_are_refused_before_the_engine_hears_of_them(
    harness, refusal, name: str
) -> None:
    request, reason, field = BAD[name]
    got = await refusal(harness.collect(request))
    assert (got.code, got.reason) == ("INVALID_ARGUMENT", reason)
    assert got.fields == (field,)
    assert got.retry_after is None
    assert_reveals_nothing(got.message)
    assert harness.engine.received() == []


def assert_reveals_nothing(message: str) -> None:
    assert message.isprintable() and len(message) < 400
    assert not any(
        word in message for word in ("Traceback", ".py", "/home", "/tmp", "0x", "<class")
    )


async def test_good_traffic_runs_untouched_beside_all_of_them(harness, refusal) -> None:
    harness.engine.answer_all()
    texts = [f"good request {number}" for number in range(8)]

    async def good(text: str) -> str:
        request = generate(text=text, stopping=v1.StoppingCriteria(max_tokens=64))
        return "".join(message.text for message in await harness.collect(request))

    small = [request for request, *_ in BAD.values() if request.ByteSize() < 10_000]
    good_calls = [asyncio.create_task(good(text)) for text in texts]
    refusals = await asyncio.gather(*(refusal(harness.collect(request)) for request in small))
    assert await asyncio.gather(*good_calls) == texts
    assert {got.code for got in refusals} == {"INVALID_ARGUMENT"}


GOOD: dict[str, v1.GenerateRequest] = {
    "limits themselves": generate(
        request_id="~" * limits.MAX_REQUEST_ID,
        sampling=v1.SamplingParams(
            temperature=100,
            top_p=1,
            top_k=2**31 - 1,
            min_p=1,
            repetition_penalty=10,
            presence_penalty=2,
            frequency_penalty=-2,
            seed=2**63 - 1,
            n=limits.MAX_CHOICES,
            logit_bias={258: -100},
        ),
        stopping=v1.StoppingCriteria(
            max_tokens=CONTEXT - 2, min_tokens=CONTEXT - 2, stop=["x" * 1024] * 16
        ),
        output=v1.OutputOptions(logprobs=20),
        cache_salt="x" * 128,
    ),
    "the context but one": tokens(*[5] * (CONTEXT - 1)),
    "zero values that are set": sampling(temperature=0, top_k=0, seed=0, min_p=0),
    "a smallest temperature": sampling(temperature=limits.MIN_TEMPERATURE),
    "unicode": generate(text="\u202e\x00\ufffd😀"),
}


@pytest.mark.parametrize("name", GOOD)
async def test_what_touches_a_limit_is_served(harness, name: str) -> None:
    call = harness.inference.Generate(GOOD[name], timeout=20)
    await harness.engine.receive(Submit)
    call.cancel()


async def test_a_sequence_that_the_kv_cache_can_never_hold_is_refused(harness, refusal) -> None:
    harness.client.fail_all(Unavailable("gone"))
    harness.engine.close()
    harness.engine = harness.connect()
    harness.engine.ready(kv_cache_tokens=100)
    await harness.client.ready()
    got = await refusal(harness.collect(stopping(max_tokens=99)))
    assert (got.code, got.reason) == ("INVALID_ARGUMENT", "CONTEXT_EXCEEDED")
    call = harness.inference.Generate(generate())
    assert (await harness.engine.receive(Submit)).stopping.max_tokens == 98
    call.cancel()


async def test_abort_takes_a_bounded_list(harness, refusal) -> None:
    request = control_pb2.AbortRequest(request_ids=["x"] * (limits.MAX_ABORT_IDS + 1))
    got = await refusal(harness.control.Abort(request))
    assert (got.code, got.fields) == ("INVALID_ARGUMENT", ("request_ids",))


def load(**fields: object) -> adapters_pb2.LoadAdapterRequest:
    return adapters_pb2.LoadAdapterRequest(**({"name": "a", "source": "/data/a"} | fields))


BAD_LOADS = {
    "no name": (load(name=""), "INVALID_ADAPTER_NAME", "name"),
    "a bad name": (load(name="../a"), "INVALID_ADAPTER_NAME", "name"),
    "a version": (load(name="a@12345678"), "INVALID_ADAPTER_NAME", "name"),
    "no source": (load(source=""), INVALID, "source"),
    "a NUL": (load(source="/a\x00b"), INVALID, "source"),
    "a long path": (load(source="/" + "a" * limits.MAX_SOURCE), INVALID, "source"),
    "upto remote": (load(upto=v1.TIER_REMOTE), INVALID, "upto"),
    "upto 99": (load(upto=99), INVALID, "upto"),
    "pinned on the host": (load(upto=v1.TIER_HOST, pinned=True), INVALID, "pinned"),
    "no digest": (load(expect_version="abc"), INVALID, "expect_version"),
    "no folder": (load(source="/nowhere/at/all"), "SOURCE_NOT_FOUND", "source"),
} | {
    source: (load(source=source), "SOURCE_NOT_ALLOWED", "source")
    for source in ("file:///etc", "http://169.254.169.254/", "http://[::1]/", "hf://a", "gopher:x")
}


@pytest.mark.parametrize("name", BAD_LOADS)
async def test_bad_loads_are_refused(harness, refusal, name: str) -> None:
    request, reason, field = BAD_LOADS[name]
    got = await refusal(harness.adapters.LoadAdapter(request))
    assert (got.code, got.reason, got.fields) == ("INVALID_ARGUMENT", reason, (field,))
    assert_reveals_nothing(got.message)


@pytest.mark.parametrize("method", ["UnloadAdapter", "GetAdapter", "UpdateAdapter"])
@pytest.mark.parametrize("name", ["", "..", "~", "a@latest"])
async def test_bad_names_are_refused_everywhere(harness, refusal, method: str, name: str) -> None:
    request = getattr(adapters_pb2, f"{method}Request")(name=name)
    got = await refusal(getattr(harness.adapters, method)(request))
    assert got.code == "INVALID_ARGUMENT" and got.reason.startswith("INVALID_ADAPTER_")
    assert_reveals_nothing(got.message)


async def test_bad_lists_are_refused(harness, refusal) -> None:
    for fields, field in (({"page_token": "a@b"}, "page_token"), ({"at_least": 99}, "at_least")):
        got = await refusal(
            harness.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(**fields))
        )
        assert (got.code, got.fields) == ("INVALID_ARGUMENT", (field,))
