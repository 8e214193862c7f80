"""Generate as a client sees it, over a real connection."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import (
    Cancel,
    FirstToken,
    Logprob,
    Submit,
    TokenLogprobs,
)

BASE = FirstToken(0.5, 0.25, "", cached_prompt_tokens=2)


def request_of(text: str = "hi", **fields: object) -> v1.GenerateRequest:
    fields.setdefault("stopping", v1.StoppingCriteria(max_tokens=64))
    return v1.GenerateRequest(text=text, **fields)


def text_of(messages: list[v1.GenerateResponse], index: int = 0) -> str:
    return "".join(message.text for message in messages if message.index == index)


async def test_a_stream_has_all_that_the_contract_promises(harness, ids) -> None:
    call = asyncio.create_task(harness.collect(request_of("hello", request_id="r1")))
    submit = await harness.engine.receive(Submit)
    assert list(submit.prompt) == ids("hello")
    for text in "abc":
        harness.engine.say(submit, ids(text), first=BASE if text == "a" else None)
    harness.engine.say(submit, ids("d"), finish="length")
    messages = await call
    assert text_of(messages) == "abcd"
    assert {message.request_id for message in messages} == {"r1"}
    assert [message.HasField("served_by") for message in messages].index(True) == 0
    assert messages[0].served_by == v1.ServedBy(model="tiny")
    assert sum(message.HasField("finish") for message in messages) == 1
    last = messages[-1]
    assert last.finish.reason == v1.Finish.REASON_LENGTH
    assert last.usage == v1.Usage(prompt_tokens=5, completion_tokens=4, cached_prompt_tokens=2)
    assert (last.timing.queue, last.timing.adapter_load) == (0.5, 0.25)
    assert 0 < last.timing.first_token <= last.timing.total
    assert not any(message.token_ids or message.logprobs for message in messages)


async def test_a_missing_request_id_is_minted(harness) -> None:
    harness.engine.answer_all()
    first, second = await harness.collect(request_of()), await harness.collect(request_of())
    assert first[0].request_id and first[0].request_id != second[0].request_id


async def test_every_field_reaches_the_engine(harness) -> None:
    request = request_of(
        sampling=v1.SamplingParams(
            temperature=0.5,
            top_p=0.75,
            top_k=7,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.125,
            seed=2**63 - 1,
            n=3,
            logit_bias={5: -2.0},
        ),
        stopping=v1.StoppingCriteria(max_tokens=9, min_tokens=2, stop_token_ids=[7, 8]),
        output=v1.OutputOptions(logprobs=4),
        priority=-3,
    )
    call = harness.inference.Generate(request, timeout=20)
    submit = await harness.engine.receive(Submit)
    call.cancel()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 0.125)
    assert (sampling.seed, sampling.logit_bias, sampling.logprobs) == (2**63 - 1, {5: -2.0}, 4)
    assert (submit.stopping.max_tokens, submit.stopping.min_tokens) == (9, 2)
    assert submit.stopping.stop_token_ids == (7, 8, 1)
    assert (submit.n, submit.priority, submit.adapter, submit.adapter_path) == (3, -3, "", "")
    # gRPC rounds the time up on its way.
    assert 0 < submit.deadline <= 21


async def test_open_fields_take_the_models_defaults_and_the_rest_of_the_context(harness) -> None:
    call = harness.inference.Generate(v1.GenerateRequest(text="hi"))
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert submit.stopping.max_tokens == 2048 - 2
    assert submit.stopping.stop_token_ids == (1,)
    assert submit.sampling.temperature == 0 and submit.sampling.seed is None
    assert submit.sampling.logprobs is None
    assert 590 < submit.deadline <= 600


async def test_ignore_eos_leaves_only_the_clients_own_stop_tokens(harness) -> None:
    stopping = v1.StoppingCriteria(max_tokens=4, ignore_eos=True, stop_token_ids=[9])
    call = harness.inference.Generate(request_of(stopping=stopping))
    submit = await harness.engine.receive(Submit)
    call.cancel()
    assert submit.stopping.stop_token_ids == (9,)


async def test_token_ids_and_chats_are_prompts_too(harness, reference) -> None:
    harness.engine.answer_all()
    given = v1.GenerateRequest(
        token_ids=v1.TokenIds(ids=[5, 6, 7]), output=v1.OutputOptions(return_token_ids=True)
    )
    assert [i for message in await harness.collect(given) for i in message.token_ids] == [5, 6, 7]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hé "}]
    chat = v1.Chat(messages=[v1.Chat.Message(**turn) for turn in turns])
    wanted = v1.GenerateRequest(
        chat=chat, output=v1.OutputOptions(return_token_ids=True, skip_special_tokens=False)
    )
    messages = await harness.collect(wanted)
    oracle = reference.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert [i for message in messages for i in message.token_ids] == oracle
    assert text_of(messages) == reference.decode(oracle)


async def test_choices_are_told_apart_and_the_cost_comes_last(harness, ids) -> None:
    call = asyncio.create_task(harness.collect(request_of("p", sampling=v1.SamplingParams(n=3))))
    submit = await harness.engine.receive(Submit)
    for index, text in ((1, "one"), (0, "zero"), (2, "two")):
        harness.engine.say(submit, ids(text), index=index, first=BASE)
    for index, end in ((2, "!"), (0, "?"), (1, ".")):
        harness.engine.say(submit, ids(end), index=index, finish="length")
    messages = await call
    assert [text_of(messages, index) for index in range(3)] == ["zero?", "one.", "two!"]
    assert [message.HasField("usage") for message in messages].count(True) == 1
    assert messages[-1].usage.completion_tokens == 3 + 4 + 3 + 3
    assert [message.HasField("served_by") for message in messages].count(True) == 1
    assert messages[0].HasField("served_by") and messages[-1].HasField("timing")
    assert sum(message.HasField("finish") for message in messages) == 3


async def test_echo_stands_in_front_of_the_first_choice_only(harness, ids) -> None:
    request = request_of(
        "prompt ", sampling=v1.SamplingParams(n=2), output=v1.OutputOptions(echo=True)
    )
    call = asyncio.create_task(harness.collect(request))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("b"), index=1, finish="length", first=BASE)
    harness.engine.say(submit, ids("a"), index=0, finish="length", first=BASE)
    messages = await call
    assert text_of(messages, 0) == "prompt a" and text_of(messages, 1) == "b"


async def test_logprobs_carry_the_tokens_text(harness, ids) -> None:
    request = request_of(output=v1.OutputOptions(logprobs=2, return_token_ids=True))
    call = asyncio.create_task(harness.collect(request))
    submit = await harness.engine.receive(Submit)
    a, b, end = *ids("ab"), 1
    logprobs = TokenLogprobs(Logprob(a, -0.5), (Logprob(a, -0.5), Logprob(b, -1.5)))
    harness.engine.say(submit, [a], logprobs=(logprobs,), first=BASE)
    ending = TokenLogprobs(Logprob(end, -0.25), (Logprob(end, -0.25),))
    harness.engine.say(submit, [end], logprobs=(ending,), finish="stop")
    messages = await call
    entries = [entry for message in messages for entry in message.logprobs]
    assert [(c.token, c.logprob) for c in entries[0].top] == [("a", -0.5), ("b", -1.5)]
    assert entries[0].chosen.token_id == a
    assert entries[1].chosen.token == "</s>"
    assert [i for message in messages for i in message.token_ids] == [a, end]
    assert text_of(messages) == "a"


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_across_tokens_ends_its_choice_alone(
    harness, ids, include_stop: bool
) -> None:
    request = request_of(
        sampling=v1.SamplingParams(n=2),
        stopping=v1.StoppingCriteria(max_tokens=64, stop=["END", "|"], include_stop=include_stop),
    )
    call = harness.inference.Generate(request, timeout=20)
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("go E"), first=BASE)
    assert (await call.read()).text == "go "
    harness.engine.say(submit, ids("ND and more"))
    message = await call.read()
    assert message.text == ("END" if include_stop else "")
    assert message.finish == v1.Finish(reason=v1.Finish.REASON_STOP, stop="END")
    assert await harness.engine.receive(Cancel) == Cancel(submit.request_id, (0,))
    harness.engine.say(submit, ids("late"), index=0)
    harness.engine.say(submit, ids("other"), index=1, first=BASE, finish="length")
    message = await call.read()
    assert (message.index, message.text) == (1, "other")
    assert message.usage.completion_tokens == len("go END") + len("other")
    assert await call.read() == grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_what_a_stop_string_did_not_claim_is_shown_at_the_end(harness, ids) -> None:
    stopping = v1.StoppingCriteria(max_tokens=9, stop=["STOP"])
    call = asyncio.create_task(harness.collect(request_of(stopping=stopping)))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("a STO"), first=BASE, finish="length")
    assert text_of(await call) == "a STO"


async def test_stop_strings_are_looked_for_behind_min_tokens(harness, ids) -> None:
    """As the engine holds stop tokens back: none is among the first four."""
    stopping = v1.StoppingCriteria(max_tokens=9, min_tokens=4, stop=["x"])
    call = asyncio.create_task(harness.collect(request_of(stopping=stopping)))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, ids("xxaxbxc"), first=BASE)
    assert text_of(await call) == "xxaxb"


@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_token_is_named_and_shown_only_when_asked(
    harness, ids, include_stop: bool
) -> None:
    stopping = v1.StoppingCriteria(max_tokens=9, include_stop=include_stop)
    output = v1.OutputOptions(skip_special_tokens=False)
    call = asyncio.create_task(harness.collect(request_of(stopping=stopping, output=output)))
    submit = await harness.engine.receive(Submit)
    harness.engine.say(submit, [*ids("ok"), 1], first=BASE, finish="stop")
    messages = await call
    assert text_of(messages) == ("ok</s>" if include_stop else "ok")
    assert messages[-1].finish == v1.Finish(reason=v1.Finish.REASON_STOP, stop_token_id=1)
    assert messages[-1].usage.completion_tokens == 3


async def test_characters_are_never_cut(harness, ids) -> None:
    text = "aé→😀é😀"
    call = harness.inference.Generate(request_of(), timeout=20)
    submit = await harness.engine.receive(Submit)
    pieces: list[str] = []
    for position, token_id in enumerate(ids(text)):
        harness.engine.say(submit, [token_id], first=BASE if position == 0 else None)
    harness.engine.say(submit, ids("😀")[:3], finish="length")
    async for message in call:
        pieces.append(message.text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


async def test_calls_are_counted_by_how_they_ended(harness, refusal) -> None:
    harness.engine.answer_all()
    await harness.collect(request_of("abc"))
    await refusal(harness.collect(request_of("")))

    assert harness.sample("requests_total", code="OK") == 1
    assert harness.sample("requests_total", code="INVALID_ARGUMENT") == 1
    assert harness.sample("requests_in_flight") == 0
    assert harness.sample("prompt_tokens_total") == 3
    assert harness.sample("generation_tokens_total") == 3
    assert harness.sample("time_to_first_token_seconds_count") == 1
